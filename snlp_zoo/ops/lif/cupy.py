"""LIF in CUDA C++ through CuPy: all T steps in one launch, the membrane in registers; the backward recomputes it.

A thread owns VEC neighbouring elements through all steps. Steps go in groups of K, whose loads are issued together and,
where there is more than one group, while the one before is computed: with few elements and many steps, waiting for
memory is all the time there is. The backward walks over the groups from the last to the first, each forward once
(membranes) and then back (gradients); with more than one group K is `GROUP`, the distance of the saved starts.
"""

import cupy
from torch import Tensor

from snlp_zoo.ops.cuda import PRELUDE, launch, vector
from snlp_zoo.ops.lif.kernel import GROUP

_COMMON = (
    PRELUDE
    + r"""
struct Neuron {
    float leak, threshold, rest;  // a hard reset leads back to rest
    __device__ float charge(float x, float v) const {
        return DECAY_INPUT ? v + (x - (v - rest)) * leak : v + (0.0f - (v - rest)) * leak + x;
    }
    __device__ bool fires(float h) const { return h >= threshold; }
    __device__ float reset(float h) const {
        const float s = fires(h);
        return SOFT ? h - s * threshold : (1 - s) * h + s * rest;
    }
};

// The tensor of leaks repeats along the elements of a step
__device__ float leak_of(const float* __restrict__ leaks, float leak, unsigned element, int64 count) {
    return TENSOR_LEAK ? leaks[element % unsigned(count)] : leak;
}
"""
)

_FORWARD = (
    _COMMON
    + r"""
struct Group {
    Vector<CURRENT, VEC> x[K];
    __device__ void fetch(const CURRENT* from, int64 first, int64 T, int64 stride) {
#pragma unroll
        for (int k = 0; k < K; k++) {  // past the end the last step again, unused
            x[k] = load<VEC>(from + (first + k < T ? first + k : T - 1) * stride);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) forward(
    const CURRENT* __restrict__ x, const float* __restrict__ v_init, const float* __restrict__ leaks,
    SPIKES* __restrict__ spikes, float* __restrict__ v_out, float* __restrict__ starts,
    int64 T, int64 size, int64 x_stride, int64 leak_size,
    float leak, float v_threshold, float rest) {
    const unsigned element = (blockIdx.x * THREADS + threadIdx.x) * VEC;
    if (element >= size) return;
    Group next;
    next.fetch(x + element, 0, T, x_stride);
    Neuron neuron[VEC];
    Vector<float, VEC> v;
    if (CARRY_IN) v = load<VEC>(v_init + element);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        neuron[i] = {leak_of(leaks, leak, element + i, leak_size), v_threshold, rest};
        if (!CARRY_IN) v.at[i] = rest;
    }
    for (int64 first = 0; first < T; first += K) {
        const Group group = next;
        if (SEVERAL && first > 0) store(starts + (first / K - 1) * size + element, v);
        if (SEVERAL && first + K < T) next.fetch(x + element, first + K, T, x_stride);
#pragma unroll
        for (int k = 0; k < K; k++) {
            const bool now = first + k < T;
            Vector<SPIKES, VEC> out;
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                const float h = neuron[i].charge(float(group.x[k].at[i]), v.at[i]);
                out.at[i] = SPIKES(float(neuron[i].fires(h)));
                if (now) v.at[i] = neuron[i].reset(h);
            }
            if (now) store(spikes + (first + k) * size + element, out);
        }
    }
    if (CARRY_OUT) store(v_out + element, v);
}
"""
)

