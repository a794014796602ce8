"""The WKV recurrence. Without a GPU, Triton runs in its interpreter; with one, run `-m gpu`."""

import math

import pytest
import torch

from snlp_zoo.errors import BackendError
from snlp_zoo.ops import wkv4
from snlp_zoo.ops.wkv4 import fresh_state, wkv4_reference

SHAPES = [(1, 1, 1), (2, 1, 5), (3, 2, 4), (2, 9, 5), (1, 67, 3)]


def column(*numbers, dtype=torch.float64):
    return torch.tensor(numbers, dtype=dtype).view(1, -1, 1)


def channel(x, dtype=torch.float64):
    return torch.tensor([x], dtype=dtype)


def make_inputs(shape, dtype=torch.float64, scale=2.0):
    """w, u, k, v and the three parts of a state, all leaves."""
    batch, _, channels = shape
    wide = torch.promote_types(dtype, torch.float32)
    w, u = -torch.exp(torch.randn(channels)), torch.randn(channels)
    k, v = torch.randn(2, *shape) * scale
    state = torch.randn(batch, channels), 0.5 + torch.rand(batch, channels), torch.randn(batch, channels)
    return [
        x.to(kind).requires_grad_()
        for x, kind in zip((w, u, k, v, *state), (wide, wide, dtype, dtype, *[wide] * 3), strict=True)
    ]


def apply(function, inputs, **options):
    out, state = function(*inputs[:4], tuple(inputs[4:]), **options)
    return [out, *state]


def run(function, inputs, **options):
    """Outputs, and the gradients of a random weighting of all that carry one by the inputs."""
    outputs = apply(function, inputs, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs[:3]]  # exact in any dtype
    total = sum((weight * x).sum() for weight, x in zip(weights, outputs, strict=False))
    return [*outputs, *torch.autograd.grad(total, inputs)]


def reference(w, u, k, v, state):
    return wkv4_reference(w, u, k, v, fresh_state(k) if state is None else state)


