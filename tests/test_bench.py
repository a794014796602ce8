import dataclasses
import json

import pytest
from typer.testing import CliRunner

from snlp_zoo import bench, cli
from snlp_zoo.errors import BackendError
from snlp_zoo.ops.backend import KERNELS


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(bench, "CPU_SHAPES", ((3, 2, 5, 4),))
    monkeypatch.setattr(bench, "_STATIC_LOOP", 0)  # no C++ compiler needed
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_times_every_op_against_the_loop_and_spikingjelly():
    seen = []
    result = bench.measure(list(bench.OPS), seen.append)
    assert result["copy_gb_per_s"] is None
    assert seen == result["rows"]
    assert [row["op"] for row in seen] == list(bench.OPS)
    for row in seen:
        assert row["backend"] == "torch"
        assert row["backend"] not in KERNELS
        assert min(row["ms"], row["loop_ms"], row["spikingjelly_ms"]) > 0


@pytest.mark.parametrize("op", bench.OPS)
def test_what_differs_from_the_reference_is_not_timed(op, monkeypatch):
    wrong = dataclasses.replace(bench.OPS[op], run=lambda x, alpha, backend: x * 1.0)
    monkeypatch.setitem(bench.OPS, op, wrong)
    with pytest.raises(BackendError, match=rf"{op} on torch: differs from the reference at \(3, 2, 5, 4\)"):
        bench.measure([op])


def test_a_wrong_gradient_is_not_timed_either(monkeypatch):
    right = bench.OPS["lif"].run

    def half(x, alpha, backend):
        spikes = right(x, alpha, backend)
        return spikes.detach() + (spikes - spikes.detach()) / 2

    monkeypatch.setitem(bench.OPS, "lif", dataclasses.replace(bench.OPS["lif"], run=half))
    with pytest.raises(BackendError, match="differs from the reference"):
        bench.measure(["lif"])


def test_command_prints_a_table_and_json():
    table = CliRunner().invoke(cli.app, ["bench", "--op", "lif"])
    assert table.exit_code == 0
    assert "x SpikingJelly" in table.stdout
    assert "3, 2, 5, 4" in table.stdout
    row = json.loads(CliRunner().invoke(cli.app, ["bench", "--op", "lif", "--json"]).stdout)["rows"][0]
    assert (row["op"], row["dtype"], row["shape"]) == ("lif", "float32", [3, 2, 5, 4])


def test_unknown_op():
    with pytest.raises(BackendError, match="bench: unknown op 'relu'; use one of bispike, lif"):
        CliRunner().invoke(cli.app, ["bench", "--op", "relu"], catch_exceptions=False)
