import pytest
import torch

from snlp_zoo.errors import BackendError, SnlpError
from snlp_zoo.ops import backend as module
from snlp_zoo.ops.backend import explain, resolve

CPU = torch.zeros(1)


@pytest.fixture
def present(monkeypatch):
    """Function: pretend that exactly these modules can be imported."""

    def pretend(*names):
        monkeypatch.setattr(module, "find_spec", lambda name: object() if name in names else None)

    return pretend


@pytest.mark.parametrize("op", ["lif", "bispike"])
@pytest.mark.parametrize("name", ["auto", "torch"])
def test_cpu_tensors_run_on_torch(op, name):
    assert resolve(name, CPU, op) == "torch"


@pytest.mark.parametrize("op", ["lif", "bispike"])
@pytest.mark.parametrize("name", ["triton", "cupy"])
def test_kernels_refuse_cpu_tensors(op, name):
    with pytest.raises(BackendError, match=rf"^{op}: backend '{name}' cannot run: .+; use 'auto' or 'torch'$"):
        resolve(name, CPU, op)


def test_unknown_name():
    with pytest.raises(BackendError, match="lif: unknown backend 'cuda'; use one of auto, torch, triton, cupy"):
        resolve("cuda", CPU, "lif")


def test_backend_error_can_be_caught_as_ours_and_as_runtime_error():
    assert issubclass(BackendError, SnlpError)
    assert issubclass(BackendError, RuntimeError)


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ((), "this version has no triton kernel"),
        (("snlp_zoo.ops.lif.triton",), r"triton is not installed \(pip install 'snlp-zoo\[triton\]'\)"),
        (("snlp_zoo.ops.lif.triton", "triton"), "it needs CUDA tensors, got cpu"),
    ],
)
def test_each_obstacle_is_named(present, modules, reason):
    present(*modules)
    with pytest.raises(BackendError, match=reason):
        resolve("triton", CPU, "lif")


def test_auto_takes_the_first_kernel_that_runs(present):
    cuda = torch.device("cuda")
    present("snlp_zoo.ops.lif.triton", "triton", "snlp_zoo.ops.lif.cupy", "cupy")
    assert explain("lif", cuda)[0] == "triton"
    present("snlp_zoo.ops.lif.cupy", "cupy")
    assert explain("lif", cuda)[0] == "cupy"
    present()
    name, reason = explain("lif", cuda)
    assert name == "torch"
    assert "triton: " in reason
    assert "cupy: " in reason
