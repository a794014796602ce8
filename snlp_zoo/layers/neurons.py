"""The only door to SpikingJelly's neurons, and the neurons it lacks.

Every class here is a SpikingJelly neuron: step modes 's' and 'm', `functional.reset_net`, monitors and counters work on
it, and it fits into any SpikingJelly network. Three ways to call one:

    node(current)                    SpikingJelly's way: the membrane stays in node.v until `reset_net`
    node(current, from_rest=True)    our models' way: starts at rest, leaves no state behind, [T, ...] in and out
    node(current, state=membranes)   the same in pieces, for the LIF family: starts from membranes[node], or at rest if
                                     that is missing, and leaves the membrane there
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, cast

import torch
import torch.distributed as dist
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn

from snlp_zoo.ops import Surrogate, elastic_bispike, lif
from snlp_zoo.ops.bispike import Reset, elastic_bispike_measured

BaseNode = neuron.BaseNode  # what every spiking neuron is, ours and theirs

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


def _spike_dtype(current: Tensor) -> torch.dtype:
    """Under autocast spikes are written in its dtype at once: the product that follows would cast them."""
    device = current.device.type
    enabled = current.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else current.dtype


class _ExplicitState(neuron.BaseNode):
    """What all our nodes share: calls from rest, float32 membranes, single steps as multi-steps of length one."""

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

    def single_step_functional_forward(self, inputs, states, **kwargs):
        outputs, states = self.multi_step_functional_forward(tuple(x.unsqueeze(0) for x in inputs), states, **kwargs)
        return tuple(x.squeeze(0) for x in outputs), states


class _LIFBase(_ExplicitState):
    """The LIF family on `ops.lif`; subclasses say what tau is."""

    spike_kind = "binary"  # as `energy.kinds` names alphabets

    def _tau(self) -> float | Tensor:
        return self.tau

    def forward(self, *inputs, state: dict[nn.Module, Tensor] | None = None, **kwargs):
        if state is None:
            return super().forward(*inputs, **kwargs)
        if self.step_mode != "m":
            raise ValueError("state=... runs many time steps at once and needs step_mode='m'")
        spikes, v = self.run(inputs[0], state.get(self), **kwargs)
        state[self] = cast(Tensor, v)  # there is one: carry_out is the default
        return spikes

    def multi_step_functional_forward(self, inputs, states, **kwargs):
        spikes, v = self.run(inputs[0], states[0])
        return (spikes,), (v, *states[1:])

    def run(self, current: Tensor, v: Tensor | None, carry_out: bool = True) -> tuple[Tensor, Tensor | None]:
        return lif(
            current,
            v,
            tau=self._tau(),
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            decay_input=getattr(self, "decay_input", False),
            detach_reset=self.detach_reset,
            surrogate=_translate(self.surrogate_function),
            spike_dtype=_spike_dtype(current),
            carry_out=carry_out,
            backend=self.backend,
        )


class LIFNode(_LIFBase, neuron.LIFNode):
    """SpikingJelly's LIFNode on `ops.lif`: any backend, float32 membrane under half precision.

    Args:
        tau: membrane time constant in time steps, > 1.
        decay_input: divide the input by tau too.
        v_threshold, v_reset: unit of v; v_reset=None is the soft reset.
        surrogate_function: a name from `ops.SURROGATES`, an `ops.Surrogate`, or SpikingJelly's own object.
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
    ) -> None:
        super().__init__(
            tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq
        )
        self.backend = backend


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
    ) -> None:
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq)
        self.backend = backend

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
    ) -> None:
        super().__init__(
            init_tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq
        )
        self.backend = backend

    def _tau(self) -> Tensor:
        return 1 / self.w.sigmoid()


ALPHA_MODES = ("first_batch", "ema", "learned")


