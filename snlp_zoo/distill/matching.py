"""Which teacher layer teaches which student layer, projections between their widths, a teacher's attention scores."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from snlp_zoo.errors import RecipeError
from snlp_zoo.layers.watching import hooked
from snlp_zoo.models.transfer import spread_layers

LAYER_MAPS = ["spread", "skip"]
LayerMap = str | list[int]  # one of these, or a teacher layer for each of the student's


def layer_pairs(student_layers: int, teacher_layers: int, layer_map: LayerMap = "spread") -> list[tuple[int, int]]:
    """(student hidden state, teacher hidden state) for every student layer; 0 is the embedding output, 1 layer one.

    Args:
        layer_map: "spread", evenly and the last on the last: 3 of 6 gives [(1, 2), (2, 4), (3, 6)]; "skip", evenly and
            the first on the first, as SpikeBERT was released: [(1, 1), (2, 3), (3, 5)]; or the teacher's layer for each
            of the student's. A student deeper than its teacher has neighbours that share one.
    Raises:
        RecipeError: unknown name, not a layer for each of the student's, or no such layer of the teacher.
    """
    if layer_map == "spread":
        layers = [layer + 1 for layer in spread_layers(student_layers, teacher_layers)]
    elif layer_map == "skip":
        layers = [i * teacher_layers // student_layers + 1 for i in range(student_layers)]
    elif isinstance(layer_map, str) or not all(isinstance(layer, int) for layer in layer_map):
        raise RecipeError(f"layer_map is {layer_map!r}; use 'spread', 'skip', or a list of the teacher's layers")
    elif len(layer_map) != student_layers or not all(1 <= layer <= teacher_layers for layer in layer_map):
        raise RecipeError(
            f"layer_map {list(layer_map)} must name one of the teacher's layers 1 to {teacher_layers} for each of the "
            f"student's {student_layers}; use 'spread' or 'skip' for any depth"
        )
    else:
        layers = list(layer_map)
    return list(enumerate(layers, start=1))


def matched(outputs: Any, student_layers: int, layer_map: LayerMap) -> Any:
    """A teacher's outputs with one hidden state, attention and score tensor for each of the student's layers, in place.

    Objectives then compare layer i with layer i.
    """
    for name, first in (("hidden_states", 1), ("attentions", 0), ("attention_scores", 0)):  # embeddings come first
        if theirs := getattr(outputs, name, None):
            layers = [j - 1 + first for _, j in layer_pairs(student_layers, len(theirs) - first, layer_map)]
            setattr(outputs, name, (*theirs[:first], *(theirs[layer] for layer in layers)))
    return outputs


class Projection(nn.Module):
    """Maps a student's hidden states to the teacher's width, one linear layer per state; for training only.

    Args:
        states: number of hidden states, L + 1.
        student_size, teacher_size: widths; equal widths need no parameters.
    """

    def __init__(self, states: int, student_size: int, teacher_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        if student_size != teacher_size:
            self.layers.extend(nn.Linear(student_size, teacher_size) for _ in range(states))

    def forward(self, hidden_states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """L + 1 times [B, N, student_size] -> L + 1 times [B, N, teacher_size]."""
        if not self.layers:
            return hidden_states
        return tuple(layer(state) for layer, state in zip(self.layers, hidden_states, strict=True))


class SharedProjection(nn.Module):
    """One affine map from every hidden state of a student to the teacher's width; for training only.

    It is there for equal widths too, where it starts as the identity: firing rates cannot be negative, a teacher's
    states are, and only the map's bias bridges that.
    """

    def __init__(self, student_size: int, teacher_size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(student_size, teacher_size)
        if student_size == teacher_size:
            nn.init.eye_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)

    def forward(self, hidden_states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """L + 1 times [B, N, student_size] -> L + 1 times [B, N, teacher_size]."""
        return tuple(self.layer(state) for state in hidden_states)


class NormedProjection(nn.Module):
    """A linear layer and a norm for each of a student's layers; for training only. Embeddings stay as they are.

    Args:
        layers: number of layers, L.
        student_size, teacher_size: widths.
    Source: Lv et al. 2023 (arXiv:2308.15122), SpikeBERT.
    """

    def __init__(self, layers: int, student_size: int, teacher_size: int) -> None:
        super().__init__()
        taps = (nn.Sequential(nn.Linear(student_size, teacher_size), nn.LayerNorm(teacher_size)) for _ in range(layers))
        self.layers = nn.ModuleList(taps)

    def forward(self, hidden_states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """L + 1 times [B, N, student_size] -> the first as it is, L times [B, N, teacher_size]."""
        embedded, *states = hidden_states
        return embedded, *(layer(state) for layer, state in zip(self.layers, states, strict=True))


def score_projections(teacher: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """The query and the key projection of every layer of a BERT-like teacher, first layer first.

    Raises:
        RecipeError: it has none that are called like BERT's.
    """
    modules = dict(teacher.named_modules())
    names = [name.removesuffix("query") for name in modules if name.endswith("attention.self.query")]
    if not names or any(f"{name}key" not in modules for name in names):
        raise RecipeError(
            f"attention_score_mse needs a teacher with modules attention.self.query and attention.self.key, like BERT; "
            f"{type(teacher).__name__} has none: use attention_mse"
        )
    return [(modules[f"{name}query"], modules[f"{name}key"]) for name in names]


@contextmanager
def attention_scores_recorded(teacher: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within it, a forward of the teacher appends every layer's q k^T / sqrt(E) [B, H, N, N] to the list."""
    heads, queries, scores = teacher.config.num_attention_heads, [], []

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, H, N, E]

    def keep_query(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        queries.append(split(output))

    def add_scores(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        query = queries.pop()
        scores.append(query @ split(output).transpose(-1, -2) * query.shape[-1] ** -0.5)

    handles = []
    for query, key in score_projections(teacher):
        handles += [query.register_forward_hook(keep_query), key.register_forward_hook(add_scores)]
    with hooked(handles):
        yield scores
