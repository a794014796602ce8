"""Weights of one model copied into another, and what BERT-like teachers call ours."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

Weights = Mapping[str, Tensor]
# our module path inside a layer -> the teacher's; every family names its modules so
_BERT_LAYER = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp.norm": "output.LayerNorm",
}


class TransferReport(NamedTuple):
    copied: list[str]  # student parameters that now hold the teacher's values
    not_copied: dict[str, str]  # student parameter -> why it keeps its fresh initialisation


def spread_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """Teacher layer (0-based) for each student layer, evenly spread, the last on the last: 3 of 6 gives [1, 3, 5]."""
    return [max((i + 1) * teacher_layers // student_layers - 1, 0) for i in range(student_layers)]


def short_name(model: PreTrainedModel, name: str) -> str:
    """A weight's name without the family's prefix, as the encoder alone has it."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def by_short_name(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's state, parameters and buffers, by `short_name`."""
    return {short_name(model, name): tensor for name, tensor in model.state_dict().items()}


def bert_name(name: str, layers: list[int]) -> str:
    """What BERT calls a weight of ours (a `short_name`), given the teacher's layer for each of our layers."""
    path, _, leaf = name.rpartition(".")
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", path.removesuffix(".linear"))
    if match is None or match[2] not in _BERT_LAYER:
        return name
    return f"encoder.layer.{layers[int(match[1])]}.{_BERT_LAYER[match[2]]}.{leaf}"


@torch.no_grad()
def copy_weights(ours: Weights, theirs: Weights, name_of: Callable[[str], str]) -> TransferReport:
    """Copy into each of our tensors, in place, theirs of the name that `name_of` gives, if there is one that fits."""
    copied, not_copied = [], {}
    for name, tensor in ours.items():
        found = theirs.get(name_of(name))
        if found is None:
            not_copied[name] = "the teacher has no such weight"
        elif found.shape != tensor.shape:
            not_copied[name] = f"shape {tuple(tensor.shape)}, the teacher's is {tuple(found.shape)}"
        else:
            tensor.copy_(found)
            copied.append(name)
    return TransferReport(copied, not_copied)
