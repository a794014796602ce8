"""What a calibration measures, against numbers by hand and against conversions that are carried out."""

import copy
import json

import pytest
import torch
from torch import nn

from snlp_zoo import registry
from snlp_zoo.convert import to_spiking
from snlp_zoo.convert.calibration import SCALES, calibrate
from snlp_zoo.errors import ConversionError
from snlp_zoo.layers.spike_statistics import spikes_counted
from snlp_zoo.models.converted import SpikingConversionConfig, spike_layers


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(64, 48)


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(3, 40, 64) * torch.linspace(0.2, 3, 64)


@torch.no_grad()
def test_the_error_is_that_of_the_converted_layer(layer, inputs):
    report = calibrate(nn.Sequential(layer), list(inputs)).layers["0"]
    dense = layer(inputs)
    for k in SCALES:
        spiking = to_spiking(copy.deepcopy(layer), threshold_scale=k)(inputs)
        assert report.errors[k] == pytest.approx(float((spiking - dense).norm() / dense.norm()), rel=1e-4)
    assert report.error == report.errors[3.0]
    assert report.errors[15] * 15 == pytest.approx(report.errors[3] * 3, rel=0.2)  # as 1 / k


def test_counts_are_those_of_the_converted_layer(layer, inputs):
    conversion = SpikingConversionConfig(threshold_scale=2.0, max_count=3, code="ternary")
    report = calibrate(nn.Sequential(layer), inputs.unbind(), conversion).layers["0"]
    model = to_spiking(nn.Sequential(layer), threshold_scale=2.0, max_count=3, code="ternary")
    with spikes_counted(model) as counted:
        model(inputs)
    ours, theirs = report.counts, counted["0"]
    assert (ours.values, ours.spikes, ours.cut, ours.largest) == (
        theirs.values,
        theirs.spikes,
        theirs.cut,
        theirs.largest,
    )
    assert torch.equal(ours.histogram, theirs.histogram)
    assert ours.values == inputs.numel()
    assert ours.largest == 3
    assert ours.cut > 0


def test_saliency_by_hand(layer, inputs):
    report = calibrate(nn.Sequential(layer), [inputs]).layers["0"]
    x, w = inputs.reshape(-1, 64).double(), layer.weight.detach().double()
    assert torch.allclose(report.saliency, (x * (x @ w.mT @ w)).mean(0), rtol=1e-4, atol=1e-5)
    assert float(report.noise.sum()) == pytest.approx(1)
    assert report.salient(0.1).sum() == 6
    assert report.salient(0.001).sum() == 1
    assert report.saliency[report.salient(0.1)].min() >= report.saliency[~report.salient(0.1)].max()


def test_outlier_channels(layer, inputs):
    inputs[..., [5, 17]] = 100.0
    assert calibrate(nn.Sequential(layer), [inputs]).layers["0"].outliers == [5, 17]


@torch.no_grad()
def test_the_estimate_of_a_split_is_near_what_a_split_does(layer, inputs):
    report = calibrate(nn.Sequential(layer), [inputs])
    dense = layer(inputs)
    for share, bits in ((0.1, 1), (0.5, 1), (0.5, 3)):
        split = to_spiking(copy.deepcopy(nn.Sequential(layer)), salient=share, extra_bits=bits, calibration=report)
        measured = float((split(inputs) - dense).norm() / dense.norm())
        assert report.layers["0"].error_split(share, bits) == pytest.approx(measured, rel=0.1)


def test_the_suggested_k_does_it(layer, inputs):
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(48, 48))
    report = calibrate(model, [inputs])
    for target in (0.05, 0.005):  # measured, and beyond what was
        found = report.suggestion(target)
        assert found["layers_above"] == 2
        again = calibrate(model, [inputs], SpikingConversionConfig(threshold_scale=found["threshold_scale"]))
        assert again.suggestion(target)["layers_above"] == 0
        assert f"threshold_scale {found['threshold_scale']:g} brings" in report.advice(target)
    assert report.suggestion(0.9)["layers_above"] == 0
    assert "All 2 layers are within 90%" in report.advice(0.9)


def test_no_k_helps_where_counts_are_cut_off(layer, inputs):
    report = calibrate(nn.Sequential(layer), [inputs], SpikingConversionConfig(max_count=1))
    assert report.suggestion()["threshold_scale"] is None
    assert "raise it" in report.advice()


def test_a_model_is_left_as_it_was():
    model = registry.build("spiking_llama_tiny").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(5, 120, (2, 12))
    report = calibrate(model, [{"input_ids": row[None]} for row in ids])
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert report.layers.keys() == spike_layers(model).keys()
    assert report.tokens == 24
    errors = [layer.error for layer in report.worst(5).values()]
    assert len(errors) == 5
    assert errors == sorted(errors, reverse=True)
    assert json.loads(json.dumps(report.to_dict()))["layers"].keys() == report.layers.keys()


def test_bfloat16_is_measured_in_float32(layer, inputs):
    exact = calibrate(nn.Sequential(layer), [inputs]).layers["0"]
    rough = calibrate(nn.Sequential(layer).bfloat16(), [inputs.bfloat16()]).layers["0"]
    assert rough.error == pytest.approx(exact.error, rel=0.05)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (nn.LayerNorm(4), ([torch.zeros(1, 4)],), "has no linear layer"),
        (nn.Sequential(nn.Linear(4, 4)), ({"input": torch.zeros(1, 4)},), r"got a mapping; give \[batch\] for one"),
        (nn.Sequential(nn.Linear(4, 4)), ([],), "no layer has seen a token; give at least one batch"),
        (
            nn.Sequential(nn.Linear(4, 4)),
            ([], SpikingConversionConfig(targets="fc")),
            "no linear layer fits the target 'fc'",
        ),
        (
            to_spiking(nn.Sequential(nn.Linear(4, 4))),
            ([], SpikingConversionConfig()),
            "converted already; leave conversion out",
        ),
    ],
)
def test_what_cannot_be_calibrated(model, arguments, message):
    with pytest.raises(ConversionError, match=message):
        calibrate(model, *arguments)
