"""SpikeGPT's equations, sizes, start and training; what holds for every model is in test_contract.py."""

import math
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from snlp_zoo import registry
from snlp_zoo.errors import CheckpointError, RecipeError
from snlp_zoo.layers import BitLinear, LIFNode, pack
from snlp_zoo.layers.quant import SignEmbedding
from snlp_zoo.layers.wkv import WKV4
from snlp_zoo.models.modeling_spikegpt import SpikeGPTForCausalLM, SpikeGPTModel

WIRINGS = {"published": {}, "driven": {"wiring": "spike_driven", "v_threshold": 0.25}, "dense": {"spiking": False}}
every_wiring = pytest.mark.parametrize("options", WIRINGS.values(), ids=WIRINGS)


def build(task="causal-lm", **options):
    """In float64, with random values in place of the matrices that start at zero."""
    model = registry.build("spikegpt_tiny", task=task, **options).double()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def on_meta(entry, **changes):
    found = registry.load_entry(entry)
    with torch.device("meta"):
        return SpikeGPTForCausalLM(registry.build_config(found.model_type, found.config | changes))


@pytest.mark.parametrize(("entry", "layers", "size", "words"), [("spikegpt_216m", 18, 768, 50277)])
def test_the_published_size(entry, layers, size, words):
    model = on_meta(entry)
    assert model.num_parameters() == 215_399_424
    assert model.num_parameters() == layers * (13 * size**2 + 11 * size) + 2 * words * size + 4 * size


@pytest.mark.parametrize("options", [{}, {"wiring": "spike_driven"}, {"spiking": False}])
def test_the_size_of_a_block(options):
    """13 C^2 in matrices; 7 C of token mixing and 4 C of norms; neurons have none."""
    model = on_meta("spikegpt_46m", **options)
    for layer in model.spikegpt.layers:
        assert sum(p.numel() for p in layer.parameters()) == 13 * 512**2 + 11 * 512
    assert model.num_parameters() == 47_173_632


# ---- equations, from the specification alone: one token after another, plain tensors, no part of the package ---------
def lif(v, x, threshold):
    h = v + (x - v) / 2
    spike = (h >= threshold).double()
    return spike, (1 - spike) * h


def plain_model(weights, ids, layers, threshold, wiring):
    """Logits [N, V] of one text."""
    w = {name.removeprefix("spikegpt."): tensor for name, tensor in weights.items()}
    size = w["embeddings.weight"].shape[1]
    zeros = lambda: torch.zeros(size, dtype=torch.float64)  # noqa: E731
    memory = [{} for _ in range(layers)]

    def norm(x, name):
        return F.layer_norm(x, (size,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def neuron(x, where, name, wanted):
        if wiring != wanted:
            return x
        spike, where[name] = lif(where.get(name, torch.zeros_like(x)), x, threshold)
        return spike

    logits = []
    for token in ids:
        x = w["embeddings.weight"][token]
        x = norm(x if wiring == "dense" else (x >= 0).double(), "pre_norm")
        for i, kept in enumerate(memory):
            p, n = f"layers.{i}.time_mix.", norm(x, f"layers.{i}.time_norm")
            before, kept["shift"] = kept.get("shift", zeros()), n
            mixed = {}
            for name in ("key", "value", "receptance"):
                mu = w[f"{p}time_mix_{name}"]
                spikes = neuron(mu * n + (1 - mu) * before, kept, f"time {name}", "driven")
                mixed[name] = w[f"{p}{name}.weight"] @ spikes
            top, bottom = kept.get("top", zeros()), kept.get("bottom", zeros())  # sums of exp(key) value and exp(key)
            now = torch.exp(w[f"{p}time_first"] + mixed["key"])
            wkv = (top + now * mixed["value"]) / (bottom + now)
            decay = torch.exp(-torch.exp(w[f"{p}time_decay"]))
            kept["top"] = decay * top + torch.exp(mixed["key"]) * mixed["value"]
            kept["bottom"] = decay * bottom + torch.exp(mixed["key"])
            out = neuron(torch.sigmoid(mixed["receptance"]) * wkv, kept, "time output", "driven")
            x = x + neuron(w[f"{p}output.weight"] @ out, kept, "time", "published")

            p, n = f"layers.{i}.channel_mix.", norm(x, f"layers.{i}.channel_norm")
            before, kept["channel shift"] = kept.get("channel shift", zeros()), n
            for name in ("key", "receptance"):
                mu = w[f"{p}time_mix_{name}"]
                spikes = neuron(mu * n + (1 - mu) * before, kept, f"channel {name}", "driven")
                mixed[name] = w[f"{p}{name}.weight"] @ spikes
            inner = neuron(mixed["key"].clamp_min(0) ** 2, kept, "channel inner", "driven")
            out = torch.sigmoid(mixed["receptance"]) * (w[f"{p}value.weight"] @ inner)
            x = x + neuron(out, kept, "channel", "published")
        logits.append(w["lm_head.weight"] @ norm(x, "norm"))
    return torch.stack(logits)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_the_equations(wiring):
    model = build(num_hidden_layers=3, **WIRINGS[wiring])
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.2)
    ids = torch.randint(0, 120, (2, 40))
    logits = model(ids).logits
    threshold = model.config.v_threshold
    for row in range(2):
        expected = plain_model(model.state_dict(), ids[row].tolist(), 3, threshold, wiring)
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-9)


