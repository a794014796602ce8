"""Weights of one and 1.58 bits: what a latent float matrix becomes."""

import torch
from torch import Tensor

WEIGHT_BITS = (1.58, 1)
_EPS = 1e-5  # inside the rounding only, never in the scale


def check_bits(bits: float) -> None:
    """Raises ValueError unless bits is 1.58 or 1."""
    if bits not in WEIGHT_BITS:
        raise ValueError(f"low-bit weights have 1.58 or 1 bits, got {bits}")


@torch.no_grad()
def quantise(weight: Tensor, bits: float, *, centred_scale: bool = False) -> tuple[Tensor, Tensor]:
    """Signs Wq and one scale for the whole matrix, so that W is about scale * Wq.

        1.58 bit:  gamma = mean|W|;  Wq = clip(round(W / (gamma + eps)), -1, 1);  scale = gamma
        1 bit:     mu = mean W;      Wq = 1 where W > mu, else -1;                scale = mean|W|

    Args:
        weight: W, [out_features, in_features]; means are taken in float32 or wider.
        bits: 1.58 or 1.
        centred_scale: 1 bit only: mean|W - mu| in place of mean|W|.
    Returns:
        Wq in {-1, 0, 1} or {-1, 1}, shape and dtype of W; scale, float32 (float64 for a float64 W) without axes.
    Raises:
        ValueError: unknown bits.
    Source: Wang et al. 2023 (arXiv:2310.11453), Ma et al. 2024 (arXiv:2402.17764); as used for spiking models by
        Bal et al. 2024 (arXiv:2405.02543).
    """
    check_bits(bits)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = wide.abs().mean()
    if bits == 1.58:
        return (wide / (scale + _EPS)).round_().clamp_(-1, 1).to(weight.dtype), scale
    centred = wide - wide.mean()
    signs = (centred > 0).to(weight.dtype).mul_(2).sub_(1)
    return signs, centred.abs_().mean() if centred_scale else scale


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bits, centred_scale):
        signs, scale = quantise(weight, bits, centred_scale=centred_scale)
        return signs.mul_(scale)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def straight_through(weight: Tensor, bits: float, *, centred_scale: bool = False) -> Tensor:
    """scale * Wq of `quantise` in W's dtype; its gradient is W's, with scale and mean taken as constants."""
    return _StraightThrough.apply(weight, bits, centred_scale)
