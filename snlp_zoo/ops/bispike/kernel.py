"""The kernels as one PyTorch operator, `snlp_zoo::bispike`: opaque to torch.compile, autocast and export.

Kernels fill what is allocated here. What the backward needs, two bits per element and step (fired? inside the window?),
is packed four to a byte: each block of 4 * LANES elements of a step fills LANES bytes, and byte j holds its elements
j, j + LANES, j + 2 LANES and j + 3 LANES, the first in the lowest bits. The released recursion also needs the sign of a
spike: a second plane of the same layout with 1 for a positive spike, 2 for a negative one and 3 for NaN.
"""

import math
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from snlp_zoo.ops.backend import step_major


def lanes(size: int) -> int:
    """Bytes of flags that one block writes per step: fewer for small inputs, so that all of the device works."""
    return 256 if size >= 2**18 else 32


def blocks(size: int) -> int:
    return -(-size // (4 * lanes(size)))


def _flags(current: Tensor, reset: str) -> Tensor:
    size = math.prod(current.shape[1:])  # symbolic under torch.compile, where Size.numel is not
    shape = (1 if reset == "symmetric" else 2, current.shape[0], blocks(size) * lanes(size))
    return current.new_empty(shape, dtype=torch.uint8)


def _kernels(backend: str) -> ModuleType:
    return import_module(f"snlp_zoo.ops.bispike.{backend}")


@torch.library.custom_op("snlp_zoo::bispike", mutates_args=())
def bispike(
    current: Tensor,
    v_init: Tensor | None,
    alpha: Tensor,
    mask: Tensor | None,
    beta: float,
    reset: str,
    spike_dtype: torch.dtype,
    measured: bool,
    carry_out: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spikes [T, ...], v [...] (empty unless carry_out), total |m| [T] (empty unless measured), flags."""
    spikes, v, total, flags = _allocate(
        current, v_init, alpha, mask, beta, reset, spike_dtype, measured, carry_out, backend
    )
    if not current.numel():
        return spikes, v, total.zero_(), flags
    v_init, mask = (None if x is None else x.contiguous() for x in (v_init, mask))
    partial = alpha.new_empty(len(alpha), blocks(current[0].numel())) if measured else None
    _kernels(backend).forward(
        step_major(current), v_init, alpha.contiguous(), mask, beta, reset,
        spikes, v if carry_out else None, flags, partial,
    )  # fmt: skip
    if partial is not None:
        torch.sum(partial, 1, dtype=torch.float64, out=total)
    return spikes, v, total, flags


@bispike.register_fake
def _allocate(
    current, v_init, alpha, mask, beta, reset, spike_dtype, measured, carry_out, backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        current.new_empty(current.shape, dtype=spike_dtype),
        current.new_empty(current.shape[1:] if carry_out else (0,), dtype=torch.float32),
        current.new_empty(current.shape[0] if measured else 0, dtype=torch.float64),
        _flags(current, reset),
    )


@torch.library.custom_op("snlp_zoo::bispike_backward", mutates_args=())
def _backward(
    grad_spikes: Tensor,
    grad_v: Tensor | None,
    flags: Tensor,
    alpha: Tensor,
    beta: float,
    dtype: torch.dtype,
    carried_in: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of current [T, ...] in dtype and of v_init [...] (empty unless carried_in)."""
    grad_current, grad_v_init = _allocate_grads(grad_spikes, grad_v, flags, alpha, beta, dtype, carried_in, backend)
    if grad_current.numel():
        grad_v = None if grad_v is None else grad_v.contiguous()
        _kernels(backend).backward(
            step_major(grad_spikes), grad_v, flags, alpha.contiguous(), beta,
            grad_current, grad_v_init if carried_in else None,
        )  # fmt: skip
    return grad_current, grad_v_init


@_backward.register_fake
def _allocate_grads(grad_spikes, grad_v, flags, alpha, beta, dtype, carried_in, backend) -> tuple[Tensor, Tensor]:
    return (
        grad_spikes.new_empty(grad_spikes.shape, dtype=dtype),
        grad_spikes.new_empty(grad_spikes.shape[1:] if carried_in else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("snlp_zoo::bispike_backward_alpha", mutates_args=())
def _backward_alpha(
    grad_spikes: Tensor, current: Tensor, v_init: Tensor | None, alpha: Tensor, beta: float, reset: str, backend: str
) -> Tensor:
    """Gradient of alpha [T]: q - m / alpha inside the window, q outside (LSQ), summed; recomputes m."""
    if not current.numel():
        return torch.zeros_like(alpha)
    partial = alpha.new_empty(len(alpha), blocks(current[0].numel()))
    v_init = None if v_init is None else v_init.contiguous()
    _kernels(backend).backward_alpha(
        step_major(grad_spikes), step_major(current), v_init, alpha.contiguous(), beta, reset, partial
    )
    return partial.sum(1, dtype=torch.float64).to(alpha.dtype)


@_backward_alpha.register_fake
def _(grad_spikes, current, v_init, alpha, beta, reset, backend) -> Tensor:
    return torch.empty_like(alpha)


def _save(ctx, inputs, output) -> None:
    current, v_init, alpha, _, ctx.beta, ctx.reset, _, _, ctx.carry_out, ctx.backend = inputs
    ctx.dtype, ctx.carried_in, ctx.learned = current.dtype, v_init is not None, ctx.needs_input_grad[2]
    ctx.set_materialize_grads(False)  # no zeros for the flags and an unused membrane
    ctx.shape, ctx.spike_dtype = current.shape, output[0].dtype
    ctx.save_for_backward(output[3], alpha, *((current, v_init) if ctx.learned else ()))


def _differentiate(ctx, grad_spikes, grad_v, *_):
    flags, alpha, *inputs = ctx.saved_tensors
    grad_alpha = None
    if grad_spikes is None:  # only the membrane was used
        grad_spikes = torch.zeros(ctx.shape, dtype=ctx.spike_dtype, device=alpha.device)
    if ctx.learned:
        grad_alpha = _backward_alpha(grad_spikes, *inputs, alpha, ctx.beta, ctx.reset, ctx.backend)
    grad_current, grad_v_init = _backward(
        grad_spikes, grad_v if ctx.carry_out else None, flags, alpha, ctx.beta, ctx.dtype, ctx.carried_in, ctx.backend
    )
    return grad_current, grad_v_init if ctx.carried_in else None, grad_alpha, *(None,) * 7


bispike.register_autograd(_differentiate, setup_context=_save)
