"""The WKV recurrence of RWKV-4, one token after another: the specification every backend is compared with.

Shapes: B batch, N tokens, C channels. Names: w log decay, u bonus of the current token, k key, v value (an attention's
value here, no membrane). The sums are kept divided by exp(maximum): neither overflows, whatever k is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EMPTY = -1e38  # running maximum of a state that holds no token; finite, so that differences of two are no NaN

State = tuple[Tensor, Tensor, Tensor]  # numerator, denominator, running maximum, each [B, C], float32 or float64


class WKVOutput(NamedTuple):
    out: Tensor  # [B, N, C], a convex combination of the values so far
    state: State


def fresh_state(k: Tensor) -> State:
    """The state before the first token, for keys [B, N, C]."""
    zero = k.new_zeros(k.shape[0], k.shape[2], dtype=torch.promote_types(k.dtype, torch.float32))
    return zero, zero.clone(), torch.full_like(zero, EMPTY)


def wkv4_reference(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: State) -> WKVOutput:
    """A plain loop over N with autograd through every step.

        out[t] = (sum[i < t] exp((t - 1 - i) w + k[i]) v[i] + exp(u + k[t]) v[t]) / (the same without v)

    The running maximum scales numerator and denominator alike, so no gradient flows through it.
    Source: Peng et al. 2023 (arXiv:2305.13048), equation 16; used by SpikeGPT, Zhu et al. 2023 (arXiv:2302.13939).
    """
    numerator, denominator, maximum = state
    outs = []
    for k_t, v_t in zip(k.unbind(1), v.unbind(1), strict=True):
        scale = torch.maximum(maximum, u + k_t).detach()
        past, now = torch.exp(maximum - scale), torch.exp(u + k_t - scale)
        outs.append((past * numerator + now * v_t) / (past * denominator + now))
        scale = torch.maximum(maximum + w, k_t).detach()
        past, now = torch.exp(maximum + w - scale), torch.exp(k_t - scale)
        numerator, denominator, maximum = past * numerator + now * v_t, past * denominator + now, scale
    return WKVOutput(torch.stack(outs, 1), (numerator, denominator, maximum))
