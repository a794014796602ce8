import math

import pytest
import torch
from torch import nn

from snlp_zoo.layers import IFNode, LIFNode
from snlp_zoo.layers.equilibrium import (
    AverageRate,
    Settling,
    Spikes,
    SteadyState,
    average_rate,
    rate_neuron,
    rate_with_gradient,
    steady_rate,
)


def rates_of_constant(current, steps, **options):
    return average_rate(rate_neuron(**options)(current.expand(steps, *current.shape), from_rest=True))


def test_a_rate_neuron_is_spikingjellys_soft_reset_neuron():
    assert type(rate_neuron()) is IFNode
    assert type(rate_neuron(leak=0.9)) is LIFNode
    assert rate_neuron(2.0).v_reset is None
    assert rate_neuron(leak=0.9).tau == pytest.approx(10)


def test_leaky_recursion_by_hand():
    """v = leak u + current, u = v - threshold s: 0.75; 0.375 + 0.75 = 1.125 fires, keeps 0.125; 0.0625 + 0.75."""
    membranes = {}
    node = rate_neuron(leak=0.5)
    spikes = node(torch.full((3, 1), 0.75), state=membranes)
    assert spikes.flatten().tolist() == [0, 1, 0]
    assert membranes[node].item() == 0.8125


@pytest.mark.parametrize("steps", [4, 16, 80, 125])
def test_rate_of_a_constant_current(steps):
    current = torch.arange(-1024, 2049, dtype=torch.float64) / 1024  # sums are exact
    rate = rates_of_constant(current, steps)
    assert (rate - steady_rate(current, 1.0)).abs().max() <= 1 / steps
    inside = (current >= 0) & (current <= 1)
    assert torch.equal(rate[inside], (steps * current[inside]).floor() / steps)


@pytest.mark.parametrize("steps", [4, 16])
def test_half_a_threshold_to_start_with_rounds_rates_to_the_nearest(steps):
    current = torch.arange(0, 1025, dtype=torch.float64).expand(1, 1, -1) / 1024
    fire, node = Spikes({}, torch.ones(1, 1), v_init=0.5), rate_neuron(2.0)
    rate = AverageRate()
    for piece in (2 * current).expand(steps, *current.shape).split(3):
        rate.add(fire(node, piece))
    assert torch.equal(rate.value, (steps * current + 0.5).floor() / steps)


@pytest.mark.parametrize("leak", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("v_threshold", [1.0, 0.3])
def test_rate_identity_of_a_linear_layer(leak, v_threshold):
    """v_threshold a[T] = f(a_in[T]) - u[T] / sum of powers, to rounding, for any spike train, in pieces too."""
    linear = nn.Linear(6, 5, dtype=torch.float64)
    spikes_in = (torch.rand(37, 4, 6) < 0.4).double()
    node, membranes, rate = rate_neuron(v_threshold, leak), {}, AverageRate(leak)
    with torch.no_grad():
        for piece in linear(spikes_in).split(10):
            rate.add(node(piece, state=membranes))
        expected = linear(average_rate(spikes_in, leak)) - membranes[node] / sum(leak**k for k in range(37))
    assert rate.value.any()
    torch.testing.assert_close(v_threshold * rate.value, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("leak", [1.0, 0.8])
def test_average_rate_in_pieces(leak):
    spikes = (torch.rand(11, 3, 2) < 0.5).float()
    weights = torch.tensor([leak ** (10 - t) for t in range(11)])
    expected = (spikes * weights[:, None, None]).sum(0) / weights.sum()
    torch.testing.assert_close(average_rate(spikes, leak), expected)
    rate = AverageRate(leak)
    for piece in spikes.split([4, 1, 6]):
        rate.add(piece)
    torch.testing.assert_close(rate.value, expected)


def test_half_precision_spikes_are_counted_exactly():
    spikes = torch.ones(300, 2, dtype=torch.bfloat16)  # bfloat16 itself stops counting at 256
    assert average_rate(spikes).tolist() == [1, 1]
    assert average_rate(spikes).dtype == torch.float32


def test_feedback_network_settles_like_one_over_t():
    weight = torch.randn(8, 8, dtype=torch.float64)
    weight *= 0.5 / torch.linalg.matrix_norm(weight, 2)
    bias = torch.rand(8, dtype=torch.float64)
    steady = torch.zeros(8, dtype=torch.float64)
    for _ in range(200):
        steady = steady_rate(weight @ steady + bias, 1.0)
    node, membranes, rate, errors = rate_neuron(), {}, AverageRate(), {}
    spikes = torch.zeros(1, 8, dtype=torch.float64)
    for step in range(1, 1001):
        spikes = node(spikes @ weight.mT + bias, state=membranes)
        rate.add(spikes)
        errors[step] = (rate.value - steady).abs().max().item()
    for step in (50, 200, 1000):
        assert errors[step] < 2.5 / step
    assert errors[1000] < errors[50] / 5


def test_value_of_the_rate_and_gradient_of_the_steady_state():
    rate, steady = torch.rand(5), torch.rand(5, requires_grad=True)
    joined = rate_with_gradient(rate, steady)
    assert torch.equal(joined, rate)
    (joined * torch.arange(5.0)).sum().backward()
    assert torch.equal(steady.grad, torch.arange(5.0))


def test_one_dropout_mask_for_both_passes_and_all_steps():
    masks, site = {}, nn.Dropout(0.5)
    x = torch.rand(3, 2, 4, 8) + 1
    dropped = Spikes(masks, torch.ones(2, 4)).drop(site, x)
    zeros = dropped == 0
    assert torch.equal(zeros[0], zeros[2])
    assert 0 < zeros.float().mean() < 1
    assert torch.equal(SteadyState(masks).drop(site, x[1]), dropped[1])
    assert torch.equal(SteadyState({}).drop(site.eval(), x[0]), x[0])


def test_settling():
    settling, fired = Settling(0.1), torch.tensor([True, True, False])
    values = [[0.5, 0.0, 0.5], [0.5, 0.2, 0.5], [0.5, 0.4, 0.5], [0.55, 0.6, 0.5], [0.5, 0.6, 0.5]]
    answers = [settling.update(torch.tensor(v).view(3, 1), fired).tolist() for v in values]
    assert answers[:-1] == [[False] * 3] * 4
    assert answers[-1] == [True, False, False]
    settling.keep(torch.tensor([False, True, True]))
    for _ in range(3):
        answer = settling.update(torch.tensor([[0.6], [0.5]]), torch.tensor([True, True]))
    assert answer.tolist() == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leak": 0.0}, r"leak must be in \(0, 1\], got 0.0"),
        ({"leak": 1.1}, r"leak must be in \(0, 1\], got 1.1"),
        ({"v_threshold": 0.0}, "v_threshold must be positive, got 0.0"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        rate_neuron(**options)


def test_tolerance_must_be_positive():
    with pytest.raises(ValueError, match="early_exit must be a positive tolerance, got 0"):
        Settling(0)
    with pytest.raises(ValueError, match="early_exit must be a positive tolerance, got nan"):
        Settling(math.nan)


def test_state_needs_multi_step_mode():
    node = rate_neuron()
    node.step_mode = "s"
    with pytest.raises(ValueError, match="needs step_mode='m'"):
        node(torch.ones(2), state={})
