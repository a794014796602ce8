"""Spikes and membranes of one text, to look at."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snlp_zoo.energy.report import split_texts
from snlp_zoo.errors import EnergyError
from snlp_zoo.layers.firing import membranes_watched
from snlp_zoo.layers.neurons import ElasticBiSpike, ExplicitState, TernaryLIFNode, as_recorded
from snlp_zoo.layers.watching import evaluating


@dataclass(frozen=True)
class Recorded:
    """One neuron's text: spikes and charged membranes [T, N, D], in units where `threshold` fires.

    T is 1 where the membrane walks over the N tokens.

    threshold: of each step, [T]; ternary neurons fire at minus the threshold too. Of `TernaryLIFNode` it is 1: its
        membranes are divided by the threshold of their sign and channel.
    reached: [T, N, D], the membranes at which the gradient of firing is not negligible (`ExplicitState.reached`).
    """

    spikes: Tensor
    membranes: Tensor
    threshold: Tensor
    reached: Tensor
    ternary: bool


@torch.no_grad()
def record(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Recorded]:
    """Neuron -> what it did on the first text of the batch, without padding.

    Raises:
        EnergyError: as `split_texts`, or no neuron keeps a membrane (converted models' do not).
    """
    kept: dict[str, list[tuple[Tensor, ...]]] = {}

    def receive(name: str, node: ExplicitState, spikes: Tensor, membranes: Tensor, step: int) -> None:
        reached = as_recorded(node, node.reached(membranes, step))
        spikes, membranes = as_recorded(node, spikes), as_recorded(node, membranes)
        membranes, threshold = _in_thresholds(node, membranes, step)
        texts = (x.flatten(1, -3).squeeze(1) for x in (spikes, membranes, reached))
        kept.setdefault(name, []).append((*texts, threshold))

    with evaluating(model), membranes_watched(model, receive):
        model(**next(split_texts(batch)))
    if not kept:
        raise EnergyError(f"{type(model).__name__} has no neuron that keeps a membrane; there is nothing to record")
    found = {}
    for name, parts in kept.items():
        spikes, membranes, reached, threshold = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        ternary = isinstance(model.get_submodule(name), ElasticBiSpike | TernaryLIFNode)
        found[name] = Recorded(spikes, membranes, threshold, reached, ternary)
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
