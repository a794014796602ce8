"""How often neurons fire, measured where it happens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from snlp_zoo.layers.neurons import BaseNode, ElasticBiSpike, _translate


class _Fired(torch.autograd.Function):
    """Spikes on real tokens, [T]: a count, with the gradient of sum |s| / amplitude, the amplitude being max |s[t]|.

    What the backward needs is kept outside of autograd's store: a checkpointed layer that is computed again, then
    without being watched, must find as many saved tensors as in the first place.
    """

    @staticmethod
    def forward(ctx, spikes: Tensor, mask: Tensor, unsigned: bool) -> Tensor:
        real = mask.bool().unsqueeze(-1)
        if ctx.needs_input_grad[0]:
            amplitude = spikes.abs().flatten(1).amax(1)
            ctx.amplitude = torch.where(amplitude > 0, amplitude, 1).float()
            # |s| of an unsigned spike is s, so its gradient reaches the silent too; that of a signed one is sign(s)
            ctx.slope = real if unsigned else spikes.sign().to(torch.int8) * real
            ctx.shape, ctx.dtype = spikes.shape, spikes.dtype
        return ((spikes != 0) & real).flatten(1).sum(1).float()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        per_step = (grad / ctx.amplitude).view(-1, *(1,) * (len(ctx.shape) - 1))
        return (per_step * ctx.slope).expand(ctx.shape).to(ctx.dtype), None, None


class FiringRates:
    """How often neurons fired on real tokens, site by site and step by step.

    Rates have a gradient where spikes have one: that of sum |s| / amplitude over the number of neurons.
    """

    def __init__(self) -> None:
        self._fired: dict[str, list[Tensor]] = {}  # site -> [T] for each call: spikes on real tokens
        self._slots: dict[str, list[Tensor]] = {}  # the same: neurons on real tokens

    def add(self, site: str, spikes: Tensor, mask: Tensor, unsigned: bool = False) -> None:
        """spikes [T, B, N, D]: the site's next steps, none of them negative if unsigned; mask [B, N]."""
        self._fired.setdefault(site, []).append(_Fired.apply(spikes, mask, unsigned))
        self._slots.setdefault(site, []).append((mask.sum() * spikes.shape[-1]).expand(len(spikes)))

    def result(self) -> dict[str, Any]:
        """spike_rates: site -> [T], share of neurons that fired at each step; firing_rate: that share over all."""
        fired = {site: torch.cat(parts) for site, parts in self._fired.items()}
        slots = {site: torch.cat(parts) for site, parts in self._slots.items()}
        total = torch.stack([slots[site].sum() for site in slots]).sum()
        return {
            "spike_rates": {site: fired[site] / slots[site].clamp_min(1) for site in fired},
            "firing_rate": sum(fired[site].sum() for site in fired) / total.clamp_min(1),
        }


@contextmanager
def firing_rates_recorded(net: nn.Module, mask: Tensor, enabled: bool = True) -> Iterator[dict[str, Any]]:
    """During one forward of `net`, measure how often its spiking neurons fire on real tokens.

    Args:
        mask: attention_mask, [B, N].
    Yields:
        A dictionary, filled on leaving: "spike_rates" (module name -> [T], share of neurons that fired at each step)
        and "firing_rate" (that share over all modules and steps). It stays empty unless enabled. Gradients are as in
        `FiringRates`.
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
                unsigned = getattr(module, "spike_kind", None) in ("binary", "scaled")
                rates.add(name, spikes, mask, unsigned)

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
