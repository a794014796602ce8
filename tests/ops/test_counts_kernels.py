"""The kernel of spike counts equals its reference. Without a GPU, Triton runs in its interpreter; with one, `-m gpu`.

Both divide and round alike, so counts are compared bit for bit for the kernel's own threshold. The threshold's mean is
summed in another order: it may differ in its last bits, and with it counts of numbers that lie half-way between two.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from snlp_zoo.ops.counts import counts

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.usefixtures("dirty_memory"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    *([pytest.mark.gpu] if CUDA else []),
]
LIMITS = [(None, None), (None, torch.float32), (100, torch.int8), (127, torch.int8), (7, None), (1, torch.bfloat16)]


def assert_as_specified(x, k=3, **options):
    n, threshold = counts(x, k, backend="triton", **options)
    expected, expected_threshold = counts(x, k, backend="torch", **options)
    assert (n.dtype, n.shape, n.is_contiguous()) == (expected.dtype, expected.shape, True)
    assert (threshold.dtype, threshold.shape) == (torch.float32, expected_threshold.shape)
    torch.testing.assert_close(threshold, expected_threshold, rtol=2**-21, atol=0)
    quotient, limit = x.float() / threshold, options.get("max_count")
    whole = quotient.round() if limit is None else quotient.round().clamp(-limit, limit)
    assert torch.equal(n, whole.to(n.dtype))
    if n.dtype != torch.int8:
        scaled = counts(x, k, backend="triton", scaled=True, **options).counts
        cut_off = n.dtype == torch.bfloat16 and not CUDA  # Triton's interpreter does not round to bfloat16
        torch.testing.assert_close(scaled, (whole * threshold).to(n.dtype), rtol=2**-7 if cut_off else 0, atol=0)
    differ = n != expected
    assert differ.float().mean() <= 1e-4 if n.numel() > 1e4 else differ.sum() <= 1
    fraction = quotient[differ].frac().abs()
    torch.testing.assert_close(fraction, torch.full_like(fraction, 0.5), rtol=1e-3, atol=0)


# one number; a token in one tile and in two; several tokens in a program; a long token; leading axes; no token
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 64), (5, 576), (7, 131), (2, 2049), (2, 3, 4, 5), (0, 7), (2, 0, 3), (1000,)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_reference(shape, dtype):
    for max_count, counted in LIMITS:
        x = (torch.randn(shape) * 5).to(DEVICE, dtype)
        assert_as_specified(x, max_count=max_count, dtype=counted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_longer_than_registers(dtype):
    for max_count, counted in LIMITS[:3]:
        assert_as_specified(torch.randn(2, 20_011).to(DEVICE, dtype), max_count=max_count, dtype=counted)


@pytest.mark.parametrize("k", [1, 2.5, 15, 1e-3])
def test_thresholds_of_any_scale(k):
    x = torch.randn(64, 200, device=DEVICE) * torch.logspace(-12, 12, 64, device=DEVICE)[:, None]
    assert_as_specified(x, k)
    assert_as_specified(x, k, max_count=127, dtype=torch.int8)


def test_outliers():
    x = torch.randn(16, 576)
    x[:, 5] *= 1000
    assert_as_specified(x.to(DEVICE), dtype=torch.float32)
    assert_as_specified(x.to(DEVICE), max_count=127, dtype=torch.int8)


def test_what_is_not_finite_is_seen():
    x = torch.randn(4, 40, device=DEVICE)
    x[0, 3], x[1, 4], x[1, 5], x[2, 6] = torch.nan, torch.inf, -torch.inf, 1e30
    for max_count in (None, 100):
        got, expected = (counts(x, 3, max_count=max_count, backend=backend) for backend in ("triton", "torch"))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0, equal_nan=True)
        assert got.counts[0].isnan().all()
        assert got.counts[1, 4].item() == -got.counts[1, 5].item() == (max_count or torch.inf)


def test_half_way_points_go_to_even():
    """V is 1 exactly: multiples of a half, whose mean is k."""
    x = (torch.arange(-64, 64, device=DEVICE) / 2).expand(3, 128).contiguous()
    n, threshold = counts(x, x.abs().mean().item(), backend="triton")
    assert threshold.flatten().tolist() == [1, 1, 1]
    assert torch.equal(n, x.round())


@pytest.mark.parametrize(
    "view", [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[..., 1:], lambda x: x[:1].expand(6, 4, 10)]
)
def test_any_layout(view):
    x = view(torch.randn(6, 4, 10, device=DEVICE))
    assert_as_specified(x)


def test_an_address_that_is_not_aligned():
    x = torch.randn(1153, device=DEVICE)[1:].view(2, 576)
    assert x.is_contiguous()
    assert_as_specified(x)


def test_two_runs_and_any_companions_are_equal():
    x = torch.randn(50, 131, device=DEVICE)
    whole = counts(x, 3, backend="triton")
    for rows in (x, x[7:8], x[1:30]):
        some = counts(rows.clone(), 3, backend="triton")
        first = (rows.data_ptr() - x.data_ptr()) // (131 * 4)
        for one, other in zip(some, whole, strict=True):
            assert torch.equal(one, other[first : first + len(rows)])


@pytest.mark.gpu
def test_the_shapes_of_a_decoder_on_a_device():
    for shape in ((1, 576), (16384, 576), (16384, 1536), (4096, 2048), (1024, 8192)):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(shape, device=DEVICE).to(dtype)
            assert_as_specified(x)
            assert_as_specified(x, max_count=127, dtype=torch.int8)


@pytest.mark.gpu
def test_auto_is_the_kernel_on_a_device():
    x = torch.randn(7, 576, device=DEVICE, dtype=torch.bfloat16)
    for one, other in zip(counts(x, 3), counts(x, 3, backend="triton"), strict=True):
        assert torch.equal(one, other)
    assert counts(x.double(), 3).threshold.dtype == torch.float64


COMPILE = """
from types import SimpleNamespace
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from snlp_zoo.ops import backend
from snlp_zoo.ops.counts import counts, triton  # which asks whether it is interpreted, before it is told so
from snlp_zoo.ops.int8_linear import int8_linear

def compile_only(kernel, grid):
    def launch(*args, **options):
        ptx = kernel.run(*args, grid=grid, warmup=True, **options).asm["ptx"]
        print(kernel.__name__, "wgmma.mma_async" in ptx, "mma.sync" in ptx)
    return launch

driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
))
JITFunction.__getitem__ = compile_only
backend.INTERPRETED = True
for channels in (576, 20_000):
    for dtype in (torch.int8, torch.bfloat16):
        counts(torch.zeros(4, channels, dtype=torch.bfloat16), 3, max_count=127, dtype=dtype, backend="triton")
for rows in (1, 512, 16384):
    n, weight = torch.zeros(rows, 576, dtype=torch.int8), torch.zeros(576, 576, dtype=torch.int8)
    int8_linear(n, weight, torch.ones(rows, 1), torch.ones(576), dtype=torch.bfloat16, backend="triton")
"""


@pytest.mark.slow
@pytest.mark.skipif(CUDA, reason="other tests compile it there")
def test_both_kernels_compile_for_hopper(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    printed = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True
    ).stdout
    encoders = ["_counts False False"] * 2 + ["_counts_long False False"] * 2
    assert printed.splitlines() == [*encoders, "_product False True", "_product True False", "_product True False"]
