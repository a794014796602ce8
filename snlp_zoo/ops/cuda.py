"""What the CuPy kernels share: number formats and wide accesses in CUDA C++, and how a kernel is compiled and launched.

The sources include no header, which a CuPy wheel may come without. Constants (`-D`) choose the variant of a kernel:
0 or 1 for a question, a number, a dtype by PyTorch's name.
"""

from collections.abc import Hashable
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

# no fused multiply-add: results equal the reference. CuPy adds -ftz=true: below 2^-126 a float32 counts as zero
_OPTIONS = ("-std=c++17", "--fmad=false")

PRELUDE = r"""
typedef signed char int8;
typedef unsigned char uint8;
typedef short int16;
typedef int int32;
typedef long long int64;
typedef float float32;
typedef double float64;

struct bfloat16 {
    unsigned short bits;
    bfloat16() = default;
    __device__ explicit bfloat16(float x) {  // to nearest even
#if __CUDA_ARCH__ >= 800
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
        const unsigned word = __float_as_uint(x);
        bits = x == x ? (word + 0x7fff + (word >> 16 & 1)) >> 16 : 0x7fff;  // NaN would round to infinity
#endif
    }
    __device__ operator float() const { return __uint_as_float((unsigned)bits << 16); }
};

struct float16 {
    unsigned short bits;
    float16() = default;
    __device__ explicit float16(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    __device__ operator float() const {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        return x;
    }
};

struct float8_e4m3fn {  // of -1, 0 and 1
    unsigned char bits;
    float8_e4m3fn() = default;
    __device__ explicit float8_e4m3fn(float x) : bits(x > 0 ? 0x38 : x < 0 ? 0xb8 : 0) {}
};

// N neighbours, read and written with as few accesses as 16 bytes each allow
template <typename Type, int N>
struct alignas(N * sizeof(Type) < 16 ? N * sizeof(Type) : 16) Vector {
    Type at[N];
};

template <int N, typename Type>
__device__ Vector<Type, N> load(const Type* from) {
    return *reinterpret_cast<const Vector<Type, N>*>(from);
}

template <int N, typename Type>
__device__ void store(Type* to, const Vector<Type, N>& vector) {
    *reinterpret_cast<Vector<Type, N>*>(to) = vector;
}
"""


def vector(wanted: int, size: int, strides: tuple[int, ...], tensors: tuple[Tensor | None, ...]) -> int:
    """Elements per access, at most `wanted`, that keep every row of every tensor aligned. A power of two."""

    def fits(width: int) -> bool:
        return not any(x % width for x in (size, *strides)) and not any(
            x.data_ptr() % min(16, width * x.itemsize) for x in tensors if x is not None
        )

    while not fits(wanted):
        wanted //= 2
    return wanted


class _Stream:
    """PyTorch's current stream in the CUDA stream protocol, which those of older versions do not speak."""

    def __init__(self, device: torch.device) -> None:
        self.pointer = torch.cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@cache
def _kernel(cupy: ModuleType, source: str, name: str, **constants: Hashable):
    words = {key: int(x) if isinstance(x, bool) else str(x).removeprefix("torch.") for key, x in constants.items()}
    return cupy.RawKernel(source, name, (*_OPTIONS, *(f"-D{key}={word}" for key, word in words.items())))


def launch(
    cupy: ModuleType,
    source: str,
    name: str,
    blocks: int,
    threads: int,
    tensors: tuple[Tensor | None, ...],
    integers: tuple[int, ...],
    floats: tuple[float, ...],
    **constants: Hashable,
) -> None:
    """Launch kernel `name` of `source` on PyTorch's current stream; compiled where it is new to this machine.

    Its parameters are pointers, int64 and float32, in this order. `cupy` is the module: only the kernels' files import
    it. Nothing is allocated or waited for, so a CUDA graph may capture the launch once the kernel is compiled.
    """
    device = next(x.device for x in tensors if x is not None)
    pointers = (np.int64(0 if x is None else x.data_ptr()) for x in tensors)
    arguments = (*pointers, *map(np.int64, integers), *map(np.float32, floats))
    kernel, stream = _kernel(cupy, source, name, **constants), _Stream(device)
    with cupy.cuda.Device(device.index):
        if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14, where ExternalStream warns
            current = cupy.cuda.Stream.from_external(stream)
        else:
            current = cupy.cuda.ExternalStream(stream.pointer)
        with current:
            kernel((blocks,), (threads,), arguments)
