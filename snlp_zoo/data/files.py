"""Local tables: .txt, .tsv, .csv and .jsonl, plain or compressed, read whole, with the line every row came from."""

import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from snlp_zoo.errors import DataError

OPENERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.decompress, ".xz": lzma.decompress}
FORMATS = (".txt", ".tsv", ".csv", ".jsonl")
SUFFIXES = tuple(form + packed for form in FORMATS for packed in OPENERS)
KNOWN = f"{', '.join(FORMATS)}, each optionally followed by .gz or .xz"


@dataclass(frozen=True)
class Table:
    """Rows with their origin: what an error message needs to point at the right place."""

    source: str
    columns: list[str]
    rows: list[dict[str, Any]]
    lines: list[int]  # where each row starts, 1-based
    unit: str = "line"

    def where(self, row: int) -> str:
        """The place of a row (0-based) for an error message: 'train.tsv, line 3'."""
        return f"{self.source}, {self.unit} {self.lines[row]}"


def suffix(path: str | Path) -> str | None:
    """The known suffix a path ends in ('.csv.gz'), None where there is none."""
    name = Path(path).name.lower()
    return max((known for known in SUFFIXES if name.endswith(known)), key=len, default=None)


def refuse_missing(source: str, setting: str) -> None:
    """Raises DataError, which names the setting, for a source that is written as a local path where nothing is; any
    other name may be one of the Hub.
    """
    if (suffix(source) or source.startswith(("/", ".", "~"))) and not Path(source).exists():
        close = nearest(Path(source).name, neighbours(source))
        raise DataError(f"{setting}: {source}: no such file or folder; check the path.{close}")


def nearest(wanted: str, names: Iterable[str]) -> str:
    """' Nearest: a, b.' for the names that resemble the wanted one, '' where none does."""
    close = get_close_matches(wanted, list(names), n=3, cutoff=0.5)
    return f" Nearest: {', '.join(close)}." if close else ""


def neighbours(path: str | Path) -> list[str]:
    """Names in the folder that should hold the path; empty where there is no such folder."""
    folder = Path(path).parent
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a .txt, .tsv, .csv or .jsonl file (optionally .gz or .xz), one dict each, in file order.

    Tab-separated files hold no quotes (a quote is a character); comma-separated ones follow RFC 4180. Both start with
    a header and give strings; .jsonl gives whatever the JSON objects hold; every line of a .txt file is the `text` of a
    row. UTF-8, with or without a byte order mark. Blank lines are skipped.

    Raises:
        DataError: unknown suffix, missing, empty or damaged file, bytes that are no UTF-8, a row that does not fit the
            header, invalid JSON; the message names file and line.
    """
    return read_table(path).rows


def read_table(path: str | Path) -> Table:
    """`read_rows` with the columns and the line of every row; the same errors."""
    path = Path(path)
    form, text = read_text(path)
    if form in (".txt", ".jsonl"):
        table = _line_table(path, text, _json_row if form == ".jsonl" else _text_row)
    else:
        table = _separated_table(path, text, tabs=form == ".tsv")
    if not table.rows:
        raise DataError(f"{path}: the file has no rows; give it at least one")
    return table


def read_text(path: Path) -> tuple[str, str]:
    """The format of a file and all its text; the same errors."""
    known = suffix(path)
    if known is None:
        raise DataError(f"{path}: unknown suffix; rename or convert it to one of {KNOWN}")
    form = next(form for form in FORMATS if known.startswith(form))
    return form, _text(path, OPENERS[known.removeprefix(form)])


def _text(path: Path, unpack: Callable[[bytes], bytes]) -> str:
    try:
        data = unpack(path.read_bytes()).removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path.{nearest(path.name, neighbours(path))}") from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a complete {path.suffix} file ({error}); compress it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a readable file") from error
    if not data.strip():
        raise DataError(f"{path}: the file is empty; it needs rows in one of the formats {KNOWN}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        bad = data[error.start]
        raise DataError(f"{path}, line {line}: byte 0x{bad:02x} is not UTF-8; save the file as UTF-8") from error


def _separated_table(path: Path, text: str, tabs: bool) -> Table:
    header: list[str] | None = None
    rows, lines = [], []
    for line, cells in _records(path, text, tabs):
        if header is None:
            header = cells
            if len(set(header)) < len(header):
                raise DataError(f"{path}, line {line}: two columns share a name in {header}; rename one")
        elif len(cells) != len(header):
            raise DataError(
                f"{path}, line {line}: {len(cells)} columns, the header has {len(header)} ({', '.join(header)}); "
                + ("remove tabs inside cells" if tabs else "put cells that hold commas in double quotes")
            )
        else:
            rows.append(dict(zip(header, cells, strict=True)))
            lines.append(line)
    return Table(str(path), header or [], rows, lines)


def _records(path: Path, text: str, tabs: bool) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line it starts on: a quoted cell may span several."""
    stream = io.StringIO(text, newline="")
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a cell may hold a whole book
    reader = csv.reader(stream, csv.excel_tab, quoting=csv.QUOTE_NONE) if tabs else csv.reader(stream, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, line {start}: cannot be parsed ({error}); check the quotes") from error
        if cells:
            yield start, cells


def _line_table(path: Path, text: str, read: Callable[[str, str], dict[str, Any]]) -> Table:
    rows, lines = [], []
    columns: dict[str, None] = {}
    # Only \n ends a line: str.splitlines would also cut at U+2028, which JSON strings may hold as it is.
    for line, record in enumerate(text.split("\n"), start=1):
        if not record.strip():
            continue
        row = read(record.strip(), f"{path}, line {line}")
        rows.append(row)
        lines.append(line)
        columns.update(dict.fromkeys(row))
    return Table(str(path), list(columns), rows, lines)


def _text_row(record: str, place: str) -> dict[str, Any]:
    return {"text": record}


def _json_row(record: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(record)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: invalid JSON ({error}); write one object per line") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object, got {record[:60]!r}")
    return row
