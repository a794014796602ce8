"""How often neurons fire, measured where it happens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from snlp_zoo.layers.neurons import BaseNode, ElasticBiSpike, _translate


class FiringRates:
    """How often neurons fired on real tokens, site by site and step by step."""

    def __init__(self) -> None:
        self._fired: dict[str, list[Tensor]] = {}  # site -> [T] for each call: spikes on real tokens
        self._slots: dict[str, list[Tensor]] = {}  # the same: neurons on real tokens

    def add(self, site: str, spikes: Tensor, mask: Tensor) -> None:
        """spikes [T, B, N, D]: the site's next steps; mask [B, N]."""
        fired = ((spikes != 0) & mask.bool().unsqueeze(-1)).flatten(1).sum(1).float()
        self._fired.setdefault(site, []).append(fired)
        self._slots.setdefault(site, []).append((mask.sum() * spikes.shape[-1]).expand(len(spikes)))

    def result(self) -> dict[str, Any]:
        """spike_rates: site -> [T], share of neurons that fired at each step; firing_rate: that share over all."""
        fired = {site: torch.cat(parts) for site, parts in self._fired.items()}
        slots = {site: torch.cat(parts) for site, parts in self._slots.items()}
        total = sum(slots[site].sum() for site in slots)
        return {
            "spike_rates": {site: fired[site] / slots[site] for site in fired},
            "firing_rate": sum(fired[site].sum() for site in fired) / total,
        }


@contextmanager
def firing_rates_recorded(net: nn.Module, mask: Tensor, enabled: bool = True) -> Iterator[dict[str, Any]]:
    """During one forward of `net`, measure how often its spiking neurons fire on real tokens.

    Args:
        mask: attention_mask, [B, N].
    Yields:
        A dictionary, filled on leaving: "spike_rates" (module name -> [T], share of neurons that fired at each step)
        and "firing_rate" (that share over all modules and steps). It stays empty unless enabled.
    """
    result: dict[str, Any] = {}
    if not enabled:
        yield result
        return
    rates = FiringRates()
    thread = None if torch.compiler.is_compiling() else get_ident()

    def record(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, spikes: Tensor) -> None:
            if thread is None or get_ident() == thread:  # not another thread's forward through the same model
                rates.add(name, spikes, mask)

        return hook

    nodes = [(name, module) for name, module in net.named_modules() if isinstance(module, BaseNode)]
    handles = [module.register_forward_hook(record(name)) for name, module in nodes]
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
    result |= rates.result()


@contextmanager
def effective_domain_recorded(net: nn.Module, mask: Tensor, enabled: bool = True) -> Iterator[dict[str, Tensor]]:
    """During one forward of `net`: module name -> share of membranes whose surrogate gradient is not negligible."""
    result: dict[str, Tensor] = {}

    def record(name: str) -> Callable:
        def hook(module: Any, inputs: tuple, spikes: Tensor) -> None:
            h = inputs[0][0]  # the first step's, from rest
            if isinstance(module, ElasticBiSpike):
                inside = h.abs() <= module.alpha[0]
            else:
                z, derivative = h - module.v_threshold, _translate(module.surrogate_function).derivative
                inside = derivative(z) >= 0.01 * derivative(torch.zeros_like(z[:1, :1]))
            result[name] = inside[mask.bool()].float().mean()

        return hook

    nodes = [(name, module) for name, module in net.named_modules() if isinstance(module, BaseNode)] if enabled else []
    handles = [module.register_forward_hook(record(name)) for name, module in nodes]
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
