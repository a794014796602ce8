"""Modules shared by two or more models."""

from snlp_zoo.layers.attention import (
    ATTENTIONS,
    SpikingformerSelfAttention,
    SpikingSelfAttention,
    make_attention,
)
from snlp_zoo.layers.bernoulli import BernoulliNode
from snlp_zoo.layers.bispike import SpikingLinear
from snlp_zoo.layers.coding import Direct
from snlp_zoo.layers.neurons import ElasticBiSpike, IFNode, LIFNode, ParametricLIFNode, make_neuron
from snlp_zoo.layers.quant import BitLinear, make_linear, pack

__all__ = [
    "ATTENTIONS",
    "BernoulliNode",
    "BitLinear",
    "Direct",
    "ElasticBiSpike",
    "IFNode",
    "LIFNode",
    "ParametricLIFNode",
    "SpikingLinear",
    "SpikingSelfAttention",
    "SpikingformerSelfAttention",
    "make_attention",
    "make_linear",
    "make_neuron",
    "pack",
]
