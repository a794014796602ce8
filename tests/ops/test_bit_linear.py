import math

import pytest
import torch

from snlp_zoo.errors import BackendError
from snlp_zoo.ops import bit_linear as ops
from snlp_zoo.ops.backend import INTERPRETED
from snlp_zoo.ops.bit_linear import (
    bit_linear,
    kernel,
    pack_weight,
    quantise,
    sign_dtype,
    straight_through,
    unpack_weight,
)
from snlp_zoo.ops.bit_linear.reference import bit_linear_reference, pack_reference

BACKENDS = ["torch", "triton"] if INTERPRETED else ["torch"]
BITS = [1.58, 1]
every_bits = pytest.mark.parametrize("bits", BITS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw_signs(bits, out_features, in_features):
    return torch.randint(-1, 2, (out_features, in_features)) if bits == 1.58 else draw_binary(out_features, in_features)


def draw_binary(*shape):
    return 2 * torch.randint(0, 2, shape) - 1


def test_ternary_gaussian_weights():
    n, s = 2**20, 0.02
    weight = s * torch.randn(1024, 1024)
    signs, scale = quantise(weight, 1.58)
    assert set(signs.unique().tolist()) == {-1.0, 0.0, 1.0}
    zero = (signs == 0).double().mean().item()
    assert abs(zero - 0.31006) < 4 * math.sqrt(0.31006 * 0.68994 / n)
    check_fit(weight, signs, scale, s, cosine=0.88711, error=0.2634)


@pytest.mark.parametrize("centred_scale", [False, True])
def test_binary_gaussian_weights(centred_scale):
    weight = 0.02 * torch.randn(1024, 1024)
    signs, scale = quantise(weight, 1, centred_scale=centred_scale)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    check_fit(weight, signs, scale, 0.02, cosine=math.sqrt(2 / math.pi), error=1 - 2 / math.pi)


def check_fit(weight, signs, scale, s, cosine, error):
    """Means over weights, each within four of its own standard errors."""
    weight, signs, n = weight.double().flatten(), signs.double().flatten(), weight.numel()
    squares = ((weight - scale * signs) / s) ** 2
    assert abs(squares.mean() - error) < 4 * squares.std() / math.sqrt(n)
    product = weight * signs / s
    got = torch.nn.functional.cosine_similarity(weight, signs, dim=0)
    assert abs(got - cosine) < 4 * product.std() / math.sqrt(n)


def test_ternary_by_hand():
    weight = torch.tensor([[0.5, -2.0, 0.25], [0.0, 1.0, -0.75]])  # mean magnitude 0.75
    signs, scale = quantise(weight, 1.58)
    assert signs.tolist() == [[1, -1, 0], [0, 1, -1]]
    assert scale == 0.75  # without eps


def test_binary_by_hand():
    weight = torch.tensor([[1.0, 3.0], [2.0, -4.0]])  # mean 0.5
    signs, scale = quantise(weight, 1)
    assert signs.tolist() == [[1, 1], [1, -1]]
    assert scale == 2.5
    assert quantise(weight, 1, centred_scale=True)[1] == 2.25  # (0.5 + 2.5 + 1.5 + 4.5) / 4


@every_bits
def test_the_mean_itself_counts_as_negative(bits):
    signs, scale = quantise(torch.full((2, 3), 2.0), bits)
    assert signs.unique().tolist() == [1.0 if bits == 1.58 else -1.0]  # 1 bit: Sign(0) = -1
    assert scale == 2


@every_bits
def test_zero_weights(bits):
    signs, scale = quantise(torch.zeros(2, 3), bits)
    assert scale == 0
    assert (straight_through(torch.zeros(2, 3), bits) == 0).all()
    assert signs.isfinite().all()


@every_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_goes_straight_through(bits, dtype):
    weight = torch.randn(5, 7, dtype=dtype, requires_grad=True)
    used = straight_through(weight, bits)
    signs, scale = quantise(weight, bits)
    assert used.dtype == dtype
    torch.testing.assert_close(used, (signs * scale).to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-7, atol=0)
    upstream = torch.randn_like(weight)
    (grad,) = torch.autograd.grad(used, weight, upstream)
    assert torch.equal(grad, upstream)


@pytest.mark.parametrize("bits", [0, 2, 32, 1.5])
def test_unknown_bits(bits):
    for call in (quantise, pack_weight, straight_through):
        with pytest.raises(ValueError, match=f"low-bit weights have 1.58 or 1 bits, got {bits}"):
            call(torch.zeros(2, 2), bits)
    with pytest.raises(ValueError, match="low-bit weights"):
        unpack_weight(torch.zeros(1, 1, dtype=torch.uint8), bits, 4)
    with pytest.raises(ValueError, match="low-bit weights"):
        bit_linear(torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.uint8), torch.ones(()), bits=bits)


