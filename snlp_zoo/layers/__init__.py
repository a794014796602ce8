"""Modules shared by two or more models."""

from snlp_zoo.layers.bispike import SpikingLinear
from snlp_zoo.layers.coding import Direct
from snlp_zoo.layers.folding import fold_amplitude
from snlp_zoo.layers.neurons import ElasticBiSpike, IFNode, LIFNode, ParametricLIFNode, TernaryLIFNode, make_neuron
from snlp_zoo.layers.quant import BitLinear, make_linear, pack

__all__ = [
    "BitLinear",
    "Direct",
    "ElasticBiSpike",
    "IFNode",
    "LIFNode",
    "ParametricLIFNode",
    "SpikingLinear",
    "TernaryLIFNode",
    "fold_amplitude",
    "make_linear",
    "make_neuron",
    "pack",
]
