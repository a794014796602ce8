"""Distances between predictions of student and teacher: Kullback-Leibler and its parts, Wasserstein, squared logits.

Functions (student_outputs, teacher_outputs, batch) -> scalar as in `objectives`, on logits [B, C] or [B, N, V]: a mean
over examples or over real tokens, in float32 from log-probabilities. p is the teacher's, q the student's distribution.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from snlp_zoo.errors import RecipeError

Outputs = Any  # a transformers ModelOutput, or anything with the attributes `objectives` names
Batch = Mapping[str, Tensor]


def token_mean(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """The mean of values [B, N] over real tokens, 0 where there is none: a function, for the values of many layers."""
    real = mask.float()
    count = real.sum().clamp_min(1)
    return lambda values: (values * real).sum() / count


def _mean_over_logits(values: Tensor, batch: Batch) -> Tensor:
    """Mean of values [B] over examples, or of values [B, N] over real tokens."""
    return values.mean() if values.ndim == 1 else token_mean(batch["attention_mask"])(values)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p (log p - log q) over the last axis, from log-probabilities."""
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def _check_logits(student: Outputs, teacher: Outputs) -> None:
    if student.logits.shape != teacher.logits.shape:
        raise ValueError(
            f"student logits {tuple(student.logits.shape)} and teacher logits {tuple(teacher.logits.shape)} differ; "
            "logit distillation needs the same classes or vocabulary"
        )


def _log_probabilities(student: Outputs, teacher: Outputs, temperature: float) -> tuple[Tensor, Tensor]:
    _check_logits(student, teacher)
    if not 0 < temperature < math.inf:
        raise RecipeError(f"temperature divides the logits, so it must be positive and finite, got {temperature}")
    logits = student.logits.float(), teacher.logits.float()
    if temperature != 1:  # of a whole vocabulary every copy counts
        logits = logits[0] / temperature, logits[1] / temperature
    return logits[0].log_softmax(-1), logits[1].log_softmax(-1)


def forward_kl(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softmax(logits / temperature), times temperature^2: covers all of the teacher's modes.

    The factor keeps the gradient's size when the temperature changes (Hinton et al. 2015, arXiv:1503.02531).

    Raises:
        RecipeError: the temperature is not positive and finite.
    """
    student, teacher = _log_probabilities(student_outputs, teacher_outputs, temperature)
    return _mean_over_logits(_kl(teacher, student), batch) * temperature**2


def reverse_kl(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) of softmax(logits / temperature), times temperature^2: seeks the teacher's main mode."""
    student, teacher = _log_probabilities(student_outputs, teacher_outputs, temperature)
    return _mean_over_logits(_kl(student, teacher), batch) * temperature**2


Direction = Literal["forward", "reverse"]


def head_tail_kl(
    student_outputs: Outputs,
    teacher_outputs: Outputs,
    batch: Batch,
    *,
    temperature: float = 1.0,
    delta: float = 0.5,
    head: Direction = "forward",
    tail: Direction = "reverse",
    head_weight: float | None = None,
    tail_weight: float | None = None,
) -> Tensor:
    """Head-tail-aware KL: forward KL where the teacher puts its mass, reverse KL elsewhere, each by its mismatch.

        L = w_head sum_head d + w_tail sum_tail d,   w_head = g_head / (g_head + g_tail),   g = sum |p - q|, no gradient

    The head are the fewest most probable classes of the teacher that hold at least `delta` of its mass. d is a class's
    part of the divergence, p log(p / q) - p + q (forward) or q log(q / p) - q + p (reverse): the linear terms cancel
    over all classes, and keep d from being negative over some, so L is 0 for equal distributions alone. With both
    weights one and one direction, head and tail make up that KL.

    Args:
        temperature: as in `forward_kl`, with its factor.
        delta: share of the teacher's mass, in (0, 1].
        head, tail: direction of each part, "forward" or "reverse".
        head_weight, tail_weight: fixed weights; None adapts.
    Raises:
        RecipeError: a number out of range, or an unknown direction.
    Source: after arXiv:2504.20445, whose exact weighting this does not claim to be.
    """
    if not 0 < delta <= 1:
        raise RecipeError(f"head_tail_kl: delta is a share of the teacher's mass, in (0, 1], got {delta}; 0.5 is usual")
    student, teacher = _log_probabilities(student_outputs, teacher_outputs, temperature)
    q, p = student.exp(), teacher.exp()
    in_head = _head(p, delta)
    directed = {"forward": p * (teacher - student) - p + q, "reverse": q * (student - teacher) - q + p}
    mismatch, total = (p - q).abs().detach(), torch.zeros_like(p[..., 0])
    for name, direction, weight, part in (
        ("head", head, head_weight, in_head),
        ("tail", tail, tail_weight, ~in_head),
    ):
        if weight is not None and not 0 <= weight < math.inf:
            raise RecipeError(f"head_tail_kl: {name}_weight must be finite and at least 0, got {weight}")
        if direction not in directed:
            raise RecipeError(f"head_tail_kl: {name} must be 'forward' or 'reverse', got {direction!r}")
        # equal distributions: any weight will do
        share = (mismatch * part).sum(-1) / mismatch.sum(-1).clamp_min(torch.finfo(p.dtype).tiny)
        total = total + (share if weight is None else weight) * (directed[direction] * part).sum(-1)
    return _mean_over_logits(total, batch) * temperature**2


def _head(p: Tensor, delta: float) -> Tensor:
    """Which classes belong to the smallest set of most probable ones with mass of at least delta, bool [..., C]."""
    mass, order = p.sort(dim=-1, descending=True, stable=True)
    before = mass.cumsum(-1) - mass
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, before < delta)


