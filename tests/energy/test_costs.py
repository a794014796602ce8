import dataclasses
import math
import time

import pytest
import torch

from snlp_zoo.energy import estimate
from snlp_zoo.energy.claims import CLAIMS
from snlp_zoo.energy.costs import (
    COST_TABLES,
    MEMORY_MODELS,
    Cost,
    Memory,
    accumulator_bits,
    break_even_rate,
    lookup,
    qnn_bits,
)
from snlp_zoo.errors import EnergyError
from snlp_zoo.registry import build

TABLE, FP16, INT8 = (COST_TABLES[name] for name in ("horowitz45", "horowitz45_fp16", "horowitz45_int8"))
L, D, F, N, H = 12, 768, 3072, 128, 12  # BERT-base on 128 tokens
LINEAR = L * N * (4 * D * D + 2 * D * F)
ATTENTION = L * 2 * N * N * D
MACS = LINEAR + ATTENTION


def mj(pj):
    return pj * 1e-9


def spiking(time_steps, rate, table=TABLE, primitive="add"):
    return mj(table.pj({primitive: MACS * time_steps * rate}))


def test_counts_of_bert_base():
    assert (LINEAR, ATTENTION, MACS) == (10_871_635_968, 301_989_888, 11_173_625_856)
    assert L * (4 * D * D + 2 * D * F) == 84_934_656


def test_a_report_of_bert_base_counts_them():
    torch.manual_seed(0)
    started = time.monotonic()
    report = estimate(build("spikelm_base"), {"input_ids": torch.randint(1000, 30000, (1, N))})
    assert time.monotonic() - started < 120
    head = D * D + 2 * D  # pooler and classifier
    assert report.energy_pj["matmul_only"]["dense_fp32"] == pytest.approx((MACS + head) * TABLE.mac, rel=1e-9)


@pytest.mark.parametrize(
    ("pj_per_mac", "expected"),
    [
        (TABLE.mac, 51.398679),
        (FP16.mac, 16.760439),
        (TABLE.integer_mac(), 3.352088),
        (INT8.integer_mac(), 2.569934),
    ],
)
def test_energy_of_dense_bert_base(pj_per_mac, expected):
    assert mj(MACS * pj_per_mac) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("time_steps", "rate", "expected"),
    [
        (4, 0.17, 7.516340),
        (4, 0.33, 3.872054),
        (4, 0.34, 3.758170),
        (4, 0.345345, 3.700004),
        (1, 0.17, 30.065359),
        (1, 0.34, 15.032680),
    ],
)
def test_ratio_by_firing_rate(time_steps, rate, expected):
    assert mj(MACS * TABLE.mac) / spiking(time_steps, rate) == pytest.approx(expected, rel=1e-6)


def test_energy_of_spiking_bert_base():
    assert spiking(4, 0.17) == pytest.approx(6.838259, rel=1e-6)
    assert spiking(4, 0.17, primitive="iadd") == pytest.approx(0.759807, rel=1e-6)
    int8 = mj(MACS * TABLE.integer_mac())
    assert int8 / spiking(4, 0.17) == pytest.approx(0.4902, rel=1e-4)  # float spikes lose against int8
    assert int8 / spiking(4, 0.17, primitive="iadd") == pytest.approx(4.4118, rel=1e-4)


def test_spikingbert_of_four_layers():
    macs = 4 * (N * (4 * D * D + 2 * D * F) + 2 * N * N * D)
    assert macs == 3_724_541_952
    assert mj(macs * TABLE.mac) == pytest.approx(17.132893, rel=1e-6)
    claim = next(claim for claim in CLAIMS if claim.system == "SpikingBERT")
    rate = claim.needed_rate(TABLE)  # Norm#OPS of a ratio of 2 is T r
    assert 16 * rate == pytest.approx(5.1 / 2, rel=1e-6)
    assert mj(macs * TABLE.mac) / mj(TABLE.pj({"add": macs * 80 * rate})) == pytest.approx(0.4009, rel=1e-3)


def test_all_operations_of_spikelm_bert():
    """Norms, softmax, GELU, residuals, neurons and amplitudes cost a quarter of the whole at r = 0.17."""
    rows = N * L
    norm = {"add": 4 * (2 * L + 1) * N * D, "mul": 3 * (2 * L + 1) * N * D}
    soft = {"exp": rows * H * N, "add": rows * H * N, "div": rows * H * N}
    gelu = {"exp": rows * F, "mul": 2 * rows * F, "add": rows * F}
    residual = {"add": 2 * rows * D}
    once = [mj(TABLE.pj(counts)) for counts in (norm, soft, gelu, residual)]
    assert [4 * x for x in once] == pytest.approx([0.144507, 0.690788, 1.024876, 0.008493], rel=1e-4)
    neurons = mj(TABLE.pj({"mul": 2 * 4 * rows * 10 * D, "add": 2 * 4 * rows * 10 * D}))
    amplitudes = mj(TABLE.pj({"mul": 4 * rows * (5 * D + F)}))
    assert (neurons, amplitudes) == pytest.approx((0.434110, 0.157129), rel=1e-4)
    skipped = 4 * sum(once) + neurons + amplitudes
    assert skipped == pytest.approx(2.460, rel=1e-4)
    dense = mj(MACS * TABLE.mac) + sum(once)
    assert dense / (spiking(4, 0.17) + skipped) == pytest.approx(5.58, rel=1e-3)
    assert dense / (spiking(4, 0.34) + skipped) == pytest.approx(3.21, rel=2e-3)


