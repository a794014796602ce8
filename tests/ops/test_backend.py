import pytest
import torch

from snlp_zoo.errors import BackendError, SnlpError
from snlp_zoo.ops import backend as module
from snlp_zoo.ops.backend import explain, resolve

CPU = torch.zeros(1)


@pytest.fixture
def present(monkeypatch):
    """Function: pretend that exactly these kernels of lif are written, and these packages installed."""

    def pretend(written, installed):
        monkeypatch.setattr(module, "_WRITTEN", {("lif", kernel) for kernel in written})
        monkeypatch.setattr(module, "_INSTALLED", {kernel: kernel in installed for kernel in module.KERNELS})
        monkeypatch.setattr(module, "INTERPRETED", False)

    return pretend


@pytest.mark.parametrize("op", ["lif", "bispike"])
@pytest.mark.parametrize("name", ["auto", "torch"])
def test_cpu_tensors_run_on_torch(op, name):
    assert resolve(name, CPU, op) == "torch"


@pytest.mark.parametrize("op", ["lif", "bispike"])
@pytest.mark.parametrize("name", ["triton", "cupy"])
def test_kernels_refuse_cpu_tensors(op, name, monkeypatch):
    monkeypatch.setattr(module, "INTERPRETED", False)
    with pytest.raises(BackendError, match=rf"^{op}: backend '{name}' cannot run: .+; use 'auto' or 'torch'$"):
        resolve(name, CPU, op)


def test_unknown_name():
    with pytest.raises(BackendError, match="lif: unknown backend 'cuda'; use one of auto, torch, triton, cupy"):
        resolve("cuda", CPU, "lif")


def test_backend_error_can_be_caught_as_ours_and_as_runtime_error():
    assert issubclass(BackendError, SnlpError)
    assert issubclass(BackendError, RuntimeError)


@pytest.mark.parametrize(
    ("written", "installed", "reason"),
    [
        ([], ["triton"], "this version has no triton kernel"),
        (["triton"], [], r"triton is not installed \(pip install 'snlp-zoo\[triton\]'\)"),
        (["triton"], ["triton"], "it needs CUDA tensors, got cpu"),
    ],
)
def test_each_obstacle_is_named(present, written, installed, reason):
    present(written, installed)
    with pytest.raises(BackendError, match=reason):
        resolve("triton", CPU, "lif")


def test_auto_takes_the_first_kernel_that_runs(present):
    cuda = torch.device("cuda")
    present(["triton", "cupy"], ["triton", "cupy"])
    assert explain("lif", cuda)[0] == "triton"
    assert explain("lif", cuda, torch.float64) == (
        "torch",
        "triton: it computes float32, bfloat16, float16, got torch.float64; "
        "cupy: it computes float32, bfloat16, float16, got torch.float64",
    )
    present(["triton", "cupy"], ["cupy"])
    assert explain("lif", cuda)[0] == "cupy"
    present(["triton", "cupy"], [])
    name, reason = explain("lif", cuda)
    assert name == "torch"
    assert "triton: " in reason
    assert "cupy: " in reason


def test_every_op_has_both_kernels():
    assert {("lif", "triton"), ("lif", "cupy"), ("bispike", "triton"), ("bispike", "cupy")} <= module._WRITTEN
