"""More training text from less: copies in which words are replaced by words that a language model holds for near.

Jiao et al. 2020 (arXiv:1909.10351), on tokens: a word that is one token is replaced, with a fixed probability, by one
of the nearest words: by the masked-language-model head's first choices in its place where there is such a head, else by
cosine in the table of word embeddings. Words of several tokens, numbers and signs stay, so texts keep their lengths.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snlp_zoo.data.batches import Tokenised, model_inputs
from snlp_zoo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WORD_STARTS = ("Ġ", "▁")  # byte-level BPE and SentencePiece mark the first piece of a word, WordPiece all others
_CHUNK = 512  # words looked up together
_TOKENS = 2048  # of masked texts read together: each gives a row of logits


class Words:
    """Which tokens of a vocabulary are words by themselves, and which go on with the word before."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        special = set(tokenizer.all_special_tokens)
        pieces = any(token.startswith("##") for token in tokens)
        marked = not pieces and any(token.startswith(_WORD_STARTS) for token in tokens if token not in special)
        bare = [token.removeprefix("##").lstrip("".join(_WORD_STARTS)) for token in tokens]
        starts = [token.startswith(_WORD_STARTS) if marked else not token.startswith("##") for token in tokens]
        known = [token not in special for token in tokens]
        self.is_word = [k and s and b.isalpha() for k, s, b in zip(known, starts, bare, strict=True)]
        self.goes_on = [k and not s and b.isalnum() for k, s, b in zip(known, starts, bare, strict=True)]
        self.ids = [number for number, is_word in enumerate(self.is_word) if is_word]

    def positions(self, ids: Sequence[int]) -> list[int]:
        """Where a text has a word of one token."""
        following = [*ids[1:], None]
        pairs = enumerate(zip(ids, following, strict=True))
        return [i for i, (one, after) in pairs if self.is_word[one] and not (after is not None and self.goes_on[after])]


def augment(
    tokenised: Tokenised,
    tokenizer: "PreTrainedTokenizerBase",
    model: "PreTrainedModel",
    *,
    copies: int,
    probability: float,
    candidates: int,
    seed: int,
) -> Tokenised:
    """The texts and, after them, `copies` altered copies of all, labels kept; the same seed gives the same copies.

    Args:
        model: reads the tokenizer's ids; with a masked-language-model head if its outputs have logits [B, N, V].
        probability: that a word is replaced.
        candidates: nearest words to draw from, all equally likely.
    Raises:
        DataError: fewer words in the vocabulary than candidates.
    """
    words = Words(tokenizer)
    if len(words.ids) <= candidates:
        raise DataError(
            f"data.augment.candidates {candidates} asks for more words than the vocabulary's {len(words.ids)} offer; "
            "lower it"
        )
    places = [words.positions(ids) for ids in tokenised.input_ids]
    if model.get_output_embeddings() is None:
        wanted = {ids[i] for ids, at in zip(tokenised.input_ids, places, strict=True) for i in at}
        table: Any = model.get_input_embeddings().weight
        by_word = neighbours(table, sorted(wanted), words.ids, candidates)
        near = [[by_word[ids[i]] for i in at] for ids, at in zip(tokenised.input_ids, places, strict=True)]
    else:
        mask = tokenizer.mask_token_id
        segments: list[Any] = tokenised.token_type_ids or [None] * len(places)
        near = [
            predicted(model, ids, at, words.ids, candidates, mask, own)
            for ids, at, own in zip(tokenised.input_ids, places, segments, strict=True)
        ]
    draw = random.Random(seed)  # noqa: S311
    rows = [list(ids) for ids in tokenised.input_ids]
    for _ in range(copies):
        for ids, at, choices in zip(tokenised.input_ids, places, near, strict=True):
            row = list(ids)
            for i, choice in zip(at, choices, strict=True):
                if draw.random() < probability:
                    row[i] = draw.choice(choice)
            rows.append(row)
    times, types, labels = copies + 1, tokenised.token_type_ids, tokenised.labels
    return Tokenised(rows, types and types * times, labels and labels * times, tokenised.truncated)


@torch.no_grad()
def neighbours(table: Tensor, wanted: list[int], among: list[int], count: int) -> dict[int, list[int]]:
    """Token -> the `count` tokens `among` others whose rows of `table` [V, D] have the highest cosine with its own."""
    unit = torch.nn.functional.normalize(table.detach().float().cpu(), dim=-1)
    others, found = torch.tensor(among), {}
    for start in range(0, len(wanted), _CHUNK):
        some = wanted[start : start + _CHUNK]
        cosine = unit[some] @ unit[others].T
        cosine[torch.tensor(some)[:, None] == others] = -2.0  # a word is no replacement of itself
        for one, best in zip(some, others[cosine.topk(count).indices].tolist(), strict=True):
            found[one] = best
    return found


@torch.no_grad()
def predicted(
    model: "PreTrainedModel",
    ids: Sequence[int],
    at: list[int],
    among: list[int],
    count: int,
    mask: int,
    types: Sequence[int] | None = None,
) -> list[list[int]]:
    """For each of these places of a text, the `count` tokens `among` others that the model expects there instead.

    Args:
        types: token types of the text, if the tokenizer has them.
    """
    found, others, size = [], torch.tensor(among), max(1, _TOKENS // len(ids))
    for start in range(0, len(at), size):
        some = at[start : start + size]
        text, rows = torch.tensor([ids] * len(some)), torch.arange(len(some))
        own = text[rows, some]
        text[rows, some] = mask
        batch = {"input_ids": text} | ({} if types is None else {"token_type_ids": torch.tensor([types] * len(some))})
        fed = {name: values.to(model.device) for name, values in model_inputs(batch, model).items()}
        logits = model(**fed).logits[rows, some].float().cpu()[:, others]
        logits[own[:, None] == others] = -torch.inf
        found += others[logits.topk(count).indices].tolist()
    return found
