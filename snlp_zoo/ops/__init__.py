"""Pure functions on tensors: state in, state out. No modules, no configuration, no hidden state."""

from snlp_zoo.ops.bispike import BiSpikeOutput, elastic_bispike
from snlp_zoo.ops.lif import LIFOutput, lif
from snlp_zoo.ops.surrogates import SURROGATES, Surrogate
from snlp_zoo.ops.ternary_lif import ternary_lif

__all__ = ["SURROGATES", "BiSpikeOutput", "LIFOutput", "Surrogate", "elastic_bispike", "lif", "ternary_lif"]
