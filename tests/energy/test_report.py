import dataclasses
import json
import time

import pytest
import torch
from torch import nn

from snlp_zoo.energy import COST_TABLES, Memory, estimate
from snlp_zoo.energy.costs import Cost
from snlp_zoo.energy.report import STATEMENT, count
from snlp_zoo.errors import EnergyError
from snlp_zoo.layers import pack
from snlp_zoo.registry import build

FAMILIES = ["spikelm_tiny", "spikingbert_tiny"]
every_family = pytest.mark.parametrize("entry", FAMILIES)


@pytest.fixture
def report(model_of, batch_of):
    return estimate(model_of("spikelm_tiny"), batch_of(9, 5))


def same(one, other):
    assert one.totals == pytest.approx(other.totals, rel=1e-12)
    assert one.ratios["with_memory"] == pytest.approx(other.ratios["with_memory"], rel=1e-12)


@every_family
def test_padding_order_and_batch_size_change_nothing_per_token(entry, model_of, batch_of):
    model, batch = model_of(entry), batch_of(9, 4, 6)
    expected = estimate(model, batch)
    same(estimate(model, {key: value[[2, 0, 1]] for key, value in batch.items()}), expected)
    padded = {key: torch.nn.functional.pad(value, (3, 5)) for key, value in batch.items()}
    same(estimate(model, padded), expected)
    padded["input_ids"][padded["attention_mask"] == 0] = 7  # whatever stands there
    same(estimate(model, padded), expected)
    twice = estimate(model, {key: torch.cat([value, value]) for key, value in batch.items()})
    assert twice.totals["pj_per_token"] == pytest.approx(expected.totals["pj_per_token"], rel=1e-12)
    assert twice.totals["ac"] == 2 * expected.totals["ac"]
    assert twice.ratios["all_ops"] == pytest.approx(expected.ratios["all_ops"], rel=1e-12)


def test_a_missing_mask_and_an_empty_text(model_of, batch_of):
    model, batch = model_of("spikelm_tiny"), batch_of(6, 6)
    same(estimate(model, {"input_ids": batch["input_ids"]}), estimate(model, batch))
    empty = {key: torch.cat([value, torch.zeros_like(value[:1])]) for key, value in batch.items()}
    assert estimate(model, empty).texts == 2


def test_embeddings_and_labels_in_the_batch(model_of, batch_of):
    model, batch = model_of("spikelm_tiny"), batch_of(6)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"], "labels": torch.zeros(1).long()}
    assert estimate(model, given).totals["ac"] == estimate(model, batch).totals["ac"]


def test_twice_the_steps_are_twice_the_accumulates(batch_of):
    found = {}
    for time_steps in (4, 8):
        torch.manual_seed(0)
        model = build("spikelm_tiny", membrane_beta=0.0, time_steps=time_steps)  # every step is the first again
        found[time_steps] = estimate(model, batch_of(9))
    assert found[4].totals["ac"] > 0
    assert found[8].totals["ac"] == 2 * found[4].totals["ac"]
    assert found[8].totals["mac"] == found[4].totals["mac"]  # the head
    assert found[8].energy_pj["all_ops"]["dense_fp32"] == pytest.approx(found[4].energy_pj["all_ops"]["dense_fp32"])


def test_time_steps_of_the_call_count(model_of, batch_of):
    model = model_of("spikingbert_tiny")
    short, long = (estimate(model, batch_of(9) | {"time_steps": steps}) for steps in (2, 16))
    assert (short.time_steps, long.time_steps) == (2, 16)
    assert long.totals["ac"] > 4 * short.totals["ac"]


def test_a_silent_network_adds_nothing_and_still_costs(batch_of):
    torch.manual_seed(0)
    found = estimate(build("spikingbert_tiny", v_threshold=1e9), batch_of(9))
    driven = [layer for layer in found.layers if layer["role"] == "matmul" and layer["mac"] == 0]
    assert driven
    assert all(layer["ac"] == 0 for layer in driven)
    assert (found.totals["ac"], found.spike_driven_fraction, found.norm_ops) == (0, 0, 0)
    for role in ("neuron", "norm", "softmax", "bias"):
        assert sum(layer["pj"] for layer in found.layers if layer["role"] == role) > 0, role
    encoder = estimate(build("spikingbert_tiny", task="encoder", v_threshold=1e9), batch_of(9))
    assert encoder.ratios["matmul_only"]["dense_fp32"] is None  # divided by nothing
    json.loads(encoder.to_json())


def test_dense_baseline_is_the_network_without_spikes(report, model_of):
    c = model_of("spikelm_tiny").config
    D, F, L = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    macs = sum(n * L * (4 * D * D + 2 * D * F) + 2 * L * n * n * D + D * D + D * c.num_labels for n in (9, 5))
    found = report.energy_pj["matmul_only"]
    assert found["dense_fp32"] == pytest.approx(4.6 * macs, rel=1e-12)
    assert found["dense_int8"] == pytest.approx(0.3 * macs, rel=1e-12)
    assert found["qnn"] == pytest.approx((0.2 * 3 / 8 + 0.1) * macs, rel=1e-12)  # T = 4: three bits
    assert found["spiking"] == pytest.approx(0.9 * report.totals["ac"] + 4.6 * report.totals["mac"], rel=1e-12)


