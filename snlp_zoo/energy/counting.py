"""What a forward computes: every tensor operation, by module, with what its operands are.

SpikingJelly's dispatch mode shows each operation and the module it runs in; the rules here are our own. Neurons are
priced as a whole, and so are recurrences and linear layers with a code of whole numbers (`codes`); fused attention is
taken apart; an operation without a price is an error.
Shapes: n rows (T, batch and tokens together), K inputs, M outputs of a product [n, K] x [K, M].
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from spikingjelly.activation_based.op_counter import BaseCounter, DispatchCounterMode
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from snlp_zoo.energy import codes, prices
from snlp_zoo.energy.kinds import Tag, contradiction, declared_kind, spikes_tag
from snlp_zoo.energy.matmul import Product, product
from snlp_zoo.energy.rows import Operand, Row
from snlp_zoo.errors import EnergyError
from snlp_zoo.layers.neurons import as_recorded
from snlp_zoo.layers.spike_linear import SpikeLinear
from snlp_zoo.layers.watching import evaluating, hooked
from snlp_zoo.layers.wkv import WKV4
from snlp_zoo.ops.bit_linear import unpack_weight


class Counting(BaseCounter):
    """SpikingJelly's counter whose rules are ours; collects rows, operands, contradictions and unpriced operations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.rows: dict[tuple[str, str, bool], Row] = {}
        self.operands: dict[Operand, int] = {}
        self.unpriced: dict[str, str] = {}
        self.problems: dict[str, str] = {}
        self.seen: Counter = Counter()
        self.steps: Counter = Counter()  # neuron -> time steps of all texts
        self.widths: dict[str, int] = {}  # neuron -> outputs per token
        self.coded: dict[str, codes.Emitted] = {}  # layer with a code of whole numbers -> its call of largest counts
        self.inside = 0  # neurons, recurrences and layers with a code: they are priced as a whole
        self.names = {module: name for name, module in model.named_modules()}
        self.modules = {name: module for module, name in self.names.items()}
        self.root = type(model).__name__
        self.tags = WeakTensorKeyDictionary()
        weights = [*model.parameters(), *model.buffers()]
        self.overwritten: set[int] = set()  # storages of what was constant and holds data now
        for weight in weights:
            self.tags[weight] = Tag(static=True)

    def row(self, name: str, role: str, timed: bool) -> Row:
        return self.rows.setdefault((name, role, timed), Row(name, role, timed))

    def tag(self, x: Any) -> Tag:
        if not isinstance(x, Tensor):
            return Tag(static=True)
        tag = self.tags.get(x, Tag())
        return Tag() if tag.static and self.overwritten and _storage(x) in self.overwritten else tag

    def operation(self, func: Any, args: tuple, kwargs: dict, out: Any, path: str) -> None:
        """One tensor operation inside the module `path`."""
        name = prices.plain_name(func._schema.name)
        if name == "pow" and not isinstance(args[1], Tensor) and args[1] == 2:
            name = "square"
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)] or [
            x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        ]
        self.seen[name] += 1
        tags = [self.tag(x) for x in given]
        made = self._rule(name, path, args, given, tags, out)
        results = [x for x in ((out,) if isinstance(out, Tensor) else tree_leaves(out)) if isinstance(x, Tensor)]
        for x in results:
            self.tags[x] = made
        stored = {_storage(x) for x in results}
        if not func._schema.is_mutable:
            self.overwritten -= stored - {_storage(x) for x in given}  # a new tensor at an old address
        elif not all(tag.static for tag in tags):
            self.overwritten |= stored

    def _rule(self, name: str, path: str, args: tuple, given: list[Tensor], tags: list[Tag], out: Any) -> Tag:
        """Record what the operation takes; returns what its output is."""
        timed = any(tag.timed for tag in tags)
        if name == "copy":
            return tags[-1]
        if name in prices.SAME:
            return tags[0] if name != "masked_fill" or not (len(args) > 2 and args[2]) else Tag(timed=timed)
        if name in prices.CONSTANTS or (tags and all(tag.static for tag in tags)):
            if name in prices.GATHERS:  # constant addresses
                self._gather(path, given, tags, out, timed)
            return Tag(static=True)  # of weights alone: done once, before any text
        if name == "sign" and tags[0].spikes:
            return Tag("binary" if tags[0].kind == "scaled" else tags[0].kind, tags[0].source, timed=timed)
        if name in ("cat", "stack") and len({(tag.kind, tag.amplitudes is None) for tag in tags}) == 1:
            return replace(tags[0], amplitudes=_together(tags), timed=timed, static=False)
        if name in prices.FREE:
            return Tag(timed=timed)
        if name in prices.MATMULS:
            bias, operands = (given[:1], given[1:]) if name in ("addmm", "baddbmm", "addmv") else ([], given)
            return self._matmul(path, operands[0], operands[1], bias, out)
        if name == "snlp_zoo::bit_linear":
            return self._bit_linear(path, args, out)
        if name == "convolution" and not args[6] and tags[1].static and tags[0].kind == "real":
            return self._convolution(path, given, tags, out)
        if name.startswith("_scaled_dot_product"):
            return self._attention(path, *given, tags=tags, fused=args)
        if name in prices.GATHERS:
            self._gather(path, given, tags, out, timed)
            return Tag(timed=timed)
        if not any(x.is_floating_point() or tag.spikes for x, tag in zip(given, tags, strict=True)):
            return Tag(timed=timed)  # positions, masks: control, not computing
        if name in prices.REDUCTIONS:
            return self._reduce(name, path, args, given[0], tags[0], out)
        if name in prices.ELEMENTWISE:
            return self._elementwise(name, path, args, given, tags, out)
        self.unpriced.setdefault(name, path or self.root)
        return Tag(timed=timed)

    def _gather(self, path: str, given: list[Tensor], tags: list[Tag], out: Tensor, timed: bool) -> None:
        row = self.row(path, "gather", timed)
        word = prices.REAL_BYTES if given[0].is_floating_point() else given[0].element_size()
        row.bytes += out.numel() * word
        row.weight_bits = 8 * word if tags[0].static else 0

    def _reduce(self, name: str, path: str, args: tuple, x: Tensor, tag: Tag, out: Tensor) -> Tag:
        axes = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else list(args[1:2])
        over_time = tag.timed and (not axes or 0 in axes or -x.ndim in axes)
        counter = name in ("sum", "cumsum") and tag.whole
        if counter and not over_time:  # over tokens or channels: counters that move when something comes
            row = self.row(path, "counter", tag.timed)
            row.counts["iadd"] += int(x.count_nonzero())
            row.dense += x.numel()
        else:
            row = self.row(path, "readout" if over_time else "other", tag.timed)
            row.counts.update({"add": x.numel(), "mul": out.numel() if name == "mean" else 0})
        if counter:
            return Tag("integer", tag.source, timed=tag.timed and not over_time, readout=over_time)
        return Tag(timed=tag.timed and not over_time, readout=over_time)

    def _elementwise(self, name: str, path: str, args: tuple, given: list[Tensor], tags: list[Tag], out: Any) -> Tag:
        size = tree_leaves(out)[0].numel()
        timed, readout = any(tag.timed for tag in tags), any(tag.readout for tag in tags)
        spikes = [tag for tag in tags if tag.spikes]
        constant = [x for x, tag in zip(given, tags, strict=True) if tag.static]
        role, primitives = prices.ELEMENTWISE[name]
        kinds = {tag.kind for tag in tags if tag.whole}
        if name == "mul" and len(given) == 2 and all(tag.whole for tag in tags) and kinds != {"integer"}:
            row = self.row(path, "gate", timed)  # a spike lets through what it meets
            row.counts["iadd"] += int(out.count_nonzero())
            row.dense += size
            return Tag(next(kind for kind in ("integer", "ternary", "binary") if kind in kinds), path, timed=timed)
        readout = readout and role in ("residual", "other")  # a norm after it, a dense network has too
        if name == "add" and constant:
            role = "bias"
        if name == "mul" and constant and self._bits(path) != 32:
            role = "scale"
        self.row(path, "readout" if readout else role, timed).counts.update(
            {primitive: number * size for primitive, number in primitives.items()}
        )
        if name in ("add", "sub") and len(spikes) == 2 and all(tag.whole for tag in spikes):
            return Tag("integer", path, timed=timed)
        alone = len(given) == 1 or (constant and constant[0].numel() == 1 and len(given) == 2)
        if name == "mul" and spikes and alone and tags[0].kind != "integer":  # by one number: still spikes
            factor = next((x for x in (*constant, *args) if not (isinstance(x, Tensor) and self.tag(x).spikes)), 1.0)
            before = given[0].new_ones(1) if tags[0].amplitudes is None else tags[0].amplitudes
            kind = "ternary" if tags[0].kind == "ternary" else "scaled"
            return Tag(kind, tags[0].source, (before * factor).abs().flatten(), timed=timed)
        return Tag(timed=timed, readout=readout)

    def _bits(self, path: str) -> float:
        return getattr(self.modules.get(path), "bits", 32)

    def _weight_tag(self, path: str, tag: Tag) -> Tag:
        """A layer with `bits` says what its weights are."""
        low = tag.static and self._bits(path) != 32
        return Tag("lowbit", path, static=True) if low else tag

    def _matmul(self, path: str, a: Tensor, b: Tensor, bias: list[Tensor], out: Tensor) -> Tag:
        tags = [self._weight_tag(path, self.tag(x)) for x in (a, b)]
        a, b = (a.view(1, -1), b.view(-1, 1)) if a.ndim == 1 else (a, b.unsqueeze(-1) if b.ndim == 1 else b)
        scaled = any(t.kind == "lowbit" and x.abs().max() != 1 for t, x in zip(tags, (a, b), strict=True))
        made = product(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), *tags)
        return self._record(path, made, (a, b), tags, out, bias, scaled)

    def _bit_linear(self, path: str, args: tuple, out: Tensor) -> Tag:
        x, codes, _, _, bias, bits = args[:6]
        weight = unpack_weight(codes, bits, x.shape[-1]).mT
        tags = [self.tag(x), Tag("lowbit", path, static=True)]
        rows = x.reshape(1, -1, x.shape[-1])
        made = product(rows, weight.unsqueeze(0), *tags)
        return self._record(path, made, (x, weight), tags, out, [] if bias is None else [bias], scaled=True)

    def _record(
        self, path: str, made: Product, tensors: tuple, tags: list[Tag], out: Tensor, bias: list[Tensor], scaled: bool
    ) -> Tag:
        timed = any(tag.timed for tag in tags)
        sources = [tag.source.rpartition(".")[2] for tag in tags if tag.spikes]
        weights = [tag for tag in tags if tag.static]
        name = path if weights else f"{path} @ {' x '.join(sources) or 'real'}"
        row = self.row(name, "matmul", timed)
        row.kind = " x ".join(tag.kind for tag in tags)
        row.spike_driven |= made.spike_driven
        for key in ("nnz", "sizes", "elements", "ac", "mac", "dense"):
            setattr(row, key, getattr(row, key) + getattr(made, key))
        row.counts.update(made.counts)
        row.alternative.update(made.alternative)
        row.fan_in, row.fan_out = made.fan_in, tensors[0].shape[-2] if tags[0].static else made.fan_out
        row.outputs += out.numel()
        if weights:
            row.weight_bits = self._bits(path)
        for x, tag in zip(tensors, tags, strict=True):
            if not tag.static:
                self._moved(row, x, tag)
            problem = contradiction(x, tag)
            operand = Operand(name, "weights" if tag.static and tag.kind == "real" else tag.kind, tag.source, problem)
            self.operands[operand] = self.operands.get(operand, 0) + 1
            if problem:
                self.problems.setdefault(f"{name} <- {tag.source}", problem)
        if bias:
            self.row(path, "bias", timed).counts["add"] += out.numel()
        if any(tag.spikes and tag.amplitudes is not None and len(tag.amplitudes) > 1 for tag in tags):
            self.row(name, "amplitude", timed).counts["mul"] += out.numel()  # one per step: not a part of the weights
        if scaled:
            self.row(name, "scale", timed).counts["mul"] += out.numel()
        return Tag("integer", path, timed=timed) if all(tag.whole for tag in tags) else Tag(timed=timed)

    def _convolution(self, path: str, given: list[Tensor], tags: list[Tag], out: Tensor) -> Tag:
        """Of real numbers: every output is a product with a kernel of weights."""
        x, kernel, *bias = given
        row = self.row(f"{path} @ convolution", "matmul", tags[0].timed)
        row.kind, row.fan_in, row.fan_out = "real x real", kernel[0].numel(), len(kernel)
        row.mac += out.numel() * row.fan_in
        row.dense, row.elements, row.outputs = row.mac, row.elements + x.numel(), row.outputs + out.numel()
        row.counts = Counter(mul=row.mac, add=row.mac)
        row.weight_bits = 8 * prices.REAL_BYTES
        self._moved(row, x, tags[0])
        if bias:
            self.row(path, "bias", tags[0].timed).counts["add"] += out.numel()
        return Tag(timed=tags[0].timed)

    def _attention(self, path: str, query, key, value, *mask, tags: list[Tag], fused: tuple) -> Tag:
        """Fused attention as two products and a softmax; their results need not exist to be counted."""
        if any(x is True for x in fused) or query.shape[1] != key.shape[1]:
            raise EnergyError(f"{path}: fused causal or grouped attention is not counted; write it out as products")
        timed = any(tag.timed for tag in tags)
        scores = query.new_empty(*query.shape[:-1], key.shape[-2])
        self.tags[transposed := key.transpose(-1, -2)] = tags[1]
        self.tags[scores] = self._matmul(path, query, transposed, [], scores)
        self.row(path, "other", timed).counts["mul"] += scores.numel()
        if mask and mask[0].any():  # without padding there is nothing to mask
            self.row(path, "residual", timed).counts["add"] += scores.numel()
        role, primitives = prices.ELEMENTWISE["_softmax"]
        self.row(path, role, timed).counts.update({key: number * scores.numel() for key, number in primitives.items()})
        return self._matmul(path, scores, value, [], query)

    def _moved(self, row: Row, x: Tensor, tag: Tag) -> None:
        """A tensor that is read or written: its words, its spikes, and the bits that tell its neurons apart."""
        events = int(x.count_nonzero()) if tag.spikes else 0
        bits = math.ceil(math.log2(max(self.widths.get(tag.source, 2), 2)))
        found = {"words": x.numel(), "events": events, "address_bits": events * bits}
        row.moved.update({(tag.kind, what): number for what, number in found.items()})

    def entered(self, node: nn.Module, inputs: tuple) -> None:
        """Forward pre-hook of every neuron and recurrence."""
        self.inside += 1

    def fired(self, node: nn.Module, inputs: tuple, spikes: Tensor) -> None:
        """Forward hook of every neuron: what it gave, and what its own arithmetic takes."""
        name, kind = self.names[node], declared_kind(node)
        if node.step_mode != "m":
            raise EnergyError(f"{name}: step_mode is 's'; energy is counted over T at once, use step_mode='m'")
        recorded = as_recorded(node, spikes)
        tag = spikes_tag(node, name, recorded)
        if problem := contradiction(recorded, tag, by_step=True):
            self.problems.setdefault(name, problem)
        leaks = not isinstance(node, neuron.IFNode) and getattr(node, "beta", 1) != 0
        row = self.row(name, "neuron", tag.timed)
        row.kind, row.elements = kind, row.elements + spikes.numel()
        row.nnz += int(spikes.count_nonzero())
        row.counts.update({"add": 2 * spikes.numel(), "mul": 2 * spikes.numel() * leaks})
        self.widths[name] = spikes.shape[-1]
        self._moved(row, spikes, tag)
        self.steps[name] += len(recorded)
        self.tags[spikes] = tag
        self.inside -= 1

    def recurred(self, wkv: nn.Module, inputs: tuple, outputs: tuple) -> None:
        """Forward hook of every WKV recurrence, whichever of its forms ran: what one token after another takes."""
        tokens = outputs[0].numel()
        row = self.row(self.names[wkv], "recurrence", False)
        row.counts.update({primitive: number * tokens for primitive, number in prices.WKV4.items()})
        row.outputs += tokens
        self.inside -= 1

    def emitted(self, layer: nn.Module, inputs: tuple, out: Tensor) -> None:
        """Forward hook of every `SpikeLinear`: its spikes, and what they take."""
        assert isinstance(layer, SpikeLinear)  # noqa: S101  (for the type checker)
        name, tag = self.names[layer], self.tag(inputs[0])
        found = codes.record(self, name, layer, inputs[0].detach(), out.numel(), tag.timed)
        self.coded[name] = max(found, self.coded.get(name, found), key=lambda call: call.values)
        if found.problem:
            self.problems.setdefault(name, found.problem)
        operand = Operand(name, found.kind, name, found.problem)
        self.operands[operand] = self.operands.get(operand, 0) + 1
        self.tags[out] = Tag(timed=tag.timed)
        self.inside -= 1


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _together(tags: list[Tag]) -> Tensor | None:
    amplitudes = [tag.amplitudes for tag in tags if tag.amplitudes is not None]
    return torch.cat(amplitudes) if amplitudes else None


