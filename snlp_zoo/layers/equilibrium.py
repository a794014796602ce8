"""Spiking networks at equilibrium: average spiking rates, their steady state, and training through it (SpikingBERT).

A network of integrate-and-fire neurons is written once, with `fire(node, current)` wherever a neuron sits:

    Spikes       runs the spiking network itself, a chunk of time steps at a time; no gradient, memory bounded in T
    SteadyState  runs the network its rates settle to, differentiably; no time at all

`rate_with_gradient` joins the two: the value is the measured rate, the gradient that of the steady state.
Shapes: T, B, N, D as in ops/lif/reference.py; a network sees [T, B, N, D] under Spikes, [B, N, D] under SteadyState.
Source: Bal and Sengupta 2024 (arXiv:2308.10873).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from snlp_zoo.layers.firing import FiringRates
from snlp_zoo.layers.neurons import IFNode, LIFNode

CHUNK = 8  # time steps simulated together: enough to fill a GPU, and no more memory for a longer T


def rate_neuron(v_threshold: float = 1.0, leak: float = 1.0, backend: str = "auto") -> IFNode | LIFNode:
    """The neuron whose average rate settles: soft reset, input not scaled, membrane times `leak` at each step.

        v[t] = leak u[t-1] + current[t];   s[t] = H(v[t] - v_threshold);   u[t] = v[t] - v_threshold s[t]

    Args:
        v_threshold: unit of v, positive.
        leak: share of the membrane kept from step to step, in (0, 1]; 1 is integrate-and-fire.
        backend: as in `ops.lif`.
    Raises:
        ValueError: a value out of its range.
    """
    if not 0 < leak <= 1:
        raise ValueError(f"leak must be in (0, 1], got {leak}; 1 keeps the whole membrane")
    if not v_threshold > 0:
        raise ValueError(f"v_threshold must be positive, got {v_threshold}")
    if leak == 1:
        return IFNode(v_threshold=v_threshold, v_reset=None, backend=backend)
    return LIFNode(tau=1 / (1 - leak), decay_input=False, v_threshold=v_threshold, v_reset=None, backend=backend)


class AverageRate:
    """a[T] = sum_t leak^(T-t) s[t] / sum_t leak^(T-t), added up chunk by chunk in float32; leak 1 is the plain mean.

    With the input's rate weighted alike, a linear current f and leak g this is exact for every T:
        v_threshold a[T] = f(a_in[T]) - u[T] / sum_t g^(T-t)
    """

    def __init__(self, leak: float = 1.0) -> None:
        self.leak, self.total, self.weight = leak, torch.zeros(()), 0.0

    def add(self, spikes: Tensor) -> None:
        """spikes [T, ...]: the next steps."""
        steps, state = len(spikes), torch.promote_types(spikes.dtype, torch.float32)
        if not self.weight:  # made on the device: a copy to a GPU cannot be captured in a graph
            self.total = spikes.new_zeros((), dtype=state)
        if self.leak == 1:  # the powers below would be right too, but the sum must be exact in integers
            self.total = self.total.to(spikes.device, state) + spikes.sum(0, dtype=state)
            self.weight += steps
            return
        powers = self.leak ** torch.arange(steps - 1, -1, -1, device=spikes.device, dtype=state)
        self.total = self.total.to(powers) * self.leak**steps + torch.tensordot(powers, spikes.to(state), 1)
        self.weight = self.weight * self.leak**steps + sum(self.leak**k for k in range(steps))

    @property
    def value(self) -> Tensor:
        """[...], in [0, 1] for spikes in {0, 1}."""
        return self.total / self.weight


def average_rate(spikes: Tensor, leak: float = 1.0) -> Tensor:
    """`AverageRate` of a whole spike train [T, ...] -> [...]."""
    rate = AverageRate(leak)
    rate.add(spikes)
    return rate.value


def steady_rate(current: Tensor, v_threshold: float) -> Tensor:
    """The rate at which input and reset balance: clip(current / v_threshold, 0, 1)."""
    return (current / v_threshold).clamp(0, 1)


class _Pass:
    """One run through a network: how its neurons fire, and which dropout masks it sees."""

    time_axes = 0

    def __init__(self, masks: dict[nn.Module, Tensor]) -> None:
        self.masks = masks

    def drop(self, site: nn.Dropout, x: Tensor) -> Tensor:
        """Dropout with one mask for all steps and both passes, so that they are the same network."""
        if not site.training or site.p == 0:
            return x
        if site not in self.masks:
            self.masks[site] = dropout(torch.ones_like(x[0] if self.time_axes else x), site.p)
        return x * self.masks[site]


class Spikes(_Pass):
    """The spiking network; membranes live here from chunk to chunk, and nowhere afterwards.

    Args:
        mask: attention_mask [B, N], what counts in `rates`.
        v_init: every membrane before the first step, in units of v_threshold. From 0 the rate of a constant current
            rounds down to the next of T + 1 levels, from 0.5 it rounds to the nearest (Bu et al. 2022,
            arXiv:2202.01440).
        names: neuron -> name of its site; given, `rates` counts how often each fires on real tokens.
    """

    time_axes = 1

    def __init__(
        self,
        masks: dict[nn.Module, Tensor],
        mask: Tensor,
        v_init: float = 0.0,
        names: dict[nn.Module, str] | None = None,
    ) -> None:
        super().__init__(masks)
        self.v_init = v_init
        self.mask, self.names, self.rates = mask, names, FiringRates()
        self.membranes: dict[nn.Module, Tensor] = {}

    def __call__(self, node: IFNode | LIFNode, current: Tensor) -> Tensor:
        """current [T, B, N, D] -> spikes [T, B, N, D]."""
        if self.v_init and node not in self.membranes:
            start = current[0].to(torch.promote_types(current.dtype, torch.float32))
            self.membranes[node] = torch.full_like(start, self.v_init * node.v_threshold)
        spikes = node(current, state=self.membranes)
        if self.names is not None:
            self.rates.add(self.names[node], spikes, self.mask)
        return spikes

    def keep(self, rows: Tensor) -> None:
        """Go on with these examples only, bool [B]."""
        self.mask = self.mask[rows]
        self.membranes = {node: v[rows] for node, v in self.membranes.items()}
        self.masks = {site: mask[rows] for site, mask in self.masks.items()}


class SteadyState(_Pass):
    """The network of steady rates."""

    def __call__(self, node: IFNode | LIFNode, current: Tensor) -> Tensor:
        """current [B, N, D] -> rates [B, N, D]."""
        return steady_rate(current, node.v_threshold)


class _RateWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rate, steady):
        return rate.view_as(rate)

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def rate_with_gradient(rate: Tensor, steady: Tensor) -> Tensor:
    """A tensor with the value of the measured rate and the gradient of the steady rate."""
    return _RateWithGradient.apply(rate.to(steady.dtype), steady)


class Settling:
    """When a prediction has settled: no entry moved by more than `tolerance` over the last WINDOW steps.

    Args:
        tolerance: in units of what `update` gets (probabilities, or values for regression), positive.
    """

    WINDOW = 4

    def __init__(self, tolerance: float) -> None:
        if not tolerance > 0:
            raise ValueError(f"early_exit must be a positive tolerance, got {tolerance}")
        self.tolerance = tolerance
        self.seen: list[Tensor] = []

    def update(self, prediction: Tensor, fired: Tensor) -> Tensor:
        """prediction [B, ...] -> which have settled, bool [B]; none has before its last layer fired (bool [B])."""
        self.seen = [*self.seen[-self.WINDOW :], prediction]
        if len(self.seen) <= self.WINDOW:
            return torch.zeros_like(fired)
        history = torch.stack(self.seen).flatten(2)
        return ((history.amax(0) - history.amin(0)).amax(1) <= self.tolerance) & fired

    def keep(self, rows: Tensor) -> None:
        self.seen = [prediction[rows] for prediction in self.seen]