def test_norm_ops_is_spikes_per_neuron_weighted_by_operations(report, model_of):
    weights = {name: m.weight.numel() for name, m in model_of("spikelm_tiny").named_modules() if "layers" in name
               and isinstance(m, nn.Linear)}  # fmt: skip
    rates = {layer["name"]: layer["ifr"] for layer in report.layers if layer["name"] in weights and layer["nnz"]}
    assert rates.keys() == weights.keys()
    assert report.norm_ops == pytest.approx(
        sum(rates[name] * weights[name] for name in weights) / sum(weights.values()), rel=1e-12
    )
    assert report.norm_ops_ratio == pytest.approx(5.1 / report.norm_ops)


def test_norm_ops_of_a_residual_counts_every_spike_in_it(model_of, batch_of):
    report = estimate(model_of("spikebert_tiny"), batch_of(9))
    linear = [layer for layer in report.layers if layer["kind"] in ("binary x real", "integer x real")]
    assert any(layer["ac"] > layer["nnz"] * 64 for layer in linear if layer["kind"] == "integer x real")
    c = model_of("spikebert_tiny").config
    D, F, L = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    assert report.norm_ops == pytest.approx(sum(layer["ac"] for layer in linear) / (9 * L * (4 * D * D + 2 * D * F)))


def test_memory_models(model_of, batch_of):
    model, batch = model_of("spikelm_tiny"), batch_of(9)
    found = {name: estimate(model, batch, memory=name) for name in ("none", "sram", "dram")}
    assert found["none"].ratios["with_memory"] == found["none"].ratios["all_ops"]
    totals = {name: r.totals["pj"] for name, r in found.items()}
    assert totals["none"] < totals["sram"]
    weights = 4 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    moved = {}
    for traffic in ("event", "step", "fold", "resident"):
        memory = Memory("mine", weight=1.0, traffic=traffic)  # 1 pJ per byte, nothing else
        dense, spiking = (
            estimate(model, batch, memory=memory).energy_pj[level] for level in ("all_ops", "with_memory")
        )
        moved[traffic] = {side: spiking[side] - dense[side] for side in ("spiking", "dense_fp32")}
    tables = moved["resident"]["dense_fp32"]  # embeddings are read either way
    assert tables == pytest.approx(4 * 3 * 9 * model.config.hidden_size)
    assert moved["fold"]["dense_fp32"] - tables == pytest.approx(weights)
    assert moved["fold"]["spiking"] - moved["resident"]["spiking"] == pytest.approx(weights)
    head = 4 * (model.classifier.weight.numel() + model.spikelm.pooler.dense.weight.numel())
    assert moved["step"]["spiking"] - moved["resident"]["spiking"] == pytest.approx(4 * (weights - head) + head)
    assert moved["event"]["spiking"] > moved["step"]["spiking"] > moved["fold"]["spiking"]


def test_report_has_its_keys(report):
    found = json.loads(report.to_json())
    assert found["statement"] == STATEMENT
    assert found["ratios"].keys() == {"matmul_only", "all_ops", "with_memory"}
    assert found["ratios"]["all_ops"].keys() == {"dense_fp32", "dense_int8", "qnn"}
    assert {"ac", "mac", "other", "bytes", "pj"} <= found["totals"].keys()
    assert {"name", "kind", "nnz", "rate", "ac", "mac", "pj"} <= found["layers"][0].keys()
    assert found["costs"]["name"] == "horowitz45"
    assert found["costs"]["sha256"] == COST_TABLES["horowitz45"].sha256
    assert found["coverage"]["unpriced"] == []
    assert 0.9 < found["spike_driven_fraction"] < 1
    assert found["totals"]["pj"] == pytest.approx(sum(layer["pj"] for layer in found["layers"]))
    for level, ratios in found["ratios"].items():
        for name, ratio in ratios.items():
            low, high = found["bounds"]["ratios"][level][name]
            assert low <= ratio <= high
            assert low < high
    assert 0 < found["break_even_rate"] < 1


def test_report_as_markdown(report):
    text = report.to_markdown()
    assert STATEMENT in text
    assert f"{100 * report.spike_driven_fraction:.2f} %" in text
    assert all(name in text for name in ("dense_fp32", "dense_int8", "qnn", report.costs["sha256"][:12]))


def test_the_model_is_left_as_it_was(model_of, batch_of):
    model, batch = model_of("spikelm_tiny").train(), batch_of(9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.classifier.eval()
    estimate(model, batch)
    assert model.training
    assert model.spikelm.training
    assert not model.classifier.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"costs": "horowitz"}, "unknown cost table 'horowitz'"),
        ({"memory": "sramm"}, "unknown memory model 'sramm'.*did you mean 'sram'"),
        ({"memory": Memory("mine", weight=-1.0)}, "at least 0 pJ"),
        ({"baselines": ("dense_fp64",)}, "unknown baseline 'dense_fp64'"),
    ],
)
def test_bad_options(options, expected, model_of, batch_of):
    with pytest.raises(EnergyError, match=expected):
        estimate(model_of("spikelm_tiny"), batch_of(5), **options)


