"""Conversion in memory: what is replaced, what stays, what is refused, and what memory it takes."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from snlp_zoo import registry
from snlp_zoo.convert import to_spiking
from snlp_zoo.convert.calibration import calibrate
from snlp_zoo.errors import ConversionError
from snlp_zoo.layers import SpikeLinear
from snlp_zoo.models.converted import spike_layers


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 200, "num_key_value_heads": 2, **sizes, **changes})).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 200, (2, 24))


def relative(ours, dense):
    return float((ours - dense).norm() / dense.norm())


def test_it_converts_in_place_and_copies_no_weight():
    model = llama()
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert to_spiking(model) is model
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers
    assert len(spike_layers(model)) == 3 * 7
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize(("k", "low", "high"), [(1, 0.15, 0.45), (3, 0.04, 0.14), (15, 0.008, 0.03)])
def test_the_error_falls_with_k(ids, k, low, high):
    model = llama(hidden_size=256, intermediate_size=512)
    with torch.no_grad():
        dense = model(ids).logits
        assert low < relative(to_spiking(model, threshold_scale=k)(ids).logits, dense) < high


def test_many_spikes_are_the_dense_model(ids):
    model = llama()
    with torch.no_grad():
        dense = model(ids).logits
        assert relative(to_spiking(model, threshold_scale=3000, max_count=10**6)(ids).logits, dense) < 1e-3


def test_any_module_and_a_lone_layer():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.ModuleDict({"head": nn.Linear(16, 4)})["head"])
    to_spiking(model, threshold_scale=1000)
    assert [type(layer) for layer in model] == [SpikeLinear, nn.ReLU, SpikeLinear]
    layer = nn.Linear(8, 4)
    assert isinstance(to_spiking(layer, salient=0.5, calibration=[torch.randn(9, 8)]), SpikeLinear)


def test_salient_channels_get_finer_thresholds(ids):
    model = llama()
    dense = copy.deepcopy(model)
    report = calibrate(model, [ids])
    to_spiking(model, salient=0.25, extra_bits=2, calibration=report)
    for name, layer in spike_layers(model).items():
        assert layer.extra_bits.tolist() == (2 * report.layers[name].salient(0.25)).tolist()
        assert int((layer.extra_bits > 0).sum()) == round(0.25 * layer.in_features)
    assert model.config.quantization_config.salient
    with torch.no_grad():
        logits = dense(ids).logits
        assert relative(model(ids).logits, logits) < relative(to_spiking(dense)(ids).logits, logits)


def test_salient_channels_are_saved(tmp_path, ids):
    model = to_spiking(llama(), salient=0.25, calibration=[{"input_ids": ids}])
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(registry.load(tmp_path / "model")(ids).logits, model(ids).logits)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Bare, {}, "Bare has no linear layer; there is nothing to convert"),
        (lambda: to_spiking(llama()), {}, "this LlamaForCausalLM is converted already; start from the dense model"),
        (llama, {"targets": "*.q_prj"}, r"no linear layer fits the target '\*\.q_prj'; did you mean .*q_proj"),
        (
            llama,
            {"targets": ["*.mlp.*", "xyzzy"]},
            "no linear layer fits the target 'xyzzy'; layers are model",
        ),
        (llama, {"threshold_scale": 0}, "threshold_scale must be positive, got 0"),
        (llama, {"threshold_scale": -3.0}, "threshold_scale must be positive, got -3.0"),
        (llama, {"threshold_scale": float("nan")}, "threshold_scale must be positive, got nan"),
        (llama, {"threshold_scale": "three"}, "to_spiking: .*'str'"),
        (llama, {"max_count": 0}, "max_count must be at least 1 and whole, or None for no limit, got 0"),
        (llama, {"code": "bitwize"}, "unknown spike code 'bitwize'"),
        (llama, {"code": "gif", "levels": 1}, "levels must be at least 2, got 1"),
        (llama, {"mode": "both"}, "unknown mode 'both'"),
        (llama, {"weight_bits": 3}, "bits, got 3"),
        (llama, {"salient": 0.1}, "salient channels are found on texts; give calibration=batches"),
        (llama, {"salient": 10, "calibration": []}, "salient is a share of channels between 0 and 1, got 10"),
        (llama, {"salient": 0.1, "extra_bits": 0, "calibration": []}, "extra_bits must be between 1 and 8, got 0"),
        (llama, {"salient": 0.1, "calibration": []}, "no layer has seen a token"),
    ],
)
def test_what_is_refused_changes_nothing(make, options, message):
    model = make()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ConversionError, match=message) as error:
        to_spiking(model, **options)
    assert "\n" not in str(error.value)
    assert [type(module) for module in model.modules()] == before


PEAK = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
import snlp_zoo
from snlp_zoo.convert import to_spiking
memory = lambda what: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(what))
sizes = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12, vocab_size=8000)
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(**sizes))
small = LlamaForCausalLM(LlamaConfig(**sizes | dict(hidden_size=24, intermediate_size=24, num_hidden_layers=1)))
to_spiking(small, weight_bits=float(sys.argv[2])).save_pretrained(sys.argv[1] + "/small")  # libraries are there now
start = memory("VmRSS")
model = model.to_empty(device="cpu")
for parameter in model.parameters():
    torch.nn.init.ones_(parameter)
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
to_spiking(model, weight_bits=float(sys.argv[2])).save_pretrained(sys.argv[1] + "/large")
print((memory("VmHWM") - start) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("bits", [32, 8])
def test_conversion_takes_at_most_half_the_model_more(tmp_path, bits):
    """Peak memory of conversion and saving, of 63 million parameters, over the model's own 270 MB."""
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(bits)], capture_output=True, text=True, check=True
    )
    assert 0.5 < float(ran.stdout) <= 1.5
