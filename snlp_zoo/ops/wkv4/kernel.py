"""Every backend as one PyTorch operator, `snlp_zoo::wkv4`: opaque to torch.compile, autocast and export.

Backends fill what is allocated here. For the backward, "torch" keeps the state before every token and after each group
of tokens; a kernel keeps only those before and after each group, and computes what lies between again.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

GROUP = 16  # tokens: their states fit into registers


def _kernels(backend: str) -> ModuleType:
    return import_module(f"snlp_zoo.ops.wkv4.{'analytic' if backend == 'torch' else backend}")


@torch.library.custom_op("snlp_zoo::wkv4", mutates_args=())
def wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    maximum: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out [B, N, C], the state after the last token [3, B, C], states [3, B, ..., C].

    w and u, [C], set the precision. A state is numerator, denominator and maximum; None for each is a fresh one.
    """
    out, after, states = _allocate(w, u, k, v, numerator, denominator, maximum, backend)
    if k.numel():
        _kernels(backend).forward(w, u, k, v, (numerator, denominator, maximum), out, states, after)
    return out, after, states


@wkv4.register_fake
def _allocate(w, u, k, v, numerator, denominator, maximum, backend) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, channels = k.shape
    groups = -(-tokens // GROUP)
    kept = (groups, min(tokens, GROUP) + 1) if backend == "torch" else (groups + 1,)
    return (
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
        w.new_empty(3, batch, channels),
        w.new_empty(3, batch, *kept, channels),
    )


@torch.library.custom_op("snlp_zoo::wkv4_backward", mutates_args=())
def _backward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    states: Tensor,
    grad_out: Tensor,
    grad_after: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w and u [2, C], k, v [B, N, C] and of the first state's sums [2, B, C]."""
    shared, *grads = _allocate_grads(w, u, k, v, states, grad_out, grad_after, backend)
    if not k.numel():
        return shared.zero_(), *grads
    return _kernels(backend).backward(w, u, k, v, states, grad_out, grad_after, *grads), *grads


@_backward.register_fake
def _allocate_grads(w, u, k, v, states, grad_out, grad_after, backend) -> tuple[Tensor, ...]:
    grad_k, grad_v = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    return w.new_empty(2, k.shape[2]), grad_k, grad_v, w.new_empty(2, k.shape[0], k.shape[2])


def _save(ctx, inputs, output) -> None:
    w, u, k, v, *state, ctx.backend = inputs
    ctx.given = state[0] is not None
    ctx.set_materialize_grads(False)  # no zeros for the states, and for one that was not used
    ctx.save_for_backward(w, u, k, v, output[2])


def _differentiate(ctx, grad_out, grad_after, _):
    w, u, k, v, states = ctx.saved_tensors
    if grad_out is None:  # only the state was used
        grad_out = torch.zeros(k.shape, dtype=k.dtype, device=k.device)
    shared, grad_k, grad_v, grad_first = _backward(w, u, k, v, states, grad_out, grad_after, ctx.backend)
    if not ctx.given:
        return *shared, grad_k, grad_v, None, None, None, None
    first = states[:2, :, 0] if states.ndim == 4 else states[:2, :, 0, 0]
    # a state stands for sums times exp(maximum): to raise its maximum is to raise both sums
    return *shared, grad_k, grad_v, *grad_first, (grad_first * first).sum(0), None


wkv4.register_autograd(_differentiate, setup_context=_save)
