"""The module that is trained: a student, its projections, and a frozen teacher that is never part of it."""

from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from inspect import signature
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from snlp_zoo.data.batches import model_inputs
from snlp_zoo.distill.matching import (
    LayerMap,
    NormedProjection,
    Projection,
    SharedProjection,
    attention_scores_recorded,
    matched,
)
from snlp_zoo.distill.objectives import OBJECTIVES, count_units
from snlp_zoo.errors import RecipeError
from snlp_zoo.registry import task_of

_OF_DENSE_MODELS = ("output_hidden_states", "output_attentions")


def gives_attention_scores(student: Any) -> bool:
    """Whether an encoder (class or instance) can return its attention scores."""
    return "output_attention_scores" in signature(student.forward).parameters


class Distiller(nn.Module):
    """Maps a batch to one loss per objective. The teacher's weights are neither parameters nor saved state.

    Args:
        student: the model that learns.
        teacher: frozen here (evaluation mode, no gradients); None if no objective needs one.
        objectives: name in `OBJECTIVES` -> keyword options.
        projection: of hidden states to the teacher's width: "per_layer" (`Projection`), "shared" or "normed".
        layer_map: which teacher layer each student layer learns from, see `matching.layer_pairs`.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        objectives: Mapping[str, dict[str, Any]],
        projection: Literal["per_layer", "shared", "normed"] = "per_layer",
        layer_map: LayerMap = "spread",
    ) -> None:
        super().__init__()
        self.layer_map = layer_map
        self.student = student
        self.objectives = {name: (OBJECTIVES[name], options) for name, options in objectives.items()}
        frozen = (teacher.eval().requires_grad_(False),) if teacher is not None else ()
        self._teacher: tuple[Any, ...] = frozen  # a tuple hides it
        self._cast: dict[tuple, nn.Module] = {}  # copies of it, see `_as_cast`
        needs = {need for objective, _ in self.objectives.values() for need in objective.needs}
        self.tables = "embedding_table" in needs  # not a model's output: handed over here
        self.wanted = {f"output_{need}": True for need in sorted(needs - {"embedding_table"})}
        self.per_token = task_of(student) in ("masked-lm", "causal-lm")
        # whole crops are read at once: no state is to be kept
        self.more = {"use_cache": False} if task_of(student) == "causal-lm" else {}
        states = "hidden_states" in needs
        depth, own = student.config.num_hidden_layers, student.config.hidden_size
        width = teacher.config.hidden_size if teacher is not None and states else own
        if projection == "shared" and states:
            self.projection: nn.Module = SharedProjection(own, width)
        elif projection == "normed" and states:
            self.projection = NormedProjection(depth, own, width)
        else:
            self.projection = Projection(depth + 1, own, width)

    @property
    def configs(self) -> list[PreTrainedConfig]:
        """Of the student, and of the teacher if there is one."""
        return [model.config for model in (self.student, *self._teacher)]

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What each objective's mean runs over in this batch, [objectives]."""
        units = [objective.unit for objective, _ in self.objectives.values()]
        return torch.stack([count_units(unit, batch, per_token=self.per_token) for unit in units])

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The objectives' losses on this batch, unweighted, float32 [objectives]."""
        return self._losses_and_rate(batch)[0]  # FSDP2 wraps this method and the next one, each as a forward

    def losses_and_rate(self, batch: Mapping[str, Tensor], **more: bool) -> tuple[Tensor, Any]:
        """`forward`, and the student's firing rate if `output_spike_rates=True` is among what is asked of it."""
        return self._losses_and_rate(batch, **more)

    def _losses_and_rate(self, batch: Mapping[str, Tensor], **more: bool) -> tuple[Tensor, Any]:
        student = self.student(**model_inputs(batch, self.student), **self.more, **(self.wanted | more))
        if student.hidden_states is not None:
            student.hidden_states = self.projection(student.hidden_states)
        depth = self.student.config.num_hidden_layers
        teacher = matched(self._teach(batch), depth, self.layer_map) if self._teacher else None
        if self.tables:
            student.embedding_table = _embedding_table(self.student)
        losses = [o.function(student, teacher, batch, **options) for o, options in self.objectives.values()]
        return torch.stack(losses), getattr(student, "firing_rate", None)

    @torch.no_grad()
    def _teach(self, batch: Mapping[str, Tensor]) -> Any:
        """The teacher's outputs; a dense model does not give its scores, so they are taken from its projections."""
        teacher = self._as_cast(*self._teacher)
        wanted = {name: value for name, value in self.wanted.items() if name in _OF_DENSE_MODELS}
        scored = attention_scores_recorded(teacher) if "output_attention_scores" in self.wanted else nullcontext()
        with scored as scores:
            outputs = teacher(**model_inputs(batch, teacher), **self.more, **wanted)
        if scores is not None:
            outputs.attention_scores = tuple(scores)
        if self.tables:
            outputs.embedding_table = _embedding_table(teacher)
        return outputs

    def _as_cast(self, teacher: Any) -> Any:
        """The teacher; under autocast with linear layers in its dtype, which it would cast anew at every step."""
        device = teacher.device
        if not torch.is_autocast_enabled(device.type):
            return teacher
        key = device, torch.get_autocast_dtype(device.type)
        if key not in self._cast:
            self._cast[key] = _with_linear_layers_in(key[1], teacher)
        return self._cast[key]


def _with_linear_layers_in(dtype: torch.dtype, model: nn.Module) -> nn.Module:
    """A copy that shares every tensor, but for what only linear layers hold in float32: that it has in `dtype`."""
    linear = {id(p): p for m in model.modules() if type(m) is nn.Linear for p in m.parameters(recurse=False)}
    others = {id(p) for m in model.modules() if type(m) is not nn.Linear for p in m.parameters(recurse=False)}
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    for key, parameter in linear.items():
        if key not in others and parameter.dtype == torch.float32:
            shared[key] = nn.Parameter(parameter.to(dtype), requires_grad=False)
    return deepcopy(model, shared)


def _embedding_table(model: PreTrainedModel) -> Tensor:
    """Its input embeddings [V, D], as a whole."""
    table = cast(Tensor, model.get_input_embeddings().weight)
    if isinstance(table, DTensor):
        raise RecipeError("embedding_table_mse compares whole tables, FSDP2 has shards; use DDP, or embedding_mse")
    return table
