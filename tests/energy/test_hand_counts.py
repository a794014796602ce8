"""Counts of every tiny entry, against formulas that know the wiring and see nothing but the neurons' spikes.

n tokens, T steps, D width, F inner width, L layers, H heads, C classes; one text, without padding.
"""

from collections import Counter

import pytest
import torch
from spikingjelly.activation_based.neuron import BaseNode

from snlp_zoo import registry
from snlp_zoo.energy.report import count
from snlp_zoo.ops.bit_linear import quantise, unpack_weight

TINY = [
    name
    for name in registry.list_entries()
    if "_tiny" in name
    and (entry := registry.load_entry(name)).recipe is None
    and entry.convert is None
    and entry.model_type != "spikegpt"  # its time is that of tokens: test_spikegpt_counts.py
]
SPIKEBERT = [entry for entry in TINY if entry.startswith("spikebert")]  # without softmax, with counts of spikes
LIF = {"neuron": "lif", "v_threshold": 0.05}
CASES = [
    (entry, packed, changes)
    for entry in TINY
    for changes in (({}, LIF) if entry.startswith("spikelm") else ({},))
    for packed in (False, True)
    if entry not in SPIKEBERT and (not packed or entry.endswith(("158", "1bit")))
]
N = 11


def spikes_of(model, ids):
    """Neuron -> spikes [T, 1, n, D]."""
    seen = {}

    def hook(name):
        return lambda _, __, spikes: seen.setdefault(name, []).append(spikes)

    nodes = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseNode)]
    handles = [module.register_forward_hook(hook(name)) for name, module in nodes]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def nonzero_weights(layer):
    """[M, K], 1 where a weight is one."""
    bits = getattr(layer, "bits", 32)
    if bits == 32:
        return torch.ones(layer.out_features, layer.in_features)
    signs = (
        unpack_weight(layer.weight_packed, bits, layer.in_features) if layer.packed else quantise(layer.weight, bits)[0]
    )
    return (signs != 0).float()


def accumulates(layer, spikes):
    """One addition wherever a spike meets a weight that is not zero."""
    return int(((spikes != 0).float() @ nonzero_weights(layer).mT).sum())


def fed_by(family, name):
    """Which neuron feeds a linear layer, by the model's own description."""
    if family == "spikelm":
        return f"{name}.neuron"
    block, _, part = name.rpartition(".")
    layer = int(block.split(".")[2])
    before = "spikingbert.input_neuron" if layer == 0 else f"spikingbert.layers.{layer - 1}.mlp.down_neuron"
    attention = f"spikingbert.layers.{layer}.attention"
    feeds = {"query": before, "key": before, "value": before, "output": f"{attention}.context_neuron"}
    return (feeds | {"up": f"{attention}.output_neuron", "down": f"{block}.up_neuron"})[part]


def by_role(counter):
    found = {}
    for row in counter.rows.values():
        if row.role != "matmul":
            found.setdefault(row.role, Counter()).update(row.counts)
    return {role: {k: v for k, v in counts.items() if v} for role, counts in found.items() if sum(counts.values())}


