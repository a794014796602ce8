"""Texts inside others, and splits without a common wording, against a search through all pairs."""

import random

import pytest

from snlp_zoo.data import load_splits
from snlp_zoo.data.wording import Runs, disjoint_rows, word_spans, words
from snlp_zoo.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  CREW -- was_lovely! ", "the crew was lovely"),
        ("it's 3.5 stars", "it s 3 5 stars"),
        ("Cafe\u0301 na\u00efve \ufb01lm Stra\u00dfe", "cafe naive film strasse"),
        ("\U0001d407\U0001d422 \u210dO \u0130z\u0390", "hi ho iz\u03b9"),
        ("\u4f60\u597d\u3002 :-)", "\u4f60 \u597d"),
        ("T\u6064\u304c \uff21\uff29x2\U00020000", "t \u6064 \u304b aix2 \U00020000"),
        ("...", ""),
    ],
)
def test_words(text, expected):
    assert " ".join(words(text)) == expected
    spans = word_spans(text)
    assert len(spans) == len(words(text))
    assert all(words(text[start:end]) == (word,) for (start, end), word in zip(spans, words(text), strict=True))


def contains(text, run):
    return any(text[i : i + len(run)] == run for i in range(len(text) - len(run) + 1))


def rows_of_phrases(seed):
    """Sentences over a few words, phrases of them, repeats and rows without a word, in any order."""
    rng = random.Random(seed)
    sentences = [[rng.choice("abcdefg") for _ in range(rng.randint(6, 14))] for _ in range(40)]
    phrases = []
    for sentence in sentences:
        for _ in range(6):
            start = rng.randrange(len(sentence))
            phrases.append(sentence[start : start + rng.randint(1, 9)])
    rows = [" ".join(row) for row in sentences + phrases] + ["...", "!"]
    rows += [row.upper().replace(" ", " , ") for row in rows[:5]]
    rng.shuffle(rows)
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_runs_finds_what_a_search_through_all_finds(seed):
    texts = [words(row) for row in rows_of_phrases(seed) if words(row)]
    runs = Runs(texts)
    for text in texts[:60]:
        found = list(runs.inside(text))
        assert all(text[place : place + len(run)] == run for place, run in found)
        assert {run for _, run in found} == {run for run in texts if contains(text, run)}


@pytest.mark.parametrize("sizes", [[5], [3, 4], [None]], ids=str)
def test_held_out_texts_share_no_wording_with_what_stays(sizes):
    texts = rows_of_phrases(0)
    stay, *splits = disjoint_rows(texts, sizes, seed=1)
    every = {words(text) for text in texts}
    wholes = {text for text in every if text and not any(contains(other, text) for other in every - {text})}
    assert [len(split) for split in splits] == [size or len(wholes) // 10 for size in sizes]
    held = [words(texts[row]) for split in splits for row in split]
    assert len(set(held)) == len(held)
    assert set(held) <= wholes
    expected = [
        row for row, text in enumerate(texts) if not words(text) or not any(contains(h, words(text)) for h in held)
    ]
    assert stay == expected
    assert len(stay) < len(texts) - len(held)  # phrases and repeats left
    assert disjoint_rows(texts, sizes, seed=1) == [stay, *splits]
    assert disjoint_rows(texts, sizes, seed=2)[1:] != splits


def test_too_few_texts_stand_alone():
    with pytest.raises(DataError, match="2 train texts stand inside no other, too few to hold 2 out; lower validation"):
        disjoint_rows(["a b", "a b c", "b", "d"], [2], seed=0)


def test_splits_of_phrases(tmp_path):
    rows = [f"{text}\t{number % 2}" for number, text in enumerate(rows_of_phrases(0))]
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *rows]))
    (tmp_path / "dev.tsv").write_text("text\tlabel\nheld out\t1\n")
    splits = load_splits(str(tmp_path), disjoint=True, validation_size=6, seed=3)
    assert (len(splits.validation), splits.test.texts) == (6, ["held out"])
    held = [words(text) for text in splits.validation.texts]
    assert not any(contains(text, words(row)) for text in held for row in splits.train.texts if words(row))
    for split in (splits.train, splits.validation):
        assert {f"{text}\t{label}" for text, label in zip(split.texts, split.labels, strict=True)} <= set(rows)
    assert len(load_splits(str(tmp_path), disjoint=True, seed=3, train_size=9).train) == 9
    (tmp_path / "test.tsv").write_text("text\tlabel\na b\t0\n")
    assert len(load_splits(str(tmp_path), disjoint=True).train) == len(rows)  # nothing is carved


def test_pairs_have_no_disjoint_splits(tmp_path):
    rows = [f"{text}\tsame\t{row % 2}" for row, text in enumerate(rows_of_phrases(0))]
    (tmp_path / "train.tsv").write_text("\n".join(["text\tother\tlabel", *rows]))
    with pytest.raises(DataError, match="disjoint compares single texts"):
        load_splits(str(tmp_path), text_pair="other", disjoint=True)
