import math
from itertools import pairwise

import pytest
import torch

from snlp_zoo.errors import BackendError
from snlp_zoo.ops import elastic_bispike
from snlp_zoo.ops.bispike import ALPHA_FLOOR, elastic_bispike_measured, elastic_bispike_reference

RESETS = ["symmetric", "reference"]
SHAPES = [(1, 1), (1, 2, 3), (4, 2, 7, 5), (7, 3, 1, 13)]
N = 1_000_000


def noise(rate, n=N):
    return 4 * math.sqrt(rate * (1 - rate) / n)


def draw(kind, shape):
    if kind == "gaussian":
        return torch.randn(shape)
    if kind == "uniform":
        return torch.rand(shape) * 2 - 1
    return torch.empty(shape).exponential_() * torch.randn(shape).sign()  # Laplace, scale 1


MEAN_MAGNITUDE = {"gaussian": math.sqrt(2 / math.pi), "laplace": 1.0, "uniform": 0.5}


def calibrated(inputs, k, reset):
    """Spikes [T, N] when every alpha[t] is k mean|m[t]| of these very inputs, as in a first training batch."""
    v, spikes = torch.zeros_like(inputs[0]), []
    for x in inputs:
        _, total = elastic_bispike_measured(x[None], v, torch.ones(1), None, reset=reset)
        s, v = elastic_bispike(x[None], v, k * total / x.numel(), reset=reset)
        spikes.append(s[0])
    return torch.stack(spikes)


def make_inputs(shape, dtype=torch.float64):
    current = (torch.randn(shape, dtype=torch.float64) * 2).to(dtype).requires_grad_()
    v_init = torch.randn(shape[1:], dtype=torch.float64).to(dtype).requires_grad_()
    alpha = (0.5 + torch.rand(shape[0], dtype=torch.float64)).to(dtype).requires_grad_()
    return current, v_init, alpha


def run(function, tensors, **options):
    """Outputs, and the gradients of a random weighting of all outputs by `tensors`."""
    outputs = function(*tensors, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype) for o in outputs]
    total = sum((w * o).sum() for w, o in zip(weights, outputs, strict=True))
    return [*outputs, *torch.autograd.grad(total, tensors)]


def membranes(x, reset):
    """m[t] and q[t] at alpha 1, one step after another; x a list of numbers."""
    v, m, q = torch.zeros(1), [], []
    for x_t in x:
        m.append((v + x_t).item())
        spikes, v = elastic_bispike(torch.full((1, 1), x_t), v, torch.ones(1), beta=0.25, reset=reset)
        q.append(spikes.item())
    return m, q


@pytest.mark.parametrize("reset", RESETS)
def test_trace_at_the_threshold(reset):
    assert membranes([0.5, 0.5, 0.5, 0.5], reset) == ([0.5, 0.625, 0.5, 0.625], [0, 1, 0, 1])


@pytest.mark.parametrize(("reset", "m"), [("reference", [-0.75, -0.375, -0.09375]), ("symmetric", [-0.75, 0, 0])])
def test_trace_of_a_negative_spike(reset, m):
    assert membranes([-0.75, 0.0, 0.0], reset) == (m, [-1, 0, 0])


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("gaussian", [0.68994, 0.42494, 0.23137, 0.11054]),
        ("laplace", [0.60653, 0.36788, 0.22313, 0.13534]),
        ("uniform", [0.75, 0.50, 0.25, 0.0]),
    ],
)
@pytest.mark.parametrize("sigma", [1.0, 8.0])
def test_rate_of_a_single_step(kind, rates, sigma):
    x = draw(kind, (1, N)) * sigma
    for k, rate in enumerate(rates, start=1):
        alpha = torch.tensor([k * sigma * MEAN_MAGNITUDE[kind]])
        q = elastic_bispike(x, torch.zeros(N), alpha).spikes / alpha
        assert set(q.unique().tolist()) <= {-1.0, 0.0, 1.0}
        assert q.abs().mean().item() == pytest.approx(rate, abs=noise(rate) + 1e-5)
        assert q.double().mean().item() == pytest.approx(0, abs=4 * math.sqrt(max(rate, 1e-12) / N))


