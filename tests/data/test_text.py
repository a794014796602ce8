import json
import os
import subprocess
import sys

import datasets
import pytest

from snlp_zoo.data import TextSet, load_splits, read_set
from snlp_zoo.data.demo import LABELS
from snlp_zoo.errors import DataError


def write(path, rows, header=("text", "label")):
    lines = ["\t".join(map(str, row)) for row in (header, *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def numbered(size, start=0):
    return [(f"text {number}", ("bad", "good")[number % 2]) for number in range(start, start + size)]


def splits_of(result):
    return result.train, result.validation, result.test


def test_subset_is_seeded_nested_and_keeps_rows_together():
    whole = TextSet([f"t{n}" for n in range(50)], [f"p{n}" for n in range(50)], list(range(50)))
    small, large = whole.subset(10, seed=3), whole.subset(20, seed=3)
    assert (len(small), len(set(small.texts))) == (10, 10)
    assert small == whole.subset(10, seed=3) != whole.subset(10, seed=4)
    assert set(small.texts) < set(large.texts)
    assert small.texts == [f"t{n}" for n in small.labels]
    assert small.pairs == [f"p{n}" for n in small.labels]
    assert whole.subset(None, 0) is whole.subset(50, 0) is whole
    with pytest.raises(DataError, match="a subset of 0 examples holds nothing; ask for at least 1"):
        whole.subset(0, 0)


def test_tweets():
    splits = load_splits("tweets", train_size=100, test_size=50)
    assert [len(split) for split in splits_of(splits)] == [100, 3507, 50]
    assert splits.label_names == list(LABELS)
    assert set(splits.train.labels) == {0, 1, 2}
    with pytest.raises(DataError, match=r"tweets: label_names are \['negative', 'neutral', 'positive'\], got \['x'\]"):
        load_splits("tweets", label_names=["x"])


def test_one_file_is_cut_into_three_without_a_common_row(tmp_path):
    source = write(tmp_path / "data.tsv", numbered(100))
    splits = load_splits(source, seed=1)
    assert [len(split) for split in splits_of(splits)] == [80, 10, 10]
    assert len({text for split in splits_of(splits) for text in split.texts}) == 100
    assert splits.label_names == ["bad", "good"]
    for split in splits_of(splits):
        assert split.labels == [int(text.split()[1]) % 2 for text in split.texts]
    assert splits == load_splits(source, seed=1) != load_splits(source, seed=2)


def test_too_few_rows_to_carve_from(tmp_path):
    with pytest.raises(DataError, match="2 train rows are too few to carve 2 more splits"):
        load_splits(write(tmp_path / "data.tsv", numbered(2)))


@pytest.mark.parametrize("validation", ["validation", "dev"])
def test_a_folder_with_three_splits_is_taken_as_it_is(tmp_path, validation):
    write(tmp_path / "train.tsv", numbered(20))
    write(tmp_path / f"{validation}.tsv", numbered(5, 100))
    write(tmp_path / "test.tsv", numbered(6, 200))
    splits = load_splits(str(tmp_path))
    assert [len(split) for split in splits_of(splits)] == [20, 5, 6]
    assert splits.test.texts[0] == "text 200"
    assert load_splits(str(tmp_path.parent), name=tmp_path.name) == splits


@pytest.mark.parametrize("only", ["validation", "test"])
def test_the_only_other_split_is_reported_and_validation_comes_from_train(tmp_path, only):
    write(tmp_path / "train.tsv", numbered(20))
    write(tmp_path / f"{only}.tsv", numbered(6, 200))
    splits = load_splits(str(tmp_path))
    assert [len(split) for split in splits_of(splits)] == [18, 2, 6]
    assert splits.test.texts == [text for text, _ in numbered(6, 200)]
    assert len({*splits.train.texts, *splits.validation.texts}) == 20


def test_folder_errors(tmp_path):
    write(tmp_path / "tran.tsv", numbered(3))
    with pytest.raises(DataError, match=r"no train split among \['tran.tsv'\]; add train\.\*"):
        load_splits(str(tmp_path))
    write(tmp_path / "train.tsv", numbered(3))
    write(tmp_path / "dev.tsv", numbered(3))
    write(tmp_path / "validation.tsv", numbered(3))
    with pytest.raises(DataError, match=r"dev.tsv and validation.tsv are both a validation split"):
        load_splits(str(tmp_path))


def test_a_folder_and_what_is_named_in_it(tmp_path):
    (tmp_path / "glue").mkdir()
    write(tmp_path / "glue" / "sst2.tsv", numbered(20))
    assert len(load_splits(str(tmp_path / "glue"), name="sst2.tsv").train) == 16
    with pytest.raises(DataError, match=r"glue/sst-2' is no local file or folder.* Nearest: sst2\.tsv\.$"):
        load_splits(str(tmp_path / "glue"), name="sst-2")


@pytest.mark.parametrize(("label", "given"), [("good", None), ("0", None), ("", None), ("0", ["good"])])
def test_one_class_is_nothing_to_learn(tmp_path, label, given):
    path = write(tmp_path / "data.tsv", [(text, label) for text, _ in numbered(20)])
    with pytest.raises(DataError, match=r"data\.tsv: the labels in column 'label' .* a classifier needs at least two"):
        load_splits(path, label_names=given)


@pytest.mark.parametrize(
    ("labels", "given", "names", "coded"),
    [
        (["b", "a", "b"], None, ["a", "b"], [1, 0, 1]),
        (["b", "a", "b"], ["b", "a"], ["b", "a"], [0, 1, 0]),
        (["1", "0", "2"], None, ["0", "1", "2"], [1, 0, 2]),
        (["1", "0", "1"], ["no", "yes"], ["no", "yes"], [1, 0, 1]),
        (["1", "3", "2"], ["1", "2", "3"], ["1", "2", "3"], [0, 2, 1]),
        (["1.5", "3", "-2"], None, None, [1.5, 3.0, -2.0]),
    ],
)
def test_label_kinds(tmp_path, labels, given, names, coded):
    rows = [(f"text {n}", labels[n % 3]) for n in range(30)]
    splits = load_splits(write(tmp_path / "data.tsv", rows), label_names=given)
    assert splits.label_names == names
    for split in splits_of(splits):
        assert split.labels == [coded[int(text.split()[1]) % 3] for text in split.texts]


def test_the_train_split_decides_that_labels_are_numbers(tmp_path):
    for split, label in {"train": 0.5, "validation": 1, "test": 2}.items():
        rows = [json.dumps({"text": f"text {n}", "label": label}) for n in range(4)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    splits = load_splits(str(tmp_path))
    assert splits.label_names is None
    assert splits.test.labels == [2.0] * 4
    assert isinstance(splits.test.labels[0], float)


def test_read_set(tmp_path):
    source = write(tmp_path / "data.tsv", [("a", "b", "1"), ("c", "", "0")], header=("first", "second", "label"))
    assert read_set(source, text="first", text_pair="second") == TextSet(["a", "c"], ["b", ""], [1, 0])
    assert read_set(source, text="first", regression=True).labels == [1.0, 0.0]
    assert read_set(source, text="first", label=None).labels is None
    assert read_set(source, text="first", label="gold", require_labels=False).labels is None
    assert read_set(source, text="first", require_labels=False).labels == [1, 0]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([("a", "x"), ("  ", "y")], {}, r"data\.tsv, line 3: the text in column 'text' is empty; remove the row"),
        ([("a", "x")], {"text": "txt"}, r"data\.tsv: no column 'txt' among text, label; .* Nearest: text\."),
        ([("a", "x")], {"label": "labels"}, r"no column 'labels' among text, label; .* Nearest: label\."),
        (
            [("a", "x"), ("b", "z")],
            {"label_names": ["x", "y"]},
            r"line 3: label 'z' is none of .* \['x', 'y'\] \(0\.\.1\)",
        ),
        ([("a", "0"), ("b", "2")], {"label_names": ["x", "y"]}, r"line 3: label '2' is none of the classes"),
        ([("a", "-1")], {"label_names": ["x", "y"]}, r"line 2: label '-1' is none of the classes"),
        ([("a", "0")], {"label_names": ["1", "2"]}, r"line 2: label '0' is none of the classes"),
        ([("a", "x"), ("b", "")], {}, r"line 3: label '' is none of the classes \['x'\]"),
        ([("a", "x")], {"label_names": ["x", "x"]}, r"label_names \['x', 'x'\] repeat a name"),
        ([("a", "1"), ("b", "2")], {}, r"data\.tsv: integer labels must be 0\.\.n-1, got 1, 2; renumber them"),
        ([("a", "x")], {"regression": True}, r"line 2: label 'x' is no finite number"),
        ([("a", "nan")], {"regression": True}, r"line 2: label 'nan' is no finite number"),
        ([("a", "0.5"), ("b", "nan")], {}, r"line 3: label 'nan' is no finite number"),
    ],
)
def test_errors_name_place_value_and_remedy(tmp_path, rows, options, message):
    with pytest.raises(DataError, match=message):
        read_set(write(tmp_path / "data.tsv", rows), **options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 0}, {"text": "b"}], r"data\.jsonl, line 2: no value in column 'label'"),
        ([{"text": "a", "label": 0}, {"text": 7, "label": 0}], r"line 2: column 'text' holds 7; text must be a string"),
        ([{"text": "a", "label": 0}, {"text": "\ud83d", "label": 0}], "line 2: the text has half of a surrogate pair"),
    ],
)
def test_json_values(tmp_path, rows, message):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=message):
        read_set(path)


