"""Pure functions on tensors: state in, state out. No modules, no configuration, no hidden state.

The names below are for users. `lif`, `ternary_lif` and `wkv4` hide the modules they come from: the library itself
imports an op from its own, as in `from snlp_zoo.ops.lif import lif`.
"""

from snlp_zoo.ops.bispike import BiSpikeOutput, elastic_bispike
from snlp_zoo.ops.lif import LIFOutput, lif
from snlp_zoo.ops.surrogates import SURROGATES, Surrogate
from snlp_zoo.ops.ternary_lif import ternary_lif
from snlp_zoo.ops.wkv4 import WKVOutput, wkv4

__all__ = [
    "SURROGATES",
    "BiSpikeOutput",
    "LIFOutput",
    "Surrogate",
    "WKVOutput",
    "elastic_bispike",
    "lif",
    "ternary_lif",
    "wkv4",
]
