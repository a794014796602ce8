"""Conversion where transformers' families, or torch's own layers, do something of their own with linear layers."""

import pytest
import torch
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import snlp_zoo
from snlp_zoo.convert import to_spiking
from snlp_zoo.convert.calibration import calibrate
from snlp_zoo.convert.equalise import equalise
from snlp_zoo.errors import ConversionError
from snlp_zoo.layers import SpikeLinear
from snlp_zoo.layers.spike_statistics import spikes_counted
from snlp_zoo.models.converted import parameter_count, spike_layers

SIZES = {"vocab_size": 100, "num_hidden_layers": 2}
WIDE = SIZES | {"hidden_size": 32, "num_attention_heads": 4}
LLAMA = WIDE | {"intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": False}
MAKE = {
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(vocab_size=100, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE, intermediate_size=64)),
    "mamba2": lambda: Mamba2ForCausalLM(
        Mamba2Config(**SIZES, hidden_size=32, num_heads=8, head_dim=8, state_size=8, n_groups=1)
    ),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**WIDE)),
}
IDS = torch.arange(5, 23).view(2, 9)


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**LLAMA | changes)).eval()


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("family", MAKE)
def test_a_saved_model_is_the_same(family, bits, tmp_path):
    model = MAKE[family]().eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    to_spiking(model, weight_bits=bits, max_count=127)
    assert spike_layers(model)
    assert parameter_count(model) == parameters
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(snlp_zoo.load(tmp_path)(IDS)[0], model(IDS)[0])


def test_rwkv_keeps_its_weights():
    with pytest.raises(ConversionError, match=r"scales the weights of some layers .* leave weight_bits at 32"):
        to_spiking(RwkvForCausalLM(RwkvConfig(**SIZES, hidden_size=32, attention_hidden_size=32)), weight_bits=8)


def test_the_fast_path_of_torchs_encoder_is_left():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        dense = model(x)
        spiking = to_spiking(model, threshold_scale=1.0)(x)
        with spikes_counted(model) as found:
            assert torch.equal(model(x), spiking)
    assert len(found) == 4
    assert not torch.allclose(spiking, dense, atol=1e-2)


@pytest.mark.parametrize(
    ("targets", "number"),
    [(["all"], 15), (["all-but-head", "lm_head"], 15), (["*.q_proj", "*.v_proj"], 4), ("all-but-head", 14)],
)
def test_targets_add_up(targets, number):
    assert len(spike_layers(to_spiking(llama(), targets=targets))) == number


def test_no_targets():
    with pytest.raises(ConversionError, match="targets are empty"):
        to_spiking(llama(), targets=[])


def test_a_lone_conv1d():
    dense, x = Conv1D(4, 8), torch.randn(3, 8)
    spiking = to_spiking(Conv1D(4, 8), threshold_scale=1e3)
    assert isinstance(spiking, SpikeLinear)
    spiking.load_state_dict(dense.state_dict())
    torch.testing.assert_close(spiking(x), dense(x), rtol=0, atol=1e-3)


def test_spikes_have_scores_but_no_gradient():
    model = to_spiking(llama(), mode="spikes")
    loss = model(IDS, labels=IDS).loss
    assert loss.isfinite()
    with pytest.raises(RuntimeError, match="mode 'spikes' has no gradient"):
        loss.backward()


def test_a_calibration_of_another_model():
    report = calibrate(llama(hidden_size=16), [{"input_ids": IDS}])
    with pytest.raises(ConversionError, match="calibration is of another model"):
        to_spiking(llama(), salient=0.1, calibration=report)


def test_equalise_is_for_dense_models():
    with pytest.raises(ConversionError, match="converted already; equalise the dense model"):
        equalise(to_spiking(llama()), {"input_ids": IDS})
    assert equalise(llama().bfloat16(), {"input_ids": IDS}) == 8


def test_an_encoder_and_a_decoder_are_not_told_apart_by_one_mask():
    sizes = {"vocab_size": 100, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    model = to_spiking(T5ForConditionalGeneration(T5Config(**sizes)).eval())
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]])
    with spikes_counted(model) as found, torch.no_grad():
        model(input_ids=IDS[:1, :6], attention_mask=mask, decoder_input_ids=IDS[:1, :6])
    assert found["decoder.block.0.layer.0.SelfAttention.q"].values == 6 * 32
