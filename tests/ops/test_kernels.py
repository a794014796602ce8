"""Every kernel equals its reference loop. Without a GPU, Triton runs in its interpreter; with one, run `-m gpu`."""

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from snlp_zoo.errors import BackendError
from snlp_zoo.ops import SURROGATES, Surrogate, elastic_bispike, lif
from snlp_zoo.ops import backend as choice
from snlp_zoo.ops.bispike import ALPHA_FLOOR, elastic_bispike_measured, elastic_bispike_reference
from snlp_zoo.ops.bispike.kernel import blocks, lanes
from snlp_zoo.ops.lif import lif_reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RESETS = ["symmetric", "reference"]
V_RESETS = [0.0, -0.3, None]
HALVES = [torch.bfloat16, torch.float16]
# one element; one step; no element; more steps than a group; no axis but T; more than one block
SHAPES = [(1, 1), (1, 2, 3), (5, 7, 3), (4, 0, 5), (41, 2, 3), (7,), (3, 1, 101), (2, 4 * 128 * 2 + 37)]
MEMBRANE = {"tau": 2.7, "v_threshold": 0.8}
TERNARY = {"beta": 0.3}
STEPS = 1000 if CUDA else 67  # the interpreter is slow
pytestmark = pytest.mark.usefixtures("dirty_memory")


def kernels():
    for name in choice.KERNELS:
        marks = [pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")]
        if CUDA or name == "cupy":
            marks.append(pytest.mark.gpu)
        yield pytest.param(name, marks=marks)


@pytest.fixture(params=kernels())
def backend(request):
    return request.param


def normal(*shape, scale=1.0, shift=0.0, dtype=torch.float32):
    return (torch.randn(shape) * scale + shift).to(DEVICE, dtype).requires_grad_()


def amplitudes(steps):
    alpha = 0.5 + torch.rand(steps)
    if not CUDA:  # the interpreter truncates to bfloat16 where a device rounds
        alpha = alpha.bfloat16().float()
    return alpha.to(DEVICE).requires_grad_()


def bispike_inputs(shape, dtype=torch.float32):
    return normal(*shape, scale=2.0, dtype=dtype), normal(*shape[1:]), amplitudes(shape[0])


def lif_inputs(shape, dtype=torch.float32):
    return normal(*shape, scale=2.0, shift=0.5, dtype=dtype), normal(*shape[1:])


def spec_bispike(current, v_init, alpha, *, beta=0.25, reset="symmetric", spike_dtype=None, carry_out=True):
    """`elastic_bispike` by the reference loop on float32 copies."""
    wide = current.float()
    v_init = torch.zeros_like(wide[0]) if v_init is None else v_init.float()
    spikes, v = elastic_bispike_reference(wide, v_init, alpha, beta=beta, reset=reset)
    return spikes.to(spike_dtype or current.dtype), v if carry_out else None


def spec_lif(current, v_init, *, v_reset=0.0, surrogate="atan", spike_dtype=None, carry_out=True, **options):
    """`lif` by the reference loop on float32 copies."""
    wide = current.float()
    v_init = torch.full_like(wide[0], v_reset or 0.0) if v_init is None else v_init.float()
    surrogate = surrogate if isinstance(surrogate, Surrogate) else Surrogate(surrogate)
    options = {"decay_input": True, "detach_reset": True} | options
    spikes, v = lif_reference(wide, v_init, v_reset=v_reset, surrogate=surrogate, **options)
    return spikes.to(spike_dtype or current.dtype), v if carry_out else None


def outcome(function, args, learned=None, weigh=None, **options):
    """Outputs, and the gradients of a weighting of them (random unless `weigh` says how) by the inputs `learned`."""
    spikes, v = function(*args, **options)
    outputs = [x for x in (spikes, v) if x is not None]
    if weigh is None:
        generator = torch.Generator().manual_seed(1)
        total = sum((torch.randn(x.shape, generator=generator).to(x) * x).sum() for x in outputs)
    else:
        total = weigh(spikes, v)
    learned = [x for x in args if x is not None and x.requires_grad] if learned is None else learned
    return spikes, v, torch.autograd.grad(total, learned, materialize_grads=True)


def assert_equal(got, expected):
    """Spikes exactly, the membrane to 1e-6, gradients to 1e-5 of the largest (a rounding more in half precision)."""
    assert got[0].dtype == expected[0].dtype
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-6)
    assert len(got[2]) == len(expected[2])
    for one, other in zip(got[2], expected[2], strict=True):
        precision = max(1e-5, torch.finfo(other.dtype).eps)
        largest = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=precision, atol=1e-5 * max(1.0, largest))