_BACKWARD = (
    _COMMON
    + r"""
namespace surrogate {  // ds/dz at z, by the names of `surrogates.py`
__device__ float atan(float z, float alpha) {
    const float x = 1.5707963267948966f * alpha * z;
    return alpha / 2 / (1 + x * x);
}
__device__ float sigmoid(float z, float alpha) {
    const float s = 1 / (1 + expf(-alpha * z));
    return alpha * s * (1 - s);
}
__device__ float triangular(float z, float alpha) {
    const float slope = alpha - alpha * alpha * fabsf(z);
    return slope < 0 ? 0.0f : slope;
}
__device__ float fast_sigmoid(float z, float alpha) {
    const float x = 1 + alpha * fabsf(z);
    return 1 / (x * x);
}
__device__ float rect(float z, float alpha) { return fabsf(alpha * z) <= 0.5f ? alpha : 0.0f; }
__device__ float ste(float z, float alpha) { return alpha; }
}  // namespace surrogate

struct Group {
    Vector<CURRENT, VEC> x[K];
    Vector<GRAD, VEC> grad[K];
    Vector<float, VEC> start;  // membrane
    __device__ void fetch(const CURRENT* x_from, const GRAD* grad_from, const float* v_init, const float* starts,
                          int64 first, int64 T, int64 size, int64 x_stride, int64 grad_stride, float rest) {
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int64 t = first + k < T ? first + k : T - 1;  // past the end the last step again, unused
            x[k] = load<VEC>(x_from + t * x_stride);
            grad[k] = load<VEC>(grad_from + t * grad_stride);
        }
#pragma unroll
        for (int i = 0; i < VEC; i++) start.at[i] = rest;
        if (SEVERAL && first > 0) start = load<VEC>(starts + (first / K - 1) * size);
        else if (CARRY_IN) start = load<VEC>(v_init);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) backward(
    const GRAD* __restrict__ grad_spikes, const float* __restrict__ grad_v, const CURRENT* __restrict__ x,
    const float* __restrict__ v_init, const float* __restrict__ starts, const float* __restrict__ leaks,
    CURRENT* __restrict__ grad_x, float* __restrict__ grad_v_init, float* __restrict__ grad_leak,
    int64 T, int64 size, int64 grad_stride, int64 x_stride, int64 leak_size,
    float leak, float v_threshold, float rest, float alpha) {
    const unsigned element = (blockIdx.x * THREADS + threadIdx.x) * VEC;
    if (element >= size) return;
    Group next;
    const auto fetch = [&](int64 first) {
        next.fetch(x + element, grad_spikes + element, v_init + element, starts + element,
                   first, T, size, x_stride, grad_stride, rest);
    };
    const int64 last = (T - 1) / K * K;
    fetch(last);
    Neuron neuron[VEC];
    Vector<float, VEC> to_v = {}, to_leak = {};  // gradients
    if (CARRY_OUT) to_v = load<VEC>(grad_v + element);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        neuron[i] = {leak_of(leaks, leak, element + i, leak_size), v_threshold, rest};
    }
    for (int64 first = last; first >= 0; first -= K) {
        const Group group = next;
        if (SEVERAL && first > 0) fetch(first - K);
        float v[K][VEC], h[K][VEC];  // membrane before and after charging
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                v[k][i] = k == 0 ? group.start.at[i] : neuron[i].reset(h[k == 0 ? 0 : k - 1][i]);
                h[k][i] = neuron[i].charge(float(group.x[k].at[i]), v[k][i]);
            }
        }
#pragma unroll
        for (int k = K - 1; k >= 0; k--) {
            const bool now = first + k < T;
            Vector<CURRENT, VEC> out;
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float to_s = float(group.grad[k].at[i]);
                if (!DETACH) to_s += to_v.at[i] * (SOFT ? -v_threshold : rest - h[k][i]);
                const float through = SOFT ? to_v.at[i] : to_v.at[i] * (1 - float(neuron[i].fires(h[k][i])));
                const float to_h = through + surrogate::SURROGATE(h[k][i] - v_threshold, alpha) * to_s;
                out.at[i] = CURRENT(DECAY_INPUT ? to_h * neuron[i].leak : to_h);
                const float drive = DECAY_INPUT ? float(group.x[k].at[i]) : 0.0f;
                if (LEARNED && now) to_leak.at[i] += to_h * (drive - (v[k][i] - rest));
                if (now) to_v.at[i] = to_h * (1 - neuron[i].leak);
            }
            if (now) store(grad_x + (first + k) * size + element, out);
        }
    }
    if (CARRY_IN) store(grad_v_init + element, to_v);
    if (LEARNED) store(grad_leak + element, to_leak);
}
"""
)


