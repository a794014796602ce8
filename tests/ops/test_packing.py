import math

import pytest
import torch
from torch.nn.functional import linear

from snlp_zoo.errors import BackendError
from snlp_zoo.ops.backend import INTERPRETED
from snlp_zoo.ops.bit_linear import sign_dtype
from snlp_zoo.ops.packing import pack, unpack
from snlp_zoo.ops.spike_linear import spike_linear

BACKENDS = ["torch", "triton"] if INTERPRETED else ["torch"]
SHAPES = [(1, 1), (4, 2, 7, 5), (3, 1025), (2, 2048), (5, 3, 700), (4, 0, 3)]
AMPLITUDE = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.25])


def draw(shape, bits, dtype=torch.float32):
    signs = torch.randint(0 if bits == 1 else -1, 2, shape).to(dtype)
    return signs * AMPLITUDE[: shape[0]].to(dtype).view(-1, *(1,) * (len(shape) - 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape, bits, dtype, backend):
    spikes = draw(shape, bits, dtype)
    codes = pack(spikes, bits, backend)
    assert torch.equal(codes, pack(spikes, bits, "torch"))
    amplitude = AMPLITUDE[: shape[0]].to(dtype)
    assert torch.equal(unpack(codes, amplitude, bits, spikes.shape, backend), spikes)


@pytest.mark.parametrize("bits", [1, 2])
def test_a_spike_takes_one_or_two_bits(bits):
    assert pack(draw((4, 8, 2048), bits), bits).nbytes * 8 == 4 * 8 * 2048 * bits


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_spikes_lie_in_the_lowest_bits(backend):
    spikes = torch.zeros(1, 1024)
    spikes[0, 0], spikes[0, 256], spikes[0, 512], spikes[0, 768 + 255] = 1, -1, math.nan, 1
    codes = pack(spikes, 2, backend)[0]
    assert codes[0] == 0b00_10_11_01
    assert codes[255] == 0b01_00_00_00
    assert codes[1:255].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_survives(backend):
    spikes = torch.tensor([[1.0, math.nan, -1.0, 0.0]])
    restored = unpack(pack(spikes, 2, backend), torch.ones(1), 2, spikes.shape, backend)
    torch.testing.assert_close(restored, spikes, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_with_time_first(backend):
    spikes = draw((4, 6, 5), 2)
    for view in (spikes.transpose(1, 2), spikes[:, 1:4], spikes[1:2].expand(4, 6, 5)):
        assert torch.equal(pack(view, 2, backend), pack(view.contiguous(), 2, backend))


@pytest.mark.parametrize("bits", [0, 3, 4])
def test_bits_are_one_or_two(bits):
    with pytest.raises(ValueError, match=rf"bits must be 1 \(binary spikes\) or 2 \(ternary spikes\), got {bits}"):
        pack(torch.zeros(1, 1), bits)


def test_no_cupy_kernel():
    with pytest.raises(BackendError, match="packing: backend 'cupy' cannot run: this version has no cupy kernel"):
        pack(torch.zeros(1, 1), 2, "cupy")


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("bits", [1, 2])
def test_spike_linear_is_linear(bits, biased):
    spikes = draw((4, 2, 7, 6), bits, torch.float64).requires_grad_()
    weight = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    inputs = [spikes, weight] + ([torch.randn(3, dtype=torch.float64, requires_grad=True)] if biased else [])
    bias = inputs[2] if biased else None
    outputs = linear(spikes, weight, bias), spike_linear(spikes, AMPLITUDE[:4].double(), weight, bias, bits)
    assert torch.equal(*outputs)
    upstream = torch.randn_like(outputs[0])
    expected, got = (torch.autograd.grad(output, inputs, upstream) for output in outputs)
    torch.testing.assert_close(got, expected)


def test_spike_linear_keeps_two_bits_per_spike(saved_for_backward):
    spikes, weight = draw((4, 2, 256, 64), 2).requires_grad_(), torch.randn(32, 64, requires_grad=True)
    with saved_for_backward() as saved:
        spike_linear(spikes, AMPLITUDE[:4].clone(), weight, None, 2)
    assert saved.nbytes == spikes.numel() // 4 + 4 * 4 + weight.nbytes


def test_spike_linear_keeps_no_spikes_for_frozen_weights(saved_for_backward):
    spikes, weight = draw((4, 2, 256, 64), 2).requires_grad_(), torch.randn(32, 64)
    with saved_for_backward() as saved:
        output = spike_linear(spikes, AMPLITUDE[:4].clone(), weight, None, 2)
    assert saved.nbytes == 4 * 4 + weight.nbytes
    torch.testing.assert_close(torch.autograd.grad(output.sum(), spikes)[0][0, 0, 0], weight.sum(0))


def test_spike_linear_under_autocast():
    spikes = draw((4, 2, 7, 6), 2).requires_grad_()
    weight, bias = torch.randn(3, 6, requires_grad=True), torch.randn(3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = linear(spikes, weight, bias), spike_linear(spikes, AMPLITUDE[:4].clone(), weight, bias, 2)
    assert outputs[1].dtype == torch.bfloat16
    assert torch.equal(*outputs)
    expected, got = (torch.autograd.grad(o.float().sum(), [spikes, weight, bias]) for o in outputs)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    assert [g.dtype for g in got] == [torch.float32] * 3


def check_float8_product(device, dtype, rows, inputs, outputs):
    spikes, amplitude = draw((4, rows // 4, inputs), 2).to(device, dtype).requires_grad_(), AMPLITUDE[:4].to(device)
    scale, bias = torch.tensor(0.375, device=device), torch.randn(outputs, device=device, dtype=dtype)
    weight = (torch.randint(-1, 2, (outputs, inputs), device=device) * scale).to(dtype).requires_grad_()
    y = spike_linear(spikes, amplitude, weight, bias, 2, low_bit=True)
    exact = linear(spikes.detach().double(), weight.detach().double(), bias.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    upstream = torch.randn_like(y)
    expected = torch.autograd.grad(linear(spikes, weight), [spikes, weight], upstream)
    torch.testing.assert_close(torch.autograd.grad(y, [spikes, weight], upstream), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_bit_weights_are_trained_through_a_float8_product(monkeypatch, dtype):
    monkeypatch.setattr("snlp_zoo.ops.spike_linear.sign_dtype", lambda x, outputs: torch.float8_e4m3fn)
    check_float8_product("cpu", dtype, 64, 16, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # first product of the backward thread
def test_the_gpu_chooses_float8_in_training(monkeypatch, dtype):
    chosen = []
    monkeypatch.setattr("snlp_zoo.ops.spike_linear.sign_dtype", lambda *x: chosen.append(sign_dtype(*x)) or chosen[-1])
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs FP8")
    check_float8_product("cuda", dtype, 16384, 768, 3072)
    assert chosen == [torch.float8_e4m3fn]
