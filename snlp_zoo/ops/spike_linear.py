"""The product of spikes and weights, which keeps the spikes for its backward in one or two bits each."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from snlp_zoo.ops.backend import product_dtype
from snlp_zoo.ops.bit_linear import sign_dtype
from snlp_zoo.ops.bit_linear.kernel import FLOAT8, sign_product
from snlp_zoo.ops.packing import pack, unpack

# outputs per input from which FP8 makes up for turning spikes into signs: an H100 gained 8 % at 4 and lost 26 % at 1
_FLOAT8_FAN = 4


class _SpikeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spikes, amplitude, weight, bias, bits, low_bit):
        pays = low_bit and len(weight) >= _FLOAT8_FAN * spikes.shape[-1]
        float8 = pays and sign_dtype(spikes, len(weight)) == FLOAT8
        # what no gradient asks for is not kept
        codes = pack(spikes, bits) if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(codes, amplitude, weight if ctx.needs_input_grad[0] else None)
        ctx.shape, ctx.bits = spikes.shape, bits
        if codes is None or not float8:
            return linear(spikes, weight, bias)
        # bytes are read and written in place of spikes: cheaper than to convert these
        signs = unpack(codes, torch.ones_like(amplitude), bits, spikes.shape, dtype=FLOAT8).flatten(0, -2)
        scale = weight.abs().amax().float()
        y = sign_product(signs, weight.sign().to(FLOAT8), amplitude, scale, bias, spikes.dtype, "torch")
        return y.view(*spikes.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        codes, amplitude, weight = ctx.saved_tensors
        grad_spikes = grad @ weight if weight is not None else None
        rows = grad.flatten(0, -2)
        grad_weight = None
        if codes is not None:
            spikes = unpack(codes, amplitude, ctx.bits, ctx.shape, dtype=grad.dtype)
            grad_weight = rows.mT @ spikes.flatten(0, -2)
        grad_bias = rows.sum(0) if ctx.needs_input_grad[3] else None
        return grad_spikes, None, grad_weight, grad_bias, None, None


def spike_linear(
    spikes: Tensor, amplitude: Tensor, weight: Tensor, bias: Tensor | None, bits: int, low_bit: bool = False
) -> Tensor:
    """y[t] = W s[t] + b, as `torch.nn.functional.linear`, for spikes that are 0 or plus or minus the step's amplitude.

    Args:
        spikes: [T, ..., in_features] in {0, a[t]} (bits 1) or {-a[t], 0, a[t]} (bits 2).
        amplitude: a, [T]. Its own gradient is the neuron's: it arrives through the spikes.
        weight, bias: [out_features, in_features] and [out_features] or None.
        bits: 1 for binary, 2 for ternary spikes.
        low_bit: the weight is -c, 0 or c everywhere; where FP8 pays (`sign_dtype`) signs are then summed, exactly, and
            scaled. The gradients are those of the plain product.
    Returns:
        [T, ..., out_features]; of the dtype `product_dtype` gives for spikes.
    """
    if torch.is_autocast_enabled(spikes.device.type):  # so that the backward keeps weights as they were used
        dtype = product_dtype(spikes)
        spikes, weight = spikes.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if not low_bit and not torch.is_grad_enabled():  # nothing to keep for a backward
        return linear(spikes, weight, bias)
    return _SpikeLinear.apply(spikes, amplitude, weight, bias, bits, low_bit)
