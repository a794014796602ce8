"""The bench of SpikeGPT's recurrences: what it replaces, and that it times nothing wrong."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from snlp_zoo import ops
from snlp_zoo.layers.neurons import lif as neurons

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    yield import_module("bench_spikegpt")
    sys.modules.pop("bench_spikegpt")


def test_both_ops_are_replaced_everywhere_and_put_back(bench):
    with bench.loops():
        assert neurons.lif is bench.lif_loop
        assert ops.wkv4 is bench.wkv4_loop
        assert ops.lif is bench.lif_loop
    assert neurons.lif is bench.lif
    assert ops.wkv4 is bench.wkv4


def test_small_shapes_run_on_a_cpu(bench):
    assert bench.bench_wkv4((1, 5, 2), torch.bfloat16, "cpu", 1).keys() >= {"torch", "loop"}
    rows = bench.bench_lif((3, 1, 2), "cpu", 1)
    assert rows["torch"] > 0
    assert bench.table({"lif": rows}).count("lif") == len(rows)


def test_what_is_wrong_is_not_timed(bench):
    x = torch.ones(3, requires_grad=True)
    variants = {"wrong": lambda x: x * 1.001, "loop": lambda x: x * 1.0}
    with pytest.raises(SystemExit, match="op by wrong is off by"):
        bench.compare("op", variants, [x], torch.ones(3), 1)
