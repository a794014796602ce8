import math
from itertools import product

import pytest
import torch

from snlp_zoo.errors import BackendError
from snlp_zoo.ops import SURROGATES, Surrogate, lif
from snlp_zoo.ops.lif import lif_membranes, lif_reference

SHAPES = [(1, 1), (1, 2, 3), (4, 2, 7, 5), (7, 3, 1, 13)]
RESETS = [0.0, -0.3, None]
MEMBRANE = {"tau": 2.0, "v_threshold": 1.0}
LEARNED = Surrogate("atan", torch.ones(()))
INTEGRATE = {"tau": math.inf, "v_reset": None, "decay_input": False}


def every_setting(surrogates=SURROGATES):
    for name, v_reset, detach, decay in product(surrogates, RESETS, (True, False), (True, False)):
        yield {"surrogate": Surrogate(name), "v_reset": v_reset, "detach_reset": detach, "decay_input": decay}


def make_inputs(shape, dtype=torch.float64):
    current = (torch.randn(shape, dtype=torch.float64) * 2 + 0.5).to(dtype).requires_grad_()
    v_init = torch.randn(shape[1:], dtype=torch.float64).to(dtype).requires_grad_()
    return current, v_init


def run(function, tensors, **options):
    """Outputs, and the gradients of a random weighting of all outputs by `tensors`."""
    outputs = function(*tensors[:2], **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype) for o in outputs]
    total = sum((w * o).sum() for w, o in zip(weights, outputs, strict=True))
    return [*outputs, *torch.autograd.grad(total, tensors)]


def constant(x, steps, **options):
    current = torch.full((steps, 1), x, dtype=torch.float64)
    return lif(current, current.new_zeros(1), **MEMBRANE | options).spikes.flatten().int().tolist()


@pytest.mark.parametrize(
    ("x", "train"), [(0.9, "0000"), (1.07, "0001"), (1.15, "0010"), (1.34, "0101"), (1.99, "0101"), (2.0, "1111")]
)
def test_trace_by_hand(x, train):
    assert constant(x, 4) == [int(s) for s in train]


def test_subthreshold_current_never_fires():
    assert not any(constant(0.9, 200))


@pytest.mark.parametrize(("tau", "steps"), [(2.0, 4), (2.0, 16), (10.0, 4)])
def test_smallest_current_that_fires_within_t(tau, steps):
    smallest = 1 / (1 - (1 - 1 / tau) ** steps)  # 16/15 for tau 2, T 4
    assert constant(smallest * (1 + 1e-9), steps, tau=tau) == [0] * (steps - 1) + [1]
    assert not any(constant(smallest * (1 - 1e-9), steps, tau=tau))


@pytest.mark.parametrize(
    ("options", "static", "rates"),
    [
        ({}, True, [0.0228, 0.0910, 0.0581, 0.1076]),
        ({}, False, [0.0227, 0.0327, 0.0327, 0.0320]),
    ],
)
def test_rate_of_each_step_on_gaussian_current(options, static, rates):
    n = 500_000
    current = torch.randn(n).expand(4, n) if static else torch.randn(4, n)
    got = lif(current, torch.zeros(n), **MEMBRANE | options).spikes.double().mean(1)
    for rate, expected in zip(got.tolist(), rates, strict=True):
        assert rate == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n) + 1e-4)


@pytest.mark.parametrize(("options", "rate"), [({}, 0.0699), ({"v_threshold": 0.5}, 0.2166), ({"tau": 10.0}, 0.00046)])
def test_mean_rate_on_static_gaussian_current(options, rate):
    n = 500_000
    got = lif(torch.randn(n).expand(4, n), torch.zeros(n), **MEMBRANE | options).spikes.double().mean()
    assert got.item() == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / n) + 1e-5)


@pytest.mark.parametrize("steps", [1, 4, 16, 80])
def test_integrate_and_fire_rate_is_the_clipped_current(steps):
    current = torch.linspace(-0.5, 1.5, 257, dtype=torch.float64)  # multiples of 1/128: exact sums
    spikes, _ = lif(current.expand(steps, -1), torch.zeros_like(current), v_threshold=1.0, **INTEGRATE)
    rate = spikes.mean(0)
    assert ((rate - current.clamp(0, 1)).abs() <= 1 / steps + 1e-12).all()
    inside = (current >= 0) & (current <= 1)
    torch.testing.assert_close(rate[inside], (current[inside] * steps).floor() / steps)


