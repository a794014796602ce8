"""Counts of both wirings of SpikeGPT and of its dense control, against formulas that see nothing but spikes.

n tokens of one text, D width, F inner width, L layers, V vocabulary.
"""

import json
from collections import Counter

import pytest
import torch
from spikingjelly.activation_based.neuron import BaseNode

from snlp_zoo.energy import estimate, verify_spikes
from snlp_zoo.energy.costs import COST_TABLES
from snlp_zoo.energy.counting import counting
from snlp_zoo.energy.report import UNTOUCHED, count
from snlp_zoo.registry import build

N = 11
IDS = torch.randint(5, 100, (1, N), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS}
# Inputs of products -> outputs, and which neuron stands in front of them in the spike-driven wiring.
PRODUCTS = {f"time_mix.{name}": ("D", "D") for name in ("key", "value", "receptance", "output")}
PRODUCTS |= {"channel_mix.key": ("D", "F"), "channel_mix.receptance": ("D", "D"), "channel_mix.value": ("F", "D")}


def lively(**options):
    """The tiny model with weights that make its neurons fire; as it starts, they hardly do."""
    torch.manual_seed(0)
    model = build("spikegpt_tiny", **options)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.5 * torch.randn_like(weight)
    return model


def sizes(model):
    c = model.config
    return {"D": c.hidden_size, "F": c.intermediate_size, "L": c.num_hidden_layers, "V": c.vocab_size}


def spikes_of(model):
    """Neuron -> spikes [n, 1, D] (over tokens), or [1, 1, n, D] of the embeddings."""
    seen, nodes = {}, [(name, module) for name, module in model.named_modules() if isinstance(module, BaseNode)]
    handles = [
        node.register_forward_hook(lambda _, __, spikes, name=name: seen.update({name: spikes})) for name, node in nodes
    ]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    return seen


def products_of(counter):
    return {row.name: row for row in counter.rows.values() if row.role == "matmul"}


def by_role(counter):
    found = {}
    for row in counter.rows.values():
        if row.role != "matmul":
            found.setdefault(row.role, Counter()).update(row.counts)
    return {role: {k: v for k, v in counts.items() if v} for role, counts in found.items() if sum(counts.values())}


def everything_else(model, neurons):
    """role -> primitives of all that is no product; `neurons`: how many there are, tokens together."""
    D, F, L, _ = sizes(model).values()
    each = N * D  # one channel of one token
    norms, lerps, wkv, gates = 2 + 2 * L, 5 * L, L, 2 * L
    expected = {
        "norm": {"add": 4 * norms * each, "mul": 3 * norms * each},
        "residual": {"add": 2 * L * each},
        # token shifts are two multiplications and two additions each; gates one multiplication
        "other": {"mul": (2 * lerps + gates) * each, "add": 2 * lerps * each},
        # sigmoids; ReLU and its square
        "activation": {"exp": gates * each, "add": L * N * F, "mul": L * N * F},
        "recurrence": {"add": 12 * wkv * each, "mul": 6 * wkv * each, "exp": 4 * wkv * each, "div": wkv * each},
        "neuron": {"add": 2 * neurons, "mul": 2 * neurons},
    }
    return expected if neurons else {role: counts for role, counts in expected.items() if role != "neuron"}


def dense_products(model):
    size = sizes(model)
    blocks = {
        f"spikegpt.layers.{layer}.{name}": N * size[inputs] * size[outputs]
        for layer in range(size["L"])
        for name, (inputs, outputs) in PRODUCTS.items()
    }
    return blocks | {"lm_head": N * size["D"] * size["V"]}


@pytest.mark.parametrize("options", [{}, {"spiking": False}], ids=["published", "dense"])
def test_products_of_real_numbers(options):
    """The published wiring multiplies exactly what the dense control multiplies: no spike enters a product."""
    model = lively(**options)
    with counting(model) as counter:
        model(IDS)
    rows = products_of(counter)
    assert {name: row.mac for name, row in rows.items()} == dense_products(model)
    assert {(row.kind, row.ac, row.spike_driven) for row in rows.values()} == {("real x real", 0, False)}
    assert counter.problems == {}
    if not options:
        fired = spikes_of(model)
        assert any(spikes.any() for name, spikes in fired.items() if "layers" in name)  # there are spikes


def test_products_of_spikes():
    model = lively(wiring="spike_driven")
    counter, time_steps, _, tokens = count(model, BATCH)
    assert (time_steps, tokens, counter.problems) == (1, N, {})
    rows, fired, size = products_of(counter), spikes_of(model), sizes(model)
    dense = dense_products(model)
    for layer in range(size["L"]):
        for name, (inputs, outputs) in PRODUCTS.items():
            path = f"spikegpt.layers.{layer}.{name}"
            row, spikes = rows.pop(path), fired[f"{path}_neuron"]
            assert spikes.shape == (N, 1, size[inputs])
            assert (row.kind, row.spike_driven, row.timed) == ("binary x real", True, False), path
            assert (row.ac, row.mac) == (int(spikes.sum()) * size[outputs], 0), path
            assert (row.nnz, row.elements, row.dense) == (int(spikes.sum()), N * size[inputs], dense[path]), path
    assert {name: (row.ac, row.mac) for name, row in rows.items()} == {"lm_head": (0, dense["lm_head"])}
    assert all(spikes.any() for spikes in fired.values())  # no count above was of silence


