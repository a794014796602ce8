"""Elastic bi-spike in CUDA C++ through CuPy: all T steps in one launch, the membrane in registers, two bits saved.

A block owns 4 * LANES elements, as 4 rows of LANES, through all steps; a thread owns VEC neighbouring columns, and so
whole bytes of flags. Steps go in groups of K, whose loads are issued together: with few elements and many steps,
waiting for memory is all the time there is.
"""

import cupy
from torch import Tensor

from snlp_zoo.ops.bispike.kernel import blocks, lanes
from snlp_zoo.ops.bispike.reference import ALPHA_FLOOR
from snlp_zoo.ops.cuda import PRELUDE, launch, vector

_COMMON = (
    PRELUDE
    + r"""
// of the spikes; the membrane recursion sees alpha as it is. NaN stays
__device__ float amplitude(float alpha) { return alpha < FLOOR ? FLOOR : alpha; }

// |m| > size / 2 is round(m / size) != 0 exactly: halving loses nothing. NaN of either stays
__device__ float spike(float m, float size) {
    return m > size * 0.5f ? size : m < size * -0.5f ? -size : 0 * size * m;
}

// dv/dm of a step
__device__ float carry(float s, float alpha, float beta) {
    return SYMMETRIC ? (s != 0 ? 0.0f : beta) : beta * (alpha - s);
}

// The block's sum of mine[k], always in the same order, to out[k * stride] for the first `count` of K steps
__device__ void store_sums(const float (&mine)[K], float* out, int64 stride, int64 count) {
    __shared__ float sums[K][THREADS / 32];
#pragma unroll
    for (int k = 0; k < K; k++) {
        float sum = mine[k];
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffff, sum, offset);
        if (threadIdx.x % 32 == 0) sums[k][threadIdx.x / 32] = sum;
    }
    __syncthreads();
    if (threadIdx.x < K && threadIdx.x < count) {
        float sum = 0;
        for (int warp = 0; warp < THREADS / 32; warp++) sum += sums[threadIdx.x][warp];
        out[threadIdx.x * stride] = sum;
    }
    __syncthreads();  // the next group writes sums again
}
"""
)

_FORWARD = (
    _COMMON
    + r"""
extern "C" __global__ void __launch_bounds__(THREADS) forward(
    const CURRENT* __restrict__ x, const float* __restrict__ v_init, const float* __restrict__ alphas,
    const MASK* __restrict__ mask, SPIKES* __restrict__ spikes, float* __restrict__ v_out,
    uint8* __restrict__ flags, float* __restrict__ partial,
    int64 T, int64 size, int64 x_stride, int64 width, float beta) {
    const unsigned first = blockIdx.x * (4 * LANES) + threadIdx.x * VEC;  // element of row 0
    const int64 byte = int64(blockIdx.x) * LANES + threadIdx.x * VEC, bytes = int64(gridDim.x) * LANES;
    bool here[4];
    unsigned counted = 0;  // one bit per element
    float v[4][VEC];
#pragma unroll
    for (int row = 0; row < 4; row++) {
        const unsigned element = first + row * LANES;
        here[row] = element < size;
        Vector<float, VEC> start = {};
        if (CARRY_IN && here[row]) start = load<VEC>(v_init + element);
        bool counts = here[row];
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            v[row][i] = start.at[i];
            if (MASKED && here[row] && (i == 0 || !SHARED)) counts = mask[(element + i) / unsigned(width)] != 0;
            if (counts) counted |= 1u << (row * VEC + i);
        }
    }
    for (int64 group = 0; group < T; group += K) {
        Vector<CURRENT, VEC> steps[K][4];
        float alpha[K], magnitude[K] = {};
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int64 t = group + k < T ? group + k : T - 1;  // past the end the last step again, unused
            alpha[k] = alphas[t];
#pragma unroll
            for (int row = 0; row < 4; row++) {
                steps[k][row] = {};
                if (here[row]) steps[k][row] = load<VEC>(x + t * x_stride + first + row * LANES);
            }
        }
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int64 t = group + k;
            if (t >= T) break;
            const float size_t = amplitude(alpha[k]);
            Vector<uint8, VEC> flag = {}, sign = {};
#pragma unroll
            for (int row = 0; row < 4; row++) {
                Vector<SPIKES, VEC> out;
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    const float m = v[row][i] + float(steps[k][row].at[i]);
                    const float s = spike(m, size_t);
                    v[row][i] = m * carry(s, alpha[k], beta);
                    out.at[i] = SPIKES(SCALED ? s : float(s > 0) - float(s < 0));
                    flag.at[i] |= ((s != 0 ? 1 : 0) | (fabsf(m) <= size_t ? 2 : 0)) << 2 * row;
                    sign.at[i] |= (s > 0 ? 1 : s < 0 ? 2 : s == 0 ? 0 : 3) << 2 * row;
                    if (MEASURED && (counted >> (row * VEC + i) & 1)) magnitude[k] += fabsf(m);
                }
                if (here[row]) store(spikes + t * size + first + row * LANES, out);
            }
            store(flags + t * bytes + byte, flag);
            if (!SYMMETRIC) store(flags + (T + t) * bytes + byte, sign);
        }
        if (MEASURED) store_sums(magnitude, partial + group * gridDim.x + blockIdx.x, gridDim.x, T - group);
    }
#pragma unroll
    for (int row = 0; row < 4; row++) {
        Vector<float, VEC> end;
#pragma unroll
        for (int i = 0; i < VEC; i++) end.at[i] = v[row][i];
        if (CARRY_OUT && here[row]) store(v_out + first + row * LANES, end);
    }
}
"""
)

