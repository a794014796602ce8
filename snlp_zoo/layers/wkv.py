"""Layers that walk over tokens and carry a state from one to the next.

Shapes: B batch, N tokens, C channels. A state is name -> [B, ...]; None: start at rest and keep nothing.
"""

import torch
from torch import Tensor, nn

from snlp_zoo.layers.neurons import BaseNode
from snlp_zoo.ops import wkv4


class WKV4(nn.Module):
    """`ops.wkv4` as a module without parameters, which observers see as one operation."""

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend

    def forward(
        self, w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """w, u [C], k, v [B, N, C], state as in `ops.wkv4` -> out [B, N, C], state."""
        return wkv4(w, u, k, v, state, backend=self.backend)


def shifted(x: Tensor, state: dict[str, Tensor] | None, name: str) -> Tensor:
    """Every token's predecessor, x [B, N, C] -> [B, N, C]; before the first one, state[name] [B, C] or zeros."""
    if state is None:
        return nn.functional.pad(x, (0, 0, 1, -1))
    before = torch.cat([state[name].to(x.dtype).unsqueeze(1), x[:, :-1]], 1)
    state[name] = x[:, -1].clone()  # a view would keep all tokens
    return before


def fired(node: BaseNode, current: Tensor, state: dict[str, Tensor] | None, name: str) -> Tensor:
    """Spikes [B, N, C] of a neuron whose membrane walks over tokens, from state[name] [B, C]; current [B, N, C]."""
    current = current.transpose(0, 1)
    if state is None:
        return node(current, from_rest=True).transpose(0, 1)
    membranes: dict[nn.Module, Tensor] = {node: state[name]}
    spikes = node(current, state=membranes)
    state[name] = membranes[node]
    return spikes.transpose(0, 1)
