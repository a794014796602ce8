"""Neurons whose membranes walk over tokens, and the recurrence beside them: T is 1, a token is done once.

B texts of N tokens, C channels, M outputs.
"""

from collections import Counter

import pytest
import torch
from torch import nn

from snlp_zoo.energy import estimate, prices, verify_spikes
from snlp_zoo.energy.costs import COST_TABLES
from snlp_zoo.energy.record import record
from snlp_zoo.energy.report import UNTOUCHED, count
from snlp_zoo.errors import EnergyError
from snlp_zoo.layers import LIFNode, TernaryLIFNode
from snlp_zoo.layers.wkv import WKV4
from snlp_zoo.pareto import varied

N, C, M = 7, 6, 5


class Walking(nn.Module):
    """ids -> embed -> neuron over tokens -> out [B, N, M], or, real, embed -> out -> neuron."""

    def __init__(self, node=None, driven=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out, self.driven = nn.Embedding(100, C), nn.Linear(C, M, bias=False), driven
        self.node = node or LIFNode(v_threshold=0.2)
        self.node.over_tokens = True

    def fire(self, x):
        return self.node(x.transpose(0, 1), from_rest=True).transpose(0, 1)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        return self.out(self.fire(x)) if self.driven else self.fire(self.out(x))


BATCH = {"input_ids": torch.arange(5, 5 + N).unsqueeze(0)}


def rows_of(net, batch=BATCH):
    counter, steps, *_ = count(net, batch)
    assert counter.problems == {}
    return {row.role: row for row in counter.rows.values()}, steps


def test_a_product_of_walking_spikes_takes_an_addition_for_each():
    net = Walking()
    with torch.no_grad():
        spikes = net.fire(net.embed(BATCH["input_ids"]))
    rows, steps = rows_of(net)
    product, neuron = rows["matmul"], rows["neuron"]
    assert 0 < spikes.sum() < spikes.numel()
    assert (steps, product.kind, product.timed, neuron.timed) == (1, "binary x real", False, False)
    assert (product.ac, product.mac, product.dense) == (int(spikes.sum()) * M, 0, N * C * M)
    assert (product.nnz, product.elements) == (int(spikes.sum()), N * C)
    assert (neuron.elements, neuron.nnz) == (N * C, int(spikes.sum()))
    assert neuron.counts == {"add": 2 * N * C, "mul": 2 * N * C}


def test_the_estimate_compares_with_one_dense_pass():
    net = Walking()
    report = estimate(net, BATCH)
    assert (report.time_steps, report.tokens, report.spike_driven_fraction) == (1, N, 1.0)
    assert report.energy_pj["matmul_only"]["dense_fp32"] == pytest.approx(N * C * M * COST_TABLES["horowitz45"].mac)
    (product,) = (layer for layer in report.layers if layer["role"] == "matmul")
    assert report.norm_ops == product["ifr"] == pytest.approx(product["rate"])  # one linear layer, one step
    assert UNTOUCHED not in report.statement


def test_a_model_whose_products_see_no_spike_says_so():
    report = estimate(Walking(driven=False), BATCH)
    assert (report.spike_driven_fraction, report.norm_ops) == (0.0, 0.0)
    assert report.ratios["matmul_only"]["dense_fp32"] == pytest.approx(1)
    assert report.statement.endswith(UNTOUCHED)
    assert UNTOUCHED in report.to_markdown()


def test_texts_are_counted_one_by_one():
    two = {"input_ids": torch.arange(5, 5 + 2 * N).view(2, N)}
    rows, steps = rows_of(Walking(), two)
    alone = [rows_of(Walking(), {"input_ids": ids.unsqueeze(0)})[0]["matmul"].ac for ids in two["input_ids"]]
    assert (steps, rows["matmul"].ac) == (1, sum(alone))


def test_amplitudes_of_a_walking_neuron_are_one_number():
    rows, _ = rows_of(Walking(TernaryLIFNode(v_threshold=0.2, amplitude=1.5)))
    assert (rows["matmul"].kind, rows["matmul"].mac) == ("ternary x real", 0)
    assert rows["matmul"].ac > 0
    assert "amplitude" not in rows  # one number, a part of the weights


def test_verify_finds_a_walking_neuron_that_is_dense_after_all():
    net = Walking()
    assert verify_spikes(net, BATCH).ok
    net.node.register_forward_hook(lambda _, __, spikes: spikes * 0.7)
    assert "declared binary" in verify_spikes(net, BATCH).failures["node"]


def test_recorded_spikes_have_one_step_and_all_tokens():
    (found,) = record(Walking(), BATCH).values()
    assert found.spikes.shape == found.membranes.shape == found.reached.shape == (1, N, C)
    assert torch.equal(found.spikes != 0, found.membranes >= found.threshold.view(-1, 1, 1))
    assert found.spikes.any()


def test_time_steps_of_walking_neurons_cannot_be_varied():
    net = Walking()
    with pytest.raises(EnergyError, match=r"Walking has one time step for each token.*got 4"):
        varied(net, 4)
    assert varied(net, 1, threshold=2.0).node.v_threshold == 2 * net.node.v_threshold


class Recurrent(Walking):
    def __init__(self):
        super().__init__()
        self.wkv, self.decay = WKV4(), nn.Parameter(torch.zeros(C))

    def forward(self, input_ids, attention_mask):
        k = self.embed(input_ids)
        mixed, _ = self.wkv(-self.decay.exp(), self.decay, k, k.clone())
        return self.out(self.fire(mixed))


def test_a_recurrence_is_priced_as_a_whole_token_by_token():
    rows, _ = rows_of(Recurrent())
    each = N * C
    assert rows["recurrence"].counts == {"add": 12 * each, "mul": 6 * each, "exp": 4 * each, "div": each}
    assert rows.keys() == {"gather", "recurrence", "neuron", "matmul"}  # nothing of what is inside it
    report = estimate(Recurrent(), BATCH)
    (layer,) = (layer for layer in report.layers if layer["role"] == "recurrence")
    assert layer["bytes"] == 2 * 3 * 4 * each  # numerator, denominator and maximum, read and written
    dense, spiking = (
        report.energy_pj["all_ops"][side] - report.energy_pj["matmul_only"][side] for side in ("dense_fp32", "spiking")
    )
    neuron = 2 * (0.9 + 3.7) * each
    assert spiking - dense == pytest.approx(neuron)  # the recurrence is on both sides


def test_the_price_of_a_recurrence_is_that_of_its_operations():
    class Written(nn.Module):
        """One token of the recurrence, operation by operation, on what earlier tokens left."""

        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(100, C) for _ in range(5))
            self.w, self.u, self.node = nn.Parameter(-torch.ones(C)), nn.Parameter(torch.ones(C)), LIFNode()
            self.node.over_tokens = True

        def forward(self, input_ids, attention_mask):
            k, v, a, b, p = (table(input_ids) for table in self.tables)
            bonus = self.u + k
            q = torch.maximum(p, bonus)
            past, present = (p - q).exp(), (bonus - q).exp()
            out = (past * a + present * v) / (past * b + present)
            decayed = p + self.w
            q = torch.maximum(decayed, k)
            past, present = (decayed - q).exp(), (k - q).exp()
            a, b = past * a + present * v, past * b + present
            return self.node(out.transpose(0, 1), from_rest=True), (a, b, q)

    counter, *_ = count(Written(), BATCH)
    found = Counter()
    for row in counter.rows.values():
        found.update(row.counts if row.role != "neuron" else {})
    assert found == {primitive: number * N * C for primitive, number in prices.WKV4.items()}


def test_a_square_is_a_multiplication():
    class Squared(Walking):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids, attention_mask).relu() ** 2

    counts = rows_of(Squared())[0]["activation"].counts
    assert counts == {"add": N * M, "mul": N * M}
