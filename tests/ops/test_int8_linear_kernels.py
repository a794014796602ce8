"""The kernel of the int8 product equals its reference. Without a GPU, Triton interprets it; with one, `-m gpu`."""

from importlib.util import find_spec

import pytest
import torch

from snlp_zoo.ops.int8_linear import int8_linear, quantise_int8

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.usefixtures("dirty_memory"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    *([pytest.mark.gpu] if CUDA else []),
]


def draw(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8).to(DEVICE)


def exact(n, weight):
    """The sums in int64, on the CPU."""
    return n.cpu().long() @ weight.cpu().long().mT


def assert_as_specified(n, weight, dtype=torch.float32, biased=True):
    rows, outputs = n.shape[:-1], len(weight)
    threshold, scale = torch.rand(*rows, 1).to(DEVICE), (torch.rand(outputs) / 1e3).to(DEVICE)
    bias = torch.randn(outputs).to(DEVICE, dtype) if biased else None
    y = int8_linear(n, weight, threshold, scale, bias, dtype=dtype, backend="triton")
    expected = int8_linear(n, weight, threshold, scale, bias, dtype=dtype, backend="torch")
    assert (y.dtype, y.shape) == (dtype, (*rows, outputs))
    # a device multiplies and adds in one step; the interpreter truncates to bfloat16 where a device rounds
    precision = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=precision, atol=1e-5 if dtype == torch.float32 else 1e-2)
    one = torch.ones_like(threshold), torch.ones_like(scale)
    y = int8_linear(n, weight, *one, dtype=torch.float32, backend="triton")
    assert torch.equal(y.cpu(), exact(n, weight).float())


# one of each; sizes that fill tiles; that miss them by one; rows of every rule for tiles
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 1, 1), (1, 16, 3), (16, 256, 16), (15, 255, 17), (32, 257, 33), (33, 127, 31), (65, 129, 129), (129, 96, 65)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_reference(rows, inputs, outputs, dtype):
    for biased in (True, False):
        assert_as_specified(draw(rows, inputs), draw(outputs, inputs), dtype, biased)


def test_every_tile(monkeypatch):
    """Those of other sizes, for a small product: ragged in every direction."""
    from snlp_zoo.ops.int8_linear import triton

    for sizes in ((1, 576, 8192), (20, 576, 576), (512, 192, 576), (512, 576, 1536), (16384, 576, 192), (16384,) * 3):
        tile = triton._tile(*sizes)
        with monkeypatch.context() as patch:
            patch.setattr(triton, "_tile", lambda *sizes, chosen=tile: chosen)
            assert_as_specified(draw(tile.rows + 3, 300), draw(tile.outputs + 2, 300))


@pytest.mark.parametrize("value", [127, -127])
def test_extreme_sums_are_exact(value):
    for rows in (1, 40):
        n, weight = draw(rows, 4096).fill_(127), draw(3, 4096).fill_(value)
        n[0, 5] = 0
        one = torch.ones(rows, 1, device=DEVICE), torch.ones(3, device=DEVICE)
        y = int8_linear(n, weight, *one, dtype=torch.float32, backend="triton")
        assert torch.equal(y.cpu(), exact(n, weight).float())


def test_leading_axes_and_layouts():
    n = draw(3, 40, 4).transpose(1, 2)  # [3, 4, 40]
    weight = draw(40, 9).T
    assert_as_specified(n, weight)
    assert_as_specified(n[1:2, ::2], weight[::2])
    assert_as_specified(draw(65)[1:].view(2, 32), draw(97)[1:].view(3, 32))  # addresses that are not aligned


def test_nothing_to_do():
    one = torch.ones(5, device=DEVICE)
    y = int8_linear(draw(0, 7), draw(5, 7), torch.ones(0, 1, device=DEVICE), one, dtype=torch.float16, backend="triton")
    assert y.shape == (0, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", [576, 1536, 2048, 8192])
@pytest.mark.parametrize("outputs", [192, 576, 1536, 8192])
def test_the_shapes_of_a_decoder_on_a_device(inputs, outputs):
    weight, _ = quantise_int8(torch.randn(outputs, inputs, device=DEVICE))
    for rows in (1, 2, 32, 100, 512, 4096):
        n = draw(rows, inputs)
        one = torch.ones(rows, 1, device=DEVICE), torch.ones(outputs, device=DEVICE)
        y = int8_linear(n, weight, *one, dtype=torch.float32)
        assert torch.equal(y, (n.double() @ weight.double().mT).float())
        for backend in ("triton", "torch"):
            again = int8_linear(n, weight, *one, dtype=torch.float32, backend=backend)
            assert torch.equal(again, y)
