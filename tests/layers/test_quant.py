import copy
import json
import math

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, BertModel

import snlp_zoo
from snlp_zoo.errors import CheckpointError
from snlp_zoo.layers import BitLinear, SpikeLinear, SpikingLinear, make_linear, pack
from snlp_zoo.layers.firing import firing_rates_recorded
from snlp_zoo.layers.quant import Int8Embedding, SignEmbedding
from snlp_zoo.ops import bit_linear as ops
from snlp_zoo.ops.bit_linear import quantise
from snlp_zoo.registry import build

ENTRIES = {1.58: "spikelm_tiny_158", 1: "spikelm_tiny_1bit"}
every_bits = pytest.mark.parametrize("bits", [1.58, 1])
IDS = torch.randint(5, 120, (3, 9), generator=torch.Generator().manual_seed(1))


def make(bits=1.58, **options):
    """A model whose amplitudes have seen a batch, in evaluation mode."""
    torch.manual_seed(0)
    model = build(ENTRIES[bits], **options)
    with torch.no_grad():
        model.train()(IDS)
    return model.eval()


@torch.no_grad()
def result(model, **options):
    outputs = model(IDS, **options)
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


def spiking(bits, **options):
    layer = SpikingLinear(5, 3, bits=bits, time_steps=4, **options)
    layer(torch.randn(4, 2, 6, 5))  # measures the amplitudes
    return layer.eval()


def test_make_linear():
    assert type(make_linear(4, 3)) is nn.Linear
    layer = make_linear(4, 3, bias=False, bits=1.58)
    assert isinstance(layer, BitLinear)
    assert layer.bias is None
    assert not layer.packed
    assert make_linear(4, 3, bits=1, packed=True).weight_packed.shape == (3, 1)


def test_32_bits_are_an_ordinary_layer():
    x, layer = torch.randn(2, 4), BitLinear(4, 3)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@every_bits
def test_forward_uses_quantised_and_trains_latent_weights(bits):
    x, layer = torch.randn(2, 5), BitLinear(5, 3, bits=bits)
    signs, scale = quantise(layer.weight, bits)
    upstream = torch.randn(2, 3)
    (layer(x) * upstream).sum().backward()
    torch.testing.assert_close(layer(x), x @ (scale * signs).mT + layer.bias)
    torch.testing.assert_close(layer.weight.grad, upstream.mT @ x)


@every_bits
def test_evaluation_follows_the_latent_weight(bits):
    layer = BitLinear(5, 3, bits=bits).eval()
    x = torch.randn(2, 5)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))
        layer.load_state_dict(BitLinear(5, 3, bits=bits).state_dict())
        signs, scale = quantise(layer.weight, bits)
        torch.testing.assert_close(layer(x), x @ (scale * signs).mT + layer.bias)


@every_bits
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_gives_the_same(bits, bias):
    x, layer = torch.randn(2, 7, 13), BitLinear(13, 6, bias, bits=bits)
    expected = layer(x)
    layer.eval().pack()
    torch.testing.assert_close(layer(x), expected)
    fresh = BitLinear(13, 6, bias, bits=bits, packed=True).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert f"bits={bits}, packed=True" in repr(layer)


@every_bits
@pytest.mark.parametrize("kind", [BitLinear, SpikeLinear, SpikingLinear])
def test_packed_layers_refuse_another_width_of_as_many_bytes(kind, bits):
    layer = kind(8, 4, bits=bits, packed=True).eval()
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \[\.\.\., 8\], .* got \(4, 1, 2, 7\)"):
        layer(torch.randn(4, 1, 2, 7))


@every_bits
def test_spiking_linear_takes_any_axes_behind_time(bits):
    x, layer = torch.randn(4, 2, 6, 5), spiking(bits)
    for packed in (False, True):
        if packed:
            layer.pack()
        with torch.no_grad():
            assert torch.equal(layer(x.flatten(1, 2)), layer(x).flatten(1, 2))


@every_bits
@pytest.mark.parametrize("integers", [True, False])
def test_spiking_linear_packed_and_not_are_equal_bit_for_bit(bits, integers, monkeypatch):
    if integers and not ops._INTEGERS:
        pytest.skip("needs integer instructions")
    monkeypatch.setattr(ops, "_INTEGERS", integers)
    x, layer = torch.randn(4, 2, 6, 5), spiking(bits)
    with torch.no_grad():
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected)  # with a gradient, spikes keep their amplitude
    layer.pack()
    assert torch.equal(layer(x), expected)
    layer.bfloat16()
    torch.testing.assert_close(layer(x.bfloat16()).float(), expected, rtol=0.05, atol=0.2)


