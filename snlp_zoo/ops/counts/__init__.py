"""Spike counts of real numbers, one token at a time: how often a neuron with an adaptive threshold fires."""

from functools import cache
from importlib import import_module
from math import isfinite
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from snlp_zoo.ops.backend import resolve
from snlp_zoo.ops.counts.reference import V_MAX, V_MIN, counts_reference

__all__ = ["V_MAX", "V_MIN", "Counts", "counts", "counts_reference"]


class Counts(NamedTuple):
    counts: Tensor
    threshold: Tensor


def counts(
    x: Tensor,
    threshold_scale: float,
    *,
    max_count: int | None = None,
    dtype: torch.dtype | None = None,
    scaled: bool = False,
    backend: str = "auto",
) -> Counts:
    """Signed counts n and a threshold V for every token, so that x is about V * n.

        V = clip(mean_c |x| / k, 1e-5, 1e4);  n = round(x / V), ties to even, clipped to -max_count..max_count

    V and x / V are computed in float32, in float64 for a float64 x. Nothing here carries a gradient.

    Args:
        x: [..., C], float, one token for each index of the leading axes.
        threshold_scale: k > 0; counts are k on average, in magnitude.
        max_count: largest magnitude of a count, a whole number >= 1; None leaves them unclipped.
        dtype: of the counts: a float (bfloat16 holds whole numbers to 256 exactly, float16 to 2,048) or int8, which
            needs max_count <= 127; None for x's.
        scaled: give V * n, rounded once to dtype, in place of n: what a product in half precision takes.
        backend: "auto", "torch" or "triton"; under torch.compile always plain operations, which it fuses.
    Returns:
        Counts(counts [..., C] in dtype, threshold V [..., 1] in float32 or float64). A token of zeros has counts 0.
        NaN and infinity stay visible in float counts: one NaN makes its token's counts and V NaN; an infinity makes
        V 1e4 and its own count infinite or max_count. What int8 makes of NaN is undefined, its V still is NaN.
    Raises:
        ValueError: no channels, x of another dtype, or what k, max_count or dtype may not be.
        BackendError: the named backend cannot run here.
    Source: Pan et al. 2025, SpikingBrain (arXiv:2509.05276), k = 3.
    """
    dtype = _check(x, threshold_scale, max_count, dtype)
    if scaled and dtype == torch.int8:
        raise ValueError("counts: int8 holds whole numbers; leave scaled out, or name a float dtype")
    x = x.detach() if x.requires_grad else x
    kernel = None if torch.compiler.is_compiling() else _kernel(backend, x.device, x.dtype)
    chosen = counts_reference if kernel is None else kernel.counts
    return Counts(*chosen(x, threshold_scale, max_count, dtype, scaled))


@cache  # a decoder asks some hundred times for every token
def _kernel(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The Triton kernel's module where `backend` means it for such tensors."""
    if resolve(backend, torch.empty(0, device=device, dtype=dtype), op="counts") == "torch":
        return None
    return import_module("snlp_zoo.ops.counts.triton")


def _check(x: Tensor, threshold_scale: float, max_count: int | None, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the counts, or a ValueError."""
    if not x.is_floating_point() or x.element_size() == 1:
        raise ValueError(f"counts: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"counts: x needs at least one channel on its last axis, got shape {tuple(x.shape)}")
    if not (threshold_scale > 0 and isfinite(threshold_scale)):
        raise ValueError(f"counts: threshold_scale must be positive and finite, got {threshold_scale}; 3 is usual")
    if max_count is not None and not (max_count >= 1 and float(max_count).is_integer()):
        raise ValueError(f"counts: max_count must be a whole number from 1, or None for no limit, got {max_count}")
    if dtype is None or dtype == x.dtype:
        return x.dtype
    if dtype == torch.int8 and (max_count is None or max_count > 127):
        raise ValueError(f"counts: int8 holds counts to 127, got max_count {max_count}; pass max_count=127 or less")
    if dtype != torch.int8 and not (dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(f"counts: counts are int8, bfloat16, float16, float32 or float64, got {dtype}")
    return dtype
