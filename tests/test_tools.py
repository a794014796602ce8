"""Maintainers' scripts reach into the package by name; here is held that what they reach for is there."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import snlp_zoo
from snlp_zoo.layers import ElasticBiSpike
from snlp_zoo.registry import model_classes
from snlp_zoo.train import loop

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def tool(monkeypatch):
    """Function: one of the scripts as a module."""
    monkeypatch.syspath_prepend(TOOLS)
    yield import_module
    for path in TOOLS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("name", sorted(path.stem for path in TOOLS.glob("*.py")))
def test_scripts_load(tool, name):
    assert tool(name).__doc__


def test_training_bench_replaces_the_neurons(tool):
    bench = tool("bench_training")
    model = snlp_zoo.build("spikelm_tiny").train()
    ids = torch.randint(5, 120, (2, 7))
    model(ids)  # amplitudes are measured
    spikes = {}
    node = next(module for module in model.modules() if isinstance(module, ElasticBiSpike))
    node.register_forward_hook(lambda _, __, out: spikes.setdefault(name, out))
    for name in ("kernels", "loop", "dense"):
        with bench.variant(name), torch.no_grad():
            model.eval()(ids)
    torch.testing.assert_close(spikes["loop"], spikes["kernels"])
    assert len(spikes["dense"].unique()) > 100  # currents passed on
    assert len(spikes["kernels"].unique()) < 20


def test_processes_bench_reverses_rows(tool, monkeypatch):
    monkeypatch.setattr(loop, "own_rows", lambda accelerator, batch: batch)
    tool("bench_processes").reverse_rows()
    assert loop.own_rows(None, {"labels": torch.arange(3)})["labels"].tolist() == [2, 1, 0]


def test_claims_ledger_knows_every_family(tool):
    assert tool("claims_ledger").SYSTEMS.keys() == model_classes().keys()


def test_generation_bench_measures_single_tokens(tool):
    model = snlp_zoo.build("spikegpt_tiny")
    read = []
    model.spikegpt.embeddings.register_forward_hook(lambda _, inputs, out: read.append(inputs[0].shape[1]))
    short, long = (tool("bench_generate").measure(model, length, tokens=3, piece=40) for length in (20, 100))
    assert read == [19, *[1] * 4, *[1] * 3, 40, 40, 19, *[1] * 4, *[1] * 3]
    assert short["state_bytes"] == long["state_bytes"] == 2 * 7 * 32 * 4
    assert short["ms_per_token"] > 0


def test_runs_go_to_the_gpu_with_the_fewest_of_them(tool):
    least_busy, busy = tool("compare_recipes").least_busy, []
    for _ in range(5):
        busy.append(least_busy(["0", "1"], busy))
    assert busy == ["0", "1", "0", "1", "0"]
    assert least_busy(["0", "1"], ["0", "1", "0"]) == "1"
    assert least_busy([], [None]) is None


def test_comparison_shows_what_was_measured(tool):
    columns = tool("compare_recipes").columns
    language = {"student_bits_per_character": 2.25, "firing_rate": 0.3, "seconds": 9.0}
    dense = {"student_bits_per_character": 2.0, "seconds": 5.0}
    shown = columns([language, language | {"student_bits_per_character": 2.27, "seconds": 11.0}])
    assert shown == {"bits per character": "2.260 +- 0.014", "firing rate": "30.0 +- 0.0 %", "seconds": "10"}
    assert columns([dense]) == {"bits per character": "2.000", "firing rate": "-", "seconds": "5"}
    labels = {
        "student_accuracy": 0.7,
        "student_macro_f1": 0.6,
        "teacher_accuracy": 0.75,
        "firing_rate": 0.1,
        "seconds": 8,
    }
    assert columns([labels])["gap to the teacher"] == "5.0"
