"""The module that is trained: a student, its projections, and a frozen teacher that is never part of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from snlp_zoo.distill.matching import Projection
from snlp_zoo.distill.objectives import OBJECTIVES, count_units


class Distiller(nn.Module):
    """Maps a batch to one loss per objective. The teacher's weights are neither parameters nor saved state.

    Args:
        student: the model that learns.
        teacher: frozen here (evaluation mode, no gradients); None if no objective needs one.
        objectives: name in `OBJECTIVES` -> keyword options.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, objectives: Mapping[str, dict[str, Any]]
    ) -> None:
        super().__init__()
        self.student = student
        self.objectives = {name: (OBJECTIVES[name], options) for name, options in objectives.items()}
        self._teacher = (teacher.eval().requires_grad_(False),) if teacher is not None else ()  # a tuple hides it
        needs = {need for objective, _ in self.objectives.values() for need in objective.needs}
        self.wanted = {f"output_{need}": True for need in needs}
        self.per_token = type(student).__name__.endswith("ForMaskedLM")
        width = teacher.config.hidden_size if teacher is not None and needs else student.config.hidden_size
        self.projection = Projection(student.config.num_hidden_layers + 1, student.config.hidden_size, width)

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What each objective's mean runs over in this batch, [objectives]."""
        units = [objective.unit for objective, _ in self.objectives.values()]
        return torch.stack([count_units(unit, batch, per_token=self.per_token) for unit in units])

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The objectives' losses on this batch, unweighted, float32 [objectives]."""
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
        student = self.student(**inputs, **self.wanted)
        if student.hidden_states is not None:
            student.hidden_states = self.projection(student.hidden_states)
        teacher = None
        if self._teacher:
            with torch.no_grad():
                teacher = self._teacher[0](**inputs, **self.wanted)
        losses = [o.function(student, teacher, batch, **options) for o, options in self.objectives.values()]
        return torch.stack(losses)
