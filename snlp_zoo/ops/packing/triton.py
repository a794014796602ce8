"""Packed spikes in Triton: one program per block and step; a byte is one column of the block's rows."""

import triton
import triton.language as tl
from torch import Tensor

from snlp_zoo.ops.packing.reference import LANES


@triton.jit
def _pack(s_ptr, codes_ptr, size, s_stride, BITS: tl.constexpr, LANES: tl.constexpr):
    block, t = tl.program_id(0), tl.zeros([], tl.int64) + tl.program_id(1)
    row, lane = tl.arange(0, 8 // BITS)[:, None], tl.arange(0, LANES)
    element = block * (8 // BITS * LANES) + row * LANES + lane[None, :]
    s = tl.load(s_ptr + t * s_stride + element, mask=element < size, other=0.0).to(tl.float32)
    code = (s > 0).to(tl.int32) | (s < 0).to(tl.int32) * (2 * BITS - 1)
    if BITS == 2:
        code |= (s != s).to(tl.int32) << 1  # NaN
    packed = tl.sum(code << (BITS * row), 0).to(tl.uint8)
    tl.store(codes_ptr + (t * tl.num_programs(0) + block) * LANES + lane, packed)


@triton.jit
def _unpack(codes_ptr, amplitude_ptr, s_ptr, size, BITS: tl.constexpr, LANES: tl.constexpr):
    block, t = tl.program_id(0), tl.zeros([], tl.int64) + tl.program_id(1)
    row, lane = tl.arange(0, 8 // BITS)[:, None], tl.arange(0, LANES)
    element = block * (8 // BITS * LANES) + row * LANES + lane[None, :]
    codes = tl.load(codes_ptr + (t * tl.num_programs(0) + block) * LANES + lane).to(tl.int32)
    code = (codes[None, :] >> (BITS * row)) & (2 * BITS - 1)
    amplitude = tl.load(amplitude_ptr + t).to(tl.float32)
    s = tl.where(code == 0, 0.0, tl.where(code == 1, amplitude, -amplitude))
    if BITS == 2:
        s = tl.where(code == 2, float("nan"), s)
    tl.store(s_ptr + t * size + element, s.to(s_ptr.dtype.element_ty), mask=element < size)


def pack(spikes: Tensor, codes: Tensor, bits: int) -> None:
    """Fill codes [T, bytes]."""
    grid = (codes.shape[1] // LANES, len(spikes))
    _pack[grid](spikes, codes, spikes[0].numel(), spikes.stride(0), BITS=bits, LANES=LANES, num_warps=1)


def unpack(codes: Tensor, amplitude: Tensor, spikes: Tensor, bits: int) -> None:
    """Fill spikes [T, ...]."""
    grid = (codes.shape[1] // LANES, len(spikes))
    _unpack[grid](codes, amplitude, spikes, spikes[0].numel(), BITS=bits, LANES=LANES, num_warps=1)