def test_integrate_and_fire_rate_identity_under_varying_current():
    steps, v_threshold = 25, 0.7
    current = torch.randn(steps, 300, dtype=torch.float64)
    spikes, v = lif(current, current.new_zeros(300), v_threshold=v_threshold, **INTEGRATE)
    torch.testing.assert_close(spikes.mean(0), (current.mean(0) - v / steps) / v_threshold, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference_in_float64(shape):
    for setting in every_setting():
        inputs = make_inputs(shape)
        options = setting | {"tau": 2.7, "v_threshold": 0.8}
        for got, expected in zip(run(lif, inputs, **options), run(lif_reference, inputs, **options), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=lambda m: f"{setting}: {m}")  # noqa: B023


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference_in_float32(shape):
    for setting in every_setting():
        inputs = make_inputs(shape, torch.float32)
        got, expected = run(lif, inputs, **setting, **MEMBRANE), run(lif_reference, inputs, **setting, **MEMBRANE)
        assert torch.equal(got[0], expected[0])
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda m: f"{setting}: {m}")  # noqa: B023


@pytest.mark.parametrize("tau_shape", [(), (5,), (7, 1)], ids=str)
def test_learned_tau_gets_the_references_gradient(tau_shape):
    for setting in every_setting(("atan", "triangular")):
        tau = (1.5 + torch.rand(tau_shape, dtype=torch.float64)).requires_grad_()
        inputs = (*make_inputs((4, 2, 7, 5)), tau)
        got = run(lif, inputs, tau=tau, v_threshold=0.8, **setting)
        expected = run(lif_reference, inputs, tau=tau, v_threshold=0.8, **setting)
        assert got[-1].shape == tau_shape
        assert got[-1].any()
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11, msg=lambda m: f"{setting}: {m}")  # noqa: B023


@pytest.mark.parametrize("alpha_shape", [(), (5,), (7, 1)], ids=str)
def test_learned_steepness_gets_the_references_gradient(alpha_shape):
    for setting in every_setting():
        alpha = (0.5 + torch.rand(alpha_shape, dtype=torch.float64)).requires_grad_()
        inputs = (*make_inputs((4, 2, 7, 5)), alpha)
        setting |= {"surrogate": Surrogate(setting["surrogate"].name, alpha), "tau": 2.7, "v_threshold": 0.8}
        got, expected = run(lif, inputs, **setting), run(lif_reference, inputs, **setting)
        assert got[-1].shape == alpha_shape
        assert got[-1].any()
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11, msg=lambda m: f"{setting}: {m}")  # noqa: B023


def test_steepness_and_tau_are_learned_together():
    alpha, tau = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.7, 2.3))
    inputs = (*make_inputs((5, 2, 3)), alpha, tau)
    setting = {"surrogate": Surrogate("sigmoid", alpha), "tau": tau, "v_threshold": 0.8}
    setting |= {"v_reset": -0.3, "decay_input": True, "detach_reset": False}
    torch.testing.assert_close(run(lif, inputs, **setting), run(lif_reference, inputs, **setting))


def test_learned_steepness_is_kept_alone_for_the_backward(saved_for_backward):
    current, alpha = torch.randn(16, 64, requires_grad=True), torch.ones((), requires_grad=True)
    with saved_for_backward() as saved:
        lif(current, None, **MEMBRANE, surrogate=Surrogate("atan", alpha))
    assert saved.nbytes <= current.nbytes + 8  # 1 / tau and alpha


def test_membranes_are_what_the_reference_compares_with_the_threshold():
    current, v_init = (x.detach() for x in make_inputs((5, 2, 3)))
    for v_reset, decay in product(RESETS, (True, False)):
        options = {"tau": 2.7, "v_threshold": 0.8, "v_reset": v_reset, "decay_input": decay}
        charged = lif_membranes(current, v_init, **options)
        assert torch.equal(lif(current, v_init, **options).spikes, (charged >= 0.8).double())
        leak, rest = 1 / 2.7, v_reset or 0.0
        first = v_init - (v_init - rest) * leak + current[0] * (leak if decay else 1)
        torch.testing.assert_close(charged[0], first)


