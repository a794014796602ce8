"""Multi-step leaky integrate-and-fire on the fastest backend that supports the tensors."""

import torch
from torch import Tensor

from snlp_zoo.ops.backend import resolve
from snlp_zoo.ops.lif.analytic import lif_analytic
from snlp_zoo.ops.lif.reference import LIFOutput, lif_reference
from snlp_zoo.ops.surrogates import Surrogate, as_surrogate

__all__ = ["LIFOutput", "lif", "lif_reference"]


def lif(
    current: Tensor,
    v_init: Tensor,
    *,
    tau: float | Tensor,
    v_threshold: float,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = True,
    surrogate: str | Surrogate = "atan",
    backend: str = "auto",
) -> LIFOutput:
    """Leaky integrate-and-fire over T steps; equations in `lif_reference`.

    Args:
        current: input current, [T, ...], unit of v; float32, float64, bfloat16 or float16.
        v_init: membrane potential before step 0, [...] (current without T); at rest it is v_reset, or 0 if None.
        tau: membrane time constant in steps, >= 1; a number, or a tensor (learnable) broadcastable to v_init.
        v_threshold: fires where the charged membrane reaches it.
        v_reset: potential after a spike (hard reset); None subtracts v_threshold instead (soft reset).
        decay_input: divide the input current by tau too.
        detach_reset: keep the reset out of the gradient.
        surrogate: name from `SURROGATES`, or a `Surrogate` with its own steepness.
        backend: "auto", "torch", "triton" or "cupy".
    Returns:
        LIFOutput: spikes [T, ...] in {0, 1} in current's dtype, v [...] after step T-1 (float32 for half inputs).
        One call over T steps equals two calls over its halves with the state passed on.
    Raises:
        ValueError: shapes disagree, T is 0, or tau < 1.
        BackendError: the named backend cannot run here.
    """
    if current.ndim == 0 or current.shape[0] == 0:
        raise ValueError(f"lif: current needs at least one time step on axis 0, got shape {tuple(current.shape)}")
    if current.shape[1:] != v_init.shape:
        raise ValueError(
            f"lif: v_init {tuple(v_init.shape)} must equal current without T {tuple(current.shape[1:])}; "
            "pass current.new_zeros(current.shape[1:]) to start at rest"
        )
    if not isinstance(tau, Tensor) and not tau >= 1:
        raise ValueError(f"lif: tau is in time steps and must be at least 1, got {tau}")
    resolve(backend, current, op="lif")
    state = torch.promote_types(current.dtype, torch.float32)  # half precision would shift spikes over T
    spikes, v = lif_analytic(
        current.to(state),
        v_init.to(state),
        tau=tau,
        v_threshold=v_threshold,
        v_reset=v_reset,
        decay_input=decay_input,
        detach_reset=detach_reset,
        surrogate=as_surrogate(surrogate),
    )
    return LIFOutput(spikes.to(current.dtype), v)
