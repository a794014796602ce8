"""Text without labels, for general distillation: any number of sources, one train and one validation split.

sources -> files -> texts -> validation: the sources' own, else a tenth of train by seed -> subsets
"""

from collections.abc import Sequence
from pathlib import Path

from snlp_zoo.data.files import KNOWN, nearest, read_table, suffix
from snlp_zoo.data.text import SPLIT_NAMES, Columns, TextSet, carve, read_splits, text_set
from snlp_zoo.errors import DataError

_VALIDATION = (*SPLIT_NAMES["validation"], "valid")
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
    names = [text] if isinstance(text, str) else list(text)
    splits: dict[str, list[TextSet]] = {"train": [], "validation": []}
    for one in [source] if isinstance(source, str) else source:
        for split, texts in _read(one, name, names, text_pair):
            if split in splits:
                splits[split].append(texts)
    if not splits["train"]:  # validation files alone are as good as any
        splits = {"train": splits["validation"], "validation": []}
    sets = {split: _joined(parts) for split, parts in splits.items() if parts}
    train, validation = carve(sets, ("validation",), seed)
    return train.subset(train_size, seed), validation.subset(validation_size, seed)


def _read(source: str, name: str | None, text: list[str], text_pair: str | None) -> list[tuple[str, TextSet]]:
    """(split, texts) of every file of a source."""
    path = Path(source, name or "")
    if path.is_dir():
        return [(split, _read_file(file, text, text_pair)) for split, file in _files(path)]
    if path.is_file() or suffix(source):
        return [("train", _read_file(path if path.is_file() else Path(source), text, text_pair))]
    sets, _ = read_splits(source, name, Columns(text[0], text_pair, None), None)
    return list(sets.items())


def _files(folder: Path) -> list[tuple[str, Path]]:
    stems = {file: file.name.lower().removesuffix(suffix(file) or "") for file in sorted(folder.iterdir())}
    stems = {file: stem for file, stem in stems.items() if suffix(file) and stem not in _NO_TEXT}
    if not stems:
        raise DataError(f"{folder}: no data files; put text there in one of the formats {KNOWN}")
    if "train" not in stems.values():
        return [("train", file) for file in stems]
    split_of = {"train": "train", **dict.fromkeys(_VALIDATION, "validation")}
    return [(split_of[stem], file) for file, stem in stems.items() if stem in split_of]


def _read_file(path: Path, text: list[str], text_pair: str | None) -> TextSet:
    table = read_table(path)
    column = next((name for name in text if name in table.columns), None)
    if column is None and len(table.columns) == 1:
        column = table.columns[0]
    if column is None:
        raise DataError(
            f"{path}: no column {' or '.join(map(repr, text))} among {', '.join(table.columns)}; name one of these."
            f"{nearest(text[0], table.columns)}"
        )
    return text_set(table, Columns(column, text_pair, None))


def _joined(parts: list[TextSet]) -> TextSet:
    texts = [text for part in parts for text in part.texts]
    pairs = [pair for part in parts for pair in part.pairs or []]
    if pairs and len(pairs) < len(texts):
        raise DataError("data.text_pair: some sources have pairs and some have none; leave text_pair out")
    return TextSet(texts, pairs or None)
