"""Text data: local files first, the demo tweets, `datasets` by name. Batches, which need torch, are in
`.batches` and `.streams`, tokenizers that are trained on the spot in `.tokenizers`."""

from snlp_zoo.data.files import read_rows
from snlp_zoo.data.text import TextSet, TextSplits, load_splits, read_set
from snlp_zoo.data.unlabelled import load_documents, load_transfer, load_unlabelled, read_documents

__all__ = [
    "TextSet",
    "TextSplits",
    "load_documents",
    "load_splits",
    "load_transfer",
    "load_unlabelled",
    "read_documents",
    "read_rows",
    "read_set",
]
