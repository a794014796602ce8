"""LIF with an analytic backward: saves only its input and recomputes the membrane, no autograd graph over T."""

import torch
from torch import Tensor

from snlp_zoo.ops.lif.reference import LIFOutput
from snlp_zoo.ops.surrogates import Surrogate


def _charge(x: Tensor, v: Tensor, leak: Tensor, v_rest: float, decay_input: bool) -> Tensor:
    return v + (x - (v - v_rest)) * leak if decay_input else v - (v - v_rest) * leak + x


def _reset(h: Tensor, s: Tensor, v_threshold: float, v_reset: float | None) -> Tensor:
    return h - s * v_threshold if v_reset is None else (1 - s) * h + s * v_reset


class _LIF(torch.autograd.Function):
    """Inputs current [T, ...], v_init [...], leak = 1 / tau broadcastable to v_init."""

    @staticmethod
    def forward(current, v_init, leak, v_threshold, v_reset, decay_input, detach_reset, surrogate):
        v, spikes, v_rest = v_init, torch.empty_like(current), v_reset or 0.0
        for t, x in enumerate(current):
            h = _charge(x, v, leak, v_rest, decay_input)
            spikes[t] = h >= v_threshold
            v = _reset(h, spikes[t], v_threshold, v_reset)
        return spikes, v.clone() if v is v_init else v

    @staticmethod
    def setup_context(ctx, inputs, output):
        current, v_init, leak, *ctx.options = inputs
        ctx.save_for_backward(current, v_init, leak)

    @staticmethod
    def backward(ctx, grad_spikes, grad_v):
        current, v_init, leak = ctx.saved_tensors
        v_threshold, v_reset, decay_input, detach_reset, surrogate = ctx.options
        v_rest = v_reset or 0.0
        before, charged = [], []  # membrane before and after charging, recomputed
        v = v_init
        for x in current:
            before.append(v)
            charged.append(h := _charge(x, v, leak, v_rest, decay_input))
            v = _reset(h, (h >= v_threshold).to(h.dtype), v_threshold, v_reset)
        grad_current, grad_leak = torch.empty_like(current), torch.zeros_like(v_init) if leak.requires_grad else None
        for t in reversed(range(len(current))):
            h = charged[t]
            grad_s = grad_spikes[t]
            if not detach_reset:
                grad_s = grad_s + grad_v * (-v_threshold if v_reset is None else v_reset - h)
            through_reset = grad_v if v_reset is None else grad_v * ~(h >= v_threshold)
            grad_h = through_reset + surrogate.derivative(h - v_threshold) * grad_s
            grad_current[t] = grad_h * leak if decay_input else grad_h
            if grad_leak is not None:
                grad_leak += grad_h * ((current[t] if decay_input else 0.0) - (before[t] - v_rest))
            grad_v = grad_h * (1 - leak)
        if grad_leak is not None:
            grad_leak = grad_leak.sum_to_size(leak.shape)
        return grad_current, grad_v, grad_leak, None, None, None, None, None


def lif_analytic(
    current: Tensor,
    v_init: Tensor | None,
    leak: Tensor,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    detach_reset: bool,
    surrogate: Surrogate,
    carry_out: bool,
) -> tuple[Tensor, Tensor]:
    """Same function as `lif_reference` with leak = 1 / tau; memory for the backward is the input alone.

    Returns spikes in current's dtype and the membrane (empty unless `carry_out`).
    """
    state = torch.promote_types(current.dtype, torch.float32)
    current = current.to(state)
    if v_init is None:
        v_init = torch.full_like(current[0], v_reset or 0.0)
    return _LIF.apply(current, v_init, leak, v_threshold, v_reset, decay_input, detach_reset, surrogate)
