"""The LIF family on `ops.lif`."""

import math
from typing import Any

from spikingjelly.activation_based import neuron
from torch import Tensor

from snlp_zoo.layers.neurons.base import Surrogated
from snlp_zoo.ops.backend import product_dtype
from snlp_zoo.ops.lif import lif, lif_membranes


class _LIFBase(Surrogated):
    """The LIF family on `ops.lif`; subclasses say what tau is."""

    spike_kind = "binary"  # as `energy.kinds` names alphabets

    def _tau(self) -> float | Tensor:
        return self.tau

    def _dynamics(self) -> dict[str, Any]:
        decay_input = getattr(self, "decay_input", False)
        return {
            "tau": self._tau(), "v_threshold": self.v_threshold, "v_reset": self.v_reset, "decay_input": decay_input
        }  # fmt: skip

    def multi_step_functional_forward(self, inputs, states, **kwargs):
        spikes, v = self.run(inputs[0], states[0])
        return (spikes,), (v, *states[1:])

    def run(
        self, current: Tensor, v: Tensor | None, carry_out: bool = True, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`mask` is for neurons that measure (`ElasticBiSpike`), whose place these can take."""
        return lif(
            current,
            v,
            **self._dynamics(),
            detach_reset=self.detach_reset,
            surrogate=self.effective_surrogate(),
            spike_dtype=product_dtype(current),  # at once: the product that follows would cast them
            carry_out=carry_out,
            backend=self.backend,
        )

    def membranes(self, current: Tensor, v: Tensor | None, step: int = 0) -> Tensor:
        return lif_membranes(current, v, **self._dynamics())

    def distances(self, membranes: Tensor) -> list[Tensor]:
        return [membranes - self.v_threshold]


class LIFNode(_LIFBase, neuron.LIFNode):
    """SpikingJelly's LIFNode on `ops.lif`: any backend, float32 membrane under half precision.

    Args:
        tau: membrane time constant in time steps, > 1.
        decay_input: divide the input by tau too.
        v_threshold, v_reset: unit of v; v_reset=None is the soft reset.
        surrogate_function: a name from `ops.SURROGATES`, an `ops.Surrogate`, or SpikingJelly's own object.
        learnable_surrogate: train the steepness alpha, one number for this layer, by the surrogate's primitive (see
            `ops.surrogates`).
        detach_reset: keep the reset out of the gradient.
        step_mode: "m" takes [T, ...], "s" one step.
        store_v_seq: keep the membrane of every step in `v_seq`.
        backend: "auto", "torch", "triton" or "cupy", as in `ops.lif`.
    """

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function="atan",
        detach_reset: bool = True,
        step_mode: str = "m",
        store_v_seq: bool = False,
        backend: str = "auto",
        learnable_surrogate: bool = False,
    ) -> None:
        super().__init__(
            tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq
        )
        self.backend = backend
        self.learn_surrogate(learnable_surrogate)


class IFNode(_LIFBase, neuron.IFNode):
    """SpikingJelly's IFNode on `ops.lif`: integrate-and-fire, no leak. Arguments as in `LIFNode`."""

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function="atan",
        detach_reset: bool = True,
        step_mode: str = "m",
        store_v_seq: bool = False,
        backend: str = "auto",
        learnable_surrogate: bool = False,
    ) -> None:
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq)
        self.backend = backend
        self.learn_surrogate(learnable_surrogate)

    def _tau(self) -> float:
        return float("inf")


class ParametricLIFNode(_LIFBase, neuron.ParametricLIFNode):
    """SpikingJelly's ParametricLIFNode on `ops.lif`: tau = 1 / sigmoid(w) is learned. Arguments as in `LIFNode`."""

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function="atan",
        detach_reset: bool = True,
        step_mode: str = "m",
        store_v_seq: bool = False,
        backend: str = "auto",
        learnable_surrogate: bool = False,
    ) -> None:
        super().__init__(
            init_tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq
        )
        self.backend = backend
        self.learn_surrogate(learnable_surrogate)
        self.fresh["w"] = -math.log(init_tau - 1)

    def _tau(self) -> Tensor:
        return 1 / self.w.sigmoid()