@pytest.mark.parametrize(
    ("k", "passes", "power", "entropy"),
    [
        (1, 0.57506, 0.4392, 1.5832),
        (2, 0.88946, 1.0821, 1.4086),
        (3, 0.98332, 1.3257, 1.0118),
        (4, 0.99858, 1.126, 0.6121),
    ],
)
def test_gradient_share_power_and_entropy_on_gaussian_input(k, passes, power, entropy):
    x = torch.randn(1, N, requires_grad=True)
    alpha = k * MEAN_MAGNITUDE["gaussian"]
    spikes = elastic_bispike(x, torch.zeros(N), torch.tensor([alpha])).spikes
    (grad,) = torch.autograd.grad(spikes.sum(), x)
    assert set(grad.unique().tolist()) == {0.0, 1.0}
    assert grad.mean().item() == pytest.approx(passes, abs=noise(passes) + 1e-5)
    rate = (spikes != 0).double().mean().item()
    assert spikes.double().square().mean().item() == pytest.approx(power, abs=alpha**2 * noise(rate) + 1e-4)
    shares = [(spikes * sign > 0).double().mean().item() for sign in (1, -1)] + [1 - rate]
    signed = -sum(p * math.log2(p) for p in shares)
    binary = -rate * math.log2(rate) - (1 - rate) * math.log2(1 - rate)
    assert signed == pytest.approx(entropy, abs=5e-3)
    assert signed == pytest.approx(binary + rate, abs=1e-5)  # the sign is worth one bit per spike


@pytest.mark.parametrize(
    ("reset", "k", "rates"),
    [
        ("reference", 2, [0.425, 0.345, 0.289, 0.231]),
        ("reference", 4, [0.111, 0.057, 0.057, 0.055]),
        ("symmetric", 2, [0.425, 0.465, 0.442, 0.459]),
        ("symmetric", 4, [0.111, 0.081, 0.099, 0.067]),
    ],
)
def test_rate_of_each_step_on_static_gaussian_input(reset, k, rates):
    spikes = calibrated(torch.randn(N).expand(4, N), k, reset)
    for s, rate in zip(spikes, rates, strict=True):
        # published with three decimals from four million samples; alpha is measured on ours
        assert (s != 0).double().mean().item() == pytest.approx(rate, abs=noise(rate) + 1e-3)


@pytest.mark.parametrize(("kind", "k", "rate"), [("gaussian", 2, 0.323), ("gaussian", 3, 0.153), ("laplace", 2, 0.302)])
def test_mean_rate_of_the_released_recursion(kind, k, rate):
    x = draw(kind, (N,))  # at unit variance: the released recursion depends on the scale
    spikes = calibrated((x / x.std()).expand(4, N), k, "reference")
    assert (spikes != 0).double().mean().item() == pytest.approx(rate, abs=noise(rate) + 1e-3)


@pytest.mark.parametrize(("k", "rate"), [(2, 0.425), (4, 0.1105)])
def test_symmetric_rate_on_independent_input_is_the_same_at_every_step(k, rate):
    spikes = calibrated(torch.randn(4, N), k, "symmetric")
    for s in spikes:
        assert (s != 0).double().mean().item() == pytest.approx(rate, abs=noise(rate) + 1e-3)
        assert s.double().mean().item() == pytest.approx(0, abs=4 * s.double().std().item() / math.sqrt(N))


