"""Counts times int8 weights: sums are exact, in every shape, on every backend."""

import math

import pytest
import torch

from snlp_zoo.errors import BackendError
from snlp_zoo.ops.backend import INTERPRETED
from snlp_zoo.ops.counts import counts
from snlp_zoo.ops.int8_linear import INPUTS, int8_linear, quantise_int8, reference

BACKENDS = ["torch", "triton"] if INTERPRETED else ["torch"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def ones(rows, outputs):
    return torch.ones(rows, 1), torch.ones(outputs)


def exact(n, weight):
    """The sums in int64."""
    return n.long() @ weight.long().mT


def test_weights_by_hand():
    weight = torch.tensor([[127.0, -63.5, 1.5, 0.5], [0.0, -2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    signs, scale = quantise_int8(weight)
    assert signs.tolist() == [[127, -64, 2, 0], [0, -127, 64, 127], [0, 0, 0, 0]]
    torch.testing.assert_close(scale, torch.tensor([1, 2 / 127, 1]), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_within_half_a_step(dtype):
    weight = torch.nn.Parameter((torch.randn(17, 33) * torch.logspace(-3, 3, 17)[:, None]).to(dtype))
    small, scale = quantise_int8(weight)
    assert (small.dtype, scale.dtype, scale.requires_grad) == (torch.int8, torch.float32, False)
    assert (small.abs().amax(1) == 127).all()
    error = (small.double() * scale.double()[:, None] - weight.detach().double()).abs().amax(1)
    assert (error <= 0.5001 * scale).all()


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 3e38])
def test_weights_at_the_edge_of_float32(largest):
    small, scale = quantise_int8(torch.tensor([[largest, -largest, 0.0]]))
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert small[0, 2] == 0
    assert small[0, 0] == -small[0, 1]


@every_backend
@pytest.mark.parametrize("value", [127, -127])
def test_extreme_sums_are_exact(backend, value):
    n, weight = torch.full((2, 4096), 127, dtype=torch.int8), torch.full((3, 4096), value, dtype=torch.int8)
    n[1, 5] = 0
    y = int8_linear(n, weight, *ones(2, 3), dtype=torch.float32, backend=backend)
    assert torch.equal(y, (exact(n, weight)).float())  # 127^2 * 4096 is past 2^24 and a float32 even so


@every_backend
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 1, 1), (1, 576, 192), (16, 33, 5), (17, 31, 40), (33, 257, 17), (40, 128, 64), (150, 100, 70)],
)
def test_sums_are_exact_in_every_shape(backend, rows, inputs, outputs):
    n, weight = draw(rows, inputs), draw(outputs, inputs)
    y = int8_linear(n, weight, *ones(rows, outputs), dtype=torch.float32, backend=backend)
    assert torch.equal(y, exact(n, weight).float())


@pytest.mark.parametrize("inputs", [reference._FLOAT32_INPUTS, reference._FLOAT32_INPUTS + 1, 5000])
def test_sums_are_exact_without_integer_instructions(monkeypatch, inputs):
    monkeypatch.setattr(reference, "_INTEGERS", False)
    n, weight = torch.full((2, inputs), -128, dtype=torch.int8), torch.full((2, inputs), -128, dtype=torch.int8)
    n[1, 0], weight[0, 1] = 127, 1
    y = int8_linear(n, weight, *ones(2, 2), dtype=torch.float64)
    assert torch.equal(y, exact(n, weight).double())


def test_float64_is_integer_arithmetic():
    """Scales that are powers of two: nothing rounds, whatever the sums."""
    n, weight = draw(2, 3, 4096), draw(7, 4096)
    threshold, scale = 2.0 ** torch.randint(-9, 9, (2, 3, 1)), 2.0 ** torch.randint(-9, 9, (7,))
    y = int8_linear(n, weight, threshold, scale, dtype=torch.float64)
    assert y.dtype == torch.float64
    assert torch.equal(y, exact(n, weight).double() * threshold.double() * scale.double())


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_scales_and_bias(backend, dtype, biased):
    n, weight = draw(2, 9, 70), draw(21, 70)
    threshold, scale = torch.rand(2, 9, 1), torch.rand(21) / 1e3
    bias = torch.nn.Parameter(torch.randn(21).to(dtype)) if biased else None
    y = int8_linear(n, weight, threshold, scale, bias, dtype=dtype, backend=backend)
    expected = exact(n, weight).double() * threshold.double() * scale.double()
    expected = expected if bias is None else expected + bias.detach().double()
    assert (y.dtype, y.requires_grad) == (dtype, False)
    # the interpreter truncates to bfloat16 where a device rounds
    precision = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=precision, atol=1e-6)


