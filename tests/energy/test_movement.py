"""Bytes: BERT-base by hand on 128 tokens at T = 4, and the formats of spikes."""

from collections import Counter

import pytest

from snlp_zoo.energy.costs import COST_TABLES, Memory
from snlp_zoo.energy.counting import Row
from snlp_zoo.energy.movement import dense_traffic, spiking_traffic
from snlp_zoo.energy.report import _Prices

T, L, D, F, N = 4, 12, 768, 3072, 128
TABLE = COST_TABLES["horowitz45"]


def bert_base(rate):
    """Rows of SpikeLM at BERT-base size: every product is fed at `rate`."""
    rows = []
    for layer in range(L):
        for k, m in ((D, D),) * 4 + ((D, F), (F, D)):
            spikes = round(T * N * k * rate)
            row = Row(f"{layer}.{len(rows)}", "matmul", True, kind="ternary x real", nnz=spikes, elements=T * N * k)
            row.ac, row.dense, row.fan_in, row.fan_out, row.weight_bits = spikes * m, T * N * k * m, k, m, 32
            row.outputs, row.spike_driven, row.counts = T * N * m, True, Counter(add=row.ac)
            row.moved = Counter({("ternary", "words"): T * N * k, ("ternary", "events"): spikes,
                                 ("ternary", "address_bits"): 10 * spikes})  # fmt: skip
            rows += [row, Row(f"{row.name}.scale", "amplitude", True, Counter(mul=T * N * m))]
        for k, m in ((D, N), (N, D)):
            attention = Row(f"{layer}.attention.{k}", "matmul", True, spike_driven=True, dense=T * N * k * m)
            attention.ac, attention.fan_in, attention.fan_out = round(attention.dense * rate), k, m
            attention.counts = Counter(add=attention.ac)
            rows.append(attention)
    neurons = Row("neurons", "neuron", True, Counter(add=2 * T * L * N * 10 * D, mul=2 * T * L * N * 10 * D))
    neurons.elements = T * L * N * (5 * D + F)
    return [*rows, neurons]


def millijoules(rate, memory):
    prices = _Prices(bert_base(rate), T, 1, TABLE, memory, ("dense_fp32",))
    found = prices.energy["with_memory"]
    return found["dense_fp32"] * 1e-9, found["spiking"] * 1e-9


SRAM = Memory("sram", "sram", "sram", "sram")
REUSE = Memory("reuse", "sram", "sram", "sram", reuse_dense=128)
STEP = Memory("step", "dram", "sram", "sram", traffic="step")
FOLD = Memory("fold", "dram", "sram", "sram", traffic="fold")


@pytest.mark.parametrize(
    ("memory", "rate", "dense", "spiking", "ratio"),
    [
        (SRAM, 0.17, 105.9, 44.8, 2.36),
        (SRAM, 0.34, 105.9, 88.7, 1.19),
        (REUSE, 0.17, 51.9, 44.8, 1.16),
        (REUSE, 0.34, 51.9, 88.7, 0.59),
        (STEP, 0.17, 105.9, 225.0, 0.47),
        (FOLD, 0.17, 105.9, 62.2, 1.70),
    ],
)
def test_bert_base_in_millijoules(memory, rate, dense, spiking, ratio):
    found = millijoules(rate, memory)
    assert found == pytest.approx((dense, spiking), rel=2e-3)  # as printed, three digits
    assert found[0] / found[1] == pytest.approx(ratio, abs=0.006)


def test_resident_weights_move_nothing_and_membranes_per_event_a_lot():
    row = bert_base(0.17)[0]
    resident = Memory("mine", traffic="resident")
    assert spiking_traffic(row, resident, T, 1).weight == 0
    assert dense_traffic(row, resident, T, 1, 4.0, 4.0).weight == 0
    scattered = spiking_traffic(row, Memory("mine", event_driven=True), T, 1)
    assert scattered.membrane == 2 * 4 * row.ac
    assert spiking_traffic(row, SRAM, T, 1).membrane == 0


@pytest.mark.parametrize("kind", ["binary", "ternary"])
def test_spikes_as_events_or_bitmap(kind):
    words, events = 1000, 30
    moved = Counter({(kind, "words"): words, (kind, "events"): events, (kind, "address_bits"): 10 * events})
    row = Row("neuron", "neuron", True, kind=kind, elements=words, moved=moved)
    found = {f: spiking_traffic(row, Memory("m", spikes=f), T, 1).activation for f in ("events", "bitmap", "cheaper")}
    assert found["events"] == events * (10 + 2) / 8  # two bits say which of four steps
    assert found["bitmap"] == words * (2 if kind == "ternary" else 1) / 8
    assert found["cheaper"] == min(found["events"], found["bitmap"]) == found["events"]


def test_packed_weights_move_their_bits():
    row = bert_base(0.17)[0]
    reads = {}
    for bits in (32, 8, 1.58, 1):
        row.weight_bits = bits
        reads[bits] = spiking_traffic(row, FOLD, T, 1).weight
    assert reads == {32: 4 * D * D, 8: D * D, 1.58: D * D / 4, 1: D * D / 8}