def test_bad_batches(model_of, batch_of):
    model, batch = model_of("spikelm_tiny"), batch_of(5)
    with pytest.raises(EnergyError, match="only padding"):
        estimate(model, batch | {"attention_mask": torch.zeros(1, 5)})
    with pytest.raises(EnergyError, match="input_ids or inputs_embeds, got attention_mask"):
        estimate(model, {"attention_mask": batch["attention_mask"]})


def test_counting_is_at_most_eight_times_a_forward(model_of, batch_of):
    def fastest(run):
        times = []
        for _ in range(5):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return min(times)

    model, batch = model_of("spikelm_tiny", hidden_size=128, intermediate_size=512), batch_of(64)
    with torch.no_grad():
        plain = fastest(lambda: model(**batch))
    assert fastest(lambda: count(model, batch)) < 8 * plain


VARIANTS = [
    ("spikelm_tiny", {"reset": "reference", "alpha_mode": "learned"}),
    ("spikingbert_tiny", {"attention": "linear"}),
    ("spikingbert_tiny", {"feedback": True, "leak": 0.9, "v_init": 0.5}),
]


@pytest.mark.parametrize("task", ["encoder", "masked-lm", "sequence-classification"])
@every_family
def test_every_head_is_priced(entry, task, batch_of):
    wanted = {"output_attentions": True} if entry == "spikelm_tiny" else {}  # attention written out, not fused
    report = estimate(build(entry, task=task), batch_of(9) | wanted)
    assert 0.3 < report.spike_driven_fraction <= 1
    assert (report.totals["mac"] == 0) == (task == "encoder" and entry == "spikingbert_tiny")


@pytest.mark.parametrize(("entry", "options"), VARIANTS)
def test_every_variant_is_priced(entry, options, batch_of):
    torch.manual_seed(0)
    assert estimate(build(entry, **options), batch_of(9)).spike_driven_fraction > 0.9


def test_int8_tables_are_read_as_bytes(model_of, batch_of):
    model = model_of("spikelm_tiny_158")
    before = estimate(model, batch_of(9)).totals["bytes"]
    assert before > estimate(pack(model, int8_embeddings=True), batch_of(9)).totals["bytes"]


@pytest.mark.parametrize(("bits", "stored"), [(1.58, 2), (1, 1)])
def test_low_bit_weights_break_even_later(bits, stored, model_of, batch_of):
    """An event adds an integer in place of a float, and reads as many bits as a weight has."""
    plain, low = (
        estimate(model_of("spikelm_tiny", weight_bits=n, time_steps=16), batch_of(9), memory="sram").break_even_rate
        for n in (32, bits)
    )
    assert low == pytest.approx(min(1, plain * (0.9 + 5.0) / (0.1 + 5.0 * stored / 32)))
    assert 0 < plain < low


@pytest.mark.parametrize("entry", ["spikelm_tiny", "spikingbert_tiny_1bit", "spikegpt_tiny"])
def test_floats_are_of_one_width_whatever_a_model_is_loaded_in(entry, batch_of):
    torch.manual_seed(0)
    model, batch = build(entry), batch_of(9)
    plain = estimate(model, batch)
    for dtype in (torch.bfloat16, torch.float64):
        other = estimate(model.to(dtype), batch)
        assert other.totals["bytes"] == pytest.approx(plain.totals["bytes"], rel=0.01)  # some spikes differ
        assert other.ratios["with_memory"]["dense_fp32"] == pytest.approx(
            plain.ratios["with_memory"]["dense_fp32"], rel=0.01
        )


@pytest.mark.parametrize("entry", ["spikelm_tiny", "spikelm_tiny_158", "spikingbert_tiny_1bit"])
def test_half_precision(entry, model_of, batch_of):
    assert estimate(model_of(entry).bfloat16(), batch_of(9)).spike_driven_fraction > 0.9


def test_arguments_that_all_texts_share_are_cut_to_their_tokens(model_of, batch_of):
    model, batch = model_of("spikelm_tiny"), batch_of(7, 12)
    positions = torch.arange(12).unsqueeze(0)
    assert estimate(model, batch | {"position_ids": positions}).totals == estimate(model, batch).totals


def test_a_place_of_a_table_of_ones_own(model_of, batch_of):
    known = COST_TABLES["horowitz45"]
    table = dataclasses.replace(known, name="mine", places=(*known.places, ("hbm", Cost(100.0, 32, "mine"))))
    report = estimate(model_of("spikelm_tiny"), batch_of(7), costs=table, memory=Memory("hbm", weight="hbm"))
    assert report.bounds["tables"] == ["mine"]
    assert report.bounds["pj"] == [report.totals["pj"]] * 2
