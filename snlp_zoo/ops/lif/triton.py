"""LIF in Triton: all T steps in one launch, the membrane in registers; the backward recomputes it from the input.

Steps go in groups of K, whose loads are issued together: with few elements and many steps, waiting for memory is all
the time there is. The backward walks over the groups from the last to the first, each forward once (membranes) and
then back (gradients); K divides `GROUP`, the distance of the saved starts.
"""

# mypy: ignore-errors
# (what Triton compiles is Python by its syntax, not by its types)

import triton
import triton.language as tl
from torch import Tensor

from snlp_zoo.ops.lif.kernel import GROUP


@triton.jit
def _charge(x, v, leak, rest, DECAY_INPUT: tl.constexpr):
    return v + (x - (v - rest)) * leak if DECAY_INPUT else v + (0.0 - (v - rest)) * leak + x


@triton.jit
def _reset(h, s, v_threshold, v_reset, SOFT: tl.constexpr):
    return h - s * v_threshold if SOFT else (1 - s) * h + s * v_reset


@triton.jit
def derivative(z, alpha, NAME: tl.constexpr):
    """ds/dz of `surrogates.Surrogate`, by the same names."""
    if NAME == "atan":
        scaled = 1.5707963267948966 * alpha * z
        slope = (alpha / 2) / (1 + scaled * scaled)
    elif NAME == "sigmoid":
        s = tl.sigmoid(alpha * z)
        slope = alpha * s * (1 - s)
    elif NAME == "triangular":
        slope = alpha - alpha * alpha * tl.abs(z)
        slope = tl.where(slope < 0, 0.0, slope)
    elif NAME == "fast_sigmoid":
        scaled = 1 + alpha * tl.abs(z)
        slope = 1 / (scaled * scaled)
    elif NAME == "rect":
        slope = tl.where(tl.abs(alpha * z) <= 0.5, alpha, 0.0)
    else:
        tl.static_assert(NAME == "ste")
        slope = tl.zeros_like(z) + alpha
    return slope


