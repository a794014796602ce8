"""Modules that models are made of, and that fit into any other network: neurons, attention, codes, low-bit layers."""

from snlp_zoo.layers.attention import (
    ATTENTIONS,
    SpikingformerSelfAttention,
    SpikingSelfAttention,
    make_attention,
)
from snlp_zoo.layers.bernoulli import BernoulliNode
from snlp_zoo.layers.bispike import SpikingLinear
from snlp_zoo.layers.coding import (
    Bernoulli,
    BitPlane,
    Direct,
    MultiLevel,
    Poisson,
    Signed,
    TimeToFirstSpike,
    Unary,
    make_coding,
)
from snlp_zoo.layers.folding import fold_amplitude
from snlp_zoo.layers.neurons import ElasticBiSpike, IFNode, LIFNode, ParametricLIFNode, TernaryLIFNode, make_neuron
from snlp_zoo.layers.quant import BitLinear, make_linear, pack
from snlp_zoo.layers.spike_linear import SpikeLinear

__all__ = [
    "ATTENTIONS",
    "Bernoulli",
    "BernoulliNode",
    "BitLinear",
    "BitPlane",
    "Direct",
    "ElasticBiSpike",
    "IFNode",
    "LIFNode",
    "MultiLevel",
    "ParametricLIFNode",
    "Poisson",
    "Signed",
    "SpikeLinear",
    "SpikingLinear",
    "SpikingSelfAttention",
    "SpikingformerSelfAttention",
    "TernaryLIFNode",
    "TimeToFirstSpike",
    "Unary",
    "fold_amplitude",
    "make_attention",
    "make_coding",
    "make_linear",
    "make_neuron",
    "pack",
]
