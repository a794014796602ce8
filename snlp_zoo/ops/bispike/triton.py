"""Elastic bi-spike in Triton: all T steps in one launch, the membrane in registers, two bits saved per element.

A program owns 4 * LANES elements, as 4 rows of LANES, through all steps; so a byte of flags is one column, and the
loads of a step are wide. Steps go in groups of K, whose loads are issued together: with few elements and many steps,
waiting for memory is all the time there is.
"""

# mypy: ignore-errors
# (what Triton compiles is Python by its syntax, not by its types)

import torch
import triton
import triton.language as tl
from torch import Tensor

from snlp_zoo.ops.bispike.kernel import blocks, lanes
from snlp_zoo.ops.bispike.reference import ALPHA_FLOOR


@triton.jit
def _spike(m, alpha, FLOOR: tl.constexpr):
    """q alpha, fired (or NaN), inside. |m| > alpha / 2 is round(m / alpha) != 0 exactly: halving loses nothing."""
    size = tl.where(alpha < FLOOR, FLOOR, alpha)  # not maximum: NaN stays
    up, down = m > size * 0.5, m < size * -0.5
    s = tl.where(m == m, (up.to(tl.float32) - down.to(tl.float32)) * size, m)
    return s, s != 0, tl.abs(m) <= size


@triton.jit(do_not_specialize=["T"])
def _forward(
    x_ptr, v_ptr, alpha_ptr, mask_ptr, s_ptr, v_out_ptr, flags_ptr, partial_ptr,
    T, size, x_stride, width, beta,
    SYMMETRIC: tl.constexpr, CARRY_IN: tl.constexpr, CARRY_OUT: tl.constexpr, MEASURED: tl.constexpr,
    MASKED: tl.constexpr, WHOLE_ROWS: tl.constexpr, SCALED: tl.constexpr, FLOOR: tl.constexpr,
    K: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    block, blocks, zero = tl.program_id(0), tl.num_programs(0), tl.zeros([], tl.int64)
    row, lane = tl.arange(0, 4)[:, None], tl.arange(0, LANES)
    element = block * (4 * LANES) + row * LANES + lane[None, :]
    here = element < size
    byte = flags_ptr + block * LANES + lane
    bytes_per_step = zero + blocks * LANES
    v = tl.load(v_ptr + element, mask=here, other=0.0) if CARRY_IN else tl.zeros([4, LANES], tl.float32)
    counted = here
    if MASKED:  # one look per row where a row lies within one position, else one per element
        position = (block * 4 + row) * LANES // width if WHOLE_ROWS else element // width
        counted &= tl.load(mask_ptr + position, mask=position * width < size, other=0) != 0
    for start in range(0, T, K):
        steps = ()
        for k in tl.static_range(K):
            t = zero + start + k
            steps += (tl.load(x_ptr + t * x_stride + element, mask=here & (t < T), other=0.0),)
        for k in tl.static_range(K):
            t = zero + start + k
            now = t < T
            alpha = tl.load(alpha_ptr + t, mask=now, other=1.0)
            m = v + steps[k].to(tl.float32)
            s, fired, inside = _spike(m, alpha, FLOOR)
            out = s if SCALED else (s > 0).to(tl.float32) - (s < 0).to(tl.float32)
            tl.store(s_ptr + t * size + element, out.to(s_ptr.dtype.element_ty), mask=here & now)
            flags = fired.to(tl.int32) | inside.to(tl.int32) << 1
            tl.store(byte + t * bytes_per_step, tl.sum(flags << (2 * row), 0).to(tl.uint8), mask=now)
            if not SYMMETRIC:
                sign = (s > 0).to(tl.int32) | (s < 0).to(tl.int32) << 1 | (s != s).to(tl.int32) * 3
                tl.store(byte + (T + t) * bytes_per_step, tl.sum(sign << (2 * row), 0).to(tl.uint8), mask=now)
            if MEASURED:
                tl.store(partial_ptr + t * blocks + block, tl.sum(tl.where(counted, tl.abs(m), 0.0)), mask=now)
            carried = m * (tl.where(fired, 0.0, beta) if SYMMETRIC else beta * (alpha - s))
            v = tl.where(now, carried, v)
    if CARRY_OUT:
        tl.store(v_out_ptr + element, v, mask=here)


@triton.jit(do_not_specialize=["T"])
def _backward(
    grad_s_ptr, grad_v_ptr, flags_ptr, alpha_ptr, grad_x_ptr, grad_v_init_ptr,
    T, size, grad_s_stride, beta,
    SYMMETRIC: tl.constexpr, CARRY_IN: tl.constexpr, CARRY_OUT: tl.constexpr,
    FLOOR: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    block, blocks, zero = tl.program_id(0), tl.num_programs(0), tl.zeros([], tl.int64)
    row, lane = tl.arange(0, 4)[:, None], tl.arange(0, LANES)
    element = block * (4 * LANES) + row * LANES + lane[None, :]
    here = element < size
    byte = flags_ptr + block * LANES + lane
    bytes_per_step = zero + blocks * LANES
    grad_m = tl.zeros([4, LANES], tl.float32)
    if CARRY_OUT:
        grad_m = tl.load(grad_v_ptr + element, mask=here, other=0.0)
    for group in range(0, T, K):
        grads, flags, signs = (), (), ()
        for k in tl.static_range(K):
            t = zero + (T - 1 - group - k)
            grads += (tl.load(grad_s_ptr + t * grad_s_stride + element, mask=here & (t >= 0), other=0.0),)
            flags += (tl.load(byte + t * bytes_per_step, mask=t >= 0, other=0),)
            if not SYMMETRIC:
                signs += (tl.load(byte + (T + t) * bytes_per_step, mask=t >= 0, other=0),)
        for k in tl.static_range(K):
            t = zero + (T - 1 - group - k)
            flag = flags[k].to(tl.int32)[None, :] >> (2 * row)
            if SYMMETRIC:
                carry = tl.where((flag & 1) != 0, 0.0, beta)
            else:
                alpha = tl.load(alpha_ptr + t, mask=t >= 0, other=1.0)
                size_t = tl.where(alpha < FLOOR, FLOOR, alpha)
                sign = (signs[k].to(tl.int32)[None, :] >> (2 * row)) & 3
                s = tl.where(sign == 1, size_t, tl.where(sign == 2, -size_t, tl.where(sign == 3, float("nan"), 0.0)))
                carry = beta * (alpha - s)
            inside = ((flag >> 1) & 1).to(tl.float32)
            grad = grads[k].to(tl.float32) * inside + grad_m * carry
            grad_m = tl.where(t >= 0, grad, grad_m)
            tl.store(grad_x_ptr + t * size + element, grad_m.to(grad_x_ptr.dtype.element_ty), mask=here & (t >= 0))
    if CARRY_IN:
        tl.store(grad_v_init_ptr + element, grad_m, mask=here)


@triton.jit(do_not_specialize=["T"])
def _backward_alpha(
    grad_s_ptr, x_ptr, v_ptr, alpha_ptr, partial_ptr,
    T, size, grad_s_stride, x_stride, beta,
    SYMMETRIC: tl.constexpr, CARRY_IN: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, blocks, zero = tl.program_id(0), tl.num_programs(0), tl.zeros([], tl.int64)
    element = block * BLOCK + tl.arange(0, BLOCK)
    here = element < size
    v = tl.load(v_ptr + element, mask=here, other=0.0) if CARRY_IN else tl.zeros([BLOCK], tl.float32)
    for step in range(T):
        t = zero + step
        alpha = tl.load(alpha_ptr + t)
        m = v + tl.load(x_ptr + t * x_stride + element, mask=here, other=0.0).to(tl.float32)
        grad = tl.load(grad_s_ptr + t * grad_s_stride + element, mask=here, other=0.0).to(tl.float32)
        s, fired, inside = _spike(m, alpha, FLOOR)
        size_t = tl.where(alpha < FLOOR, FLOOR, alpha)
        slope = tl.where(inside, (s - m) / size_t, s / size_t)
        # below the floor the amplitude no longer depends on alpha
        tl.store(partial_ptr + t * blocks + block, tl.where(alpha < FLOOR, 0.0, tl.sum(grad * slope)))
        v = m * (tl.where(fired, 0.0, beta) if SYMMETRIC else beta * (alpha - s))


def _options(size: int, steps: int, dtype: torch.dtype) -> dict:
    """Launch options: a thread reads 16 bytes of each row; no fused multiply-add, to equal the reference."""
    large = lanes(size) == 256  # then other blocks have work while one waits, and groups would only cost registers
    return {
        "K": 1 if large else min(triton.next_power_of_2(steps), 16),
        "LANES": lanes(size),
        "num_warps": dtype.itemsize // 2 if large else 1,
        "enable_fp_fusion": False,
    }


def forward(
    current: Tensor, v_init: Tensor | None, alpha: Tensor, mask: Tensor | None, beta: float, reset: str,
    spikes: Tensor, v: Tensor | None, flags: Tensor, partial: Tensor | None,
) -> None:  # fmt: skip
    """Fill spikes [T, ...], v [...], flags and partial [T, blocks] (the blocks' sums of |m|); None is left out."""
    size, width = current[0].numel(), current.shape[-1] if current.ndim > 1 else 1
    _forward[(blocks(size),)](
        current, v_init, alpha, mask, spikes, v, flags, partial,
        len(current), size, current.stride(0), width, beta,
        SYMMETRIC=reset == "symmetric", CARRY_IN=v_init is not None, CARRY_OUT=v is not None,
        MEASURED=partial is not None, MASKED=mask is not None, WHOLE_ROWS=width % lanes(size) == 0,
        SCALED=spikes.element_size() > 1, FLOOR=ALPHA_FLOOR, **_options(size, len(current), current.dtype),
    )  # fmt: skip


def backward(
    grad_spikes: Tensor, grad_v: Tensor | None, flags: Tensor, alpha: Tensor, beta: float,
    grad_current: Tensor, grad_v_init: Tensor | None,
) -> None:  # fmt: skip
    """Fill grad_current [T, ...] and grad_v_init [...]."""
    size = grad_spikes[0].numel()
    _backward[(blocks(size),)](
        grad_spikes, grad_v, flags, alpha, grad_current, grad_v_init,
        len(grad_spikes), size, grad_spikes.stride(0), beta,
        SYMMETRIC=len(flags) == 1, CARRY_IN=grad_v_init is not None, CARRY_OUT=grad_v is not None, FLOOR=ALPHA_FLOOR,
        **_options(size, len(grad_spikes), grad_spikes.dtype),
    )  # fmt: skip


def backward_alpha(
    grad_spikes: Tensor, current: Tensor, v_init: Tensor | None, alpha: Tensor, beta: float, reset: str, partial: Tensor
) -> None:
    """Fill partial [T, blocks]: the blocks' sums of the gradient of alpha."""
    size = current[0].numel()
    _backward_alpha[(blocks(size),)](
        grad_spikes, current, v_init, alpha, partial,
        len(current), size, grad_spikes.stride(0), current.stride(0), beta,
        SYMMETRIC=reset == "symmetric", CARRY_IN=v_init is not None, FLOOR=ALPHA_FLOOR,
        BLOCK=4 * lanes(size), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
