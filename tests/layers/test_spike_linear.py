import copy
import io
import math
import pickle
import weakref
from unittest import mock

import pytest
import torch
from torch.nn.functional import linear

from snlp_zoo.layers import BitLinear, SpikeLinear, pack, spike_linear
from snlp_zoo.layers.count_codes import CODES

OUT, IN = 7, 24


def made(x_dtype=torch.float64, salient=False, bits=32, **options):
    """A layer in evaluation whose weights are float32 numbers, whatever the dtype."""
    layer = SpikeLinear(IN, OUT, **options).to(x_dtype).eval()
    layer.to_bits(bits)
    if salient:
        layer.mark_salient(torch.arange(IN) % 5 == 0, 2)
    return layer


def inputs(*shape, dtype=torch.float64):
    return torch.randn(*shape, IN, dtype=torch.float64).to(dtype) * torch.logspace(-2, 1, IN).to(dtype)


def test_golden_numbers():
    layer = SpikeLinear(4, 3, threshold_scale=3.0)
    x = torch.tensor([0.1, -0.5, 2.0, -0.05])
    counts, threshold, zero_point = layer.spiked(x)
    assert threshold.item() == pytest.approx(0.2208333, abs=1e-7)
    assert counts.tolist() == [0, -2, 9, 0]
    assert zero_point is None
    torch.testing.assert_close(layer.values(layer.spiked(x), x.dtype), torch.tensor([0, -0.4416667, 1.9875, 0]))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), linear(torch.tensor([0, -0.4416667, 1.9875, 0]), layer.weight, layer.bias))


def test_numbers_of_gaussian_inputs():
    layer, tokens, width = SpikeLinear(4096, 1), 256, 4096
    counts = layer.spiked(torch.randn(tokens, width)).counts.abs()
    four_sigma = 4 * 0.5 / math.sqrt(tokens * width)
    assert (counts <= 7).double().mean().item() == pytest.approx(0.954, abs=0.0005 + four_sigma)
    assert (counts == 0).double().mean().item() == pytest.approx(0.106, abs=0.0005 + four_sigma)
    planes = [spikes.abs() for _, spikes in layer.spike_trains(counts)]
    assert sum(planes).mean().item() == pytest.approx(1.30, abs=0.005 + 2 * four_sigma)
    first_three = 1 - torch.stack(planes[-3:]).mean().item()
    assert first_three == pytest.approx(0.582, abs=0.005)