def test_a_block_adds_nothing_or_one_for_each_neuron():
    model = build(task="encoder", num_hidden_layers=3)
    seen = []
    for layer in model.layers:
        layer.time_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        layer.channel_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.randint(0, 120, (2, 30)))
    assert len(seen) == 7
    for before, after in pairwise(seen):
        added = (after - before).round(decimals=9)
        assert set(added.unique().tolist()) == {0.0, 1.0}


@every_wiring
def test_what_products_take(options):
    """Spikes in the spike-driven wiring alone, which is what the model then claims."""
    model = build(**options)
    inputs = {}
    for name, module in model.spikegpt.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0].unique()}))
    model(torch.randint(0, 120, (2, 30)))
    spikes = {name for name, values in inputs.items() if set(values.tolist()) == {0.0, 1.0}}
    driven = options.get("wiring") == "spike_driven"
    assert len(inputs) == 2 * 7
    assert spikes == (set(inputs) if driven else set())
    assert model.spike_driven == (("*layers.*",) if driven else ())


def test_a_dense_control_has_no_neurons():
    model = build(spiking=False)
    assert not [module for module in model.modules() if isinstance(module, LIFNode)]
    outputs = model(torch.randint(0, 120, (1, 5)), output_spike_rates=True)
    assert outputs.spike_rates == {}
    assert outputs.firing_rate == 0


