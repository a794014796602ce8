"""Which teacher layer teaches which student layer, and projections where their widths differ."""

from torch import Tensor, nn

from snlp_zoo.models.base import spread_layers


def layer_pairs(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """(student hidden state, teacher hidden state) for every student layer; 0 is the embedding output, 1 layer one.

    Teacher layers are evenly spread and the last matches the last: 3 of 6 gives [(1, 2), (2, 4), (3, 6)].
    """
    return [(i + 1, j + 1) for i, j in enumerate(spread_layers(student_layers, teacher_layers))]


class Projection(nn.Module):
    """Maps a student's hidden states to the teacher's width, one linear layer per state; training only, never saved.

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
