"""A model is looked at while it runs, and left as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode inside; afterwards every module is in the mode it was in, also after an error."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks are there inside; afterwards they are removed, also after an error."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
