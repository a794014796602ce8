"""What a `SpikeLinear` takes on hardware that runs its spikes, from its counts, whatever this machine computes instead.

Of one token with C inputs and M outputs, the code's T steps, spikes of size 1 (multi_level, gif: as large as they say):

    neuron      V = mean|x| / k: C additions, a multiplication, a comparison, and the division 1 / V; every input a
                multiplication by that and an addition that rounds, one for the limit `max_count`, and where inputs have
                a zero point a comparison and a subtraction; every input and step two integer additions: compared with
                what a spike of the step counts, and that subtracted, as IF neurons do
    matmul      every spike and output an addition, so often as the spike says; or, if that is cheaper, every count that
                is not 0 and output one multiplication of as many bits as the largest count has, and an addition
    amplitude   what spikes of a step count: bitwise and two's complement double the sums from step to step (Horner), an
                addition per output and step after the first; multi_level as many as multiplying by `levels` takes; ttfs
                adds the running sum to another one after every step, so that a spike counts as often as steps are left;
                the others nothing. V times the sum: a multiplication per output; a zero point one more, and an addition
    scale       of weights below 32 bits, a multiplication per output
    bias        an addition per output

Additions are of integers where weights have 8 bits or fewer (of 1.58 bits where they are not 0), else of floats.
Thresholds of salient channels are parts by powers of two, which is in their weights. Inputs' potentials and outputs'
sums are read and written in each of the T steps; outputs leave as real numbers.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from snlp_zoo.layers import count_codes
from snlp_zoo.layers.spike_linear import SpikeLinear
from snlp_zoo.ops.bit_linear import unpack_weight

if TYPE_CHECKING:
    from snlp_zoo.energy.counting import Counting


@dataclass(frozen=True)
class Emitted:
    """What the neuron of a layer gave in one call.

    kind: of its spikes. time_steps: T. largest: of the counts; values: different numbers that counts up to it can be.
    spikes [C]: steps that are not 0, of each input; sizes [C]: of these spikes, added up; nonzero [C]: counts that are
    not 0. problem: what of the spikes is outside of their kind, or None.
    """

    kind: str
    time_steps: int
    largest: int
    values: int
    spikes: Tensor
    sizes: Tensor
    nonzero: Tensor
    problem: str | None


def emitted(layer: SpikeLinear, x: Tensor) -> Emitted:
    """Every spike of x [..., C], counted as it is emitted."""
    given = layer.spiked(x).counts.reshape(-1, layer.in_features)
    counts, time_steps = given.long(), layer.time_steps(given)
    kind = count_codes.alphabet(layer.code, layer.symmetric)
    least, most = {"binary": (0, 1), "ternary": (-1, 1)}.get(kind, (1 - layer.levels, layer.levels - 1))
    spikes, sizes = (torch.zeros(layer.in_features, dtype=torch.long, device=x.device) for _ in range(2))
    told, wrong = torch.zeros_like(counts), torch.zeros((), dtype=torch.long, device=x.device)
    for weight, step in layer.spike_trains(counts):
        spikes += step.count_nonzero(0)
        sizes += step.abs().sum(0)
        wrong += ((step < least) | (step > most)).count_nonzero()
        told += weight * step
    problem = f"declared {kind}, but {int(wrong)} spikes of code {layer.code} are not" if wrong else None
    if lost := int((told != counts).count_nonzero()):
        problem = f"{lost} of {counts.numel()} counts are not what their {time_steps} steps of spikes say"
    largest = int(counts.abs().max()) if counts.numel() else 0
    values = (2 if layer.symmetric else 1) * largest + 1
    return Emitted(kind, time_steps, largest, values, spikes, sizes, counts.count_nonzero(0), problem)


def record(counter: "Counting", name: str, layer: SpikeLinear, x: Tensor, outputs: int, timed: bool) -> Emitted:
    """Add to the counter's rows what x [..., C] takes; outputs: how many numbers come out."""
    found = emitted(layer, x)
    tokens, inputs, steps = x.numel() // layer.in_features, x.numel(), found.time_steps
    neuron = counter.row(name, "neuron", timed)
    neuron.counts.update(_neuron(layer, tokens, inputs, steps))
    neuron.state += steps * (inputs + outputs)
    product = counter.row(name, "matmul", timed)
    _product(product, layer, found)
    product.dense += inputs * layer.out_features
    product.outputs += outputs
    product.steps += steps
    for row in (neuron, product):
        row.kind = found.kind if row is neuron else f"{found.kind} x {_weights(layer)}"
        row.nnz, row.elements = row.nnz + int(found.nonzero.sum()), row.elements + inputs
        row.spikes, row.sizes = row.spikes + int(found.spikes.sum()), row.sizes + int(found.sizes.sum())
        row.moved.update(_moved(layer, found, inputs))
    amplitude = counter.row(name, "amplitude", timed)
    amplitude.counts["mul"] += outputs * (1 if layer.symmetric else 2)
    amplitude.counts[_addition(layer)] += outputs * (_additions_of_weights(layer, steps) + (not layer.symmetric))
    if layer.bits != 32:
        counter.row(name, "scale", timed).counts["mul"] += outputs
    if layer.bias is not None:
        counter.row(name, "bias", timed).counts["add"] += outputs
    return found


