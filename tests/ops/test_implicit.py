import gc
import re
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from snlp_zoo.errors import ConvergenceError, SnlpError
from snlp_zoo.ops.fixed_point import SOLVERS
from snlp_zoo.ops.implicit import Adjoint, fixed_point

N = 8
START = torch.zeros(N, dtype=torch.float64)
TIGHT = {"tol": 1e-14, "max_iter": 200}


def rates(z, weight, bias):
    """Steady state of spiking neurons with feedback: a = clip(W a + b, 0, 1)."""
    return (z @ weight.T + bias).clamp(0, 1)


def net(norm=0.5, n=N):
    """W with ||W||_2 = norm, b and an upstream gradient; pre-activations off the kinks, most of them between."""
    while True:
        weight = torch.randn(n, n, dtype=torch.float64)
        weight *= norm / torch.linalg.matrix_norm(weight, 2)
        bias = torch.rand(n, dtype=torch.float64)
        a = fixed_point(rates, torch.zeros(n, dtype=torch.float64), (weight, bias), **TIGHT).value
        pre = a @ weight.T + bias
        if torch.minimum(pre.abs(), (pre - 1).abs()).min() > 1e-3 and ((pre > 0) & (pre < 1)).sum() >= n - 2:
            return weight.requires_grad_(), bias.requires_grad_(), torch.randn(n, dtype=torch.float64)


def gradient(weight, bias, upstream, **options):
    found = fixed_point(rates, START, (weight, bias), **{**TIGHT, **options})
    return torch.cat([g.flatten() for g in torch.autograd.grad(found.value, (weight, bias), upstream)])


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradient_against_central_differences(solver):
    weight, bias, upstream = net()
    numeric = []
    with torch.no_grad():
        for parameter in (weight, bias):
            for i in range(parameter.numel()):
                sides = []
                for shift in (1e-6, -1e-6):
                    moved = parameter.clone()
                    moved.view(-1)[i] += shift
                    params = (moved, bias) if parameter is weight else (weight, moved)
                    sides.append(fixed_point(rates, START, params, **TIGHT).value @ upstream)
                numeric.append((sides[0] - sides[1]) / 2e-6)
    assert relative(gradient(weight, bias, upstream, solver=solver), torch.stack(numeric)) < 1e-8


def test_gradcheck():
    weight, bias, _ = net(n=3)
    start = torch.zeros(2, 3, dtype=torch.float64)
    for f in (rates, lambda z, w, b: torch.tanh(z @ w.T + b)):
        assert torch.autograd.gradcheck(
            lambda *params, f=f: fixed_point(f, start, params, **TIGHT).value, (weight, bias)
        )


def test_neumann_is_the_unrolled_gradient():
    weight, bias, upstream = net()
    exact = gradient(weight, bias, upstream)
    start = fixed_point(rates, START, (weight, bias), **TIGHT).value.detach()
    errors = []
    for terms in (1, 2, 5, 10, 20):
        a = start
        for _ in range(terms):
            a = rates(a, weight, bias)
        unrolled = torch.cat([g.flatten() for g in torch.autograd.grad(a, (weight, bias), upstream)])
        truncated = gradient(weight, bias, upstream, backward=terms)
        torch.testing.assert_close(truncated, unrolled, rtol=1e-12, atol=1e-12)
        errors.append(relative(truncated, exact))
        # gradient for b: D lambda, D = 1 for units not saturated; D (lambda - lambda_K) = D (J^T)^K lambda, J = D W
        assert errors[-1] <= 0.5**terms
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.05
    assert errors[-1] < 1e-7


@pytest.mark.parametrize("solver", SOLVERS)
def test_adjoint_against_direct_solve(solver):
    weight, bias, upstream = net(0.9)
    found = fixed_point(rates, START, (weight, bias), solver=solver, max_iter=500, tol=1e-14)
    assert found.adjoint == Adjoint(None, None)
    (got,) = torch.autograd.grad(found.value, bias, upstream)
    free = ((found.value > 0) & (found.value < 1)).double()
    jacobian = free[:, None] * weight.detach()
    exact = free * torch.linalg.solve(torch.eye(N, dtype=torch.float64) - jacobian.T, upstream)
    torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)
    assert found.adjoint.iterations > 2
    assert found.adjoint.residual <= 1e-14