def wasserstein(
    student_outputs: Outputs,
    teacher_outputs: Outputs,
    batch: Batch,
    *,
    cost: Literal["zero_one", "ordinal"] = "zero_one",
    epsilon: float = 0.2,
    iterations: int = 50,
) -> Tensor:
    """How much probability has to be moved how far to make the student's distribution the teacher's.

    "ordinal": classes lie in order, one apart; sum_k |P(class <= k) - Q(class <= k)|, the closed form in one dimension.

    "zero_one": every class is 1 away from every other. Entropic transport without its bias (a Sinkhorn divergence),
    which tends to the total variation sum |p - q| / 2 for small epsilon; log-domain Sinkhorn, of O(classes) memory as
    the cost is all ones but the diagonal. The gradient is that of the potentials reached.

    Args:
        epsilon: strength of the entropy, in units of the cost; smaller ones need more iterations.
        iterations: of Sinkhorn, at least 1.
    Raises:
        RecipeError: an unknown cost, or a value out of range.
    Source: Feydy et al. 2019 (arXiv:1810.08278) for the divergence and its gradient.
    """
    if cost not in ("zero_one", "ordinal"):
        raise RecipeError(f"wasserstein: cost must be 'zero_one' or 'ordinal', got {cost!r}")
    if not epsilon > 0 or iterations < 1:
        raise RecipeError(
            f"wasserstein: epsilon must be positive and iterations at least 1, got {epsilon} and {iterations}"
        )
    student, teacher = _log_probabilities(student_outputs, teacher_outputs, temperature=1.0)
    q, p = student.exp(), teacher.exp()
    if cost == "ordinal":
        return _mean_over_logits((p - q).cumsum(-1).abs().sum(-1), batch)
    with torch.no_grad():
        to_teacher, to_student = _potentials(teacher, student, epsilon, iterations)
        # to itself both potentials are one; their mean makes the distance of equal distributions exactly 0
        of_teacher, of_student = (sum(_potentials(x, x, epsilon, iterations)) / 2 for x in (teacher, student))
    distance = (p * (to_teacher - of_teacher)).sum(-1) + (q * (to_student - of_student)).sum(-1)
    return _mean_over_logits(distance, batch)


def _softmin(log_weight: Tensor, potential: Tensor, epsilon: float) -> Tensor:
    """-epsilon log sum_j weight[j] exp((potential[j] - cost[i, j]) / epsilon), where cost is 0 for i = j, else 1."""
    x = log_weight + potential / epsilon
    everywhere = x.logsumexp(-1, keepdim=True) - 1 / epsilon
    return -epsilon * torch.logaddexp(everywhere, x + math.log(-math.expm1(-1 / epsilon)))


def _potentials(log_p: Tensor, log_q: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Of p and of q [..., C], by Sinkhorn's alternation; the last update leaves p's exact."""
    of_q = torch.zeros_like(log_q)
    for _ in range(iterations):
        of_q = _softmin(log_p, _softmin(log_q, of_q, epsilon), epsilon)
    return _softmin(log_q, of_q, epsilon), of_q


def logit_mse(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch) -> Tensor:
    """Mean squared difference of the logits; the logit objective for regression."""
    _check_logits(student_outputs, teacher_outputs)
    difference = student_outputs.logits.float() - teacher_outputs.logits.float()
    return _mean_over_logits(difference.square().mean(-1), batch)
