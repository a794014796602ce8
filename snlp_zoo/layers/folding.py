"""Amplitudes of ternary neurons, absorbed into the linear layers behind them: W (a s) = (W a) s.

What a neuron feeds is seen, not declared: one forward runs, and each tensor operation shows what becomes of its spikes.
A tensor of amplitudes goes along with them through every reordering, so that a linear layer's inputs know their own.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from snlp_zoo.errors import FoldError
from snlp_zoo.layers.neurons import BaseNode, ElasticBiSpike, TernaryLIFNode
from snlp_zoo.layers.quant import BitLinear
from snlp_zoo.layers.watching import evaluating, hooked
from snlp_zoo.ops.bit_linear import quantise

AnyModule = TypeVar("AnyModule", bound=nn.Module)

# the same values in another order or float dtype
_MOVES = {
    *("view", "_unsafe_view", "_reshape_alias", "alias", "detach", "t", "transpose", "permute", "expand", "repeat"),
    *("squeeze", "unsqueeze", "select", "slice", "unbind", "split", "split_with_sizes", "index", "index_select"),
    *("clone", "_to_copy", "cat", "stack"),
}


@dataclass(frozen=True, eq=False)
class _Spikes:
    """What is known of a tensor of spikes: who made it, and its amplitude at every place."""

    nodes: frozenset[str]
    amplitude: Tensor


class _Following(TorchDispatchMode):
    """Follows the spikes of neurons (name -> amplitude) to what consumes them."""

    def __init__(self, model: nn.Module, amplitudes: dict[str, Tensor]) -> None:
        super().__init__()
        self.root, self.amplitudes = type(model).__name__, amplitudes
        self.spikes = WeakTensorKeyDictionary()
        self.problems: dict[str, list[str]] = {name: [] for name in amplitudes}
        self.inputs: dict[nn.Linear, list[_Spikes | None]] = {}  # what each linear layer got; None: no spikes
        self.outside: set[int] = set()  # tensors that were used outside linear layers
        self.path: list[str] = []  # the modules that run, the innermost last
        self.linear = 0  # linear layers that run: what they compute is known

    def refuse(self, nodes: Iterable[str], reason: str) -> None:
        for name in nodes:
            if reason not in self.problems[name]:
                self.problems[name].append(reason)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.linear:
            return out
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.outside |= {id(x) for x in given if isinstance(x, nn.Parameter)}
        if not (found := [self.spikes[x] for x in given if x in self.spikes]):
            return out
        name = func._schema.name.partition("::")[2]
        if name.startswith("new_") or name.endswith("_like"):  # of their shape, not of their values
            return out
        nodes = frozenset[str]().union(*(spikes.nodes for spikes in found))
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        real = [x for x in (*given, *results) if x.is_floating_point()]
        if name not in _MOVES or len(real) != len(found) + len(results):
            self.refuse(nodes, f"feeds {name} in {self.path[-1] or self.root}")
            return out
        along = tree_map(
            lambda x: self.spikes[x].amplitude if isinstance(x, Tensor) and x in self.spikes else x, (args, kwargs)
        )
        for x, amplitude in zip(results, tree_leaves(func(*along[0], **along[1])), strict=True):
            self.spikes[x] = _Spikes(nodes, amplitude)
        return out

    def entered(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.path.append(name)
            if _is_linear(module):
                self.linear += 1
                given = [*args, *kwargs.values()][0]
                self.inputs.setdefault(cast(nn.Linear, module), []).append(self.spikes.get(given))

        return hook

    def left(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            self.path.pop()
            self.linear -= _is_linear(module)
            if name in self.amplitudes:  # strided like the spikes, so that every view of these is one of it
                amplitude = torch.empty_like(out, dtype=torch.promote_types(out.dtype, torch.float32))
                self.spikes[out] = _Spikes(frozenset([name]), amplitude.copy_(self.amplitudes[name]))

        return hook


def _is_linear(module: nn.Module) -> bool:
    """Is its forward that of a plain linear layer: nothing but W x + b?"""
    return isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, BitLinear.forward)


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradient; membranes and modes are afterwards what they were."""
    memories = {node: dict(node.named_memories()) for node in model.modules() if isinstance(node, BaseNode)}
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        for node, kept in memories.items():
            for name, value in kept.items():
                setattr(node, name, value)


def _follow(model: nn.Module, amplitudes: dict[str, Tensor], batch: dict[str, Any]) -> _Following:
    following, handles = _Following(model, amplitudes), []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(following.entered(name), with_kwargs=True))
        handles.append(module.register_forward_hook(following.left(name)))
    with hooked(handles), _at_rest(model), following:
        out = model(**batch)
    for x in tree_leaves(out):
        if isinstance(x, Tensor) and x in following.spikes:
            following.refuse(following.spikes[x].nodes, "is the model's output")
    return following


def _example(model: nn.Module) -> dict[str, Tensor]:
    if not hasattr(model, "config"):
        raise FoldError(f"{type(model).__name__} needs example inputs: fold_amplitude(model, name=tensor, ...)")
    return {"input_ids": torch.ones(1, 4, dtype=torch.long, device=next(model.parameters()).device)}


