import pytest
import torch
from torch import nn

from snlp_zoo.layers import SpikingLinear


@pytest.fixture
def layer():
    layer = SpikingLinear(5, 3, time_steps=4)
    layer(torch.randn(4, 2, 6, 5))  # measures the amplitudes
    return layer.eval()


def test_weights_see_spikes(layer):
    x = torch.randn(4, 2, 6, 5)
    spikes = layer.neuron(x, from_rest=True)
    torch.testing.assert_close(layer(x), nn.functional.linear(spikes, layer.weight, layer.bias))
    for s, alpha in zip(spikes, layer.neuron.alpha, strict=True):
        assert set(s.unique().tolist()) <= {-alpha.item(), 0.0, alpha.item()}


def test_amplitude_folds_into_the_product(layer):
    x = torch.randn(4, 2, 6, 5)
    alpha = layer.neuron.alpha[:, None, None, None]
    counts = (layer.neuron(x, from_rest=True) / alpha).round()
    folded = alpha * nn.functional.linear(counts, layer.weight) + layer.bias
    torch.testing.assert_close(layer(x), folded, rtol=1e-5, atol=1e-6)


def test_dense_weights_load_by_name(layer):
    dense = nn.Linear(5, 3)
    report = layer.load_state_dict(dense.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert all(key.startswith("neuron.") for key in report.missing_keys)
    assert torch.equal(layer.weight, dense.weight)


def test_leaves_no_state(layer):
    x = torch.randn(4, 2, 6, 5)
    assert torch.equal(layer(x), layer(x))
    assert layer.neuron.v == 0.0


def test_mask_reaches_the_neuron():
    layer = SpikingLinear(5, 3, time_steps=4)
    x, mask = torch.randn(4, 2, 6, 5), torch.ones(2, 6)
    mask[:, 3:] = 0
    x[:, :, 3:] = 50.0
    layer(x, mask)
    assert layer.neuron.alpha.max() < 10


def test_without_bias():
    layer = SpikingLinear(5, 3, bias=False, time_steps=2)
    assert layer.bias is None
    assert layer(torch.zeros(2, 1, 1, 5)).tolist() == [[[[0, 0, 0]]]] * 2


@pytest.mark.parametrize("shape", [(2, 6, 5), (3, 2, 6, 5)])
def test_first_axis_must_be_time(layer, shape):
    with pytest.raises(ValueError, match=r"axis 0 is T and must be 4, got shape .*encode with layers.Direct first"):
        layer(torch.zeros(shape))


def test_unknown_neuron_option():
    with pytest.raises(TypeError, match="firing"):
        SpikingLinear(5, 3, firing=2.0)


def test_ternary_neurons_are_refused():
    with pytest.raises(ValueError, match=r"got 'ternary'.* put layers\.TernaryLIFNode in front of a linear layer"):
        SpikingLinear(5, 3, neuron="ternary")


@pytest.mark.parametrize(("bits", "packed"), [(32, False), (1.58, False), (1.58, True)])
@pytest.mark.parametrize("trained", [True, False])
def test_autocast_leaves_float64_as_torch_does(bits, packed, trained):
    layer = SpikingLinear(5, 3, bits=bits, time_steps=4).double()
    x = torch.randn(4, 2, 6, 5, dtype=torch.float64)
    layer(x)  # measures the amplitudes
    layer.eval()
    if packed:
        layer.pack()
    with torch.set_grad_enabled(trained):
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = layer(x)
            dense = nn.functional.linear(x, torch.ones(3, 5, dtype=torch.float64))
    assert got.dtype == dense.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("bits", "packed"), [(32, False), (1.58, False), (1.58, True), (1, True)])
def test_binary_neurons_by_hand(bits, packed):
    layer = SpikingLinear(2, 1, bits=bits, neuron="lif", tau=2.0, v_threshold=1.0).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.5]]))
        layer.bias.fill_(0.25)
    if packed:
        layer.pack()
    x = torch.tensor([1.34, 4.0]).expand(4, 1, 1, 2)  # fires in every second step, and in every step
    mask = torch.ones(1, 1)
    assert layer.neuron(x, from_rest=True).flatten(1).tolist() == [[0, 1], [1, 1], [0, 1], [1, 1]]
    assert layer(x, mask).flatten().tolist() == [-0.25, 0.25, -0.25, 0.25]


@pytest.mark.parametrize("bits", [32, 1.58, 1])
def test_binary_neurons_pass_gradients(bits):
    layer = SpikingLinear(5, 3, bits=bits, neuron="lif").train()
    x = torch.randn(4, 2, 6, 5).requires_grad_()
    layer(x).square().sum().backward()
    for grad in (x.grad, layer.weight.grad, layer.bias.grad):
        assert grad.isfinite().all()
        assert grad.any()
    assert all(step.any() for step in x.grad)  # every step's input
