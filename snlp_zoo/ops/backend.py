"""Which implementation of an op runs: one rule for every op, and one clear error.

An op's folder holds `reference.py` (the specification, a plain loop), `analytic.py` (backend "torch": analytic
backward, any device) and, where they exist, the kernels `triton.py` and `cupy.py`. A kernel's third party is imported
only when that kernel is chosen.
"""

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from snlp_zoo.errors import BackendError

Backend = Literal["auto", "torch", "triton", "cupy"]
KERNELS = ("triton", "cupy")  # in order of preference
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ELEMENTS = 2**31 - 1  # per time step: kernels index inside a step with 32 bits

# both looked up once: `resolve` runs at every forward, and under torch.compile it is traced
_INSTALLED = {kernel: find_spec(kernel) is not None for kernel in KERNELS}
_WRITTEN = {(path.parent.name, path.stem) for path in Path(__file__).parent.glob("*/*.py") if path.stem in KERNELS}
# Triton then runs kernels in Python, on the CPU too; read once, as Triton itself does when a kernel is defined
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _obstacle(kernel: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `kernel` cannot run `op` on such tensors, or None if it can."""
    if (op, kernel) not in _WRITTEN:
        return f"this version has no {kernel} kernel for it"
    if not _INSTALLED[kernel]:
        return f"{kernel} is not installed (pip install 'snlp-zoo[{kernel}]')"
    if device.type != "cuda" and not (kernel == "triton" and INTERPRETED):
        return f"it needs CUDA tensors, got {device.type}"
    if dtype not in KERNEL_DTYPES:
        return f"it computes {', '.join(str(d).removeprefix('torch.') for d in KERNEL_DTYPES)}, got {dtype}"
    return None


def available(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> list[str]:
    """The kernels that can run `op` on such tensors, fastest first."""
    return [kernel for kernel in KERNELS if _obstacle(kernel, op, device, dtype) is None]


def explain(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The backend `auto` picks for `op` on tensors of this device and dtype, and the reason in words."""
    obstacles = {kernel: _obstacle(kernel, op, device, dtype) for kernel in KERNELS}
    for kernel, obstacle in obstacles.items():
        if obstacle is None and device.type != "cpu":
            return kernel, "fastest backend that runs here"
    interpreted = "interpreted, only when asked for by name"
    return "torch", "; ".join(f"{kernel}: {obstacle or interpreted}" for kernel, obstacle in obstacles.items())


def resolve(backend: str, tensor: Tensor, op: str) -> str:
    """Name of the backend that runs `op` on `tensor`.

    Args:
        backend: "auto", "torch", "triton" or "cupy".
        tensor: the op's main input, [T, ...]; its device, dtype and size decide what can run.
        op: folder name of the op below `snlp_zoo.ops`.
    Raises:
        BackendError: unknown name, or a backend asked for by name that cannot run here.
        ValueError: more elements per time step than a kernel can index.
    """
    if backend not in get_args(Backend):
        raise BackendError(f"{op}: unknown backend {backend!r}; use one of {', '.join(get_args(Backend))}")
    if backend == "torch" or (backend == "auto" and tensor.device.type == "cpu"):
        return "torch"  # without looking for kernels: this runs at every forward
    if backend == "auto":
        backend = explain(op, tensor.device, tensor.dtype)[0]
        if backend == "torch":
            return backend
    if obstacle := _obstacle(backend, op, tensor.device, tensor.dtype):
        raise BackendError(f"{op}: backend {backend!r} cannot run: {obstacle}; use 'auto' or 'torch'")
    if (size := math.prod(tensor.shape[1:])) > MAX_ELEMENTS:
        raise ValueError(f"{op}: {size} elements per time step, a kernel indexes {MAX_ELEMENTS}; split the batch")
    return backend


def check_steps(op: str, current: Tensor, v_init: Tensor | None) -> None:
    """Refuse what no neuron can run over T: current is float, [T, ...] with T >= 1, and v_init [...] or None.

    Raises:
        ValueError: what does not fit, in the name of the op.
    """
    if current.ndim == 0 or current.shape[0] == 0:
        raise ValueError(f"{op}: current needs at least one time step on axis 0, got shape {tuple(current.shape)}")
    if not current.is_floating_point() or current.element_size() == 1:
        raise ValueError(f"{op}: current must be float32, float64, bfloat16 or float16, got {current.dtype}")
    if v_init is not None and current.shape[1:] != v_init.shape:
        raise ValueError(
            f"{op}: v_init {tuple(v_init.shape)} must equal current without T {tuple(current.shape[1:])}; "
            "pass None to start at rest"
        )


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x in a product, and of that: autocast's where it is on, but float64 stays."""
    device = x.device.type
    cast = x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast else x.dtype


def step_major(x: Tensor) -> Tensor:
    """x [T, ...] with every time step contiguous, copied only if it is not; the stride over T may be anything."""
    return x if x[0].is_contiguous() else x.contiguous()
