"""How a Triton kernel is launched that runs for less time than Triton takes to look at its arguments."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


def launcher(kernel: Any) -> Callable[..., None]:
    """`kernel[(programs,)](*args, **options)`, which after the first call with a key skips what the key decides.

    Returns:
        launch(key, programs, args, **options). A key stands for all that Triton compiles for: the device, dtypes, which
        arguments are None, constants, and of every integer it may specialise whether it is 1 or a multiple of 16.
        Pointers must be multiples of 16, and `args` hold the constants too, in the kernel's order.
    """
    compiled: dict[Hashable, Any] = {}

    def launch(key: Hashable, programs: int, args: tuple, **options: int) -> None:
        known = compiled.get(key)
        if known is None:  # always, where kernels are interpreted
            compiled[key] = kernel[(programs, 1, 1)](*args, **options)
        else:
            known[(programs, 1, 1)](*args)

    return launch


def aligned(x: Tensor) -> Tensor:
    """x, contiguous, from an address that is a multiple of 16; copied only if it is not."""
    return x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
