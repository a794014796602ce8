"""Text without labels, for general distillation and for language models, from any number of sources.

sources -> files -> texts -> validation: the sources' own, else a tenth of train by seed -> subsets
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from snlp_zoo.data.files import KNOWN, nearest, read_table, read_text, suffix
from snlp_zoo.data.text import SPLIT_NAMES, Columns, TextSet, TextSplits, carve, read_splits, text_set
from snlp_zoo.errors import DataError

_VALIDATION = (*SPLIT_NAMES["validation"], "valid")
_FEW = 10  # texts, of which a tenth would be none
_NO_TEXT = ("readme", "license", "licence", "manifest")  # what lies beside data and is none


def load_unlabelled(
    source: str | Sequence[str],
    *,
    name: str | None = None,
    text: str | Sequence[str] = "text",
    text_pair: str | None = None,
    train_size: int | None = None,
    validation_size: int | None = None,
    seed: int = 0,
) -> tuple[TextSet, TextSet]:
    """Train and validation texts of one or more sources; the same seed gives the same splits and subsets.

    Args:
        source: "tweets", .txt (a text per line), .tsv, .csv or .jsonl files, folders, names of `datasets` data sets. A
            folder with train.* has splits, of which test.* is left alone; of any other folder every file is read.
        name: as in `load_splits`.
        text: the column, or several of which each file has one; a file with a single column needs none.
        train_size, validation_size: texts to keep, None for all.
    Raises:
        DataError: a source cannot be found or read, a column is missing, a text is empty, there are too few texts.
    """
    sets = _gathered(source, name, text, text_pair, ("validation",))
    train, validation = carve(sets, ("validation",), seed)
    return train.subset(train_size, seed), validation.subset(validation_size, seed)


def load_transfer(
    source: str | Sequence[str],
    *,
    text: str | Sequence[str] = "text",
    text_pair: str | None = None,
    size: int | None = None,
    seed: int = 0,
) -> TextSet:
    """All training texts, or pairs, of sources as `load_unlabelled` reads them, or a seeded sample of this size.

    Raises:
        DataError: as `load_unlabelled`.
    """
    return _gathered(source, None, text, text_pair, ())["train"].subset(size, seed)


def load_documents(
    source: str | Sequence[str],
    *,
    name: str | None = None,
    text: str | Sequence[str] = "text",
    train_size: int | None = None,
    validation_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
) -> TextSplits:
    """Train, validation and test texts for a language model.

    Sources are those of `load_unlabelled`, but a .txt file is one text, as it stands, and test.* is read. A missing
    split is a tenth of the texts; where they are fewer than ten, the last tenth of each, cut where a line ends.

    Raises:
        DataError: as `load_unlabelled`.
    """
    wanted = ("validation", "test")
    sets = _gathered(source, name, text, None, wanted)
    if len(sets["train"]) < _FEW:
        sets = _cut(sets, wanted)
    train, validation, test = carve(sets, wanted, seed)
    subsets = (train.subset(train_size, seed), validation.subset(validation_size, seed), test.subset(test_size, seed))
    return TextSplits(*subsets, label_names=None)


def read_documents(path: str | Path, text: str = "text") -> list[str]:
    """The texts of one file, in file order; a .txt file is one text, as it stands.

    Raises:
        DataError: the file cannot be read, or has no such column.
    """
    return _read_file(Path(path), [text], None, whole=True).texts


def _gathered(
    source: str | Sequence[str],
    name: str | None,
    text: str | Sequence[str],
    text_pair: str | None,
    wanted: tuple[str, ...],
) -> dict[str, TextSet]:
    """The sources' own train split and those of the wanted ones that they have."""
    names = [text] if isinstance(text, str) else list(text)
    splits: dict[str, list[TextSet]] = {split: [] for split in ("train", *wanted)}
    for one in [source] if isinstance(source, str) else source:
        for split, texts in _read(one, name, names, text_pair, whole="test" in wanted):
            if split in splits:
                splits[split].append(texts)
    if not splits["train"] and "validation" in splits:  # validation files alone are as good as any
        splits |= {"train": splits["validation"], "validation": []}
    return {split: _joined(parts) for split, parts in splits.items() if parts}


def _cut(sets: dict[str, TextSet], wanted: tuple[str, ...]) -> dict[str, TextSet]:
    """The missing splits from the ends of the few texts of train."""
    missing, given = [split for split in wanted if split not in sets], [split for split in wanted if split in sets]
    parts: list[list[str]] = [[] for _ in range(1 + len(missing))]
    for text in sets["train"].texts:
        ends = [_line_end(text, len(text) * (9 - number) // 10) for number in reversed(range(len(missing)))]
        for part, (start, end) in zip(parts, pairwise([0, *ends, len(text)]), strict=True):
            part.append(text[start:end])
    if not all(all(part) for part in parts):
        raise DataError("a text of train is too short to cut validation and test from its end; give more text")
    cut = [TextSet(part) for part in parts]
    # the only split beside train is the one to report
    return dict(zip(("train", *wanted), [*cut, *(sets[split] for split in given)], strict=True))


def _line_end(text: str, near: int) -> int:
    """Where the line that holds this character ends; the place itself where that is far."""
    return text.find("\n", near, near + len(text) // 20) + 1 or near


def _read(
    source: str, name: str | None, text: list[str], text_pair: str | None, whole: bool
) -> list[tuple[str, TextSet]]:
    """(split, texts) of every file of a source."""
    path = Path(source, name or "")
    if path.is_dir():
        return [(split, _read_file(file, text, text_pair, whole)) for split, file in _files(path)]
    if path.is_file() or suffix(source):
        return [("train", _read_file(path if path.is_file() else Path(source), text, text_pair, whole))]
    sets, _ = read_splits(source, name, Columns(text[0], text_pair, None, blanks=whole), None)
    return list(sets.items())


def _files(folder: Path) -> list[tuple[str, Path]]:
    stems = {file: file.name.lower().removesuffix(suffix(file) or "") for file in sorted(folder.iterdir())}
    stems = {file: stem for file, stem in stems.items() if suffix(file) and stem not in _NO_TEXT}
    if not stems:
        raise DataError(f"{folder}: no data files; put text there in one of the formats {KNOWN}")
    if "train" not in stems.values():
        return [("train", file) for file in stems]
    split_of = {
        "train": "train",
        **dict.fromkeys(_VALIDATION, "validation"),
        **dict.fromkeys(SPLIT_NAMES["test"], "test"),
    }
    return [(split_of[stem], file) for file, stem in stems.items() if stem in split_of]


def _read_file(path: Path, text: list[str], text_pair: str | None, whole: bool) -> TextSet:
    if whole and (suffix(path) or "").startswith(".txt"):
        return TextSet([read_text(path)[1]])
    table = read_table(path)
    column = next((name for name in text if name in table.columns), None)
    if column is None and len(table.columns) == 1:
        column = table.columns[0]
    if column is None:
        raise DataError(
            f"{path}: no column {' or '.join(map(repr, text))} among {', '.join(table.columns)}; name one of these."
            f"{nearest(text[0], table.columns)}"
        )
    return text_set(table, Columns(column, text_pair, None, blanks=whole))


def _joined(parts: list[TextSet]) -> TextSet:
    texts = [text for part in parts for text in part.texts]
    pairs = [pair for part in parts for pair in part.pairs or []]
    if pairs and len(pairs) < len(texts):
        raise DataError("data.text_pair: some sources have pairs and some have none; leave text_pair out")
    return TextSet(texts, pairs or None)