@pytest.mark.parametrize(
    ("options", "of_block"),
    [({}, (2, 0)), ({"wiring": "spike_driven"}, (6, 1)), ({"spiking": False}, None)],
    ids=["published", "spike_driven", "dense"],
)
def test_everything_else(options, of_block):
    """`of_block`: how many neurons of width D and of width F a block has; embeddings are spikes in both wirings."""
    model = lively(**options)
    with counting(model) as counter:
        model(IDS)
    D, F, L, _ = sizes(model).values()
    neurons = N * (D + L * (of_block[0] * D + of_block[1] * F)) if of_block else 0
    assert by_role(counter) == everything_else(model, neurons)
    assert sum(row.bytes for row in counter.rows.values() if row.role == "gather") == 4 * N * D


def test_the_published_wiring_saves_no_product_and_says_so():
    model = lively()
    report = estimate(model, BATCH)
    assert (report.spike_driven_fraction, report.spike_driven_energy_fraction, report.norm_ops) == (0.0, 0.0, 0.0)
    assert report.ratios["matmul_only"]["dense_fp32"] == pytest.approx(1)
    assert report.ratios["all_ops"]["dense_fp32"] < 1  # the neurons are on top
    assert UNTOUCHED in report.to_markdown()
    assert UNTOUCHED in json.loads(report.to_json())["statement"]
    found = verify_spikes(model, BATCH, claimed_fraction=0.0)
    assert found.ok
    assert not any(product.claimed or product.spike_driven for product in found.products)


def test_the_spike_driven_wiring_claims_its_products():
    model = lively(wiring="spike_driven")
    report, found = estimate(model, BATCH), verify_spikes(model, BATCH)
    assert UNTOUCHED not in report.statement
    assert found.ok
    assert {product.layer for product in found.products if not product.claimed} == {"lm_head"}
    ac = sum(int(s.sum()) * sizes(model)["F" if "mix.key_" in name and "channel" in name else "D"]
             for name, s in spikes_of(model).items() if "layers" in name)  # fmt: skip
    head = dense_products(model)["lm_head"]
    assert report.spike_driven_fraction == pytest.approx(ac / (ac + head))
    assert report.ratios["matmul_only"]["dense_fp32"] == pytest.approx(
        sum(dense_products(model).values()) * 4.6 / (ac * 0.9 + head * 4.6)
    )


@pytest.mark.parametrize("wiring", ["published", "spike_driven"])
def test_the_dense_baseline_is_the_dense_control(wiring):
    """What a report compares with takes to the last operation what RWKV-4 of the same shape takes."""
    table, control = COST_TABLES["horowitz45"], lively(spiking=False)
    with counting(control) as counter:
        control(IDS)
    found = estimate(lively(wiring=wiring), BATCH).energy_pj["all_ops"]["dense_fp32"]
    assert found == pytest.approx(sum(table.pj(row.counts) for row in counter.rows.values()), rel=1e-12)


def test_classifiers_and_caches_have_no_unpriced_operation():
    classifier = lively(task="sequence-classification", num_labels=3)
    assert estimate(classifier, BATCH).spike_driven_fraction == 0
    model = lively()
    beginning = model(IDS, use_cache=True).past_key_values
    with counting(model) as counter:
        model(IDS[:, :1], past_key_values=beginning, use_cache=True)
    one, all_ = (products_of(counter)["lm_head"].mac, dense_products(model)["lm_head"])
    assert one * N == all_  # a token costs what it costs, however long the text before it


def test_padding_and_companions_cost_nothing():
    model = lively(wiring="spike_driven")
    left = torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS], 1)
    batch = {
        "input_ids": torch.cat([left, left.flip(1)]),
        "attention_mask": (torch.cat([left, left.flip(1)]) != 0).long(),
    }
    two, one = estimate(model, batch), estimate(model, BATCH)
    other = estimate(model, {"input_ids": IDS.flip(1)})
    assert two.totals["ac"] == one.totals["ac"] + other.totals["ac"]
    assert two.tokens == 2 * N


def test_activation_checkpointing_changes_nothing():
    model = lively()
    expected = estimate(model, BATCH).to_dict()
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # transformers renamed it
    getattr(model, next(name for name in names if hasattr(model, name)))()
    assert estimate(model, BATCH).to_dict() == expected