@every_backend
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (2, 3, 1, 5)], ids=str)
def test_shapes(backend, shape):
    n, weight = draw(*shape), draw(3, 5)
    y = int8_linear(n, weight, torch.ones(*shape[:-1], 1), torch.ones(3), dtype=torch.bfloat16, backend=backend)
    assert y.shape == (*shape[:-1], 3)
    assert y.dtype == torch.bfloat16


@every_backend
def test_any_layout(backend):
    n, weight = draw(40, 6, 2).transpose(0, 1)[..., 0], draw(40, 10)[:, ::2].T
    threshold, scale = torch.rand(6, 2)[:, :1], torch.rand(10)[::2]
    y = int8_linear(n, weight, threshold, scale, dtype=torch.float32, backend=backend)
    expected = int8_linear(
        *(x.contiguous() for x in (n, weight, threshold, scale)), dtype=torch.float32, backend="torch"
    )
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@every_backend
def test_a_token_does_not_depend_on_its_companions(backend):
    n, weight, threshold, scale = draw(70, 45), draw(8, 45), torch.rand(70, 1), torch.rand(8)
    y = int8_linear(n, weight, threshold, scale, dtype=torch.float32, backend=backend)
    for first, last in ((0, 1), (3, 24), (5, 45)):
        some = int8_linear(n[first:last], weight, threshold[first:last], scale, dtype=torch.float32, backend=backend)
        assert torch.equal(some, y[first:last])


@every_backend
def test_nan_in_the_threshold_is_seen(backend):
    x = torch.tensor([[1.0, math.nan], [1.0, 2.0]])
    n, threshold = counts(x, 3, max_count=127, dtype=torch.int8, backend="torch")
    y = int8_linear(n, draw(3, 2), threshold, torch.ones(3), dtype=torch.bfloat16, backend=backend)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_near_the_float_product():
    x, weight, bias = torch.randn(64, 576), torch.randn(100, 576) / 24, torch.randn(100)
    n, threshold = counts(x, 15, max_count=127, dtype=torch.int8)
    y = int8_linear(n, *quantise_int8(weight)[:1], threshold, quantise_int8(weight)[1], bias, dtype=torch.float32)
    dense = torch.nn.functional.linear(x, weight, bias)
    assert (y - dense).norm() / dense.norm() < 0.03


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_whole(backend):
    torch._dynamo.reset()
    weight, scale, bias = draw(3, 8), torch.rand(3), torch.randn(3)

    def call(n, threshold):
        return int8_linear(n, weight, threshold, scale, bias, dtype=torch.float32, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for rows in (2, 3, 40):
        n, threshold = draw(rows, 2, 8), torch.rand(rows, 2, 1)
        torch.testing.assert_close(compiled(n, threshold), call(n, threshold), rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


GIVEN = {
    "counts": torch.zeros(2, 5, dtype=torch.int8),
    "weight": torch.zeros(3, 5, dtype=torch.int8),
    "threshold": torch.zeros(2, 1),
    "weight_scale": torch.zeros(3),
    "dtype": torch.float32,
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"counts": torch.zeros(2, 5)}, "counts and weight must be int8, got torch.float32 and torch.int8"),
        ({"counts": torch.zeros(2, 4, dtype=torch.int8)}, "counts have 4 channels, the weight takes 5"),
        ({"threshold": torch.zeros(2)}, r"threshold must be \(2, 1\), one per token, got \(2,\)"),
        ({"weight_scale": torch.zeros(1)}, r"must be \(3,\), one per output, got \(1,\) and None"),
        ({"bias": torch.zeros(2)}, r"must be \(3,\), one per output, got \(3,\) and \(2,\)"),
        ({"dtype": torch.int32}, "dtype must be float32, float64, bfloat16 or float16, got torch.int32"),
        (
            {
                "counts": torch.zeros(1, 1, dtype=torch.int8).expand(2, INPUTS + 1),
                "weight": torch.zeros(1, 1, dtype=torch.int8).expand(3, INPUTS + 1),
            },
            f"the weight must take 1 to {INPUTS} inputs, got {INPUTS + 1}",
        ),
        (
            {"counts": torch.zeros(2, 0, dtype=torch.int8), "weight": torch.zeros(3, 0, dtype=torch.int8)},
            f"the weight must take 1 to {INPUTS} inputs, got 0",
        ),
    ],
)
def test_errors_say_what_is_wrong(changed, message):
    with pytest.raises(ValueError, match=f"^int8_linear: .*{message}"):
        int8_linear(**(GIVEN | changed))


def test_kernels_refuse_float64_and_cupy():
    with pytest.raises(BackendError, match="int8_linear: backend 'cupy' cannot run: this version has no cupy kernel"):
        int8_linear(**GIVEN, backend="cupy")
    message = "int8_linear: backend 'triton' cannot run: it (computes .* got torch.float64|needs CUDA tensors)"
    with pytest.raises(BackendError, match=message):
        int8_linear(**(GIVEN | {"dtype": torch.float64}), backend="triton")