def assert_as_specified(op, args, backend, learned=None, weigh=None, **options):
    spec = spec_bispike if op is elastic_bispike else spec_lif
    got = outcome(op, args, learned, weigh, backend=backend, **options)
    assert_equal(got, outcome(spec, args, learned, weigh, **options))
    return got


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bispike_equals_reference(backend, shape, reset):
    assert_as_specified(elastic_bispike, bispike_inputs(shape), backend, reset=reset, **TERNARY)


@pytest.mark.parametrize("reset", RESETS)
def test_bispike_with_every_option(backend, reset):
    for rest, carry_out, fixed, beta in product((True, False), (True, False), (True, False), (0, 0.25)):
        current, v_init, alpha = bispike_inputs((5, 7, 3))
        args = current, None if rest else v_init, alpha.detach() if fixed else alpha
        assert_as_specified(elastic_bispike, args, backend, reset=reset, beta=beta, carry_out=carry_out)


@pytest.mark.parametrize("shape", [(1, 2), (5, 7, 3), (17, 2, 3)], ids=str)
def test_lif_equals_reference(backend, shape):
    for v_reset, decay_input, detach_reset in product(V_RESETS, (True, False), (True, False)):
        options = {"v_reset": v_reset, "decay_input": decay_input, "detach_reset": detach_reset}
        assert_as_specified(lif, lif_inputs(shape), backend, **MEMBRANE, **options)


@pytest.mark.parametrize("v_reset", V_RESETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lif_equals_reference_in_every_shape(backend, shape, v_reset):
    assert_as_specified(lif, lif_inputs(shape), backend, **MEMBRANE, v_reset=v_reset, detach_reset=False)


@pytest.mark.parametrize("alpha", [None, 0.7, 3.0])
@pytest.mark.parametrize("name", SURROGATES)
def test_lif_surrogates(backend, name, alpha):
    surrogate = Surrogate(name, alpha)
    for v_reset in (0.0, None):
        options = {"surrogate": surrogate, "v_reset": v_reset, "detach_reset": False}
        assert_as_specified(lif, lif_inputs((5, 7, 3)), backend, **MEMBRANE, **options)


@pytest.mark.parametrize("name", SURROGATES)
def test_lif_fires_at_the_threshold_and_surrogates_end_where_they_should(backend, name):
    above, below = (math.nextafter(1, side) for side in (2, 0))
    edges = torch.tensor([[1, below, above, 0.5, 1.5, 0, 2, 0.25, 1.75]], device=DEVICE, requires_grad=True)
    options = {"tau": 1, "v_threshold": 1, "surrogate": Surrogate(name, 1.0)}
    spikes, *_ = assert_as_specified(lif, (edges, None), backend, **options)
    assert spikes[0, :2].tolist() == [1, 1]  # float32 has no number that near below one


@pytest.mark.parametrize("v_reset", V_RESETS)
@pytest.mark.parametrize("steps", [5, 18])
def test_lif_at_rest_and_without_membrane(backend, steps, v_reset):
    for rest, carry_out in product((True, False), (True, False)):
        current, v_init = lif_inputs((steps, 3, 2))
        args = current, None if rest else v_init
        assert_as_specified(lif, args, backend, **MEMBRANE, v_reset=v_reset, carry_out=carry_out)


@pytest.mark.parametrize("v_reset", V_RESETS)
def test_integrate_and_fire(backend, v_reset):
    options = {"tau": math.inf, "v_threshold": 1.0, "v_reset": v_reset, "decay_input": False}
    assert_as_specified(lif, lif_inputs((19, 2, 3)), backend, **options)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (7, 1), (1, 7, 1), (2, 1, 1), (2, 7, 5)], ids=str)
def test_lif_learns_tau(backend, shape):
    for v_reset, decay_input in ((-0.3, True), (None, False)):
        tau = (1.5 + torch.rand(shape)).to(DEVICE).requires_grad_()
        current, v_init = lif_inputs((5, 2, 7, 5))
        options = {"tau": tau, "v_threshold": 0.8, "v_reset": v_reset, "decay_input": decay_input}
        *_, grads = assert_as_specified(lif, (current, v_init), backend, [current, v_init, tau], **options)
        assert grads[-1].shape == shape
        assert grads[-1].any()


