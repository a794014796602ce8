"""Converted models: one layer's spikes by hand in every code, and what transformers' forwards take around them."""

import json
import math
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from snlp_zoo.convert.spiking import to_spiking
from snlp_zoo.energy import COST_TABLES, estimate, verify_spikes
from snlp_zoo.energy.counting import counting
from snlp_zoo.energy.record import record
from snlp_zoo.energy.report import count
from snlp_zoo.errors import EnergyError
from snlp_zoo.layers import pack
from snlp_zoo.layers.count_codes import CODES
from snlp_zoo.layers.spike_linear import SpikeLinear
from snlp_zoo.layers.spike_statistics import spikes_counted

TABLE = COST_TABLES["horowitz45"]
X = torch.tensor([[[0.1, -0.5, 2.0, -0.05]]])  # V = 0.2208: counts 0, -2, 9, 0
C, M, NONZERO = 4, 3, 2
N, D, F, L, V, H, KV = 9, 32, 48, 2, 100, 4, 2
IDS = torch.randint(5, V, (1, N), generator=torch.Generator().manual_seed(1))


class Toy(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer.eval()

    def forward(self, inputs_embeds, attention_mask):
        return self.layer(inputs_embeds)


def rows_of(layer):
    """role -> row of the layer on `X`, and the whole report."""
    counter, *_ = count(Toy(layer), {"inputs_embeds": X})
    assert counter.problems == {}
    return {row.role: row for row in counter.rows.values()}, estimate(Toy(layer), {"inputs_embeds": X})


def nonzero(counts):
    return {primitive: number for primitive, number in counts.items() if number}


# T; spikes of -2 and 9 together; these with their sizes; bits of a spike, and of a slot of the bitmap; additions per
# output that make a spike count what it counts
BY_HAND = {
    "unary": (18, 11, 11, 2 + 5 + 0, 1, 0),
    "ternary": (9, 11, 11, 2 + 4 + 1, 2, 0),
    "bitwise": (4, 1 + 2, 3, 2 + 2 + 1, 2, 3),  # 0010, 1001
    "twos_complement": (5, 4 + 2, 6, 2 + 3 + 0, 1, 4),  # 11110, 01001
    "ttfs": (9, 1 + 1, 2, 2 + 4 + 1, 2, 9),
    "multi_level": (2, 1 + 2, 2 + 2 + 1, 2 + 1 + 3, 3, 2),  # 02, 21
    "gif": (3, 1 + 3, 2 + 9, 2 + 2 + 3, 3, 0),  # 2; 3, 3, 3
}


@pytest.mark.parametrize("code", CODES)
def test_every_row_by_hand(code):
    time_steps, spikes, sizes, event, slot, additions = BY_HAND[code]
    rows, report = rows_of(SpikeLinear(C, M, code=code))
    assert sorted(rows) == ["amplitude", "bias", "matmul", "neuron"]
    product, neuron = rows["matmul"], rows["neuron"]
    assert nonzero(product.counts) == {"add": sizes * M}
    assert nonzero(product.alternative) == {"add": NONZERO * M, "mul": NONZERO * M}
    assert (product.ac, product.mac, product.dense, product.outputs) == (sizes * M, 0, C * M, M)
    assert (product.nnz, product.spikes, product.elements, product.steps) == (NONZERO, spikes, C, time_steps)
    assert (product.spike_driven, product.timed) == (True, False)
    # mean |x| and rounding for every input, and the threshold's lower bound
    assert nonzero(neuron.counts) == {"add": 2 * C + 1, "mul": C + 1, "div": 1, "iadd": 2 * time_steps * C}
    assert nonzero(rows["amplitude"].counts) == nonzero({"mul": M, "add": additions * M})
    assert nonzero(rows["bias"].counts) == {"add": M}
    trains = min(spikes * event, C * time_steps * slot) / 8  # bytes
    layers = {row["role"]: row for row in report.layers}
    assert layers["neuron"]["bytes"] == trains + 2 * 4 * time_steps * (C + M)
    assert layers["matmul"]["bytes"] == trains + 4 * sizes * M + 4 * M
    assert (layers["matmul"]["rate"], layers["matmul"]["ifr"]) == (NONZERO / C, spikes / C)
    assert report.time_steps == time_steps
    assert report.codes["spikes_per_activation"] == spikes / C
    assert (report.codes["zero_share"], report.codes["largest_count"]) == (0.5, 9)
    assert report.norm_ops == pytest.approx(sizes / C)


@pytest.mark.parametrize("code", ["gif", "multi_level"])
def test_a_large_spike_breaks_even_earlier(code):
    """At the break-even rate spikes of this mean size take as many pJ as one multiplication for every input."""
    _, spikes, sizes, *_ = BY_HAND[code]
    layer = Toy(SpikeLinear(C, M, code=code))
    report = estimate(layer, {"inputs_embeds": X}, memory="none")
    even = report.time_steps * report.break_even_rate
    assert even == pytest.approx(min(report.time_steps, TABLE.mac / (0.9 * sizes / spikes)))


def test_baselines_are_the_product_of_real_numbers_once():
    every = [rows_of(SpikeLinear(C, M, code=code))[1].energy_pj for code in CODES]
    for level in ("matmul_only", "all_ops", "with_memory"):
        assert len({(found[level]["dense_fp32"], found[level]["qnn"]) for found in every}) == 1
    products = every[0]["matmul_only"]
    assert products["dense_fp32"] == pytest.approx(C * M * TABLE.mac)
    assert products["dense_int8"] == pytest.approx(C * M * TABLE.integer_mac())
    assert products["qnn"] == pytest.approx(C * M * TABLE.integer_mac(5))  # -9 to 9 are 19 numbers
    assert every[0]["all_ops"]["dense_fp32"] == pytest.approx(C * M * TABLE.mac + M * 0.9)
    memory = 1.25 * 4 * (C * M + C + M)
    assert every[0]["with_memory"]["dense_fp32"] == pytest.approx(C * M * TABLE.mac + M * 0.9 + memory)


def test_the_cheaper_of_additions_and_multiplications():
    many, few = (rows_of(SpikeLinear(C, M, code=code))[1].energy_pj["matmul_only"] for code in ("unary", "bitwise"))
    assert many["spiking"] == pytest.approx(NONZERO * M * TABLE.mac)  # of 11 additions
    assert few["spiking"] == pytest.approx(3 * M * 0.9)


def test_int8_weights_are_added_as_integers():
    rows, report = rows_of(SpikeLinear(C, M, bits=8))
    product = rows["matmul"]
    assert (product.kind, product.weight_bits) == ("ternary x int8", 8)
    assert nonzero(product.counts) == {"iadd": 3 * M}
    assert nonzero(product.alternative) == {"iadd": NONZERO * M, "imul8": NONZERO * M * 5 / 8}
    assert nonzero(rows["amplitude"].counts) == {"mul": M, "iadd": 3 * M}
    assert nonzero(rows["scale"].counts) == {"mul": M}
    assert report.energy_pj["matmul_only"]["spiking"] == pytest.approx(3 * M * 0.1)


@pytest.mark.parametrize("packed", [False, True])
def test_weights_of_low_bits_that_are_zero_take_nothing(packed):
    toy = Toy(SpikeLinear(C, M, bits=1.58))
    with torch.no_grad():
        toy.layer.weight.copy_(torch.tensor([[1.0, 0, 1, 0], [1, 1, 1, 1], [0, -1, 1, 1]]))
    if packed:
        pack(toy)
    rows, _ = rows_of(toy.layer)
    # -2 is one spike and reaches two outputs, 9 are two and reach three
    assert nonzero(rows["matmul"].counts) == {"iadd": 1 * 2 + 2 * 3}
    assert rows["matmul"].alternative["iadd"] == 2 + 3
    assert (rows["matmul"].kind, rows["matmul"].weight_bits) == ("ternary x lowbit", 1.58)
    assert nonzero(rows["scale"].counts) == {"mul": M}


def test_zero_points_limits_and_salient_channels():
    rows, report = rows_of(SpikeLinear(C, M, symmetric=False))  # counts 3, 1, 12, 3 from -3 on
    assert (rows["matmul"].kind, rows["matmul"].spikes, report.codes["largest_count"]) == ("binary x real", 7, 12)
    assert nonzero(rows["neuron"].counts) == {"add": 4 * C + 1, "mul": C + 1, "div": 1, "iadd": 2 * 4 * C}
    assert nonzero(rows["amplitude"].counts) == {"mul": 2 * M, "add": 3 * M + M}
    rows, report = rows_of(SpikeLinear(C, M, max_count=5))  # 9 is cut to 5 = 101
    assert (rows["matmul"].spikes, report.time_steps) == (3, 3)
    assert rows["neuron"].counts["add"] == 3 * C + 1
    layer = SpikeLinear(C, M)
    layer.mark_salient(torch.tensor([False, False, True, False]))
    rows, report = rows_of(layer)  # 18 = 10010
    assert (rows["matmul"].spikes, report.time_steps, report.codes["largest_count"]) == (3, 5, 18)


def test_spikes_that_do_not_say_the_counts_are_found():
    class Hasty(SpikeLinear):
        def time_steps(self, counts):
            return 3  # too few for 9

    found = verify_spikes(Toy(Hasty(C, M, code="ternary")), {"inputs_embeds": X})
    assert found.failures == {"layer": "1 of 4 counts are not what their 3 steps of spikes say"}
    with pytest.raises(EnergyError, match="1 of 4 counts are not what their 3 steps"):
        estimate(Toy(Hasty(C, M, code="ternary")), {"inputs_embeds": X})


SMALL = {"hidden_size": D, "num_hidden_layers": L, "vocab_size": V}
ATTENTION = SMALL | {"intermediate_size": F, "num_attention_heads": H}


def llama():
    return LlamaForCausalLM(LlamaConfig(**ATTENTION, num_key_value_heads=KV))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=D, n_inner=F, n_layer=L, n_head=H, vocab_size=V, eos_token_id=0))


