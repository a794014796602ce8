"""Leaky integrate-and-fire with two thresholds and signed spikes: a plain loop over T, on any device."""

import torch
from torch import Tensor

from snlp_zoo.ops.backend import check_steps, resolve
from snlp_zoo.ops.lif.reference import LIFOutput
from snlp_zoo.ops.surrogates import Surrogate, as_surrogate


def ternary_lif(
    current: Tensor,
    v_init: Tensor | None,
    *,
    tau: float,
    v_threshold: float | Tensor,
    v_threshold_negative: float | Tensor,
    decay_input: bool = True,
    detach_reset: bool = True,
    surrogate: str | Surrogate = "atan",
    backend: str = "auto",
) -> LIFOutput:
    """Signed spikes of a leaky membrane with soft reset, autograd through every step.

        h[t] = v[t-1] + (current[t] - v[t-1]) / tau           with decay_input
        h[t] = v[t-1] - v[t-1] / tau + current[t]             without
        s[t] = H(h[t] - v_threshold) - H(-h[t] - v_threshold_negative)
        v[t] = h[t] - v_threshold [s[t] > 0] + v_threshold_negative [s[t] < 0]

    H(0) = 1: a membrane exactly at either threshold fires, as in the LIF family. Backward, each H has the surrogate's
    derivative g, so ds/dh = g(h - v_threshold) + g(-h - v_threshold_negative).

    Args:
        current: input current, [T, ...], unit of v; float32, float64, bfloat16 or float16.
        v_init: membrane potential before step 0, [...] (current without T); None at rest, 0.
        tau: membrane time constant in steps, >= 1.
        v_threshold, v_threshold_negative: positive magnitudes; numbers, or tensors that broadcast to current without T.
        decay_input, detach_reset, surrogate: as in `lif`.
        backend: "auto" or "torch"; there are no kernels.
    Returns:
        LIFOutput: s [T, ...] in {-1, 0, 1} and v [...] after step T-1, both at least float32.
    Raises:
        ValueError: shapes disagree, T is 0, tau < 1, or current is not float.
        BackendError: another backend was named.
    """
    resolve(backend, current, op="ternary_lif")
    spikes, _, v = _steps(
        current, v_init, tau, v_threshold, v_threshold_negative, decay_input, detach_reset, as_surrogate(surrogate)
    )
    return LIFOutput(torch.stack(spikes), v)


@torch.no_grad()
def ternary_membranes(
    current: Tensor,
    v_init: Tensor | None,
    *,
    tau: float,
    v_threshold: float | Tensor,
    v_threshold_negative: float | Tensor,
    decay_input: bool,
) -> Tensor:
    """h[t] of `ternary_lif`, the membrane of every step before it fires: [T, ...]."""
    how = tau, v_threshold, v_threshold_negative, decay_input, True, Surrogate()
    return torch.stack(_steps(current, v_init, *how)[1])


def _steps(
    current: Tensor,
    v: Tensor | None,
    tau: float,
    v_threshold: float | Tensor,
    v_threshold_negative: float | Tensor,
    decay_input: bool,
    detach_reset: bool,
    surrogate: Surrogate,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """s and h of every step, and the last v."""
    check_steps("ternary_lif", current, v)
    if not tau >= 1:
        raise ValueError(f"ternary_lif: tau is in time steps and must be at least 1, got {tau}")
    current = current.to(torch.promote_types(current.dtype, torch.float32))  # half precision would shift spikes over T
    v = torch.zeros_like(current[0]) if v is None else v.to(current.dtype)
    spikes, charged = [], []
    for current_t in current:
        h = v + (current_t - v) / tau if decay_input else v - v / tau + current_t
        up, down = surrogate(h - v_threshold), surrogate(-h - v_threshold_negative)
        fired_up, fired_down = (up.detach(), down.detach()) if detach_reset else (up, down)
        v = h - v_threshold * fired_up + v_threshold_negative * fired_down
        spikes.append(up - down)
        charged.append(h)
    return spikes, charged, v
