"""Text data: local files first, the demo tweets, `datasets` by name. Batches, which need torch, are in `.batches`."""

from snlp_zoo.data.files import read_rows
from snlp_zoo.data.text import TextSet, TextSplits, load_splits, read_set
from snlp_zoo.data.unlabelled import load_unlabelled

__all__ = ["TextSet", "TextSplits", "load_splits", "load_unlabelled", "read_rows", "read_set"]
