"""The ternary LIF neuron with an amplitude of its own and two thresholds."""

from collections.abc import Sequence
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from snlp_zoo.layers.neurons.base import Surrogated
from snlp_zoo.ops.backend import product_dtype
from snlp_zoo.ops.ternary_lif import ternary_lif, ternary_membranes

Threshold = float | Sequence[float] | Tensor


class TernaryLIFNode(Surrogated, neuron.BaseNode):
    """Spikes {-a, 0, a}: a leaky membrane with soft reset that fires at +v_threshold and at -v_threshold_negative.

    The membrane knows nothing of a: it is reset by its thresholds, and fires at equality (`ops.ternary_lif`). The
    output is a s, so a is differentiated exactly, and the membrane through the surrogate at both thresholds.
    The amplitude is used as it is, without a floor. At 0 the layer is silent and its input gets no gradient, but the
    amplitude still does and leaves 0 again; below 0 the alphabet is the same, with the signs exchanged.

    Args:
        tau, decay_input, surrogate_function, learnable_surrogate, detach_reset, step_mode, store_v_seq: see `LIFNode`.
        v_threshold: positive, unit of v; a number, or one per channel, [channels].
        v_threshold_negative: the same for negative spikes, as a magnitude; None: like v_threshold.
        amplitude: where a starts, positive.
        learn_amplitude: a is a parameter; otherwise a buffer.
        channels: D, the last axis: an amplitude for each, [D] instead of [1].
        time_steps: T: an amplitude for each step, [T], or [T, D] with channels; they repeat every T steps.
        backend: "auto" or "torch".
    State that is saved: `amplitude`, thresholds per channel, and `surrogate_log_alpha` if the surrogate is learnable.
    Raises:
        ValueError: amplitude or a threshold is not positive, thresholds do not fit `channels`.
    `layers.fold_amplitude` absorbs a into the weights behind it.
    """

    spike_kind = "ternary"  # as `energy.kinds` names alphabets
    amplitude: Tensor

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: Threshold = 1.0,
        v_threshold_negative: Threshold | None = None,
        amplitude: float = 1.0,
        learn_amplitude: bool = True,
        channels: int | None = None,
        time_steps: int | None = None,
        surrogate_function="atan",
        learnable_surrogate: bool = False,
        detach_reset: bool = True,
        step_mode: str = "m",
        store_v_seq: bool = False,
        backend: str = "auto",
    ) -> None:
        if not amplitude > 0:
            raise ValueError(f"a ternary neuron's amplitude starts positive, got {amplitude}")
        if any(size is not None and size < 1 for size in (channels, time_steps)):
            raise ValueError(f"channels and time_steps are at least 1, got {channels} and {time_steps}")
        super().__init__(1.0, None, surrogate_function, detach_reset, step_mode, store_v_seq)
        self.register_memory("step", 0)  # which amplitude comes next in step mode 's'
        self.tau, self.decay_input, self.backend = tau, decay_input, backend
        self.channels, self.time_steps = channels, time_steps
        self._set_threshold("v_threshold", v_threshold)
        self._set_threshold("v_threshold_negative", v_threshold_negative)
        start = torch.full([size for size in (time_steps, channels) if size] or [1], float(amplitude))
        if learn_amplitude:
            self.amplitude = nn.Parameter(start)
        else:
            self.register_buffer("amplitude", start)
        self.learn_surrogate(learnable_surrogate)
        self.fresh["amplitude"] = float(amplitude)

    def _set_threshold(self, name: str, value: Threshold | None) -> None:
        if value is None or isinstance(value, int | float):
            if value is not None and not value > 0:
                raise ValueError(f"{name} is a magnitude and must be positive, got {value}")
            setattr(self, name, value)
            return
        per_channel = torch.as_tensor(value, dtype=torch.float32).clone()
        if per_channel.shape != (self.channels,):
            raise ValueError(f"{name} has shape {tuple(per_channel.shape)}, but channels is {self.channels}")
        if not (per_channel > 0).all():
            raise ValueError(f"{name} is a magnitude and must be positive, got {per_channel.min():g}")
        self.__dict__.pop(name, None)  # SpikingJelly's own number
        self.register_buffer(name, per_channel)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, tau={self.tau}, v_threshold_negative={self.v_threshold_negative}, "
            f"channels={self.channels}, time_steps={self.time_steps}"
        )

    def thresholds(self) -> tuple[float | Tensor, float | Tensor]:
        """The positive and the negative threshold, both as magnitudes."""
        negative = self.v_threshold if self.v_threshold_negative is None else self.v_threshold_negative
        return self.v_threshold, negative

    def _dynamics(self) -> dict[str, Any]:
        up, down = self.thresholds()
        return {
            "tau": self.tau, "v_threshold": up, "v_threshold_negative": down, "decay_input": self.decay_input
        }  # fmt: skip

    def multi_step_functional_forward(self, inputs, states, **kwargs):
        (current,), (v, step) = inputs, states
        spikes, v = self.run(current, v, step=step)
        return (spikes,), (v, (step + len(current)) % (self.time_steps or 1))

    def forward(self, *inputs, state: dict[nn.Module, Tensor] | None = None, **kwargs):
        if state is not None and self.time_steps:
            raise ValueError(
                "state=... does not say which amplitude comes next; use from_rest=True, or time_steps=None"
            )
        return super().forward(*inputs, state=state, **kwargs)

    def run(
        self, current: Tensor, v: Tensor | None, carry_out: bool = True, step: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Spikes and membrane of all steps of `current`, the first with amplitude `step`; v None starts at rest."""
        how = {"detach_reset": self.detach_reset, "surrogate": self.effective_surrogate(), "backend": self.backend}
        signs, v = ternary_lif(current, v, **self._dynamics(), **how)
        return (signs * self._aligned(signs, step)).to(product_dtype(current)), v

    def _aligned(self, spikes: Tensor, step: int) -> Tensor:
        """The amplitude, of a shape that multiplies these spikes [T, ...] the first of which is of this time step."""
        if not self.time_steps:
            return self.amplitude
        amplitude = self.amplitude[[(step + t) % self.time_steps for t in range(len(spikes))]]
        return amplitude.view(len(spikes), *(1,) * (spikes.ndim - 1 - bool(self.channels)), *amplitude.shape[1:])

    def signs(self, spikes: Tensor, step: int = 0) -> Tensor:
        """Spikes as they are, with a gradient that does not reach the amplitude."""
        amplitude = self._aligned(spikes, step)
        if not amplitude.requires_grad:
            return spikes
        signs = spikes.detach().sign() * amplitude.detach().sign()
        return spikes - (signs * (amplitude - amplitude.detach())).to(spikes.dtype)

    def membranes(self, current: Tensor, v: Tensor | None, step: int = 0) -> Tensor:
        return ternary_membranes(current, v, **self._dynamics())

    def distances(self, membranes: Tensor) -> list[Tensor]:
        up, down = self.thresholds()
        return [membranes - up, -membranes - down]
