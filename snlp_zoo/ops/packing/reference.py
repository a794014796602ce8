"""Packed spikes, in PyTorch operations that torch.compile fuses; kernels write the same bytes."""

import torch
from torch import Tensor

LANES = 256  # bytes of a block


def packed_bytes(size: int, bits: int) -> int:
    """Bytes of one step of `size` spikes: whole blocks."""
    per_block = LANES * (8 // bits)
    return -(-size // per_block) * LANES


def pack_reference(spikes: Tensor, bits: int) -> Tensor:
    """Signs of spikes [T, ...] as uint8 [T, bytes].

    Byte j of a block holds the block's spikes j, j + LANES, j + 2 LANES, ..., the first in the lowest bits.
    A code is the sign in two's complement: 0, 1 for a positive and 3 for a negative spike. Two bits keep NaN too, as 2.
    """
    flat, rows = spikes.flatten(1), 8 // bits
    codes = flat.sign().to(torch.int8).view(torch.uint8) & (2**bits - 1)
    if bits == 2:
        codes.masked_fill_(flat.isnan(), 2)
    count = packed_bytes(flat.shape[1], bits)
    codes = torch.nn.functional.pad(codes, (0, count * rows - flat.shape[1])).view(len(flat), -1, rows, LANES)
    packed = codes[:, :, 0].clone()
    for row in range(1, rows):
        packed |= codes[:, :, row] << (bits * row)
    return packed.view(len(flat), count)


def unpack_reference(codes: Tensor, amplitude: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Spikes of `shape` [T, ...], -a[t], 0 or a[t], in the dtype of the amplitude a [T]."""
    steps, rows, mask = len(codes), 8 // bits, 2**bits - 1
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device).view(rows, 1)
    split = (codes.view(steps, -1, 1, LANES) >> shifts) & mask
    split = split.reshape(steps, -1)[:, : shape[1:].numel()]
    if bits == 1:
        return (split * amplitude.view(steps, 1)).view(shape)
    signs = ((split & 1) - (split & 2)).view(torch.int8)
    return (signs * amplitude.view(steps, 1)).masked_fill_(split == 2, float("nan")).view(shape)
