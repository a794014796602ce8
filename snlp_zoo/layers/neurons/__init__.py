"""SpikingJelly's neurons on our backends, and the neurons it lacks; with `energy/` and `bench.py`, its only doors.

Every class here is a SpikingJelly neuron: step modes 's' and 'm', `functional.reset_net`, monitors and counters work on
it, and it fits into any SpikingJelly network. Three ways to call one:

    node(current)                    SpikingJelly's way: the membrane stays in node.v until `reset_net`
    node(current, from_rest=True)    our models' way: starts at rest, leaves no state behind, [T, ...] in and out
    node(current, state=membranes)   the same in pieces, where no amplitude belongs to a time step: starts from
                                     membranes[node], or at rest if that is missing, and leaves the membrane there
"""

from collections.abc import Callable

from snlp_zoo.errors import lookup
from snlp_zoo.layers.neurons.base import (
    NEGLIGIBLE,
    BaseNode,
    ExplicitState,
    Surrogated,
    as_recorded,
    set_surrogate_temperature,
)
from snlp_zoo.layers.neurons.elastic import ALPHA_MODES, ElasticBiSpike, amplitudes_updated
from snlp_zoo.layers.neurons.lif import IFNode, LIFNode, ParametricLIFNode
from snlp_zoo.layers.neurons.ternary import TernaryLIFNode

__all__ = [
    "ALPHA_MODES",
    "NEGLIGIBLE",
    "BaseNode",
    "ElasticBiSpike",
    "ExplicitState",
    "IFNode",
    "LIFNode",
    "ParametricLIFNode",
    "Surrogated",
    "TernaryLIFNode",
    "amplitudes_updated",
    "as_recorded",
    "make_neuron",
    "set_surrogate_temperature",
]

_NEURONS: dict[str, Callable[..., BaseNode]] = {
    "lif": LIFNode,
    "if": IFNode,
    "plif": ParametricLIFNode,
    "ternary": TernaryLIFNode,
    "elastic": ElasticBiSpike,
}


def make_neuron(kind: str, **options) -> BaseNode:
    """A spiking neuron by name: "lif", "if", "plif", "ternary" or "elastic" (bi-spike); options as in its class.

    Raises:
        ValueError: unknown name.
        TypeError: an option the neuron does not have.
    """
    return lookup("neuron", kind, _NEURONS)(**options)
