"""What a student learns from: functions (student_outputs, teacher_outputs, batch) -> scalar, chosen by name.

Outputs have `logits` ([B, C], or [B, N, V] per token), `hidden_states` (L + 1 times [B, N, D], embeddings first) and
`attentions` and `attention_scores` (L times [B, H, N, N]); batch has `attention_mask` [B, N] and `labels`. Every
objective is a mean over what is real (examples, or tokens that are not padding), computed in float32 from
log-probabilities.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from snlp_zoo.distill.matching import layer_pairs

Outputs = Any  # a transformers ModelOutput, or anything with the attributes above
Batch = Mapping[str, Tensor]


def _mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [B, N] over real tokens; 0 where there is none."""
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp_min(1)


def _mean_over_logits(values: Tensor, batch: Batch) -> Tensor:
    """Mean of values [B] over examples, or of values [B, N] over real tokens."""
    return values.mean() if values.ndim == 1 else _mean_over_tokens(values, batch["attention_mask"])


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
    logits = student.logits.float() / temperature, teacher.logits.float() / temperature
    return logits[0].log_softmax(-1), logits[1].log_softmax(-1)


def forward_kl(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softmax(logits / temperature), times temperature^2: covers all of the teacher's modes.

    The factor keeps the gradient's size when the temperature changes (Hinton et al. 2015, arXiv:1503.02531).
    """
    student, teacher = _log_probabilities(student_outputs, teacher_outputs, temperature)
    return _mean_over_logits(_kl(teacher, student), batch) * temperature**2


def reverse_kl(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) of softmax(logits / temperature), times temperature^2: seeks the teacher's main mode."""
    student, teacher = _log_probabilities(student_outputs, teacher_outputs, temperature)
    return _mean_over_logits(_kl(student, teacher), batch) * temperature**2


def logit_mse(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch) -> Tensor:
    """Mean squared difference of the logits; the logit objective for regression."""
    _check_logits(student_outputs, teacher_outputs)
    difference = student_outputs.logits.float() - teacher_outputs.logits.float()
    return _mean_over_logits(difference.square().mean(-1), batch)


def cross_entropy(
    student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch, *, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy with the true labels: [B] classes, or [B, N] tokens where -100 counts for nothing.

    Floating-point labels are regression targets [B] and give the mean squared error. The teacher is not used.
    """
    logits, labels = student_outputs.logits.float(), batch["labels"]
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels.float())
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=label_smoothing)


def hidden_mse(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch) -> Tensor:
    """Mean squared difference of hidden states, over real tokens, mean over student layers 1..L.

    Student layers are matched to evenly spread teacher layers; widths must agree (project with `matching.Projection`).
    """
    student, teacher = student_outputs.hidden_states, teacher_outputs.hidden_states
    pairs = layer_pairs(len(student) - 1, len(teacher) - 1)
    return torch.stack([_state_mse(student[i], teacher[j], batch) for i, j in pairs]).mean()


def embedding_mse(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch) -> Tensor:
    """Mean squared difference of the embedding outputs (hidden state 0) over real tokens."""
    return _state_mse(student_outputs.hidden_states[0], teacher_outputs.hidden_states[0], batch)


def _state_mse(student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student state {tuple(student.shape)} and teacher state {tuple(teacher.shape)} differ in shape; "
            "project the student first (distill.matching.Projection)"
        )
    return _mean_over_tokens((student.float() - teacher.float()).square().mean(-1), batch["attention_mask"])


def attention_mse(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch) -> Tensor:
    """Mean squared difference of attention probabilities over pairs of real tokens, mean over student layers.

    Where the numbers of heads differ, both sides are averaged over heads first.
    """
    return _pair_mse(student_outputs.attentions, teacher_outputs.attentions, batch)


def attention_score_mse(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch) -> Tensor:
    """`attention_mse` on the scores before mask and softmax, q k^T / sqrt(E)."""
    return _pair_mse(student_outputs.attention_scores, teacher_outputs.attention_scores, batch)


def _pair_mse(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], batch: Batch) -> Tensor:
    mask = batch["attention_mask"].bool()
    pairs = (mask.unsqueeze(1) & mask.unsqueeze(2)).unsqueeze(1)  # [B, 1, N, N]
    losses = []
    for i, j in layer_pairs(len(student), len(teacher)):
        s, t = student[i - 1].float(), teacher[j - 1].float()
        if s.shape[1] != t.shape[1]:
            s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
        difference = (s - t).masked_fill(~pairs, 0.0)  # before the square: scores may hold a mask's -inf
        losses.append(difference.square().mean(1).sum() / pairs.sum().clamp_min(1))
    return torch.stack(losses).mean()


class Objective(NamedTuple):
    """An objective and what it needs; `unit` is what its mean runs over, so that ranks can be weighted rightly."""

    function: Callable[..., Tensor]
    unit: Literal["logit", "label", "token", "pair"]
    needs: tuple[str, ...] = ()  # optional model outputs
    needs_teacher: bool = True

    def options(self) -> list[str]:
        """Names of the keyword options."""
        return [name for name, p in signature(self.function).parameters.items() if p.kind is p.KEYWORD_ONLY]

    @property
    def needs_labels(self) -> bool:
        """Whether it compares classes, which unlabelled text does not have."""
        return self.unit in ("logit", "label")


OBJECTIVES: dict[str, Objective] = {
    "forward_kl": Objective(forward_kl, "logit"),
    "reverse_kl": Objective(reverse_kl, "logit"),
    "logit_mse": Objective(logit_mse, "logit"),
    "cross_entropy": Objective(cross_entropy, "label", needs_teacher=False),
    "hidden_mse": Objective(hidden_mse, "token", ("hidden_states",)),
    "embedding_mse": Objective(embedding_mse, "token", ("hidden_states",)),
    "attention_mse": Objective(attention_mse, "pair", ("attentions",)),
    "attention_score_mse": Objective(attention_score_mse, "pair", ("attention_scores",)),
}


def count_units(unit: str, batch: Batch, *, per_token: bool = False) -> Tensor:
    """How many examples, labels, real tokens or pairs of real tokens an objective's mean runs over, a float scalar.

    Args:
        per_token: logits are [B, N, V], one prediction per token.
    """
    lengths = batch["attention_mask"].sum(1).float()
    if unit == "pair":
        return lengths.square().sum()
    if unit == "label" and per_token:
        return (batch["labels"] != -100).sum().float()
    if unit == "token" or (unit == "logit" and per_token):
        return lengths.sum()
    return lengths.new_tensor(len(lengths))
