"""Spikes in one or two bits each, for what must be kept: 1 bit for {0, a}, 2 bits for {-a, 0, a}."""

import torch
from torch import Tensor

from snlp_zoo.ops.backend import resolve
from snlp_zoo.ops.packing import kernel
from snlp_zoo.ops.packing.reference import pack_reference, unpack_reference

__all__ = ["pack", "unpack"]


def pack(spikes: Tensor, bits: int, backend: str = "auto") -> Tensor:
    """The signs of spikes [T, ...] in `bits` bits each: uint8 [T, bytes], as laid out in `pack_reference`.

    Raises:
        ValueError: bits is neither 1 nor 2.
        BackendError: the named backend cannot run here.
    """
    if bits not in (1, 2):
        raise ValueError(f"pack: bits must be 1 (binary spikes) or 2 (ternary spikes), got {bits}")
    if resolve(backend, spikes, op="packing") == "torch":
        return pack_reference(spikes, bits)
    return kernel.pack(spikes, bits)


def unpack(
    codes: Tensor,
    amplitude: Tensor,
    bits: int,
    shape: torch.Size,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`pack` undone: spikes of `shape` [T, ...] with their step's amplitude, [T], in its dtype or `dtype`."""
    dtype = dtype or amplitude.dtype
    if resolve(backend, amplitude, op="packing") == "torch":
        narrow = dtype.itemsize == 1  # to which only signs are converted, after the product
        return unpack_reference(codes, amplitude if narrow else amplitude.to(dtype), bits, shape).to(dtype)
    return kernel.unpack(codes, amplitude, bits, shape, dtype)
