"""Packed low-bit weights and their product with spikes: the specification."""

import torch
from torch import Tensor


def width(bits: float) -> int:
    """Bits a stored weight takes: 2 for the three values of 1.58 bits, 1 for two values."""
    return 1 if bits == 1 else 2


def packed_bytes(in_features: int, bits: float) -> int:
    """Bytes of one output's weights."""
    return -(-in_features * width(bits) // 8)


def pack_reference(signs: Tensor, bits: float) -> Tensor:
    """Signs [out_features, in_features] as uint8 [out_features, bytes], every output's weights by themselves.

    A byte holds neighbouring weights, the first in the lowest bits. 1.58 bit: the sign in two's complement, 0, 1 for
    positive, 3 for negative. 1 bit: 1 for positive, 0 for negative. What fills up the last byte is 0.
    """
    size = width(bits)
    codes = (signs > 0).to(torch.uint8) if size == 1 else signs.to(torch.int8).view(torch.uint8) & 3
    codes = torch.nn.functional.pad(codes, (0, packed_bytes(signs.shape[1], bits) * 8 // size - signs.shape[1]))
    fields = codes.view(len(signs), -1, 8 // size)
    packed = fields[:, :, 0].clone()
    for field in range(1, 8 // size):
        packed |= fields[:, :, field] << (size * field)
    return packed


def unpack_reference(codes: Tensor, bits: float, in_features: int) -> Tensor:
    """`pack_reference` undone: int8 [out_features, in_features]."""
    size = width(bits)
    shifts = torch.arange(0, 8, size, dtype=torch.uint8, device=codes.device)
    fields = (codes.unsqueeze(-1) >> shifts) & (2**size - 1)
    signs = 2 * fields.view(torch.int8) - 1 if size == 1 else ((fields & 1) - (fields & 2)).view(torch.int8)
    return signs.flatten(1)[:, :in_features]


def bit_linear_reference(signs: Tensor, codes: Tensor, amplitude: Tensor, scale: Tensor, bits: float) -> Tensor:
    """y[t] = amplitude[t] * scale * (Wq s[t]), with the sums in integers.

    Args:
        signs: s, [T, ..., in_features] in {-1, 0, 1}.
        codes: packed Wq, [out_features, bytes].
        amplitude, scale: [T] and a single value.
    Returns:
        [T, ..., out_features] in the amplitude's dtype.
    """
    weight = unpack_reference(codes, bits, signs.shape[-1]).long()
    sums = (signs.long().unsqueeze(-2) * weight).sum(-1)
    return sums * (amplitude * scale).view(-1, *(1,) * (signs.ndim - 1))
