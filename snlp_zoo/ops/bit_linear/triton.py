"""Unpacking for one call in Triton: a program turns a block of bytes into weights."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _unpack(
    codes_ptr, scale_ptr, out_ptr, size, row_bytes, in_features,
    WIDTH: tl.constexpr, WHOLE: tl.constexpr, FLOAT8: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    per_byte: tl.constexpr = 8 // WIDTH
    byte, field = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None], tl.arange(0, per_byte)[None, :]
    here = byte < size
    code = (tl.load(codes_ptr + byte, mask=here, other=0).to(tl.int32) >> (WIDTH * field)) & (2 * WIDTH - 1)
    sign = 2 * code - 1 if WIDTH == 1 else (code & 1) - (code & 2)
    if WHOLE:  # rows fill their bytes: weights lie as the bytes do
        element = byte * per_byte + field
    else:
        column = (byte % row_bytes) * per_byte + field
        here = here & (column < in_features)
        element = (byte // row_bytes) * in_features + column
    if FLOAT8:  # the bits of 1 and -1, so that no conversion is asked of older devices
        value = tl.where(sign == 0, 0, tl.where(sign > 0, 0x38, 0xB8))
    elif SCALED:
        value = sign.to(tl.float32) * tl.load(scale_ptr).to(tl.float32)
    else:
        value = sign
    tl.store(out_ptr + element, value.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _scales(amplitude_ptr, scale_ptr, out_ptr, columns, per_step, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.maximum(i - columns, 0)
    amplitude = tl.load(amplitude_ptr + row // per_step, mask=i < size, other=0.0).to(tl.float32)
    value = tl.where(i < columns, tl.load(scale_ptr).to(tl.float32), amplitude)
    tl.store(out_ptr + i, value, mask=i < size)


def unpack(codes: Tensor, scale: Tensor | None, width: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Wq, times the scale if there is one, [out_features, in_features]."""
    out = torch.empty(len(codes), in_features, dtype=dtype, device=codes.device)
    float8, whole = dtype == torch.float8_e4m3fn, in_features % (8 // width) == 0
    written = out.view(torch.uint8) if float8 else out
    grid = (triton.cdiv(codes.numel(), 1024),)
    _unpack[grid](
        codes, scale, written, codes.numel(), codes.shape[1], in_features,
        WIDTH=width, WHOLE=whole, FLOAT8=float8, SCALED=scale is not None, BLOCK=1024,
    )  # fmt: skip
    return out


def scales(amplitude: Tensor, scale: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """amplitude [T] for every row, [rows, 1], and the scale for every column, [1, columns], in one launch."""
    size = columns + rows
    out = torch.empty(size, dtype=torch.float32, device=scale.device)
    _scales[(triton.cdiv(size, 1024),)](amplitude, scale, out, columns, rows // len(amplitude), size, BLOCK=1024)
    return out[columns:].view(rows, 1), out[:columns].view(1, columns)