V5 = {"weight": 5.0, "membrane": 5.0}
LEMAIRE = {"weight": 20.0, "membrane": 20.0, "mac": 3.2, "ac": 0.1, "address": 0.1, "fan_in": 10**9}


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ({}, {1: 1, 4: 1, 6: 0.852, 16: 0.319}),
        ({"weight": 5.0}, {1: 1, 4: 0.407, 6: 0.271, 16: 0.102}),
        (V5, {1: 1, 4: 0.405, 6: 0.269, 16: 0.0995}),
        (V5 | {"event_driven": True}, {1: 0.603, 4: 0.150, 6: 0.0998, 16: 0.037}),
        (V5 | {"reuse_dense": 128}, {1: 0.784, 4: 0.194, 6: 0.129, 16: 0.047}),
        (LEMAIRE | {"event_driven": True}, {1: 0.385, 4: 0.096, 6: 0.064}),
        ({"weight": 640.0, "reuse_dense": 128}, {4: 0.0037}),
    ],
)
def test_break_even_rates(costs, expected):
    for time_steps, rate in expected.items():
        digits = len(str(rate).partition(".")[2])  # as printed
        assert break_even_rate(time_steps, **costs) == pytest.approx(rate, abs=0.5001 * 10**-digits)


@pytest.mark.parametrize("time_steps", [1, 4, 6, 16])
def test_break_even_tends_to_one_over_t_when_weights_dominate(time_steps):
    assert break_even_rate(time_steps, weight=1e12) == pytest.approx(1 / time_steps, rel=1e-9)
    assert break_even_rate(time_steps, membrane=1e6) == 0


def test_other_terms_of_the_break_even_rate():
    plain = break_even_rate(8, weight=5.0)
    assert break_even_rate(8, weight=5.0, activation=5.0) > plain  # the dense layer's words
    for name in ("spike", "address", "neuron"):
        assert break_even_rate(8, weight=5.0, **{name: 5.0}) < plain, name
    assert break_even_rate(8, weight=5.0, spiking_weight=1.25) == pytest.approx((4.6 + 5.0) / (8 * (0.9 + 1.25)))


@pytest.mark.parametrize("bad", [{"weight": -1.0}, {"ac": 0.0}, {"mac": math.inf}, {"fan_in": 0}, {"reuse_dense": 0.5}])
def test_break_even_refuses_bad_costs(bad):
    with pytest.raises(EnergyError, match="break_even_rate"):
        break_even_rate(4, **bad)
    with pytest.raises(EnergyError, match="time_steps"):
        break_even_rate(0)


def test_tables_are_frozen_and_hashed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TABLE.name = "mine"
    assert len({table.sha256 for table in COST_TABLES.values()}) == len(COST_TABLES)
    cheaper = (("add", Cost(0.8, 32, "mine")), *TABLE.operations[1:])
    assert dataclasses.replace(TABLE, operations=cheaper).sha256 != TABLE.sha256
    assert dataclasses.replace(TABLE).sha256 == TABLE.sha256
    # a changed number needs a new version and this line
    assert TABLE.sha256 == "be02521778a8c0c04e8038cd592842707371785bf8cd5ddb018870e487d95493"


def test_every_cost_is_cited():
    for table in COST_TABLES.values():
        for name, cost in (*table.operations, *table.places):
            assert cost.citation, name


def test_memory_costs_per_byte_carry_the_access_width():
    assert TABLE.pj_per_byte("sram") == 1.25
    assert TABLE.pj_per_byte("dram") == 160
    assert COST_TABLES["horowitz45_step"].pj_per_byte("sram") == pytest.approx(24.96)
    assert TABLE.pj_per_byte(2.5) == 2.5


@pytest.mark.parametrize(("time_steps", "bits"), [(1, 1), (2, 2), (4, 3), (6, 3), (8, 4), (16, 5)])
def test_bits_of_the_quantised_network(time_steps, bits):
    assert qnn_bits(time_steps) == bits


def test_accumulators_are_wide_enough():
    assert accumulator_bits(8, 768) == 18
    assert accumulator_bits(1.58, 768) == 12


def test_bad_costs_and_unknown_names_are_explained():
    with pytest.raises(EnergyError, match="at least 0 pJ"):
        Cost(-0.1, 32, "mine")
    with pytest.raises(EnergyError, match="at least 0 pJ"):
        TABLE.pj_per_byte(-1.0)
    with pytest.raises(EnergyError, match=r"unknown memory place 'srm'.*did you mean 'sram'"):
        TABLE.pj_per_byte("srm")
    with pytest.raises(EnergyError, match=r"unknown cost table 'horowitz'.*did you mean 'horowitz45'"):
        lookup("cost table", "horowitz", COST_TABLES)
    with pytest.raises(EnergyError, match=r"unknown memory traffic 'fould'.*did you mean 'fold'"):
        Memory("mine", traffic="fould")
    with pytest.raises(EnergyError, match="at least once"):
        Memory("mine", reuse_dense=0)
    assert set(MEMORY_MODELS) == {"none", "sram", "dram"}
