"""The kernels as one PyTorch operator, `snlp_zoo::lif`: opaque to torch.compile, autocast and export.

Kernels fill what is allocated here. The backward keeps the input current and computes the membrane again, GROUP steps
at a time; where T is larger than that, the forward leaves the membrane at the start of every later group.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from snlp_zoo.ops.backend import step_major

GROUP = 16  # steps whose membranes fit into registers; their starts cost 4 / 16 bytes per element and step


def _kernels(backend: str) -> ModuleType:
    return import_module(f"snlp_zoo.ops.lif.{backend}")


@torch.library.custom_op("snlp_zoo::lif", mutates_args=())
def lif(
    current: Tensor,
    v_init: Tensor | None,
    leak: Tensor | None,
    leak_value: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    steepness: float,
    spike_dtype: torch.dtype,
    carry_out: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes [T, ...], v [...] (empty unless carry_out), starts of the later groups [(T - 1) // GROUP, ...].

    leak, 1 / tau, is `leak_value`, or a tensor that repeats along the flattened trailing axes of current.
    """
    spikes, v, starts = _allocate(
        current, v_init, leak, leak_value, v_threshold, v_reset, decay_input, detach_reset,
        surrogate, steepness, spike_dtype, carry_out, backend,
    )  # fmt: skip
    if current.numel():
        v_init, leak = (None if x is None else x.contiguous() for x in (v_init, leak))
        _kernels(backend).forward(
            step_major(current), v_init, leak, leak_value, v_threshold, v_reset, decay_input,
            spikes, v if carry_out else None, starts,
        )  # fmt: skip
    return spikes, v, starts


@lif.register_fake
def _allocate(
    current, v_init, leak, leak_value, v_threshold, v_reset, decay_input, detach_reset,
    surrogate, steepness, spike_dtype, carry_out, backend,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    step = current.shape[1:]
    return (
        current.new_empty(current.shape, dtype=spike_dtype),
        current.new_empty(step if carry_out else (0,), dtype=torch.float32),
        current.new_empty(((current.shape[0] - 1) // GROUP, *step), dtype=torch.float32),
    )


@torch.library.custom_op("snlp_zoo::lif_backward", mutates_args=())
def _backward(
    grad_spikes: Tensor,
    grad_v: Tensor | None,
    current: Tensor,
    v_init: Tensor | None,
    starts: Tensor,
    leak: Tensor | None,
    leak_value: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    steepness: float,
    learned: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of current [T, ...], of v_init [...] (empty if that is None) and of leak (empty unless learned)."""
    grad_current, grad_v_init, grad_leak = _allocate_grads(
        grad_spikes, grad_v, current, v_init, starts, leak, leak_value, v_threshold, v_reset, decay_input, detach_reset,
        surrogate, steepness, learned, backend,
    )  # fmt: skip
    if not current.numel():
        return grad_current, grad_v_init, grad_leak.zero_()
    grad_v, v_init, leak = (None if x is None else x.contiguous() for x in (grad_v, v_init, leak))
    per_element = grad_current.new_empty(current.shape[1:], dtype=torch.float32) if learned else None
    _kernels(backend).backward(
        step_major(grad_spikes), grad_v, step_major(current), v_init, starts, leak, leak_value,
        v_threshold, v_reset, decay_input, detach_reset, surrogate, steepness,
        grad_current, None if v_init is None else grad_v_init, per_element,
    )  # fmt: skip
    if leak is not None and per_element is not None:
        grad_leak = per_element.view(-1, leak.numel()).sum(0).view(leak.shape)
    return grad_current, grad_v_init, grad_leak


@_backward.register_fake
def _allocate_grads(
    grad_spikes, grad_v, current, v_init, starts, leak, leak_value, v_threshold, v_reset, decay_input, detach_reset,
    surrogate, steepness, learned, backend,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty(current.shape, dtype=current.dtype, device=current.device),
        torch.empty((0,) if v_init is None else v_init.shape, dtype=torch.float32, device=current.device),
        torch.empty(leak.shape if learned else (0,), dtype=torch.float32, device=current.device),
    )


def _save(ctx, inputs, output) -> None:
    current, v_init, leak, *ctx.options, _, ctx.carry_out, ctx.backend = inputs
    ctx.learned, ctx.spike_dtype = ctx.needs_input_grad[2], output[0].dtype
    ctx.set_materialize_grads(False)  # no zeros for the starts and an unused membrane
    ctx.save_for_backward(current, v_init, leak, output[2])


def _differentiate(ctx, grad_spikes, grad_v, _):
    current, v_init, leak, starts = ctx.saved_tensors
    if grad_spikes is None:  # only the membrane was used
        grad_spikes = torch.zeros(current.shape, dtype=ctx.spike_dtype, device=current.device)
    grad_current, grad_v_init, grad_leak = _backward(
        grad_spikes, grad_v if ctx.carry_out else None, current, v_init, starts, leak,
        *ctx.options, ctx.learned, ctx.backend,
    )  # fmt: skip
    grad_v_init, grad_leak = None if v_init is None else grad_v_init, grad_leak if ctx.learned else None
    return grad_current, grad_v_init, grad_leak, *(None,) * 10


lif.register_autograd(_differentiate, setup_context=_save)
