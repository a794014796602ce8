"""LIF over many steps in groups: the loop's result to the last bit, forward and backward."""

from itertools import product

import pytest
import torch

from snlp_zoo.ops import Surrogate, lif
from snlp_zoo.ops.lif import lif_reference, parallel
from snlp_zoo.ops.lif.analytic import lif_analytic
from snlp_zoo.ops.lif.parallel import GROUP, lif_parallel, worthwhile

MEMBRANE = {"tau": 2.0, "v_threshold": 1.0}


def outcome(function, current, v_init, tau=2.0, v_reset=0.0, decay_input=True, detach_reset=True, carry_out=True):
    """Spikes, membrane and the gradients of a weighting of both."""
    leak = torch.tensor(1 / tau, dtype=torch.promote_types(current.dtype, torch.float32))
    options = (1.0, v_reset, decay_input, detach_reset, Surrogate("atan"), carry_out)
    spikes, v = function(current, v_init, leak, *options)
    generator = torch.Generator().manual_seed(1)
    total = (spikes * torch.randn(spikes.shape, generator=generator).to(spikes)).sum()
    total = total + (v * torch.randn(v.shape, generator=generator).to(v)).sum() if carry_out else total
    return spikes, v, *torch.autograd.grad(total, [x for x in (current, v_init) if x is not None])


def currents(*shape, dtype=torch.float64):
    return (torch.randn(shape, dtype=torch.float64) * 2 + 0.5).to(dtype).requires_grad_()


@pytest.fixture
def sweeps(monkeypatch):
    """What `settle` returned, one number for each call."""
    found, settle = [], parallel.settle
    monkeypatch.setattr(parallel, "settle", lambda *args: found.append(settle(*args)) or found[-1])
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [GROUP, 4 * GROUP + 7])
def test_groups_equal_the_loop_to_the_last_bit(steps, dtype):
    for tau, v_reset, decay, detach in product((2.0, 10.0), (0.0, -0.3, None), (True, False), (True, False)):
        v_init = torch.randn(3, 5, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        setting = tau, v_reset, decay, detach
        for args in ((currents(steps, 3, 5, dtype=dtype), start) for start in (v_init, None)):
            for one, other in zip(
                outcome(lif_parallel, *args, *setting), outcome(lif_analytic, *args, *setting), strict=True
            ):
                assert torch.equal(one, other), setting


@pytest.mark.parametrize("v_reset", [0.0, None])
def test_equals_the_reference_in_float64(v_reset):
    current, v_init = currents(200, 32), torch.randn(32, dtype=torch.float64, requires_grad=True)
    assert worthwhile(current, 2.0, Surrogate())
    setting = {"v_reset": v_reset, "decay_input": True, "detach_reset": False, "surrogate": Surrogate()} | MEMBRANE
    results = []
    for function in (lif, lif_reference):
        spikes, v = function(current, v_init, **setting)
        results.append(
            (spikes, v, *torch.autograd.grad((spikes.sum(1).cos().sum() + v.sin().sum()), (current, v_init)))
        )
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("tau", "v_reset", "bound"),
    [(8 / 7, 0.0, 3), (8 / 7, None, 3), (2.0, 0.0, 6), (2.0, None, 6), (10.0, 0.0, 12), (10.0, None, 26)],
)
def test_few_sweeps_are_enough(sweeps, monkeypatch, tau, v_reset, bound):
    monkeypatch.setattr(parallel, "GROUP", 16)
    monkeypatch.setattr(parallel, "SWEEPS", 100)
    outcome(lif_parallel, currents(128, 32), None, tau, v_reset)
    assert sweeps[0] <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("v_reset", [0.0, None])
def test_on_a_device_groups_equal_its_loop(v_reset):
    current, v_init = (x.detach().cuda().requires_grad_() for x in (currents(1024, 8, 768), torch.randn(8, 768)))
    current = current.detach().float().requires_grad_()
    options = (torch.tensor(0.5, device="cuda"), 1.0, v_reset, True, False, Surrogate("atan"), True)
    assert worthwhile(current, 2.0, Surrogate())
    results = []
    for function in (lif_parallel, lif_analytic):
        spikes, v = function(current, v_init, *options)
        results.append((spikes, v, *torch.autograd.grad(spikes.square().sum() + v.sum(), (current, v_init))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_what_stays_out_of_phase_is_mended_group_by_group(sweeps):
    current = torch.linspace(0.9, 2.2, 64, dtype=torch.float64).repeat(12 * GROUP, 1).requires_grad_()  # periods 1 to 9
    got, expected = (outcome(function, current, None) for function in (lif_parallel, lif_analytic))
    assert sweeps[0] > parallel.SWEEPS
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_nan_spreads_as_in_the_loop():
    current = currents(4 * GROUP, 3)
    current.data[5, 0] = torch.nan
    for one, other in zip(outcome(lif_parallel, current, None), outcome(lif_analytic, current, None), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_little_more_than_the_input_is_kept(saved_for_backward):
    current = currents(4 * GROUP, 64, dtype=torch.float32)
    with saved_for_backward() as saved:
        lif(current, None, **MEMBRANE)
    assert saved.nbytes <= current.nbytes * (1 + 1 / GROUP) + 8  # the groups' starts, and 1 / tau


@pytest.mark.parametrize(
    ("shape", "tau", "alpha", "chosen"),
    [
        ((128, 1, 64), 2.0, 2.0, True),
        ((128, 8, 256), 2.0, 2.0, True),
        ((128, 16, 256), 2.0, 2.0, False),  # the loop is not slower
        ((63, 64), 2.0, 2.0, False),
        ((128, 0, 64), 2.0, 2.0, False),
        ((1024, 64), 10.0, 2.0, False),  # remembers for longer than a group
        ((1024, 64), torch.tensor(2.0), 2.0, False),
        ((1024, 64), 2.0, torch.tensor(2.0), False),
    ],
)
def test_when_groups_are_chosen(shape, tau, alpha, chosen):
    assert worthwhile(torch.zeros(shape), tau, Surrogate("atan", alpha)) is chosen
