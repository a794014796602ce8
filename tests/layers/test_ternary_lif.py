import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn

from snlp_zoo.errors import BackendError
from snlp_zoo.layers import TernaryLIFNode

CURRENTS = [2.0, 1.0, -3.5, 1.0, 2.5, -2.375]
SIGNS = [1.0, 0.0, -1.0, 0.0, 1.0, -1.0]  # by hand in tests/ops/test_ternary_lif.py


def column(values):
    return torch.tensor(values).view(-1, 1, 1)


def test_the_membrane_does_not_know_the_amplitude():
    node = TernaryLIFNode(amplitude=0.75)
    assert node(column(CURRENTS)).flatten().tolist() == [0.75 * s for s in SIGNS]
    assert node.v.item() == 0.0


def test_an_amplitude_for_each_channel():
    node = TernaryLIFNode(channels=3)
    node.amplitude.data = torch.tensor([0.5, 1.0, 2.0])
    spikes = node(column(CURRENTS).expand(-1, 2, 3), from_rest=True)
    assert spikes[:, 1].T.tolist() == [[a * s for s in SIGNS] for a in (0.5, 1.0, 2.0)]


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("channels", [None, 3])
def test_an_amplitude_for_each_step_repeats(channels, step_mode):
    node = TernaryLIFNode(time_steps=4, channels=channels, step_mode=step_mode)
    assert node.amplitude.shape == ((4, 3) if channels else (4,))
    node.amplitude.data.mul_(torch.tensor([0.25, 0.5, 1.0, 2.0]).view(4, *(1,) * (node.amplitude.ndim - 1)))
    currents = column(CURRENTS).expand(-1, 2, 3)
    for _ in range(2):
        spikes = node(currents) if step_mode == "m" else torch.stack([node(x) for x in currents])
        expected = [a * s for a, s in zip([0.25, 0.5, 1.0, 2.0, 0.25, 0.5], SIGNS, strict=True)]
        assert spikes[:, 1, 2].tolist() == expected
        functional.reset_net(node)
    if step_mode == "m":  # pieces go on where the last one ended
        assert torch.equal(torch.cat([node(currents[:3]), node(currents[3:])]), spikes)


@pytest.mark.parametrize(("channels", "time_steps"), [(None, None), (5, None), (None, 4), (5, 4)])
def test_the_amplitude_is_differentiated_exactly(channels, time_steps):
    node = TernaryLIFNode(channels=channels, time_steps=time_steps, v_threshold=0.4).double()
    node.amplitude.data.uniform_(0.5, 2)
    current, weights = torch.randn(2, 4, 30, 5, dtype=torch.float64)

    def loss():
        return (node(current, from_rest=True) * weights).tanh().sum()

    (grad,) = torch.autograd.grad(loss(), node.amplitude)
    numeric = torch.zeros_like(grad)
    with torch.no_grad():
        for i in range(grad.numel()):
            flat = node.amplitude.view(-1)
            flat[i] += 1e-6
            above = loss()
            flat[i] -= 2e-6
            numeric.view(-1)[i] = (above - loss()) / 2e-6
            flat[i] += 1e-6
    assert grad.all()
    torch.testing.assert_close(grad, numeric, rtol=1e-6, atol=1e-8)


def test_an_amplitude_of_zero_is_left_again():
    node = TernaryLIFNode()
    node.amplitude.data.zero_()
    current = column(CURRENTS).requires_grad_()
    spikes = node(current, from_rest=True)
    ((spikes - column(SIGNS)) ** 2).sum().backward()
    assert not spikes.any()
    assert not current.grad.any()
    assert node.amplitude.grad.item() == -2 * sum(abs(s) for s in SIGNS)


def test_the_gradient_of_the_input_scales_with_the_amplitude():
    grads = []
    for amplitude in (1.0, 2.5):
        current = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
        TernaryLIFNode(amplitude=amplitude)(current, from_rest=True).sum().backward()
        grads.append(current.grad)
    torch.testing.assert_close(grads[1], 2.5 * grads[0])


