"""Spike counts of an adaptive threshold: the golden vector, edges, and what is refused."""

import math

import pytest
import torch

from snlp_zoo.errors import BackendError
from snlp_zoo.ops.backend import INTERPRETED
from snlp_zoo.ops.counts import V_MAX, V_MIN, counts

BACKENDS = ["torch", "triton"] if INTERPRETED else ["torch"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@every_backend
def test_golden_vector(backend):
    n, threshold = counts(torch.tensor([0.1, -0.5, 2.0, -0.05]), 3, backend=backend)
    torch.testing.assert_close(threshold, torch.tensor([0.2208333]), rtol=0, atol=1e-7)
    assert n.tolist() == [0, -2, 9, 0]
    torch.testing.assert_close(n * threshold, torch.tensor([0, -0.4416667, 1.9875, 0]), rtol=0, atol=1e-6)


@every_backend
def test_ties_go_to_even(backend):
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 4.0])  # mean magnitude 2.0625
    n, threshold = counts(x, 2.0625, backend=backend)
    assert threshold.item() == 1
    assert n.tolist() == [0, 2, 2, 4, 0, -2, -2, 4]


@every_backend
def test_clipping(backend):
    x = torch.tensor([[0.0, 1.0, -4.0, 15.0]])  # V = 1 for k = 5
    assert counts(x, 5, backend=backend).counts.tolist() == [[0, 1, -4, 15]]
    assert counts(x, 5, max_count=3, backend=backend).counts.tolist() == [[0, 1, -3, 3]]
    n = counts(x * torch.tensor([[1.0], [1e3]]), 5, max_count=7, dtype=torch.int8, backend=backend).counts
    assert n.dtype == torch.int8
    assert n.tolist() == [[0, 1, -4, 7]] * 2


@every_backend
@pytest.mark.parametrize("max_count", [None, 2])
def test_scaled_counts_are_what_the_spikes_are_worth(backend, max_count):
    x = torch.randn(5, 77) * 3
    n, threshold = counts(x, 3, max_count=max_count, backend=backend)
    rounding = [torch.float32, torch.float16]  # Triton's interpreter does not round to bfloat16
    for dtype in [*rounding, torch.bfloat16] if backend == "torch" else rounding:
        scaled, same = counts(x, 3, max_count=max_count, dtype=dtype, scaled=True, backend=backend)
        assert torch.equal(scaled, (n * threshold).to(dtype))
        assert torch.equal(same, threshold)


@every_backend
def test_thresholds_have_limits(backend):
    n, threshold = counts(torch.tensor([[0.0, 0.0], [1e-9, 1e-9], [1e6, -1e6]]), 3, backend=backend)
    torch.testing.assert_close(threshold.flatten(), torch.tensor([V_MIN, V_MIN, V_MAX]), rtol=1e-7, atol=0)
    assert n.tolist() == [[0, 0], [0, 0], [100, -100]]


@every_backend
def test_large_counts_are_whole(backend):
    """Around 2^22 and 2^23, where float32 stops to hold fractions, and far above."""
    quotients = torch.tensor(
        [2.0**22 + 0.5, 2.0**22 + 1.5, 2.0**23 - 0.5, 2.0**23 + 1, 2.0**30, 1e30, -(2.0**23) + 0.5]
    )
    n, threshold = counts(quotients * V_MAX, 1, backend=backend)
    assert threshold.item() == V_MAX
    assert torch.equal(n, (quotients * V_MAX / V_MAX).round())


@every_backend
def test_what_is_not_finite_is_seen(backend):
    x = torch.tensor([[1.0, math.nan, 2.0], [1.0, math.inf, -math.inf], [1.0, 2.0, 3.0]])
    n, threshold = counts(x, 3, backend=backend)
    assert n[0].isnan().all()
    assert threshold[0].isnan().all()
    assert n[1].tolist() == [0, math.inf, -math.inf]
    assert threshold[1] == V_MAX
    assert n[2].isfinite().all()
    n = counts(x, 3, max_count=5, backend=backend).counts
    assert n[0].isnan().all()
    assert n[1].tolist() == [0, 5, -5]


@pytest.mark.parametrize("dtype", FLOATS)
def test_precision(dtype):
    x = torch.randn(4, 33, dtype=dtype)
    n, threshold = counts(x, 3)
    assert n.dtype == dtype
    assert threshold.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = x.double().abs().mean(-1, keepdim=True) / 3
    torch.testing.assert_close(threshold.double(), exact, rtol=1e-6 if dtype != torch.float64 else 1e-14, atol=0)
    for counted in (torch.int8, *FLOATS):
        again = counts(x, 3, max_count=100, dtype=counted).counts
        assert again.dtype == counted
        assert torch.equal(again.double(), n.double())


