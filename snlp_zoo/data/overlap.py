"""No held-out text in a training text: found by its words, counted, left out."""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from snlp_zoo.data.text import TextSet
from snlp_zoo.data.wording import START, Runs, Words, word_spans, words

KINDS = ("exact", "normalised", "contained")
_SHOWN, _LONG = 5, 200  # examples, and characters of each


class Found(NamedTuple):
    """How a training text holds a held-out one (one of KINDS), and the words of that."""

    kind: str
    words: Words


class HeldOut:
    """The validation and test texts of a run, to be looked up in its training texts.

    A training text holds one of them that it equals, exactly or `words` by words, or which stands inside it and has at
    least 5 words. Of held-out pairs each text counts, but where the training texts are pairs too, they are compared as
    pairs, in either order: sentences that several pairs share are a task's own.
    """

    def __init__(self, sets: Iterable[TextSet]) -> None:
        alone: dict[str, Words] = {}
        paired: dict[str, Words] = {}
        self.pairs: dict[frozenset[str], Found] = {}
        self.pair_words: dict[frozenset[Words], Found] = {}
        for texts in sets:
            known = alone if texts.pairs is None else paired
            known.update((text, words(text)) for text in [*texts.texts, *(texts.pairs or [])])
            for pair in zip(texts.texts, texts.pairs or [], strict=False):
                both = [paired[text] for text in pair]
                self.pairs[frozenset(pair)] = Found("exact", both[0] + both[1])
                if all(both):
                    self.pair_words[frozenset(both)] = Found("normalised", both[0] + both[1])
        self.alone, self.every = _Known(alone), _Known(alone | paired)

    def __len__(self) -> int:
        return len(self.every.texts)

    def find(self, texts: TextSet) -> dict[int, Found]:
        """Which rows hold a held-out text."""
        if texts.pairs is None:
            found = ((row, self.every.find(text)) for row, text in enumerate(texts.texts))
        else:
            found = (
                (row, self._find_pair(*pair)) for row, pair in enumerate(zip(texts.texts, texts.pairs, strict=True))
            )
        return {row: one for row, one in found if one}

    def _find_pair(self, text: str, second: str) -> Found | None:
        both = frozenset((text, second))
        return (
            self.pairs.get(both)
            or self.pair_words.get(frozenset(map(words, both)))
            or self.alone.find(text)
            or self.alone.find(second)
        )

    def cut(self, text: str) -> str:
        """The text without the runs of words that are held-out texts of at least 5 words."""
        while held := list(self.every.runs.inside(words(text))):
            spans, kept, end = word_spans(text), [], 0
            for place, run in held:
                start, stop = spans[place][0], spans[place + len(run) - 1][1]
                kept.append(text[end : max(end, start)])
                end = max(end, stop)
            text = "".join(kept) + text[end:]
        return text


class _Known:
    """Held-out texts, looked up in three ways."""

    def __init__(self, texts: dict[str, Words]) -> None:
        self.texts = texts
        self.words = {one for one in texts.values() if one}
        self.runs = Runs(one for one in self.words if len(one) >= START)

    def find(self, text: str) -> Found | None:
        if text in self.texts:
            return Found("exact", self.texts[text])
        own = words(text)
        if own in self.words:
            return Found("normalised", own)
        return next((Found("contained", run) for _, run in self.runs.inside(own)), None)


def counted(texts: TextSet, found: dict[int, Found], left_out: int) -> dict[str, Any]:
    """How many rows hold a held-out text, by kind, how many of these are left out, and the first few."""
    kinds = [one.kind for one in found.values()]
    examples = [
        {"kind": one.kind, "text": _shortened(texts.texts[row]), "held_out": _shortened(" ".join(one.words))}
        for row, one in list(found.items())[:_SHOWN]
    ]
    return {
        "rows": len(texts),
        **{kind: kinds.count(kind) for kind in KINDS},
        "left_out": left_out,
        "examples": examples,
    }


def without_rows(texts: TextSet, gone: Collection[int]) -> TextSet:
    """All rows but these."""
    return texts.take([row for row in range(len(texts)) if row not in gone]) if gone else texts


def _shortened(text: str) -> str:
    return text if len(text) <= _LONG else text[: _LONG - 3] + "..."