@every_bits
def test_spiking_linear_trains_the_latent_weight(bits):
    layer = spiking(bits).train()
    spikes = []
    layer.neuron.register_forward_hook(lambda module, _, output: spikes.append(output.detach()))
    layer(torch.randn(4, 2, 6, 5)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, spikes[0].sum((0, 1, 2)).expand(3, 5))


@every_bits
def test_who_watches_a_packed_layer_sees_amplitudes(bits):
    layer = spiking(bits)
    layer.pack()
    x, seen = torch.randn(4, 2, 6, 5), []
    expected = layer(x)
    layer.neuron.register_forward_hook(lambda module, _, spikes: seen.append(spikes))
    assert torch.equal(layer(x), expected)
    for spikes, alpha in zip(seen[0], layer.neuron.alpha.tolist(), strict=True):
        assert set(spikes.unique().tolist()) <= {-alpha, 0.0, alpha}
    with firing_rates_recorded(layer, torch.ones(2, 6)) as rates:
        layer(x)
    assert 0 < rates["firing_rate"] < 1


@every_bits
@pytest.mark.parametrize("task", ["sequence-classification", "masked-lm", "encoder"])
def test_packed_models_are_saved_and_loaded(bits, task, tmp_path):
    model = make(bits, task=task)
    expected = result(model)
    assert pack(model) is model
    torch.testing.assert_close(result(model), expected, rtol=0, atol=1e-5)
    assert model.config.packed
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert {kind: list(keys) for kind, keys in report.items() if keys} == {}
    assert torch.equal(result(loaded), result(model))
    assert torch.equal(result(snlp_zoo.load(tmp_path)), result(model))
    assert not any(name.endswith("layers.0.mlp.up.weight") for name in loaded.state_dict())


@every_bits
def test_packed_models_load_sharded_and_through_auto_classes(bits, tmp_path):
    model = pack(make(bits))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert torch.equal(result(AutoModelForSequenceClassification.from_pretrained(tmp_path)), result(model))
    encoder = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(result(encoder), result(model.base_model))
    assert torch.equal(result(copy.deepcopy(model)), result(model))


@every_bits
def test_packed_models_in_bf16(bits, tmp_path):
    model = pack(make(bits))
    wide = result(model)
    model.save_pretrained(tmp_path / "wide")
    model.bfloat16().save_pretrained(tmp_path / "narrow")
    expected = result(model)
    assert expected.dtype == torch.bfloat16
    for folder in ("wide", "narrow"):
        loaded = type(model).from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        layer = loaded.base_model.layers[0].mlp.up
        assert (layer.weight_packed.dtype, layer.weight_scale.dtype) == (torch.uint8, torch.float32)
        assert torch.equal(result(loaded), expected)
    torch.testing.assert_close(expected.float(), wide, rtol=0, atol=0.3)


def test_packed_models_under_autocast_and_compiled():
    model = pack(make(num_hidden_layers=1, time_steps=2))
    try:
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(result(compiled), result(model), rtol=0, atol=1e-5)
    finally:
        torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        assert result(model).isfinite().all()


def test_int8_embeddings(tmp_path):
    model = make()
    expected, table = result(model), model.get_input_embeddings().weight.detach().clone()
    pack(model, int8_embeddings=True)
    got = model.get_input_embeddings()(torch.arange(len(table)))
    assert ((got - table).abs() <= table.abs().amax(1, keepdim=True) / 254 + 1e-7).all()
    assert model.config.int8_embeddings
    torch.testing.assert_close(result(model), expected, rtol=0, atol=0.3)
    model.save_pretrained(tmp_path)
    loaded = snlp_zoo.load(tmp_path)
    assert isinstance(loaded.get_input_embeddings(), Int8Embedding)
    assert torch.equal(result(loaded), result(model))
    with pytest.raises(ValueError, match=f"token id -1 is not in the vocabulary of {len(table)}"):
        loaded(torch.tensor([[3, -1]]))
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.get_input_embeddings()(IDS).dtype == torch.bfloat16
    assert result(half).isfinite().all()


def test_int8_embedding_of_a_zero_row():
    layer = Int8Embedding.from_table(torch.tensor([[0.0, 0.0], [1.0, -0.5]]))
    torch.testing.assert_close(layer(torch.tensor([0, 1])), torch.tensor([[0.0, 0.0], [1.0, -0.5]]), rtol=0, atol=4e-3)
    assert "2, 2" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_embeddings_are_the_nearest_to_the_table(dtype):
    table = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = Int8Embedding.from_table(table)
    steps = (layer.weight_int8 - table.double() / layer.weight_scale.double()).abs()
    assert steps.max() <= 0.52  # half a step, and what the largest of a row loses where its scale was rounded down


