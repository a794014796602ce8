"""Channels of one size, before spikes are made of them.

A token has one threshold for all of its channels. Where some are always large, as in most language models, they raise
it until the others are silent, or are cut off by `max_count`. A scale may be moved from a norm, or from the layer
before, into the columns of the next weight without changing what a model computes (Xiao et al. 2022, arXiv:2211.10438,
do so to quantise to int8; here weights stay real, so channels are made wholly equal).
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snlp_zoo.errors import ConversionError
from snlp_zoo.layers.watching import evaluating, hooked
from snlp_zoo.models.converted import is_converted

NORM = 4  # of a channel's size over tokens: between its mean (1) and its largest value (infinity)
_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")  # of a decoder layer
_WITHIN = 1e-3  # a model may change by, relative to its largest output
_LEAST = 1e-3  # size of a channel, relative to the mean one's


class _Group(NamedTuple):
    """Linear layers with one input, and what it comes from: a norm, or a linear layer, of which several input channels
    may be copies of one output (grouped-query attention).
    """

    before: Any
    layers: list[Any]
    head_dim: int = 0


def equalise(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Give the input channels of every linear layer one size, in place; what the model computes stays the same.

    Call it before conversion: what spikes lose depends on the channels' sizes.

    Args:
        model: with decoder layers whose parts are called like Llama's (Mistral, Qwen2, SmolLM2, ...).
        batch: keyword arguments of the model, texts on which channels are measured. Padding counts: give texts without.
    Returns:
        Number of inputs that were equalised.
    Raises:
        ConversionError: no such layers, a converted model, or the model computes something else now: load it again.
    """
    if is_converted(model):
        raise ConversionError(f"equalise: this {type(model).__name__} is converted already; equalise the dense model")
    groups = list(_groups(model))
    if not groups:
        raise ConversionError(
            f"equalise: {type(model).__name__} has no layers with {', '.join(_PARTS)} like Llama's; leave equalise out"
        )
    with evaluating(model), torch.no_grad():
        sizes, before = _sizes(model, groups, batch)
        for group, size in zip(groups, sizes, strict=True):
            _move(group, size)
        after = model(**batch)[0]
    change = float((after - before).abs().max() / before.abs().max())
    if not change < max(_WITHIN, 8 * torch.finfo(after.dtype).eps):
        raise ConversionError(
            f"equalise: {type(model).__name__} has changed by {change:.2g}, so its parts only look like Llama's, or "
            f"{after.dtype} is too coarse for it; load it again, in float32, or leave equalise out"
        )
    return len(groups)


def _groups(model: nn.Module) -> Iterator[_Group]:
    for layer in model.modules():
        parts: Any = layer
        if not all(
            hasattr(layer, name) for name in ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp")
        ):
            continue
        heads, mlp = parts.self_attn, parts.mlp
        if all(hasattr(heads, f"{name}_proj") for name in "qkvo"):
            yield _Group(parts.input_layernorm, [heads.q_proj, heads.k_proj, heads.v_proj])
            yield _Group(heads.v_proj, [heads.o_proj], heads.head_dim)
        if all(hasattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")):
            yield _Group(parts.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
            yield _Group(mlp.up_proj, [mlp.down_proj])


def _sizes(model: nn.Module, groups: list[_Group], batch: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """The size of every group's input channels relative to their tokens' mean, and what the model gives."""
    found: dict[int, Tensor] = {}

    def watch(number: int) -> Any:
        def hook(layer: nn.Module, inputs: tuple) -> None:
            x = inputs[0].abs().flatten(0, -2).double()
            found[number] = (x / x.mean(-1, keepdim=True).clamp_min(1e-9)).pow(NORM).mean(0).pow(1 / NORM)

        return hook

    handles = [group.layers[0].register_forward_pre_hook(watch(number)) for number, group in enumerate(groups)]
    with hooked(handles):
        output = model(**batch)[0]
    return [found[number] for number in range(len(groups))], output


def _move(group: _Group, size: Tensor) -> None:
    """Divide what comes before by each channel's size, and multiply the columns of the weights with it."""
    weight, bias = group.before.weight, getattr(group.before, "bias", None)
    copies, width = len(size) // len(weight), group.head_dim or len(weight)
    size = size.view(-1, copies, width).amax(1)  # one for all copies of an output
    size = size.clamp_min(_LEAST * size.mean())
    size = (size / size.log().mean().exp()).to(weight.dtype)
    rows, columns = size.flatten(), size.unsqueeze(1).expand(-1, copies, -1).flatten()
    weight.div_(rows.view(-1, *(1,) * (weight.ndim - 1)))
    if bias is not None:
        bias.div_(rows)
    for layer in group.layers:
        layer.weight.mul_(columns)
