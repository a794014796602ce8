"""Counts of spiking attention, against formulas that see nothing but the spikes of query, key and value.

n tokens, T steps, D width, H heads, E = D / H; one text, without padding.
"""

from collections import Counter

import pytest
import torch
from torch import nn

from snlp_zoo.energy import estimate, verify_spikes
from snlp_zoo.energy.record import record
from snlp_zoo.energy.report import count
from snlp_zoo.layers import ElasticBiSpike, LIFNode, SpikingformerSelfAttention, SpikingSelfAttention, make_attention

T, H, E = 3, 2, 4
D = H * E
SHORT, LONG = 4, 40  # tokens: the quadratic form, the linear form in every variant


def neuron(share):
    return LIFNode(v_threshold=0.1 * share)


class Toy(nn.Module):
    """ids -> embed -> three spike trains over T steps -> attention -> weights -> mean over T."""

    spike_driven = ("out", "attention @*")

    def __init__(self, attention, make=neuron):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attention, self.out = nn.Embedding(100, 3 * D), attention, nn.Linear(D, 5, bias=False)
        self.query, self.key, self.value = make(1.0), make(2.0), make(3.0)

    def forward(self, input_ids, attention_mask):
        parts = self.embed(input_ids).expand(T, -1, -1, -1).chunk(3, -1)
        nodes = (self.query, self.key, self.value)
        self.spikes = [node(x, from_rest=True) for node, x in zip(nodes, parts, strict=True)]
        return self.out(self.attention(*self.spikes, attention_mask)).mean(0)


def toy(name, causal=False, make=neuron, **options):
    return Toy(make_attention(name, H, make, causal, **options), make)


def tokens(n):
    return {"input_ids": torch.arange(n).unsqueeze(0) % 90 + 5}


def measured(model, n):
    """Products of the attention, its other work by role, and query, key, value [T, H, n, E]."""
    counter, *_ = count(model, tokens(n))
    assert counter.problems == {}
    rows = [row for row in counter.rows.values() if row.role == "matmul" and row.name != "out"]
    products = {row.name.partition(" @ ")[2]: row for row in rows}
    work = {row.role: +row.counts for row in counter.rows.values() if row.name == "attention"}
    heads = [x.squeeze(1).unflatten(-1, (H, E)).transpose(1, 2) for x in model.spikes]
    return products, work, heads


def ands(a, b):
    """How often both operands of a product are nonzero."""
    return int(((a != 0).double() @ (b != 0).double()).sum())


def test_ssa_quadratic():
    products, work, (q, k, v) = measured(toy("ssa"), SHORT)
    scores, mixed = products["query x key"], products["attention x value"]
    assert (scores.kind, scores.ac, scores.mac) == ("binary x binary", int((q @ k.mT).sum()), 0)
    assert (mixed.kind, mixed.ac, mixed.mac) == ("integer x binary", ands(q @ k.mT, v), 0)
    assert set(scores.counts) == set(mixed.counts) == {"iadd"}
    assert not mixed.alternative  # an integer is added when a spike comes: nothing cheaper
    assert scores.dense == mixed.dense == T * H * SHORT**2 * E
    assert work == {"other": Counter(mul=T * SHORT * D)}  # the scale


def test_ssa_linear():
    products, work, (q, k, v) = measured(toy("ssa"), LONG)
    memory, mixed = products["key x value"], products["query x attention"]
    assert (memory.kind, memory.ac) == ("binary x binary", int((k.mT @ v).sum()))
    assert (mixed.kind, mixed.ac) == ("binary x integer", ands(q, k.mT @ v))
    assert memory.mac == mixed.mac == 0
    assert memory.dense == mixed.dense == T * H * LONG * E**2
    assert work == {"other": Counter(mul=T * LONG * D)}