def _neuron(layer: SpikeLinear, tokens: int, inputs: int, steps: int) -> Counter:
    per_input = 2 + (layer.max_count is not None) + 2 * (not layer.symmetric)  # mean, rounding; limit; zero point
    return Counter(add=inputs * per_input + tokens, mul=inputs + tokens, div=tokens, iadd=2 * steps * inputs)


def _product(row, layer: SpikeLinear, found: Emitted) -> None:
    reach = _reach(layer).to(found.spikes.device)
    accumulates, multiplications = (int((x * reach).sum()) for x in (found.sizes, found.nonzero))
    row.spike_driven = True
    row.ac += accumulates
    row.counts[_addition(layer)] += accumulates
    row.alternative[_addition(layer)] += multiplications
    if layer.bits == 32:
        row.alternative["mul"] += multiplications
    else:
        row.alternative["imul8"] += multiplications * _bits(found.values) / 8
    row.fan_in, row.fan_out = layer.in_features, layer.out_features
    row.weight_bits = layer.bits


def _addition(layer: SpikeLinear) -> str:
    return "add" if layer.bits == 32 else "iadd"


def _weights(layer: SpikeLinear) -> str:
    return "real" if layer.bits == 32 else "int8" if layer.bits == 8 else "lowbit"


def _reach(layer: SpikeLinear) -> Tensor:
    """Outputs that a spike of each input changes, [C]: all of them, but for weights of 1.58 bits that are 0."""
    if layer.bits in (32, 8):
        return torch.full((layer.in_features,), layer.out_features)
    if layer.packed:
        return unpack_weight(layer.weight_packed, layer.bits, layer.in_features).count_nonzero(0)
    return layer.quantised_weight().count_nonzero(0)


def _additions_of_weights(layer: SpikeLinear, steps: int) -> int:
    """Additions per output that make a spike count what it counts."""
    if layer.code == "ttfs":
        return steps
    base = {"bitwise": 2, "twos_complement": 2, "multi_level": layer.levels}.get(layer.code, 1)
    return (steps - 1) * (base.bit_length() + base.bit_count() - 2)  # doublings, and a sum for each further bit


def _moved(layer: SpikeLinear, found: Emitted, inputs: int) -> dict[tuple[str, str], int]:
    """Trains as events (address, time and what kind of spike) and as a bitmap of all steps."""
    spikes = int(found.spikes.sum())
    signs = {"binary": 1, "ternary": 2}.get(found.kind, (layer.levels - 1) * (2 if layer.symmetric else 1))
    event = _bits(layer.in_features) + _bits(found.time_steps) + _bits(signs)
    bitmap = inputs * found.time_steps * _bits(signs + 1)
    found_moved = {"words": inputs, "events": spikes, "address_bits": spikes * event, "bitmap_bits": bitmap}
    return {("code", what): number for what, number in found_moved.items()}


def _bits(values: int) -> int:
    """Bits that tell so many values apart."""
    return math.ceil(math.log2(values)) if values > 1 else 0


@contextmanager
def written_out(model: nn.Module) -> Iterator[None]:
    """A converted model's attention as products and a softmax, and no cache, inside; afterwards as it was."""
    converted = any(isinstance(module, SpikeLinear) for module in model.modules())
    every = [getattr(module, "config", None) for module in model.modules()] if converted else []
    configs = list({id(config): config for config in every if isinstance(config, PreTrainedConfig)}.values())
    before = [(config._attn_implementation, getattr(config, "use_cache", None)) for config in configs]
    try:
        for config, (_, cached) in zip(configs, before, strict=True):
            _run(config, "eager", None if cached is None else False)
        yield
    finally:
        for config, (attention, cached) in zip(configs, before, strict=True):
            _run(config, attention, cached)


def _run(config: PreTrainedConfig, attention: str | None, cached: bool | None) -> None:
    config._attn_implementation = attention
    if cached is not None:
        config.use_cache = cached
