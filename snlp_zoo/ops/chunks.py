"""Walking over a step in chunks that stay in the cache: an eager loop then passes through main memory only once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ELEMENTS = 2**16  # of one step, for each thread


def as_rows(step: torch.Size, *tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors [..., *step] as [..., rows, width], a copy only where no view can do it; scalars and None stay."""
    rows = step[:-1].numel()
    width = step.numel() // max(rows, 1)
    return [
        x if x is None or x.ndim < len(step) else x.reshape(*x.shape[: x.ndim - len(step)], rows, width)
        for x in tensors
    ]


def _slices(x: Tensor) -> list[slice]:
    """Which rows of x [T, rows, width] to take at a time: all when compiled and on other devices: no gain there."""
    rows, width = x.shape[1:]
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return [slice(rows)]
    size = max(1, ELEMENTS * torch.get_num_threads() // max(width, 1))
    return [slice(start, start + size) for start in range(0, rows, size)]


def by_chunks(
    function: Callable[..., None], dtype: torch.dtype, inputs: Sequence[Any], outputs: Sequence[Any], *options: object
) -> None:
    """Call function(*inputs, *outputs, *options) on one chunk of rows after another; it fills the outputs.

    Inputs and outputs come from `as_rows`, the first one with T. The function sees floating-point tensors in `dtype`:
    half precision is converted chunk by chunk.
    """
    for part in _slices(inputs[0]):
        chunks = [x[..., part, :] if x is not None and x.ndim else x for x in (*inputs, *outputs)]
        wide = [x.to(dtype) if x is not None and x.is_floating_point() else x for x in chunks]
        function(*wide, *options)
        for chunk, filled in zip(chunks[len(inputs) :], wide[len(inputs) :], strict=True):
            if filled is not chunk:
                chunk.copy_(filled)
