"""Codes of values as spikes: `encode` adds the spike-time axis T, `decode` takes it away. T is always axis 0.

    code                    values              spikes of z in [0, 1], T steps        levels
    Direct                  any                 the value itself, T times             -
    Unary                   [0, 1]              round(T z), first or spread           T + 1
    Bernoulli               [0, 1]              each with probability z               T + 1, at random
    Poisson                 [0, 1]              each with probability 1 - exp(-z)     T + 1, at random
    TimeToFirstSpike        [0, 1]              one, the earlier the larger z         T
    BitPlane                [0, 1]              the bits, highest first               2^T
    MultiLevel              [0, 1]              0 .. levels - 1 at each step          T (levels - 1) + 1, levels^T
    Signed                  [-1, 1]             another code's, times the sign        twice as many, less one

Every code has `encode(z) -> [T, ...]`, `decode(spikes) -> [...]` and `spike_kind`, its alphabet as `energy.kinds` names
them. decode(encode(z)) is z rounded to the nearest level (down, for TimeToFirstSpike) and exact on the levels; its
gradient is one, straight through, and that of the expected spikes for random codes.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from snlp_zoo.errors import lookup

EXACT = 2**24  # whole numbers float32 holds


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Coding:
    """What the codes share. Decoding is sum_t weight[t] spikes[t] / scale, in whole numbers, so it is exact.

    Args:
        time_steps: T, at least 1.
    Raises:
        ValueError: time_steps below 1; values out of range, or a spike train of another length, later.
    """

    spike_kind = "binary"
    lowest: ClassVar[float] = 0.0  # of the values; the highest is 1

    def __init__(self, time_steps: int) -> None:
        if time_steps < 1:
            raise ValueError(f"time_steps must be at least 1, got {time_steps}")
        self.time_steps = time_steps
        self.weights, self.scale = [1] * time_steps, time_steps

    def encode(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[...] in [0, 1] -> spikes [T, ...], of the same dtype.

        Args:
            generator: what random codes draw from, on the device of z; the others draw nothing.
        """
        self._check_range(z)
        spikes = self._spikes(z.detach(), generator).to(z.dtype)
        expected = self._expected(z)
        return spikes + (expected - expected.detach())

    def decode(self, spikes: Tensor) -> Tensor:
        """[T, ...] -> values [...]."""
        self._check_steps(spikes)
        x = _at_least_float32(spikes)
        weights = x.new_tensor(self.weights).view(-1, *(1,) * (x.ndim - 1))
        values = (weights * x).sum(0) / self.scale
        return values.to(spikes.dtype) if spikes.is_floating_point() else values

    def _spikes(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError

    def _expected(self, z: Tensor) -> Tensor:
        """What a spike counts as, to the gradient: equal at all steps, and decoded to z."""
        return z * (self.scale / sum(self.weights))

    def _steps(self, like: Tensor) -> Tensor:
        """1 .. T, shaped to broadcast with [T, ...]."""
        steps = torch.arange(1, self.time_steps + 1, dtype=like.dtype, device=like.device)
        return steps.view(-1, *(1,) * like.ndim)

    def _check_steps(self, spikes: Tensor) -> None:
        if len(spikes) != self.time_steps:
            raise ValueError(f"expected {self.time_steps} time steps on axis 0, got {len(spikes)}")

    def _check_range(self, z: Tensor) -> None:
        if not z.is_floating_point():
            raise ValueError(f"{type(self).__name__} codes floating-point values, got {z.dtype}; scale them to [0, 1]")
        least, most = (x.item() for x in torch.aminmax(z.detach())) if z.numel() else (0.0, 0.0)
        if not (self.lowest <= least and most <= 1):  # NaN is out of range too
            signed = "" if self.lowest else ", or use Signed for [-1, 1]"
            raise ValueError(
                f"{type(self).__name__} codes values in [{self.lowest:g}, 1], got {least:g} to {most:g}; "
                f"scale them first, or clamp them{signed}"
            )


class Direct(Coding):
    """Direct coding: the same real value at every step; the first neurons turn it into spikes."""

    spike_kind = "real"

    def encode(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[...] -> [T, ...], a view without a copy."""
        return z.unsqueeze(0).expand(self.time_steps, *z.shape)

    def decode(self, spikes: Tensor) -> Tensor:
        """[T, ...] -> [...], the mean over T."""
        self._check_steps(spikes)
        return torch.mean(spikes, dim=0)


class Bernoulli(Coding):
    """Each step spikes with probability z; decoded, the variance is z (1 - z) / T."""

    def _spikes(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        z = _at_least_float32(z)
        uniform = torch.rand((self.time_steps, *z.shape), dtype=z.dtype, device=z.device, generator=generator)
        return uniform < self._expected(z)


class Poisson(Bernoulli):
    """Bins of a Poisson process of rate z per bin, a spike where there was at least one event: p = 1 - exp(-z).

    Decoding is the maximum-likelihood rate in [0, 1], min(-log(1 - mean), 1): of large rates a little too small.
    """

    def decode(self, spikes: Tensor) -> Tensor:
        mean = super().decode(spikes)
        rate = -torch.log1p(-mean.detach().clamp_max(-torch.expm1(-torch.ones_like(mean))))
        return rate + (mean - mean.detach()) * rate.exp()  # the slope where it is cut at 1, too

    def _expected(self, z: Tensor) -> Tensor:
        return -torch.expm1(-z)


class TimeToFirstSpike(Coding):
    """One spike at step ceil((1 - z) (T - 1)), 0 the first; none where z is 0. A train's later spikes are ignored.

    With T = 1 every positive value is 1.
    """

    def __init__(self, time_steps: int) -> None:
        super().__init__(time_steps)
        self.scale = max(time_steps - 1, 1)
        self.weights = [self.scale - step for step in range(time_steps)]

    def decode(self, spikes: Tensor) -> Tensor:
        fired = spikes.detach() != 0
        later = fired & (fired.cumsum(0) > 1)
        return super().decode(spikes.masked_fill(later, 0))

    def _spikes(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        last = self.time_steps - 1
        value = _at_least_float32(z) * last * (1 + torch.finfo(z.dtype).eps)  # z may be a rounded level
        step = last - value.floor().clamp_max(last)
        return (self._steps(step) - 1 == step) & (z > 0)


class MultiLevel(Coding):
    """Steps of several levels: 0 .. levels - 1 spikes at each.

    Args:
        levels: at least 2.
        positional: the digits of z in base `levels`, the highest first (after s steps the error is below levels^-s);
            else equal steps, as even as can be.
    Raises:
        ValueError: besides the shared ones, levels below 2, or more values than float32 tells apart.
    """

    spike_kind = "integer"

    def __init__(self, time_steps: int, levels: int = 4, positional: bool = False) -> None:
        super().__init__(time_steps)
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.levels, self.positional = levels, positional
        self.scale = levels**time_steps - 1 if positional else time_steps * (levels - 1)
        if self.scale >= EXACT:
            raise ValueError(
                f"{type(self).__name__}: {time_steps} steps of {levels} levels are {self.scale + 1} values, float32 "
                f"tells {EXACT} apart; use fewer steps or levels"
            )
        if positional:
            self.weights = [levels ** (time_steps - 1 - step) for step in range(time_steps)]

    def _spikes(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        n = (_at_least_float32(z) * self.scale).round()
        if not self.positional:
            return self._spread(n.long())
        weights = torch.tensor(self.weights, device=z.device).view(-1, *(1,) * z.ndim)
        return n.long() // weights % self.levels

    def _spread(self, n: Tensor) -> Tensor:
        """n spikes over T steps, evenly: each step completes its share of n."""
        steps = self._steps(n)
        return steps * n // self.time_steps - (steps - 1) * n // self.time_steps


class Unary(MultiLevel):
    """Rate code: n = round(T z) spikes, decoded by their mean.

    Args:
        spread: as evenly as can be over the steps; else the first n steps.
    """

    spike_kind = "binary"

    def __init__(self, time_steps: int, spread: bool = False) -> None:
        super().__init__(time_steps, levels=2)
        self.spread = spread

    def _spread(self, n: Tensor) -> Tensor:
        return super()._spread(n) if self.spread else self._steps(n) <= n


class BitPlane(MultiLevel):
    """Positional code: the T bits of round(z (2^T - 1)), the highest first."""

    spike_kind = "binary"

    def __init__(self, time_steps: int) -> None:
        super().__init__(time_steps, levels=2, positional=True)


class Signed(Coding):
    """Values in [-1, 1]: the spikes of |z| in another code, times the sign of z; for binary codes {-1, 0, 1}.

    The pair of polarities (x+, x-) is (spikes.clamp_min(0), -spikes.clamp_max(0)): at most one of the two spikes.

    Args:
        inner: name of the other code.
        options: its options.
    """

    lowest = -1.0

    def __init__(self, time_steps: int, inner: str = "unary", **options) -> None:
        super().__init__(time_steps)
        self.inner = make_coding(inner, time_steps, **options)
        self.spike_kind = "ternary" if self.inner.spike_kind == "binary" else self.inner.spike_kind

    def encode(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[...] in [-1, 1] -> [T, ...]; `generator` as in `Coding`."""
        self._check_range(z)
        sign = self._sign(z)
        return sign * self.inner.encode(z * sign, generator)

    def decode(self, spikes: Tensor) -> Tensor:
        """[T, ...] -> [...]."""
        sign = self._sign(spikes.sum(0))
        return sign * self.inner.decode(spikes * sign)

    @staticmethod
    def _sign(x: Tensor) -> Tensor:
        """-1 or 1, never 0: a gradient passes at 0 too."""
        return torch.where(x < 0, -torch.ones_like(x), torch.ones_like(x))


_CODINGS: dict[str, Callable[..., Coding]] = {
    "direct": Direct,
    "unary": Unary,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "time_to_first_spike": TimeToFirstSpike,
    "bit_plane": BitPlane,
    "multi_level": MultiLevel,
    "signed": Signed,
}


def make_coding(name: str, time_steps: int, **options) -> Coding:
    """A code by name: direct, unary, bernoulli, poisson, time_to_first_spike, bit_plane, multi_level or signed.

    Args:
        options: as in its class.
    Raises:
        ValueError: unknown name, or what its class raises.
        TypeError: an option the code does not have.
    """
    return lookup("coding", name, _CODINGS)(time_steps, **options)


def last_membrane(current: Tensor, leak: float = 1.0) -> Tensor:
    """Readout of a neuron that never fires: v[t] = leak v[t-1] + current[t], the last one.

    Args:
        current: [T, ...], float32 inside.
        leak: share of the membrane kept from step to step, in (0, 1].
    Returns:
        [...], unit of current; of whole numbers or bool, as spikes may be, float32.
    """
    if not 0 < leak <= 1:
        raise ValueError(f"leak must be in (0, 1], got {leak}; 1 keeps the whole membrane")
    x = _at_least_float32(current)
    powers = leak ** torch.arange(len(x) - 1, -1, -1, dtype=x.dtype, device=x.device)
    v = (powers.view(-1, *(1,) * (x.ndim - 1)) * x).sum(0)
    return v.to(current.dtype) if current.is_floating_point() else v


def count_and_residual(spikes: Tensor, v: Tensor, v_threshold: float = 1.0) -> Tensor:
    """v_threshold times the number of spikes, plus the membrane that is left: all a soft-reset IF neuron received.

    Args:
        spikes: [T, ...] in {0, 1}.
        v: membrane after the last step, [...], from rest.
        v_threshold: unit of v.
    Returns:
        [...], the sum of the neuron's input over T: exact, where the mean rate alone is off by up to v_threshold.
    """
    return (v_threshold * _at_least_float32(spikes).sum(0) + v).to(v.dtype)
