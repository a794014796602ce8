"""Sums over the tokens that a token sees, sum_j decay^|i - j| (q_i . k_j) v_j, in two forms.

Without a softmax nothing stands between the two products: (Q K^T) V and Q (K^T V) are equal, exactly in whole numbers
as long as the dtype holds them (float32: up to 2^24), and with a decay up to rounding.
Shapes: query, key and value [T, B, H, N, E]; decay [H, 1, 1] in (0, 1], or None for 1; counts [B or 1, 1, N, 1], how
many real tokens there are up to each: distances are measured in them, so padding makes nothing fade.
"""

import torch
from torch import Tensor


def mix(query: Tensor, key: Tensor, value: Tensor, counts: Tensor, causal: bool, decay: Tensor | None = None) -> Tensor:
    """[T, B, H, N, E], by the form that is cheaper for this N and E; `causal`: over j <= i only.

    The linear form takes fewer multiplications from E tokens on. Causal sums and those with a decay are made of smaller
    products then, which on a CPU are faster from 4 E tokens on, or from 8 E if they run in both directions.
    """
    tokens, width = value.shape[-2:]
    form = quadratic if tokens <= width * (4 if causal else 1 if decay is None else 8) else linear
    return form(query, key, value, counts, causal, decay)


def quadratic(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, causal: bool, decay: Tensor | None = None
) -> Tensor:
    """As `mix`, by the scores Q K^T, [T, B, H, N, N]."""
    scores = query @ key.mT
    if causal:
        scores = scores.tril()
    if decay is not None:
        scores = scores * decay ** (counts - counts.mT).abs()
    return scores @ value


def linear(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, causal: bool, decay: Tensor | None = None
) -> Tensor:
    """As `mix`, by sums of k_j^T v_j over tokens, [T, B, H, E, E]."""
    if not causal and decay is None:
        return query @ (key.mT @ value)
    before = _up_to(query, key, value, counts, decay)
    if causal:
        return before
    after = _up_to(query.flip(-2), key.flip(-2), value.flip(-2), -counts.flip(-2), decay).flip(-2)
    return before + after - (query * key).sum(-1, keepdim=True) * value  # a token's own part is in both


def _up_to(query: Tensor, key: Tensor, value: Tensor, counts: Tensor, decay: Tensor | None) -> Tensor:
    """Causal sums, E tokens at a time: the quadratic form among those, and a memory of all before them."""

    def fade(x: Tensor, distance: Tensor) -> Tensor:
        return x if decay is None else x * decay**distance

    memory, last, sums = None, counts, []
    for q, k, v, count in zip(*(x.split(value.shape[-1], -2) for x in (query, key, value, counts)), strict=True):
        mixed = quadratic(q, k, v, count, True, decay)
        end = count[..., -1:, :]
        added = k.mT @ fade(v, end - count)
        if memory is not None:
            mixed = mixed + fade(q @ memory, count - last)
            added = added + fade(memory, end - last)
        sums.append(mixed)
        memory, last = added, end
    return torch.cat(sums, -2)
