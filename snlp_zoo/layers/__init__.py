"""Modules shared by two or more models."""

from snlp_zoo.layers.bispike import SpikingLinear
from snlp_zoo.layers.coding import Direct
from snlp_zoo.layers.neurons import ElasticBiSpike, IFNode, LIFNode, ParametricLIFNode, make_neuron

__all__ = ["Direct", "ElasticBiSpike", "IFNode", "LIFNode", "ParametricLIFNode", "SpikingLinear", "make_neuron"]