def test_embeddings_become_spikes_unless_told_otherwise():
    ids = torch.randint(0, 120, (1, 12))
    entered = {}
    for binary in (True, False):
        torch.manual_seed(1)
        model = build(task="encoder", binary_embedding=binary)
        model.pre_norm.register_forward_pre_hook(lambda _, given, binary=binary: entered.update({binary: given[0]}))
        model(ids)
    assert set(entered[True].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(entered[True], (entered[False] >= 0).double())


# ---- how it starts ---------------------------------------------------------------------------------------------------
def started(layers, size=32, **options):
    return registry.build("spikegpt_tiny", num_hidden_layers=layers, hidden_size=size, **options)


@pytest.mark.parametrize("layers", [1, 3])
def test_start(layers):
    model, size = started(layers), 32
    for number, layer in enumerate(model.spikegpt.layers):
        depth, share = (number / (layers - 1) if layers > 1 else 0), 1 - number / layers
        mix = layer.time_mix
        for h in range(size):
            assert mix.time_decay[h].item() == pytest.approx(-5 + 8 * (h / 31) ** (0.7 + 1.3 * depth), abs=1e-5)
            assert mix.time_first[h].item() == pytest.approx(math.log(0.3) + 0.5 * ((h + 1) % 3 - 1), abs=1e-6)
            assert mix.time_mix_key[h].item() == pytest.approx((h / size) ** share, abs=1e-6)
            assert mix.time_mix_value[h].item() == pytest.approx((h / size) ** share + 0.3 * depth, abs=1e-6)
            assert mix.time_mix_receptance[h].item() == pytest.approx((h / size) ** (0.5 * share), abs=1e-6)
            assert layer.channel_mix.time_mix_key[h].item() == pytest.approx((h / size) ** share, abs=1e-6)
        assert torch.equal(layer.channel_mix.time_mix_receptance, layer.channel_mix.time_mix_key)
        zero = (mix.key, mix.receptance, mix.output, layer.channel_mix.value, layer.channel_mix.receptance)
        assert not any(linear.weight.any() for linear in zero)
        orthogonal(mix.value.weight, gain=1)
        orthogonal(layer.channel_mix.key.weight, gain=2)
    orthogonal(model.spikegpt.embeddings.weight, gain=1e-4 * math.sqrt(120))
    orthogonal(model.lm_head.weight, gain=0.5 * math.sqrt(120 / 32))


def test_start_of_what_neurons_feed():
    """In the spike-driven wiring a last matrix of zeros and a neuron that is silent before it would stay so."""
    for layer in started(2, wiring="spike_driven").spikegpt.layers:
        orthogonal(layer.time_mix.output.weight, gain=0.1)
        orthogonal(layer.channel_mix.value.weight.T, gain=0.1)
        zero = (layer.time_mix.key, layer.time_mix.receptance, layer.channel_mix.receptance)
        assert not any(linear.weight.any() for linear in zero)


def orthogonal(weight, gain):
    torch.testing.assert_close(weight.T @ weight, gain**2 * torch.eye(weight.shape[1]), rtol=0, atol=1e-5 * gain**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_file_lacks_starts_as_if_fresh(dtype, tmp_path):
    build().to(dtype).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lacking = [name for name in weights if "time_decay" in name or "1.time_mix.value" in name or "layers.0.ch" in name]
    save_file({k: v for k, v in weights.items() if k not in lacking}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = SpikeGPTForCausalLM.from_pretrained(tmp_path, allow_missing=True, dtype=dtype).state_dict()
    fresh = started(2).to(dtype).state_dict()
    for name in lacking:
        if name.endswith(".weight") and "norm" not in name and fresh[name].any():  # random
            assert loaded[name].float().norm().item() == pytest.approx(fresh[name].float().norm().item(), rel=0.01)
        else:
            assert torch.equal(loaded[name], fresh[name]), name
    assert all(torch.equal(loaded[name], weights[name]) for name in weights if name not in lacking)


# ---- how it learns ---------------------------------------------------------------------------------------------------
def toy(batch=8, length=16):
    """Texts that count up or down from somewhere."""
    start, step = torch.randint(0, 120, (batch, 1)), torch.randint(0, 2, (batch, 1)) * 2 - 1
    return (start + step * torch.arange(length)) % 20


@pytest.mark.parametrize(("wiring", "steps"), [("published", 200), ("driven", 100)])
def test_it_learns_and_neurons_fire(wiring, steps):
    model = registry.build("spikegpt_tiny", **WIRINGS[wiring]).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for step in range(steps):
        ids = toy()
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 2:
            for name, parameter in model.named_parameters():
                assert parameter.grad.isfinite().all(), name
                assert parameter.grad.any(), name
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    with torch.no_grad():
        rates = model.eval()(toy(), output_spike_rates=True)
    assert 0.01 < rates.firing_rate < 0.6
    within = [rate.item() for site, rate in rates.spike_rates.items() if site != "binarise"]
    assert 0.01 < sum(within) / len(within) < 0.6


def test_nothing_fires_before_the_first_step_but_embeddings():
    rates = registry.build("spikegpt_tiny")(toy(), output_spike_rates=True).spike_rates
    assert {site for site, rate in rates.items() if rate > 0} == {"binarise"}


@every_wiring
def test_the_gradient_reaches_back_through_a_cache_that_has_one(options):
    """Two halves with the state passed on give the gradient of the whole; a detached state ends it."""
    model = build(**options, hidden_dropout_prob=0.0).train()
    ids = torch.randint(0, 120, (2, 12))
    grads = {}
    for name in ("whole", "halves", "detached"):
        model.zero_grad()
        if name == "whole":
            logits = model(ids).logits
        else:
            first = model(ids[:, :6], use_cache=True)
            cache = first.past_key_values.detach() if name == "detached" else first.past_key_values
            logits = torch.cat([first.logits, model(ids[:, 6:], past_key_values=cache).logits], 1)
        logits.square().sum().backward()
        grads[name] = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    torch.testing.assert_close(grads["halves"], grads["whole"], rtol=1e-9, atol=1e-9)
    decay = "spikegpt.layers.0.time_mix.time_decay"
    assert not torch.allclose(grads["detached"][decay], grads["whole"][decay])


def test_the_reset_is_a_part_of_the_gradient_unless_detached():
    grads = []
    for detach in (False, True):
        torch.manual_seed(3)
        model = build(detach_reset=detach)
        ids = torch.randint(0, 120, (2, 12))
        model(ids, labels=ids).loss.backward()
        grads.append(model.spikegpt.layers[0].time_mix.output.weight.grad)
    assert not torch.allclose(*grads)
    assert registry.build("spikegpt_tiny").config.detach_reset is False


def test_learned_surrogates():
    model = build(learnable_surrogate=True).train()
    ids = torch.randint(0, 120, (2, 12))
    model(ids, labels=ids).loss.backward()
    learned = {name: p.grad for name, p in model.named_parameters() if name.endswith("surrogate_log_alpha")}
    assert len(learned) == 4
    assert all(grad.any() for grad in learned.values())


# ---- precision, low-bit weights, heads -------------------------------------------------------------------------------
def test_sums_are_float32_under_autocast():
    model = build().float()
    kinds = set()
    for module in model.modules():
        if isinstance(module, WKV4):
            module.register_forward_hook(
                lambda _, inputs, out: kinds.add((inputs[2].dtype, *(x.dtype for x in out[1])))
            )
    with torch.autocast("cpu", torch.bfloat16):
        cache = model(torch.randint(0, 120, (1, 9))).past_key_values
    assert kinds == {(torch.bfloat16, *[torch.float32] * 3)}
    assert {x.dtype for name, x in cache.states[0].items() if "neuron" in name} == {torch.float32}


@pytest.mark.parametrize("bits", [1.58, 1])
def test_low_bit_weights_are_packed_and_generate(bits, tmp_path):
    model = build(weight_bits=bits).float()
    assert sum(isinstance(module, BitLinear) for module in model.modules()) == 2 * 7
    prompt = torch.randint(0, 120, (1, 5))
    expected = model(prompt).logits
    packed = pack(model)
    torch.testing.assert_close(packed(prompt).logits, expected, rtol=0, atol=1e-4)
    packed.save_pretrained(tmp_path)
    loaded = SpikeGPTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=5), packed.generate(prompt, max_new_tokens=5))


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
@pytest.mark.parametrize("size", [32, 28])  # 28: the last byte of a row is not full
def test_packed_embeddings_give_the_same_spikes(task, size, tmp_path):
    model = build(task, weight_bits=1.58, hidden_size=size).float()
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[0, :3] = torch.tensor([0.0, -0.0, -1e-45])  # zero fires, the smallest number below it does not
    ids = torch.arange(120).view(4, 30)
    base = model.base_model
    spikes, others = base.encode(table[ids]), deepcopy(model)
    assert base.binarise(table[:1, :3].unsqueeze(0), from_rest=True).flatten().tolist() == [1, 1, 0]
    pack(others)  # all but the embeddings
    pack(model, int8_embeddings=True)
    assert isinstance(model.get_input_embeddings(), SignEmbedding)
    assert torch.equal(base.encode(base.embeddings(ids)), spikes)
    assert torch.equal(model(ids).logits, others(ids).logits)
    model.save_pretrained(tmp_path)
    loaded = registry.load(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert f"120, {size}" in repr(loaded.get_input_embeddings())
    with pytest.raises(CheckpointError, match="embeddings: the weights to load are packed, the model is unpacked"):
        registry.load(tmp_path, int8_embeddings=False)
    assert loaded.bfloat16().get_input_embeddings()(ids).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="token id 120 is not in the vocabulary of 120"):
        loaded(ids + 1)


def test_what_the_small_entry_takes_when_packed():
    """Bytes of weights, as they travel: what is float has two, but for the scales."""
    state = on_meta("spikegpt_mini_158", packed=True, int8_embeddings=True).state_dict()
    assert 6.9e6 < sum(x.numel() * min(x.itemsize, 2) for x in state.values()) < 7.0e6


@pytest.mark.parametrize("options", [{"binary_embedding": False}, {"spiking": False}, {"tie_word_embeddings": True}])
def test_embeddings_that_are_more_than_their_signs_are_not_packed(options, tmp_path):
    model = build(weight_bits=1, **options).float()
    with pytest.raises(ValueError, match="shares the embedding table, or its neurons need it whole; leave int8_emb"):
        pack(model, int8_embeddings=True)
    with pytest.raises(RecipeError, match="int8_embeddings must be false"):
        registry.build("spikegpt_tiny", weight_bits=1, packed=True, int8_embeddings=True, **options)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_classifier_reads_real_tokens(pooling):
    model = build(task="sequence-classification", classifier_pooling=pooling)
    ids = torch.randint(0, 120, (3, 8))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    states = model.spikegpt(ids, attention_mask=mask).last_hidden_state
    read = {
        "mean": torch.stack([states[0, :4].mean(0), states[1, 3:].mean(0), states[2].mean(0)]),
        "last": torch.stack([states[0, 3], states[1, 7], states[2, 7]]),
    }[pooling]
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, model.classifier(read))