@pytest.mark.parametrize("backward", ["solve", 1, 3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_without_feedback_it_is_plain_autograd(solver, backward):
    weight, x = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    f = lambda z: torch.tanh(x @ weight.T)  # noqa: E731
    found = fixed_point(f, torch.zeros(3, 5), solver=solver, backward=backward)
    plain, upstream = f(None), torch.randn(3, 5)
    assert torch.equal(found.value, plain)
    for got, expected in zip(
        *(torch.autograd.grad(v, (weight, x), upstream) for v in (found.value, plain)), strict=True
    ):
        assert torch.equal(got, expected)
    assert (found.iterations, found.residual) == (2, 0.0)
    if backward == "solve":
        assert found.adjoint == Adjoint(1, 0.0)


def test_feedback_of_zero_weight_is_plain_autograd():
    weight, bias = torch.zeros(4, 4, requires_grad=True), torch.rand(4, requires_grad=True)
    found = fixed_point(rates, torch.zeros(4), (weight, bias))
    upstream = torch.randn(4)
    assert torch.equal(torch.autograd.grad(found.value, bias, upstream)[0], upstream)
    assert found.adjoint == Adjoint(1, 0.0)


def test_truncation_reports_the_last_share():
    z = torch.ones(1, dtype=torch.float64, requires_grad=True)
    found = fixed_point(lambda a: a / 2 + z, torch.zeros(1, dtype=torch.float64), backward=3)
    assert torch.autograd.grad(found.value, z)[0].item() == 1.75
    assert found.adjoint == Adjoint(3, 0.25 / 1.75)


def test_closure_and_params_get_the_same_gradient():
    weight, bias, upstream = net()
    direct = fixed_point(rates, START, (weight, bias)).value
    closed = fixed_point(lambda z: rates(z, weight, bias), START).value
    assert torch.equal(direct, closed)
    for pair in zip(*(torch.autograd.grad(v, (weight, bias), upstream) for v in (direct, closed)), strict=True):
        assert torch.equal(*pair)


def test_gradient_goes_on_to_what_came_before_but_not_to_the_start():
    weight, bias, upstream = net()
    start, gain = torch.rand(N, dtype=torch.float64, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    value = fixed_point(rates, start, (weight, bias * gain)).value
    value.backward(upstream)
    assert start.grad is None
    torch.testing.assert_close(gain.grad.double(), bias.grad @ bias.detach(), rtol=1e-6, atol=1e-6)


def test_twice_in_one_graph():
    weight, bias, upstream = net()
    first = fixed_point(rates, START, (weight, bias), **TIGHT)
    second = fixed_point(rates, START, (weight, first.value), **TIGHT)
    one, two = torch.autograd.grad(second.value, (weight, bias), upstream)

    a = b = START
    for _ in range(60):
        a = rates(a, weight, bias)
    for _ in range(60):
        b = rates(b, weight, a)
    expected = torch.autograd.grad(b, (weight, bias), upstream)
    torch.testing.assert_close((one, two), expected, rtol=1e-10, atol=1e-10)
    assert first.adjoint.iterations
    assert second.adjoint.iterations


def test_each_turn_of_a_loop_keeps_its_own_function():
    gains, outputs = torch.tensor([0.25, 0.5], requires_grad=True), []
    for gain in gains.unbind():
        outputs.append(fixed_point(lambda z: gain * z + 1, torch.zeros(1)).value)  # noqa: B023
    (got,) = torch.autograd.grad(torch.cat(outputs).sum(), gains)
    torch.testing.assert_close(got, torch.tensor([1 / 0.75**2, 1 / 0.5**2]), rtol=1e-5, atol=0)


def test_backward_a_second_time():
    weight, bias, upstream = net()
    value = fixed_point(rates, START, (weight, bias)).value
    once, twice = (torch.autograd.grad(value, bias, upstream, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(once, twice)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, bias, upstream)


def test_second_derivative_is_refused():
    weight, bias, _ = net()
    (first,) = torch.autograd.grad(
        fixed_point(rates, START, (weight, bias)).value.square().sum(), bias, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("where", ["around", "inside"])
def test_activation_checkpointing(where):
    weight, bias, upstream = net()

    def layer(x, f):
        return fixed_point(f, START, (weight, x)).value * 2

    def inside(z, *params):
        return checkpoint(rates, z, *params, use_reentrant=False)

    plain = layer(bias, rates)
    kept = layer(bias, inside) if where == "inside" else checkpoint(layer, bias, rates, use_reentrant=False)
    assert torch.equal(plain, kept)
    for pair in zip(*(torch.autograd.grad(v, (weight, bias), upstream) for v in (plain, kept)), strict=True):
        assert torch.equal(*pair)


def test_memory_is_one_application(saved_for_backward):
    weight, bias, _ = net(0.9)
    with saved_for_backward() as once:
        rates(START.clone().requires_grad_(), weight, bias)
    with saved_for_backward() as solved:
        fixed_point(rates, START, (weight, bias))
    assert solved.nbytes == once.nbytes


def test_graph_is_freed_with_the_value():
    weight, bias, _ = net()
    gc.disable()
    try:
        x = bias * 1
        watched, value = weakref.ref(x), fixed_point(rates, START, (weight, x)).value
        value.sum().backward()
        del x, value
        assert watched() is None
    finally:
        gc.enable()


def test_value_may_change_in_place():
    weight, bias, upstream = net()
    outputs = [fixed_point(rates, START, (weight, bias)).value for _ in range(2)]
    outputs[1].mul_(2)
    plain, doubled = (torch.autograd.grad(v, bias, upstream)[0] for v in outputs)
    torch.testing.assert_close(doubled, 2 * plain)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_without_gradients(mode):
    weight, bias, _ = net()
    with mode():
        found = fixed_point(rates, START, (weight, bias))
    assert not found.value.requires_grad
    assert torch.equal(found.value, fixed_point(rates, START, (weight, bias)).value)
    assert found.adjoint == Adjoint(None, None)


def test_what_f_returns_stays_as_it_is():
    constant = torch.ones(3)
    found = fixed_point(lambda z: constant, torch.zeros(3))
    assert not constant.requires_grad
    assert not found.value.requires_grad


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3, N)], ids=str)
@pytest.mark.parametrize("backward", ["solve", 4])
def test_float32_in_any_shape(shape, backward):
    gain = torch.tensor(0.5, requires_grad=True)
    found = fixed_point(lambda z: gain * z + 1, torch.zeros(shape), backward=backward)
    found.value.sum().backward()
    count = found.value.numel()
    torch.testing.assert_close(found.value, torch.full(shape, 2.0))  # 1 / (1 - g), derivative 1 / (1 - g)^2
    torch.testing.assert_close(
        gain.grad, torch.tensor(count * (4.0 if backward == "solve" else 3.75)), rtol=1e-5, atol=0
    )


def test_exact_start():
    weight, bias, upstream = net()
    found = fixed_point(rates, START, (weight, bias), **TIGHT)
    again = fixed_point(rates, found.value, (weight, bias))
    assert again.iterations == 1
    torch.testing.assert_close(
        *(torch.autograd.grad(v.value, bias, upstream)[0] for v in (found, again)), rtol=1e-7, atol=1e-7
    )


ADVICE = "; try more iterations (max_iter), weaker feedback weights or a larger tolerance (tol)"


def raises(message):
    return pytest.raises(ConvergenceError, match=f"^{re.escape(message + ADVICE)}$")


def test_forward_that_does_not_converge():
    f = lambda z: 2 * z + 1  # noqa: E731
    with raises("block 3: the forward solve ended with residual 5.7e-01 after 3 iterations, needed is 1.0e-08"):
        # 0, 1, 3: 4 / (7 + 1e-4)
        fixed_point(f, torch.zeros(1, dtype=torch.float64), solver="picard", max_iter=3, name="block 3")
    with raises("fixed_point: the forward solve ended with residual 5.7e-01 after 3 iterations, needed is 1.9e-06"):
        fixed_point(f, torch.zeros(1), solver="picard", max_iter=3)
    assert issubclass(ConvergenceError, SnlpError)


def test_backward_that_does_not_converge():
    gain = torch.tensor(2.0, requires_grad=True)
    found = fixed_point(lambda z: gain * z, torch.zeros(3), solver="picard", max_iter=4, name="block 3")
    with raises("block 3: the backward solve ended with residual 5.2e-01 after 4 iterations, needed is 1.9e-06"):
        # lambda 1, 3, 7, 15 times grad: 16 / 31
        found.value.sum().backward()
    assert found.adjoint.iterations == 4


@pytest.mark.parametrize("solver", SOLVERS)
def test_not_finite(solver):
    with raises("fixed_point: the forward solve ended with residual nan after 2 iterations, needed is 1.9e-06"):
        fixed_point(lambda z: (z - 0.5).log(), torch.ones(2), solver=solver)
    gain = torch.tensor(0.5, requires_grad=True)
    for backward, after, needed in (("solve", 1, "1.9e-06"), (3, 3, "inf")):
        value = fixed_point(lambda z: gain * z + 1, torch.zeros(2), solver=solver, backward=backward).value
        message = f"the backward solve ended with residual nan after {after} iterations, needed is {needed}"
        with raises(f"fixed_point: {message}"):
            (value * torch.inf).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "broyden"}, "solver must be one of anderson, picard, got 'broyden'"),
        ({"backward": 0}, "backward must be 'solve' or a positive number of Neumann terms, got 0"),
        ({"backward": True}, "backward must be 'solve' or a positive number of Neumann terms, got True"),
        ({"backward": "neumann"}, "backward must be 'solve' or a positive number of Neumann terms, got 'neumann'"),
    ],
    ids=str,
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=f"^block 3: {re.escape(message)}$"):
        fixed_point(lambda z: z, torch.zeros(3), **options, name="block 3")


def test_wrong_tensors():
    for dtype in (torch.int64, torch.bfloat16):
        with pytest.raises(ValueError, match=f"^fixed_point: z0 must be torch.float32 or torch.float64, got {dtype}$"):
            fixed_point(lambda z: z, torch.zeros(3, dtype=dtype))
    with pytest.raises(ValueError, match=r"\(3,\) torch.float32, got \(2, 3\) torch.float32$"):
        fixed_point(lambda z: z.expand(2, 3), torch.zeros(3))
