"""Leaky integrate-and-fire, one step after another: the specification every backend is compared with.

Shapes: T spike-time steps, B batch, N tokens, D width, H heads, E = D/H, L layers, V vocabulary. T is always axis 0.
Names: v membrane potential, s spike, v_threshold, tau, current. Attention values are `value`, never `v`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from snlp_zoo.ops.surrogates import Surrogate


class LIFOutput(NamedTuple):
    spikes: Tensor  # [T, ...] in {0, 1}
    v: Tensor | None  # [...] membrane potential after the last step, reset included


def lif_reference(
    current: Tensor,
    v_init: Tensor,
    *,
    tau: float | Tensor,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    detach_reset: bool,
    surrogate: Surrogate,
) -> LIFOutput:
    """A plain loop over T with autograd through every step.

        h[t] = v[t-1] + (current[t] - (v[t-1] - v_rest)) / tau          with decay_input
        h[t] = v[t-1] - (v[t-1] - v_rest) / tau + current[t]            without
        s[t] = 1 if h[t] >= v_threshold else 0
        v[t] = (1 - s[t]) h[t] + s[t] v_reset   (hard)   or   h[t] - s[t] v_threshold   (soft, v_reset=None)

    v_rest is v_reset, or 0 under soft reset. tau = inf without decay_input is integrate-and-fire.
    Source: Fang et al. 2021 (arXiv:2007.05785); SpikingJelly's LIFNode, IFNode and ParametricLIFNode.
    """
    spikes, _, v = _steps(current, v_init, tau, v_threshold, v_reset, decay_input, detach_reset, surrogate)
    return LIFOutput(torch.stack(spikes), v)


@torch.no_grad()
def lif_membranes(
    current: Tensor,
    v_init: Tensor | None,
    *,
    tau: float | Tensor,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
) -> Tensor:
    """h[t] of `lif_reference`, the membrane of every step before it fires: [T, ...]; v_init None starts at rest."""
    current = current.to(torch.promote_types(current.dtype, torch.float32))
    v_init = torch.full_like(current[0], v_reset or 0.0) if v_init is None else v_init
    return torch.stack(_steps(current, v_init, tau, v_threshold, v_reset, decay_input, True, Surrogate())[1])


def _steps(
    current: Tensor,
    v: Tensor,
    tau: float | Tensor,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    detach_reset: bool,
    surrogate: Surrogate,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """s and h of every step, and the last v."""
    spikes, charged = [], []
    v_rest, leak = 0.0 if v_reset is None else v_reset, 1 / tau
    for current_t in current:
        drive = current_t if decay_input else 0.0
        h = v + (drive - (v - v_rest)) * leak + (0.0 if decay_input else current_t)
        s = surrogate(h - v_threshold)
        fired = s.detach() if detach_reset else s
        v = h - fired * v_threshold if v_reset is None else (1 - fired) * h + fired * v_reset
        spikes.append(s)
        charged.append(h)
    return spikes, charged, v