def test_embeddings_are_resized_and_may_be_tied(tmp_path):
    ids = torch.randint(0, 120, (1, 6))
    for tie in (False, True):
        model = build(tie_word_embeddings=tie)
        before = model(ids).logits
        model.resize_token_embeddings(126, mean_resizing=False)
        assert (model.lm_head.weight is model.spikegpt.embeddings.weight) == tie
        after = model(ids).logits
        assert after.shape[-1] == 126
        torch.testing.assert_close(after[..., :120], before)
        model.save_pretrained(tmp_path / str(tie))
        loaded = SpikeGPTForCausalLM.from_pretrained(tmp_path / str(tie))
        assert torch.equal(loaded(ids).logits, after)


def test_rates_of_texts_that_come_in_pieces():
    """Padding on the left, and a state to keep: neurons run several times, and only real tokens count."""
    model = build()
    texts = [torch.randint(0, 120, (1, n)) for n in (7, 4, 1)]
    padded = torch.cat([F.pad(text, (7 - text.shape[1], 0), value=9) for text in texts])
    mask = torch.tensor([[0] * (7 - text.shape[1]) + [1] * text.shape[1] for text in texts])
    together = model(padded, attention_mask=mask, output_spike_rates=True).spike_rates
    alone = [model(text, output_spike_rates=True).spike_rates for text in texts]
    for site, rate in together.items():
        assert rate.shape == (1,)
        expected = sum(rates[site] * text.shape[1] for rates, text in zip(alone, texts, strict=True)) / 12
        torch.testing.assert_close(rate, expected)


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"wiring": "dense"}, "wiring must be one of published, spike_driven, got 'dense'"),
        ({"tau": 1.0}, "tau must be above 1"),
        ({"v_threshold": 0.0}, "v_threshold positive"),
        ({"surrogate": "step"}, "surrogate must be one of"),
        ({"classifier_pooling": "max"}, "classifier_pooling must be one of mean, last"),
        (
            {"weight_bits": 1, "packed": True, "int8_embeddings": True, "binary_embedding": False},
            "int8_embeddings must be false",
        ),
        ({"time_steps": 4}, "no config field 'time_steps'"),
        ({"max_position_embeddings": 4}, "no config field 'max_position_embeddings'"),
    ],
)
def test_configurations_that_make_no_sense(options, expected):
    with pytest.raises(RecipeError, match=expected):
        registry.build("spikegpt_tiny", **options)


