"""Labelled text in three splits, from the demo tweets, a local file or folder, or a data set of `datasets`.

    source -> Table per split -> labels coded by the train split -> missing splits carved from train -> subsets

The best epoch is chosen on validation and reported on test, so the two never share a row: where a source has only one
of them, it becomes test and validation is a tenth of train.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from snlp_zoo.data import demo
from snlp_zoo.data.files import KNOWN, Table, nearest, neighbours, read_table, suffix
from snlp_zoo.data.wording import disjoint_rows
from snlp_zoo.errors import DataError

# The names a split goes by, in local folders and on the Hub (`dev` and `matched` are GLUE's).
SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "dev", "validation_matched", "dev_matched"),
    "test": ("test", "test_matched"),
}


@dataclass(frozen=True)
class TextSet:
    """One split: n texts, n second texts for pair tasks, n labels (class numbers, or floats for regression)."""

    texts: list[str]
    pairs: list[str] | None = None
    labels: list[int] | list[float] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, size: int | None, seed: int) -> "TextSet":
        """A sample without replacement; the sample of a smaller size is part of that of a larger one.

        Raises:
            DataError: size is below 1.
        """
        if size is not None and size < 1:
            raise DataError(f"a subset of {size} examples holds nothing; ask for at least 1, or for None to keep all")
        if size is None or size >= len(self):
            return self
        return self.take(shuffled(len(self), seed)[:size])

    def take(self, rows: list[int]) -> "TextSet":
        """The examples with these numbers, in this order."""
        return TextSet(
            [self.texts[row] for row in rows],
            None if self.pairs is None else [self.pairs[row] for row in rows],
            None if self.labels is None else [self.labels[row] for row in rows],
        )


@dataclass(frozen=True)
class TextSplits:
    """Three splits without a common row; label_names is None for regression and for text without labels. The texts of
    `transfer` are more training texts, for a teacher to label.
    """

    train: TextSet
    validation: TextSet
    test: TextSet
    label_names: list[str] | None
    transfer: TextSet = TextSet([])


@dataclass(frozen=True)
class Columns:
    """Which columns to read; label is None for text without labels."""

    text: str = "text"
    text_pair: str | None = None
    label: str | None = "label"
    blanks: bool = False  # rows without text are left out, as between the paragraphs of a book


def load_splits(
    source: str,
    *,
    name: str | None = None,
    text: str = "text",
    text_pair: str | None = None,
    label: str | None = "label",
    label_names: list[str] | None = None,
    train_size: int | None = None,
    validation_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    disjoint: bool = False,
) -> TextSplits:
    """Train, validation and test split of a source; the same seed gives the same splits and subsets.

    Args:
        source: "tweets" (the demo; its columns are known, text, text_pair and label are not read), a .tsv, .csv or
            .jsonl file (split 80/10/10), a folder with train.* and optionally validation.* or dev.* and test.*, or
            the name of a data set for `datasets.load_dataset`.
        name: configuration of the data set ("sst2" of "glue"), or a folder inside a source folder.
        text, text_pair, label: columns; label None reads text without labels.
        label_names: one name per class, in class order; a Hub data set's own names in any order. None takes these, else
            the sorted strings or the integers 0..n-1 of the train split; labels such as 3.5 make it a regression.
        train_size, validation_size, test_size: examples to keep, None for all.
        disjoint: what is carved from train shares no wording with what stays there, see `wording.disjoint_rows`, and
            has validation_size or test_size examples.
    Raises:
        DataError: the source cannot be found or read, a column is missing, a text is empty, a label is unknown.
    """
    sets, names = read_splits(source, name, Columns(text, text_pair, label), label_names)
    sizes = {"validation": validation_size, "test": test_size}
    train, validation, test = carve(sets, ("validation", "test"), seed, sizes if disjoint else None)
    return TextSplits(
        train.subset(train_size, seed), validation.subset(validation_size, seed), test.subset(test_size, seed), names
    )


def read_set(
    source: str | Path,
    *,
    text: str = "text",
    text_pair: str | None = None,
    label: str | None = "label",
    label_names: list[str] | None = None,
    regression: bool = False,
    require_labels: bool = True,
) -> TextSet:
    """All rows of one local file, in file order.

    Args:
        label_names: the classes of the model that will read the text; None takes them from the file.
        regression: read the labels as floats, even where all are integers.
        require_labels: False accepts a file without the label column and gives labels None.
    Raises:
        DataError: as `load_splits`.
    """
    table = read_table(source)
    if not require_labels and label not in table.columns:
        label = None
    columns = Columns(text, text_pair, label)
    code = _number if regression else _label_code(table, label, label_names)[0]
    return text_set(table, columns, code)


def shuffled(size: int, seed: int) -> list[int]:
    """The numbers 0..size-1 in an order that depends on the seed alone."""
    order = list(range(size))
    random.Random(seed).shuffle(order)  # noqa: S311
    return order


def read_splits(
    source: str, name: str | None, columns: Columns, label_names: list[str] | None
) -> tuple[dict[str, TextSet], list[str] | None]:
    """The splits that a source has of its own, and the names of its classes."""
    if source == "tweets":
        return _tweets(label_names)
    path, theirs = Path(source, name or ""), None
    if path.is_dir():
        tables = _folder_tables(path)
    elif path.is_file() or suffix(source):
        tables = {"train": read_table(path if path.is_file() else source)}
    else:
        tables, theirs = _hub_tables(source, name, columns)
        label_names = label_names or theirs
    if columns.label and _hidden(tables.get("test"), columns.label):
        del tables["test"]
    code, names = _label_code(tables["train"], columns.label, label_names)
    if names is not None and len(names) < 2:
        wrong = f"{tables['train'].source}: the labels in column {columns.label!r} are of the classes {names}"
        raise DataError(f"{wrong}, and a classifier needs at least two; name another column, or set label_names")
    if names and theirs:
        code = _by_name(code, names, theirs)
    return {split: text_set(table, columns, code) for split, table in tables.items()}, names


def _tweets(label_names: list[str] | None) -> tuple[dict[str, TextSet], list[str]]:
    if label_names not in (None, list(demo.LABELS)):
        raise DataError(
            f"tweets: label_names are {list(demo.LABELS)}, got {label_names}; leave label_names out, or name a model "
            "of these classes"
        )
    sets = {}
    for split in demo.SPLITS:
        tweets = [tweet for tweet in demo.load_tweets() if tweet.split == split]
        sets[split] = TextSet([tweet.text for tweet in tweets], None, [tweet.label for tweet in tweets])
    return sets, list(demo.LABELS)


def _folder_tables(folder: Path) -> dict[str, Table]:
    names = [entry.name for entry in sorted(folder.iterdir()) if suffix(entry)]
    tables = {}
    for split, stems in SPLIT_NAMES.items():
        found = [name for name in names if name.lower().removesuffix(suffix(name) or "") in stems]
        if len(found) > 1:
            raise DataError(f"{folder}: {' and '.join(found)} are both a {split} split; leave one of them")
        if found:
            tables[split] = read_table(folder / found[0])
    if "train" not in tables:
        raise DataError(
            f"{folder}: no train split among {names or 'no data files'}; add train.* in one of the formats {KNOWN}"
        )
    return tables


def _hub_tables(source: str, name: str | None, columns: Columns) -> tuple[dict[str, Table], list[str] | None]:
    import datasets

    try:
        loaded = datasets.load_dataset(source, name)
    except Exception as error:  # the Hub client's errors come from five libraries and share no base class
        path = Path(source, name or "") if Path(source).is_dir() else Path(source)
        raise DataError(
            f"{str(path)!r} is no local file or folder, and `datasets` cannot load "
            f"{(source, name) if name else source!r}: {str(error).splitlines()[0] if str(error) else repr(error)}. "
            f"Check the name and the connection.{nearest(path.name, neighbours(path))}"
        ) from error
    splits = {split: next((stem for stem in stems if stem in loaded), None) for split, stems in SPLIT_NAMES.items()}
    if splits["train"] is None:
        raise DataError(f"{source}: no train split among {sorted(loaded)}; save the rows you want in a local file")
    tables = {split: _hub_table(f"{source} {stem}", loaded[stem], columns) for split, stem in splits.items() if stem}
    feature = loaded[splits["train"]].features.get(columns.label)
    return tables, getattr(feature, "names", None)


def _hub_table(source: str, rows: Any, columns: Columns) -> Table:
    wanted = [column for column in (columns.text, columns.text_pair, columns.label) if column in rows.column_names]
    listed = rows.select_columns(wanted).to_list() if wanted else []
    return Table(source, rows.column_names, listed, list(range(1, len(rows) + 1)), unit="row")


def _hidden(table: Table | None, label: str) -> bool:
    """Whether a test split keeps its labels to itself, as GLUE's do: every label is -1."""
    return table is not None and all(row.get(label) in (-1, "-1", "-1.0") for row in table.rows)