def test_thresholds_of_their_own_and_of_each_channel():
    node = TernaryLIFNode(v_threshold=[0.5, 0.6], v_threshold_negative=torch.tensor([0.4, 0.3]), channels=2)
    assert set(dict(node.named_buffers())) == {"v_threshold", "v_threshold_negative"}
    assert node(torch.tensor([[[1.0, 1.0]], [[-1.5, -1.0]]]), from_rest=True)[:, 0].tolist() == [[1, 0], [-1, 0]]
    asymmetric = TernaryLIFNode(v_threshold_negative=0.5)
    assert asymmetric(column([-1.0, -0.75, 2.5, 0.875])).flatten().tolist() == [-1, 0, 1, 0]
    assert not list(asymmetric.buffers())
    assert "v_threshold_negative=0.5" in repr(asymmetric)


def test_pieces_by_explicit_state():
    node, current = TernaryLIFNode(amplitude=0.5), torch.randn(7, 2, 6) * 2
    membranes = {}
    pieces = torch.cat([node(current[:3], state=membranes), node(current[3:], state=membranes)])
    assert torch.equal(pieces, node(current, from_rest=True))
    assert node.v == 0.0
    with pytest.raises(ValueError, match="does not say which amplitude comes next"):
        TernaryLIFNode(time_steps=7)(current, state={})


def test_under_autocast_spikes_have_its_dtype_and_membranes_stay_float32():
    node, current = TernaryLIFNode(amplitude=0.7), torch.randn(6, 2, 50)
    expected = node(current, from_rest=True)
    with torch.autocast("cpu", torch.bfloat16):
        spikes = node(current)
    assert (spikes.dtype, node.v.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(spikes, expected.bfloat16())


def test_saving_and_buffers():
    fixed = TernaryLIFNode(amplitude=0.5, learn_amplitude=False)
    assert not list(fixed.parameters())
    assert fixed.state_dict()["amplitude"].tolist() == [0.5]
    learned = TernaryLIFNode(learnable_surrogate=True, channels=3, v_threshold=[1.0, 2.0, 3.0])
    assert set(learned.state_dict()) == {"amplitude", "surrogate_log_alpha", "v_threshold"}


def test_compiles_in_one_graph():
    node, current = TernaryLIFNode(channels=5, time_steps=4, learnable_surrogate=True), torch.randn(4, 2, 5)
    compiled = torch.compile(lambda x: node(x, from_rest=True), fullgraph=True, backend="aot_eager")

    def run(call):
        node.zero_grad()
        out = call(current)
        (out * current).sum().backward()
        return out, node.amplitude.grad, node.surrogate_log_alpha.grad

    torch.testing.assert_close(run(compiled), run(lambda x: node(x, from_rest=True)))


def test_learns_inside_a_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), TernaryLIFNode(channels=16, v_threshold=0.3), nn.Linear(16, 1))
    x = torch.randn(128, 4)
    target = (x[:, :1] * 2 - x[:, 1:2]).expand(4, -1, -1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(80):
        loss = nn.functional.mse_loss(net[2](net[1](net[0](x).expand(4, -1, -1), from_rest=True)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert (net[1].amplitude - 1).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amplitude": 0.0}, "amplitude starts positive, got 0.0"),
        ({"amplitude": float("nan")}, "amplitude starts positive, got nan"),
        ({"v_threshold": -1.0}, "v_threshold is a magnitude and must be positive, got -1.0"),
        ({"v_threshold_negative": -0.5}, "v_threshold_negative is a magnitude and must be positive, got -0.5"),
        ({"v_threshold": [1.0, 0.0], "channels": 2}, "v_threshold is a magnitude and must be positive, got 0"),
        ({"v_threshold": [1.0, 2.0]}, r"v_threshold has shape \(2,\), but channels is None"),
        ({"v_threshold": [1.0, 2.0], "channels": 3}, r"v_threshold has shape \(2,\), but channels is 3"),
        ({"time_steps": 0}, "channels and time_steps are at least 1, got None and 0"),
        ({"surrogate_function": "atn", "learnable_surrogate": True}, "did you mean 'atan'"),
    ],
)
def test_options_that_make_no_neuron(options, message):
    with pytest.raises(ValueError, match=message):
        TernaryLIFNode(**options)


def test_there_is_no_kernel():
    with pytest.raises(BackendError, match="no triton kernel"):
        TernaryLIFNode(backend="triton")(torch.zeros(2, 3))
