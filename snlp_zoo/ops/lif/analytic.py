"""LIF with an analytic backward: saves only its input and recomputes the membrane, no autograd graph over T.

Spikes are 1 and 0 in the membrane's dtype: on a CPU, eager code writes and reads bool several times slower.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from snlp_zoo.ops.chunks import as_rows, by_chunks
from snlp_zoo.ops.surrogates import Surrogate

BLOCK = 2**17  # elements for which what needs no order is computed at once


def _charge(x: Tensor, v: Tensor | None, leak: Tensor, v_rest: float, decay_input: bool) -> Tensor:
    """Rounds as `lif_reference` does. v is None at rest."""
    if v is None:
        h = x * leak if decay_input else x
        return h + v_rest if v_rest else h
    above_rest = v - v_rest if v_rest else v
    return (x - above_rest).mul_(leak).add_(v) if decay_input else (v - above_rest * leak).add_(x)


def _reset(h: Tensor, s: Tensor, v_threshold: float, v_reset: float | None) -> tuple[Tensor, Tensor | None]:
    """Membrane after the reset and the share of h in it (None: all). Products with s are exact, fused or not."""
    if v_reset is None:
        return torch.sub(h, s, alpha=v_threshold), None
    kept = 1 - s
    v = kept * h
    return v.add_(s, alpha=v_reset) if v_reset else v, kept


def _forward(current, v, leak, spikes, v_out, v_threshold, v_reset, decay_input) -> None:
    for t, x in enumerate(current):
        h = _charge(x, v, leak, v_reset or 0.0, decay_input)
        s = torch.ge(h, v_threshold, out=spikes[t])
        if v_out is not None or t + 1 < len(current):
            v, _ = _reset(h, s, v_threshold, v_reset)
    if v_out is not None:
        v_out.copy_(v)


def _together(steps: list[Any]) -> Tensor:
    return torch.stack(steps) if len(steps) > 1 else steps[0].unsqueeze(0)


def _backward(
    current, v, leak, alpha, grad_spikes, grad, grad_current, grad_v_init, grad_leak, grad_alpha,
    v_threshold, v_reset, decay_input, detach_reset, surrogate,
) -> None:  # fmt: skip
    """First what depends on h, forward in time; then, backward, grad_h = slope grad_s + kept grad_v.

    A learned alpha gets (dS/dalpha) times what reaches the spike: grad_s, and grad_v through a reset not detached.
    """
    steps: list[Any] = []
    v_rest, decay = v_reset or 0.0, 1 - leak
    surrogate = surrogate if alpha is None else replace(surrogate, alpha=alpha)
    size = max(1, BLOCK // max(current[0].numel(), 1))
    for xs, grads in zip(current.split(size), grad_spikes.split(size), strict=True):
        charged, keeping, driven = [], [], []
        for x in xs:
            h = _charge(x, v, leak, v_rest, decay_input)
            if grad_leak is not None:
                driven.append((x if decay_input else 0.0) - (0.0 if v is None else v - v_rest))
            v, kept = _reset(h, torch.ge(h, v_threshold, out=torch.empty_like(h)), v_threshold, v_reset)
            charged.append(h)
            keeping.append(kept)
        h, resetting = _together(charged), None
        slope = surrogate.derivative(z := h - v_threshold)
        kept = None if kept is None else _together(keeping)
        if not detach_reset:
            resetting = torch.full_like(h, -v_threshold) if v_reset is None else v_reset - h
            kept = slope * resetting + (1 if kept is None else kept)
        rising = None if grad_alpha is None else surrogate.alpha_derivative(z, slope)
        block = (slope.mul_(grads), kept, driven or None, rising, resetting)
        steps += zip(*([None] * len(xs) if x is None else x for x in block), strict=True)
    for total in (grad_leak, grad_alpha):
        if total is not None:
            total.zero_()
    for t, (grad_h, kept, driven, rising, resetting) in reversed(list(enumerate(steps))):
        if grad_alpha is not None:
            through = grad_spikes[t] if grad is None or resetting is None else grad_spikes[t] + grad * resetting
            grad_alpha.add_(rising * through)
        if grad is not None:
            grad_h = grad_h.add_(grad) if kept is None else grad_h.addcmul_(grad, kept)
        if decay_input:
            torch.mul(grad_h, leak, out=grad_current[t])
        else:
            grad_current[t] = grad_h
        if grad_leak is not None:
            grad_leak.add_(grad_h * driven)
        if t or grad_v_init is not None:
            grad = grad_h.mul_(decay)
    if grad_v_init is not None:
        grad_v_init.copy_(grad)


class _LIF(torch.autograd.Function):
    """Inputs current [T, ...], v_init [...] or None at rest, leak = 1 / tau, [...] or a scalar, alpha alike or None."""

    @staticmethod
    def forward(current, v_init, leak, alpha, v_threshold, v_reset, decay_input, detach_reset, surrogate, carry_out):
        step = current.shape[1:]
        spikes = torch.empty(current.shape, dtype=current.dtype, device=current.device)
        v = leak.new_empty(step) if carry_out else None
        inputs, outputs = as_rows(step, current, v_init, leak), as_rows(step, spikes, v)
        by_chunks(_forward, leak.dtype, inputs, outputs, v_threshold, v_reset, decay_input)
        return spikes, v if carry_out else leak.new_empty(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        current, v_init, leak, alpha, *ctx.options, ctx.carry_out = inputs
        ctx.save_for_backward(current, v_init, leak, alpha)

    @staticmethod
    def backward(ctx, grad_spikes, grad_v):
        current, v_init, leak, alpha = ctx.saved_tensors
        step = current.shape[1:]
        grad_current = torch.empty(current.shape, dtype=current.dtype, device=current.device)
        grads = [leak.new_empty(step) if needed else None for needed in ctx.needs_input_grad[1:4]]
        inputs = as_rows(step, current, v_init, leak, alpha, grad_spikes, grad_v if ctx.carry_out else None)
        by_chunks(_backward, leak.dtype, inputs, as_rows(step, grad_current, *grads), *ctx.options)
        sums = [x if x is None else x.sum_to_size(of.shape) for x, of in zip(grads[1:], (leak, alpha), strict=True)]
        return grad_current, grads[0], *sums, *(None,) * 6


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
    step = current.shape[1:]
    fixed, alpha = surrogate.split()
    per_step = [x if x is None else x.reshape(()) if x.numel() == 1 else x.expand(step) for x in (leak, alpha)]
    options = (v_threshold, v_reset, decay_input, detach_reset, fixed, carry_out)
    if not torch.is_grad_enabled():  # autograd's own work is half the time of a single step
        return _LIF.forward(current, v_init, *per_step, *options)  # type: ignore[call-arg]
    return _LIF.apply(current, v_init, *per_step, *options)
