import random

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from snlp_zoo.data import TextSet
from snlp_zoo.data.batches import LengthGroupedBatches, Tokenised, collate, loader, tokenise
from snlp_zoo.errors import DataError

VOCABULARY = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "a": 4, "b": 5, "c": 6, "d": 7}


def make_tokenizer(special=True, pad_token="[PAD]"):  # noqa: S107
    inner = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        inner.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = ["input_ids", "token_type_ids", "attention_mask"] if special else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad_token, model_input_names=names)


def examples(size, seed=0):
    rng = random.Random(seed)
    ids = [[4] * rng.randint(1, 40) for _ in range(size)]
    return Tokenised(ids, None, list(range(size)), truncated=0)


def batches_of(size, batch_size, **options):
    lengths = [len(ids) for ids in examples(size).input_ids]
    return LengthGroupedBatches(lengths, batch_size, **({"seed": 0} | options))


def test_tokenise_cuts_to_max_length_and_counts():
    got = tokenise(make_tokenizer(), TextSet(["a b", "a b c", "a b c d"], None, [0, 1, 0]), max_length=5)
    assert got.input_ids == [[1, 4, 5, 2], [1, 4, 5, 6, 2], [1, 4, 5, 6, 2]]
    assert got.token_type_ids == [[0] * 4, [0] * 5, [0] * 5]
    assert (got.truncated, got.labels, len(got)) == (1, [0, 1, 0], 3)


def test_tokenise_cuts_the_longer_of_a_pair():
    got = tokenise(make_tokenizer(), TextSet(["a b c d", "a"], ["d", "b"]), max_length=6)
    assert got.input_ids == [[1, 4, 5, 2, 7, 2], [1, 4, 2, 5, 2]]
    assert got.token_type_ids == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert (got.truncated, got.labels) == (1, None)


def test_tokenise_without_special_tokens_or_types():
    got = tokenise(make_tokenizer(special=False), TextSet(["a b c", "d"]), max_length=1)
    assert got == Tokenised([[4], [7]], None, None, truncated=1)


def test_tokenise_errors():
    with pytest.raises(DataError, match=r"max_length 2 leaves no room for text beside 2 special tokens; use 3\+"):
        tokenise(make_tokenizer(), TextSet(["a"]), max_length=2)
    with pytest.raises(DataError, match=r"text 2 \(' '\) has no tokens in this vocabulary; remove it"):
        tokenise(make_tokenizer(special=False), TextSet(["a", " "]), max_length=4)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("size", [1, 3, 8, 101])
def test_every_example_comes_once(size, drop_last, shuffle):
    sampler = batches_of(size, 4, shuffle=shuffle, drop_last=drop_last, pool=3)
    batches = list(sampler)
    numbers = [number for batch in batches for number in batch]
    assert len(batches) == len(sampler) > 0
    assert len(set(numbers)) == len(numbers)
    assert len(numbers) == (size - size % 4 if drop_last and size >= 4 else size)
    assert all(len(batch) == 4 for batch in batches[:-1])


def test_the_order_depends_on_seed_and_epoch_alone():
    first = batches_of(101, 4)
    torch.manual_seed(1)
    second = batches_of(101, 4)
    torch.manual_seed(2)
    assert list(first) == list(second) == list(first)
    second.set_epoch(1)
    assert list(first) != list(second)
    assert list(first) != list(batches_of(101, 4, seed=1))


def test_batches_hold_similar_lengths_in_mixed_order():
    tokenised = examples(2000)
    lengths = [[len(tokenised.input_ids[number]) for number in batch] for batch in batches_of(2000, 8, pool=50)]
    assert sum(max(batch) - min(batch) for batch in lengths) / len(lengths) < 1.5
    means = torch.tensor([sum(batch) / 8 for batch in lengths])
    assert abs(torch.corrcoef(torch.stack([means, torch.arange(250.0)]))[0, 1]) < 0.15


def test_the_left_out_examples_are_not_the_longest():
    lengths = list(range(11))
    left_out = set()
    for seed in range(40):
        kept = LengthGroupedBatches(lengths, 10, seed=seed)
        left_out |= {*lengths} - {number for batch in kept for number in batch}
    assert len(left_out) > 6


def test_unshuffled_batches_are_sorted_and_stable():
    assert list(LengthGroupedBatches([3, 1, 2, 1], 2, seed=0, shuffle=False)) == [[1, 3], [2, 0]]


@pytest.mark.parametrize(("lengths", "size", "pool"), [([], 4, 50), ([1], 0, 50), ([1], 4, 0)])
def test_nothing_to_batch(lengths, size, pool):
    with pytest.raises(DataError, match=f"cannot batch {len(lengths)} examples with batch_size {size} and pool {pool}"):
        LengthGroupedBatches(lengths, size, seed=0, pool=pool)


def test_collate_pads_to_the_longest():
    batch = collate(Tokenised([[5], [4, 4], [6, 6, 6]], [[0], [0, 1], [0, 0, 1]], [0, 1, 2], 0), [1, 0], pad_token_id=9)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[4, 4], [5, 9]],
        "attention_mask": [[1, 1], [1, 0]],
        "token_type_ids": [[0, 1], [0, 0]],
        "labels": [1, 0],
        "index": [1, 0],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_collate_labels():
    assert "labels" not in collate(Tokenised([[5]], None, None, 0), [0], pad_token_id=0)
    assert collate(Tokenised([[5]], None, [0.5], 0), [0], pad_token_id=0)["labels"].dtype == torch.float32


def test_loader_leaves_the_global_generator_alone():
    batches = loader(examples(20), make_tokenizer(), 4, seed=1, shuffle=True, drop_last=True)
    before = torch.get_rng_state()
    seen = [batch["index"] for batch in batches]
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(torch.cat(seen).tolist()) == list(range(20))


def test_loader_follows_its_batch_sampler():
    here = loader(examples(20), make_tokenizer(), 4, shuffle=True, drop_last=False)
    first = [batch["index"].tolist() for batch in here]
    here.batch_sampler.set_epoch(1)
    assert first != [batch["index"].tolist() for batch in here] == list(here.batch_sampler)


def test_loader_needs_a_padding_token():
    with pytest.raises(DataError, match=r"has no padding token; set tokenizer\.pad_token"):
        loader(examples(4), make_tokenizer(pad_token=None), 4, shuffle=False, drop_last=False)


def test_accelerate_shards_follow_the_epoch():
    whole = loader(examples(40), make_tokenizer(), 4, shuffle=True, drop_last=True)
    shards = [
        prepare_data_loader(whole, num_processes=2, process_index=index, put_on_device=False, rng_types=[])
        for index in range(2)
    ]
    orders = []
    for epoch in (0, 3):
        seen = []
        for shard in shards:
            shard.set_epoch(epoch)
            seen.append([number for batch in shard for number in batch["index"].tolist()])
        assert sorted(seen[0] + seen[1]) == list(range(40))
        orders.append(seen[0])
    assert orders[0] != orders[1]
