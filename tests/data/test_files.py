import gzip
import lzma

import pytest

from snlp_zoo.data.files import read_rows, read_table
from snlp_zoo.errors import DataError

ROWS = [{"text": "fine", "label": "a"}, {"text": 'so "so", they say', "label": "b"}]
CONTENT = {
    ".tsv": 'text\tlabel\nfine\ta\nso "so", they say\tb\n',
    ".csv": 'text,label\r\nfine,a\r\n"so ""so"", they say",b\r\n',
    ".jsonl": '{"text": "fine", "label": "a"}\n\n{"text": "so \\"so\\", they say", "label": "b"}\n',
}
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("form", CONTENT)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_format_gives_the_same_rows(tmp_path, form, packed, mark):
    path = tmp_path / f"data{form}{packed}"
    path.write_bytes(PACK[packed]((mark + CONTENT[form]).encode()))
    assert read_rows(path) == ROWS


@pytest.mark.parametrize("packed", PACK)
def test_every_line_of_plain_text_is_a_row(tmp_path, packed):
    path = tmp_path / f"data.TXT{packed}"
    path.write_bytes(PACK[packed]("\ufeffone, \t'two'\r\n \n\n last \n".encode()))
    table = read_table(path)
    assert table.rows == [{"text": "one, \t'two'"}, {"text": "last"}]
    assert table.lines == [1, 4]


def test_lines_count_blank_lines_and_line_breaks_in_quotes(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('text,label\n"two\nlines",a\n\nlast,b\n')
    assert read_table(path).lines == [2, 5]


def test_a_json_string_may_hold_a_line_separator(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert read_rows(path) == [{"text": "a\u2028b"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.parquet", b"x", r"data\.parquet: unknown suffix; .* \.tsv, \.csv, \.jsonl, each .* \.gz or \.xz"),
        ("data.tsv", b"", r"data\.tsv: the file is empty; .* \.tsv, \.csv, \.jsonl"),
        ("data.tsv", b"text\tlabel\n", r"data\.tsv: the file has no rows"),
        ("data.tsv", b"text\ttext\na\tb\n", r"data\.tsv, line 1: two columns share a name"),
        (
            "data.tsv",
            b"text\tlabel\na\tb\na\tb\tc\n",
            r"line 3: 3 columns, the header has 2 \(text, label\); remove tabs",
        ),
        ("data.csv", b"text,label\na, b,c\n", r"line 2: 3 columns, the header has 2 .* double quotes"),
        ("data.csv", b'text,label\na,b\n"a,b\n', r"line 3: cannot be parsed .* check the quotes"),
        ("data.tsv", b"text\tlabel\na\tb\ncaf\xe9\tb\n", r"data\.tsv, line 3: byte 0xe9 is not UTF-8"),
        ("data.jsonl", b'{"text": "a"}\n{"text": \n', r"data\.jsonl, line 2: invalid JSON"),
        ("data.jsonl", b'{"text": "a"}\n["b"]\n', r"data\.jsonl, line 2: expected a JSON object, got '\[\"b\"\]'"),
        ("data.jsonl", b'{"text": ' + b"[" * 100_000, r"data\.jsonl, line 1: invalid JSON .*recursion"),
        ("data.csv.gz", b"text,label\na,b\n", r"data\.csv\.gz: not a complete \.gz file .* compress it again"),
        ("data.csv.gz", gzip.compress(b"text,label\na,b\n", mtime=0)[:-9], r"not a complete \.gz file"),
        ("data.csv.xz", b"text,label\na,b\n", r"not a complete \.xz file"),
    ],
)
def test_errors_name_file_line_and_remedy(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


@pytest.mark.parametrize(("name", "between"), [("books.csv", ","), ("books.tsv", "\t")])
def test_a_cell_may_hold_a_whole_book(tmp_path, name, between):
    book = "word " * 40_000  # csv's own limit is 131,072 characters
    (tmp_path / name).write_text(f"text{between}label\n{book}{between}a\n")
    assert read_rows(tmp_path / name) == [{"text": book, "label": "a"}]


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "reviews.tsv").touch()
    with pytest.raises(DataError, match=r"review\.tsv: no such file; check the path\. Nearest: reviews\.tsv"):
        read_rows(tmp_path / "review.tsv")
    with pytest.raises(DataError, match=r"no such file; check the path\.$"):
        read_rows(tmp_path / "nowhere" / "review.tsv")


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "data.tsv").mkdir()
    with pytest.raises(DataError, match=r"cannot be read .* name a readable file"):
        read_rows(tmp_path / "data.tsv")
