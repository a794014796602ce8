"""Held-out texts in training texts: what counts as one, pairs, documents, and the time it takes."""

import time

import pytest

from snlp_zoo.data import TextSet
from snlp_zoo.data.overlap import HeldOut, counted, without_rows
from snlp_zoo.data.wording import words

SHORT, LONG = "Good .", "the crew was lovely to us all"
UNSPACED = "\u9152\u5e97\u5f88\u5e72\u51c0"
HELD = HeldOut([TextSet([SHORT, LONG, "??", UNSPACED])])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (SHORT, "exact"),
        ("good", "normalised"),
        ("GOOD!!", "normalised"),
        ("The crew was 'lovely' to us, all", "normalised"),
        ("I think the crew was lovely -- to us all, truly", "contained"),
        ("so good .", None),  # too short to be found inside others
        ("the crew was lovely to us", None),  # stands inside a held-out text, not the other way round
        ("the crew was not lovely to us all", None),
        ("a?crew the crew was lovely to us allround", None),
        ("??", "exact"),
        (f"\u8fd9\u5bb6{UNSPACED}\uff0c\u670d\u52a1\u597d\u3002", "contained"),
        ("\u8fd9\u5bb6\u9152\u5e97\u4e0d\u5e72\u51c0", None),
        ("!", None),  # no words are no wording
    ],
)
def test_what_a_training_text_holds(text, kind):
    found = HELD.find(TextSet(["before", text]))
    assert [(row, one.kind) for row, one in found.items()] == ([(1, kind)] if kind else [])


def test_rows_are_left_out_and_counted():
    texts = TextSet([LONG, "x", "good", f"{LONG} a", f"b {LONG.upper()}"], None, [0, 1, 2, 3, 4])
    found = HELD.find(texts)
    assert without_rows(texts, found) == TextSet(["x"], None, [1])
    report = counted(texts, found, left_out=4)
    assert [report[key] for key in ("rows", "exact", "normalised", "contained", "left_out")] == [5, 1, 1, 2, 4]
    assert report["examples"][1] == {"kind": "normalised", "text": "good", "held_out": "good"}
    many = counted(TextSet([LONG + " y" * 200] * 9), HELD.find(TextSet([LONG + " y" * 200] * 9)), 9)
    assert [len(example["text"]) for example in many["examples"]] == [200] * 5


def test_pairs():
    held = HeldOut([TextSet(["a man sings", "who is it"], ["a man plays", "it is Ann"]), TextSet(["dull"])])
    assert len(held) == 5
    pairs = TextSet(
        ["a man sings", "a man plays", "A man: sings", "a man sings", "x"],
        ["a man plays", "a man sings", "a man plays!", "it rains", "dull"],
    )
    assert {row: one.kind for row, one in held.find(pairs).items()} == {
        0: "exact",
        1: "exact",
        2: "normalised",
        4: "exact",  # a text that was held out by itself
    }
    alone = TextSet(["a man sings", "it is ann", "it rains"])
    assert {row: one.kind for row, one in held.find(alone).items()} == {0: "exact", 1: "normalised"}


def test_documents_lose_the_words_alone():
    other = "we waited, all of us, on the runway"
    held = HeldOut([TextSet([LONG, other, "to us all, we waited, all"])])
    text = f"Once.\n\n\u201cThe crew WAS lovely,\u201d he said.  {LONG}, {other}! Then: {LONG}"
    cut = held.cut(text)
    assert cut.startswith("Once.\n\n\u201cThe crew WAS lovely,\u201d he said.  ")
    assert not list(held.every.runs.inside(words(cut)))
    assert "".join(cut.split()).endswith("!Then:")
    joined = f"the crew was lovely {LONG} to us all, then"  # what is left would be one again
    assert held.cut(joined).split() == [",", "then"]
    assert held.cut("nothing of it\n") == "nothing of it\n"


def test_no_text_is_held_out():
    assert HeldOut([]).find(TextSet(["a", ""])) == {}
    assert len(HeldOut([TextSet([])])) == 0


def test_a_million_words_take_seconds():
    texts = [" ".join(f"w{(row * 7 + i * i) % 5000}" for i in range(20)) for row in range(50_000)]
    held = HeldOut([TextSet([" ".join(text.split()[3:15]) for text in texts[:1000]])])
    start = time.process_time()
    found = held.find(TextSet(texts))
    assert {*range(1000)} <= set(found)
    assert time.process_time() - start < 20  # about 0.5 s on an idle core