def bert():
    return BertModel(BertConfig(**ATTENTION))


def mamba():
    return MambaForCausalLM(MambaConfig(**SMALL, state_size=8, time_step_rank=4, conv_kernel=4, expand=2))


def converted(make, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return to_spiking(make().to(dtype).eval(), **options)


KEYS = D // H * KV
SPIKING = {  # multiplications of the layers that spike, for every token and block
    llama: 2 * D * D + 2 * D * KEYS + 3 * D * F,
    gpt2: 4 * D * D + 2 * D * F,
    bert: 4 * D * D + 2 * D * F,
    mamba: D * 4 * D + 2 * D * D,
}
ONCE = {bert: D * D}  # the pooler takes one token
INNER = 2 * D
REAL = {  # of all others
    llama: L * 2 * N * N * D + N * D * V,
    gpt2: L * 2 * N * N * D + N * D * V,
    bert: L * 2 * N * N * D,
    # x_proj, dt_proj, C times the states; the convolution makes three outputs that are left out
    mamba: L * (N * (INNER * (4 + 16) + 4 * INNER + INNER * 8) + INNER * (N + 3) * 4) + N * D * V,
}


@pytest.mark.parametrize("make", SPIKING, ids=lambda make: make.__name__)
def test_products_of_a_whole_model(make):
    model = converted(make)
    with spikes_counted(model) as spikes:
        model(IDS)
    report, checked = estimate(model, {"input_ids": IDS}), verify_spikes(model, {"input_ids": IDS})
    expected = sum(spikes[name].spikes * model.get_submodule(name).out_features for name in spikes)
    assert (report.totals["ac"], report.totals["mac"]) == (expected, REAL[make])
    spiking = N * L * SPIKING[make] + ONCE.get(make, 0)
    dense = (spiking + REAL[make]) * TABLE.mac
    assert report.energy_pj["matmul_only"]["dense_fp32"] == pytest.approx(dense, rel=1e-12)
    assert checked.ok
    assert {row.layer for row in checked.products if row.spike_driven} == spikes.keys()
    assert report.spike_driven_fraction == checked.spike_driven_fraction == expected / (expected + REAL[make])
    every = sum(spikes.values(), start=type(next(iter(spikes.values())))())
    assert report.codes["spikes_per_activation"] == pytest.approx(every.spikes_per_value, rel=1e-12)
    assert report.codes["zero_share"] == pytest.approx(every.zero_share, rel=1e-12)
    assert report.norm_ops == pytest.approx(expected / spiking)


@pytest.mark.parametrize("make", SPIKING, ids=lambda make: make.__name__)
def test_the_rest_costs_what_the_dense_model_takes(make):
    """The baseline is the model before conversion, operation by operation; what is counted is its whole forward."""
    torch.manual_seed(0)
    model = make().eval()
    if make is not mamba:
        model.set_attn_implementation("eager")
    with counting(model) as counter:
        model(IDS, attention_mask=torch.ones_like(IDS), use_cache=False)
    expected = sum(TABLE.pj(row.counts) for row in counter.rows.values())
    found = estimate(converted(make), {"input_ids": IDS}).energy_pj["all_ops"]["dense_fp32"]
    assert found == pytest.approx(expected, rel=1e-12)


def test_operations_of_a_llama_outside_of_products():
    counter, *_ = count(converted(llama), {"input_ids": IDS})
    found: dict[str, Counter] = {}
    for row in counter.rows.values():
        if row.role not in ("matmul", "neuron", "amplitude"):
            found.setdefault(row.role, Counter()).update(nonzero(row.counts))
    norms, width = 2 * L + 1, D + KEYS  # queries and keys are rotated
    assert found == {
        "gather": {},
        "softmax": dict.fromkeys(("exp", "add", "div"), L * H * N * N),
        # squares in norms; SiLU
        "activation": {"mul": norms * N * D + L * N * F, "exp": L * N * F},
        # the mean and the root, two products; rotation by two; the scale of the scores; the gate
        "other": {
            "add": norms * N * D,
            "mul": norms * N * (1 + 2 * D) + L * (2 * N * width + H * N * N + N * F),
            "div": norms * N,
        },
        # epsilon; rotation; the causal mask; two residuals
        "residual": {"add": norms * N + L * (N * width + H * N * N + 2 * N * D)},
    }


def test_rotations_of_positions_that_are_given_have_a_price():
    positions = torch.arange(3, 3 + N).unsqueeze(0)
    found = []
    for more in ({}, {"position_ids": positions}):
        counter, *_ = count(converted(llama), {"input_ids": IDS} | more)
        assert counter.seen["cos"] == counter.seen["sin"] == 1
        found.append([row for row in counter.rows.values() if row.name == "model.rotary_emb"])
    plain, given = found
    assert plain == []  # a table, made once
    assert next(row for row in given if row.role == "activation").counts["exp"] == 2 * N * D // H


@pytest.mark.parametrize("code", ["bitwise", "gif"])
def test_both_modes_have_one_report(code):
    reports = [
        estimate(converted(llama, torch.float64, code=code, mode=mode), {"input_ids": IDS}).to_dict()
        for mode in ("count", "spikes")
    ]
    assert reports[0] == reports[1]


def test_padding_and_companions_cost_nothing():
    model, other = converted(llama), IDS.flip(1)
    zeros = torch.zeros(1, 4, dtype=torch.long)
    ids = torch.cat([torch.cat([zeros, IDS], 1), torch.cat([other, zeros], 1)])
    mask = torch.cat([torch.cat([zeros, IDS], 1), torch.cat([other, zeros], 1)]).clamp(max=1)
    both = estimate(model, {"input_ids": ids, "attention_mask": mask})
    alone = [estimate(model, {"input_ids": text}) for text in (IDS, other)]
    assert both.tokens == 2 * N
    assert both.totals["pj"] == pytest.approx(sum(report.totals["pj"] for report in alone), rel=1e-12)


def test_layers_left_dense_are_products_of_real_numbers():
    report = estimate(converted(llama, targets=["*.mlp.*"]), {"input_ids": IDS})
    attention = N * L * (2 * D * D + 2 * D * KEYS)
    assert report.totals["mac"] == REAL[llama] + attention
    assert report.spike_driven_fraction < estimate(converted(llama), {"input_ids": IDS}).spike_driven_fraction
    with pytest.raises(EnergyError, match="no spiking neuron that ran"):
        estimate(llama(), {"input_ids": IDS})


def test_the_model_is_left_as_it_was():
    model = converted(llama)
    before = (model.config._attn_implementation, model.config.use_cache)
    assert before == ("sdpa", True)
    estimate(model, {"input_ids": IDS})
    assert (model.config._attn_implementation, model.config.use_cache) == before
    with pytest.raises(IndexError, match="out of range"):
        estimate(model, {"input_ids": IDS + V})
    assert (model.config._attn_implementation, model.config.use_cache) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_reports_read_aloud():
    report = estimate(converted(llama), {"input_ids": IDS})
    text, found = report.to_markdown(), report.codes
    assert f"T = {report.time_steps} at most (code bitwise; the largest count is {found['largest_count']})" in text
    even = report.time_steps * report.break_even_rate
    shown = f"{found['spikes_per_activation']:.2f}, {even:.2f}"
    assert f"| spikes per activation, and where that breaks even | {shown} |" in text
    assert f"| activations without a spike | {100 * found['zero_share']:.1f} % |" in text
    assert json.loads(report.to_json())["codes"] == found
    assert report.time_steps == math.ceil(math.log2(found["largest_count"] + 1))
    with pytest.raises(EnergyError, match="no neuron that keeps a membrane"):
        record(converted(llama), {"input_ids": IDS})
