"""Spiking language models that load, train, distil and predict like any other transformers model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import warn

if TYPE_CHECKING:
    from snlp_zoo.models.modeling_spikelm import SpikeLMForMaskedLM, SpikeLMForSequenceClassification, SpikeLMModel
    from snlp_zoo.registry import build, list_entries, load

__version__ = "0.1.0"