def hub(monkeypatch, splits, label):
    """Stand in for the Hub: `load_dataset` gives these splits of (text, label) rows."""
    features = datasets.Features({"sentence": datasets.Value("string"), "label": label, "idx": datasets.Value("int32")})
    loaded = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(
                [{"sentence": text, "label": value, "idx": n} for n, (text, value) in enumerate(rows)],
                features=features,
            )
            for split, rows in splits.items()
        }
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda source, name: {("corpus", "sst2"): loaded}[source, name])


def test_a_hub_data_set_with_hidden_test_labels(monkeypatch):
    rows = [(f"text {n}", n % 2) for n in range(20)]
    splits = {"train": rows, "validation_matched": [("v", 1)], "test": [("hidden", -1)], "unsupervised": [("u", -1)]}
    hub(monkeypatch, splits, datasets.ClassLabel(names=["2", "1"]))
    result = load_splits("corpus", name="sst2", text="sentence")
    assert [len(split) for split in splits_of(result)] == [18, 2, 1]
    assert result.test == TextSet(["v"], None, [1])
    assert result.label_names == ["2", "1"]
    assert load_splits("corpus", name="sst2", text="sentence", label_names=["no", "yes"]).label_names == ["no", "yes"]


def test_names_of_a_hub_data_sets_classes_in_another_order(monkeypatch):
    hub(monkeypatch, {"train": [("a", 0), ("b", 1)] * 10}, datasets.ClassLabel(names=["negative", "positive"]))
    own = load_splits("corpus", name="sst2", text="sentence")
    found = load_splits("corpus", name="sst2", text="sentence", label_names=["POSITIVE", "NEGATIVE"])
    assert found.label_names == ["POSITIVE", "NEGATIVE"]
    assert own.train.texts == found.train.texts
    assert found.train.labels == [1 - label for label in own.train.labels]


