"""Elastic bi-spike: the ternary neuron whose amplitude follows its membrane (SpikeLM)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from snlp_zoo.layers.neurons.base import ExplicitState
from snlp_zoo.ops.backend import product_dtype
from snlp_zoo.ops.bispike import Reset, elastic_bispike, elastic_bispike_measured

ALPHA_MODES = ("first_batch", "ema", "learned")


class ElasticBiSpike(ExplicitState, neuron.BaseNode):
    """Ternary spikes {-alpha[t], 0, alpha[t]} whose amplitude follows the size of the membrane (SpikeLM).

    alpha[t] = firing_k * mean|m[t]|, one value per time step, so firing is about equally frequent whatever the input's
    scale. It is measured in training mode only, on real tokens, over all processes; at inference it never moves.

    Args:
        time_steps: T, the number of amplitudes.
        firing_k: amplitude in units of mean|m|; the firing threshold is half of it. Larger is sparser.
        beta: share of the membrane kept by a neuron that did not fire; 0 is memoryless.
        reset: "symmetric" or "reference" (the released recursion), see `ops.elastic_bispike`.
        alpha_mode: "first_batch" freezes the first measurement (as released), "ema" follows with `momentum` (called
            with from_rest=True, within `amplitudes_updated` only), "learned" starts from it and trains alpha by the LSQ
            gradient, scaled by 1 / sqrt(elements).
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
        options |= {"carry_out": carry_out, "spike_dtype": product_dtype(current)}
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
    def membranes(self, current: Tensor, v: Tensor | None, step: int = 0) -> Tensor:
        charged = []
        for t, x in enumerate(current.to(torch.promote_types(current.dtype, torch.float32)), step):
            charged.append(x if v is None else v + x)
            alpha = self.alpha[t % self.time_steps].view(1)
            _, v = elastic_bispike(x.unsqueeze(0), v, alpha, beta=self.beta, reset=self.reset_kind)
        return torch.stack(charged)

    @torch.no_grad()
    def reached(self, membranes: Tensor, step: int = 0) -> Tensor:
        """Where the straight-through gradient passes: |m[t]| <= alpha[t]."""
        index = [(step + t) % self.time_steps for t in range(len(membranes))]
        return membranes.abs() <= self.alpha[index].view(-1, *(1,) * (membranes.ndim - 1))

    @torch.no_grad()
    def _initialize(
        self, current: Tensor, v: Tensor | None, index: list[int], mask: Tensor | None, options: dict
    ) -> None:
        """Set alpha[t] = firing_k mean|m[t]| one step after another: each amplitude shapes the next membrane.

        A step whose membranes are all 0 keeps its amplitude: one of 0 would never be learned, nor pass a gradient on.
        """
        for t, x in zip(index, current, strict=True):
            # any amplitude measures the same m; only the carried membrane needs the right one
            _, total = elastic_bispike_measured(x.unsqueeze(0), v, torch.ones_like(self.alpha[:1]), mask, **options)
            sums = torch.cat([total, _count(mask, current.shape[1:], total).view(1)])
            if dist.is_initialized():
                dist.all_reduce(sums)
            size = (self.firing_k * sums[0] / sums[1].clamp_min(1)).to(self.alpha)  # half precision may round it to 0
            self.alpha[t] = torch.where(size > 0, size, self.alpha[t])
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
        super()._load_from_state_dict(*args, **kwargs)
        self._known_initialized = False
        if not self.initialized.is_meta:
            self._is_initialized()  # look now: a forward that a CUDA graph captures must not

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
