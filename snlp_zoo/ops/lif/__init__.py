"""Multi-step leaky integrate-and-fire on the fastest backend that supports the tensors."""

from dataclasses import replace

import torch
from torch import Tensor

from snlp_zoo.errors import BackendError
from snlp_zoo.ops.backend import KERNELS, check_steps, resolve
from snlp_zoo.ops.lif import kernel
from snlp_zoo.ops.lif.analytic import lif_analytic
from snlp_zoo.ops.lif.parallel import lif_parallel, worthwhile
from snlp_zoo.ops.lif.reference import LIFOutput, lif_membranes, lif_reference
from snlp_zoo.ops.surrogates import Surrogate, as_surrogate

__all__ = ["LIFOutput", "lif", "lif_membranes", "lif_reference"]
_LOW = (torch.bool, torch.int8, torch.float8_e4m3fn)  # spike_dtype without gradient


def lif(
    current: Tensor,
    v_init: Tensor | None,
    *,
    tau: float | Tensor,
    v_threshold: float,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = True,
    surrogate: str | Surrogate = "atan",
    spike_dtype: torch.dtype | None = None,
    carry_out: bool = True,
    backend: str = "auto",
) -> LIFOutput:
    """Leaky integrate-and-fire over T steps; equations in `lif_reference`.

    Args:
        current: input current, [T, ...], unit of v; float32, float64, bfloat16 or float16.
        v_init: membrane potential before step 0, [...] (current without T); None at rest: v_reset, or 0 without one.
        tau: membrane time constant in steps, >= 1; a number, or a tensor (learnable) broadcastable to v_init.
        v_threshold: fires where the charged membrane reaches it.
        v_reset: potential after a spike (hard reset); None subtracts v_threshold instead (soft reset).
        decay_input: divide the input current by tau too.
        detach_reset: keep the reset out of the gradient.
        surrogate: name from `SURROGATES`, or a `Surrogate` with its own steepness. Kernels take a number for it; where
            it is a tensor, "auto" computes with "torch".
        spike_dtype: dtype of the spikes, default current's. bool, int8 and float8_e4m3fn carry no gradient: for
            products in low precision.
        carry_out: False leaves v out (None), which saves writing it.
        backend: "auto", "torch", "triton" or "cupy".
    Returns:
        LIFOutput: spikes [T, ...] in {0, 1}, v [...] after step T-1 (float32 for half inputs).
        One call over T steps equals two calls over its halves with the state passed on.
    Raises:
        ValueError: shapes disagree, T is 0, tau < 1, v_threshold is a tensor, or a dtype does not fit.
        BackendError: the named backend cannot run here.
    """
    _check(current, v_init, tau, v_threshold, spike_dtype)
    surrogate = as_surrogate(surrogate)
    chosen = _resolve(backend, current, surrogate)
    state = torch.promote_types(current.dtype, torch.float32)  # half precision would shift spikes over T
    v_init = None if v_init is None else v_init.to(state)
    leak = 1 / tau.to(current.device, state) if isinstance(tau, Tensor) else None
    leak_value = 0.0 if isinstance(tau, Tensor) else 1 / tau
    options = (v_threshold, v_reset, decay_input, detach_reset)
    if isinstance(surrogate.alpha, Tensor):
        surrogate = replace(surrogate, alpha=surrogate.alpha.to(current.device, state))
    with torch.set_grad_enabled(torch.is_grad_enabled() and spike_dtype not in _LOW):
        if chosen == "torch":
            leak = torch.full((), leak_value, dtype=state, device=current.device) if leak is None else leak
            run = lif_parallel if worthwhile(current, tau, surrogate) else lif_analytic
            spikes, v = run(current, v_init, leak, *options, surrogate, carry_out)
            spikes = spikes.to(spike_dtype or current.dtype)
        else:
            leak = None if leak is None else _period(leak, current.shape[1:])
            how = (surrogate.name, surrogate.alpha, spike_dtype or current.dtype, carry_out, chosen)
            spikes, v, _ = kernel.lif(current, v_init, leak, leak_value, *options, *how)
    return LIFOutput(spikes, v if carry_out else None)


def _resolve(backend: str, current: Tensor, surrogate: Surrogate) -> str:
    if not isinstance(surrogate.alpha, Tensor):
        return resolve(backend, current, op="lif")
    if backend in KERNELS:
        raise BackendError(f"lif: backend {backend!r} cannot learn a surrogate's steepness; use 'auto' or 'torch'")
    _check_broadcast("the surrogate's alpha", surrogate.alpha, current)
    return resolve("torch" if backend == "auto" else backend, current, op="lif")


def _period(leak: Tensor, step: torch.Size) -> Tensor:
    """leak without leading axes of length one, the others expanded: what repeats along a flattened step."""
    while leak.ndim and leak.shape[0] == 1:
        leak = leak.squeeze(0)
    return leak.expand(step[len(step) - leak.ndim :])


def _check(
    current: Tensor, v_init: Tensor | None, tau: float | Tensor, v_threshold: float, spike_dtype: torch.dtype | None
) -> None:
    check_steps("lif", current, v_init)
    if isinstance(v_threshold, Tensor):
        raise ValueError("lif: v_threshold is a number, got a tensor, which would have no gradient")
    if isinstance(tau, Tensor):
        _check_broadcast("tau", tau, current)
    elif not tau >= 1:
        raise ValueError(f"lif: tau is in time steps and must be at least 1, got {tau}")
    if spike_dtype is not None and not (
        spike_dtype in _LOW or (spike_dtype.is_floating_point and spike_dtype.itemsize > 1)
    ):
        raise ValueError(f"lif: spike_dtype {spike_dtype}: use bool, int8, float8_e4m3fn or a float dtype")


def _check_broadcast(name: str, x: Tensor, current: Tensor) -> None:
    axes = zip(reversed(x.shape), reversed(current.shape[1:]), strict=False)
    if x.ndim >= current.ndim or any(length not in (1, of_step) for length, of_step in axes):
        raise ValueError(f"lif: {name} {tuple(x.shape)} must broadcast to current without T {tuple(current.shape[1:])}")
