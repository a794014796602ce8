"""What a student learns from: functions (student_outputs, teacher_outputs, batch) -> scalar, chosen by name.

Outputs have `logits` ([B, C], or [B, N, V] per token), `hidden_states` (L + 1 times [B, N, D], embeddings first),
`attentions` and `attention_scores` (L times [B, H, N, N]), `embedding_table` ([V, D]) and, of students, `spike_rates`
(site -> [T]); batch has `attention_mask` [B, N] and `labels`. Every objective is a mean over what is real (examples, or
tokens that are not padding), computed in float32. Those that compare logits are in `divergences`.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from snlp_zoo.distill.divergences import (
    Batch,
    Outputs,
    forward_kl,
    head_tail_kl,
    logit_mse,
    reverse_kl,
    token_mean,
    wasserstein,
)
from snlp_zoo.distill.matching import layer_pairs
from snlp_zoo.errors import RecipeError


def cross_entropy(
    student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch, *, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy with the true labels: [B] classes, or [B, N] tokens where -100 counts for nothing.

    Floating-point labels are regression targets [B] and give the mean squared error. The teacher is not used.

    Raises:
        RecipeError: label_smoothing is out of range.
    """
    if not 0 <= label_smoothing <= 1:  # torch takes less than 0 for 0
        raise RecipeError(f"cross_entropy: label_smoothing is a share, in [0, 1], got {label_smoothing}")
    logits, labels = student_outputs.logits.float(), batch["labels"]
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels.float())
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=label_smoothing)


def l2wrap(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch) -> Tensor:
    """Half the square of the largest logit, mean over predictions: keeps logits from growing where softmax is blind to
    it. Weights are small, 1e-4 as published.

    Source: SpikeGPT's training (Zhu et al. 2023, arXiv:2302.13939): its gradient is 1e-4 / (B N) times the largest
    logit, on that logit alone.
    """
    logits, labels = student_outputs.logits.float(), batch["labels"]
    squares = logits.max(-1).values.square() / 2  # of equal logits the first: `amax` would share the gradient
    return token_mean(labels != -100)(squares) if squares.ndim == 2 else squares.mean()


def hidden_mse(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch) -> Tensor:
    """Mean squared difference of hidden states, over real tokens, mean over student layers 1..L.

    Student layers are matched to evenly spread teacher layers; widths must agree (project with `matching.Projection`).
    """
    return _over_layers(_squares, student_outputs, teacher_outputs, batch)


def relative_hidden_mse(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch) -> Tensor:
    """`hidden_mse` where each token's is divided by the mean square of the teacher's state: no layer and no token
    outweighs the others. In language models some states are hundreds of times as large as the rest.
    """
    return _over_layers(_relative_squares, student_outputs, teacher_outputs, batch)


def cosine(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch) -> Tensor:
    """1 - cosine of the hidden states, matched and averaged as in `hidden_mse`; 1 where a state is all zeros."""
    return _over_layers(_angles, student_outputs, teacher_outputs, batch)


def embedding_mse(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch) -> Tensor:
    """Mean squared difference of the embedding outputs (hidden state 0) over real tokens."""
    states = student_outputs.hidden_states[0], teacher_outputs.hidden_states[0]
    return token_mean(batch["attention_mask"])(_state_distance(_squares, *states))


Distance = Callable[[Tensor, Tensor], Tensor]  # states [B, N, D] of student and teacher -> [B, N]


