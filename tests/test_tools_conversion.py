"""The bench of converted models: that it times nothing wrong, and what its table says."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    yield import_module("bench_conversion")
    sys.modules.pop("bench_conversion")


def test_small_layers_run_on_a_cpu(bench):
    what, ms, ratios = bench.bench_linear((3, 40, 8), 1, "cpu")
    assert list(ms) == ["dense", "counts + float", "counts + int8", "int8 alone"]
    assert ratios.keys() == ms.keys() - {"dense"}
    assert min(ms.values()) > 0
    lines = bench.table([(what, ms, ratios)]).splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("linear 3 x 40 x 8")
    assert lines[1].split()[-1] == "1"
    assert float(lines[2].split()[-1]) == pytest.approx(ratios["counts + float"], abs=0.006)


def test_a_ratio_is_that_of_one_round(bench, monkeypatch):
    given = iter([1.0, 3.0, 10.0, 20.0, 100.0, 500.0])  # a machine that slows down
    monkeypatch.setattr(bench, "milliseconds", lambda *_: next(given))
    _, ms, ratios = bench.take_turns("it", {"dense": int, "converted": int}, 3, 1, "cpu")
    assert ms == {"dense": 10.0, "converted": 20.0}
    assert ratios == {"converted": 3.0}


def test_what_is_wrong_is_not_timed(bench, monkeypatch):
    right = bench.counts
    for off in (1, float("nan")):
        monkeypatch.setattr(bench, "counts", lambda *a, off=off, **k: (right(*a, **k)[0] + off, right(*a, **k)[1]))
        with pytest.raises(SystemExit, match=r"counts of \(2, 5\) is off by .* nothing is timed"):
            bench.check_counts(torch.randn(2, 5), torch.float32)
    monkeypatch.setattr(bench, "int8_linear", lambda *_, dtype: torch.ones(3, 8, dtype=dtype))
    monkeypatch.setattr(bench, "counts", right)
    with pytest.raises(SystemExit, match=r"linear \(3, 40, 8\) is off by"):
        bench.bench_linear((3, 40, 8), 1, "cpu")