def _rows(inputs: list[_Spikes | None]) -> Tensor:
    """The amplitudes of a linear layer's inputs, [calls and their rows, in_features]."""
    return torch.cat([spikes.amplitude.reshape(-1, spikes.amplitude.shape[-1]) for spikes in inputs if spikes])


def _obstacle(layer: nn.Linear, inputs: list[_Spikes | None], elsewhere: bool) -> str | None:
    """Why a layer cannot absorb the amplitudes of its inputs exactly, or None."""
    rows = _rows(inputs)
    columns = rows[0]
    if None in inputs:
        return "which gets other inputs too"
    if not torch.equal(rows, columns.expand_as(rows)):
        return "whose inputs have several amplitudes"
    if elsewhere or "weight" not in layer._parameters:
        return "whose weight is used elsewhere, or computed"
    if getattr(layer, "bits", 32) == 32:
        exact = layer.weight.dtype in (torch.float32, torch.float64)
        return None if exact else f"whose {str(layer.weight.dtype).removeprefix('torch.')} weight would be rounded"
    if not ((columns == columns[0]).all() and columns[0] > 0):
        return "whose low-bit weight has one positive scale for all its inputs"
    if layer.weight is not None:
        bits = cast(BitLinear, layer).bits
        kept, folded = (quantise(weight, bits)[0] for weight in (layer.weight, layer.weight * columns[0]))
        if flipped := int((kept != folded).sum()):
            return f"{flipped} of whose low-bit weights would be rounded otherwise (pack the model first)"
    return None


@torch.no_grad()
def _absorb(layer: nn.Linear, columns: Tensor) -> None:
    if layer.weight is None:  # packed
        layer.weight_scale.mul_(columns[0])
    else:
        layer.weight.mul_(columns)


def _amplitudes(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Neuron -> its amplitude, without T, wherever that is not 1; and neuron -> why it stays where it is."""
    found, problems = {}, {}
    for name, node in model.named_modules():
        if isinstance(node, ElasticBiSpike) and (node.alpha != 1).any():
            problems[name] = ["its amplitudes are its thresholds too"]
        elif isinstance(node, TernaryLIFNode) and (node.amplitude != 1).any():
            steps = node.amplitude.detach() if node.time_steps else node.amplitude.detach().unsqueeze(0)
            if torch.equal(steps, steps[:1].expand_as(steps)):
                found[name] = steps[0]
            else:
                problems[name] = ["its amplitudes differ between time steps"]
    return found, problems


def fold_amplitude(model: AnyModule, **batch: Any) -> AnyModule:
    """Absorb the amplitudes of ternary neurons into the linear layers they feed, in place; all of them, or none.

    Outputs stay what they were up to the rounding of weights times amplitudes (exactly, if these are powers of two).
    Afterwards the amplitudes are 1 and not trained any more; names and shapes stay, so the model saves and loads as
    before, and a neuron whose amplitude is 1 has nothing to fold. The weight of a float layer is multiplied column by
    column, that of a low-bit layer (latent or packed) by one number, which its scale takes up; biases stay.

    Amplitudes that differ between time steps do not fit into one weight. They are refused and stay where they are, as
    a[t] (W s[t]) + b, one multiplication per output. So are those of `ElasticBiSpike`: they are its thresholds, too.

    Args:
        model: with `TernaryLIFNode` neurons that feed nothing but `torch.nn.Linear` and `BitLinear`, at most reshaped,
            reordered, split or joined on the way.
        batch: example inputs, model(**batch), which must run every layer that these neurons feed; without any, a
            transformers model gets input_ids of ones.
    Returns:
        The model.
    Raises:
        FoldError: some amplitude cannot be absorbed exactly: every such neuron, with what stands in the way (an
            addition, a norm, a product with what is no weight, the model's output); nothing is changed then.
    """
    amplitudes, problems = _amplitudes(model)
    if not amplitudes and not problems:
        return model
    following = _follow(model, amplitudes, batch or _example(model))
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    names = {module: name for name, module in model.named_modules()}
    fed = {layer: inputs for layer, inputs in following.inputs.items() if any(inputs)}
    for layer, inputs in fed.items():
        elsewhere = id(layer.weight) in following.outside or owners[id(layer.weight)] > 1
        if reason := _obstacle(layer, inputs, elsewhere):
            for spikes in filter(None, inputs):
                following.refuse(spikes.nodes, f"feeds {names[layer]}, {reason}")
    reached = {name for inputs in fed.values() for spikes in filter(None, inputs) for name in spikes.nodes}
    for name, reasons in following.problems.items():
        if reasons or name not in reached:
            problems[name] = reasons or ["feeds no linear layer"]
    if problems:
        listed = "; ".join(f"{name} {', and '.join(reasons)}" for name, reasons in problems.items())
        raise FoldError(f"amplitudes cannot be folded exactly, and none was: {listed}")
    for layer, inputs in fed.items():
        _absorb(layer, _rows(inputs)[0])
    for node in model.modules():
        if isinstance(node, TernaryLIFNode):
            node.amplitude.requires_grad_(False).fill_(1)
    return model