@every_bits
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 8), (7, 33), (2, 64), (1, 127)], ids=str)
def test_packing_round_trip(bits, shape):
    signs = draw_signs(bits, *shape)
    codes = pack_reference(signs.float(), bits)
    assert codes.dtype == torch.uint8
    assert codes.shape == (shape[0], math.ceil(shape[1] / (8 if bits == 1 else 4)))
    assert torch.equal(unpack_weight(codes, bits, shape[1]).long(), signs)
    assert torch.equal(kernel._unpack_cpu(codes, bits, shape[1]).long(), signs)


def test_first_weights_lie_in_the_lowest_bits():
    assert pack_reference(torch.tensor([[1.0, -1, 0, 0, 1]]), 1.58).tolist() == [[0b00_00_11_01, 0b01]]
    assert pack_reference(torch.tensor([[1.0, -1, -1, 1, -1, -1, -1, -1, 1]]), 1).tolist() == [[0b1001, 1]]


@every_backend
@every_bits
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (3, 63, 5), (5, 130, 33), (2, 260, 150)])
def test_sums_of_signs_are_exact(bits, backend, dtype, rows, inputs, outputs, monkeypatch):
    monkeypatch.setattr(kernel, "_TILE", 2**13)  # several tiles
    spikes = torch.randint(-1, 2, (4, rows, inputs)).to(dtype)
    codes = pack_reference(draw_signs(bits, outputs, inputs), bits)
    amplitude, scale = torch.tensor([1.0, 2.0, 0.5, 4.0]), torch.tensor(0.25)  # powers of two: nothing rounds
    expected = bit_linear_reference(spikes, codes, amplitude, scale, bits)
    got = bit_linear(spikes, codes, scale, bits=bits, amplitude=amplitude, backend=backend)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    bias = torch.arange(outputs).float()
    assert torch.equal(
        bit_linear(spikes, codes, scale, bias, bits=bits, amplitude=amplitude, backend=backend), expected + bias
    )


@every_bits
def test_sums_of_3072_signs_are_exact(bits):
    spikes = (torch.rand(1, 16, 3072) < 2 / 3).to(torch.int8) * draw_binary(1, 16, 3072).to(torch.int8)
    spikes[0, 0], weight = 1, draw_signs(bits, 24, 3072)
    weight[0] = 1  # the largest sum there is
    codes, one = pack_reference(weight, bits), torch.ones(1)
    got = bit_linear(spikes, codes, one[0], bits=bits, amplitude=one)
    assert torch.equal(got, bit_linear_reference(spikes, codes, one, one[0], bits))
    assert got[0, 0, 0] == 3072


@every_backend
@every_bits
@pytest.mark.parametrize("inputs", [12, 13])
def test_real_inputs(bits, backend, inputs):
    x, weight, bias = torch.randn(2, 3, inputs), torch.randn(7, inputs), torch.randn(7)
    codes, scale = pack_weight(weight, bits)
    expected = torch.nn.functional.linear(x, straight_through(weight, bits), bias)
    torch.testing.assert_close(bit_linear(x, codes, scale, bias, bits=bits, backend=backend), expected)
    got = bit_linear(x.bfloat16(), codes, scale, bias, bits=bits, backend=backend)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.03, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert bit_linear(x, codes, scale, bias, bits=bits, backend=backend).dtype == torch.bfloat16


@pytest.mark.skipif(not INTERPRETED, reason="interpreted kernels")
@every_bits
@pytest.mark.parametrize("inputs", [16, 19])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float16, torch.float32], ids=str)
def test_kernel_unpacks_as_the_reference(bits, inputs, dtype):
    codes, like = pack_reference(draw_signs(bits, 70, inputs), bits), torch.zeros(1, inputs).to(dtype)
    one, other = (kernel._unpack_cuda(codes, None, bits, like, backend) for backend in BACKENDS)
    assert one.dtype == other.dtype == dtype
    assert torch.equal(one.float(), other.float())