def test_width_of_channel_mixing():
    assert registry.build("spikegpt_tiny").config.intermediate_size == 4 * 32
    layer = registry.build("spikegpt_tiny", intermediate_size=48).spikegpt.layers[0]
    assert layer.channel_mix.key.out_features == 48


def test_inputs_that_are_refused():
    model = build(task="encoder")
    with pytest.raises(ValueError, match=r"no tokens to read, the input's shape is \(1, 0\)"):
        model(torch.zeros(1, 0, dtype=torch.long))
    for wrong in (120, -1):
        with pytest.raises(ValueError, match=f"token id {wrong} is not in the vocabulary of 120"):
            model(torch.tensor([[3, wrong]]))
    cache = model(torch.ones(1, 3, dtype=torch.long)).past_key_values
    with pytest.raises(ValueError, match=r"or \[B, read \+ N\] = \(1, 5\), got \(1, 4\)"):
        model(torch.ones(1, 2, dtype=torch.long), attention_mask=torch.ones(1, 4), past_key_values=cache)


def test_the_base_model_loads_from_a_language_model(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    base = SpikeGPTModel.from_pretrained(tmp_path)
    ids = torch.randint(0, 120, (1, 6))
    assert torch.equal(model.lm_head(base(ids).last_hidden_state), model(ids).logits)
