"""Documents as sentences, one a line: text for general distillation and for data.transfer.

    python tools/sentences.py general.txt.xz films.jsonl.xz:200000 novels.jsonl.xz:50000 news.tsv

Files are those that `snlp_zoo.data.files` reads (of a .txt file each line is a text), their columns text, sentence,
sentence1, sentence2 and document. SOURCE:N takes a seeded sample of N sentences, in their order. Repeats, of the same
words whatever stands between, are dropped, and sentences of fewer than 3 words or more than 60. --pairs writes a table
of those that are kept of a text, two by two, sentence1 and sentence2; N then counts pairs.
"""

import argparse
import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path

from snlp_zoo.data.files import read_table
from snlp_zoo.data.wording import words
from snlp_zoo.errors import DataError

COLUMNS = ("text", "sentence", "sentence1", "sentence2", "document")
FEWEST, MOST = 3, 60  # words
# a sign and no small letter after it, a sign by itself as in tokenised text, an empty line
_ENDS = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*\s+(?=[^\sa-z])|(?<=\s)[.!?]+\s+|\n\s*\n")
_SHORT = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|Gen|Col|Capt|Jr|Sr|vs|No|[A-HJ-Z])$")  # a full stop ends no sentence


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, each on one line; empty lines end one too."""
    start = 0
    for end in _ENDS.finditer(text):
        if end.group().strip() != "." or not _SHORT.search(text[max(start, end.start() - 5) : end.start()]):
            yield " ".join(text[start : end.end()].split())
            start = end.end()
    yield " ".join(text[start:].split())


def texts(path: str) -> Iterator[str]:
    """All texts of a file, column by column."""
    table = read_table(path)
    columns = [name for name in COLUMNS if name in table.columns] or table.columns[:1]
    if len(table.columns) > 1 and columns[0] not in COLUMNS:
        raise DataError(f"{path}: no column {', '.join(COLUMNS)} among {', '.join(table.columns)}; rename one")
    for column in columns:
        yield from (str(row[column]) for row in table.rows if row.get(column) is not None)


def collect(sources: list[str], seed: int, pairs: bool = False) -> list[str]:
    """The sentences of all sources, each a file and, after a colon, how many of it; or pairs, tab between."""
    kept: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for source in sources:
        path, colon, count = source.rpartition(":")
        path, size = (path, int(count)) if colon and count.isdigit() else (source, None)
        fresh: list[str] = []
        for text in texts(path):
            kept_of_text = []
            for sentence in sentences(text):
                own = words(sentence)
                if FEWEST <= len(own) <= MOST and own not in seen:
                    seen.add(own)
                    kept_of_text.append(sentence)
            neighbours = zip(kept_of_text[::2], kept_of_text[1::2], strict=False)
            fresh += map("\t".join, neighbours) if pairs else kept_of_text
        if size is not None and size < len(fresh):
            fresh = [fresh[row] for row in sorted(random.Random(seed).sample(range(len(fresh)), size))]  # noqa: S311
        print(f"{path}: {len(fresh)} {'pairs' if pairs else 'sentences'}")
        kept += fresh
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a .txt or .txt.xz file, of pairs .tsv or .tsv.xz")
    parser.add_argument("sources", nargs="+", metavar="SOURCE[:N]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", action="store_true", help="neighbours in a text, for tasks of text pairs")
    arguments = parser.parse_args()
    kind, ending = ("pairs", ".tsv") if arguments.pairs else ("sentences", ".txt")
    if not arguments.out.name.endswith((ending, f"{ending}.xz")):
        raise SystemExit(f"{arguments.out}: {kind} are written as {ending} or {ending}.xz; name such a file")
    if not arguments.out.parent.is_dir():
        raise SystemExit(f"{arguments.out}: there is no such folder; make it")
    head = ["sentence1\tsentence2"] if arguments.pairs else []
    try:
        lines = head + collect(arguments.sources, arguments.seed, arguments.pairs)
        if len(lines) == len(head):
            raise DataError(
                f"{arguments.out}: no {kind} to write; give texts with more sentences of {FEWEST} to {MOST} words"
            )
        content = "".join(f"{line}\n" for line in lines).encode()
    except DataError as error:
        raise SystemExit(str(error)) from None
    arguments.out.write_bytes(lzma.compress(content) if arguments.out.suffix == ".xz" else content)


if __name__ == "__main__":
    main()
