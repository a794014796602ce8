"""Elastic bi-spiking neuron, one step after another: the specification every backend is compared with.

Shapes and names as in ops/lif/reference.py; m membrane after charging, q in {-1, 0, 1}, alpha spike amplitude per step.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Reset = Literal["symmetric", "reference"]
ALPHA_FLOOR = 9.999999747378752e-06  # float32 of 1e-5; in the spikes only, the membrane recursion sees alpha as it is


class BiSpikeOutput(NamedTuple):
    spikes: Tensor  # [T, ...] in {-alpha[t], 0, alpha[t]}
    v: Tensor | None  # [...] membrane carried out of the last step: leaked and reset


class _Quantise(torch.autograd.Function):
    """alpha * clip(round(m / alpha), -1, 1). Straight-through inside |m| <= alpha; LSQ gradient for alpha."""

    @staticmethod
    def forward(m, alpha):
        return alpha * (m / alpha).round().clamp(-1, 1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        m, alpha = ctx.saved_tensors
        inside = (m / alpha).abs() <= 1
        q = (m / alpha).round().clamp(-1, 1)
        grad_alpha = (grad * torch.where(inside, q - m / alpha, q)).sum()
        return grad * inside, grad_alpha


def elastic_bispike_reference(
    current: Tensor, v_init: Tensor, alpha: Tensor, *, beta: float, reset: Reset
) -> BiSpikeOutput:
    """A plain loop over T with autograd through every step.

        m[t] = v[t-1] + current[t];    q[t] = clip(round_half_even(m[t] / alpha[t]), -1, 1);    s[t] = alpha[t] q[t]
        v[t] = beta m[t] (1 - |q[t]|)             symmetric: a spike of either sign resets
        v[t] = beta m[t] (alpha[t] - s[t])        reference: the released recursion, where a negative spike doubles v

    Fires where |m| > alpha / 2, strictly. ds/dm = 1 inside |m| <= alpha, else 0; the reset is not differentiated.
    Source: Xing et al. 2024 (arXiv:2406.03287), SpikeLM.
    """
    v, spikes = v_init, []
    for current_t, alpha_t in zip(current, alpha, strict=True):
        m = v + current_t
        s = _Quantise.apply(m, alpha_t.clamp_min(ALPHA_FLOOR))
        carry = beta * ((s == 0).to(m.dtype) if reset == "symmetric" else alpha_t - s)
        v = m * carry.detach()
        spikes.append(s)
    return BiSpikeOutput(torch.stack(spikes), v)
