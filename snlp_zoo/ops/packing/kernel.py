"""The kernels as PyTorch operators, `snlp_zoo::pack` and `snlp_zoo::unpack`; bytes as in `reference.py`."""

import math

import torch
from torch import Tensor

from snlp_zoo.ops.backend import step_major
from snlp_zoo.ops.packing.reference import packed_bytes


@torch.library.custom_op("snlp_zoo::pack", mutates_args=())
def pack(spikes: Tensor, bits: int) -> Tensor:
    from snlp_zoo.ops.packing import triton

    codes = _allocate(spikes, bits)
    if spikes.numel():
        triton.pack(step_major(spikes), codes, bits)
    return codes


@pack.register_fake
def _allocate(spikes, bits) -> Tensor:
    shape = (spikes.shape[0], packed_bytes(math.prod(spikes.shape[1:]), bits))  # symbolic under torch.compile
    return spikes.new_empty(shape, dtype=torch.uint8)


@torch.library.custom_op("snlp_zoo::unpack", mutates_args=())
def unpack(codes: Tensor, amplitude: Tensor, bits: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    from snlp_zoo.ops.packing import triton

    spikes = _allocate_spikes(codes, amplitude, bits, shape, dtype)
    if spikes.numel():
        triton.unpack(codes, amplitude.contiguous(), spikes, bits)
    return spikes


@unpack.register_fake
def _allocate_spikes(codes, amplitude, bits, shape, dtype) -> Tensor:
    return amplitude.new_empty(shape, dtype=dtype)