@pytest.mark.parametrize("shape", [(17, 3, 5), (3, 0, 5), (7,)], ids=str)
def test_lif_learns_tau_over_many_steps_without_elements_and_without_axes(backend, shape):
    tau = torch.tensor(2.5, device=DEVICE, requires_grad=True)
    current, v_init = lif_inputs(shape)
    assert_as_specified(lif, (current, v_init), backend, [current, v_init, tau], tau=tau, v_threshold=0.8)


def test_lif_with_a_tau_per_channel_that_is_not_learned(backend):
    tau = torch.rand(3, device=DEVICE) + 1.5
    assert_as_specified(lif, lif_inputs((5, 7, 3)), backend, tau=tau, v_threshold=0.8)


def test_large_bispike_input(backend):
    current, _, alpha = bispike_inputs((2, 2**18 + 3))
    assert lanes(2**18 + 3) > lanes(1)
    assert_as_specified(elastic_bispike, (current, None, alpha if CUDA else alpha.detach()), backend)


def test_large_lif_input(backend):
    assert_as_specified(lif, lif_inputs((2, 2**17 + 3)), backend, **MEMBRANE)


@pytest.mark.parametrize("reset", RESETS)
def test_many_steps_of_one_neuron(backend, reset):
    assert_as_specified(elastic_bispike, bispike_inputs((STEPS, 1)), backend, reset=reset)
    v_reset = 0.0 if reset == "symmetric" else None
    assert_as_specified(lif, lif_inputs((STEPS, 1)), backend, **MEMBRANE, v_reset=v_reset)


@pytest.mark.parametrize("reset", RESETS)
def test_bispike_threshold_and_window_are_exact(backend, reset):
    """One unit in the last place around alpha / 2 and alpha, for many alpha."""
    alpha = torch.rand(64, device=DEVICE) * 3 + ALPHA_FLOOR
    edges = torch.stack([alpha / 2, alpha], 1)
    edges = torch.cat([edges, *(torch.nextafter(edges, edges + side) for side in (-1, 1))], 1)
    current = torch.cat([edges, -edges], 1).requires_grad_()
    assert_as_specified(elastic_bispike, (current, None, alpha.requires_grad_()), backend, beta=0, reset=reset)


@pytest.mark.parametrize("reset", RESETS)
def test_bispike_amplitude_has_a_floor(backend, reset):
    alpha = torch.tensor([0.0, 5e-6, -1.0, ALPHA_FLOOR * 1.5, ALPHA_FLOOR * 3], device=DEVICE, requires_grad=True)
    current = normal(5, 11, scale=1e-5)
    *_, (_, grad_alpha) = assert_as_specified(elastic_bispike, (current, None, alpha), backend, reset=reset)
    assert grad_alpha[:3].tolist() == [0, 0, 0]
    assert grad_alpha[3:].all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("reset", RESETS)
def test_bispike_in_half_precision(backend, reset, dtype):
    _, v, grads = assert_as_specified(elastic_bispike, bispike_inputs((6, 4, 33), dtype), backend, reset=reset)
    assert v.dtype == torch.float32
    assert grads[0].dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("v_reset", V_RESETS)
