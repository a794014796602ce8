import pytest
import torch

from snlp_zoo.ops.fixed_point import MEMORY, SOLVERS, anderson, picard, reachable

solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def contraction(n, norm, dtype=torch.float64):
    """A matrix with this spectral norm and a vector."""
    weight = torch.randn(n, n, dtype=dtype)
    return weight * (norm / torch.linalg.matrix_norm(weight, 2)), torch.randn(n, dtype=dtype)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)], ids=str)
@solvers
def test_linear_against_direct_solve(solver, shape):
    weight, bias = contraction(8, 0.8)
    found = solver(lambda z: z @ weight.T + bias, torch.zeros(shape, dtype=torch.float64), max_iter=300, tol=1e-13)
    exact = torch.linalg.solve(torch.eye(8, dtype=torch.float64) - weight, bias)
    torch.testing.assert_close(found.value, exact.expand(shape), rtol=1e-11, atol=1e-11)
    assert found.residual <= 1e-13


def test_picard_by_hand():
    found = picard(lambda z: z / 2 + 1, torch.zeros((), dtype=torch.float64), max_iter=3, tol=1e-8)
    assert found.value == 1.5  # 0, 1, 1.5
    assert found.iterations == 3
    assert found.residual == pytest.approx(0.25 / (1.75 + 1e-4), rel=1e-12)  # f(0) = 1


def test_anderson_is_exact_on_a_line():
    found = anderson(lambda z: 0.95 * z + 1, torch.zeros((), dtype=torch.float64), max_iter=50, tol=1e-12)
    assert found.iterations == 3  # two points give the line
    torch.testing.assert_close(found.value, torch.tensor(20.0, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_anderson_needs_fewer_iterations(symmetric):
    weight, bias = contraction(16, 0.95)
    weight = torch.linalg.qr(weight)[0] * 0.95  # |J| = 0.95 in each direction
    if symmetric:
        weight = weight @ torch.linspace(-0.5, 0.95, 16, dtype=torch.float64).diag() @ weight.T / 0.95**2
    slow, fast = (
        solver(lambda z: z @ weight.T + bias, torch.zeros_like(bias), max_iter=1000, tol=1e-8)
        for solver in (picard, anderson)
    )
    assert max(slow.residual, fast.residual) <= 1e-8
    assert fast.iterations < slow.iterations / (4 if symmetric else 1)


@pytest.mark.parametrize("norm", [0.5, 0.99])
@solvers
def test_clipped_nets(solver, norm):
    for n in (4, 32, 128):
        weight, bias = contraction(n, norm)
        found = solver(lambda z: (z @ weight.T + bias).clamp(0, 1), torch.zeros_like(bias), max_iter=200, tol=1e-12)  # noqa: B023
        assert found.residual <= 1e-12


@pytest.mark.parametrize("shape", [(), (8,), (0,), (2, 0, 3)], ids=str)
@solvers
def test_exact_start(solver, shape):
    start = torch.rand(shape)
    found = solver(lambda z: z.clamp(0, 1), start, max_iter=5, tol=0.0)
    assert (found.iterations, found.residual) == (1, 0.0)
    assert torch.equal(found.value, start)


@pytest.mark.parametrize("start", [0.0, 1.0, 1e6])
@solvers
def test_zero_is_reached(solver, start):
    start = torch.full((3,), start)
    assert solver(torch.zeros_like, start, max_iter=5, tol=0.0)[1:] == (1 if start[0] == 0 else 2, 0.0)
    shrunk = solver(lambda z: z / 2, start, max_iter=60, tol=1e-6)
    assert shrunk.residual <= reachable(1e-6, torch.float32)


@pytest.mark.parametrize("unit", [1e-9, 1e9])
@solvers
def test_residual_has_no_unit(solver, unit):
    weight, bias = contraction(8, 0.5)
    plain, scaled = (
        solver(lambda z, b=b: z @ weight.T + b, torch.zeros_like(bias), max_iter=100, tol=1e-10)
        for b in (bias, bias * unit)
    )
    assert plain.iterations == scaled.iterations
    torch.testing.assert_close(scaled.value / unit, plain.value, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@solvers
def test_any_tolerance_within_rounding_is_reached(solver, dtype):
    weight, bias = contraction(64, 0.9, dtype)
    found = solver(lambda z: torch.tanh(z @ weight.T + bias), torch.zeros(16, 64, dtype=dtype), max_iter=200, tol=0.0)
    assert found.value.dtype == dtype
    assert found.residual <= reachable(0.0, dtype) == 16 * torch.finfo(dtype).eps


def test_singular_history():
    # two points in turn: all differences lie on one line, then repeat
    anderson(lambda z: -z, torch.ones(3), max_iter=20, tol=0.0)
    flips = torch.tensor([1.0, -1.0]).repeat(10).tolist()
    stuck = anderson(lambda z: z + flips.pop(), torch.zeros(3), max_iter=20, tol=0.0)
    still = anderson(lambda z: z + 1, torch.zeros(3), max_iter=20, tol=0.0)  # no fixed point, constant residual vector
    for found in (stuck, still):
        assert found.value.isfinite().all()
        assert found.iterations == 20


@solvers
def test_best_iterate_is_returned(solver):
    images = [torch.tensor([x]) for x in (10.0, 10.5, 90.0, -400.0)]
    seen = []

    def f(z):
        seen.append(z)
        return images[len(seen) - 1]

    found = solver(f, torch.ones(1), max_iter=4, tol=0.0)
    assert found.iterations == 4
    assert found.value is seen[1]
    assert found.residual == pytest.approx(0.5 / 10.501, rel=1e-6)


@solvers
def test_stops_at_once_when_not_finite(solver):
    start = torch.ones(2)
    for bad in (torch.nan, torch.inf):
        found = solver(lambda z, bad=bad: z * bad, start, max_iter=50, tol=1e-6)
        assert found.iterations == 1
        assert found.residual != found.residual
        assert torch.equal(found.value, start)


@solvers
def test_no_graph(solver):
    weight = torch.full((2,), 0.5, requires_grad=True)
    assert not solver(lambda z: z * weight + 1, torch.zeros(2), max_iter=50, tol=1e-6).value.requires_grad


def test_under_autocast():
    weight, bias = contraction(8, 0.9, torch.float32)
    f = lambda z: torch.tanh((z * weight).sum(-1) + bias)  # noqa: E731
    outside = anderson(f, torch.zeros(8), max_iter=50, tol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = anderson(f, torch.zeros(8), max_iter=50, tol=1e-6)
    assert torch.equal(inside.value, outside.value)


@solvers
def test_shape_and_dtype_stay(solver):
    with pytest.raises(
        ValueError,
        match=r"f must return the shape and dtype of z, \(3,\) torch.float32, got \(1, 3\) torch.float32$",
    ):
        solver(lambda z: z[None], torch.zeros(3), max_iter=5, tol=1e-6)
    with pytest.raises(ValueError, match=r"\(3,\) torch.float32, got \(3,\) torch.float64$"):
        solver(lambda z: z.double(), torch.zeros(3), max_iter=5, tol=1e-6)
    with pytest.raises(ValueError, match="max_iter must be at least 1, got 0"):
        solver(lambda z: z, torch.zeros(3), max_iter=0, tol=1e-6)


def test_memory_is_bounded():
    assert MEMORY == 5
    weight, bias = contraction(4, 0.9)
    found = anderson(lambda z: z @ weight.T + bias, torch.zeros_like(bias), max_iter=50, tol=1e-10)
    assert found.iterations <= 9  # as many steps as dimensions span the space, then a few for the ridge