@pytest.mark.parametrize("max_count", [None, 1, 3, 7, 200])
@pytest.mark.parametrize("salient", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("code", CODES)
def test_counts_and_spikes_are_equal(code, symmetric, salient, max_count):
    x = inputs(3, 5)
    for bits in (32, 8, 1.58, 1):
        layer = made(code=code, symmetric=symmetric, max_count=max_count, salient=salient, bits=bits)
        with torch.no_grad():
            counted = layer(x)
            layer.mode = "spikes"
            assert torch.equal(layer(x), counted)
            if bits in (1.58, 1):
                layer.pack()
                packed = layer(x)
                layer.mode = "count"
                assert torch.equal(packed, layer(x))
                torch.testing.assert_close(packed, counted)


@pytest.mark.parametrize("mode", ["count", "spikes"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_token_knows_no_other(mode, symmetric):
    layer = made(mode=mode, symmetric=symmetric, salient=True)
    x = inputs(4, 6)
    counts, threshold, _ = layer.spiked(x)
    for b, n in ((0, 0), (3, 5), (1, 2)):
        alone = layer.spiked(x[b, n])
        assert torch.equal(alone.counts, counts[b, n])
        assert torch.equal(alone.threshold, threshold[b, n])
    padded = torch.cat([torch.zeros_like(x), 100 * x], 1)
    padded[:, :6] = x
    with torch.no_grad():  # one product of other sizes may sum in another order
        torch.testing.assert_close(layer(padded)[:, :6], layer(x), rtol=1e-13, atol=1e-13)


def test_gradient_goes_straight_through_and_stops_at_the_window():
    layer = SpikeLinear(6, 3, threshold_scale=2.0, max_count=2).double()
    x = torch.tensor([[0.1, -0.4, 0.9, -1.1, 3.0, 0.5]], dtype=torch.float64, requires_grad=True)
    y = layer(x)  # V = 1 / 2, so the window ends at 1
    threshold = x.detach().abs().mean() / 2
    assert threshold == 0.5
    passed = torch.tensor([[0, -1, 2, -2, 2, 1]], dtype=torch.float64) * threshold
    torch.testing.assert_close(y, linear(passed, layer.weight, layer.bias))
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    torch.testing.assert_close(x.grad, (weights @ layer.weight.detach()) * torch.tensor([1, 1, 1, 0, 0, 1]))
    torch.testing.assert_close(layer.weight.grad, weights.T @ passed)
    torch.testing.assert_close(layer.bias.grad, weights[0])


def test_without_a_window_every_input_has_its_gradient():
    layer, x = made(torch.float64), inputs(2).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand_as(x))


@pytest.mark.parametrize("bits", [1.58, 1])
def test_low_bit_layers_compute_and_learn_as_bit_linear_of_the_values(bits):
    layer = made(bits=bits, max_count=3).train()
    other = BitLinear(IN, OUT, bits=bits).double()
    other.load_state_dict(layer.state_dict())
    x = inputs(2, 3)
    y, expected = layer(x), other(layer.values(layer.spiked(x), x.dtype))
    assert torch.equal(y, expected)
    (gradient,) = torch.autograd.grad(y.square().sum(), [layer.weight])
    assert torch.equal(gradient, torch.autograd.grad(expected.square().sum(), [other.weight])[0])


def test_what_cannot_be_trained_says_so():
    with pytest.raises(RuntimeError, match=r"mode 'spikes' has no gradient; train with mode='count'"):
        made(mode="spikes").train()(inputs(1))
    with pytest.raises(RuntimeError, match=r"int8 weights cannot be trained; call \.eval"):
        made(bits=8).train()(inputs(1))
    packed = made(bits=1.58)
    packed.pack()
    with pytest.raises(RuntimeError, match="packed weights cannot be trained"):
        packed.train()(inputs(1))


def test_int8_layers_give_inputs_their_gradient():
    layer, x = made(bits=8), inputs(2).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.matrix(torch.float64).sum(0).expand_as(x))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("extra_bits", [1, 2, 3])
def test_salient_channels_are_finer(extra_bits, symmetric):
    layer = SpikeLinear(4096, 1, symmetric=symmetric).double()
    salient = torch.arange(4096) % 2 == 0
    layer.mark_salient(salient, extra_bits)
    x = torch.randn(8, 4096, dtype=torch.float64)
    spiked = layer.spiked(x)
    error = (layer.values(spiked, x.dtype) - x).abs() / spiked.threshold
    assert error[:, ~salient].max() <= 0.5 + 1e-9
    assert error[:, salient].max() <= 0.5 / 2**extra_bits + 1e-9
    assert error[:, salient].max() > 0.45 / 2**extra_bits


@pytest.mark.parametrize("salient", [False, True])
@pytest.mark.parametrize("max_count", [None, 3])
def test_asymmetric_counts_are_not_negative(max_count, salient):
    layer = made(symmetric=False, max_count=max_count, salient=salient)
    x = torch.cat([inputs(50), inputs(50).abs(), -inputs(50).abs(), torch.zeros(1, IN)])
    counts, threshold, zero_point = layer.spiked(x)
    assert counts.min() == 0
    assert torch.equal(zero_point, zero_point.round())
    if max_count is not None:
        assert counts.max() <= 2 * max_count * (4 if salient else 1)
    inside = x.abs() <= threshold * (max_count or math.inf)
    assert ((layer.values(layer.spiked(x), x.dtype) - x).abs() <= threshold / 2 + 1e-12)[inside].all()


def test_transposed_weights_are_those_of_conv1d():
    straight = made()
    layer = SpikeLinear(IN, OUT, transposed=True).double().eval()
    assert layer.weight.shape == (IN, OUT)
    layer.load_state_dict({"weight": straight.weight.detach().T, "bias": straight.bias.detach()})
    x = inputs(2, 3)
    for mode in ("count", "spikes"):
        layer.mode = straight.mode = mode
        with torch.no_grad():
            torch.testing.assert_close(layer(x), straight(x))
    straight.to_bits(8)
    layer.to_bits(8)
    assert torch.equal(layer.weight_int8, straight.weight_int8)
    assert not layer.transposed


@pytest.mark.parametrize("max_count", [None, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_int8_weights_are_near(dtype, max_count):
    layer = made(max_count=max_count)
    before, x = layer.weight.detach().clone(), inputs(3, 5)
    layer.to_bits(8)
    assert (layer.matrix(torch.float64) - before).abs().max() <= before.abs().amax(1).max() / 254 * 1.001
    with torch.no_grad():
        exact = layer(x)
        bound = (x.abs().sum(-1, keepdim=True) + IN * layer.spiked(x).threshold) @ (before.abs().amax(1) / 250)[None]
        assert ((linear(layer.values(layer.spiked(x), x.dtype), before, layer.bias) - exact).abs() <= bound).all()
        y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert layer.weight_scale.dtype == torch.float32
    assert (y.double() - exact).norm() / exact.norm() < {8: 1e-6, 4: 1e-5}.get(dtype.itemsize, 0.02)


def test_thresholds_are_float32_where_inputs_are_narrow():
    x = torch.randn(64, 576).to(torch.bfloat16)
    layer = SpikeLinear(576, 8)
    counts, threshold, _ = layer.spiked(x)
    true_counts, truth, _ = layer.double().spiked(x.double())
    assert threshold.dtype == torch.float32
    torch.testing.assert_close(threshold.double(), truth, rtol=1e-6, atol=0)
    assert (counts != true_counts).double().mean() < 1e-4  # at halves only
    in_bfloat16 = (x / (x.abs().mean(-1, keepdim=True) / 3)).round()
    assert (in_bfloat16 != true_counts).double().mean() > 1e-2  # what is avoided


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_and_autocast_stay_near_float64(dtype):
    x = inputs(4, 8) / 100
    spikes = {"mode": "spikes"}
    for options in ({}, {"symmetric": False}, {"salient": True}, spikes, spikes | {"symmetric": False}):
        layer = made(**options)
        layer.weight.data *= 40_000  # sums of counts then leave float16, the outputs do not
        with torch.no_grad():
            exact = layer(x)
            assert (exact / layer.spiked(x).threshold).abs().max() > 65_504 > exact.abs().max()
            with torch.autocast("cpu", dtype):
                mixed = copy.deepcopy(layer).float()(x.float())
            narrow = layer.to(dtype)(x.to(dtype))
        for y in (mixed, narrow):
            assert y.dtype == dtype
            assert (y.double() - exact).norm() / exact.norm() < 0.02, options


@pytest.mark.parametrize("bits", [32, 8, 1.58])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_spikes_of_narrow_dtypes_lose_nothing_to_a_zero_point(dtype, bits):
    layer = SpikeLinear(4096, OUT, mode="spikes", symmetric=False)
    layer.weight.data = layer.weight.data.add_(0.02).to(dtype).float()
    layer.to_bits(bits)
    x = torch.randn(4, 4096).to(dtype)
    x[:, 0] = -40  # far below: sums over all channels of its count are large, and cancel
    with torch.no_grad():
        exact = layer.double()(x.double())
        narrow = layer.to(dtype)(x)
        with torch.autocast("cpu", dtype):
            mixed = layer.float()(x.float())
    for y in (narrow, mixed):
        assert (y.double() - exact).norm() / exact.norm() < 0.01


def test_many_spikes_reproduce_the_dense_layer():
    for options in ({"code": "bitwise"}, {"code": "twos_complement"}, {"symmetric": False}):
        layer = made(threshold_scale=2000.0, max_count=10**6, **options)
        x = inputs(4, 5)
        dense = linear(x, layer.weight, layer.bias)
        for mode in ("count", "spikes"):
            layer.mode = mode
            assert (layer(x) - dense).norm() / dense.norm() < 1e-3


@pytest.mark.parametrize("mode", ["count", "spikes"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,), (2, 3, 4)])
def test_any_leading_shape(shape, symmetric, mode):
    layer = made(mode=mode, symmetric=symmetric, salient=not symmetric)
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            assert layer(inputs(*shape)).shape == (*shape, OUT)


def test_a_token_of_zeros_is_the_bias():
    for mode in ("count", "spikes"):
        for symmetric in (True, False):
            layer = made(mode=mode, symmetric=symmetric)
            with torch.no_grad():
                assert torch.equal(layer(torch.zeros(2, IN, dtype=torch.float64)), layer.bias.expand(2, -1))


def test_inputs_that_are_not_finite_stay_visible():
    x = inputs(3)
    x[1, 2] = float("nan")
    for options in ({}, {"max_count": 3}, {"max_count": 3, "mode": "spikes"}, {"max_count": 100, "bits": 8}):
        layer = made(**options)
        with torch.no_grad():
            y = layer(x)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()
    for bad in (float("nan"), float("inf")):
        x[1, 2] = bad
        with pytest.raises(ValueError, match=f"inputs must be finite to be spikes, got {bad}"):
            made(mode="spikes")(x)


def test_copies_pickles_and_casts():
    x = inputs(3, dtype=torch.float32)
    for bits in (32, 8, 1.58, 1):
        layer = made(torch.float32, bits=bits, salient=True)
        if bits in (1.58, 1):
            pack(layer)
        with torch.no_grad():
            y = layer(x)
            for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301  (its own)
                assert torch.equal(other(x), y)
            fresh = SpikeLinear(IN, OUT, bits=bits, packed=bits in (1.58, 1)).eval()
            file = io.BytesIO()
            torch.save(layer.state_dict(), file)
            file.seek(0)
            fresh.load_state_dict(torch.load(file, weights_only=True))
            assert torch.equal(fresh(x), y)
            scale = layer.state_dict().get("weight_scale")
            narrow = layer.half().bfloat16()
            assert narrow.bias.dtype == torch.bfloat16
            if scale is not None:
                assert narrow.weight_scale.dtype == torch.float32
                assert torch.equal(narrow.weight_scale, scale)


def test_storage_of_another_kind_is_refused_when_loading():
    with pytest.raises(RuntimeError, match="weights to load are packed, the model is unpacked"):
        SpikeLinear(IN, OUT, bits=1.58).load_state_dict(SpikeLinear(IN, OUT, bits=1.58, packed=True).state_dict())
    with pytest.raises(RuntimeError, match="weight_int8"):
        SpikeLinear(IN, OUT).load_state_dict(SpikeLinear(IN, OUT, bits=8).state_dict())


@pytest.mark.parametrize("options", [{}, {"max_count": 3}, {"symmetric": False}, {"salient": True}, {"bits": 1.58}])
def test_compiled_layers_are_the_same(options):
    torch.compiler.reset()
    layer, x = made(torch.float32, **options), inputs(4, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    if not options.get("salient"):
        x.requires_grad_()
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x).sum(), [x]), torch.autograd.grad(layer(x).sum(), [x])
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold_scale": 0}, "threshold_scale must be positive, got 0"),
        ({"threshold_scale": float("inf")}, "threshold_scale must be positive, got inf"),
        ({"threshold_scale": float("nan")}, "threshold_scale must be positive, got nan"),
        ({"max_count": 0}, "max_count must be at least 1 and whole, or None for no limit, got 0"),
        ({"max_count": 1.5}, r"max_count must be at least 1 and whole.*1\.5"),
        ({"code": "morse"}, "unknown spike code 'morse'"),
        ({"code": "gif", "levels": 1}, "levels must be at least 2, got 1"),
        ({"mode": "both"}, "unknown mode 'both', known are count, spikes"),
        ({"bits": 4}, r"weights have 32, 8, 1\.58 or 1 bits, got 4"),
        ({"bits": 32, "packed": True}, "weights of 32 bits cannot be packed"),
        ({"bits": 1.58, "transposed": True}, "leave transposed out"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SpikeLinear(IN, OUT, **options)


def test_layers_with_one_input_encode_it_once():
    x = torch.randn(3, 16)
    query, key = SpikeLinear(16, 8), SpikeLinear(16, 4)
    coarse = SpikeLinear(16, 8, threshold_scale=1.0)
    alone = [layer(x.clone()) for layer in (query, key, coarse)]  # with gradients: nothing is kept
    with torch.no_grad(), mock.patch.object(spike_linear, "plain_counts", wraps=spike_linear.plain_counts) as encode:
        together = [layer(x) for layer in (query, key, coarse)]
        assert encode.call_count == 2  # query and key together, and the coarse one
        coarse(x.clone())
        assert encode.call_count == 3
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_an_input_that_was_written_to_is_encoded_again():
    x, layer = torch.randn(3, 16), SpikeLinear(16, 8)
    with torch.no_grad():
        before = layer(x)
        x.mul_(torch.arange(16.0))
        assert torch.equal(layer(x), layer(x.clone()))
    assert not torch.equal(before, layer(x))


def test_nothing_outlives_the_input():
    layer = SpikeLinear(16, 8)
    with torch.no_grad():
        x = torch.randn(3, 16)
        layer(x)
        counts = weakref.ref(spike_linear._last.counts[0])
        del x
    assert counts() is None
    with torch.inference_mode():
        x = torch.randn(3, 16)
        layer(x)
    assert spike_linear._last.counts is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_multiplies_by_what_spikes_are_worth(dtype):
    layer, x = SpikeLinear(64, 8).to(dtype), torch.randn(5, 64).to(dtype)
    spiked = layer.spiked(x)
    with torch.no_grad():
        values = (spiked.counts * spiked.threshold).to(dtype)
        assert torch.equal(layer(x), linear(values, layer.weight, layer.bias))
