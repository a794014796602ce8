"""Spikes and membranes of one text, to look at."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snlp_zoo.energy.report import split_texts
from snlp_zoo.layers.bernoulli import BernoulliNode
from snlp_zoo.layers.neurons import BaseNode, ElasticBiSpike
from snlp_zoo.ops import Surrogate, elastic_bispike


@dataclass(frozen=True)
class Recorded:
    """One neuron's text: spikes and charged membranes [T, N, D], in units where `threshold` fires.

    threshold: of each step, [T]; ternary neurons fire at minus the threshold too.
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
    nodes = {name: module for name, module in model.named_modules() if isinstance(module, BaseNode)}
    starts: dict[nn.Module, Tensor | None] = {}

    def before(node, inputs, kwargs):
        starts[node] = (kwargs.get("state") or {}).get(node)
        if isinstance(node, BernoulliNode):
            starts[node] = node.start(inputs[0], kwargs.get("counts"))

    def after(name):
        def hook(node, inputs, spikes):
            membranes, threshold = _charged(node, inputs[0], starts[node])
            kept.setdefault(name, []).append((spikes.flatten(1, -3), membranes.flatten(1, -3), threshold))

        return hook

    handles = [node.register_forward_pre_hook(before, with_kwargs=True) for node in nodes.values()]
    handles += [node.register_forward_hook(after(name)) for name, node in nodes.items()]
    was_training = model.training
    try:
        model.eval()(**next(split_texts(batch)))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    found = {}
    for name, parts in kept.items():
        spikes, membranes, threshold = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        ternary = isinstance(nodes[name], ElasticBiSpike)
        found[name] = Recorded(spikes.squeeze(1), membranes.squeeze(1), threshold, _window(nodes[name]), ternary)
    return found


def _charged(node: Any, current: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """The membrane of every step before it fires, [T, ...], and the thresholds, [T]."""
    charged = []
    if isinstance(node, ElasticBiSpike):
        for t, x in enumerate(current):
            charged.append(x if v is None else v + x)
            _, v = elastic_bispike(x.unsqueeze(0), v, node.alpha[t : t + 1], beta=node.beta, reset=node.reset_kind)
        return torch.stack(charged), node.alpha.detach() / 2
    rest = node.v_reset or 0.0
    v = torch.full_like(current[0], rest) if v is None else v
    leak = 1 / node._tau()
    for x in current:
        h = v + (x * leak if getattr(node, "decay_input", False) else x) - (v - rest) * leak
        fired = h >= node.v_threshold
        v = h - fired * node.v_threshold if node.v_reset is None else torch.where(fired, node.v_reset, h)
        charged.append(h)
    return torch.stack(charged), current.new_full((len(current),), node.v_threshold)


def _window(node: Any) -> float | None:
    if isinstance(node, ElasticBiSpike):
        return 2.0  # |m| <= alpha, twice the threshold
    function = node.surrogate_function
    surrogate = Surrogate(function) if isinstance(function, str) else function
    if not isinstance(surrogate, Surrogate):
        return None
    distance = torch.linspace(0, 20, 20001)
    slope = surrogate.derivative(distance)
    steep = distance[slope >= 0.1 * slope.max()].max().item()
    return steep / node.v_threshold if steep < 20 else None
