"""Text as one stream of tokens, for models that predict the next one.

    texts -> ids, a separator after each -> one stream -> crops: anywhere, to train; one after another, to be scored on

Shapes: B crops of a batch, N tokens of a crop.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from snlp_zoo.data.batches import mixed_seed
from snlp_zoo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS = 1000  # encoded together: an encoding takes a hundred times the memory of its ids


@dataclass(frozen=True)
class Stream:
    """S tokens to predict, and what stands before the first.

    Args:
        tokens: int32 [S + 1]; the first is a separator and only ever context.
        utf8_bytes, characters: of the text in the S tokens. A separator counts as what it is; where it is the
            tokenizer's end of text, as one byte and one character, as a line break would.
        unknown: tokens that stand for a character which the tokenizer does not know.
    """

    tokens: Tensor
    utf8_bytes: int
    characters: int
    unknown: int

    def __len__(self) -> int:
        return len(self.tokens) - 1


def make_stream(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", separator: str | None = None) -> Stream:
    """All texts in their order, each followed by the separator: a string, or None for the tokenizer's end of text.

    Raises:
        DataError: no text, no end of text in the tokenizer, or a separator without tokens.
    """
    if isinstance(texts, str):
        raise DataError("a stream is made of a list of texts, got one text; put it into a list")
    if separator is None:
        if not isinstance(tokenizer.eos_token_id, int):
            raise DataError("the tokenizer has no end of text to stand between texts; set data.separator to a string")
        between = [tokenizer.eos_token_id]
    else:
        between = tokenizer(separator, add_special_tokens=False)["input_ids"]
    if not texts or not between:
        raise DataError(f"{len(texts)} texts and the separator {separator!r} make no stream; give some of both")
    parts = [torch.tensor(between[-1:], dtype=torch.int32)]
    for start in range(0, len(texts), _TEXTS):
        some = tokenizer(list(texts[start : start + _TEXTS]), add_special_tokens=False, verbose=False)["input_ids"]
        parts += [torch.tensor(ids + between, dtype=torch.int32) for ids in some]
    tokens, after = torch.cat(parts), separator or "\n"
    return Stream(
        tokens,
        utf8_bytes=sum(len(text.encode()) for text in texts) + len(texts) * len(after.encode()),
        characters=sum(map(len, texts)) + len(texts) * len(after),
        unknown=0 if tokenizer.unk_token_id is None else int((tokens[1:] == tokenizer.unk_token_id).sum()),
    )


class Crops(Dataset[int]):
    """The places of a stream's tokens; `collate` looks up the crops that start there.

    Args:
        length: tokens of a crop, N.
        fill: the token that follows the end of the stream, to no effect.
    """

    def __init__(self, stream: Stream, length: int, fill: int = 0) -> None:
        self.stream, self.length, self.fill = stream, length, fill

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, start: int) -> int:
        return start

    def collate(self, starts: Sequence[int]) -> dict[str, Tensor]:
        """The crops that start at these places.

        Returns:
            input_ids, attention_mask and labels, int64 [B, N]; labels[:, n] is the token after input_ids[:, n], -100
            beyond the end of the stream, where attention_mask is 0; index, the starts, int64 [B].
        """
        index = torch.tensor(starts, dtype=torch.long)
        width = min(self.length, len(self) - min(starts))
        places = index[:, None] + torch.arange(width)  # of inputs; labels are one further
        inside = places < len(self)
        tokens, places = self.stream.tokens, places.clamp_max(len(self) - 1)
        return {
            "input_ids": tokens[places].long().masked_fill(~inside, self.fill),
            "attention_mask": inside.long(),
            "labels": tokens[places + 1].long().masked_fill(~inside, -100),
            "index": index,
        }


class CropBatches(Sampler[list[int]]):
    """Batches of places where crops start.

    Shuffled: as many places as crops cover the stream once, anywhere, drawn by (seed, epoch) alone; full batches only.
    Not shuffled: one crop after another, so that every token is predicted once; the last batch may not be full.

    Raises:
        DataError: batch_size below 1, or crops are drawn from a stream that is shorter than one.
    """

    def __init__(self, crops: Crops, batch_size: int, *, seed: int = 0, shuffle: bool) -> None:
        if batch_size < 1:
            raise DataError(f"cannot batch crops with batch_size {batch_size}; it must be at least 1")
        if shuffle and len(crops) < crops.length:
            raise DataError(
                f"the stream of {len(crops)} tokens is shorter than a crop of {crops.length}; give more text, or lower "
                "data.max_length"
            )
        self.crops, self.batch_size, self.seed, self.shuffle, self.epoch = crops, batch_size, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the places of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        count = -(-len(self.crops) // self.crops.length)
        return max(1, count // self.batch_size) if self.shuffle else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        starts = self._drawn() if self.shuffle else list(range(0, len(self.crops), self.crops.length))
        for first in range(0, len(starts), self.batch_size):
            yield starts[first : first + self.batch_size]

    def _drawn(self) -> list[int]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        last = len(self.crops) - self.crops.length
        return torch.randint(last + 1, (len(self) * self.batch_size,), generator=generator).tolist()


def crop_loader(
    stream: Stream, tokenizer: "PreTrainedTokenizerBase", length: int, batch_size: int, *, seed: int = 0, shuffle: bool
) -> DataLoader:
    """A DataLoader over `CropBatches` (its `batch_sampler`) that gives the dicts of `Crops.collate`.

    Iterating it draws nothing from the global generator.

    Raises:
        DataError: as `CropBatches`.
    """
    crops = Crops(stream, length, tokenizer.pad_token_id or 0)
    batches = CropBatches(crops, batch_size, seed=seed, shuffle=shuffle)
    generator = torch.Generator().manual_seed(seed)  # every iteration draws a seed for the workers
    return DataLoader(crops, batch_sampler=batches, collate_fn=crops.collate, generator=generator)