@pytest.mark.parametrize(("entry", "packed", "changes"), CASES)
def test_products(entry, packed, changes, model_of, batch_of):
    model = model_of(entry, packed=packed, **changes)
    batch = batch_of(N)
    counter, time_steps, _, tokens = count(model, batch)
    family, config = model.config.model_type, model.config
    spikes = spikes_of(model, batch["input_ids"])
    assert (time_steps, tokens, counter.problems) == (config.time_steps, N, {})
    rows = {row.name: row for row in counter.rows.values() if row.role == "matmul"}
    expected_kind = "ternary" if family == "spikelm" and not changes else "binary"
    for layer in range(config.num_hidden_layers):
        block = f"{family}.layers.{layer}"
        for part in ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down"):
            row, linear = rows.pop(f"{block}.{part}"), model.get_submodule(f"{block}.{part}")
            train = spikes[fed_by(family, f"{block}.{part}")]
            assert row.ac == accumulates(linear, train), row.name
            assert (row.mac, row.nnz, row.elements) == (0, int((train != 0).sum()), train.numel()), row.name
            assert row.kind == f"{expected_kind} x {'real' if config.weight_bits == 32 else 'lowbit'}"
            assert set(row.counts) == {"add" if config.weight_bits == 32 else "iadd"}
            assert row.dense == time_steps * N * linear.in_features * linear.out_features
        suffix = "spikes" if family == "spikelm" else "neuron"
        for what in ("key", "value"):  # every spike is added to the scores, or outputs, of all N queries
            row = rows.pop(f"{block}.attention @ {what}_{suffix}")
            train = spikes[f"{block}.attention.{what}_{suffix}"]
            assert (row.ac, row.mac) == (int((train != 0).sum()) * N, 0), row.name
            assert row.dense == time_steps * N * N * config.hidden_size
    head = {"classifier": config.hidden_size * config.num_labels}
    head |= {"spikelm.pooler.dense": config.hidden_size**2} if family == "spikelm" else {}
    assert {name: (row.ac, row.mac) for name, row in rows.items()} == {name: (0, macs) for name, macs in head.items()}


