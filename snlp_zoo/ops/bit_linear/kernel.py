"""The product with packed weights as one operator, `snlp_zoo::bit_linear`: opaque to torch.compile and autocast.

CPU: weights are unpacked by table lookup, a tile of outputs at a time, so that the float matrix never exists; signs in
int8 are summed by the processor's own integer instructions. CUDA: the layer's weights are unpacked for the call, to FP8
where the signs came in FP8 (the tensor cores' sums of them are exact), else to the dtype of x.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from snlp_zoo.ops.bit_linear.reference import unpack_reference, width

FLOAT8 = torch.float8_e4m3fn
_TILE = 2**18  # weights unpacked at a time on a CPU: as int8 they and what they become stay in the second-level cache


def _words(bits: float) -> Tensor:
    """For every byte the int8 signs it holds, seen as one integer."""
    signs = unpack_reference(torch.arange(256, dtype=torch.uint8).view(-1, 1), bits, 8 // width(bits))
    return signs.contiguous().view(torch.int32 if width(bits) == 2 else torch.int64).flatten()


_WORDS = {1: _words(1), 2: _words(1.58)}


def _unpack_cpu(codes: Tensor, bits: float, in_features: int) -> Tensor:
    words = torch.index_select(_WORDS[width(bits)], 0, codes.flatten().int())
    return words.view(torch.int8).view(len(codes), -1)[:, :in_features]


def _cpu(x: Tensor, codes: Tensor, factor: Tensor, bias: Tensor | None, bits: float, dtype: torch.dtype) -> Tensor:
    """x [M, in_features], factor [M, 1] or without axes -> [M, out_features]."""
    out = torch.empty(len(x), len(codes), dtype=dtype)
    step = max(_TILE // x.shape[1], 1)
    for first in range(0, len(codes), step):
        signs = _unpack_cpu(codes[first : first + step], bits, x.shape[1])
        sums = torch._int_mm(x, signs.mT) if x.dtype == torch.int8 else x @ signs.to(x.dtype).mT
        torch.mul(sums, factor, out=out[:, first : first + step])
    return out if bias is None else out.add_(bias)


def _unpack_cuda(codes: Tensor, scale: Tensor | None, bits: float, like: Tensor, backend: str) -> Tensor:
    """Wq, times the scale if there is one, in the dtype of `like` [M, in_features]."""
    if backend == "triton":
        from snlp_zoo.ops.bit_linear import triton

        return triton.unpack(codes, scale, width(bits), like.shape[1], like.dtype)
    signs = unpack_reference(codes, bits, like.shape[1]).to(like.dtype)
    return signs if scale is None else signs.mul_(scale)


def _scales(amplitude: Tensor, scale: Tensor, rows: int, columns: int, backend: str) -> tuple[Tensor, Tensor]:
    """The amplitude of every row, [rows, 1], and the scale of every column, [1, columns], in float32."""
    if backend == "triton":
        from snlp_zoo.ops.bit_linear import triton

        return triton.scales(amplitude, scale, rows, columns)
    return _per_row(amplitude, rows).float(), scale.float().expand(1, columns).contiguous()


def _per_row(amplitude: Tensor, rows: int) -> Tensor:
    return amplitude.view(-1, 1).expand(-1, rows // len(amplitude)).reshape(rows, 1)


def _cuda(x, codes, amplitude, scale, bias, bits, dtype, backend) -> Tensor:
    """x [M, in_features] -> [M, out_features]."""
    if amplitude is None:
        weight = _unpack_cuda(codes, scale, bits, x, backend)
        return linear(x, weight, None if bias is None else bias.to(x.dtype)).to(dtype)
    return sign_product(x, _unpack_cuda(codes, None, bits, x, backend), amplitude, scale, bias, dtype, backend)


def sign_product(x, weight, amplitude, scale, bias, dtype, backend) -> Tensor:
    """amplitude[t] * scale * (weight x) + bias on CUDA for signs x [M, in_features] and weight, both FP8 or float."""
    if x.dtype == FLOAT8 and dtype == torch.bfloat16:  # amplitude, scale and bias inside the product
        rows, columns = _scales(amplitude, scale, len(x), len(weight), backend)
        bias = None if bias is None else bias.to(dtype)
        return torch._scaled_mm(x, weight.mT, rows, columns, bias, out_dtype=dtype, use_fast_accum=True)
    if x.dtype == FLOAT8:
        one = torch.ones((), device=x.device)
        sums = torch._scaled_mm(x, weight.mT, one, one, out_dtype=torch.float32, use_fast_accum=True)
    else:
        sums = linear(x, weight)
    y = sums * _per_row(amplitude * scale, len(x))
    return (y if bias is None else y.add_(bias)).to(dtype)


@torch.library.custom_op("snlp_zoo::bit_linear", mutates_args=())
def bit_linear(
    x: Tensor,
    codes: Tensor,
    amplitude: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    bits: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """[..., out_features]; arguments as in the package's `bit_linear`, amplitude None for a real x."""
    rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], len(codes))
    if not x.numel():
        return x.new_zeros(shape, dtype=dtype)
    if x.device.type != "cpu" or backend == "triton":
        return _cuda(rows, codes, amplitude, scale, bias, bits, dtype, backend).view(shape)
    factor = scale if amplitude is None else _per_row(amplitude * scale, len(rows))
    return _cpu(rows, codes, factor, bias, bits, dtype).view(shape)


@bit_linear.register_fake
def _(x, codes, amplitude, scale, bias, bits, dtype, backend) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=dtype)


def _refuse(ctx, grad):
    raise RuntimeError("packed weights have no backward pass: train the unpacked model and pack it again")


bit_linear.register_autograd(_refuse)
