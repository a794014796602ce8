"""Weights in eight bits, and their product with spike counts in integers."""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from snlp_zoo.ops.backend import resolve
from snlp_zoo.ops.int8_linear.reference import int8_linear_reference

__all__ = ["int8_linear", "int8_linear_reference", "quantise_int8"]
INPUTS = 2**17 - 1  # sums of so many products of -128 fit into int32


@torch.no_grad()
def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers Wq and a scale for every output, so that W is about scale * Wq.

        scale = max|row| / 127;  Wq = round(row / scale)

    Args:
        weight: W, [M, K], float.
    Returns:
        Wq int8 [M, K] in -127..127, scale float32 [M]; of a row of zeros 0 and 1.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = (wide.abs().amax(1, keepdim=True) / 127).float()
    scale.masked_fill_(scale == 0, 1)  # zeros, or numbers too small to be told from them
    return (wide / scale).round_().clamp_(-127, 127).to(torch.int8), scale.squeeze(1)


def int8_linear(
    counts: Tensor,
    weight: Tensor,
    threshold: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    """y = threshold * weight_scale * (Wq n) + b, with the sums Wq n in integers. Nothing here carries a gradient.

    Args:
        counts: n, int8 [..., K]; K is 1 to 131,071, so that no sum leaves int32.
        weight, weight_scale: as from `quantise_int8`: int8 [M, K] and float32 [M].
        threshold: float32 [..., 1], one for each token, as from `ops.counts`.
        bias: [M] or None.
        dtype: of the output: float32, bfloat16, float16, or float64, in which nothing but the last step rounds.
        backend: "auto", "torch" or "triton"; under torch.compile always plain operations.
    Returns:
        [..., M] in dtype; scaled in float32 or float64 and rounded once.
    Raises:
        ValueError: dtypes or shapes that do not fit.
        BackendError: the named backend cannot run here.
    """
    _check(counts, weight, threshold, weight_scale, bias, dtype)
    shape = (*counts.shape[:-1], weight.shape[0])
    if counts.ndim != 2:
        counts, threshold = counts.reshape(-1, counts.shape[-1]), threshold.reshape(-1, 1)
    bias = bias.detach() if bias is not None and bias.requires_grad else bias
    kernel = None if torch.compiler.is_compiling() else _kernel(backend, counts.device, dtype)
    chosen = int8_linear_reference if kernel is None else kernel.int8_linear
    return chosen(counts, weight, threshold, weight_scale, bias, dtype).view(shape)


@cache  # a decoder asks some hundred times for every token
def _kernel(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The Triton kernel's module where `backend` means it for an output of this dtype."""
    if resolve(backend, torch.empty(0, device=device, dtype=dtype), op="int8_linear") == "torch":
        return None
    return import_module("snlp_zoo.ops.int8_linear.triton")


def _check(counts, weight, threshold, weight_scale, bias, dtype) -> None:
    if counts.dtype != torch.int8 or weight.dtype != torch.int8:
        raise ValueError(f"int8_linear: counts and weight must be int8, got {counts.dtype} and {weight.dtype}")
    outputs, inputs = weight.shape
    if counts.shape[-1] != inputs:
        raise ValueError(f"int8_linear: counts have {counts.shape[-1]} channels, the weight takes {inputs}")
    if not 1 <= inputs <= INPUTS:
        raise ValueError(f"int8_linear: the weight must take 1 to {INPUTS} inputs, got {inputs}")
    if threshold.shape != (*counts.shape[:-1], 1):
        raise ValueError(
            f"int8_linear: threshold must be {(*counts.shape[:-1], 1)}, one per token, got {tuple(threshold.shape)}"
        )
    if weight_scale.shape != (outputs,) or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(
            f"int8_linear: weight_scale and bias must be ({outputs},), one per output, "
            f"got {tuple(weight_scale.shape)} and {None if bias is None else tuple(bias.shape)}"
        )
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise ValueError(f"int8_linear: dtype must be float32, float64, bfloat16 or float16, got {dtype}")