@pytest.mark.parametrize("v_reset", RESETS)
def test_two_chunks_equal_one_call(v_reset):
    def in_chunks(current, v_init, **options):
        first, v = lif(current[:3], v_init, **options)
        second, v = lif(current[3:], v, **options)
        return torch.cat([first, second]), v

    inputs = make_inputs((7, 2, 5))
    options = MEMBRANE | {"v_reset": v_reset, "detach_reset": False}
    for one, other in zip(run(lif, inputs, **options), run(in_chunks, inputs, **options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_membrane(dtype):
    inputs = make_inputs((6, 4, 33), dtype)
    spikes, v, grad_current, grad_v = run(lif, inputs, **MEMBRANE)
    assert (spikes.dtype, v.dtype, grad_current.dtype, grad_v.dtype) == (dtype, torch.float32, dtype, dtype)
    wide_spikes, wide_v = lif(*(x.detach().float() for x in inputs), **MEMBRANE)
    assert torch.equal(spikes.float(), wide_spikes)
    assert torch.equal(v, wide_v)


@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("name", SURROGATES)
def test_nan_spreads_as_in_the_reference(name, v_reset):
    current, v_init = make_inputs((4, 3))
    current.data[1, 0] = math.nan
    options = MEMBRANE | {"surrogate": Surrogate(name), "v_reset": v_reset, "decay_input": True, "detach_reset": True}
    got, expected = (run(f, (current, v_init), **options) for f in (lif, lif_reference))
    assert got[1][0].isnan()
    assert not got[1][1:].isnan().any()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_empty_batch():
    inputs = make_inputs((4, 0, 5))
    spikes, v, grad_current, grad_v = run(lif, inputs, **MEMBRANE)
    assert (spikes.shape, v.shape, grad_current.shape, grad_v.shape) == ((4, 0, 5), (0, 5), (4, 0, 5), (0, 5))


def test_inputs_are_left_alone():
    current, v_init = (x.detach() for x in make_inputs((4, 3)))
    before = current.clone(), v_init.clone()
    _, v = lif(current, v_init, **MEMBRANE)
    v.add_(1)
    assert torch.equal(current, before[0])
    assert torch.equal(v_init, before[1])


@pytest.mark.parametrize("steps", [1, 4, 32])
def test_no_graph_over_time_and_only_the_input_is_saved(steps, graph_nodes, saved_for_backward):
    current, v_init = make_inputs((steps, 64), torch.float32)
    with saved_for_backward() as saved:
        spikes, v = lif(current, v_init, **MEMBRANE)
    assert spikes.grad_fn is v.grad_fn
    assert len(graph_nodes(spikes)) == 1
    assert saved.nbytes <= current.nbytes + v_init.nbytes + 8  # and 1 / tau


def test_unlearned_input_saves_nothing(saved_for_backward):
    with saved_for_backward() as saved:
        spikes, _ = lif(torch.randn(4, 8), torch.zeros(8), **MEMBRANE)
    assert not spikes.requires_grad
    assert saved.nbytes == 0


@pytest.mark.parametrize(
    ("current", "v_init", "options", "error", "message"),
    [
        ((4, 3), (4, 3), {}, ValueError, r"v_init \(4, 3\) must equal current without T \(3,\)"),
        ((0, 3), (3,), {}, ValueError, r"at least one time step on axis 0, got shape \(0, 3\)"),
        ((), (), {}, ValueError, "at least one time step"),
        ((4, 3), (3,), {"tau": 0.5}, ValueError, "must be at least 1, got 0.5"),
        ((4, 3), (3,), {"tau": math.nan}, ValueError, "must be at least 1, got nan"),
        ((4, 3), (3,), {"v_threshold": torch.ones(3)}, ValueError, "v_threshold is a number, got a tensor"),
        ((4, 3), (3,), {"tau": torch.ones(2)}, ValueError, r"tau \(2,\) must broadcast to current without T \(3,\)"),
        ((4, 3), (3,), {"tau": torch.ones(1, 3)}, ValueError, r"tau \(1, 3\) must broadcast"),
        ((4, 3), (3,), {"surrogate": Surrogate("atan", torch.ones(2))}, ValueError, r"alpha \(2,\) must broadcast to"),
        (
            (4, 3),
            (3,),
            {"surrogate": LEARNED, "backend": "triton"},
            BackendError,
            "cannot learn a surrogate's steepness",
        ),
        ((4, 3), (3,), {"surrogate": LEARNED, "backend": "cuda"}, BackendError, "unknown backend 'cuda'"),
        ((4, 3), (3,), {"surrogate": "atn"}, ValueError, "did you mean 'atan'"),
        ((4, 3), (3,), {"backend": "cuda"}, BackendError, "unknown backend 'cuda'"),
        ((4, 3), (3,), {"backend": "cupy"}, BackendError, "use 'auto' or 'torch'"),
    ],
)
def test_errors(current, v_init, options, error, message):
    with pytest.raises(error, match=message):
        lif(torch.zeros(current), torch.zeros(v_init), **MEMBRANE | options)