def _squares(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean(-1)


def _relative_squares(student: Tensor, teacher: Tensor) -> Tensor:
    # a smaller floor overflows where the teacher's state is 0, and a masked token's infinity is no longer masked
    return _squares(student, teacher) / teacher.square().mean(-1).clamp_min(torch.finfo(torch.float32).eps)


def _angles(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


def _over_layers(distance: Distance, student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch) -> Tensor:
    student, teacher = student_outputs.hidden_states, teacher_outputs.hidden_states
    pairs = layer_pairs(len(student) - 1, len(teacher) - 1)
    mean = token_mean(batch["attention_mask"])
    return torch.stack([mean(_state_distance(distance, student[i], teacher[j])) for i, j in pairs]).mean()


def _state_distance(distance: Distance, student: Tensor, teacher: Tensor) -> Tensor:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student state {tuple(student.shape)} and teacher state {tuple(teacher.shape)} differ in shape; "
            "project the student first (distill.matching.Projection)"
        )
    return distance(student.float(), teacher.float())


def embedding_table_mse(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch) -> Tensor:
    """Mean squared difference of the input embedding tables, all V x D numbers, whatever the batch.

    Raises:
        RecipeError: they differ in vocabulary or width.
    Source: Lv et al. 2023 (arXiv:2308.15122).
    """
    student, teacher = student_outputs.embedding_table, teacher_outputs.embedding_table
    if student.shape != teacher.shape:
        raise RecipeError(
            f"embedding_table_mse: the student's table {tuple(student.shape)} and the teacher's {tuple(teacher.shape)} "
            "differ in vocabulary or width; make them equal, or use embedding_mse, which projects embedded tokens"
        )
    return F.mse_loss(student.float(), teacher.float())


def spike_rate(student_outputs: Outputs, teacher_outputs: Outputs, batch: Batch, *, target: float = 0.1) -> Tensor:
    """Mean over the student's neuron sites of (rate - target)^2, the rate being that of real tokens over all steps.

    No teacher, no labels. Rates are those of a whole batch, so over parts of it the loss is larger by the variance of
    their rates: the one objective that other numbers of processes or of accumulated batches change a little. Silent
    neurons are reached if their spikes have no sign. Under FSDP2 an objective on the last layer must stand beside it:
    its backward gathers the weights.

    Args:
        target: share of neurons that should fire per step, in [0, 1].
    Raises:
        RecipeError: target out of range, or rates without a gradient while one is wanted.
    """
    if not 0 <= target <= 1:
        raise RecipeError(f"spike_rate: target is a share of neurons, in [0, 1], got {target}")
    rates = torch.stack([rate.float().mean() for rate in student_outputs.spike_rates.values()])
    if torch.is_grad_enabled() and not rates.requires_grad:
        raise RecipeError(
            "spike_rate: this student's spikes have no gradient (it is trained at equilibrium, or has no trained "
            "weights before its neurons), so nothing can be learned from their rates; leave the objective out"
        )
    return (rates - target).square().mean()


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
    ignored, count = ~pairs, pairs.sum().clamp_min(1)
    losses = []
    for i, j in layer_pairs(len(student), len(teacher)):
        s, t = student[i - 1].float(), teacher[j - 1].float()
        if s.shape[1] != t.shape[1]:
            s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
        difference = (s - t).masked_fill(ignored, 0.0)  # before the square: scores may hold a mask's -inf
        losses.append(difference.square().mean(1).sum() / count)
    return torch.stack(losses).mean()


class Objective(NamedTuple):
    """An objective and what it needs; `unit` is what its mean runs over, so that ranks can be weighted rightly."""

    function: Callable[..., Tensor]
    unit: Literal["logit", "label", "token", "pair", "text"]
    needs: tuple[str, ...] = ()  # optional model outputs, or embedding_table
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
    "head_tail_kl": Objective(head_tail_kl, "logit"),
    "wasserstein": Objective(wasserstein, "logit"),
    "logit_mse": Objective(logit_mse, "logit"),
    "cross_entropy": Objective(cross_entropy, "label", needs_teacher=False),
    "l2wrap": Objective(l2wrap, "label", needs_teacher=False),
    "hidden_mse": Objective(hidden_mse, "token", ("hidden_states",)),
    "relative_hidden_mse": Objective(relative_hidden_mse, "token", ("hidden_states",)),
    "cosine": Objective(cosine, "token", ("hidden_states",)),
    "embedding_mse": Objective(embedding_mse, "token", ("hidden_states",)),
    "embedding_table_mse": Objective(embedding_table_mse, "text", ("embedding_table",)),
    "attention_mse": Objective(attention_mse, "pair", ("attentions",)),
    "attention_score_mse": Objective(attention_score_mse, "pair", ("attention_scores",)),
    "spike_rate": Objective(spike_rate, "token", ("spike_rates",), needs_teacher=False),
}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Try an objective with these options on two made-up texts, so that what is wrong shows before anything is trained.

    Raises:
        RecipeError: an option is of the wrong kind or out of range.
    """
    states, scores = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(2, 1, 3, 3)
    outputs = SimpleNamespace(
        logits=torch.tensor([[0.0, 1.0], [2.0, 1.0]]),
        hidden_states=(states, states),
        attentions=(scores,),
        attention_scores=(scores,),
        embedding_table=states[0],
        spike_rates={"neuron": states.mean((1, 2))},
    )
    batch = {"attention_mask": torch.ones(2, 3), "labels": torch.tensor([0, 1])}
    try:
        OBJECTIVES[name].function(outputs, outputs, batch, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"objectives.{name}: {' '.join(str(error).split())}") from error


def count_units(unit: str, batch: Batch, *, per_token: bool = False) -> Tensor:
    """How many examples, labels, real tokens or pairs of real tokens an objective's mean runs over, a float scalar.

    "logit" and "label" are examples, or tokens where every token is predicted; "text" is always examples, with labels
    or without.

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
