"""Multi-step elastic bi-spiking on the fastest backend that supports the tensors."""

from typing import get_args

import torch
from torch import Tensor

from snlp_zoo.ops.backend import check_steps, resolve
from snlp_zoo.ops.bispike import kernel
from snlp_zoo.ops.bispike.analytic import elastic_bispike_analytic
from snlp_zoo.ops.bispike.reference import ALPHA_FLOOR, BiSpikeOutput, Reset, elastic_bispike_reference

__all__ = [
    "ALPHA_FLOOR",
    "BiSpikeOutput",
    "Reset",
    "elastic_bispike",
    "elastic_bispike_measured",
    "elastic_bispike_reference",
]
_SIGNS = (torch.int8, torch.float8_e4m3fn)  # spike_dtype for -1, 0, 1 without alpha


def elastic_bispike(
    current: Tensor,
    v_init: Tensor | None,
    alpha: Tensor,
    *,
    beta: float = 0.25,
    reset: Reset = "symmetric",
    spike_dtype: torch.dtype | None = None,
    carry_out: bool = True,
    backend: str = "auto",
) -> BiSpikeOutput:
    """Ternary spikes {-alpha, 0, alpha} with a leaky membrane over T steps; equations in `elastic_bispike_reference`.

    Args:
        current: input current, [T, ...], unit of v; float32, float64, bfloat16 or float16.
        v_init: membrane carried into step 0, already leaked and reset, [...] (current without T); None at rest.
        alpha: spike amplitude of each step, [T], unit of v, same dtype as the membrane; may require a gradient.
        beta: leak, the share of the membrane kept by a neuron that did not fire; 0 makes the neuron memoryless.
        reset: "symmetric", or "reference" for the released recursion, value by value.
        spike_dtype: dtype of the spikes, default current's. int8 and float8_e4m3fn hold -1, 0, 1 without alpha, and
            carry no gradient: for products in low precision.
        carry_out: False leaves v out (None), which saves writing it.
        backend: "auto", "torch", "triton" or "cupy".
    Returns:
        BiSpikeOutput: spikes [T, ...]; v [...], the membrane to carry into the next call (float32 for half inputs).
        One call over T steps equals two calls over its halves with the state passed on.
    Raises:
        ValueError: shapes disagree, T is 0, the reset is unknown, or a dtype does not fit.
        BackendError: the named backend cannot run here.
    """
    spikes, v, _ = _run(current, v_init, alpha, None, beta, reset, spike_dtype, False, carry_out, backend)
    return BiSpikeOutput(spikes, v)


def elastic_bispike_measured(
    current: Tensor,
    v_init: Tensor | None,
    alpha: Tensor,
    mask: Tensor | None,
    *,
    beta: float = 0.25,
    reset: Reset = "symmetric",
    spike_dtype: torch.dtype | None = None,
    carry_out: bool = True,
    backend: str = "auto",
) -> tuple[BiSpikeOutput, Tensor]:
    """`elastic_bispike`, and the sum of |m[t]| of each step, [T] float64, from the same pass: what calibrates alpha.

    Args:
        mask: not 0 for the positions that count; shape of current without T and width. None counts all.
    """
    spikes, v, total = _run(current, v_init, alpha, mask, beta, reset, spike_dtype, True, carry_out, backend)
    return BiSpikeOutput(spikes, v), total


def _check(current: Tensor, v_init: Tensor | None, alpha: Tensor, reset: str, spike_dtype: torch.dtype | None) -> None:
    check_steps("elastic_bispike", current, v_init)
    if alpha.shape != current.shape[:1]:
        raise ValueError(
            f"elastic_bispike: alpha needs one value per time step, shape ({current.shape[0]},), "
            f"got {tuple(alpha.shape)}; use torch.full(({current.shape[0]},), value) for one amplitude"
        )
    if reset not in get_args(Reset):
        raise ValueError(f"elastic_bispike: unknown reset {reset!r}; use one of {', '.join(get_args(Reset))}")
    if spike_dtype is not None and not (
        spike_dtype in _SIGNS or (spike_dtype.is_floating_point and spike_dtype.itemsize > 1)
    ):
        raise ValueError(
            f"elastic_bispike: spikes of both signs do not fit {spike_dtype}; use int8, float8_e4m3fn or a float dtype"
        )


def _run(
    current: Tensor,
    v_init: Tensor | None,
    alpha: Tensor,
    mask: Tensor | None,
    beta: float,
    reset: Reset,
    spike_dtype: torch.dtype | None,
    measured: bool,
    carry_out: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Check the arguments, choose the backend, keep the membrane in float32 or wider."""
    _check(current, v_init, alpha, reset, spike_dtype)
    chosen = resolve(backend, current, op="bispike")
    state = torch.promote_types(current.dtype, torch.float32)  # half precision would shift spikes over T
    alpha = alpha.to(current.device, state)
    v_init = None if v_init is None else v_init.to(state)
    if mask is not None:
        mask = mask.to(current.device).expand(current.shape[1:-1])
    with torch.set_grad_enabled(torch.is_grad_enabled() and spike_dtype not in _SIGNS):
        if chosen == "torch":
            if spike_dtype not in (None, *_SIGNS):  # alpha must not round to a narrower dtype than the spikes'
                current = current.to(torch.promote_types(current.dtype, spike_dtype))
            spikes, v, total = elastic_bispike_analytic(current, v_init, alpha, mask, beta, reset, measured, carry_out)
            spikes = (spikes.sign_() if spike_dtype in _SIGNS else spikes).to(spike_dtype or current.dtype)
        else:
            spikes, v, total, _ = kernel.bispike(
                current, v_init, alpha, mask, beta, reset, spike_dtype or current.dtype, measured, carry_out, chosen
            )
    return spikes, v if carry_out else None, total.detach()