def _variant(size: int, steps: int, itemsize: int, strides: tuple[int, ...], *tensors: Tensor | None) -> dict[str, int]:
    """Threads, elements per access and steps per group: wide accesses for large inputs, all of the device for small."""
    group = min(1 << (steps - 1).bit_length(), GROUP)
    small = size < 2**17
    width = 1 if small else vector(min(16 // itemsize, 32 // group), size, strides, tensors)
    return {"K": group, "VEC": width, "THREADS": 32 if small else 128}


def forward(
    current: Tensor, v_init: Tensor | None, leak: Tensor | None, leak_value: float, v_threshold: float,
    v_reset: float | None, decay_input: bool, spikes: Tensor, v: Tensor | None, starts: Tensor,
) -> None:  # fmt: skip
    """Fill spikes [T, ...], v [...] (None is left out) and the membrane at the start of each later group."""
    steps, size, stride = len(current), current[0].numel(), current.stride(0)
    variant = _variant(size, steps, current.itemsize, (stride,), current, v_init, spikes, v, starts)
    launch(
        cupy, _FORWARD, "forward", -(-size // (variant["THREADS"] * variant["VEC"])), variant["THREADS"],
        (current, v_init, leak, spikes, v, starts), (steps, size, stride, 1 if leak is None else leak.numel()),
        (leak_value, v_threshold, v_reset or 0.0),
        CURRENT=current.dtype, SPIKES=spikes.dtype, TENSOR_LEAK=leak is not None,
        SOFT=v_reset is None, DECAY_INPUT=decay_input, CARRY_IN=v_init is not None, CARRY_OUT=v is not None,
        SEVERAL=steps > variant["K"], **variant,
    )  # fmt: skip


def backward(
    grad_spikes: Tensor, grad_v: Tensor | None, current: Tensor, v_init: Tensor | None, starts: Tensor,
    leak: Tensor | None, leak_value: float, v_threshold: float, v_reset: float | None, decay_input: bool,
    detach_reset: bool, surrogate: str, steepness: float,
    grad_current: Tensor, grad_v_init: Tensor | None, grad_leak: Tensor | None,
) -> None:  # fmt: skip
    """Fill grad_current [T, ...], grad_v_init [...] and grad_leak [...] (per element, None is left out)."""
    steps, size, strides = len(current), current[0].numel(), (grad_spikes.stride(0), current.stride(0))
    tensors = (grad_spikes, grad_v, current, v_init, starts, grad_current, grad_v_init, grad_leak)
    variant = _variant(size, steps, current.itemsize, strides, *tensors)
    launch(
        cupy, _BACKWARD, "backward", -(-size // (variant["THREADS"] * variant["VEC"])), variant["THREADS"],
        (grad_spikes, grad_v, current, v_init, starts, leak, grad_current, grad_v_init, grad_leak),
        (steps, size, *strides, 1 if leak is None else leak.numel()),
        (leak_value, v_threshold, v_reset or 0.0, steepness),
        CURRENT=current.dtype, GRAD=grad_spikes.dtype, TENSOR_LEAK=leak is not None,
        SOFT=v_reset is None, DECAY_INPUT=decay_input, DETACH=detach_reset, SURROGATE=surrogate,
        CARRY_IN=grad_v_init is not None, CARRY_OUT=grad_v is not None, LEARNED=grad_leak is not None,
        SEVERAL=steps > variant["K"], **variant,
    )  # fmt: skip