def test_lif_in_half_precision(backend, v_reset, dtype):
    inputs = lif_inputs((18, 4, 5), dtype)
    _, v, grads = assert_as_specified(lif, inputs, backend, **MEMBRANE, v_reset=v_reset, detach_reset=False)
    assert v.dtype == torch.float32
    assert grads[0].dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "spike_dtype"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.float32)],
)
def test_spikes_of_another_float_dtype_carry_the_gradient(backend, dtype, spike_dtype):
    for reset in RESETS:
        inputs = bispike_inputs((5, 3, 7), dtype)
        assert_as_specified(elastic_bispike, inputs, backend, reset=reset, spike_dtype=spike_dtype)
    assert_as_specified(lif, lif_inputs((5, 3, 7), dtype), backend, **MEMBRANE, spike_dtype=spike_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spike_dtype", [torch.int8, torch.float8_e4m3fn])
def test_bispike_signs(backend, spike_dtype, dtype):
    inputs = bispike_inputs((5, 3, 7), dtype)
    for reset in RESETS:
        signs, v = elastic_bispike(*inputs, reset=reset, spike_dtype=spike_dtype, backend=backend)
        spikes, expected_v = spec_bispike(*inputs, reset=reset)
        assert (signs.dtype, signs.requires_grad, v.requires_grad) == (spike_dtype, False, False)
        assert torch.equal(signs.float(), spikes.float().sign())
        assert torch.equal(v, expected_v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spike_dtype", [torch.bool, torch.int8, torch.float8_e4m3fn])
def test_lif_spikes_in_low_precision(backend, spike_dtype, dtype):
    inputs = lif_inputs((18, 3, 7), dtype)
    low, v = lif(*inputs, **MEMBRANE, spike_dtype=spike_dtype, backend=backend)
    spikes, expected_v = spec_lif(*inputs, **MEMBRANE)
    assert (low.dtype, low.requires_grad, v.requires_grad) == (spike_dtype, False, False)
    assert torch.equal(low.to(dtype), spikes)
    torch.testing.assert_close(v, expected_v, rtol=1e-6, atol=1e-6)


LAYOUTS = {  # shape of a leaf, and the [3, 4, 6] made of it
    "permuted": ((6, 3, 4), lambda x: x.permute(1, 2, 0)),
    "sliced": ((3, 5, 12), lambda x: x[:, 1:, ::2]),
    "every second step": ((6, 4, 6), lambda x: x[::2]),
    "a gap after each step": ((3, 25), lambda x: x[:, :24].unflatten(1, (4, 6))),
    "one step expanded over T": ((4, 6), lambda x: x.expand(3, 4, 6)),
    "expanded over the width": ((3, 4, 1), lambda x: x.expand(3, 4, 6)),
    "not aligned": ((73,), lambda x: x[1:].view(3, 4, 6)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_in_any_layout(backend, layout):
    shape, view = LAYOUTS[layout]
    leaf, v_init, alpha = normal(*shape, scale=2.0), normal(6, 4), amplitudes(6)
    current = view(leaf)
    for reset in RESETS:
        args = current, v_init.T, alpha[::2]
        assert_as_specified(elastic_bispike, args, backend, [leaf, v_init, alpha], reset=reset)
    assert_as_specified(lif, (current, v_init.T), backend, [leaf, v_init], **MEMBRANE)


def test_tau_in_any_layout(backend):
    current, v_init = lif_inputs((3, 4, 6))
    leaf = (torch.rand(12, 6) + 1.5).to(DEVICE).requires_grad_()
    for tau in (leaf[0, ::2].repeat(2), leaf[::2, 1:5].T, leaf[4:8, :1].expand(4, 6), leaf[0].expand(4, 6)):
        assert_as_specified(lif, (current, v_init), backend, [current, v_init, leaf], tau=tau, v_threshold=0.8)


def shifted(x):
    """x flattened, one place further: its gradient comes back as a view that starts at the second place."""
    return torch.cat([x.new_zeros(1), x.flatten()])


WEIGHINGS = {
    "sum": lambda spikes, v: spikes.sum() + v.sum(),
    "mean over T": lambda spikes, v: (spikes.mean(0) * torch.arange(18.0, device=DEVICE).view(3, 6)).sum(),
    "permuted": lambda spikes, v: sum(x.mT.contiguous().square().sum() for x in (spikes, v)),
    "spikes only": lambda spikes, v: (spikes * spikes).sum(),
    "membrane only": lambda spikes, v: (v * v).sum(),
    "one step only": lambda spikes, v: spikes[1, ::2, 1:].sum(),
    "not aligned": lambda spikes, v: shifted(spikes).square().sum() + shifted(v).square().sum(),
}


@pytest.mark.parametrize("weighing", WEIGHINGS)
def test_upstream_gradient_of_any_layout(backend, weighing):
    weigh = WEIGHINGS[weighing]
    for reset in RESETS:
        assert_as_specified(elastic_bispike, bispike_inputs((5, 3, 6)), backend, weigh=weigh, reset=reset)
    assert_as_specified(lif, lif_inputs((5, 3, 6)), backend, weigh=weigh, **MEMBRANE, detach_reset=False)


@pytest.mark.parametrize("op", [elastic_bispike, lif])
def test_only_some_inputs_want_a_gradient(backend, op):
    args = list(bispike_inputs((5, 7)) if op is elastic_bispike else lif_inputs((5, 7)))
    options = {} if op is elastic_bispike else MEMBRANE
    for kept in range(len(args)):
        some = [x if i == kept else x.detach() for i, x in enumerate(args)]
        assert_as_specified(op, some, backend, **options)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient(backend, context, saved_for_backward):
    inputs = bispike_inputs((5, 7))
    with context(), saved_for_backward() as saved:
        ternary, binary = elastic_bispike(*inputs, backend=backend), lif(*inputs[:2], **MEMBRANE, backend=backend)
    assert saved.nbytes == 0
    for got, expected in ((ternary, spec_bispike(*inputs)), (binary, spec_lif(*inputs[:2], **MEMBRANE))):
        assert not got.spikes.requires_grad
        assert torch.equal(got.spikes, expected[0])


def totals(current, v_init, alpha, mask, reset):
    """Sums of |m[t]| over what counts, in float64, of the float32 membrane."""
    v, sums = torch.zeros_like(current[0].float()) if v_init is None else v_init, []
    for x, alpha_t in zip(current.float(), alpha, strict=True):
        m = (v + x).double().abs()
        sums.append((m if mask is None else m[mask.bool()]).sum())
        v = elastic_bispike_reference(x[None], v, alpha_t[None], beta=0.25, reset=reset).v
    return torch.stack(sums)


@pytest.mark.parametrize("shape", [(3, 3, 41, 7), (2, 3, 3, 128), (2, 5, 256), (2, 3, 200)], ids=str)
@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("reset", RESETS)
def test_bispike_measures(backend, reset, mask_dtype, shape):
    inputs = [x.detach() for x in bispike_inputs(shape, torch.bfloat16 if reset == "reference" else torch.float32)]
    mask = None if mask_dtype is None else (torch.rand(shape[1:-1], device=DEVICE) < 0.6).to(mask_dtype)
    output, total = elastic_bispike_measured(*inputs, mask, reset=reset, backend=backend)
    plain = elastic_bispike(*inputs, reset=reset, backend=backend)
    assert torch.equal(output.spikes, plain.spikes)
    assert torch.equal(output.v, plain.v)
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, totals(*inputs, mask, reset), rtol=1e-5, atol=0)


def test_bispike_measures_many_blocks_at_rest_without_membrane(backend):
    current, alpha = normal(3, 1061).detach(), amplitudes(3).detach()
    output, total = elastic_bispike_measured(current, None, alpha, None, carry_out=False, backend=backend)
    assert output.v is None
    torch.testing.assert_close(total, totals(current, None, alpha, None, "symmetric"), rtol=1e-5, atol=0)


def test_bispike_measures_with_masks_of_any_layout(backend):
    inputs = [x.detach() for x in bispike_inputs((2, 4, 6, 3))]
    turned = torch.rand(6, 4, device=DEVICE) < 0.6
    for mask in (turned.T, turned[:, :1].T.expand(4, 6), turned[:1, :].T):
        _, total = elastic_bispike_measured(*inputs, mask, backend=backend)
        torch.testing.assert_close(total, totals(*inputs, mask.expand(4, 6), "symmetric"), rtol=1e-5, atol=0)


def test_bispike_measures_nothing(backend):
    current, v_init, alpha = bispike_inputs((2, 3, 4))
    output, total = elastic_bispike_measured(current, v_init, alpha, torch.zeros(3), backend=backend)
    assert total.tolist() == [0, 0]
    assert not total.requires_grad
    assert output.spikes.requires_grad
    _, total = elastic_bispike_measured(current[:, :0], v_init[:0], alpha, None, backend=backend)
    assert total.tolist() == [0, 0]
    _, total = elastic_bispike_measured(normal(2), None, alpha, None, backend=backend)
    assert total.all()


@pytest.mark.parametrize(("reset", "bits"), [("symmetric", 2), ("reference", 4)])
@pytest.mark.parametrize(("steps", "size"), [(1, 1), (4, 512), (5, 1061)])
def test_bispike_saves_bits(backend, steps, size, reset, bits, saved_for_backward, graph_nodes):
    current, v_init, alpha = bispike_inputs((steps, size))
    with saved_for_backward() as saved:
        spikes, v = elastic_bispike(current, v_init, alpha.detach(), reset=reset, backend=backend)
    assert spikes.grad_fn is v.grad_fn
    assert len(graph_nodes(spikes)) == 1
    rounded = blocks(size) * 4 * lanes(size)
    assert size <= rounded < size + 4 * lanes(size)
    assert saved.nbytes <= bits * steps * rounded // 8 + alpha.nbytes


def test_bispike_with_learned_amplitude_saves_its_input_too(backend, saved_for_backward):
    current, v_init, alpha = bispike_inputs((4, 512))
    with saved_for_backward() as saved:
        elastic_bispike(current, v_init, alpha, backend=backend)
    assert saved.nbytes == 2 * current.numel() // 8 + alpha.nbytes + current.nbytes + v_init.nbytes


@pytest.mark.parametrize(("steps", "starts"), [(1, 0), (16, 0), (17, 1), (40, 2)])
def test_lif_saves_its_input(backend, steps, starts, saved_for_backward, graph_nodes):
    current, v_init = lif_inputs((steps, 11))
    with saved_for_backward() as saved:
        spikes, v = lif(current, v_init, **MEMBRANE, backend=backend)
    assert spikes.grad_fn is v.grad_fn
    assert len(graph_nodes(spikes)) == 1
    assert saved.nbytes == current.nbytes + v_init.nbytes + starts * v_init.nbytes


def test_lif_keeps_no_copy_of_an_input_expanded_over_time(backend, saved_for_backward):
    leaf = normal(11)
    with saved_for_backward() as saved:
        lif(leaf.expand(16, 11), None, **MEMBRANE, backend=backend)
    assert saved.nbytes == leaf.nbytes


def test_inputs_are_left_alone(backend):
    inputs = [x.detach() for x in bispike_inputs((18, 5))]
    before = [x.clone() for x in inputs]
    elastic_bispike(*inputs, backend=backend).v.add_(1)
    lif(*inputs[:2], **MEMBRANE, backend=backend).v.add_(1)
    assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))


@pytest.fixture
def _numpy_is_quiet():
    with np.errstate(all="ignore"):  # the interpreter computes with NumPy, which warns of NaN
        yield


def odd_values(dtype):
    current = torch.randn(5, 8).to(DEVICE, dtype)
    current[1, 0], current[2, 1], current[2, 2], current[0, 3], current[4, 4] = (
        math.nan, math.inf, -math.inf, torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    )  # fmt: skip
    current[3, 1] = -math.inf
    return current.requires_grad_()


@pytest.mark.usefixtures("_numpy_is_quiet")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reset", RESETS)
def test_bispike_passes_nan_and_infinity_on(backend, reset, dtype):
    current = odd_values(dtype)
    alpha = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0], device=DEVICE)
    got, expected = (
        outcome(function, (current, None, alpha), reset=reset, **options)
        for function, options in ((elastic_bispike, {"backend": backend}), (spec_bispike, {}))
    )
    precision = max(1e-5, torch.finfo(dtype).eps)
    torch.testing.assert_close(got, expected, rtol=precision, atol=precision, equal_nan=True)
    assert got[2][0][:, 3:].isfinite().all()


