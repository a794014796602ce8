"""Spikes and membranes of one text, to look at."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from snlp_zoo.energy.report import split_texts
from snlp_zoo.layers.firing import membranes_watched
from snlp_zoo.layers.neurons import ElasticBiSpike, ExplicitState, Surrogated, TernaryLIFNode
from snlp_zoo.layers.watching import evaluating


@dataclass(frozen=True)
class Recorded:
    """One neuron's text: spikes and charged membranes [T, N, D], in units where `threshold` fires.

    threshold: of each step, [T]; ternary neurons fire at minus the threshold too. Of `TernaryLIFNode` it is 1: its
        membranes are divided by the threshold of their sign and channel.
    window: how far from the threshold the surrogate's slope is at least a tenth of its height; for ternary neurons how
        far from zero the straight-through gradient passes. In thresholds; None where it is not known.
    """

    spikes: Tensor
    membranes: Tensor
    threshold: Tensor
    window: float | None
    ternary: bool


@torch.no_grad()
def record(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Recorded]:
    """Neuron -> what it did on the first text of the batch, without padding.

    Raises:
        EnergyError: as `split_texts`.
    """
    kept: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def receive(name: str, node: ExplicitState, spikes: Tensor, membranes: Tensor, step: int) -> None:
        membranes, threshold = _in_thresholds(node, membranes, step)
        kept.setdefault(name, []).append((spikes.flatten(1, -3), membranes.flatten(1, -3), threshold))

    with evaluating(model), membranes_watched(model, receive):
        model(**next(split_texts(batch)))
    found = {}
    for name, parts in kept.items():
        spikes, membranes, threshold = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        node = model.get_submodule(name)
        ternary = isinstance(node, ElasticBiSpike | TernaryLIFNode)
        found[name] = Recorded(spikes.squeeze(1), membranes.squeeze(1), threshold, _window(node), ternary)
    return found


def _in_thresholds(node: Any, membranes: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Membranes and the threshold of every step, [T]; two or many thresholds become 1 by dividing membranes by them."""
    steps = len(membranes)
    if isinstance(node, ElasticBiSpike):
        return membranes, node.alpha.detach()[[(step + t) % node.time_steps for t in range(steps)]] / 2
    if isinstance(node, TernaryLIFNode):
        up, down = node.thresholds()
        return torch.where(membranes < 0, membranes / down, membranes / up), membranes.new_ones(steps)
    return membranes, membranes.new_full((steps,), node.v_threshold)


def _window(node: Any) -> float | None:
    if isinstance(node, ElasticBiSpike):
        return 2.0  # |m| <= alpha, twice the threshold
    if isinstance(node, TernaryLIFNode) or not isinstance(node, Surrogated):
        return None  # there are two, around either threshold; or there is none
    surrogate, distance = node.effective_surrogate(), torch.linspace(0, 20, 20001)
    slope = replace(surrogate, alpha=torch.as_tensor(surrogate.alpha).item()).derivative(distance)
    steep = distance[slope >= 0.1 * slope.max()].max().item()
    return steep / node.v_threshold if steep < 20 else None