def test_ssa_causal():
    products, _, (q, k, v) = measured(toy("ssa", causal=True), SHORT)
    assert products["query x key"].ac == int((q @ k.mT).sum())  # the scores of later tokens are made, then left out
    assert products["attention x value"].ac == ands((q @ k.mT).tril(), v)
    products, _, (q, k, v) = measured(toy("ssa", causal=True), LONG)
    chunks = [x.split(E, -2) for x in (q, k, v)]
    memories = torch.stack([k.mT @ v for k, v in zip(*chunks[1:], strict=True)]).cumsum(0)
    assert products["key x value"].ac == sum(ands(k.mT, v) for k, v in zip(*chunks[1:], strict=True))
    assert products["query x key"].ac == sum(ands(q, k.mT) for q, k in zip(*chunks[:2], strict=True))
    within = sum(ands((q @ k.mT).tril(), v) for q, k, v in zip(*chunks, strict=True))
    assert products["attention x value"].ac == within
    recalled = sum(ands(q, memory) for q, memory in zip(chunks[0][1:], memories, strict=False))
    assert products["query x attention"].ac == recalled


@pytest.mark.parametrize("causal", [False, True])
def test_sdsa_multiplies_no_matrices(causal):
    model = toy("sdsa", causal)
    products, work, (_, k, v) = measured(model, SHORT)
    assert products == {}
    gates = []
    model.attention.neuron.register_forward_hook(lambda _, __, spikes: gates.append(spikes.squeeze(1)))
    model(**tokens(SHORT), attention_mask=None)
    let_through = int((model.spikes[0].squeeze(1) * gates[0]).sum())
    assert work == {"gate": Counter(iadd=int((k * v).sum()) + let_through), "counter": Counter(iadd=int((k * v).sum()))}
    counter, *_ = count(model, tokens(SHORT))
    rows = {(row.name, row.role): row for row in counter.rows.values()}
    assert rows["attention", "gate"].dense == 2 * T * SHORT * D
    assert rows["attention", "counter"].dense == T * SHORT * D
    neurons = T * D * (SHORT if causal else 1)
    assert rows["attention.neuron", "neuron"].elements == neurons
    assert rows["out", "matmul"].kind == "binary x real"
    assert rows["out", "matmul"].ac == 5 * let_through


def test_axnor():
    products, work, (q, k, v) = measured(toy("axnor"), LONG)
    assert products["key x value"].ac == int((k.mT @ v).sum())
    assert products["query x attention"].ac == ands(q, k.mT @ v)
    weighted = k.sum(-1, keepdim=True) * v
    counted = int(k.sum() + v.sum() + q.sum()) + int((weighted != 0).sum())
    outputs, columns = T * LONG * D, T * LONG * H
    assert work == {
        "counter": Counter(iadd=counted),
        "gate": Counter(iadd=int((weighted != 0).sum())),
        "residual": Counter(add=columns + 3 * outputs),  # E - |q|; three sums of outputs
        "other": Counter(mul=3 * outputs),  # (E - |q|) times sums, a, scale
    }


def test_stochastic_in_evaluation():
    products, work, (q, k, v) = measured(toy("stochastic"), SHORT)
    assert products["query x key"].ac == int((q @ k.mT).sum())
    assert products["attention x value"].ac == ands(q @ k.mT, v)
    assert work == {"other": Counter(mul=T * SHORT * D)}  # the shares 1 / (E n) come of no data


@pytest.mark.parametrize("name", ["ssa", "sdsa", "stochastic"])
def test_records_show_membranes_that_fire_where_spikes_are(name):
    for site, found in record(toy(name), tokens(SHORT) | {"attention_mask": torch.ones(1, SHORT)}).items():
        assert found.spikes.any(), site
        assert torch.equal(found.membranes >= found.threshold.view(-1, 1, 1), found.spikes == 1), site


