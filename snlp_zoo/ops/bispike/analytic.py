"""Elastic bi-spike with an analytic backward: one byte of flags per element and step, no autograd graph over T.

Comparisons give 1 and 0 in the membrane's dtype: on a CPU, eager code writes and reads bool several times slower.
"""

import torch
from torch import Tensor

from snlp_zoo.ops.bispike.reference import ALPHA_FLOOR, Reset
from snlp_zoo.ops.chunks import as_rows, by_chunks

_INSIDE = 4  # a flag is q, plus 4 where the gradient passes: |m| <= alpha; NaN converts to 0: neither silent nor inside


def _carry(flag: Tensor, alpha: Tensor, beta: float, reset: Reset) -> Tensor:
    """dv/dm of one step, possibly in the flag's memory."""
    if reset == "symmetric":  # only the flag of a silent neuron is 0 + 4
        return flag.eq_(_INSIDE).mul_(beta)
    q = flag.sub_(torch.ge(flag, _INSIDE - 1, out=torch.empty_like(flag)), alpha=_INSIDE)
    return (alpha - alpha.clamp_min(ALPHA_FLOOR) * q).mul_(beta)


def _forward(current, v, spikes, flags, v_out, magnitude, alpha, beta, reset) -> None:
    """magnitude gets the sums of |m| / alpha over rows."""
    for t, x in enumerate(current):
        floored = alpha[t].clamp_min(ALPHA_FLOOR)
        m = x if v is None else v + x
        ratio = m / floored
        q = ratio.round().clamp_(-1, 1)
        torch.mul(q, floored, out=spikes[t])
        ratio.abs_()
        if magnitude is not None:
            magnitude[t] = ratio.sum(-1, keepdim=True)
        flag = q.add_(ratio.le_(1), alpha=_INSIDE)
        flags[t] = flag
        if v_out is not None or t + 1 < len(current):
            v = _carry(flag, alpha[t], beta, reset).mul_(m)
    if v_out is not None:
        v_out.copy_(v)


def _backward(flags, grad_spikes, grad, grad_current, grad_v_init, alpha, beta, reset) -> None:
    for t in reversed(range(len(flags))):
        flag = flags[t].to(alpha.dtype)
        inside = torch.ge(flag, _INSIDE - 1, out=torch.empty_like(flag))
        grad_m = torch.mul(grad_spikes[t], inside, out=grad_current[t])
        if grad is not None:
            grad_m.addcmul_(grad, _carry(flag, alpha[t], beta, reset))
        grad = grad_m
    if grad_v_init is not None:
        grad_v_init.copy_(grad)


def _backward_alpha(current, v, grad_spikes, grad_alpha, alpha, beta, reset) -> None:
    """Learned step sizes (LSQ), summed over rows: q - m / alpha inside the window, q outside."""
    for t, x in enumerate(current):
        m = x if v is None else v + x
        ratio = m / alpha[t].clamp_min(ALPHA_FLOOR)
        clipped = ratio.clamp(-1, 1)
        q, inside = clipped.round(), ratio.abs_().le_(1)
        slope = torch.addcmul(q, clipped, inside, value=-1)
        grad_alpha[t] = slope.mul_(grad_spikes[t]).sum(-1, keepdim=True)
        v = _carry(q.add_(inside, alpha=_INSIDE), alpha[t], beta, reset).mul_(m)


class _BiSpike(torch.autograd.Function):
    """Saves flags; `current` and `v_init` are kept only where alpha wants a gradient, which needs m itself."""

    @staticmethod
    def forward(ctx, current, v_init, alpha, beta, reset, weight, carry_out):
        step = current.shape[1:]
        spikes = torch.empty(current.shape, dtype=current.dtype, device=current.device)
        flags = torch.empty(current.shape, dtype=torch.int8, device=current.device)
        v = alpha.new_empty(step) if carry_out else None
        magnitude = None if weight is None else alpha.new_empty(len(current), step[:-1].numel(), 1)
        inputs, outputs = as_rows(step, current, v_init), as_rows(step, spikes, flags, v)
        by_chunks(_forward, alpha.dtype, inputs, [*outputs, magnitude], alpha, beta, reset)
        total = torch.zeros_like(alpha)
        if magnitude is not None:
            counted = magnitude.squeeze(-1).to(weight.dtype).where(weight != 0, 0)  # padding may hold anything
            total = counted.sum(1) * alpha.clamp_min(ALPHA_FLOOR)
        ctx.save_for_backward(flags, alpha, *((current, v_init) if ctx.needs_input_grad[2] else ()))
        ctx.beta, ctx.reset, ctx.dtype, ctx.carry_out = beta, reset, current.dtype, carry_out
        ctx.mark_non_differentiable(total)
        return spikes, v if carry_out else alpha.new_empty(0), total

    @staticmethod
    def backward(ctx, grad_spikes, grad_v, _):
        flags, alpha, *inputs = ctx.saved_tensors
        step, options = flags.shape[1:], (alpha, ctx.beta, ctx.reset)
        grad_current = torch.empty(flags.shape, dtype=ctx.dtype, device=flags.device)
        grad_v_init = alpha.new_empty(step) if ctx.needs_input_grad[1] else None
        given = as_rows(step, flags, grad_spikes, grad_v if ctx.carry_out else None)
        by_chunks(_backward, alpha.dtype, given, as_rows(step, grad_current, grad_v_init), *options)
        grad_alpha = None
        if inputs:
            per_row = alpha.new_empty(len(alpha), step[:-1].numel(), 1)
            by_chunks(_backward_alpha, alpha.dtype, as_rows(step, *inputs, grad_spikes), [per_row], *options)
            grad_alpha = per_row.sum((1, 2)) * (alpha >= ALPHA_FLOOR)
        return grad_current, grad_v_init, grad_alpha, None, None, None, None


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
    weight = None
    if measured:  # in float64: the sum, and with it alpha, must not depend on how a batch is split over processes
        wide = torch.float32 if current.device.type == "mps" else torch.float64
        weight = (torch.ones(1, device=current.device) if mask is None else mask.flatten()).to(wide)
    return _BiSpike.apply(current, v_init, alpha, beta, reset, weight, carry_out)