_BACKWARD = (
    _COMMON
    + r"""
extern "C" __global__ void __launch_bounds__(THREADS) backward(
    const GRAD* __restrict__ grad_spikes, const float* __restrict__ grad_v, const uint8* __restrict__ flags,
    const float* __restrict__ alphas, CURRENT* __restrict__ grad_x, float* __restrict__ grad_v_init,
    int64 T, int64 size, int64 grad_stride, float beta) {
    const unsigned first = blockIdx.x * (4 * LANES) + threadIdx.x * VEC;  // element of row 0
    const int64 byte = int64(blockIdx.x) * LANES + threadIdx.x * VEC, bytes = int64(gridDim.x) * LANES;
    bool here[4];
    float grad_m[4][VEC];
#pragma unroll
    for (int row = 0; row < 4; row++) {
        const unsigned element = first + row * LANES;
        here[row] = element < size;
        Vector<float, VEC> end = {};
        if (CARRY_OUT && here[row]) end = load<VEC>(grad_v + element);
#pragma unroll
        for (int i = 0; i < VEC; i++) grad_m[row][i] = end.at[i];
    }
    for (int64 group = T - 1; group >= 0; group -= K) {
        Vector<GRAD, VEC> grads[K][4];
        Vector<uint8, VEC> flag[K], sign[K];
        float alpha[K];
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int64 t = group > k ? group - k : 0;  // before the start step 0 again, unused
            alpha[k] = alphas[t];
            flag[k] = load<VEC>(flags + t * bytes + byte);
            if (!SYMMETRIC) sign[k] = load<VEC>(flags + (T + t) * bytes + byte);
#pragma unroll
            for (int row = 0; row < 4; row++) {
                grads[k][row] = {};
                if (here[row]) grads[k][row] = load<VEC>(grad_spikes + t * grad_stride + first + row * LANES);
            }
        }
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int64 t = group - k;
            if (t < 0) break;
            const float size_t = amplitude(alpha[k]);
#pragma unroll
            for (int row = 0; row < 4; row++) {
                Vector<CURRENT, VEC> out;
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    const int bits = flag[k].at[i] >> 2 * row;
                    float s = bits & 1;
                    if (!SYMMETRIC) {
                        const int which = sign[k].at[i] >> 2 * row & 3;
                        s = which == 0 ? 0.0f : which == 1 ? size_t : which == 2 ? -size_t : __int_as_float(0x7fffffff);
                    }
                    const float through = grad_m[row][i] * carry(s, alpha[k], beta);
                    grad_m[row][i] = float(grads[k][row].at[i]) * (bits & 2 ? 1.0f : 0.0f) + through;
                    out.at[i] = CURRENT(grad_m[row][i]);
                }
                if (here[row]) store(grad_x + t * size + first + row * LANES, out);
            }
        }
    }
#pragma unroll
    for (int row = 0; row < 4; row++) {
        Vector<float, VEC> start;
#pragma unroll
        for (int i = 0; i < VEC; i++) start.at[i] = grad_m[row][i];
        if (CARRY_IN && here[row]) store(grad_v_init + first + row * LANES, start);
    }
}
"""
)

_BACKWARD_ALPHA = (
    _COMMON
    + r"""
extern "C" __global__ void __launch_bounds__(THREADS) backward_alpha(
    const GRAD* __restrict__ grad_spikes, const CURRENT* __restrict__ x, const float* __restrict__ v_init,
    const float* __restrict__ alphas, float* __restrict__ partial,
    int64 T, int64 size, int64 grad_stride, int64 x_stride, float beta) {
    const unsigned first = blockIdx.x * (4 * LANES) + threadIdx.x * VEC;  // element of row 0
    bool here[4];
    float v[4][VEC];
#pragma unroll
    for (int row = 0; row < 4; row++) {
        const unsigned element = first + row * LANES;
        here[row] = element < size;
        Vector<float, VEC> start = {};
        if (CARRY_IN && here[row]) start = load<VEC>(v_init + element);
#pragma unroll
        for (int i = 0; i < VEC; i++) v[row][i] = start.at[i];
    }
    for (int64 group = 0; group < T; group += K) {
        Vector<CURRENT, VEC> steps[K][4];
        Vector<GRAD, VEC> grads[K][4];
        float alpha[K], slopes[K] = {};
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int64 t = group + k < T ? group + k : T - 1;  // past the end the last step again, unused
            alpha[k] = alphas[t];
#pragma unroll
            for (int row = 0; row < 4; row++) {
                steps[k][row] = {}, grads[k][row] = {};
                if (!here[row]) continue;
                steps[k][row] = load<VEC>(x + t * x_stride + first + row * LANES);
                grads[k][row] = load<VEC>(grad_spikes + t * grad_stride + first + row * LANES);
            }
        }
#pragma unroll
        for (int k = 0; k < K; k++) {
            const float size_t = amplitude(alpha[k]);
#pragma unroll
            for (int row = 0; row < 4; row++) {
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    const float m = v[row][i] + float(steps[k][row].at[i]);
                    const float s = spike(m, size_t);
                    v[row][i] = m * carry(s, alpha[k], beta);
                    slopes[k] += float(grads[k][row].at[i]) * ((fabsf(m) <= size_t ? s - m : s) / size_t);
                }
            }
            if (alpha[k] < FLOOR) slopes[k] = 0;  // below the floor the amplitude no longer depends on alpha
        }
        store_sums(slopes, partial + group * gridDim.x + blockIdx.x, gridDim.x, T - group);
    }
}
"""
)


