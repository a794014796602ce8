"""A neuron that fires by chance."""

from typing import Any, Literal

import torch
from torch import Tensor

from snlp_zoo.layers.neurons import ExplicitState
from snlp_zoo.ops.lif import lif, lif_membranes

# Multiples of these, 1 / g and 1 / g^2 with g^3 = g + 1, spread evenly over the unit interval (Roberts 2018, R2).
_BY_TOKEN, _BY_CHANNEL = 0.7548776662, 0.5698402910


def draw(p: Tensor) -> Tensor:
    """Spikes {0, 1}, each with its own probability p and independent of all others; the gradient is that of p."""
    chance = torch.rand(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
    return _with_gradient((chance < p).to(p.dtype), p)


def _with_gradient(spikes: Tensor, p: Tensor) -> Tensor:
    return spikes + (p - p.detach())  # adds exactly 0


class BernoulliNode(ExplicitState):
    """Spikes {0, 1} with the probability that comes in, p in [0, 1]; the gradient is that of the expectation p.

    Where it draws, every element of every step has a random number of its own. Where it does not, p is integrated, with
    soft reset, from a potential that differs between tokens and channels and is evenly spread between rest and
    threshold. So T steps hold the sum of p, rounded up or down, just as often up as keeps the mean over tokens and
    channels, and a text's spikes depend on nothing but the text. A draw costs a random word and a comparison, as
    `energy` charges an integrate-and-fire neuron: two additions.

    Args:
        draws: "training" (in evaluation it integrates), "always" or "never".
        step_mode: "m" takes [T, ...], "s" one step.
    """

    spike_kind = "binary"  # as `energy.kinds` names alphabets
    beta = 0.0  # does not leak

    def __init__(self, draws: Literal["training", "always", "never"] = "training", step_mode: str = "m") -> None:
        super().__init__(v_reset=None, surrogate_function=None, step_mode=step_mode)
        self.draws = draws

    @property
    def drawing(self) -> bool:
        return self.draws == "always" or (self.draws == "training" and self.training)

    def run(
        self, p: Tensor, v: Tensor | None, carry_out: bool = True, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """p [T, ..., channels], v [..., channels] above the starting potential -> spikes, v.

        counts: the number of each token in its text, [B, N, 1], for its starting potential.
        """
        if self.drawing:
            return draw(p / self.v_threshold), v
        with torch.no_grad():
            start = self.start(p, counts)
            out = lif(p, start if v is None else v + start, **self._dynamics(), carry_out=carry_out)
        return _with_gradient(out.spikes, p), None if out.v is None else out.v - start

    def multi_step_functional_forward(self, inputs, states, **kwargs):
        spikes, v = self.run(inputs[0], states[0])
        return (spikes,), (v, *states[1:])

    @torch.no_grad()
    def start(self, current: Tensor, counts: Tensor | None = None) -> Tensor:
        """Potentials before step 0, of the shape of current without T."""
        channels = torch.arange(current.shape[-1], device=current.device) * _BY_CHANNEL
        phase = channels if counts is None else channels + counts * _BY_TOKEN
        return (phase.frac() * self.v_threshold).expand(current.shape[1:])

    def membranes(self, current: Tensor, v: Tensor | None, step: int = 0) -> Tensor:
        return lif_membranes(current, v, **self._dynamics())

    def reached(self, membranes: Tensor, step: int = 0) -> Tensor:
        return torch.ones_like(membranes, dtype=torch.bool)  # the gradient of an expectation passes everywhere

    def _dynamics(self) -> dict[str, Any]:
        return {"tau": float("inf"), "v_threshold": self.v_threshold, "v_reset": None, "decay_input": False}
