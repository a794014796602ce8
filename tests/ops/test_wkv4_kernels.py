"""WKV's kernel equals its reference loop. Without a GPU, Triton runs in its interpreter; with one, run `-m gpu`."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from snlp_zoo.ops import wkv4
from snlp_zoo.ops.wkv4 import fresh_state, wkv4_reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TRITON = pytest.param(
    "triton",
    marks=[
        pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
        *([pytest.mark.gpu] if CUDA else []),
    ],
)
pytestmark = pytest.mark.usefixtures("dirty_memory")
KERNELS = pytest.mark.parametrize("backend", [TRITON])
OPERATORS = pytest.mark.parametrize("backend", ["torch", TRITON])
COMPILED = pytest.mark.parametrize(  # an opaque operator: there the kernel itself need not run in the interpreter
    "backend", ["torch", pytest.param("triton", marks=[TRITON.marks[0], pytest.mark.gpu])]
)


def leaf(x, dtype=torch.float32):
    return x.to(DEVICE, dtype).requires_grad_()


def make_inputs(shape, dtype=torch.float32):
    """w, u, k, v and the three parts of a state."""
    batch, _, channels = shape
    k, v = torch.randn(2, *shape) * 2
    state = torch.randn(batch, channels), 0.5 + torch.rand(batch, channels), torch.randn(batch, channels)
    w, u = -torch.exp(torch.randn(channels) * 2), torch.randn(channels)
    return [leaf(w), leaf(u), leaf(k, dtype), leaf(v, dtype), *map(leaf, state)]


def outcome(function, inputs, learned=None, weigh=None, **options):
    """Output, state, and the gradients of a weighting of those that carry one."""
    w, u, k, v, *state = inputs
    out, (numerator, denominator, maximum) = function(w, u, k, v, tuple(state) or None, **options)
    generator = torch.Generator().manual_seed(1)
    outputs = out, numerator, denominator
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
    weigh = weigh or (lambda *outputs: sum((weight * x).sum() for weight, x in zip(weights, outputs, strict=True)))
    learned = inputs if learned is None else learned
    grads = torch.autograd.grad(weigh(*outputs), learned, materialize_grads=True, allow_unused=True)
    return [*outputs, maximum, *grads]


def reference(w, u, k, v, state):
    out, after = wkv4_reference(w, u, k.float(), v.float(), fresh_state(k) if state is None else state)
    return out.to(k.dtype), after


def assert_as_specified(inputs, backend, **options):
    got, expected = outcome(wkv4, inputs, backend=backend, **options), outcome(reference, inputs, **options)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        largest = max(1.0, other.abs().max().item()) if other.numel() else 1.0
        # the interpreter truncates to bfloat16 where a device rounds: one unit in the last place
        precision = 1e-5 if other.dtype == torch.float32 else 2 * torch.finfo(other.dtype).eps
        torch.testing.assert_close(one, other, rtol=precision, atol=1e-5 * largest)


# one number; less than a group; a ragged last group; two blocks of channels; more groups than are loaded together
@KERNELS
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (1, 16, 5), (2, 19, 3), (1, 17, 130), (1, 132, 1)], ids=str)
def test_equals_reference(backend, shape):
    assert_as_specified(make_inputs(shape), backend)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    assert_as_specified(make_inputs((1, 18, 5), dtype), backend)


@KERNELS
def test_without_a_state_and_from_a_fresh_one(backend):
    inputs = make_inputs((1, 18, 3))[:4]
    assert_as_specified(inputs, backend)
    fresh = [*inputs, *(x.requires_grad_() for x in fresh_state(inputs[2]))]
    for one, other in zip(
        outcome(wkv4, fresh, inputs, backend=backend), outcome(wkv4, inputs, backend=backend), strict=True
    ):
        assert torch.equal(one, other)


@KERNELS
@pytest.mark.parametrize("used", [0, 1], ids=["output", "state"])
def test_only_one_result_is_used(backend, used):
    assert_as_specified(make_inputs((1, 18, 3)), backend, weigh=lambda *outputs: outputs[used].square().sum())


@KERNELS
def test_inputs_of_any_layout(backend):
    w, u, k, v, *state = make_inputs((2, 5, 4))
    views = [w.flip(0), u.expand(4), k.transpose(0, 2).contiguous().transpose(0, 2), v[:, :1].expand(2, 5, 4)]
    views += [x.T.contiguous().T for x in state]
    weigh = lambda out, *_: out.mT.contiguous().square().sum()  # noqa: E731
    assert_as_specified(views, backend, learned=[w, u, k, v, *state], weigh=weigh)


@KERNELS
def test_parts_equal_the_whole(backend):
    def in_parts(w, u, k, v, state, **options):
        first, state = wkv4(w, u, k[:, :16], v[:, :16], state, **options)
        second, state = wkv4(w, u, k[:, 16:], v[:, 16:], state, **options)
        return torch.cat([first, second], 1), state

    inputs = make_inputs((1, 21, 3))
    for one, other in zip(
        outcome(in_parts, inputs, backend=backend), outcome(wkv4, inputs, backend=backend), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@KERNELS
def test_large_keys_and_long_decay_stay_finite(backend):
    w, u, k, v, *state = make_inputs((1, 17, 3))
    for scale in (100.0, 1e30):
        for x in outcome(wkv4, [w * 100, u, k * scale, v, *state], [w, u, k, v], backend=backend):
            assert x.isfinite().all()


@KERNELS
def test_nothing_to_do(backend):
    for shape in ((0, 5, 3), (2, 5, 0)):
        assert_as_specified(make_inputs(shape), backend)


@KERNELS
def test_two_runs_are_equal(backend):
    inputs = make_inputs((1, 18, 7))
    first, second = (outcome(wkv4, inputs, backend=backend) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@OPERATORS
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("given", [False, True])
def test_is_a_sound_operator(backend, given):
    inputs = make_inputs((2, 3, 2))
    state = inputs[4:] if given else (None, None, None)
    torch.library.opcheck(torch.ops.snlp_zoo.wkv4.default, (*inputs[:4], *state, backend))


@COMPILED
def test_compiles_whole_and_for_any_size(backend):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: wkv4(*args, backend=backend), fullgraph=True, backend=counter)
    for shape in ((2, 3, 5), (3, 4, 6), (2, 18, 7), (4, 20, 3)):
        inputs = make_inputs(shape)[:4]
        got, expected = (
            outcome(f, inputs, **kw) for f, kw in ((lambda *a: compiled(*a), {}), (wkv4, {"backend": backend}))
        )
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert counter.frame_count <= 3


@COMPILED
def test_autocast_changes_nothing(backend):
    inputs = make_inputs((2, 18, 3))
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = outcome(wkv4, inputs, backend=backend)
    for one, other in zip(inside, outcome(wkv4, inputs, backend=backend), strict=True):
        assert torch.equal(one, other)


COMPILE = """
from types import SimpleNamespace
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from snlp_zoo.ops import backend, wkv4

def compile_only(kernel, grid):
    def launch(*args, **options):
        assert kernel.run(*args, grid=grid, warmup=True, **options).asm["ptx"]
        print(kernel.__name__)
    return launch

driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
))
JITFunction.__getitem__ = compile_only
backend.INTERPRETED = True
for dtype in (torch.float32, torch.bfloat16):
    w, u = torch.zeros(2, 768, requires_grad=True)
    k, v = torch.zeros(2, 2, 40, 768, dtype=dtype, requires_grad=True)
    out, state = wkv4(w, u, k, v, backend="triton")
    torch.autograd.grad(out.sum() + state[0].sum(), [k, v])
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_compiles_for_hopper(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    printed = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True
    ).stdout
    forward, backward = ["_summarise", "_join", "_outputs"], ["_summarise_grads", "_join_grads", "_gradients"]
    assert printed.split() == (forward + backward) * 2