def carve(
    sets: dict[str, TextSet], wanted: tuple[str, ...], seed: int, sizes: dict[str, int | None] | None = None
) -> list[TextSet]:
    """Train and the wanted splits; what is missing is taken from train, a tenth of its rows per split.

    Args:
        sizes: of the wanted splits, see `wording.disjoint_rows`, which then chooses the rows; None: any rows.
    Raises:
        DataError: train has too few rows, or pairs where sizes are given.
    """
    train, given = sets["train"], [sets[split] for split in wanted if split in sets]
    missing = wanted[: len(wanted) - len(given)]  # the only split beside train is the one to report
    if not missing:
        return [train, *given]
    if sizes is not None:
        if train.pairs is not None:
            raise DataError("disjoint compares single texts, and these are pairs; leave it out")
        chosen = disjoint_rows(train.texts, [sizes[split] for split in missing], seed)
        return [*map(train.take, chosen), *given]
    order, tenth = shuffled(len(train), seed), max(1, len(train) // 10)
    if len(train) <= len(missing) * tenth:
        raise DataError(f"{len(train)} train rows are too few to carve {len(missing)} more splits from; give more rows")
    carved = [train.take(order[start : start + tenth]) for start in range(0, len(missing) * tenth, tenth)]
    return [train.take(order[len(missing) * tenth :]), *carved, *given]


LabelCode = Callable[
    [Any], int | float
]  # a label as it stands in the file -> class number or float; ValueError says why


def text_set(table: Table, columns: Columns, code: LabelCode | None = None) -> TextSet:
    """The columns of a table; `code` reads labels, where a label column is named."""
    texts = _strings(table, columns.text)
    for row, text in enumerate(texts):
        if not (text.strip() or columns.blanks):
            raise DataError(f"{table.where(row)}: the text in column {columns.text!r} is empty; remove the row")
    if columns.blanks:
        return TextSet([text for text in texts if text.strip()])
    return TextSet(
        texts,
        _strings(table, columns.text_pair) if columns.text_pair else None,
        _labels(table, columns.label, code) if columns.label and code else None,
    )


def _column(table: Table, name: str) -> list[Any]:
    if name not in table.columns:
        raise DataError(
            f"{table.source}: no column {name!r} among {', '.join(table.columns)}; name one of these."
            f"{nearest(name, table.columns)}"
        )
    values = [row.get(name) for row in table.rows]
    if None in values:
        raise DataError(f"{table.where(values.index(None))}: no value in column {name!r}; add it or remove the row")
    return values


def _strings(table: Table, name: str) -> list[str]:
    values = _column(table, name)
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(f"{table.where(row)}: column {name!r} holds {value!r}; text must be a string")
        refuse_half_pairs(value, f"{table.where(row)}: the text")
    return values


def refuse_half_pairs(text: str, what: str) -> None:
    """Raises DataError for half of a surrogate pair, which JSON can hold and no tokenizer takes. In an argument of the
    command line every byte that is no UTF-8 is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} has half of a surrogate pair, or is not UTF-8 ({error}); mend it") from error


def _labels(table: Table, name: str, code: LabelCode) -> list[Any]:
    labels = []
    for row, value in enumerate(_column(table, name)):
        try:
            labels.append(code(value))
        except ValueError as error:
            raise DataError(f"{table.where(row)}: label {value!r} {error}") from None
    return labels


def _label_code(table: Table, label: str | None, label_names: list[str] | None) -> tuple[LabelCode, list[str] | None]:
    """How to read the labels, and the names of the classes, both decided by this (the train) table."""
    if label is None:
        return _number, None
    if label_names is None:
        values = _column(table, label)
        integers = [_integer(value) for value in values]
        if None not in integers:
            label_names = _integer_names(table, integers)
        elif all(_is_number(value) for value in values):
            return _number, None  # which names the row of one that is not finite
        else:
            label_names = sorted({str(value).strip() for value in values} - {""})
    if len(set(label_names)) < len(label_names):
        raise DataError(f"label_names {label_names} repeat a name; give one name per class")
    return _class_code(label_names), list(label_names)


def _class_code(names: list[str]) -> LabelCode:
    number = {name: index for index, name in enumerate(names)}
    # With names such as "1".."5" the string "1" is a name: then only integers proper count as class numbers.
    numeric = any(_integer(name) is not None for name in names)

    def code(value: Any) -> int:
        if isinstance(value, str) and value.strip() in number:
            return number[value.strip()]
        integer = None if isinstance(value, str) and numeric else _integer(value)
        if integer is None or not 0 <= integer < len(names):
            raise ValueError(f"is none of the classes {names} (0..{len(names) - 1}); correct it or set label_names")
        return integer

    return code


def _by_name(code: LabelCode, names: list[str], theirs: list[str]) -> LabelCode:
    """`code` for class numbers of a data set that has these names, in any case, in another order."""
    number = {name.lower(): index for index, name in enumerate(names)}
    order = [number.get(name.lower()) for name in theirs]
    if set(order) != set(range(len(names))):  # other names for the same classes, in their order
        return code
    return lambda value: code(order[value] if 0 <= value < len(order) else value)


def _integer_names(table: Table, integers: list[Any]) -> list[str]:
    found = sorted(set(integers))
    if found[0] != 0 or any(after - before != 1 for before, after in pairwise(found)):
        shown = ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")
        raise DataError(f"{table.source}: integer labels must be 0..n-1, got {shown}; renumber them or set label_names")
    return [str(integer) for integer in found]


def _integer(value: Any) -> int | None:
    if isinstance(value, int):
        return int(value)
    try:
        return int(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _number(value: Any) -> float:
    if not (_is_number(value) and math.isfinite(float(value))):
        raise ValueError("is no finite number; a regression needs one per row")
    return float(value)