class _Mode(DispatchCounterMode):
    """SpikingJelly's mode and module tracker; each operation goes to our rules once, not to every enclosing scope."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        (counter,) = self.counters
        if not counter.inside:
            path = max(self.module_tracker.parents - {"Global"}, key=len, default="")
            counter.operation(func, args, kwargs, out, path.partition(".")[2])
        return out


@contextmanager
def counting(model: nn.Module) -> Iterator[Counting]:
    """Count all that `model` computes inside, without gradients and in evaluation mode.

    Raises:
        EnergyError: on leaving, if an operation had no price; it lists them and where they came from.
    """
    if torch.is_inference_mode_enabled():
        raise EnergyError("energy is not counted under torch.inference_mode(); leave it out")
    counter = Counting(model)
    nodes = [module for module in model.modules() if isinstance(module, neuron.BaseNode)]
    recurrences = [module for module in model.modules() if isinstance(module, WKV4)]
    coded = [module for module in model.modules() if isinstance(module, SpikeLinear)]
    handles = [module.register_forward_pre_hook(counter.entered) for module in (*nodes, *recurrences, *coded)]
    handles += [node.register_forward_hook(counter.fired) for node in nodes]
    handles += [module.register_forward_hook(counter.recurred) for module in recurrences]
    handles += [module.register_forward_hook(counter.emitted) for module in coded]
    # activation checkpointing has embeddings ask for gradients, which the tracker of modules then misses
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles += [table.register_forward_hook(lambda *given: given[-1].detach()) for table in tables]
    with hooked(handles), evaluating(model), codes.written_out(model), torch.no_grad(), _Mode([counter]):
        yield counter
    if counter.unpriced:
        found = ", ".join(f"{name} in {path}" for name, path in counter.unpriced.items())
        raise EnergyError(f"operations without a price: {found}; add them to energy/prices.py")