def test_static_input_symmetric_has_zero_mean_and_the_released_one_drifts_down():
    x = torch.randn(N).expand(4, N)
    symmetric, released = (calibrated(x, 2, reset).double() for reset in RESETS)
    assert symmetric.mean(1).abs().max() < 4 * symmetric.std().item() / math.sqrt(N) + 1e-3
    means = released.mean(1).tolist()
    assert all(later < earlier for earlier, later in pairwise(means))
    assert means[1:] == pytest.approx([-0.18, -0.43, -1.02], abs=0.02)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_reference(shape, reset, dtype):
    inputs = make_inputs(shape, dtype)
    got = run(elastic_bispike, inputs, beta=0.3, reset=reset)
    expected = run(elastic_bispike_reference, inputs, beta=0.3, reset=reset)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    for one, other in zip(got[2:], expected[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if dtype is torch.float32 else 1e-12, atol=1e-6)


@pytest.mark.parametrize("reset", RESETS)
def test_two_chunks_equal_one_call(reset):
    def in_chunks(current, v_init, alpha, **options):
        first, v = elastic_bispike(current[:3], v_init, alpha[:3], **options)
        second, v = elastic_bispike(current[3:], v, alpha[3:], **options)
        return torch.cat([first, second]), v

    inputs = make_inputs((7, 2, 5))
    got, expected = run(in_chunks, inputs, reset=reset), run(elastic_bispike, inputs, reset=reset)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("reset", RESETS)
def test_amplitude_has_a_floor_in_the_spikes_only(reset):
    alpha = torch.tensor([0.0, 5e-6, ALPHA_FLOOR * 2], dtype=torch.float64)
    current = torch.ones(3, 2, dtype=torch.float64)
    current[:, 1] = 1e-6  # below half the floor: silent
    inputs = current, torch.zeros(2, dtype=torch.float64), alpha
    spikes, v = elastic_bispike(*inputs, reset=reset)
    assert spikes[:, 0].tolist() == [ALPHA_FLOOR, ALPHA_FLOOR, ALPHA_FLOOR * 2]
    assert spikes[:, 1].tolist() == [0, 0, 0]
    expected_spikes, expected_v = elastic_bispike_reference(*inputs, beta=0.25, reset=reset)
    assert torch.equal(spikes, expected_spikes)
    assert torch.equal(v, expected_v)
    _, v = elastic_bispike(current[:1], inputs[1], alpha[:1], reset=reset)
    carried = [0.0, 0.25 * 1e-6] if reset == "symmetric" else [-0.25 * ALPHA_FLOOR, 0.0]
    assert v.tolist() == pytest.approx(carried, rel=1e-12)


def test_amplitude_below_the_floor_gets_no_gradient():
    alpha = torch.tensor([1e-6, 1.0], requires_grad=True)
    elastic_bispike(torch.full((2, 3), 0.7), torch.zeros(3), alpha).spikes.sum().backward()
    assert alpha.grad[0] == 0
    assert alpha.grad[1] != 0


def test_empty_batch():
    inputs = make_inputs((4, 0, 5))
    spikes, v, grad_current, grad_v, grad_alpha = run(elastic_bispike, inputs)
    assert (spikes.shape, v.shape, grad_current.shape, grad_v.shape) == ((4, 0, 5), (0, 5), (4, 0, 5), (0, 5))
    assert grad_alpha.tolist() == [0, 0, 0, 0]
    _, total = elastic_bispike_measured(*(x.detach() for x in inputs), None)
    assert total.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_membrane(dtype):
    current, v_init = (x.detach().to(dtype) for x in make_inputs((6, 4, 33))[:2])
    alpha = torch.full((6,), 0.75)
    current.requires_grad_()
    spikes, v = elastic_bispike(current, v_init, alpha)
    wide_spikes, wide_v = elastic_bispike(current.detach().float(), v_init.float(), alpha)
    assert (spikes.dtype, v.dtype) == (dtype, torch.float32)
    assert torch.equal(spikes, wide_spikes.to(dtype))
    assert torch.equal(v, wide_v)
    assert torch.autograd.grad(spikes.sum(), current)[0].dtype == dtype


@pytest.mark.parametrize("reset", RESETS)
def test_nan_stays_where_it_is(reset):
    current, v_init, alpha = (x.detach() for x in make_inputs((4, 3)))
    current[1, 0] = math.nan
    current.requires_grad_()
    spikes, v = elastic_bispike(current, v_init, alpha, reset=reset)
    expected = elastic_bispike_reference(current, v_init, alpha, beta=0.25, reset=reset)
    torch.testing.assert_close((spikes, v), tuple(expected), rtol=0, atol=0, equal_nan=True)
    assert spikes[1:, 0].isnan().all()
    (grad,) = torch.autograd.grad(spikes.sum(), current)
    assert grad[:, 1:].isfinite().all()


def test_infinite_input_fires_and_passes_no_gradient():
    current = torch.tensor([[math.inf, -math.inf]], requires_grad=True)
    spikes, _ = elastic_bispike(current, torch.zeros(2), torch.ones(1))
    assert spikes.tolist() == [[1, -1]]
    assert torch.autograd.grad(spikes.sum(), current)[0].tolist() == [[0, 0]]


def test_inputs_are_left_alone():
    inputs = [x.detach() for x in make_inputs((4, 3))]
    before = [x.clone() for x in inputs]
    _, v = elastic_bispike(*inputs)
    v.add_(1)
    assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))


