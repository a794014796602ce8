"""Which texts stand inside others as a run of words, and splits that share no wording."""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from unicodedata import combining, normalize

from snlp_zoo.errors import DataError

Words = tuple[str, ...]
START = 5  # words by which texts are looked up
# Chinese and Japanese, which leave no space between words
_SIGNS = r"\u3041-\u3096\u30a1-\u30fa\u30fc-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_SIGNS}]|[^\W_{_SIGNS}]+")


def words(text: str) -> Words:
    """The words of a text in lower case without accents: runs of letters and digits, whatever stands between; each
    Chinese or Japanese character is one.
    """
    return tuple(_WORD.findall(_plain(text)))


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where each of the `words` of a text starts and ends in it."""
    plain = [_plain(sign) for sign in text]
    origin = [place for place, signs in enumerate(plain) for _ in signs]
    return [(origin[match.start()], origin[match.end() - 1] + 1) for match in _WORD.finditer("".join(plain))]


def _plain(text: str) -> str:
    if text.isascii():
        return text.lower()
    # in this order: letters of mathematics have no case until they are taken for usual ones
    return "".join(sign for sign in normalize("NFKD", text).casefold() if not combining(sign))


class Runs:
    """Texts to be found inside others; one look-up per word of those, whatever the number of texts.

    Args:
        texts: words of each text, none empty.
    """

    def __init__(self, texts: Iterable[Words]) -> None:
        self.by_start: dict[Words, list[Words]] = {}
        for text in dict.fromkeys(texts):
            self.by_start.setdefault(text[:START], []).append(text)
        self.starts = sorted({len(start) for start in self.by_start})

    def inside(self, text: Words) -> Iterator[tuple[int, Words]]:
        """Every text that stands in this one, itself too if it is one of them, and the number of its first word."""
        for size in self.starts:
            starts = list(zip(*(text[shift:] for shift in range(size)), strict=False))
            if self.by_start.keys().isdisjoint(starts):  # of most texts: none of what follows in Python
                continue
            for place, start in enumerate(starts):
                for found in self.by_start.get(start, ()):
                    if text[place : place + len(found)] == found:
                        yield place, found


def disjoint_rows(texts: Sequence[str], sizes: Sequence[int | None], seed: int) -> list[list[int]]:
    """Numbers of the rows that stay and of those of new splits, which share no wording with what stays.

    Held out are, by seed, texts that stand inside no other; whatever stands inside one of them or equals it belongs to
    no split. Texts are compared by their `words`; one without any stays.

    Args:
        sizes: rows of each new split; None: a tenth of the texts that stand inside no other.
    Raises:
        DataError: there are too few such texts.
    """
    rows: dict[Words, list[int]] = {}
    for row, text in enumerate(texts):
        rows.setdefault(words(text), []).append(row)
    wordless = rows.pop((), [])
    runs, within = Runs(rows), set[Words]()
    for long in sorted(rows, key=len, reverse=True):
        if long not in within:  # else what stands in it has been found in what it stands in
            within.update(found for _, found in runs.inside(long) if found != long)
    wholes = [whole for whole in rows if whole not in within]
    counts = [max(1, len(wholes) // 10) if size is None else size for size in sizes]
    if len(wholes) <= sum(counts):
        raise DataError(
            f"data.disjoint: {len(wholes)} train texts stand inside no other, too few to hold {sum(counts)} out; "
            "lower validation_size, give more rows, or leave disjoint out"
        )
    random.Random(seed).shuffle(wholes)  # noqa: S311
    splits, gone = [], set[Words]()
    for count in counts:
        held, wholes = wholes[:count], wholes[count:]
        splits.append([rows[whole][0] for whole in held])
        gone.update(found for whole in held for _, found in runs.inside(whole))
    stay = [row for phrase, numbers in rows.items() if phrase not in gone for row in numbers]
    return [sorted(stay + wordless), *splits]
