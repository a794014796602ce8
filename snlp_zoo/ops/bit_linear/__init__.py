"""Weights in one or 1.58 bits: quantisation, packed storage, and the product of spikes or numbers with them."""

import torch
from torch import Tensor

from snlp_zoo.ops.backend import product_dtype, resolve
from snlp_zoo.ops.bit_linear import kernel
from snlp_zoo.ops.bit_linear.quantise import WEIGHT_BITS, check_bits, quantise, straight_through
from snlp_zoo.ops.bit_linear.reference import pack_reference as pack_signs
from snlp_zoo.ops.bit_linear.reference import packed_bytes, unpack_reference

__all__ = [
    "WEIGHT_BITS",
    "bit_linear",
    "check_bits",
    "pack_signs",
    "pack_weight",
    "packed_bytes",
    "quantise",
    "sign_dtype",
    "straight_through",
    "unpack_weight",
]
_FLOAT8_FROM = 16_384 * 768 * 768  # multiplications from which FP8 was faster than bfloat16 on an H100
_FLOAT8_INPUTS = 3_072  # inputs up to which its sums of signs were found exact
_INTEGERS = torch.backends.mkldnn.is_available() and getattr(torch.cpu, "_is_vnni_supported", lambda: False)()


def pack_weight(weight: Tensor, bits: float, *, centred_scale: bool = False) -> tuple[Tensor, Tensor]:
    """`quantise`, with the signs packed as in `pack_reference`: uint8 [out_features, bytes], and the scale."""
    signs, scale = quantise(weight, bits, centred_scale=centred_scale)
    return pack_signs(signs, bits), scale


def unpack_weight(codes: Tensor, bits: float, in_features: int) -> Tensor:
    """The signs in packed weights: int8 [out_features, in_features]."""
    check_bits(bits)
    return unpack_reference(codes, bits, in_features)


def sign_dtype(x: Tensor, out_features: int) -> torch.dtype | None:
    """In which dtype spikes are best given to `bit_linear` as signs, or None: with their amplitude, in x's own dtype.

    Sums of signs are exact in whatever dtype is named here. int8 is for processors with instructions for it,
    float8_e4m3fn for Hopper and later from the size where it pays.
    """
    inputs, rows = x.shape[-1], x.numel() // max(x.shape[-1], 1)
    if x.device.type == "cpu":
        return torch.int8 if _INTEGERS else torch.promote_types(x.dtype, torch.float32)
    aligned = inputs % 16 == out_features % 16 == 0
    if aligned and inputs <= _FLOAT8_INPUTS and rows * inputs * out_features >= _FLOAT8_FROM and _has_float8(x.device):
        return torch.float8_e4m3fn
    return None if product_dtype(x).itemsize < 4 else x.dtype


def _has_float8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def bit_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    bits: float,
    amplitude: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = scale * Wq x + b with packed Wq; with an amplitude, y[t] = amplitude[t] * scale * Wq s[t] + b for signs s.

    Args:
        x: [..., in_features], float; or signs -1, 0, 1, [T, ..., in_features], in int8, float8_e4m3fn (CUDA) or float.
        codes, scale: as from `pack_weight`: uint8 [out_features, bytes] and a single value.
        bias: [out_features] or None.
        bits: 1.58 or 1.
        amplitude: [T], for signs: applied once per output, after the sum.
        dtype: of the output; default x's or autocast's, for int8 and float8 signs the amplitude's.
        backend: "auto", "torch" or "triton": what unpacks on a GPU.
    Returns:
        [..., out_features]. Sums of signs are exact for fewer than 2^24 inputs (float8: tested to 3,072).
    Raises:
        ValueError: unknown bits, or shapes that disagree.
        RuntimeError: in the backward pass; packed weights have none.
        BackendError: the named backend cannot run here.
    """
    check_bits(bits)
    if codes.shape[1] != packed_bytes(x.shape[-1], bits):
        raise ValueError(
            f"bit_linear: {x.shape[-1]} inputs take {packed_bytes(x.shape[-1], bits)} bytes at {bits} bits, "
            f"the weights have {codes.shape[1]}"
        )
    narrow = x.element_size() == 1
    if narrow and amplitude is None:
        raise ValueError(f"bit_linear: signs in {x.dtype} need the amplitude of each of their {len(x)} steps")
    if amplitude is not None and amplitude.shape != x.shape[:1]:
        raise ValueError(f"bit_linear: amplitude must be ({len(x)},), one per step, got {tuple(amplitude.shape)}")
    dtype = dtype or (amplitude.dtype if narrow and amplitude is not None else product_dtype(x))
    if amplitude is None:
        x = x.to(product_dtype(x))
    elif x.dtype == torch.int8 and not (x.device.type == "cpu" and _INTEGERS):
        x = x.float()
    return kernel.bit_linear(x, codes, amplitude, scale, bias, bits, dtype, resolve(backend, scale, op="bit_linear"))