def test_bernoulli_draws():
    torch.manual_seed(3)
    model = toy("stochastic", always=True)
    drawn = []
    model.attention.score_neuron.register_forward_hook(lambda _, __, spikes: drawn.append(spikes))
    counter, *_ = count(model, tokens(SHORT))
    rows = {(row.name, row.role): row for row in counter.rows.values()}
    _, _, value = (x.squeeze(1).unflatten(-1, (H, E)).transpose(1, 2) for x in model.spikes)
    scores = drawn[0].squeeze(1).unflatten(-1, (H, SHORT)).transpose(1, 2)
    for name, draws in (("score_neuron", T * H * SHORT**2), ("neuron", T * SHORT * D)):
        row = rows[f"attention.{name}", "neuron"]
        assert (row.kind, row.elements, +row.counts) == ("binary", draws, Counter(add=2 * draws))
    product = rows["attention @ score_neuron x value", "matmul"]
    assert (product.kind, product.ac, product.mac) == ("binary x binary", int((scores @ value).sum()), 0)


def test_linear_scales_every_score_by_its_decay():
    products, work, (q, k, v) = measured(toy("linear", causal=True), SHORT)
    faded = products["value"]
    assert (faded.kind, faded.ac, faded.mac) == ("real x binary", int(v.sum()) * SHORT, 0)
    assert set(faded.counts) == {"add"}  # floats from here on
    scores = H * SHORT**2
    assert work["other"]["mul"] == T * scores + T * SHORT * D
    assert products["query x key"].ac == int((q @ k.mT).sum())


@pytest.mark.parametrize("name", ["ssa", "sdsa", "axnor", "stochastic", "linear"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [SHORT, LONG])
def test_every_variant_holds_what_it_declares(name, causal, n):
    model = toy(name, causal)
    found = verify_spikes(model, tokens(n))
    assert found.failures == {}
    assert found.spike_driven_fraction == 1
    report = estimate(model, tokens(n))
    assert report.ratios["all_ops"]["dense_fp32"] > 0
    handle = model.value.register_forward_hook(lambda _, __, spikes: spikes + 0.5)
    assert "value" in verify_spikes(model, tokens(n)).failures
    handle.remove()


def test_ternary_spikes_are_priced_with_their_amplitude():
    model = toy("ssa", make=lambda share: ElasticBiSpike(T)).train()
    model(**tokens(SHORT), attention_mask=None)
    products, _, (q, k, v) = measured(model.eval(), SHORT)
    row = products["query x key"]
    assert (row.kind, row.ac, row.mac) == ("ternary x ternary", ands(q, k.mT), 0)
    assert (products["value"].kind, products["value"].ac) == ("real x ternary", int((v != 0).sum()) * SHORT)


def test_a_dense_network_multiplies_and_adds_where_spikes_gate_and_count():
    model = toy("sdsa")
    dense = estimate(model, tokens(SHORT), memory="none").energy_pj
    pj = {op: 3.7 if op == "mul" else 0.9 for op in ("mul", "add")}
    expected = 2 * SHORT * D * pj["mul"] + SHORT * D * pj["add"]
    assert dense["all_ops"]["dense_fp32"] - dense["matmul_only"]["dense_fp32"] == pytest.approx(expected)


@pytest.mark.parametrize("kind", [SpikingSelfAttention, SpikingformerSelfAttention])
def test_blocks_multiply_spikes_only(kind):
    """Fed with real currents, Spikformer's block has three real products, Spikingformer's none."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(100, D)
            self.block = kind(D, make_attention("ssa", H, neuron), nn.Linear, neuron)

        def forward(self, input_ids, attention_mask):
            return self.block(self.embed(input_ids).expand(T, -1, -1, -1), attention_mask)[0].mean(0)

    found = verify_spikes(Model(), tokens(SHORT))
    real = [product.layer for product in found.products if not product.spike_driven]
    projections = [f"block.{name}.linear" for name in ("query", "key", "value")]
    assert real == (projections if kind is SpikingSelfAttention else [])