@pytest.mark.parametrize("steps", [1, 4, 32])
def test_saves_one_byte_per_element_and_step(steps, graph_nodes, saved_for_backward):
    current, v_init, alpha = make_inputs((steps, 64), torch.float32)
    with saved_for_backward() as saved:
        spikes, v = elastic_bispike(current, v_init, alpha.detach())
    assert spikes.grad_fn is v.grad_fn
    assert len(graph_nodes(spikes)) == 1
    assert saved.nbytes <= current.numel() + alpha.nbytes


def test_learned_amplitude_saves_the_input_too(saved_for_backward):
    current, v_init, alpha = make_inputs((4, 64), torch.float32)
    with saved_for_backward() as saved:
        elastic_bispike(current, v_init, alpha)
    assert saved.nbytes == current.numel() + alpha.nbytes + current.nbytes + v_init.nbytes


def loop_totals(current, v, alpha, mask, reset):
    totals = []
    for t, x in enumerate(current):
        m = (v + x).abs()
        totals.append(m.sum() if mask is None else m[mask.bool()].sum())
        v = elastic_bispike_reference(x[None], v, alpha[t : t + 1], beta=0.25, reset=reset).v
    return torch.stack(totals)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measured_total_is_the_sum_over_what_counts(reset, masked, dtype):
    inputs = [x.detach() for x in make_inputs((4, 3, 7, 5), dtype)]
    mask = (torch.rand(3, 7) < 0.6).long() if masked else None
    output, total = elastic_bispike_measured(*inputs, mask, reset=reset)
    plain = elastic_bispike(*inputs, reset=reset)
    assert torch.equal(output.spikes, plain.spikes)
    assert torch.equal(output.v, plain.v)
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, loop_totals(*inputs, mask, reset).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_measures_in_full(dtype, masked):
    current = torch.randn(4, 3, 7, 5).to(dtype)
    mask = (torch.rand(3, 7) < 0.6).long() if masked else None
    alpha = torch.ones(4)
    _, total = elastic_bispike_measured(current, torch.zeros(3, 7, 5), alpha, mask)
    expected = loop_totals(current.float(), torch.zeros(3, 7, 5), alpha, mask, "symmetric")
    torch.testing.assert_close(total, expected.double(), rtol=1e-5, atol=0)


def test_measured_total_carries_no_gradient_and_survives_an_empty_mask():
    current, v_init, alpha = make_inputs((2, 3, 4))
    output, total = elastic_bispike_measured(current, v_init, alpha, torch.zeros(3))
    assert total.tolist() == [0, 0]
    assert not total.requires_grad
    assert output.spikes.requires_grad


@pytest.mark.parametrize(
    ("current", "v_init", "steps", "options", "error", "message"),
    [
        ((4, 3), (4, 3), 4, {}, ValueError, r"v_init \(4, 3\) must equal current without T \(3,\)"),
        ((0, 3), (3,), 0, {}, ValueError, r"at least one time step on axis 0, got shape \(0, 3\)"),
        ((), (), 1, {}, ValueError, "at least one time step"),
        ((4, 3), (3,), 3, {}, ValueError, r"one value per time step, shape \(4,\), got \(3,\)"),
        ((4, 3), (3,), 4, {"reset": "hard"}, ValueError, "unknown reset 'hard'; use one of symmetric, reference"),
        ((4, 3), (3,), 4, {"backend": "cuda"}, BackendError, "unknown backend 'cuda'"),
        ((4, 3), (3,), 4, {"backend": "cupy"}, BackendError, "use 'auto' or 'torch'"),
    ],
)
def test_errors(current, v_init, steps, options, error, message):
    with pytest.raises(error, match=message):
        elastic_bispike(torch.zeros(current), torch.zeros(v_init), torch.ones(steps), **options)