@triton.jit(do_not_specialize=["T"])
def _forward(
    x_ptr, v_ptr, leak_ptr, s_ptr, v_out_ptr, starts_ptr,
    T, size, x_stride, leak_size, leak_value, v_threshold, v_reset, rest,
    TENSOR_LEAK: tl.constexpr, SOFT: tl.constexpr, DECAY_INPUT: tl.constexpr, CARRY_IN: tl.constexpr,
    CARRY_OUT: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    zero = tl.zeros([], tl.int64)  # what is added to it counts in 64 bits
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = element < size
    leak = tl.load(leak_ptr + element % leak_size) if TENSOR_LEAK else leak_value
    v = tl.load(v_ptr + element, mask=here, other=0.0) if CARRY_IN else tl.zeros([BLOCK], tl.float32) + rest
    for start in range(0, T, K):
        if (start % GROUP == 0) & (start > 0):
            tl.store(starts_ptr + (zero + start // GROUP - 1) * size + element, v, mask=here)
        steps = ()
        for k in tl.static_range(K):
            t = zero + start + k
            steps += (tl.load(x_ptr + t * x_stride + element, mask=here & (t < T), other=0.0),)
        for k in tl.static_range(K):
            t = zero + start + k
            h = _charge(steps[k].to(tl.float32), v, leak, rest, DECAY_INPUT)
            s = (h >= v_threshold).to(tl.float32)
            v = tl.where(t < T, _reset(h, s, v_threshold, v_reset, SOFT), v)
            tl.store(s_ptr + t * size + element, s.to(s_ptr.dtype.element_ty), mask=here & (t < T))
    if CARRY_OUT:
        tl.store(v_out_ptr + element, v, mask=here)


@triton.jit(do_not_specialize=["T"])
def _backward(
    grad_s_ptr, grad_v_ptr, x_ptr, v_ptr, starts_ptr, leak_ptr, grad_x_ptr, grad_v_init_ptr, grad_leak_ptr,
    T, size, grad_s_stride, x_stride, leak_size, leak_value, v_threshold, v_reset, rest, alpha,
    TENSOR_LEAK: tl.constexpr, SOFT: tl.constexpr, DECAY_INPUT: tl.constexpr, DETACH: tl.constexpr,
    SURROGATE: tl.constexpr, CARRY_IN: tl.constexpr, CARRY_OUT: tl.constexpr, LEARNED: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    zero = tl.zeros([], tl.int64)  # what is added to it counts in 64 bits
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = element < size
    leak = tl.load(leak_ptr + element % leak_size) if TENSOR_LEAK else leak_value
    grad_leak = tl.zeros([BLOCK], tl.float32)
    grad_v = tl.load(grad_v_ptr + element, mask=here, other=0.0) if CARRY_OUT else tl.zeros([BLOCK], tl.float32)
    groups = tl.cdiv(T, K)
    for i in range(0, groups):
        group = zero + (groups - 1 - i)
        v = tl.load(starts_ptr + (group - 1) * size + element, mask=here & (group > 0), other=0.0)
        first = tl.load(v_ptr + element, mask=here & (group == 0), other=0.0) if CARRY_IN else rest
        v = tl.where(group > 0, v, first)
        steps, grads, before, charged = (), (), (), ()
        for k in tl.static_range(K):
            t = group * K + k
            now = here & (t < T)
            steps += (tl.load(x_ptr + t * x_stride + element, mask=now, other=0.0),)
            grads += (tl.load(grad_s_ptr + t * grad_s_stride + element, mask=now, other=0.0),)
        for k in tl.static_range(K):
            h = _charge(steps[k].to(tl.float32), v, leak, rest, DECAY_INPUT)
            before, charged = before + (v,), charged + (h,)  # noqa: RUF005  (Triton does not unpack tuples)
            v = _reset(h, (h >= v_threshold).to(tl.float32), v_threshold, v_reset, SOFT)
        for j in tl.static_range(K):
            t = group * K + (K - 1 - j)
            h = charged[K - 1 - j]
            grad_s = grads[K - 1 - j].to(tl.float32)
            if not DETACH:
                grad_s += grad_v * (-v_threshold if SOFT else v_reset - h)
            through = grad_v if SOFT else grad_v * (1 - (h >= v_threshold).to(tl.float32))
            grad_h = through + derivative(h - v_threshold, alpha, SURROGATE) * grad_s
            grad_x = grad_h * leak if DECAY_INPUT else grad_h
            tl.store(grad_x_ptr + t * size + element, grad_x.to(grad_x_ptr.dtype.element_ty), mask=here & (t < T))
            if LEARNED:
                drive = steps[K - 1 - j].to(tl.float32) if DECAY_INPUT else 0.0
                grad_leak += tl.where(t < T, grad_h * (drive - (before[K - 1 - j] - rest)), 0.0)
            grad_v = tl.where(t < T, grad_h * (1 - leak), grad_v)
    if CARRY_IN:
        tl.store(grad_v_init_ptr + element, grad_v, mask=here)
    if LEARNED:
        tl.store(grad_leak_ptr + element, grad_leak, mask=here)


def _options(size: int, steps: int) -> dict:
    """Launch options: wide loads for large inputs, one element per thread for small; no fused multiply-add."""
    group = min(triton.next_power_of_2(steps), GROUP)
    block = 32 if size < 2**17 else max(256, 4096 // group)
    return {"K": group, "BLOCK": block, "num_warps": 1 if block == 32 else 4, "enable_fp_fusion": False}


def forward(
    current: Tensor, v_init: Tensor | None, leak: Tensor | None, leak_value: float, v_threshold: float,
    v_reset: float | None, decay_input: bool, spikes: Tensor, v: Tensor | None, starts: Tensor,
) -> None:  # fmt: skip
    """Fill spikes [T, ...], v [...] (None is left out) and the membrane at the start of each later group."""
    size = current[0].numel()
    options = _options(size, len(current))
    _forward[(triton.cdiv(size, options["BLOCK"]),)](
        current, v_init, leak, spikes, v, starts,
        len(current), size, current.stride(0), 1 if leak is None else leak.numel(), leak_value,
        v_threshold, v_reset or 0.0, v_reset or 0.0,
        TENSOR_LEAK=leak is not None, SOFT=v_reset is None, DECAY_INPUT=decay_input,
        CARRY_IN=v_init is not None, CARRY_OUT=v is not None, GROUP=GROUP, **options,
    )  # fmt: skip


def backward(
    grad_spikes: Tensor, grad_v: Tensor | None, current: Tensor, v_init: Tensor | None, starts: Tensor,
    leak: Tensor | None, leak_value: float, v_threshold: float, v_reset: float | None, decay_input: bool,
    detach_reset: bool, surrogate: str, steepness: float,
    grad_current: Tensor, grad_v_init: Tensor | None, grad_leak: Tensor | None,
) -> None:  # fmt: skip
    """Fill grad_current [T, ...], grad_v_init [...] and grad_leak [...] (per element, None is left out)."""
    size = current[0].numel()
    options = _options(size, len(current))
    _backward[(triton.cdiv(size, options["BLOCK"]),)](
        grad_spikes, grad_v, current, v_init, starts, leak, grad_current, grad_v_init, grad_leak,
        len(current), size, grad_spikes.stride(0), current.stride(0), 1 if leak is None else leak.numel(), leak_value,
        v_threshold, v_reset or 0.0, v_reset or 0.0, steepness,
        TENSOR_LEAK=leak is not None, SOFT=v_reset is None, DECAY_INPUT=decay_input, DETACH=detach_reset,
        SURROGATE=surrogate, CARRY_IN=grad_v_init is not None, CARRY_OUT=grad_v is not None,
        LEARNED=grad_leak is not None, **options,
    )  # fmt: skip