@pytest.mark.usefixtures("_numpy_is_quiet")
@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("reset", RESETS)
def test_bispike_of_a_broken_amplitude(backend, reset, broken):
    current, v_init, _ = bispike_inputs((5, 7))
    alpha = torch.tensor([1.0, 1.0, broken, 1.0, 1.0], device=DEVICE)
    got = elastic_bispike(current, v_init, alpha, reset=reset, backend=backend)
    expected = spec_bispike(current, v_init, alpha, reset=reset)
    torch.testing.assert_close(tuple(got), expected, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.usefixtures("_numpy_is_quiet")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v_reset", V_RESETS)
def test_lif_passes_nan_and_infinity_on(backend, v_reset, dtype):
    current = odd_values(dtype)
    for i, name in enumerate(SURROGATES if dtype is torch.float32 else ("atan",)):
        options = {"v_reset": v_reset, "surrogate": name, "decay_input": i % 2 == 0, **MEMBRANE}
        got = outcome(lif, (current, None), backend=backend, **options)
        expected = outcome(spec_lif, (current, None), **options)
        precision = max(1e-5, torch.finfo(dtype).eps)
        torch.testing.assert_close(got, expected, rtol=precision, atol=precision, equal_nan=True)


@pytest.mark.parametrize("reset", RESETS)
def test_bispike_in_two_calls(backend, reset):
    def in_halves(current, v_init, alpha, **options):
        first, v = elastic_bispike(current[:3], v_init, alpha[:3], **options)
        second, v = elastic_bispike(current[3:], v, alpha[3:], **options)
        return torch.cat([first, second]), v

    inputs = bispike_inputs((7, 3, 5))
    options = {"reset": reset, "backend": backend}
    assert_equal(outcome(in_halves, inputs, **options), outcome(elastic_bispike, inputs, **options))


@pytest.mark.parametrize("v_reset", V_RESETS)
def test_lif_in_two_calls(backend, v_reset):
    def in_halves(current, v_init, **options):
        first, v = lif(current[:11], v_init, **options)
        second, v = lif(current[11:], v, **options)
        return torch.cat([first, second]), v

    inputs = lif_inputs((19, 3, 2))
    options = {"v_reset": v_reset, "detach_reset": False, "backend": backend, **MEMBRANE}
    assert_equal(outcome(in_halves, inputs, **options), outcome(lif, inputs, **options))


@pytest.mark.parametrize(
    ("shape", "dtype", "change", "error", "message"),
    [
        ((4, 3), torch.int64, {}, ValueError, "current must be float32, .+ or float16, got torch.int64"),
        ((4, 3), torch.float64, {}, BackendError, "it computes float32, bfloat16, float16, got torch.float64"),
        ((0, 3), torch.float32, {}, ValueError, "at least one time step"),
        ((), torch.float32, {}, ValueError, "at least one time step"),
        ((1, 2**31), torch.float32, {}, ValueError, "2147483648 elements per time step, a kernel indexes 2147483647"),
        ((4, 3), torch.float32, {"v_init": (4, 3)}, ValueError, r"v_init \(4, 3\) must equal current without T \(3,\)"),
        ((4, 3), torch.float32, {"spike_dtype": torch.int32}, ValueError, "torch.int32"),
        ((4, 3), torch.float32, {"alpha": (3,)}, ValueError, r"one value per time step, shape \(4,\), got \(3,\)"),
        ((4, 3), torch.float32, {"alpha": ()}, ValueError, r"one value per time step, shape \(4,\), got \(\)"),
        ((4, 3), torch.float32, {"reset": "hard"}, ValueError, "unknown reset 'hard'"),
        ((4, 3), torch.float32, {"tau": 0.5}, ValueError, "must be at least 1, got 0.5"),
        ((4, 3), torch.float32, {"surrogate": "atn"}, ValueError, "did you mean 'atan'"),
    ],
)  # fmt: skip
def test_errors(backend, shape, dtype, change, error, message):
    change = change | {"v_init": torch.zeros(change["v_init"], device=DEVICE) if "v_init" in change else None}
    current = torch.zeros((), dtype=dtype, device=DEVICE).expand(shape)
    if not {"alpha", "reset"} & set(change):
        with pytest.raises(error, match=message):
            lif(current, **MEMBRANE | change, backend=backend)
    if not {"tau", "surrogate"} & set(change):
        change["alpha"] = torch.ones(change.get("alpha", shape[:1]), device=DEVICE)
        with pytest.raises(error, match=message):
            elastic_bispike(current, **change, backend=backend)


def test_ternary_spikes_are_not_boolean(backend):
    with pytest.raises(ValueError, match=r"spikes of both signs do not fit torch\.bool"):
        elastic_bispike(*bispike_inputs((4, 3)), spike_dtype=torch.bool, backend=backend)


@pytest.mark.parametrize("name", choice.KERNELS)
def test_kernels_refuse_cpu_tensors(name, monkeypatch):
    monkeypatch.setattr(choice, "INTERPRETED", False)
    with pytest.raises(BackendError, match=f"^lif: backend '{name}' cannot run: .+; use 'auto' or 'torch'$"):
        lif(torch.zeros(4, 3), None, **MEMBRANE, backend=name)
    with pytest.raises(BackendError, match=f"^bispike: backend '{name}' cannot run: .+; use 'auto' or 'torch'$"):
        elastic_bispike(torch.zeros(4, 3), None, torch.ones(4), backend=name)


def bispike_layer(backend):
    return lambda x: elastic_bispike(x, None, torch.ones_like(x[:, 0, 0]), backend=backend)


def lif_layer(backend):
    return lambda x: lif(x, None, **MEMBRANE, backend=backend)


def rated(layer):
    """A scalar of spikes and membrane that gives every element a gradient of its own."""

    def rate(x):
        spikes, v = layer(x * 2)
        return (spikes * x).sum() + (v * v).sum()

    return rate


def grad(function, x):
    return torch.autograd.grad(function(x), x)[0]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("full", [False, True])
def test_bispike_is_a_sound_operator(backend, reset, full):
    current, v_init, alpha = bispike_inputs((3, 2, 5))
    mask = torch.ones(2, dtype=torch.bool, device=DEVICE) if full else None
    optional = (v_init, alpha, mask) if full else (None, alpha.detach(), None)
    args = current, *optional, 0.25, reset, torch.float32, full, full, backend
    torch.library.opcheck(torch.ops.snlp_zoo.bispike.default, args)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("full", [False, True])
def test_lif_is_a_sound_operator(backend, full):
    current, v_init = lif_inputs((18, 2, 3))
    leak = torch.full((3,), 0.4, device=DEVICE, requires_grad=True)
    optional = (v_init, leak) if full else (None, None)
    args = current, *optional, 0.5, 1.0, None, full, full, "atan", 2.0, torch.float32, full, backend
    torch.library.opcheck(torch.ops.snlp_zoo.lif.default, args)


LAYERS = pytest.mark.parametrize("layer", [bispike_layer, lif_layer])


@LAYERS
def test_compiles_whole_and_for_any_size(backend, layer):
    function, counter = rated(layer(backend)), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for shape in ((2, 3, 5), (3, 4, 6), (7, 5, 9), (12, 2, 3)):
        x = normal(*shape)
        torch.testing.assert_close(compiled(x), function(x))
        torch.testing.assert_close(grad(compiled, x), grad(function, x))
    assert counter.frame_count <= 2


@LAYERS
def test_checkpointing_changes_nothing(backend, layer):
    x, function = normal(18, 3, 5), rated(layer(backend))
    again = grad(lambda x: checkpoint(function, x, use_reentrant=False), x)
    assert torch.equal(again, grad(function, x))


@LAYERS
def test_autocast_changes_nothing(backend, layer):
    x = normal(5, 3, 5)
    with torch.autocast(DEVICE, torch.bfloat16):
        spikes, v = layer(backend)(x)
    plain = layer(backend)(x)
    assert (spikes.dtype, v.dtype) == (torch.float32, torch.float32)
    assert torch.equal(spikes, plain.spikes)
    assert torch.equal(v, plain.v)


@LAYERS
def test_exports(backend, layer):
    class Module(nn.Module):
        def forward(self, x):
            return layer(backend)(x).spikes * 2

    x = normal(5, 3, 5).detach()
    exported = torch.export.export(Module(), (x,), dynamic_shapes=({0: Dim("steps", max=16), 1: Dim("batch", max=64)},))
    assert "torch.ops.snlp_zoo." in exported.graph_module.code
    for x in (normal(5, 3, 5).detach(), normal(7, 4, 5).detach()):
        assert torch.equal(exported.module()(x), Module()(x))


COMPILE = """
import sys
from types import SimpleNamespace
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from snlp_zoo.ops import backend, lif
from snlp_zoo.ops.bispike import elastic_bispike_measured

def compile_only(kernel, grid):
    def launch(*args, **options):
        ptx = kernel.run(*args, grid=grid, warmup=True, **options).asm["ptx"]
        wide = any(load in ptx for load in ("ld.global.v4.b32", "ld.global.v2.b64"))
        print(kernel.__name__, size, dtype, steps, "wide" if wide else "narrow", "fused" * ("fma.rn.f32" in ptx))
    return launch

driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
))
JITFunction.__getitem__ = compile_only
backend.INTERPRETED = True
for size in (2**18, 4096):
    for dtype in (torch.float32, torch.bfloat16):
        for steps in (1, 4) if sys.argv[1] == "bispike" else (1, 4, 16):
            current = torch.empty(steps, size, dtype=dtype, requires_grad=True)
            v_init, alpha, tau = (torch.ones(n, requires_grad=True) for n in (size, steps, size))
            if sys.argv[1] == "bispike":
                for reset, width in (("symmetric", 256), ("reference", 32)):
                    args = current.unflatten(1, (-1, width)), v_init.view(-1, width), alpha, torch.ones(size // width)
                    output, _ = elastic_bispike_measured(*args, reset=reset, backend="triton")
                    torch.autograd.grad(sum(x.sum() for x in output), [current, v_init, alpha])
            else:
                output = lif(current, v_init, tau=tau, v_threshold=1.0, detach_reset=False, backend="triton")
                torch.autograd.grad(sum(x.sum() for x in output), [current, v_init, tau])
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("op", "count", "names"),
    [("bispike", 48, {"_forward", "_backward", "_backward_alpha"}), ("lif", 24, {"_forward", "_backward"})],
)
def test_triton_compiles_for_hopper(op, count, names, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    printed = subprocess.run(
        [sys.executable, "-c", COMPILE, op], env=environment, capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split() for line in printed.splitlines()]
    assert len(lines) == count
    assert {line[0] for line in lines} == names
    assert "fused" not in printed
    large = [line for line in lines if int(line[1]) >= 2**18 and int(line[3]) <= 4]
    assert {line[4] for line in large} == {"wide"}
