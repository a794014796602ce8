"""The throughput bench in miniature: it reports every column, and nothing whose loop computes something else."""

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from snlp_zoo.layers import SpikingLinear
from snlp_zoo.layers.neurons import lif as neurons
from snlp_zoo.ops import elastic_bispike, lif, wkv4
from snlp_zoo.ops.counts import Counts, counts

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def tool(monkeypatch):
    """The script and what it shares with others, as modules."""
    monkeypatch.syspath_prepend(TOOLS)
    yield import_module("bench_zoo"), import_module("_bench")
    for name in ("bench_zoo", "_bench"):
        sys.modules.pop(name)


def test_every_column_is_reported(tool, monkeypatch, capsys, tmp_path):
    families = ["spikelm_158", "spikegpt", "spiking_minilm"]
    output = tmp_path / "zoo.json"
    monkeypatch.setattr(sys, "argv", ["bench_zoo.py", "--tiny", "--families", *families, "--output", str(output)])
    tool[0].main()
    machine, _, *lines = capsys.readouterr().out.splitlines()
    assert torch.__version__ in machine
    titles, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert titles[1:4] == ["training examples/s", "/ dense", "/ loop"]
    assert {len(row) for row in (titles, rule, *rows)} == {11}
    assert [row[0] for row in rows] == ["dense BERT", "dense RWKV-4", *families]
    saved = json.loads(output.read_text(encoding="utf-8"))["rows"]
    for row, found in zip(rows[2:], saved, strict=True):
        for i, part in enumerate([found["training"], *found["inference"]]):
            assert float(row[3 * i + 2]) == pytest.approx(part["kernels_per_s"] / part["dense_per_s"], abs=0.006)
            assert bool(row[3 * i + 3]) == (row[0] != "spiking_minilm")


def wrong(op):
    """A loop that computes something a little different."""
    changed = {lif: "v_threshold", elastic_bispike: "beta"}

    def run(*args, **options):
        if op in changed:
            options[changed[op]] *= 1.2
        elif op is counts:
            args = args[0], args[1] * 1.2
        else:
            args = args[0] * 1.2, *args[1:]
        return op(*args, **options)

    return run


@pytest.mark.parametrize(
    ("family", "op"),
    [
        ("spikelm", elastic_bispike),
        ("spikingbert", lif),
        ("spikebert", lif),
        ("spiking_minilm", counts),
        ("spikegpt", lif),
        ("spikegpt", wkv4),
    ],
)
def test_a_loop_that_computes_something_else_is_not_timed(tool, monkeypatch, family, op):
    zoo, shared = tool
    bench = zoo.Bench(zoo.TINY, "cpu")
    model = bench.make(family)
    assert bench.check(family, model) < 1e-5
    monkeypatch.setitem(shared.LOOPS, op, wrong(op))
    with pytest.raises(zoo.Disagreement, match=f"{family}: the loop's logits are off"):
        bench.check(family, model)


@pytest.mark.parametrize(("shift", "right"), [(2e-4, True), (5e-3, False)])
def test_a_converted_model_may_round_a_few_counts_otherwise(tool, monkeypatch, shift, right):
    zoo, shared = tool
    bench = zoo.Bench(replace(zoo.TINY, infer=((16, 32),)), "cpu")
    model = bench.make("spiking_minilm")

    def rounded(x, threshold_scale, *, dtype=None, **options):
        threshold = counts(x, threshold_scale, **options).threshold
        return Counts((x / threshold + shift).round().to(dtype or x.dtype), threshold)

    monkeypatch.setitem(shared.LOOPS, counts, rounded)
    with nullcontext() if right else pytest.raises(zoo.Disagreement, match="spiking_minilm: the loop's logits are off"):
        assert bench.check("spiking_minilm", model) < 1e-5


def test_low_bit_weights_are_compared(tool, monkeypatch):
    zoo, shared = tool
    bench = zoo.Bench(zoo.TINY, "cpu")
    model = bench.make("spikelm_158")
    assert bench.check("spikelm_158", model) < 1e-5

    def unquantised(self, x, mask=None):
        return torch.nn.Linear.forward(self, self.neuron(x, from_rest=True))

    monkeypatch.setattr(shared, "spiking_linear_plain", unquantised)
    with pytest.raises(zoo.Disagreement, match="spikelm_158"):
        bench.check("spikelm_158", model)
    assert SpikingLinear.forward.__qualname__ == "SpikingLinear.forward"  # put back


def test_a_loop_that_is_wrong_in_training_alone_is_not_reported(tool, monkeypatch, capsys):
    zoo, shared = tool
    right = shared.LOOPS[lif]
    monkeypatch.setitem(
        shared.LOOPS, lif, lambda *args, **options: (wrong(lif) if torch.is_grad_enabled() else right)(*args, **options)
    )
    monkeypatch.setattr(sys, "argv", ["bench_zoo.py", "--tiny", "--families", "spikebert", "spiking_minilm"])
    with pytest.raises(SystemExit, match="not reported: spikebert: the first loss is"):
        zoo.main()
    assert "spiking_minilm" in capsys.readouterr().out


def test_calls_take_turns_until_they_took_long_enough(tool):
    zoo, shared = tool
    bench, made = zoo.Bench(replace(zoo.TINY, warmups=2, repeats=3, limit_s=0.05), "cpu"), []

    def slow():
        made.append("slow" if neurons.lif is shared.lif_loop else "not a loop")
        time.sleep(0.06)

    times = bench.rounds({"kernels": lambda: made.append("quick"), "loop": slow})
    assert [len(taken) for taken in times.values()] == [3, 1]
    assert made == ["quick", "quick", "slow", "quick", "slow", "quick", "quick"]
    assert zoo.speeds({"kernels": [1.0, 2.0, 5.0], "dense": [3.0, 4.0, 5.0]}, 10) == {
        "kernels_per_s": 5000.0,
        "dense_per_s": 2500.0,
        "over_dense": 2.0,
    }
