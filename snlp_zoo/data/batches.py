"""Token ids and padded batches. Shapes: B examples of a batch, N tokens of its longest example."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from snlp_zoo.data.text import TextSet
from snlp_zoo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def model_inputs(batch: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """What of a batch this model is fed: not labels, not numbers of examples, token types only if it knows them."""
    fed = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    if "token_type_ids" in fed and "token_type_ids" not in signature(type(model).forward).parameters:
        del fed["token_type_ids"]
    return fed


def longest(tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig") -> int:
    """The most tokens per text that the tokenizer and the model take; a model without positions takes any number."""
    return min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", tokenizer.model_max_length))


@dataclass(frozen=True)
class Tokenised:
    """Token ids of n texts, unpadded; token_type_ids where the tokenizer has them; how many texts were cut."""

    input_ids: list[list[int]]
    token_type_ids: list[list[int]] | None
    labels: list[int] | list[float] | None
    truncated: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def take(self, rows: Sequence[int]) -> "Tokenised":
        """The texts with these numbers, in this order."""

        def of(column: Any) -> Any:
            return None if column is None else [column[row] for row in rows]

        return Tokenised(of(self.input_ids), of(self.token_type_ids), of(self.labels), self.truncated)


def tokenise(tokenizer: "PreTrainedTokenizerBase", texts: TextSet, max_length: int) -> Tokenised:
    """Token ids of every text (or pair), at most max_length with the special tokens; the longer of a pair is cut first.

    Raises:
        DataError: max_length leaves no room for a token, or a text has no tokens.
    """
    special = tokenizer.num_special_tokens_to_add(pair=texts.pairs is not None)
    room = special + (1 if texts.pairs is None else 2)
    if max_length < room:
        raise DataError(f"max_length {max_length} leaves no room for text beside {special} special tokens; use {room}+")
    whole = tokenizer(texts.texts, texts.pairs, verbose=False)
    columns = {key: whole[key] for key in ("input_ids", "token_type_ids") if key in whole}
    long = [row for row, ids in enumerate(columns["input_ids"]) if len(ids) > max_length]
    if long:  # a second pass over these alone: it counts them, with any kind of tokenizer
        some = texts.take(long)
        cut = tokenizer(some.texts, some.pairs, truncation="longest_first", max_length=max_length, verbose=False)
        for key, rows in columns.items():
            for row, ids in zip(long, cut[key], strict=True):
                rows[row] = ids
    if [] in columns["input_ids"]:
        row = columns["input_ids"].index([])
        raise DataError(f"text {row + 1} ({texts.texts[row][:40]!r}) has no tokens in this vocabulary; remove it")
    return Tokenised(columns["input_ids"], columns.get("token_type_ids"), texts.labels, truncated=len(long))


def mixed_seed(seed: int, epoch: int) -> int:
    """One seed for both: the CPU generator reads 32 bits of it, so a shifted pair would lose one of the two."""
    return (seed * 1_000_003 + epoch) % 2**32


class LengthGroupedBatches(Sampler[list[int]]):
    """Batches of example numbers with similar lengths, so that little of a batch is padding.

    Shuffled: a fresh permutation per epoch is cut into pools of `pool` batches, each pool is sorted by length and cut
    into batches, and the batches are shuffled. It depends on (seed, epoch) only and leaves the global generator alone.
    Not shuffled: the whole set sorted by length. A batch that is not full comes last.

    Args:
        lengths: tokens per example.
        drop_last: leave out the batch that is not full, unless it is the only one.
        pool: batches per pool: more means less padding and less chance.
    Raises:
        DataError: no examples, or batch_size or pool below 1.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = True,
        pool: int = 50,
    ) -> None:
        if not lengths or batch_size < 1 or pool < 1:
            raise DataError(
                f"cannot batch {len(lengths)} examples with batch_size {batch_size} and pool {pool}; "
                "each must be at least 1"
            )
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.pool = pool
        self.epoch = 0

    @property
    def sampler(self) -> "LengthGroupedBatches":
        # Across several processes accelerate hands the epoch on to batch_sampler.sampler alone.
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.batch_size)
        return full + (rest > 0 and not (self.drop_last and full > 0))

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._shuffled() if self.shuffle else self._cut(self._by_length(range(len(self.lengths))))
        return iter(batches[: len(self)])

    def _shuffled(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        # The rest is taken before sorting, else it would always be the longest examples.
        full = len(order) - len(order) % self.batch_size
        width = self.pool * self.batch_size
        batches = [
            batch
            for start in range(0, full, width)
            for batch in self._cut(self._by_length(order[start : min(start + width, full)]))
        ]
        shuffled = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
        return shuffled + self._cut(self._by_length(order[full:]))

    def _by_length(self, rows: Sequence[int]) -> list[int]:
        return sorted(rows, key=self.lengths.__getitem__)

    def _cut(self, rows: list[int]) -> list[list[int]]:
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]


def collate(tokenised: Tokenised, indices: Sequence[int], pad_token_id: int) -> dict[str, Tensor]:
    """One batch, padded on the right to its longest example.

    Returns:
        input_ids, attention_mask (1 for text, 0 for padding) and, where there are any, token_type_ids, int64 [B, N];
        labels, int64 or float32 [B], where there are any; index, the example numbers, int64 [B].
    """
    rows = [tokenised.input_ids[index] for index in indices]
    batch = {"input_ids": _pad(rows, pad_token_id), "attention_mask": _pad([[1] * len(row) for row in rows], 0)}
    if tokenised.token_type_ids is not None:
        batch["token_type_ids"] = _pad([tokenised.token_type_ids[index] for index in indices], 0)
    if tokenised.labels is not None:
        labels = [tokenised.labels[index] for index in indices]
        batch["labels"] = torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.long)
    batch["index"] = torch.tensor(indices, dtype=torch.long)
    return batch


def loader(
    tokenised: Tokenised,
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool,
    drop_last: bool,
) -> DataLoader:
    """A DataLoader over `LengthGroupedBatches` (its `batch_sampler`) that gives the dicts of `collate`.

    Iterating it draws nothing from the global generator.

    Raises:
        DataError: no examples, batch_size below 1, or a tokenizer without a padding token.
    """
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"{type(tokenizer).__name__} has no padding token; set tokenizer.pad_token to one of its tokens"
        )
    lengths = [len(ids) for ids in tokenised.input_ids]
    return DataLoader(
        _Numbers(len(tokenised)),
        batch_sampler=LengthGroupedBatches(lengths, batch_size, seed=seed, shuffle=shuffle, drop_last=drop_last),
        collate_fn=partial(collate, tokenised, pad_token_id=tokenizer.pad_token_id),
        # Every iteration draws a seed for the workers, from the global generator unless there is one here.
        generator=torch.Generator().manual_seed(seed),
    )


def _pad(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.long)


class _Numbers(Dataset[int]):
    """Example n is the number n: `collate` looks the rest up."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index
