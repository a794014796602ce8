"""How often neurons fire, and how many of them their surrogates can teach, measured where it happens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from snlp_zoo.layers.neurons import BaseNode, ExplicitState, TernaryLIFNode, as_recorded
from snlp_zoo.layers.watching import hooked

Receive = Callable[[str, ExplicitState, Tensor, Tensor, int], None]


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
        slope = per_step * ctx.slope
        whole = torch.broadcast_shapes(slope.shape, ctx.shape)  # one neuron may stand for all tokens
        return slope.expand(whole).sum_to_size(ctx.shape).to(ctx.dtype), None, None


class FiringRates:
    """How often neurons fired on real tokens, site by site and step by step.

    Rates have a gradient where spikes have one: that of sum |s| / amplitude over the number of neurons.
    """

    def __init__(self) -> None:
        self._fired: dict[str, list[Tensor]] = {}  # site -> [T] for each call: spikes on real tokens
        self._slots: dict[str, list[Tensor]] = {}  # the same: neurons on real tokens
        self._read: dict[str, int] = {}  # site -> tokens so far of texts that come in pieces

    def add(self, site: str, spikes: Tensor, mask: Tensor, unsigned: bool = False, in_pieces: bool = False) -> None:
        """spikes [T, B, N, D]: the site's next steps, none of them negative if unsigned; mask [B, N].

        in_pieces: spikes may have fewer tokens than the mask; they are then the next ones of the same steps.
        """
        start, total = self._read.get(site, 0), mask.shape[1]
        if in_pieces:
            mask = mask[:, start : start + spikes.shape[2]]
            self._read[site] = (start + spikes.shape[2]) % total
        fired, slots = self._fired.setdefault(site, []), self._slots.setdefault(site, [])
        before = (fired.pop(), slots.pop()) if start else (0, 0)
        fired.append(_Fired.apply(spikes, mask, unsigned) + before[0])
        slots.append((mask.sum() * spikes.shape[-1]).expand(len(spikes)) + before[1])

    def shares(self) -> dict[str, Tensor]:
        """site -> share of neurons that fired, over all steps, without axes."""
        return {site: torch.cat(self._fired[site]).sum() / torch.cat(self._slots[site]).sum() for site in self._fired}

    def result(self) -> dict[str, Any]:
        """spike_rates: site -> [T], share of neurons that fired at each step; firing_rate: that share over all."""
        fired = {site: torch.cat(parts) for site, parts in self._fired.items()}
        slots = {site: torch.cat(parts) for site, parts in self._slots.items()}
        if not fired:  # a dense model
            return {"spike_rates": {}, "firing_rate": torch.zeros(())}
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
                if isinstance(module, TernaryLIFNode):  # how often it fires has nothing to do with its amplitude
                    spikes = module.signs(spikes)
                walks = getattr(module, "over_tokens", False)
                rates.add(name, as_recorded(module, spikes), mask, unsigned, in_pieces=walks)

        return hook

    nodes = [(name, module) for name, module in net.named_modules() if isinstance(module, BaseNode)]
    with hooked([module.register_forward_hook(record(name)) for name, module in nodes]):
        yield result
    result |= rates.result()


@contextmanager
def membranes_watched(net: nn.Module, receive: Receive) -> Iterator[None]:
    """After every call of a neuron below `net`: receive(name, neuron, spikes, membranes, first time step).

    Kernels keep membranes in registers, so these are computed anew, by the reference and without gradient.

    Raises:
        ValueError: a neuron runs single steps: it does not know T.
    """
    thread = None if torch.compiler.is_compiling() else get_ident()
    starts: dict[nn.Module, tuple[Tensor | None, int]] = {}

    def before(node: Any, inputs: tuple, kwargs: dict) -> None:
        at_rest, state = kwargs.get("from_rest"), kwargs.get("state")
        kept = node.v if isinstance(node.v, Tensor) and node.v.shape == inputs[0].shape[1:] else None
        resting = node.start(inputs[0], kwargs.get("counts")) if at_rest else None
        v = resting if at_rest else kept if state is None else state.get(node)
        starts[node] = v, 0 if at_rest else getattr(node, "step", 0)

    def after(name: str) -> Callable:
        def hook(node: ExplicitState, inputs: tuple, spikes: Tensor) -> None:
            if thread is not None and get_ident() != thread:  # another thread's forward through the same model
                return
            if node.step_mode != "m":
                raise ValueError(f"{name}: membranes are watched over T at once, but step_mode is 's'; use 'm'")
            v, step = starts[node]
            receive(name, node, spikes, node.membranes(inputs[0].detach(), v, step), step)

        return hook

    nodes = [(name, module) for name, module in net.named_modules() if isinstance(module, ExplicitState)]
    handles = [node.register_forward_pre_hook(before, with_kwargs=True) for _, node in nodes]
    handles += [node.register_forward_hook(after(name)) for name, node in nodes]
    with hooked(handles):
        yield


@contextmanager
def effective_domain_recorded(net: nn.Module, mask: Tensor, enabled: bool = True) -> Iterator[dict[str, Tensor]]:
    """During one forward of `net`, measure how many of its membranes a surrogate gradient reaches, on real tokens.

    A membrane counts where the surrogate's derivative, at the nearer threshold, is at least 1 % of its peak
    (`layers.neurons.NEGLIGIBLE` says why); of elastic bi-spike, where the straight-through gradient passes. For the
    surrogate "ste" the share is 1 by definition. Temperature and learned steepness are those of the moment.

    Args:
        mask: attention_mask, [B, N]; the neurons see [T, B, N, D].
    Yields:
        A dictionary, filled on leaving: module name -> share, without axes. It stays empty unless enabled.
    Raises:
        ValueError: as `membranes_watched`.
    """
    result: dict[str, Tensor] = {}
    if not enabled:
        yield result
        return
    rates = FiringRates()

    def receive(name: str, node: ExplicitState, spikes: Tensor, membranes: Tensor, step: int) -> None:
        rates.add(name, as_recorded(node, node.reached(membranes, step)), mask, in_pieces=node.over_tokens)

    with membranes_watched(net, receive):
        yield result
    result |= rates.shares()