def test_gaussian_input():
    """Shares on Gaussian input, each within four standard errors: P(|n| <= 7), P(n = 0) and mean set bits."""
    n = counts(torch.randn(256, 4096), 3).counts.abs()
    bits = torch.tensor([float(i.bit_count()) for i in range(int(n.max()) + 1)])
    for got, expected, spread in [
        ((n <= 7).float().mean(), 0.954, 0.0005),
        ((n == 0).float().mean(), 0.106, 0.0005),
        (bits[n.long()].mean(), 1.30, 0.005),
    ]:
        assert abs(got.item() - expected) < 4 * 0.5 / 1024 + spread


@every_backend
def test_a_token_does_not_depend_on_its_companions(backend):
    x = torch.randn(70, 131)
    n, threshold = counts(x, 3, backend=backend)
    for first, last in ((0, 1), (3, 20), (69, 70)):
        some = counts(x[first:last].clone(), 3, backend=backend)
        assert torch.equal(some.threshold, threshold[first:last])
        assert torch.equal(some.counts, n[first:last])


@every_backend
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 3), (3,), (1, 1), (2, 3, 4, 5)], ids=str)
def test_shapes(backend, shape):
    n, threshold = counts(torch.randn(shape), 3, max_count=7, dtype=torch.int8, backend=backend)
    assert n.shape == shape
    assert threshold.shape == (*shape[:-1], 1)


@every_backend
def test_no_graph_and_input_left_alone(backend, saved_for_backward):
    x = torch.randn(3, 5, requires_grad=True)
    before = x.detach().clone()
    with saved_for_backward() as saved:
        n, threshold = counts(x, 3, backend=backend)
    assert not n.requires_grad
    assert not threshold.requires_grad
    assert saved.nbytes == 0
    n.add_(1)
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_whole(backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: counts(x, 3, max_count=7, dtype=torch.int8, backend=backend), fullgraph=True, backend="aot_eager"
    )
    for shape in ((2, 5), (3, 7), (4, 9)):
        x = torch.randn(shape, requires_grad=True)
        for one, other in zip(compiled(x), counts(x, 3, max_count=7, dtype=torch.int8), strict=True):
            assert torch.equal(one, other)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(2, 0), {}, r"needs at least one channel on its last axis, got shape \(2, 0\)"),
        (torch.zeros(()), {}, r"needs at least one channel on its last axis, got shape \(\)"),
        (torch.zeros(3, dtype=torch.int64), {}, "x must be float32, float64, bfloat16 or float16, got torch.int64"),
        (torch.zeros(3), {"threshold_scale": 0}, "threshold_scale must be positive and finite, got 0"),
        (torch.zeros(3), {"threshold_scale": -1.0}, "threshold_scale must be positive and finite, got -1.0"),
        (torch.zeros(3), {"threshold_scale": math.inf}, "threshold_scale must be positive and finite, got inf"),
        (torch.zeros(3), {"threshold_scale": math.nan}, "threshold_scale must be positive and finite, got nan"),
        (torch.zeros(3), {"max_count": 0}, "max_count must be a whole number from 1, or None for no limit, got 0"),
        (torch.zeros(3), {"max_count": 2.5}, "max_count must be a whole number from 1"),
        (torch.zeros(3), {"max_count": math.inf}, "max_count must be a whole number from 1"),
        (torch.zeros(3), {"dtype": torch.int8}, "int8 holds counts to 127, got max_count None; pass max_count=127"),
        (torch.zeros(3), {"dtype": torch.int8, "max_count": 128}, "int8 holds counts to 127, got max_count 128"),
        (
            torch.zeros(3),
            {"dtype": torch.int8, "max_count": 7, "scaled": True},
            "int8 holds whole numbers; leave scaled",
        ),
        (torch.zeros(3), {"dtype": torch.int32}, "counts are int8, bfloat16, float16, float32 or float64, got torch.i"),
    ],
)
def test_errors_say_what_is_wrong(x, options, message):
    with pytest.raises(ValueError, match=f"^counts: .*{message}"):
        counts(x, **({"threshold_scale": 3} | options))


def test_no_cupy_kernel():
    with pytest.raises(BackendError, match="counts: backend 'cupy' cannot run: this version has no cupy kernel"):
        counts(torch.zeros(1), 3, backend="cupy")
    with pytest.raises(BackendError, match="counts: unknown backend 'cuda'"):
        counts(torch.zeros(1), 3, backend="cuda")
