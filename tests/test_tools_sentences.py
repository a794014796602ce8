"""Documents cut into sentences: where they end, which are kept, and that the seed repeats a sample."""

import json
import lzma
import sys
from importlib import import_module
from pathlib import Path

import pytest

from snlp_zoo.data import load_unlabelled

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    yield import_module("sentences")
    sys.modules.pop("sentences", None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It rained. We waited!  Who came?", ["It rained.", "We waited!", "Who came?"]),
        (
            "Mr. Ash met J. Birch at St. Ives. So did I. He left",
            ["Mr. Ash met J. Birch at St. Ives.", "So did I.", "He left"],
        ),
        (
            "He said \u201cgo.\u201d Then 3.5 miles, e.g. on foot",
            ["He said \u201cgo.\u201d", "Then 3.5 miles, e.g. on foot"],
        ),
        ("all small . so it is ? yes, at 3 . 5", ["all small .", "so it is ?", "yes, at 3 .", "5"]),
        ("a line\nbroken here . Next ( one ) .\n\nLast", ["a line broken here .", "Next ( one ) .", "Last"]),
    ],
)
def test_where_sentences_end(tool, text, expected):
    assert list(tool.sentences(text)) == expected


def test_what_is_kept(tool, tmp_path, capsys):
    rows = [
        {"document": "It rained all day. Too short. It rained -- all DAY!", "label": 1},
        {"document": f"{'word ' * 61}. The crew was kind.", "label": 0},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.tsv").write_text("sentence1\tsentence2\nthe crew was kind\tit was late\none two three\tso it goes\n")
    found = tool.collect([str(tmp_path / "a.jsonl"), str(tmp_path / "b.tsv")], seed=0)
    assert found == ["It rained all day.", "The crew was kind.", "one two three", "it was late", "so it goes"]
    assert "a.jsonl: 2 sentences" in capsys.readouterr().out


def test_pairs_are_neighbours_of_a_text(run, tmp_path):
    rows = [{"text": "One two three. Four five six. Short. Seven eight nine. Ten eleven twelve. Alone it stays."}]
    rows += [{"text": 'He said "go now. She went away. '}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("pairs.tsv.xz", "a.jsonl", "--pairs")
    train, validation = load_unlabelled("pairs.tsv.xz", text="sentence1", text_pair="sentence2")
    found = [*zip(train.texts, train.pairs), *zip(validation.texts, validation.pairs)]  # noqa: B905
    assert sorted(found) == [
        ('He said "go now.', "She went away."),
        ("One two three.", "Four five six."),
        ("Seven eight nine.", "Ten eleven twelve."),
    ]
    with pytest.raises(SystemExit, match=r"pairs are written as \.tsv or \.tsv\.xz"):
        run("pairs.txt", "a.jsonl", "--pairs")


@pytest.fixture
def run(tool, tmp_path, monkeypatch):
    """Function: the script with these arguments, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["sentences.py", *arguments])
        tool.main()

    return start


def test_a_seeded_sample_of_each_source_goes_to_a_file_that_recipes_read(run, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} text number {number}\n" for number in range(50)))

    def written(out, *more):
        run(out, "a.txt:7", "b.txt", *more)
        return (tmp_path / out).read_bytes()

    first = lzma.decompress(written("one.txt.xz"))
    assert first == written("two.txt") != written("three.txt", "--seed", "1")
    lines = first.decode().splitlines()
    assert [line[0] for line in lines] == ["a"] * 7 + ["b"] * 50
    assert lines == sorted(lines, key=lambda line: (line[0], int(line.split()[-1])))
    train, validation = load_unlabelled(str(tmp_path / "one.txt.xz"))
    assert sorted(train.texts + validation.texts) == sorted(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("o.txt", "a.tsv"), "no column text, sentence, .* among title, body"),
        (("o.txt", "b.tsv"), r"b\.tsv: no such file"),
        (("o.tsv", "a.tsv"), r"written as \.txt or \.txt\.xz"),
        (("o.tsv", "c.txt", "--pairs"), r"o\.tsv: no pairs to write"),
        (("there/o.txt", "a.tsv"), r"there/o\.txt: there is no such folder"),
    ],
)
def test_mistakes_are_told(run, tmp_path, arguments, message):
    (tmp_path / "a.tsv").write_text("title\tbody\nx\ty\n")
    (tmp_path / "c.txt").write_text("one sentence of five words\n")
    with pytest.raises(SystemExit, match=message):
        run(*arguments)
    assert not list(tmp_path.glob("o.*"))
