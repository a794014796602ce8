"""Linear layers with weights of one or 1.58 bits, and their packed storage.

Training keeps a latent float weight and quantises it anew in every forward. `pack` turns a trained model's latent
weights into what they quantise to, in one or two bits each; such a model computes and saves, but learns no more.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from snlp_zoo.ops.bit_linear import (
    WEIGHT_BITS,
    bit_linear,
    pack_signs,
    pack_weight,
    packed_bytes,
    straight_through,
    unpack_weight,
)

AnyModule = TypeVar("AnyModule", bound=nn.Module)
PACKED_BUFFERS = ("weight_packed", "weight_int8")  # endings of the names of what packing writes


class BitLinear(nn.Linear):
    """`torch.nn.Linear` whose weight acts as scale * Wq, with Wq of `bits` bits; see `ops.bit_linear.quantise`.

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`.
        bits: 32 (an ordinary linear layer), 1.58 or 1.
        packed: start without a latent weight, to be filled by loading.
        centred_scale: 1 bit only, see `quantise`.
    State that is saved: `weight`; packed in its place `weight_packed`, uint8 [out_features, bytes], and `weight_scale`,
        a single float32 in a model of any dtype. `bias` stays.
    Raises:
        ValueError: unknown bits, packed at 32 bits, or an input of another width.
        RuntimeError: a packed layer is called in training mode or differentiated.
    """

    weight_packed: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: float = 32,
        packed: bool = False,
        centred_scale: bool = False,
    ) -> None:
        if bits not in (32, *WEIGHT_BITS):
            raise ValueError(f"weights have 32, 1.58 or 1 bits, got {bits}")
        if packed and bits == 32:
            raise ValueError("weights of 32 bits cannot be packed; use bits=1.58 or bits=1")
        super().__init__(in_features, out_features, bias)
        self.bits, self.centred_scale = bits, centred_scale
        if packed:
            codes = torch.zeros(out_features, packed_bytes(in_features, bits), dtype=torch.uint8)
            self._hold(codes, torch.ones((), dtype=torch.float32))

    @property
    def packed(self) -> bool:
        return self.weight is None

    def _hold(self, codes: Tensor, scale: Tensor) -> None:
        self.register_parameter("weight", None)
        self.register_buffer("weight_packed", codes)
        self.register_buffer("weight_scale", scale)

    def pack(self) -> None:
        """Replace the latent weight by its packed signs and scale."""
        codes, scale = pack_weight(self.weight.detach(), self.bits, centred_scale=self.centred_scale)
        self._hold(codes, scale.float())

    def quantised_weight(self) -> Tensor:
        """What the weight acts as, [out_features, in_features]; the gradient goes straight to the latent weight."""
        if self.bits == 32:
            return self.weight
        return straight_through(self.weight, self.bits, centred_scale=self.centred_scale)

    def refuse_training(self) -> None:
        if self.packed and self.training:
            raise RuntimeError(
                f"{type(self).__name__}: packed weights cannot be trained; call .eval(), or train the unpacked model"
            )

    def check_width(self, x: Tensor) -> None:
        """What `linear` checks of itself: in packed weights, the last byte may have room for other widths."""
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"{type(self).__name__}: x must be [..., {self.in_features}], as in_features says, got {tuple(x.shape)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        self.refuse_training()
        self.check_width(x)
        if self.packed:
            return bit_linear(x, self.weight_packed, self.weight_scale, self.bias, bits=self.bits)
        return linear(x, self.quantised_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, packed={self.packed}"

    def _apply(self, fn, recurse=True):
        scale = self._buffers.get("weight_scale")
        super()._apply(fn, recurse)
        if scale is not None and self.weight_scale.dtype != scale.dtype:  # .bfloat16() is not for the scale
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        theirs = [
            packed for packed, name in ((True, "weight_packed"), (False, "weight")) if prefix + name in state_dict
        ]
        if theirs and theirs[0] != self.packed:
            errors.append(storage_mismatch(prefix.removesuffix("."), packed=theirs[0]))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def storage_mismatch(where: str, packed: bool) -> str:
    """The sentence for weights that are (not) packed and meet a model that is not (is)."""
    held, wanted = ("packed", "unpacked") if packed else ("unpacked", "packed")
    return f"{where}: the weights to load are {held}, the model is {wanted}; set packed={packed} in its configuration"


def make_linear(
    in_features: int, out_features: int, bias: bool = True, bits: float = 32, packed: bool = False
) -> nn.Linear:
    """`torch.nn.Linear` for 32 bits, else `BitLinear`."""
    if bits == 32 and not packed:
        return nn.Linear(in_features, out_features, bias)
    return BitLinear(in_features, out_features, bias, bits, packed)


class Int8Embedding(nn.Module):
    """An embedding table in int8 with one scale per row, max|row| / 127; for inference.

    Args:
        rows, width: the table's shape.
    State that is saved: `weight_int8` [rows, width] and `weight_scale` [rows, 1].
    """

    weight_int8: Tensor
    weight_scale: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight_int8", torch.zeros(rows, width, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(rows, 1))

    @classmethod
    @torch.no_grad()
    def from_table(cls, table: Tensor) -> "Int8Embedding":
        """table [rows, width] -> the nearest int8 table, in the table's dtype."""
        made = cls(0, 0)
        made.weight_scale = (table.float().abs().amax(1, keepdim=True) / 127).to(table.dtype)
        scale = made.weight_scale.float().clamp_min(1e-30)  # as it is kept, in half precision rounded
        made.weight_int8 = (table.float() / scale).round().clamp(-127, 127).to(torch.int8)
        return made

    @property
    def num_embeddings(self) -> int:
        return len(self.weight_int8)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., width]."""
        return self.weight_int8[ids] * self.weight_scale[ids]

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight_int8.shape)


class SignEmbedding(nn.Module):
    """The signs of an embedding table, a bit each, 0 being positive: all that a neuron with threshold 0 sees of it; for
    inference.

    Args:
        num_embeddings, embedding_dim: the table's rows and width.
    State that is saved: `weight_packed`, uint8 [rows, bytes], and `weight_scale`, 1, in the dtype of what comes out.
    """

    weight_packed: Tensor
    weight_scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        codes = torch.zeros(num_embeddings, packed_bytes(embedding_dim, 1), dtype=torch.uint8)
        self.register_buffer("weight_packed", codes)
        self.register_buffer("weight_scale", torch.ones(1))

    @classmethod
    @torch.no_grad()
    def from_table(cls, table: Tensor) -> "SignEmbedding":
        """The signs of a table [rows, width], in its dtype."""
        made = cls(*table.shape)
        made.weight_packed, made.weight_scale = pack_signs((table >= 0).to(torch.int8), 1), table.new_ones(1)
        return made

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> -1 or 1, [..., width]."""
        signs = unpack_weight(self.weight_packed[ids.flatten()], 1, self.embedding_dim)
        return signs.view(*ids.shape, self.embedding_dim) * self.weight_scale

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


Table = type[Int8Embedding] | type[SignEmbedding]


def small_tables(module: nn.Module, kind: Table, filled: bool = True) -> None:
    """Replace every embedding in `module` by one of this kind, of its values, or (not filled) empty."""
    for name, child in module.named_children():
        if isinstance(child, nn.Embedding):
            setattr(module, name, kind.from_table(child.weight) if filled else kind(*child.weight.shape))
        else:
            small_tables(child, kind, filled)


def pack(model: AnyModule, int8_embeddings: bool = False) -> AnyModule:
    """Turn a trained model's low-bit weights into packed storage, in place; the model is then for inference only.

    Outputs stay what they were, up to rounding. `config.packed` (and `config.int8_embeddings`) are set, of a converted
    model `config.quantization_config.packed`, so that `save_pretrained` writes packed weights and `from_pretrained`
    and `snlp_zoo.load` read them.

    Args:
        model: with layers of 1.58 or 1 bits (weight_bits in its configuration).
        int8_embeddings: keep embedding tables small, too: in int8 with one scale per row, which changes outputs a
            little, or, where a model makes spikes of their signs, in a bit each, which changes nothing.
    Returns:
        The model, in evaluation mode.
    Raises:
        ValueError: no low-bit layers, packed already, or int8_embeddings of a converted model or of one that needs its
            table whole.
    """
    layers = [module for module in model.modules() if isinstance(module, BitLinear) and module.bits in WEIGHT_BITS]
    if not layers:
        raise ValueError(f"pack: {type(model).__name__} has no low-bit layers; build it with weight_bits=1.58 or 1")
    if any(layer.packed for layer in layers):
        raise ValueError(f"pack: {type(model).__name__} is packed already")
    conversion = getattr(getattr(model, "config", None), "quantization_config", None)
    if int8_embeddings and conversion is not None:
        raise ValueError(
            f"pack: {type(model).__name__} is converted and keeps its embeddings; leave int8_embeddings out"
        )
    shared = getattr(model, "get_output_embeddings", lambda: None)() is not None
    table: Table | None = getattr(model, "small_table", None if shared else Int8Embedding)
    if int8_embeddings and table is None:
        raise ValueError(
            f"pack: the head of {type(model).__name__} shares the embedding table, or its neurons need it whole; "
            "leave int8_embeddings out"
        )
    for layer in layers:
        layer.pack()
    if int8_embeddings and table is not None:
        small_tables(model, table)
    if conversion is not None:
        conversion.packed = True
    elif (config := getattr(model, "config", None)) is not None:
        config.packed, config.int8_embeddings = True, int8_embeddings
    return model.eval()
