"""Spike counts of an adaptive threshold, in PyTorch operations: the specification, and what runs on a CPU."""

import torch
from torch import Tensor

V_MIN, V_MAX = 1e-5, 1e4


def counts_reference(
    x: Tensor, threshold_scale: float, max_count: int | None, dtype: torch.dtype, scaled: bool
) -> tuple[Tensor, Tensor]:
    """Counts, or V times counts if scaled, [..., C] in `dtype`, and V [..., 1]; arguments as in the package's `counts`,
    and already checked.

    V = clip(sum |x| / (C k), 1e-5, 1e4);  n = clip(round(x / V), -max_count, max_count)
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = wide.abs()
    threshold = n.sum(-1, keepdim=True).div_(x.shape[-1] * threshold_scale).clamp_(V_MIN, V_MAX)
    torch.div(wide, threshold, out=n).round_()  # into memory that is at hand: new pages cost more than the division
    if max_count is not None:
        n.clamp_(-max_count, max_count)
    if scaled:
        n.mul_(threshold)
    return n.to(dtype), threshold