@pytest.mark.parametrize("function", [wkv4, reference])
def test_trace_of_the_specification(function):
    out, state = function(channel(-0.5), channel(0.3), column(0, 1, -1, 2), column(1, 2, 3, 4), None)
    expected = torch.tensor([1, 1.785834983, 1.9712290209, 3.6141200341], dtype=torch.float64)
    torch.testing.assert_close(out.flatten(), expected, rtol=0, atol=1e-9)
    expected = torch.tensor([4.3914601002, 1.1957300501, 2], dtype=torch.float64)
    torch.testing.assert_close(torch.cat(state).flatten(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("function", [wkv4, reference])
def test_large_keys_do_not_overflow(function):
    keys, values = (column(*x, dtype=torch.float32) for x in ((500, 900, -900), (1, 2, 3)))
    out, state = function(channel(-1, torch.float32), channel(0, torch.float32), keys, values, None)
    assert out.flatten().tolist() == [1, 2, 2]
    assert torch.cat(state).isfinite().all()


def test_equals_softmax_over_the_past():
    w, u, k, v, *_ = (x.detach() for x in make_inputs((2, 33, 5)))
    t = torch.arange(33, dtype=torch.float64)
    age = (t[:, None] - 1 - t).view(33, 33, 1)
    logits = (age * w + k[:, None]).masked_fill(age < 0, -math.inf)
    logits.diagonal(dim1=1, dim2=2).copy_((u + k).mT)
    torch.testing.assert_close(wkv4(w, u, k, v).out, (logits.softmax(2) * v[:, None]).sum(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_reference(shape, dtype, precision):
    inputs = make_inputs(shape, dtype)
    for one, other in zip(run(wkv4, inputs), run(wkv4_reference, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=precision, atol=precision)


def test_gradients_are_those_of_finite_differences():
    def without_scale(*inputs):
        out, numerator, denominator, maximum = apply(wkv4, inputs)
        return out, numerator * maximum.exp(), denominator * maximum.exp()

    assert torch.autograd.gradcheck(without_scale, make_inputs((2, 7, 3)))


@pytest.mark.parametrize("splits", [(1,) * 12, (5, 7), (11, 1), (1, 3, 8)], ids=str)
def test_any_split_equals_the_whole(splits):
    def in_parts(w, u, k, v, state):
        outs = []
        for k_part, v_part in zip(k.split(splits, 1), v.split(splits, 1), strict=True):
            out, state = wkv4(w, u, k_part, v_part, state)
            outs.append(out)
        return torch.cat(outs, 1), state

    inputs = make_inputs((2, 12, 5))
    for one, other in zip(run(in_parts, inputs), run(wkv4, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_no_state_is_a_fresh_state():
    w, u, k, v, *_ = make_inputs((2, 9, 5))
    for one, other in zip(wkv4(w, u, k, v), wkv4(w, u, k, v, fresh_state(k)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert [x[0, 0].item() for x in fresh_state(k.bfloat16())] == [0, 0, torch.tensor(-1e38).item()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    inputs = make_inputs((3, 21, 8), dtype)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    for one, other in zip(run(wkv4, inputs), run(wkv4, wide), strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-5, atol=1e-6)
    assert [x.dtype for x in apply(wkv4, inputs)] == [dtype, *[torch.float32] * 3]


@pytest.mark.parametrize("scale", [0.0, 1e-30, 100.0, 1e4, 1e30])
def test_keys_of_any_size_stay_finite(scale):
    inputs = make_inputs((2, 40, 3), torch.float32, scale)
    w, u, k, v, *_ = inputs
    for x in run(wkv4, inputs):
        assert x.isfinite().all()
    assert (wkv4(w, u, k, v).out.abs() <= v.abs().amax(1, keepdim=True) * (1 + 1e-6)).all()


def test_keys_of_minus_infinity_are_left_out():
    w, u, k, v, *state = make_inputs((2, 50, 3))
    for hidden in (slice(3, 20), slice(2, 50)):
        masked = k.detach().clone()
        masked[:, hidden] = -math.inf
        inputs = [w, u, masked.requires_grad_(), v, *state]
        for one, other in zip(run(wkv4, inputs), run(wkv4_reference, inputs), strict=True):
            assert other.isfinite().all()
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_only_the_state_or_only_some_inputs_are_used():
    inputs = make_inputs((2, 5, 3))
    for kept in range(len(inputs)):
        some = [x if i == kept else x.detach() for i, x in enumerate(inputs)]
        for use in (lambda outputs: outputs[0].sum(), lambda outputs: (outputs[1] * outputs[2]).sum()):
            got, expected = (
                torch.autograd.grad(use(apply(f, some)) + 0 * some[kept].sum(), some[kept])
                for f in (wkv4, wkv4_reference)
            )
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_maximum_carries_no_gradient_and_nothing_is_kept_without_one(saved_for_backward):
    inputs = make_inputs((2, 5, 3))
    assert [x.requires_grad for x in apply(wkv4, inputs)] == [True, True, True, False]
    with torch.no_grad(), saved_for_backward() as saved:
        apply(wkv4, inputs)
    assert saved.nbytes == 0


def test_memory_is_linear_in_tokens(saved_for_backward):
    kept = []
    for tokens in (64, 128):
        inputs = make_inputs((2, tokens, 8), torch.float32)
        with saved_for_backward() as saved:
            wkv4(*inputs[:4])
        kept.append(saved.nbytes)
    assert kept[1] <= 2 * kept[0]


def test_empty_batch():
    for x in run(wkv4, make_inputs((0, 4, 3))):
        assert not x.any()


W, K = torch.zeros(3), torch.zeros(2, 4, 3)
STATE = fresh_state(K)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((W, W, K[0], K[0]), r"k must be \[B, N, C\] with at least one token, got \(4, 3\)"),
        ((W, W, K[:, :0], K[:, :0]), r"at least one token, got \(2, 0, 3\)"),
        ((W, W, K.int(), K.int()), "k must be float32, float64, bfloat16 or float16, got torch.int32"),
        ((W, W, K, K[:, :3]), r"v must have the shape and dtype of k, \(2, 4, 3\) .*, got \(2, 3, 3\)"),
        ((W, W, K, K.double()), "v must have the shape and dtype of k, .* torch.float32, got .* torch.float64"),
        ((W[:2], W, K, K), r"w must be float, one per channel \[3\], got \(2,\)"),
        ((W, W.int(), K, K), r"u must be float, one per channel \[3\], got \(3,\) torch.int32"),
        ((W, W, K, K, fresh_state(K[:1])), r"same batch and width, each \(2, 3\) torch.float32, got \(1, 3\)"),
        ((W, W, K, K, fresh_state(K[..., :2])), r"each \(2, 3\) torch.float32, got \(2, 2\)"),
        ((W, W, K, K, fresh_state(K.double())), r"\(2, 3\) torch.float32, got \(2, 3\) torch.float64"),
        ((W, W, K, K, STATE[:2]), "state must be numerator, denominator and maximum"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        wkv4(*args)


@pytest.mark.parametrize(("backend", "message"), [("cuda", "unknown backend 'cuda'"), ("cupy", "no cupy kernel")])
def test_backends_that_are_not(backend, message):
    with pytest.raises(BackendError, match=message):
        wkv4(W, W, K, K, backend=backend)
