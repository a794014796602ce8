"""The product of counts with int8 weights in Triton: sums in int32, scaled, shifted and rounded before they are stored.

Every output is summed by one program, in one order: results do not depend on the batch.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snlp_zoo.ops.launch import aligned, launcher


@triton.jit(do_not_specialize=["rows"])
def _product(
    n_ptr, w_ptr, v_ptr, scale_ptr, bias_ptr, y_ptr, rows, outputs, inputs,
    BIASED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """One tile of y; neighbouring programs share its rows, which the second-level cache then keeps."""
    tiles = tl.cdiv(outputs, OUTPUTS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(0) % tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    lane = tl.arange(0, INPUTS)
    # beyond the edge the last row is read once more: nothing to mask in the loop
    n_ptr += tl.minimum(row, rows - 1).to(tl.int64)[:, None] * inputs + lane[None, :]
    w_ptr += tl.minimum(output, outputs - 1).to(tl.int64)[None, :] * inputs + lane[:, None]
    total = tl.zeros([ROWS, OUTPUTS], tl.int32)
    for first in range(0, inputs, INPUTS):
        if WHOLE:
            n, w = tl.load(n_ptr + first), tl.load(w_ptr + first)
        else:
            here = first + lane < inputs
            n = tl.load(n_ptr + first, mask=here[None, :], other=0)
            w = tl.load(w_ptr + first, mask=here[:, None], other=0)
        total = tl.dot(n, w, total, out_dtype=tl.int32)
    y = total.to(tl.float32) * tl.load(scale_ptr + output, mask=output < outputs, other=0.0)[None, :]
    y *= tl.load(v_ptr + row, mask=row < rows, other=0.0)[:, None]
    if BIASED:
        y += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    place = row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (output < outputs)[None, :])


_launch = launcher(_product)


class Tile(NamedTuple):
    """What a program computes, [rows, outputs], and in what pieces it reads, `inputs` long, `stages` of them ahead."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


@cache
def _tile(rows: int, outputs: int, inputs: int) -> Tile:
    """As large as it may be while there is one for every multiprocessor."""
    if rows <= 32:  # what counts is how fast the weights arrive
        return Tile(16 if rows <= 16 else 32, 16 if outputs <= 4096 else 32, 256, 2, 4)
    if -(-rows // 128) * -(-outputs // 128) < 128:
        return Tile(64, 32 if rows * outputs < 2**19 else 64, 128, 4, 4)
    return Tile(128, 64 if outputs <= 192 else 128, 128, 4, 3)


def int8_linear(
    counts: Tensor, weight: Tensor, threshold: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """counts [rows, K], threshold [rows, 1] -> [rows, M]."""
    (rows, inputs), outputs = counts.shape, weight.shape[0]
    y = torch.empty(rows, outputs, dtype=dtype, device=counts.device)
    if not y.numel():
        return y
    given = [aligned(x) for x in (counts, weight, threshold, scale)]
    bias = scale if bias is None else aligned(bias)
    biased = bias is not scale
    tile = _tile(rows, outputs, inputs)
    variant = biased, inputs % tile.inputs == 0, *tile[:3]
    key = counts.device, dtype, bias.dtype, outputs, inputs, tile, biased
    programs = -(-rows // tile.rows) * -(-outputs // tile.outputs)
    with torch.cuda.device_of(counts):  # of a model on several devices, any may be the current one
        args = (*given, bias, y, rows, outputs, inputs, *variant)
        _launch(key, programs, args, num_warps=tile.warps, num_stages=tile.stages)
    return y
