import gzip
import json
import lzma

import pytest

from snlp_zoo.data import TextSet, load_unlabelled
from snlp_zoo.errors import DataError


def texts(first, count):
    return [f"text {number}" for number in range(first, first + count)]


def write(path, lines, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".jsonl" in path.name:
        content = "".join(json.dumps({column: line, "year": 1900}) + "\n" for line in lines)
    elif ".tsv" in path.name:
        content = f"{column}\tother\n" + "".join(f"{line}\tx\n" for line in lines)
    else:
        content = "\n \n".join(lines)  # blank lines as in running text
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(content.encode()))
    return str(path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.jsonl.xz", "a.tsv.gz", "a.tsv"])
def test_one_file_is_cut_by_seed(tmp_path, name):
    source = write(tmp_path / name, texts(0, 50))
    train, validation = load_unlabelled(source, seed=1)
    assert (len(train), len(validation)) == (45, 5)
    assert sorted(train.texts + validation.texts) == sorted(texts(0, 50))
    assert train.labels is train.pairs is None
    assert load_unlabelled(source, seed=1) == (train, validation) != load_unlabelled(source, seed=2)
    small, smaller = load_unlabelled(source, seed=1, train_size=7, validation_size=2)
    assert (len(small), len(smaller)) == (7, 2)
    assert set(small.texts) < set(train.texts)


def test_a_quote_is_a_character(tmp_path):
    source = write(tmp_path / "a.tsv", ["'' so \" it is", "b"])
    assert sorted(text for part in load_unlabelled(source) for text in part.texts) == ["'' so \" it is", "b"]


def test_sources_of_every_kind_are_joined(tmp_path):
    write(tmp_path / "folder" / "tune.tsv.xz", texts(0, 10), "sentence1")
    write(tmp_path / "folder" / "validation.tsv.xz", texts(10, 10), "sentence1")
    write(tmp_path / "folder" / "README.txt", ["no text"])
    (tmp_path / "folder" / "LICENSE").write_text("no text")
    sources = [str(tmp_path / "folder"), write(tmp_path / "films.jsonl.gz", texts(20, 10))]
    sources += [write(tmp_path / "valid.txt.xz", texts(30, 10))]
    train, validation = load_unlabelled(sources, text=["text", "sentence1"])
    assert (len(train), len(validation)) == (36, 4)
    assert sorted(train.texts + validation.texts) == sorted(texts(0, 40))


def test_a_folder_with_a_train_split_keeps_its_splits_and_its_test_to_itself(tmp_path):
    write(tmp_path / "set" / "train.txt", texts(0, 10))
    write(tmp_path / "set" / "valid.txt", texts(10, 3))
    write(tmp_path / "set" / "test.txt", texts(13, 3))
    assert load_unlabelled(str(tmp_path / "set")) == (TextSet(texts(0, 10)), TextSet(texts(10, 3)))
    assert load_unlabelled(str(tmp_path), name="set") == load_unlabelled(str(tmp_path / "set"))


def test_pairs_and_the_demo(tmp_path):
    source = write(tmp_path / "a.tsv", texts(0, 20))
    train, _ = load_unlabelled(source, text_pair="other")
    assert train.pairs == ["x"] * 18
    with pytest.raises(DataError, match="no column 'other'"):
        load_unlabelled([source, write(tmp_path / "a.txt", texts(0, 3))], text_pair="other")
    train, validation = load_unlabelled("tweets", train_size=5)
    assert (len(train), train.labels) == (5, None)
    assert len(validation) == 3507


def test_errors(tmp_path):
    source = write(tmp_path / "a.tsv", texts(0, 5))
    with pytest.raises(DataError, match=r"a\.tsv: no column 'txt' among text, other; .* Nearest: text\."):
        load_unlabelled(source, text="txt")
    with pytest.raises(DataError, match=r"no such file.* Nearest: a\.tsv"):
        load_unlabelled([source, str(tmp_path / "b.tsv")])
    with pytest.raises(DataError, match="1 train rows are too few"):
        load_unlabelled(write(tmp_path / "one.txt", ["alone"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no data files"):
        load_unlabelled(str(tmp_path / "empty"))
