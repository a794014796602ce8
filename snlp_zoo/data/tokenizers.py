"""Tokenizers trained on the spot, for models that learn a language from its text alone.

Each gives back every text it encodes: nothing is normalised, and nothing stands between tokens.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from snlp_zoo.errors import DataError, lookup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Kind = Literal["characters", "bytes", "bpe"]
END, UNKNOWN = "<|endoftext|>", "<unk>"


def train_tokenizer(kind: Kind, texts: Iterable[str], vocab_size: int | None = None) -> "PreTrainedTokenizerFast":
    """A tokenizer made from these texts, the same from the same texts.

    "characters": every character of the texts is a token, any other is `<unk>`. "bytes": the 256 bytes of UTF-8, each
    with its own number. "bpe": byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909). `<|endoftext|>`
    ends a text and fills batches up.

    Args:
        vocab_size: tokens with the special ones; of characters the most frequent are kept (None keeps all), bytes are
            always 256 and one.
    Raises:
        DataError: no text, or a vocab_size that the kind cannot have.
    """
    from transformers import PreTrainedTokenizerFast  # here: it loads torch

    if isinstance(texts, str):
        raise DataError("a tokenizer is trained on a list of texts, got one text; put it into a list")
    tokenizer = lookup("tokenizer", kind, _KINDS, DataError)(texts, vocab_size)
    unknown = {"unk_token": UNKNOWN} if kind == "characters" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        **unknown,
    )


def _characters(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    counts = Counter(character for text in texts for character in text)
    special = [END, UNKNOWN]
    if not counts or (vocab_size is not None and vocab_size <= len(special)):
        raise DataError(
            f"tokenizer: {len(counts)} characters and a vocab_size of {vocab_size} leave none beside "
            f"{' and '.join(special)}; give more text, or a larger vocab_size"
        )
    kept = sorted(counts, key=lambda character: (-counts[character], character))
    kept = sorted(kept[: None if vocab_size is None else vocab_size - len(special)])
    vocabulary = {token: number for number, token in enumerate([*special, *kept])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _bytes(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    if vocab_size not in (None, 257):
        raise DataError(f"tokenizer: bytes are 257 tokens with {END}, got vocab_size {vocab_size}; leave it out")
    # a byte that ByteLevel shows as itself has that code point, all others, in order, have those from 256
    signs = set(pre_tokenizers.ByteLevel.alphabet())
    beyond = iter(sorted(sign for sign in signs if ord(sign) > 255))
    by_byte = [chr(byte) if chr(byte) in signs else next(beyond) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({sign: byte for byte, sign in enumerate(by_byte)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


def _bpe(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    if vocab_size is None or vocab_size <= 257:
        raise DataError(f"tokenizer: bpe joins bytes, which are 257 tokens with {END}; got vocab_size {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


_KINDS: dict[str, Callable[[Iterable[str], int | None], Tokenizer]] = {
    "characters": _characters,
    "bytes": _bytes,
    "bpe": _bpe,
}