@pytest.mark.parametrize(("entry", "packed", "changes"), CASES)
def test_everything_else(entry, packed, changes, model_of, batch_of):
    model = model_of(entry, packed=packed, **changes)
    counter, *_ = count(model, batch_of(N))
    c = model.config
    T, D, F, L, H, C = (
        c.time_steps, c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_labels
    )  # fmt: skip
    outputs, scores, low = L * T * N * (5 * D + F), L * T * H * N * N, c.weight_bits != 32
    norm, gelu = N * D + 2 * L * T * N * D, L * T * N * F
    expected = {
        "norm": {"add": 4 * norm, "mul": 3 * norm},
        "softmax": {"exp": scores, "add": scores, "div": scores},
        "residual": {"add": 2 * N * D + 2 * L * T * N * D},
        "other": {"mul": scores},
    }
    if c.model_type == "spikelm":
        leaky, memoryless = L * T * N * (5 * D + F), L * T * N * 2 * D
        attention = scores + L * T * N * D  # one amplitude per step: not a part of any weight
        expected |= {
            "neuron": {"add": 2 * (leaky + memoryless), "mul": 2 * leaky},
            "activation": {"exp": gelu + D, "mul": 2 * gelu, "add": gelu},
            "bias": {"add": outputs + D + C},
            "readout": {"add": T * N * D, "mul": N * D},
            "amplitude": {"mul": attention + (0 if low else outputs)},
        }
        if changes:  # binary: no amplitudes, and every neuron leaks
            del expected["amplitude"]
            expected["neuron"]["mul"] += 2 * memoryless
    else:
        neurons, chunks = T * N * (D + L * (5 * D + F)), -(-T // 8)
        expected |= {
            "neuron": {"add": 2 * neurons},
            "activation": {"exp": gelu, "mul": 2 * gelu, "add": gelu},
            "bias": {"add": outputs + C},
            "readout": {"add": (L + 1) * (T + chunks) * N * D, "div": (L + 1) * N * D},
        }
    if low:
        expected["scale"] = {"mul": outputs}
    assert by_role(counter) == expected
    gathered = sum(row.bytes for row in counter.rows.values() if row.role == "gather")
    assert gathered == 4 * (3 * N * D + D)  # three tables, and the first token for the head


@pytest.mark.parametrize("entry", SPIKEBERT)
def test_products_of_spikebert(entry, model_of, batch_of):
    model, batch = model_of(entry), batch_of(N)
    counter, time_steps, _, tokens = count(model, batch)
    config, spikes = model.config, spikes_of(model, batch["input_ids"])
    assert (time_steps, tokens, counter.problems) == (config.time_steps, N, {})
    rows = {row.name: row for row in counter.rows.values() if row.role == "matmul"}
    stream = spikes["spikebert.binarise"]
    for layer in range(config.num_hidden_layers):
        block = f"spikebert.layers.{layer}"
        own = {name.removeprefix(f"{block}."): train for name, train in spikes.items() if name.startswith(f"{block}.")}
        after = stream + own["attention.output.neuron"]
        enters = dict.fromkeys(("attention.query", "attention.key", "attention.value"), stream)
        enters |= {"attention.output": own["attention.attention.neuron"], "mlp.up": after}
        enters |= {"mlp.down": own["mlp.up.neuron"]}
        for part, train in enters.items():
            row, linear = rows.pop(f"{block}.{part}.linear"), model.get_submodule(f"{block}.{part}.linear")
            whole = train is after or (train is stream and layer > 0)
            assert row.kind == f"{'integer' if whole else 'binary'} x real", row.name
            assert row.ac == int(train.sum()) * linear.out_features, row.name  # a count of n is added n times
            assert (row.mac, row.nnz, row.elements) == (0, int((train != 0).sum()), train.numel()), row.name
            assert row.dense == time_steps * N * linear.in_features * linear.out_features
        heads = (own[f"attention.{name}.neuron"] for name in ("query", "key", "value"))
        heads = [x.unflatten(-1, (config.num_attention_heads, -1)) for x in heads]
        scores, values = rows.pop(f"{block}.attention.attention @ neuron x neuron"), heads[2]
        mixed = rows.pop(f"{block}.attention.attention @ attention x neuron")
        pairs = torch.einsum("tbihe,tbjhe->tbhij", heads[0], heads[1])
        assert (scores.ac, scores.mac) == (int(pairs.sum()), 0)  # an addition wherever a query's and a key's spike meet
        met = torch.einsum("tbhij,tbjhf->", (pairs != 0).float(), values)
        assert (mixed.ac, mixed.mac) == (int(met), 0)  # a score is added wherever a value has a spike
        assert {scores.dense, mixed.dense} == {time_steps * N * N * config.hidden_size}
        stream = after + own["mlp.down.neuron"]
    assert {name: (row.ac, row.mac) for name, row in rows.items()} == {
        "classifier": (0, config.hidden_size * config.num_labels)
    }


@pytest.mark.parametrize("entry", SPIKEBERT)
def test_everything_else_of_spikebert(entry, model_of, batch_of):
    model = model_of(entry)
    counter, *_ = count(model, batch_of(N))
    c = model.config
    T, D, F, L, C = c.time_steps, c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_labels
    projected = L * T * N * (5 * D + F)  # query, key, value, output, down; up
    neurons = T * N * D + projected + L * T * N * D  # the first spikes; after projections; after attention
    norm = projected + T * N * D
    assert by_role(counter) == {
        "norm": {"add": 4 * norm, "mul": 3 * norm},
        "neuron": {"add": 2 * neurons, "mul": 2 * neurons},
        "bias": {"add": projected + C},
        "residual": {"add": N * D + 2 * L * T * N * D},  # positions; two in each layer
        "readout": {"add": T * N * D, "mul": 2 * N * D},  # mean over T; tokens' mask
        "other": {"mul": L * T * N * D, "add": N * D, "div": D},  # after attention; means over tokens
    }
    gathered = sum(row.bytes for row in counter.rows.values() if row.role == "gather")
    assert gathered == 4 * 2 * N * D


@pytest.mark.parametrize("entry", [e for e in TINY if e.endswith(("158", "1bit"))])
def test_packing_changes_no_count(entry, model_of, batch_of):
    rows = [count(model_of(entry, packed=packed), batch_of(7, 3))[0].rows for packed in (False, True)]
    strip = [{k: (r.ac, r.mac, r.nnz, r.dense, dict(r.counts), r.weight_bits) for k, r in x.items()} for x in rows]
    assert strip[0] == strip[1]
