"""The product of integer counts with int8 weights, in PyTorch operations: the specification, and what runs on a CPU."""

import torch
from torch import Tensor
from torch.nn.functional import pad

# processors without instructions for int8 sum it in floats: exactly, while sums stay below 2^24
_INTEGERS = torch.backends.mkldnn.is_available() and getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
_FLOAT32_INPUTS = 2**24 // 128**2


def _sums(counts: Tensor, weight: Tensor) -> Tensor:
    """counts [rows, K] times weight [M, K]: whole numbers [rows, M], in int32, or in floats that hold them exactly."""
    (rows, inputs), outputs = counts.shape, len(weight)
    if counts.device.type == "cpu" and not _INTEGERS:
        exact = torch.float32 if inputs <= _FLOAT32_INPUTS else torch.float64
        return counts.to(exact) @ weight.to(exact).mT
    if counts.device.type != "cpu":  # cuBLAS wants more than 16 rows and sizes in eights; zeros add nothing
        counts = pad(counts, (0, -inputs % 8, 0, max(17 - rows, 0)))
        weight = pad(weight, (0, -inputs % 8, 0, -outputs % 8))
    return torch._int_mm(counts.contiguous(), weight.contiguous().mT)[:rows, :outputs]


def int8_linear_reference(
    counts: Tensor, weight: Tensor, threshold: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """counts [rows, K], threshold [rows, 1] -> [rows, M]; arguments as in the package's `int8_linear`."""
    wide = torch.promote_types(dtype, torch.float32)
    if not counts.numel():
        return weight_scale.new_zeros(len(counts), len(weight), dtype=dtype)
    y = _sums(counts, weight).to(wide).mul_(weight_scale).mul_(threshold)
    return (y if bias is None else y.add_(bias)).to(dtype)
