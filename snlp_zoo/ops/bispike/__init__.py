"""Multi-step elastic bi-spiking on the fastest backend that supports the tensors."""

from typing import get_args

import torch
from torch import Tensor

from snlp_zoo.ops.backend import resolve
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


def elastic_bispike(
    current: Tensor,
    v_init: Tensor,
    alpha: Tensor,
    *,
    beta: float = 0.25,
    reset: Reset = "symmetric",
    backend: str = "auto",
) -> BiSpikeOutput:
    """Ternary spikes {-alpha, 0, alpha} with a leaky membrane over T steps; equations in `elastic_bispike_reference`.

    Args:
        current: input current, [T, ...], unit of v; float32, float64, bfloat16 or float16.
        v_init: membrane carried into step 0, already leaked and reset, [...] (current without T); zeros at rest.
        alpha: spike amplitude of each step, [T], unit of v, same dtype as the membrane; may require a gradient.
        beta: leak, the share of the membrane kept by a neuron that did not fire; 0 makes the neuron memoryless.
        reset: "symmetric", or "reference" for the released recursion, value by value.
        backend: "auto", "torch", "triton" or "cupy".
    Returns:
        BiSpikeOutput: spikes [T, ...] in current's dtype; v [...], the membrane to carry into the next call
        (float32 for half inputs). One call over T steps equals two calls over its halves with the state passed on.
    Raises:
        ValueError: shapes disagree, T is 0, or the reset is unknown.
        BackendError: the named backend cannot run here.
    """
    spikes, v, _ = _run(current, v_init, alpha, beta, reset, backend, None)
    return BiSpikeOutput(spikes, v)


def elastic_bispike_measured(
    current: Tensor,
    v_init: Tensor,
    alpha: Tensor,
    mask: Tensor | None,
    *,
    beta: float = 0.25,
    reset: Reset = "symmetric",
    backend: str = "auto",
) -> tuple[BiSpikeOutput, Tensor]:
    """`elastic_bispike`, and mean|m[t]| of each step, [T] float64, from the same pass: what calibrates alpha.

    Args:
        mask: 1 for the positions that count, shape of current without T and width; None counts all.
    """
    counted = torch.ones(()) if mask is None else mask
    spikes, v, magnitude = _run(current, v_init, alpha, beta, reset, backend, counted)
    return BiSpikeOutput(spikes, v), magnitude


def _run(
    current: Tensor, v_init: Tensor, alpha: Tensor, beta: float, reset: Reset, backend: str, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments, choose the backend, compute in float32 or wider. A mask asks for the measurement."""
    if current.ndim == 0 or current.shape[0] == 0:
        raise ValueError(f"elastic_bispike: current needs at least one time step on axis 0, got {tuple(current.shape)}")
    if current.shape[1:] != v_init.shape:
        raise ValueError(
            f"elastic_bispike: v_init {tuple(v_init.shape)} must equal current without T {tuple(current.shape[1:])}; "
            "pass current.new_zeros(current.shape[1:]) to start at rest"
        )
    if alpha.shape != current.shape[:1]:
        raise ValueError(
            f"elastic_bispike: alpha needs one value per time step, shape ({current.shape[0]},), "
            f"got {tuple(alpha.shape)}; use torch.full(({current.shape[0]},), value) for one amplitude"
        )
    if reset not in get_args(Reset):
        raise ValueError(f"elastic_bispike: unknown reset {reset!r}; use one of {', '.join(get_args(Reset))}")
    resolve(backend, current, op="bispike")
    state = torch.promote_types(current.dtype, torch.float32)  # half precision would shift spikes over T
    weight = None
    if mask is not None:  # what each element adds to the mean
        # summed in float64: the mean, and with it alpha, must not depend on how a batch is split over processes
        wide = state if current.device.type == "mps" else torch.float64
        counted = mask.to(current.device, wide).expand(v_init.shape[:-1]).unsqueeze(-1)
        weight = counted / (counted.sum() * v_init.shape[-1]).clamp_min(1)
    spikes, v, magnitude = elastic_bispike_analytic(
        current.to(state), v_init.to(state), alpha.to(state), beta=beta, reset=reset, weight=weight
    )
    return spikes.to(current.dtype), v, magnitude
