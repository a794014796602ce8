"""Spike counts in Triton: one pass over a token that fits into registers, two over a longer one."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snlp_zoo.ops.backend import INTERPRETED
from snlp_zoo.ops.counts.reference import V_MAX, V_MIN
from snlp_zoo.ops.launch import aligned, launcher

LONGEST = 16_384  # channels of a token in registers
ELEMENTS = 1_536  # of a warp, so that what it does once for all of them costs little


@triton.jit
def _threshold(total, divisor, V_MIN: tl.constexpr, V_MAX: tl.constexpr):
    """NaN passes every comparison by, here and below."""
    v = tl.div_rn(total, divisor)
    v = tl.where(v < V_MIN, V_MIN, v)
    return tl.where(v > V_MAX, V_MAX, v)


@triton.jit
def _divide(x, v, INTERPRETED: tl.constexpr):
    """x / v, correctly rounded. All of a token share v: its reciprocal and fused corrections, with no branch.

    Source: Markstein 1990 (IBM J. Res. Dev. 34, 111): a quotient within a unit in the last place, corrected by its
    exact remainder and a correctly rounded reciprocal, is rounded correctly, unless something underflows: counts of
    such small numbers are 0.
    """
    if INTERPRETED:  # in which nothing is fused
        return tl.div_rn(x, v)
    reciprocal = tl.div_rn(1.0, v)
    first = x * reciprocal
    q = tl.fma(tl.fma(-first, v, x), reciprocal, first)
    q = tl.fma(tl.fma(-q, v, x), reciprocal, q)
    return tl.where(q == q, q, first)  # an infinity has no remainder


@triton.jit
def _encode(x, v, limit, CLIP: tl.constexpr, SCALED: tl.constexpr, INTERPRETED: tl.constexpr, dtype: tl.constexpr):
    """round(x / v), ties to even, in `dtype`, times v if SCALED. A whole limit may be applied before rounding."""
    q = _divide(x, v, INTERPRETED)
    if CLIP:
        q = tl.clamp(q, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    if dtype == tl.int8:  # 1.5 * 2^23 has no place for a fraction: the sum's lowest bits are the whole number
        return (q + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    a = tl.abs(q)
    a = tl.where(a < 8388608.0, (a + 8388608.0) - 8388608.0, a)  # 2^23, likewise; what is larger is whole
    n = tl.where(q < 0, -a, a)
    return (n * v if SCALED else n).to(dtype)


@triton.jit(do_not_specialize=["rows", "limit"])
def _counts(
    x_ptr, n_ptr, v_ptr, rows, channels, divisor, limit,
    V_MIN: tl.constexpr, V_MAX: tl.constexpr, CLIP: tl.constexpr, SCALED: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Channels lie in two tiles, as 576 = 512 + 64: a tile is a power of two, and most of 1024 would be empty."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    wide, rest = tl.arange(0, WIDE)[None, :], WIDE + tl.arange(0, REST)[None, :]
    here, there = row < rows, (row < rows) & (rest < channels)
    x_ptr, n_ptr = x_ptr + row * channels, n_ptr + row * channels
    x = tl.load(x_ptr + wide, mask=here, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + rest, mask=there, other=0.0).to(tl.float32)
    total = tl.sum(tl.abs(x), 1, keep_dims=True) + tl.sum(tl.abs(z), 1, keep_dims=True)
    v = _threshold(total, divisor, V_MIN, V_MAX)
    tl.store(v_ptr + row, v, mask=here)
    tl.store(n_ptr + wide, _encode(x, v, limit, CLIP, SCALED, INTERPRETED, n_ptr.dtype.element_ty), mask=here)
    tl.store(n_ptr + rest, _encode(z, v, limit, CLIP, SCALED, INTERPRETED, n_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["limit"])
def _counts_long(
    x_ptr, n_ptr, v_ptr, channels, divisor, limit,
    V_MIN: tl.constexpr, V_MAX: tl.constexpr, CLIP: tl.constexpr, SCALED: tl.constexpr, INTERPRETED: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, CHANNELS)
    x_ptr, n_ptr = x_ptr + row * channels, n_ptr + row * channels
    total = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, channels, CHANNELS):
        total += tl.abs(tl.load(x_ptr + first + lane, mask=first + lane < channels, other=0.0).to(tl.float32))
    v = _threshold(tl.sum(total, 0), divisor, V_MIN, V_MAX)
    tl.store(v_ptr + row, v)
    for first in range(0, channels, CHANNELS):
        here = first + lane < channels
        x = tl.load(x_ptr + first + lane, mask=here, other=0.0).to(tl.float32)
        tl.store(
            n_ptr + first + lane, _encode(x, v, limit, CLIP, SCALED, INTERPRETED, n_ptr.dtype.element_ty), mask=here
        )


_launch, _launch_long = launcher(_counts), launcher(_counts_long)


class _Cut(NamedTuple):
    """How tokens are cut: a program takes `rows` of them, in tiles of `wide` and `rest` channels."""

    rows: int
    wide: int
    rest: int
    warps: int


@cache
def _cut(channels: int) -> _Cut:
    wide, rows = (1 << size.bit_length() - 1 for size in (channels, max(ELEMENTS // channels, 1)))
    warps = min(triton.next_power_of_2(triton.cdiv(rows * channels, ELEMENTS)), 16)
    return _Cut(rows, wide, triton.next_power_of_2(max(channels - wide, 1)), warps)


def counts(
    x: Tensor, threshold_scale: float, max_count: int | None, dtype: torch.dtype, scaled: bool
) -> tuple[Tensor, Tensor]:
    """Counts, or V times counts if scaled, [..., C] and V [..., 1] of x in any layout."""
    x = aligned(x)
    n, channels = torch.empty_like(x, dtype=dtype), x.shape[-1]
    threshold = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if not (rows := threshold.numel()):
        return n, threshold
    clip = max_count is not None
    key = x.device, x.dtype, dtype, channels, clip, scaled
    sizes = channels, float(channels * threshold_scale), float(max_count or 0), V_MIN, V_MAX, clip, scaled, INTERPRETED
    with torch.cuda.device_of(x):  # of a model on several devices, any may be the current one
        if channels > LONGEST:
            _launch_long(key, rows, (x, n, threshold, *sizes, LONGEST // 4), num_warps=8)
        else:
            take, wide, rest, warps = _cut(channels)
            _launch(key, -(-rows // take), (x, n, threshold, rows, *sizes, take, wide, rest), num_warps=warps)
    return n, threshold
