"""Elastic bi-spike with an analytic backward: one byte of flags per element and step, no autograd graph over T."""

import torch
from torch import Tensor

from snlp_zoo.ops.bispike.reference import ALPHA_FLOOR, Reset

_INSIDE = 4  # a flag is q + 1, plus 4 where the gradient passes: |m| <= alpha


def _carry(fired: Tensor, alpha: Tensor, beta: float, reset: Reset, dtype: torch.dtype) -> Tensor:
    """dv/dm of one step from q in {-1, 0, 1}."""
    if reset == "symmetric":
        return (1 - fired.abs()).to(dtype) * beta
    return beta * (alpha - alpha.clamp_min(ALPHA_FLOOR) * fired.to(dtype))


class _BiSpike(torch.autograd.Function):
    """Saves flags; `current` and `v_init` are kept only where alpha wants a gradient, which needs m itself."""

    @staticmethod
    def forward(ctx, current, v_init, alpha, beta, reset, weight):
        learned = ctx.needs_input_grad[2]
        spikes = torch.empty_like(current)
        flags = torch.empty(current.shape, dtype=torch.uint8, device=current.device)
        magnitude = torch.zeros_like(alpha) if weight is None else weight.new_zeros(len(current))
        v = v_init
        for t in range(len(current)):
            m = v + current[t]
            alpha_t = alpha[t].clamp_min(ALPHA_FLOOR)
            ratio = m / alpha_t
            q = ratio.round().clamp_(-1, 1)
            torch.mul(q, alpha_t, out=spikes[t])
            flags[t] = torch.add(q + 1, ratio.abs_() <= 1, alpha=_INSIDE)
            if weight is not None:
                magnitude[t] = (ratio.sum(-1, keepdim=True) * weight).sum() * alpha_t
            v = m * _carry(q, alpha[t], beta, reset, m.dtype)
        ctx.save_for_backward(flags, alpha, *((current, v_init) if learned else ()))
        ctx.beta, ctx.reset, ctx.dtype = beta, reset, current.dtype
        ctx.mark_non_differentiable(magnitude)
        return spikes, v, magnitude

    @staticmethod
    def backward(ctx, grad_spikes, grad_v, _):
        flags, alpha, *inputs = ctx.saved_tensors
        grad_current = torch.empty(flags.shape, dtype=ctx.dtype, device=flags.device)
        for t in reversed(range(len(flags))):
            fired = (flags[t] & 3).to(torch.int8) - 1
            inside = (flags[t] >= _INSIDE).to(ctx.dtype)
            carry = _carry(fired, alpha[t], ctx.beta, ctx.reset, ctx.dtype)
            torch.addcmul(grad_v * carry, grad_spikes[t], inside, out=grad_current[t])
            grad_v = grad_current[t]
        grad_alpha = None
        if inputs:
            current, v_init = inputs
            grad_alpha = _grad_alpha(grad_spikes, flags, alpha, current, v_init, ctx.beta, ctx.reset)
        return grad_current, grad_v, grad_alpha, None, None, None


def _grad_alpha(
    grad_spikes: Tensor, flags: Tensor, alpha: Tensor, current: Tensor, v_init: Tensor, beta: float, reset: Reset
) -> Tensor:
    """Gradient of learned step sizes (LSQ): q - m / alpha inside the window, q outside, summed per step."""
    v, grads = v_init, []
    for t in range(len(current)):
        m, alpha_t = v + current[t], alpha[t].clamp_min(ALPHA_FLOOR)
        q = (m / alpha_t).round().clamp(-1, 1)
        inside = flags[t] >= _INSIDE
        grads.append((grad_spikes[t] * torch.where(inside, q - m / alpha_t, q)).sum())
        v = m * _carry(q, alpha[t], beta, reset, m.dtype)
    return torch.stack(grads) * (alpha >= ALPHA_FLOOR)


def elastic_bispike_analytic(
    current: Tensor,
    v_init: Tensor | None,
    alpha: Tensor,
    mask: Tensor | None,
    beta: float,
    reset: Reset,
    measured: bool,
    carry_out: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same function as `elastic_bispike_reference`; memory for the backward is one byte per element and step.

    Returns spikes in current's dtype, the membrane (empty unless `carry_out`), and, if `measured`, the sum of |m[t]|
    over the rows that `mask` counts, [T] float64 (zeros otherwise).
    """
    current = current.to(alpha.dtype)
    if v_init is None:
        v_init = torch.zeros_like(current[0])
    weight = None
    if measured:  # in float64: the sum, and with it alpha, must not depend on how a batch is split over processes
        wide = torch.float32 if current.device.type == "mps" else torch.float64
        rows = v_init.shape[:-1]
        weight = (torch.ones((), device=current.device) if mask is None else mask).to(wide).expand(rows).unsqueeze(-1)
    return _BiSpike.apply(current, v_init, alpha, beta, reset, weight)
