"""Altered copies of token ids: which words change, into what, and that a seed repeats them."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer

from snlp_zoo.data.augment import Words, augment, neighbours, predicted
from snlp_zoo.data.batches import Tokenised, tokenise
from snlp_zoo.data.text import TextSet
from snlp_zoo.errors import DataError

VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "good",
    "bad",
    "day",
    "night",
    "sun",
    "##set",
    "!",
    "7",
    "tea",
]
ID = {token: number for number, token in enumerate(VOCABULARY)}
TEXTS = ["good day !", "bad sunset 7", "night", "good tea", "!"]


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab=ID)


@pytest.fixture(scope="module")
def config():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertConfig(vocab_size=len(VOCABULARY), initializer_range=1.0, **sizes)


@pytest.fixture(scope="module", params=[BertModel, BertForMaskedLM], ids=["cosine", "masked-lm"])
def model(request, config):
    torch.manual_seed(0)
    return request.param(config).eval()


@pytest.fixture(scope="module")
def tokenised(tokenizer):
    return tokenise(tokenizer, TextSet(TEXTS, None, [0, 1, 0, 1, 0]), 16)


def altered(tokenised, tokenizer, model, **changes):
    options = {"copies": 40, "probability": 0.5, "candidates": 2, "seed": 0} | changes
    return augment(tokenised, tokenizer, model, **options)


def test_only_words_of_one_token_change(tokenised, tokenizer, model):
    more = altered(tokenised, tokenizer, model)
    words = {ID[word] for word in ("good", "bad", "day", "night", "sun", "tea")}
    assert len(more) == 41 * len(TEXTS)
    assert more.input_ids[: len(TEXTS)] == tokenised.input_ids
    assert more.labels == tokenised.labels * 41
    assert more.token_type_ids == tokenised.token_type_ids * 41
    changed = set()
    for number, row in enumerate(more.input_ids):
        text = tokenised.input_ids[number % len(TEXTS)]
        assert len(row) == len(text)
        for i, (before, after) in enumerate(zip(text, row, strict=True)):
            if before != after:
                changed.add((number % len(TEXTS), i))
                assert after in words
    assert changed == {(0, 1), (0, 2), (1, 1), (2, 1), (3, 1), (3, 2)}  # "sun ##set", "7" and "!" never


def test_a_word_is_replaced_with_this_probability(tokenised, tokenizer, model):
    more = altered(tokenised, tokenizer, model, copies=500, probability=0.3)
    different = sum(row[1] != ID["night"] for row in more.input_ids[len(TEXTS) + 2 :: len(TEXTS)])
    assert different / 500 == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 500) ** 0.5)


def test_the_seed_repeats_the_copies(tokenised, tokenizer, model):
    torch.manual_seed(5)
    assert altered(tokenised, tokenizer, model) == altered(tokenised, tokenizer, model)
    assert altered(tokenised, tokenizer, model) != altered(tokenised, tokenizer, model, seed=1)


def test_the_input_is_left_alone(tokenised, tokenizer, model):
    before = [list(row) for row in tokenised.input_ids]
    altered(tokenised, tokenizer, model, probability=1.0)
    assert tokenised.input_ids == before


def test_neighbours_by_hand():
    table = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 2.0], [1.0, 2.0], [-1.0, 0.0]])
    assert neighbours(table, [0, 2], [0, 1, 2, 3], 2) == {0: [1, 3], 2: [3, 1]}
    assert neighbours(table, [0], [1, 2, 3, 4], 4) == {0: [1, 3, 2, 4]}


def test_the_head_reads_the_text_with_the_word_masked(config, tokenised):
    torch.manual_seed(0)
    model = BertForMaskedLM(config).eval()
    ids, among = tokenised.input_ids[3], [ID[word] for word in ("good", "bad", "day", "night", "tea")]
    masked = torch.tensor([[ID["[CLS]"], ID["[MASK]"], ID["tea"], ID["[SEP]"]]])
    scores = model(masked).logits[0, 1]
    others = sorted(among[1:], key=lambda token: -scores[token])  # "good" does not replace itself
    assert predicted(model, ids, [1], among, 4, ID["[MASK]"]) == [others]


def test_many_places_are_read_in_pieces(config, tokenised, monkeypatch):
    model = BertForMaskedLM(config).eval()
    ids, among = tokenised.input_ids[0], [ID["good"], ID["bad"], ID["day"]]
    whole = predicted(model, ids, [1, 2], among, 2, ID["[MASK]"])
    monkeypatch.setattr("snlp_zoo.data.augment._TOKENS", 1)
    assert predicted(model, ids, [1, 2], among, 2, ID["[MASK]"]) == whole


def test_pieces_of_words_that_mark_their_beginning():
    class Marked:
        all_special_tokens = ("<s>",)
        tokens = ("<s>", "Ġgood", "Ġsun", "set", "!", "Ġ7")

        def __len__(self):
            return len(self.tokens)

        def convert_ids_to_tokens(self, ids):
            return [self.tokens[i] for i in ids]

    words = Words(Marked())
    assert words.positions([0, 1, 4, 2, 3, 5, 1, 0]) == [1, 6]


def test_too_few_words(tokenised, tokenizer, model):
    with pytest.raises(DataError, match=r"candidates 6 asks for more words than the vocabulary's 6 offer"):
        altered(tokenised, tokenizer, model, candidates=6)


def test_texts_without_words_and_labels(tokenizer, model):
    only = Tokenised([[ID["[CLS]"], ID["!"], ID["[SEP]"]]], None, None, 0)
    more = altered(only, tokenizer, model, copies=2)
    assert more == Tokenised(only.input_ids * 3, None, None, 0)


def test_the_head_knows_which_text_of_a_pair_a_word_is_in(tokenizer, config):
    torch.manual_seed(0)
    model = BertForMaskedLM(config).eval()
    pairs = tokenise(tokenizer, TextSet(["good day"], ["bad night"], [0]), 16)
    (ids,), (types,) = pairs.input_ids, pairs.token_type_ids
    among = [ID[word] for word in ("good", "bad", "tea", "sun")]
    masked = torch.tensor([ids])
    masked[0, 5] = ID["[MASK]"]
    logits = model(masked, token_type_ids=torch.tensor([types])).logits[0, 5, among]
    best = [among[place] for place in logits.argsort(descending=True)]
    assert predicted(model, ids, [5], among, 4, ID["[MASK]"], types) == [best]
    assert predicted(model, ids, [5], among, 4, ID["[MASK]"]) != [best]
    seen = {row[5] for row in altered(pairs, tokenizer, model, candidates=1).input_ids}
    everything = Words(tokenizer).ids
    assert seen == {ids[5], *predicted(model, ids, [5], everything, 1, ID["[MASK]"], types)[0]}
