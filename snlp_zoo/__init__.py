"""Spiking language models that load, train, distil and predict like any other transformers model.

`import snlp_zoo` registers every model with transformers' Auto classes and pipelines.
"""

import warnings
from typing import TYPE_CHECKING, Any

from snlp_zoo.doctor import torchvision_mismatch
from snlp_zoo.errors import SnlpError

if TYPE_CHECKING:
    from snlp_zoo.hub import find_checkpoint as find_checkpoint
    from snlp_zoo.hub import load as load
    from snlp_zoo.hub import publish as publish
    from snlp_zoo.registry import build as build
    from snlp_zoo.registry import list_entries as list_entries

__version__ = "0.1.0"
__all__ = ["SnlpError", "build", "find_checkpoint", "list_entries", "load", "publish"]

if (_problem := torchvision_mismatch()) is None:
    try:
        from snlp_zoo import hub, registry

        registry.register()
    except (ImportError, OSError) as error:  # a package is missing, broken or too old
        _problem = f"snlp_zoo cannot be loaded: {error}; 'snlp-zoo doctor' shows what is installed"
if _problem is not None:  # `snlp-zoo doctor` still can say so
    warnings.warn(_problem, ImportWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    """Public names of the registry and the hub, which exist only where torch and transformers can be imported."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _problem is not None:
        raise ImportError(_problem)
    return getattr(hub if name in hub.__all__ else registry, name)
