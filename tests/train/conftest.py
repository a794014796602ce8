"""A teacher of 2 layers, invented sentences whose class follows from cue words, and recipes of a few steps."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

CUES = {"negative": ("grum", "vosh", "drel"), "positive": ("lumi", "sola", "fenn")}
FILLERS = tuple(first + last for first in ("ka", "mo", "ri", "te", "bu", "ne") for last in ("lan", "dor", "pim", "sut"))
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
SPLITS = {"train": 96, "dev": 32, "test": 40}
REPOSITORY = Path(__file__).parents[2]


class Run(NamedTuple):
    folder: Path
    summary: dict[str, Any]
    recipe: Path


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, label) pairs of 3 to 12 words, so that batches need padding."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        label = tuple(CUES)[i % 2]
        words = [rng.choice(FILLERS) for _ in range(rng.randint(1, 8))] + rng.choices(CUES[label], k=rng.randint(2, 4))
        rng.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


def write_splits(folder: Path, rows_of: dict[str, list[tuple[str, Any]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in rows_of.items():
        lines = ["text\tlabel"] + [f"{text}\t{label}" for text, label in rows]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict) and key != "objectives"
        result[key] = merged(base[key], value) if both else value
    return result


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def metrics():
    """Function: the rows of a run's metrics.jsonl."""
    return read_metrics


@pytest.fixture(scope="session")
def losses():
    """Function: the logged loss curve of a run."""
    return lambda folder: [row["loss"] for row in read_metrics(folder) if "loss" in row]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """No test touches the user's cache; the tuned teacher is shared by the session's tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SNLP_ZOO_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _nothing_in_the_repository(tmp_path, monkeypatch):
    """A run folder that nobody named is runs/<name> below the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("teacher")
    words = [word for cues in CUES.values() for word in cues]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *FILLERS]
    vocabulary += [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    rows = {split: sentences(size, seed) for seed, (split, size) in enumerate(SPLITS.items())}
    return write_splits(tmp_path_factory.mktemp("data"), rows)


@pytest.fixture(scope="session")
def recipe_content(teacher_folder, data_folder):
    """12 optimiser steps in two epochs; every name a zoo recipe has."""
    return {
        "name": "tiny",
        "model": {
            "model_type": "spikelm",
            "config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "max_position_embeddings": 64,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                "time_steps": 2,
            },
        },
        "data": {"source": str(data_folder), "max_length": 32},
        "teacher": {
            "name": str(teacher_folder),
            "dropout": 0.0,
            "train": {"epochs": 4, "batch_size": 16, "learning_rate": 5e-3, "warmup_ratio": 0.0},
        },
        "objectives": {
            "forward_kl": {"weight": 0.8, "temperature": 2.0},
            "cross_entropy": 0.2,
            "hidden_mse": 0.5,
        },
        "train": {"epochs": 2, "batch_size": 16, "learning_rate": 2e-3, "logging_steps": 1},
    }


@pytest.fixture
def make_data(tmp_path):
    """Function: a data folder with these (text, label) rows per split; the invented sentences for splits left out."""

    def make(**rows_of: list[tuple[str, Any]]) -> Path:
        rows = {split: sentences(size, seed) for seed, (split, size) in enumerate(SPLITS.items())}
        return write_splits(tmp_path / "data", rows | rows_of)

    return make


@pytest.fixture
def run(make_recipe, tmp_path):
    """Function: distil by the recipe with changes, into a new folder unless one is named -> (folder, summary)."""
    from snlp_zoo.train.run import distill

    def start(into: Path | None = None, resume: bool = False, **changes: Any) -> tuple[Path, dict[str, Any]]:
        folder = into or tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        return folder, distill(str(make_recipe(**changes)), output_dir=folder, resume=resume)

    return start


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """A cache without the teacher that other tests have tuned."""
    monkeypatch.setenv("SNLP_ZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make_recipe(recipe_content, tmp_path):
    """Function: a recipe file with changes; `objectives` replaces, everything else merges."""

    def make(**changes: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(merged(recipe_content, changes)), encoding="utf-8")
        return path

    return make


@pytest.fixture(scope="session")
def trained(recipe_content, tmp_path_factory):
    """One finished run; read only."""
    from snlp_zoo.train.run import distill

    root = tmp_path_factory.mktemp("trained")
    recipe = root / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(recipe_content), encoding="utf-8")
    return Run(root / "run", distill(str(recipe), output_dir=root / "run"), recipe)


@pytest.fixture(scope="session")
def environment(cache_folder):
    """Environment of a subprocess: offline, one thread, this repository's package."""
    return os.environ | {
        "SNLP_ZOO_CACHE": str(cache_folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }


@pytest.fixture
def python(environment, tmp_path):
    """Function: a finished `python <arguments>` with its captured output."""

    def run(*arguments: str, **more: Any) -> subprocess.CompletedProcess:
        options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
        return subprocess.run([sys.executable, *arguments], **options | more)

    return run


class Stop(Exception):
    """The process dies here."""


@pytest.fixture
def stop_at(monkeypatch):
    """Function: raise instead of doing optimiser step `number` (from 1, over teacher, student and all stages)."""
    from snlp_zoo.train.loop import Trainer

    real = Trainer._step

    def stop(number):
        done = iter(range(1, 10_000))

        def step(self, window):
            if next(done) == number:
                raise Stop
            return real(self, window)

        monkeypatch.setattr(Trainer, "_step", step)

    stop.error = Stop
    yield stop
    monkeypatch.setattr(Trainer, "_step", real)
