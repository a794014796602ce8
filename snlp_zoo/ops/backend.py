"""Which implementation of an op runs: one rule for every op, and one clear error.

An op's folder holds `reference.py` (the specification, a plain loop), `analytic.py` (backend "torch": analytic
backward, any device) and, where they exist, `triton.py` and `cupy.py`. A kernel's third party is imported only when
that kernel is chosen.
"""

from importlib.util import find_spec
from typing import Literal, get_args

import torch

from snlp_zoo.errors import BackendError

Backend = Literal["auto", "torch", "triton", "cupy"]
KERNELS = ("triton", "cupy")  # in order of preference


def _obstacle(kernel: str, op: str, device: torch.device) -> str | None:
    """Why `kernel` cannot run `op` on `device`, or None if it can."""
    if find_spec(f"snlp_zoo.ops.{op}.{kernel}") is None:
        return f"this version has no {kernel} kernel for it"
    if find_spec(kernel) is None:
        return f"{kernel} is not installed (pip install 'snlp-zoo[{kernel}]')"
    if device.type != "cuda":
        return f"it needs CUDA tensors, got {device.type}"
    return None


def explain(op: str, device: torch.device) -> tuple[str, str]:
    """The backend `auto` picks for `op` on `device`, and the reason in words."""
    obstacles = {kernel: _obstacle(kernel, op, device) for kernel in KERNELS}
    for kernel, obstacle in obstacles.items():
        if obstacle is None:
            return kernel, "fastest backend that runs here"
    return "torch", "; ".join(f"{kernel}: {obstacle}" for kernel, obstacle in obstacles.items())


def resolve(backend: str, tensor: torch.Tensor, op: str) -> str:
    """Name of the backend that runs `op` on `tensor`.

    Args:
        backend: "auto", "torch", "triton" or "cupy".
        tensor: the op's main input; its device decides what can run.
        op: folder name of the op below `snlp_zoo.ops`.
    Raises:
        BackendError: unknown name, or a backend asked for by name that cannot run here.
    """
    if backend not in get_args(Backend):
        raise BackendError(f"{op}: unknown backend {backend!r}; use one of {', '.join(get_args(Backend))}")
    if backend == "torch" or (backend == "auto" and tensor.device.type == "cpu"):
        return "torch"  # without looking for kernels: this runs at every forward
    if backend == "auto":
        return explain(op, tensor.device)[0]
    if obstacle := _obstacle(backend, op, tensor.device):
        raise BackendError(f"{op}: backend {backend!r} cannot run: {obstacle}; use 'auto' or 'torch'")
    return backend