def test_embeddings_of_no_ids():
    ids = torch.zeros(2, 0, dtype=torch.long)
    for kind in (Int8Embedding, SignEmbedding):
        assert kind.from_table(torch.randn(3, 4))(ids).shape == (2, 0, 4)


def test_sizes_on_disk(tmp_path):
    sizes = {}
    for bits in (32, 1.58, 1):
        model = build("spikelm_tiny", weight_bits=bits, hidden_size=128, intermediate_size=512, num_hidden_layers=3)
        (model if bits == 32 else pack(model)).save_pretrained(tmp_path / str(bits))
        sizes[bits] = 0
        with safe_open(tmp_path / str(bits) / "model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                if ".layers." in name and (".weight_" in name or (name.endswith(".weight") and "norm" not in name)):
                    sizes[bits] += file.get_tensor(name).nbytes
    assert sizes[32] == 4 * 3 * (4 * 128**2 + 2 * 128 * 512)
    assert sizes[1.58] <= sizes[32] / 14
    assert sizes[1] <= sizes[32] / 28


def test_packing_errors():
    with pytest.raises(ValueError, match=r"has no low-bit layers; build it with weight_bits=1\.58 or 1"):
        pack(build("spikelm_tiny"))
    model = pack(make())
    with pytest.raises(ValueError, match="pack: SpikeLMForSequenceClassification is packed already"):
        pack(model)
    with pytest.raises(ValueError, match="head of SpikeLMForMaskedLM shares the embedding table"):
        pack(make(task="masked-lm"), int8_embeddings=True)
    size = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    dense = BertForMaskedLM(BertConfig(**size))
    dense.added = BitLinear(4, 4, bits=1)
    with pytest.raises(ValueError, match="head of BertForMaskedLM shares the embedding table"):
        pack(dense, int8_embeddings=True)


def test_construction_errors():
    with pytest.raises(ValueError, match=r"weights have 32, 1\.58 or 1 bits, got 2"):
        BitLinear(4, 3, bits=2)
    with pytest.raises(ValueError, match="weights of 32 bits cannot be packed"):
        make_linear(4, 3, packed=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_bits": 2}, r"weight_bits must be 32, 1\.58 or 1, got 2"),
        ({"packed": True}, r"packed needs weight_bits 1\.58 or 1"),
        ({"weight_bits": 1, "int8_embeddings": True}, "int8_embeddings needs packed"),
    ],
)
def test_config_errors(values, message):
    with pytest.raises(ValueError, match=message):
        build("spikelm_tiny", **values)


def test_masked_lm_takes_no_int8_embeddings():
    with pytest.raises(ValueError, match="a masked-language-model head shares the embeddings"):
        build("spikelm_tiny_158", task="masked-lm", packed=True, int8_embeddings=True)


def test_packed_models_refuse_training():
    model = pack(make())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="packed weights cannot be trained"):
        model.train()(IDS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="packed weights have no backward pass"):
        model.eval()(IDS, labels=torch.arange(3) % 2).loss.backward()
    layer = BitLinear(4, 3, bits=1, packed=True)
    with pytest.raises(RuntimeError, match="BitLinear: packed weights cannot be trained"):
        layer(torch.zeros(1, 4))


@pytest.mark.parametrize("packed", [True, False])
def test_packed_and_unpacked_checkpoints_do_not_mix(packed, tmp_path):
    model = make()
    (pack(model) if packed else model).save_pretrained(tmp_path)
    message = f"set packed={packed} in its configuration"
    with pytest.raises(CheckpointError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, packed=not packed)
    with pytest.raises(CheckpointError, match=message):
        snlp_zoo.load(tmp_path, packed=not packed)
    other = build("spikelm_tiny_158", packed=not packed)
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(model.state_dict())


def test_int8_and_float_embeddings_do_not_mix(tmp_path):
    pack(make(), int8_embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        snlp_zoo.load(tmp_path, int8_embeddings=False)


def test_low_bit_students_start_from_dense_teachers():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    teacher = BertModel(BertConfig(vocab_size=50, **sizes))
    student = type(make(task="encoder")).from_teacher(teacher, weight_bits=1.58)
    up = student.layers[0].mlp.up
    assert up.bits == 1.58
    assert torch.equal(up.weight, teacher.encoder.layer[0].intermediate.dense.weight)


@every_bits
def test_scale_survives_conversions(bits):
    layer = spiking(bits)
    layer.pack()
    scale = layer.weight_scale.item()
    for converted in (copy.deepcopy(layer).half(), copy.deepcopy(layer).to(torch.bfloat16), layer.double()):
        assert converted.weight_scale.dtype == torch.float32
        assert math.isclose(converted.weight_scale.item(), scale)