def _variant(size: int, steps: int, itemsize: int, strides: tuple[int, ...], *tensors: Tensor | None) -> dict[str, int]:
    """Threads, elements per access and steps per group: wide accesses for large inputs, long groups for small ones."""
    large = lanes(size) == 256  # then other blocks have work while one waits, and groups would only cost registers
    width = vector(16 // itemsize, size, strides, tensors) if large else 1
    group = min(1 << (steps - 1).bit_length(), max(4 // width, 1) if large else 16)
    return {"LANES": lanes(size), "VEC": width, "THREADS": lanes(size) // width, "K": group}


def forward(
    current: Tensor, v_init: Tensor | None, alpha: Tensor, mask: Tensor | None, beta: float, reset: str,
    spikes: Tensor, v: Tensor | None, flags: Tensor, partial: Tensor | None,
) -> None:  # fmt: skip
    """Fill spikes [T, ...], v [...], flags and partial [T, blocks] (the blocks' sums of |m|); None is left out."""
    steps, size, stride = len(current), current[0].numel(), current.stride(0)
    width = current.shape[-1] if current.ndim > 1 else 1
    variant = _variant(size, steps, current.itemsize, (stride,), current, v_init, spikes, v, flags)
    launch(
        cupy, _FORWARD, "forward", blocks(size), variant["THREADS"],
        (current, v_init, alpha, mask, spikes, v, flags, partial),
        (steps, size, stride, width), (beta,),
        CURRENT=current.dtype, SPIKES=spikes.dtype, MASK="float" if mask is None else mask.dtype,
        SYMMETRIC=reset == "symmetric", CARRY_IN=v_init is not None, CARRY_OUT=v is not None,
        MEASURED=partial is not None, MASKED=mask is not None, SHARED=width % variant["VEC"] == 0,
        SCALED=spikes.itemsize > 1, FLOOR=f"{ALPHA_FLOOR}f", **variant,
    )  # fmt: skip


def backward(
    grad_spikes: Tensor, grad_v: Tensor | None, flags: Tensor, alpha: Tensor, beta: float,
    grad_current: Tensor, grad_v_init: Tensor | None,
) -> None:  # fmt: skip
    """Fill grad_current [T, ...] and grad_v_init [...]."""
    steps, size, stride = len(grad_spikes), grad_spikes[0].numel(), grad_spikes.stride(0)
    tensors = (grad_spikes, grad_v, flags, grad_current, grad_v_init)
    variant = _variant(size, steps, grad_spikes.itemsize, (stride,), *tensors)
    launch(
        cupy, _BACKWARD, "backward", blocks(size), variant["THREADS"],
        (grad_spikes, grad_v, flags, alpha, grad_current, grad_v_init), (steps, size, stride), (beta,),
        GRAD=grad_spikes.dtype, CURRENT=grad_current.dtype, SYMMETRIC=len(flags) == 1,
        CARRY_IN=grad_v_init is not None, CARRY_OUT=grad_v is not None, FLOOR=f"{ALPHA_FLOOR}f", **variant,
    )  # fmt: skip


def backward_alpha(
    grad_spikes: Tensor, current: Tensor, v_init: Tensor | None, alpha: Tensor, beta: float, reset: str, partial: Tensor
) -> None:
    """Fill partial [T, blocks]: the blocks' sums of the gradient of alpha."""
    steps, size, strides = len(current), current[0].numel(), (grad_spikes.stride(0), current.stride(0))
    variant = _variant(size, steps, current.itemsize, strides, grad_spikes, current, v_init)
    variant["K"] = -(-variant["K"] // 2)  # it reads two tensors
    launch(
        cupy, _BACKWARD_ALPHA, "backward_alpha", blocks(size), variant["THREADS"],
        (grad_spikes, current, v_init, alpha, partial), (steps, size, *strides), (beta,),
        GRAD=grad_spikes.dtype, CURRENT=current.dtype, SYMMETRIC=reset == "symmetric",
        CARRY_IN=v_init is not None, FLOOR=f"{ALPHA_FLOOR}f", **variant,
    )  # fmt: skip
