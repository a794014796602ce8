import math

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate

from snlp_zoo.errors import BackendError
from snlp_zoo.ops import Surrogate, ternary_lif
from snlp_zoo.ops.ternary_lif import ternary_membranes

UNIT = {"tau": 2.0, "v_threshold": 1.0, "v_threshold_negative": 1.0}


def signs(values, **options):
    current = torch.tensor(values, dtype=torch.float64).unsqueeze(1)
    spikes, v = ternary_lif(current, None, **UNIT | options)
    return spikes.flatten().tolist(), v.item()


def test_trace_by_hand():
    # h: 1, .5, -1.5, .25, 1.375, -1 (v after: 0, .5, -.5, .25, .375, 0); both thresholds fire at equality
    currents = [2.0, 1.0, -3.5, 1.0, 2.5, -2.375]
    assert signs(currents) == ([1, 0, -1, 0, 1, -1], 0.0)


def test_trace_by_hand_without_decay_of_the_input():
    # h: .75, 1.375, -.8125, -1.40625 -> v: .75, .375, -.8125, -.40625
    assert signs([0.75, 1.0, -1.0, -1.0], decay_input=False) == ([0, 1, 0, -1], -0.40625)


def test_thresholds_of_their_own():
    # V+ = 1, V- = .5; h: -.5 (fires at equality, v = 0), -.375, 1.0625 (v = .0625), .46875
    currents = [-1.0, -0.75, 2.5, 0.875]
    assert signs(currents, v_threshold_negative=0.5) == ([-1, 0, 1, 0], 0.46875)
    assert signs(currents)[0] == [0, 0, 0, 0]


def test_thresholds_of_each_channel():
    current = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    thresholds = {
        "v_threshold": torch.tensor([0.5, 0.6, 0.1, 0.1]),
        "v_threshold_negative": torch.tensor([9, 9, 0.5, 0.6]),
    }
    assert ternary_lif(current, None, tau=2.0, **thresholds).spikes.tolist() == [[1, 0, -1, 0]]


def test_opposite_currents_give_opposite_spikes():
    current = torch.randn(9, 200, dtype=torch.float64) * 2
    one, other = ternary_lif(current, None, **UNIT), ternary_lif(-current, None, **UNIT)
    assert torch.equal(one.spikes, -other.spikes)
    assert torch.equal(one.v, -other.v)
    assert set(one.spikes.unique().tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("detach_reset", [True, False])
def test_equals_spikingjelly(decay_input, detach_reset):
    options = {"decay_input": decay_input, "detach_reset": detach_reset}
    theirs = neuron.TernaryLIFNode(
        tau=2.7, v_threshold=0.8, v_reset=None, surrogate_function=surrogate.ATan(), step_mode="m", **options
    )
    current = (torch.randn(7, 3, 5, dtype=torch.float64) * 2).requires_grad_()
    spikes, v = ternary_lif(current, None, tau=2.7, v_threshold=0.8, v_threshold_negative=0.8, **options)
    expected = theirs(current)
    assert torch.equal(spikes, expected)
    weights = torch.randn(2, *current.shape, dtype=torch.float64)
    got, want = (
        torch.autograd.grad((s * weights[0]).sum() + (m * weights[1, 0]).sum(), current)
        for s, m in ((spikes, v), (expected, theirs.v))
    )
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_gradient_through_two_steps_by_hand():
    current = torch.tensor([[2.4], [-3.2]], dtype=torch.float64, requires_grad=True)
    spikes, _ = ternary_lif(current, None, tau=2.0, v_threshold=1.0, v_threshold_negative=0.5)
    assert spikes.flatten().tolist() == [1, -1]
    g = Surrogate("atan").derivative
    h = torch.tensor([1.2, 0.1 - 1.6], dtype=torch.float64)  # the first spike leaves 0.2, of which half is kept
    slope = g(h - 1) + g(-h - 0.5)
    (grad,) = torch.autograd.grad(3 * spikes[0].sum() + 5 * spikes[1].sum(), current)
    expected = [(3 * slope[0] + 5 * slope[1] / 2) / 2, 5 * slope[1] / 2]
    assert grad.flatten().tolist() == pytest.approx([x.item() for x in expected], rel=1e-12)


def test_a_learned_steepness_sees_both_thresholds():
    alpha = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    current = torch.tensor([[1.0]], dtype=torch.float64)
    ternary_lif(current, None, **UNIT | {"surrogate": Surrogate("atan", alpha)}).spikes.sum().backward()
    z = torch.tensor([-0.5, -1.5], dtype=torch.float64)  # h = 0.5: below one threshold, above the other
    up, down = z * Surrogate("atan").derivative(z) / 2
    assert alpha.grad.item() == pytest.approx((up - down).item(), rel=1e-12)


def test_pieces_equal_the_whole():
    current = torch.randn(7, 4)
    whole, v = ternary_lif(current, None, **UNIT)
    first, middle = ternary_lif(current[:3], None, **UNIT)
    last, end = ternary_lif(current[3:], middle, **UNIT)
    assert torch.equal(torch.cat([first, last]), whole)
    assert torch.equal(end, v)


def test_half_precision_keeps_a_float32_membrane():
    current = torch.randn(6, 50).bfloat16()
    spikes, v = ternary_lif(current, None, **UNIT)
    wide, wide_v = ternary_lif(current.float(), None, **UNIT)
    assert v.dtype == torch.float32
    assert torch.equal(spikes.float(), wide)
    assert torch.equal(v, wide_v)


def test_membranes_are_what_is_compared_with_the_thresholds():
    current = torch.randn(6, 50, dtype=torch.float64) * 2
    options = {"tau": 2.7, "v_threshold": 0.8, "v_threshold_negative": 0.4}
    h = ternary_membranes(current, None, **options, decay_input=True)
    assert torch.equal(ternary_lif(current, None, **options).spikes, (h >= 0.8).double() - (h <= -0.4).double())


@pytest.mark.parametrize(
    ("current", "v_init", "options", "error", "message"),
    [
        ((0, 3), None, {}, ValueError, r"at least one time step on axis 0, got shape \(0, 3\)"),
        ((4, 3), (2,), {}, ValueError, r"v_init \(2,\) must equal current without T \(3,\)"),
        ((4, 3), None, {"tau": 0.5}, ValueError, "at least 1, got 0.5"),
        ((4, 3), None, {"tau": math.nan}, ValueError, "at least 1, got nan"),
        ((4, 3), None, {"backend": "triton"}, BackendError, "this version has no triton kernel for it"),
        ((4, 3), None, {"backend": "cuda"}, BackendError, "unknown backend 'cuda'"),
    ],
)
def test_errors(current, v_init, options, error, message):
    with pytest.raises(error, match=message):
        ternary_lif(torch.zeros(current), None if v_init is None else torch.zeros(v_init), **UNIT | options)