class ElasticBiSpike(_ExplicitState, neuron.BaseNode):
    """Ternary spikes {-alpha[t], 0, alpha[t]} whose amplitude follows the size of the membrane (SpikeLM).

    alpha[t] = firing_k * mean|m[t]|, one value per time step, so firing is about equally frequent whatever the input's
    scale. It is measured in training mode only, on real tokens, over all processes; at inference it never moves.

    Args:
        time_steps: T, the number of amplitudes.
        firing_k: amplitude in units of mean|m|; the firing threshold is half of it. Larger is sparser.
        beta: share of the membrane kept by a neuron that did not fire; 0 is memoryless.
        reset: "symmetric" or "reference" (the released recursion), see `ops.elastic_bispike`.
        alpha_mode: "first_batch" freezes the first measurement (as released), "ema" follows with `momentum`,
            "learned" starts from it and trains alpha by the LSQ gradient, scaled by 1 / sqrt(elements).
        momentum: share of the old amplitude kept per training batch in mode "ema".
        step_mode, store_v_seq, backend: as in `LIFNode`.
    State that is saved: `alpha` [T] (a parameter in mode "learned", else a buffer), `initialized` (has alpha been
        measured?) and `magnitude` [T] (mean|m[t]| of the last training batch).
    Source: Xing et al. 2024 (arXiv:2406.03287).
    """

    spike_kind = "ternary"  # as `energy.kinds` names alphabets

    def __init__(
        self,
        time_steps: int = 4,
        *,
        firing_k: float = 2.0,
        beta: float = 0.25,
        reset: Reset = "symmetric",
        alpha_mode: str = "ema",
        momentum: float = 0.99,
        step_mode: str = "m",
        store_v_seq: bool = False,
        backend: str = "auto",
    ) -> None:
        if alpha_mode not in ALPHA_MODES:
            raise ValueError(f"unknown alpha_mode {alpha_mode!r}; use one of {', '.join(ALPHA_MODES)}")
        if time_steps < 1 or not firing_k > 0:
            raise ValueError(f"time_steps must be >= 1 and firing_k > 0, got {time_steps} and {firing_k}")
        super().__init__(v_reset=None, surrogate_function=None, step_mode=step_mode, store_v_seq=store_v_seq)
        self.register_memory("step", 0)  # which alpha comes next in step mode 's'
        self.time_steps, self.firing_k, self.beta, self.alpha_mode = time_steps, firing_k, beta, alpha_mode
        self.reset_kind, self.momentum, self.backend = reset, momentum, backend
        alpha = torch.ones(time_steps)
        if alpha_mode == "learned":
            self.alpha = nn.Parameter(alpha)
        else:
            self.register_buffer("alpha", alpha)
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("magnitude", torch.zeros(time_steps))
        # what this process's last forward measured: the sum of |m[t]| for each step, and over which elements
        self.measured = torch.zeros(0)
        self.measured_over: tuple[Tensor | None, torch.Size] = None, torch.Size()

    def extra_repr(self) -> str:
        return (
            f"time_steps={self.time_steps}, firing_k={self.firing_k}, beta={self.beta}, reset={self.reset_kind}, "
            f"alpha_mode={self.alpha_mode}, step_mode={self.step_mode}"
        )

    def multi_step_functional_forward(self, inputs, states, *, mask: Tensor | None = None):
        """Amplitudes repeat every T steps. `mask` ([B, N], 1 for real tokens) keeps padding out of what is measured."""
        (current,), (v, step) = inputs, states
        spikes, v = self.run(current, v, step=step, mask=mask)
        return (spikes,), (v, (step + len(current)) % self.time_steps)

    def run(
        self, current: Tensor, v: Tensor | None, *, step: int = 0, mask: Tensor | None = None, carry_out: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Spikes and membrane of all steps of `current`, the first with amplitude `step`; v None starts at rest."""
        index = [(step + t) % self.time_steps for t in range(len(current))]
        options: dict[str, Any] = {"beta": self.beta, "reset": self.reset_kind, "backend": self.backend}
        if self.training and not self._is_initialized():
            self._initialize(current.detach(), v, index, mask, options)
        once = index == list(range(self.time_steps))  # the usual case: every amplitude in its order
        # a copy: a later update must not reach into this call's backward
        alpha = self.alpha.clone() if once else self.alpha[index]
        if self.alpha_mode == "learned":
            scale = current[0].numel() ** -0.5
            alpha = alpha * scale + (alpha * (1 - scale)).detach()
        options |= {"carry_out": carry_out, "spike_dtype": _spike_dtype(current)}
        if not (self.training and self.alpha_mode == "ema"):
            return elastic_bispike(current, v, alpha, **options)
        output, total = elastic_bispike_measured(current, v, alpha, mask, **options)
        if once:
            self.measured = total
        else:
            if len(self.measured) != self.time_steps or self.measured.device != total.device:
                self.measured = total.new_zeros(self.time_steps)
            self.measured[index] = total
        self.measured_over = mask, current.shape[1:]  # counted once for all neurons, in `amplitudes_updated`
        return output

    @torch.no_grad()
    def _initialize(
        self, current: Tensor, v: Tensor | None, index: list[int], mask: Tensor | None, options: dict
    ) -> None:
        """Set alpha[t] = firing_k mean|m[t]| one step after another: each amplitude shapes the next membrane."""
        for t, x in zip(index, current, strict=True):
            # any amplitude measures the same m; only the carried membrane needs the right one
            _, total = elastic_bispike_measured(x.unsqueeze(0), v, torch.ones_like(self.alpha[:1]), mask, **options)
            sums = torch.cat([total, _count(mask, current.shape[1:], total).view(1)])
            if dist.is_initialized():
                dist.all_reduce(sums)
            self.alpha[t] = self.firing_k * sums[0] / sums[1].clamp_min(1)
            _, v = elastic_bispike(x.unsqueeze(0), v, self.alpha[t : t + 1], **options)
        if index[-1] == self.time_steps - 1:
            self.initialized.fill_(True)
            self._known_initialized = True

    def _is_initialized(self) -> bool:
        if not self.__dict__.get("_known_initialized"):  # reads the buffer (on a GPU a wait) only until it is true
            self._known_initialized = bool(self.initialized)
        return self._known_initialized

    def train(self, mode: bool = True) -> "ElasticBiSpike":
        if not self.initialized.is_meta:
            self._is_initialized()  # look now: a look inside a compiled forward would split its graph
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._known_initialized = False
        super()._load_from_state_dict(*args, **kwargs)

    def multi_step_forward(self, x_seq: Tensor, *args, **kwargs) -> Tensor:
        with amplitudes_updated(self):
            return super().multi_step_forward(x_seq, *args, **kwargs)

    def single_step_forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        with amplitudes_updated(self, move=self.step == 0):
            return super().single_step_forward(x, *args, **kwargs)


def _count(mask: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    """How many elements one step of this shape measures, in the dtype and on the device of `like`."""
    if mask is None:
        return like.new_full((), shape.numel())
    return (mask.to(like.device).expand(shape[:-1]).sum() * shape[-1]).to(like)


@contextmanager
def amplitudes_updated(net: nn.Module, move: bool = True) -> Iterator[None]:
    """Around one forward of `net` in training mode: move every alpha (mode "ema") by what the last batch measured.

    Inside, neurons only measure. What they measured becomes `magnitude` on leaving, averaged over all processes in one
    message, and alpha moves when the next forward begins. So whatever is computed again for the backward of this batch
    (activation checkpointing) sees the same alpha, and its measurements, one process's own, are not kept.
    """
    nodes = [m for m in net.modules() if isinstance(m, ElasticBiSpike) and m.training and m.alpha_mode == "ema"]
    alike: dict[tuple[float, float], list[ElasticBiSpike]] = {}  # moved together: a launch per neuron is slow on a GPU
    for node in nodes if move else []:
        alike.setdefault((node.firing_k, node.momentum), []).append(node)
    for (firing_k, momentum), group in alike.items():
        alpha, magnitude = torch.cat([n.alpha for n in group]), torch.cat([n.magnitude for n in group])
        target = torch.where(magnitude > 0, firing_k * magnitude, alpha)  # 0: not measured yet
        _spread(alpha.lerp(target, 1 - momentum), [n.alpha for n in group])
    yield
    if not (nodes := [node for node in nodes if len(node.measured)]):
        return
    counts: dict[tuple, Tensor] = {}  # most neurons look at the same elements
    for node in nodes:
        mask, shape = node.measured_over
        over = id(mask), shape
        counts[over] = counts[over] if over in counts else _count(mask, shape, node.measured)
    per_step = [counts[id(n.measured_over[0]), n.measured_over[1]] for n in nodes for _ in range(n.time_steps)]
    sums = torch.stack([torch.cat([n.measured for n in nodes]), torch.stack(per_step)])
    if dist.is_initialized():
        dist.all_reduce(sums)
    _spread(sums[0] / sums[1].clamp_min(1), [n.magnitude for n in nodes])


def _spread(values: Tensor, into: list[Tensor]) -> None:
    """Consecutive pieces of `values` into these tensors, in one launch."""
    torch._foreach_copy_(into, values.to(into[0].dtype).split([len(x) for x in into]))


def set_surrogate_temperature(net: nn.Module, value: float) -> None:
    """Widen the surrogate of every neuron below `net` by this factor."""
    for module in net.modules():
        if isinstance(module, _LIFBase):
            module.surrogate_temperature = value


_NEURONS: dict[str, Callable[..., neuron.BaseNode]] = {
    "lif": LIFNode,
    "if": IFNode,
    "plif": ParametricLIFNode,
    "ternary": ElasticBiSpike,
}


def make_neuron(kind: str, **options) -> neuron.BaseNode:
    """A spiking neuron by name: "lif", "if", "plif" or "ternary" (elastic bi-spike); options as in its class.

    Raises:
        ValueError: unknown name.
        TypeError: an option the neuron does not have.
    """
    if kind not in _NEURONS:
        nearest = get_close_matches(kind, _NEURONS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown neuron {kind!r}, known are {', '.join(_NEURONS)}{hint}")
    return _NEURONS[kind](**options)