@every_backend
def test_scales_of_rows_and_columns(backend):
    rows, columns = kernel._scales(torch.tensor([2.0, 3.0]), torch.tensor(0.5), 6, 16, backend)
    assert rows.tolist() == [[2.0]] * 3 + [[3.0]] * 3
    assert columns.tolist() == [[0.5] * 16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_rows(dtype):
    codes, scale = pack_weight(torch.randn(3, 5), 1.58)
    assert bit_linear(torch.zeros(2, 0, 5, dtype=dtype), codes, scale, bits=1.58).shape == (2, 0, 3)


def test_output_dtype_and_compilation():
    codes, scale = pack_weight(torch.randn(3, 5), 1.58)
    spikes, amplitude = torch.randint(-1, 2, (2, 4, 5), dtype=torch.int8), torch.rand(2)
    expected = bit_linear(spikes, codes, scale, bits=1.58, amplitude=amplitude)

    def call(spikes, dtype):
        return bit_linear(spikes, codes, scale, bits=1.58, amplitude=amplitude, dtype=dtype)

    assert torch.equal(call(spikes, torch.bfloat16), expected.bfloat16())
    try:
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(spikes, torch.float32), expected)
    finally:
        torch._dynamo.reset()


def test_backward_is_refused():
    codes, scale = pack_weight(torch.randn(3, 5), 1.58)
    x = torch.randn(2, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="packed weights have no backward pass: train the unpacked model"):
        bit_linear(x, codes, scale, bits=1.58).sum().backward()


def test_errors_say_what_is_wrong():
    codes, scale = pack_weight(torch.randn(3, 5), 1.58)
    with pytest.raises(ValueError, match=r"9 inputs take 3 bytes at 1\.58 bits, the weights have 2"):
        bit_linear(torch.zeros(1, 9), codes, scale, bits=1.58)
    with pytest.raises(ValueError, match="need the amplitude of each of their 4 steps"):
        bit_linear(torch.zeros(4, 1, 5, dtype=torch.int8), codes, scale, bits=1.58)
    with pytest.raises(ValueError, match=r"amplitude must be \(4,\), one per step, got \(2,\)"):
        bit_linear(torch.zeros(4, 1, 5), codes, scale, bits=1.58, amplitude=torch.ones(2))
    with pytest.raises(BackendError, match="bit_linear: backend 'cupy' cannot run"):
        bit_linear(torch.zeros(1, 5), codes, scale, bits=1.58, backend="cupy")


def test_signs_are_exact_on_every_processor(monkeypatch):
    for integers, expected in ((True, torch.int8), (False, torch.float32)):
        monkeypatch.setattr(ops, "_INTEGERS", integers)
        assert sign_dtype(torch.zeros(4, 1, 8), 8) == expected
    assert sign_dtype(torch.zeros(4, 1, 8, dtype=torch.bfloat16), 8) == torch.float32


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "dtype", "expected"),
    [
        (16384, 768, 768, torch.bfloat16, torch.float8_e4m3fn),
        (16384, 768, 768, torch.float32, torch.float8_e4m3fn),
        (512, 384, 1536, torch.bfloat16, None),
        (512, 384, 1536, torch.float32, torch.float32),
        (16384, 4096, 768, torch.bfloat16, None),  # sums of more than 3,072 signs in FP8 were not tested
        (16384, 776, 768, torch.bfloat16, None),
    ],
)
def test_float8_is_chosen_by_size(monkeypatch, rows, inputs, outputs, dtype, expected):
    monkeypatch.setattr(ops, "_has_float8", lambda device: True)
    monkeypatch.setattr(ops, "product_dtype", lambda x: x.dtype)  # no autocast on a meta device
    assert sign_dtype(torch.empty(4, rows // 4, inputs, dtype=dtype, device="meta"), outputs) == expected


@pytest.mark.gpu
@every_bits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("inputs", [768, 3072])
def test_float8_sums_are_exact(bits, dtype, inputs):
    if not ops._has_float8(torch.device("cuda")):
        pytest.skip("needs FP8")
    signs = torch.randint(-1, 2, (4, 128, inputs), dtype=torch.int8)
    codes, amplitude = pack_reference(draw_signs(bits, 768, inputs), bits), torch.tensor([1.0, 2.0, 0.5, 4.0])
    scale, bias = torch.tensor(0.25), torch.zeros(768)
    expected = bit_linear_reference(signs[:, :4], codes, amplitude, scale, bits).to(dtype)
    x, codes, amplitude, scale, bias = (y.to("cuda") for y in (signs, codes, amplitude, scale, bias))
    got = bit_linear(x.to(torch.float8_e4m3fn), codes, scale, bias, bits=bits, amplitude=amplitude, dtype=dtype)
    assert torch.equal(got[:, :4].cpu(), expected)