def test_a_hub_regression(monkeypatch):
    hub(
        monkeypatch,
        {split: [("a", 5.0), ("b", 2.5)] for split in ("train", "validation", "test")},
        datasets.Value("float32"),
    )
    result = load_splits("corpus", name="sst2", text="sentence")
    assert (result.label_names, result.test.labels) == (None, [5.0, 2.5])


def test_a_local_regression_with_hidden_test_labels(tmp_path):
    write(tmp_path / "train.tsv", [(f"text {n}", str(n / 2)) for n in range(20)])
    write(tmp_path / "dev.tsv", [("seen", "2.5")])
    write(tmp_path / "test.tsv", [("hidden", "-1.0"), ("hidden, too", "-1.0")])
    assert load_splits(str(tmp_path)).test == TextSet(["seen"], None, [2.5])


def test_hub_errors(monkeypatch):
    hub(monkeypatch, {"train": [("a", 0), ("", 1)], "test": [("b", 0)]}, datasets.Value("int64"))
    with pytest.raises(DataError, match="corpus train: no column 'text' among sentence, label, idx"):
        load_splits("corpus", name="sst2")
    with pytest.raises(DataError, match="corpus train, row 2: the text in column 'sentence' is empty"):
        load_splits("corpus", name="sst2", text="sentence")
    hub(monkeypatch, {"test": [("b", 0)]}, datasets.Value("int64"))
    with pytest.raises(DataError, match=r"corpus: no train split among \['test'\]"):
        load_splits("corpus", name="sst2", text="sentence")


def test_an_unreachable_data_set_says_so_and_names_local_candidates(tmp_path):
    (tmp_path / "my-reviews").mkdir()
    code = "from snlp_zoo.data import load_splits; load_splits('my-review', name='en')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    message = run.stderr.splitlines()[-1]
    assert message.startswith(
        "snlp_zoo.errors.DataError: 'my-review' is no local file or folder, and `datasets` cannot"
    )
    assert "('my-review', 'en')" in message
    assert message.endswith("Check the name and the connection. Nearest: my-reviews.")


def test_importing_the_package_loads_no_heavy_library():
    code = "import sys, snlp_zoo.data; print({'datasets', 'sklearn'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_splits(str(tmp_path / "data.tsv"))


def test_second_texts_are_checked_like_the_first(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "a", "second": "\ud83d", "label": 0}))
    with pytest.raises(DataError, match="line 1: the text has half of a surrogate pair"):
        read_set(path, text_pair="second")
