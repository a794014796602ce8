"""WKV in PyTorch, on any device: no autograd graph over N, and few steps that wait for each other.

Once the running maxima are known, the sums obey linear recurrences, and everything else is elementwise in them:

    A[t+1] = past[t] A[t] + now[t] v[t]        B[t+1] = past[t] B[t] + now[t]        out[t] from A[t], B[t], k[t], v[t]

So do their gradients, backward in time: grad A[t] = past[t] grad A[t+1] + what out[t] contributes. Tokens go in groups:
what each group adds to a state is a closed formula, a walk over the groups then gives the state before each of them,
and a walk within the groups, all of them at once, the state before each token.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from snlp_zoo.ops.wkv4.reference import EMPTY


def _linear(steps: Sequence[Tensor], decays: Sequence[Tensor]) -> None:
    """y[t+1] += decay[t] y[t] for one step after another, in place."""
    for (before, after), decay in zip(pairwise(steps), decays, strict=True):
        after.addcmul_(before, decay)


def _walk(w: Tensor, k: Tensor, v: Tensor, one: Tensor | float, states: Tensor) -> None:
    """Fill states [3, ..., n + 1, C] after the first: what comes in has weight exp(k), value v and count one."""
    sums, maximum = states[:2], states[2]
    steps = maximum.unbind(-2)
    for (before, after), k_t in zip(pairwise(steps), k.unbind(-2), strict=True):
        torch.maximum(before + w, k_t, out=after)
    past = (maximum[..., :-1, :] + w).sub_(maximum[..., 1:, :]).exp_()
    now = (k - maximum[..., 1:, :]).exp_()
    torch.mul(now, v, out=sums[0, ..., 1:, :])
    torch.mul(now, one, out=sums[1, ..., 1:, :])
    _linear(sums.unbind(-2), past.unbind(-2))


def _fold(x: Tensor, dtype: torch.dtype, size: int, fill: float = 0.0) -> Tensor:
    """x [B, N, C] as [B, groups, size, C], filled up."""
    missing = -x.shape[1] % size
    x = x.to(dtype)
    return (pad(x, (0, 0, 0, missing), value=fill) if missing else x).unflatten(1, (-1, size))


def _weights(u: Tensor, k: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    """The sums' and the token's weight in out[t]."""
    before, bonus = maximum[..., :-1, :], u + k
    scale = torch.maximum(before, bonus)
    return (before - scale).exp_(), bonus.sub_(scale).exp_()


def forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, first: tuple[Tensor | None, ...],
    out: Tensor, states: Tensor, after: Tensor,
) -> None:  # fmt: skip
    """From a first state fill out, states [3, B, groups, size + 1, C] and after [3, B, C], that of the last token."""
    for start, given, fresh in zip(states[:, :, 0, 0], first, (0.0, 0.0, EMPTY), strict=True):
        start.fill_(fresh) if given is None else start.copy_(given)
    tokens, groups, size = k.shape[1], states.shape[2], states.shape[3] - 1
    k, v = _fold(k, w.dtype, size, -torch.inf), _fold(v, w.dtype, size)  # what is filled in weighs nothing
    age = torch.arange(size - 1, -1, -1, dtype=w.dtype, device=w.device)
    aged = k[:, :-1] + age[:, None] * w
    highest = aged.amax(2).clamp_min_(EMPTY)  # where every key of a group is -inf
    weight = aged.sub_(highest[:, :, None]).exp_()
    denominator, numerator = weight.sum(2), weight.mul_(v[:, :-1]).sum(2)
    _walk(size * w, highest, numerator, denominator, states[..., 0, :])
    _walk(w, k, v, 1.0, states)
    after.copy_(states[:, :, -1, tokens - (groups - 1) * size])
    (numerator, denominator), (seen, bonus) = states[:2, ..., :-1, :], _weights(u, k, states[2])
    result = (bonus * v).addcmul_(seen, numerator).div_(bonus.addcmul_(seen, denominator))
    out.copy_(result.flatten(1, 2)[:, :tokens])


def backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, states: Tensor, grad_out: Tensor, grad_after: Tensor | None,
    grad_k: Tensor, grad_v: Tensor, grad_first: Tensor,
) -> Tensor:  # fmt: skip
    """Fill grad_k, grad_v and grad_first [2, B, C], that of the first state's sums; return those of w and u [2, C]."""
    tokens, groups, size = k.shape[1], states.shape[2], states.shape[3] - 1
    k, v = _fold(k, w.dtype, size, -torch.inf), _fold(v, w.dtype, size)
    (numerator, denominator), maximum = states[:2, ..., :-1, :], states[2]
    seen, bonus = _weights(u, k, maximum)
    total = torch.addcmul(bonus, seen, denominator)
    out = (bonus * v).addcmul_(seen, numerator).div_(total)
    scaled = total.reciprocal_().mul_(_fold(grad_out, w.dtype, size))
    grads = torch.empty_like(states[:2])
    torch.mul(scaled, seen, out=grads[0, ..., :-1, :])
    torch.mul(grads[0, ..., :-1, :], out, out=grads[1, ..., :-1, :]).neg_()
    past = (maximum[..., :-1, :] + w).sub_(maximum[..., 1:, :]).exp_()

    age = torch.arange(size + 1, dtype=w.dtype, device=w.device)
    kept = (maximum[:, :, :1] + age[:, None] * w).sub_(maximum).exp_()  # of what a state holds at its group's start
    ends = w.new_zeros(2, k.shape[0], groups + 1, k.shape[3])
    if grad_after is not None:
        ends[:, :, -1] = grad_after[:2]
    torch.sum(grads[..., :-1, :] * kept[:, :, :-1], 3, out=ends[:, :, :-1])
    _linear(ends.unbind(2)[::-1], kept[:, :, -1].unbind(1)[::-1])
    grad_first.copy_(ends[:, :, 0])
    grads[..., -1, :] = ends[:, :, 1:]
    _linear(grads.unbind(3)[::-1], past.unbind(2)[::-1])

    of_numerator, of_denominator = grads[..., 1:, :]
    grad_w = (of_numerator * numerator).addcmul_(of_denominator, denominator).mul_(past)
    now = (k - maximum[..., 1:, :]).exp_()
    scaled.mul_(bonus)
    grad_v.copy_(torch.addcmul(scaled, of_numerator, now).flatten(1, 2)[:, :tokens])
    grad_bonus = (v - out).mul_(scaled)
    grad_key = (of_numerator * v).add_(of_denominator).mul_(now).add_(grad_bonus)
    grad_k.copy_(grad_key.flatten(1, 2)[:, :tokens])
    return torch.stack([x.flatten(1, 2)[:, :tokens].sum((0, 1)) for x in (grad_w, grad_bonus)])
