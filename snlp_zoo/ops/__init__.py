"""Pure functions on tensors: state in, state out. No modules, no configuration, no hidden state."""

from snlp_zoo.ops.bispike import BiSpikeOutput, elastic_bispike
from snlp_zoo.ops.lif import LIFOutput, lif
from snlp_zoo.ops.surrogates import SURROGATES, Surrogate

__all__ = ["SURROGATES", "BiSpikeOutput", "LIFOutput", "Surrogate", "elastic_bispike", "lif"]
