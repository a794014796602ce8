"""What all our neurons share: explicit state, and surrogates that may learn their steepness."""

import math
from dataclasses import replace
from typing import cast

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn

from snlp_zoo.ops.surrogates import Surrogate

BaseNode = neuron.BaseNode  # what every spiking neuron is, ours and theirs
# share of its peak below which a surrogate's derivative counts as none: bfloat16 tells numbers apart by 0.4 to 0.8 %,
# so that a smaller share is lost where it is added to a whole one
NEGLIGIBLE = 0.01

# SpikingJelly surrogate class -> our name for the same derivative, with the same meaning of alpha
_SURROGATE_NAMES: dict[type, str] = {
    surrogate.ATan: "atan",
    surrogate.Sigmoid: "sigmoid",
    surrogate.PiecewiseQuadratic: "triangular",
    surrogate.Rect: "rect",
    surrogate.DeterministicPass: "ste",
}


def _translate(function: "str | Surrogate | surrogate.SurrogateFunctionBase") -> Surrogate:
    if isinstance(function, Surrogate):
        return function
    if isinstance(function, str):
        return Surrogate(function)
    if (name := _SURROGATE_NAMES.get(type(function))) is None:
        known = ", ".join(sorted(cls.__name__ for cls in _SURROGATE_NAMES))
        raise ValueError(f"no counterpart of SpikingJelly's {type(function).__name__}; use one of {known}")
    return Surrogate(name, getattr(function, "alpha", None))


class ExplicitState(neuron.BaseNode):
    """What all our nodes share: calls from rest, float32 membranes, single steps as multi-steps of length one."""

    over_tokens = False  # True: axis 0 of a call is the tokens of a text, [N, B, D], over which the membrane walks

    def forward(self, *inputs, from_rest: bool = False, **kwargs):
        if not from_rest:
            return super().forward(*inputs, **kwargs)
        if self.step_mode != "m":
            raise ValueError("from_rest=True runs all time steps at once and needs step_mode='m'")
        return self.run(inputs[0], None, carry_out=False, **kwargs)[0]

    def materialize_states(self, inputs, states, step_mode):
        x, v = (inputs[0][0] if step_mode == "m" else inputs[0]), states[0]
        dtype = torch.promote_types(x.dtype, torch.float32)  # a bfloat16 membrane would shift spikes over T
        if isinstance(v, Tensor) and v.shape == x.shape:
            return (v.to(x.device, dtype), *states[1:])
        rest = self.get_reset_value("v") if isinstance(v, Tensor) else v
        return (torch.full(x.shape, rest, dtype=dtype, device=x.device), *states[1:])

    def start(self, current: Tensor, counts: Tensor | None = None) -> Tensor | None:
        """Membrane before step 0 of a call from rest, [...]; None: v_reset, or 0 without one."""
        return None

    def membranes(self, current: Tensor, v: Tensor | None, step: int = 0) -> Tensor:
        """Membrane potential of every step before it fires, [T, ...], computed anew by the reference, no gradient.

        Args:
            current, v: what the neuron got, [T, ...], and its membrane before that, [...] (None: at rest).
            step: which of the neuron's time steps comes first, for neurons that tell them apart.
        """
        raise NotImplementedError

    def reached(self, membranes: Tensor, step: int = 0) -> Tensor:
        """Where the gradient of firing is not negligible: bool, [T, ...] like membranes."""
        raise NotImplementedError

    def single_step_functional_forward(self, inputs, states, **kwargs):
        outputs, states = self.multi_step_functional_forward(tuple(x.unsqueeze(0) for x in inputs), states, **kwargs)
        return tuple(x.squeeze(0) for x in outputs), states


def as_recorded(node: nn.Module, x: Tensor) -> Tensor:
    """What a neuron took or gave as [T, B, N, D]; T = 1 of one that walks over tokens."""
    return x.transpose(0, 1).unsqueeze(0) if getattr(node, "over_tokens", False) else x


class Surrogated(ExplicitState):
    """A neuron with a surrogate, whose steepness may be learned and annealed, and with `state=`.

    State that is saved, if the surrogate is learnable: `surrogate_log_alpha` [1]; alpha = exp of it stays positive.
    `fresh` holds where saved state starts: name -> value, for what loads a checkpoint without it.
    `surrogate_temperature` divides alpha and is not saved: it belongs to the training schedule.
    """

    surrogate_log_alpha: Tensor | None

    def learn_surrogate(self, learnable: bool) -> None:
        """Called once by a subclass's __init__: learnable makes the steepness a parameter."""
        self.surrogate_temperature = 1.0
        alpha = _translate(self.surrogate_function).alpha if learnable else None
        if isinstance(alpha, Tensor):
            raise ValueError("learnable_surrogate=True starts from a number, but the surrogate's alpha is a tensor")
        self.fresh: dict[str, float] = {} if alpha is None else {"surrogate_log_alpha": math.log(alpha)}
        start = None if alpha is None else nn.Parameter(torch.tensor([math.log(alpha)]))
        self.register_parameter("surrogate_log_alpha", start)

    def effective_surrogate(self) -> Surrogate:
        """The surrogate in use: learned steepness (if any) divided by the temperature."""
        chosen = _translate(self.surrogate_function)
        learned, temperature = self.surrogate_log_alpha, self.surrogate_temperature
        if learned is None and temperature == 1:
            return chosen
        alpha = cast(float | Tensor, chosen.alpha) if learned is None else learned.exp().reshape(())
        return replace(chosen, alpha=alpha / temperature)

    def distances(self, membranes: Tensor) -> list[Tensor]:
        """What the surrogate is given for these membranes, one tensor for each threshold."""
        raise NotImplementedError

    @torch.no_grad()
    def reached(self, membranes: Tensor, step: int = 0) -> Tensor:
        """Where the surrogate's derivative, at any of the thresholds, is at least NEGLIGIBLE times its peak."""
        surrogate = self.effective_surrogate()
        least = NEGLIGIBLE * surrogate.derivative(membranes.new_zeros(()))
        return torch.stack([surrogate.derivative(z) >= least for z in self.distances(membranes)]).any(0)

    def forward(self, *inputs, state: dict[nn.Module, Tensor] | None = None, **kwargs):
        if state is None:
            return super().forward(*inputs, **kwargs)
        if self.step_mode != "m":
            raise ValueError("state=... runs many time steps at once and needs step_mode='m'")
        spikes, state[self] = self.run(inputs[0], state.get(self), **kwargs)
        return spikes


def set_surrogate_temperature(net: nn.Module, value: float) -> None:
    """Divide the steepness of every surrogate below `net` by `value`: above 1 wider, and less steep.

    The straight-through "ste" has no width; the temperature lowers its height. `torch.compile` takes a learned
    steepness at any temperature, but compiles one that is a number anew for every temperature (and gives up after 8).

    Raises:
        ValueError: value is not positive and finite.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"a surrogate's temperature is positive, got {value}")
    for node in net.modules():
        if isinstance(node, Surrogated):
            node.surrogate_temperature = float(value)
