"""The WKV recurrence of RWKV-4 and SpikeGPT on the fastest backend that supports the tensors."""

import torch
from torch import Tensor

from snlp_zoo.ops.backend import resolve
from snlp_zoo.ops.wkv4 import kernel
from snlp_zoo.ops.wkv4.reference import EMPTY, State, WKVOutput, fresh_state, wkv4_reference

__all__ = ["EMPTY", "State", "WKVOutput", "fresh_state", "wkv4", "wkv4_reference"]


def wkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: State | None = None, *, backend: str = "auto") -> WKVOutput:
    """A mean of the values so far, weighted by keys and age, for every channel; equation in `wkv4_reference`.

    Args:
        w: log decay per token, [C]; negative, -exp(time_decay), which nothing checks: that would wait for the device.
        u: bonus of the current token, added to its key, [C].
        k, v: keys and values, [B, N, C] of one dtype: float32, float64, bfloat16 or float16.
        state: what an earlier call returned: numerator, denominator and running maximum, [B, C] each, float32
            (float64 if k is). None starts afresh, as (0, 0, -1e38) does.
        backend: "auto", "torch" or "triton".
    Returns:
        WKVOutput: out [B, N, C] in k's dtype and the state after the last token; computed in float32, or float64 if k
        is. One call over N tokens equals two calls over its parts with the state passed on. The sums carry
        gradients; the maximum, which only scales them, carries none.
    Raises:
        ValueError: shapes or dtypes do not fit, or N is 0.
        BackendError: the named backend cannot run here.
    """
    _check(w, u, k, v, state)
    wide = torch.promote_types(k.dtype, torch.float32)
    chosen = resolve(backend, k, op="wkv4")
    if chosen == "torch" and k.shape[1] == 1:  # a step of generation: a quarter of the operator's time
        out, after = wkv4_reference(w.to(wide), u.to(wide), k.to(wide), v.to(wide), state or fresh_state(k))
        return WKVOutput(out.to(k.dtype), after)
    out, after, _ = kernel.wkv4(w.to(wide), u.to(wide), k, v, *(state or (None, None, None)), chosen)
    return WKVOutput(out, (after[0], after[1], after[2].detach()))


def _check(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: State | None) -> None:
    if k.ndim != 3 or k.shape[1] == 0:
        raise ValueError(f"wkv4: k must be [B, N, C] with at least one token, got {tuple(k.shape)}")
    if not k.is_floating_point() or k.element_size() == 1:
        raise ValueError(f"wkv4: k must be float32, float64, bfloat16 or float16, got {k.dtype}")
    if (v.shape, v.dtype) != (k.shape, k.dtype):
        raise ValueError(
            f"wkv4: v must have the shape and dtype of k, {tuple(k.shape)} {k.dtype}, got {tuple(v.shape)} {v.dtype}"
        )
    for name, x in (("w", w), ("u", u)):
        if x.shape != k.shape[2:] or not x.is_floating_point():
            raise ValueError(
                f"wkv4: {name} must be float, one per channel [{k.shape[2]}], got {tuple(x.shape)} {x.dtype}"
            )
    if state is not None:
        _check_state(state, k)


def _check_state(state: State, k: Tensor) -> None:
    wanted = (k.shape[0], k.shape[2]), torch.promote_types(k.dtype, torch.float32)
    found = [(tuple(x.shape), x.dtype) for x in state]
    if found != [wanted] * 3:
        raise ValueError(
            f"wkv4: state must be numerator, denominator and maximum of the same batch and width, each {wanted[0]} "
            f"{wanted[1]}, got {', '.join(f'{shape} {dtype}' for shape, dtype in found)}; pass None to start afresh"
        )
