"""The weights of RWKV-4, which SpikeGPT's authors kept name by name, as weights of our SpikeGPT."""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from snlp_zoo.errors import CheckpointError

_VECTORS = ("time_decay", "time_first", "time_mix_k", "time_mix_v", "time_mix_r")
_LETTERS = {"_k": "_key", "_v": "_value", "_r": "_receptance"}


def _norms(theirs: str, ours: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for part in ("weight", "bias"):
        yield f"{theirs}.{part}", f"spikegpt.{ours}.{part}", ("C",)


def _names(layers: int) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Their name, ours, and the axes: V vocabulary, C width, F inner width."""
    yield "emb.weight", "spikegpt.embeddings.weight", ("V", "C")
    yield "head.weight", "lm_head.weight", ("V", "C")
    yield from _norms("ln_out", "norm")
    yield from _norms("blocks.0.ln0", "pre_norm")
    for layer in range(layers):
        theirs, ours = f"blocks.{layer}", f"layers.{layer}"
        yield from _norms(f"{theirs}.ln1", f"{ours}.time_norm")
        yield from _norms(f"{theirs}.ln2", f"{ours}.channel_norm")
        for name in _VECTORS:
            spelt = name[:-2] + _LETTERS[name[-2:]] if name[-2:] in _LETTERS else name
            yield f"{theirs}.att.{name}", f"spikegpt.{ours}.time_mix.{spelt}", ("C",)
            if name in ("time_mix_k", "time_mix_r"):
                yield f"{theirs}.ffn.{name}", f"spikegpt.{ours}.channel_mix.{spelt}", ("C",)
        for name in ("key", "value", "receptance", "output"):
            yield f"{theirs}.att.{name}.weight", f"spikegpt.{ours}.time_mix.{name}.weight", ("C", "C")
        for name, axes in {"key": ("F", "C"), "value": ("C", "F"), "receptance": ("C", "C")}.items():
            yield f"{theirs}.ffn.{name}.weight", f"spikegpt.{ours}.channel_mix.{name}.weight", axes


def sizes(src: Path, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """vocab_size, hidden_size, intermediate_size and num_hidden_layers that the tensors have.

    Raises:
        CheckpointError: the two tensors that show them are missing or no matrices.
    """
    for name in ("emb.weight", "blocks.0.ffn.key.weight"):
        if name not in weights or weights[name].ndim != 2:
            found = list(weights[name].shape) if name in weights else f"no such tensor{_nearest(name, weights)}"
            raise CheckpointError(f"cannot convert {src}: {name} must be a matrix, it has {found}")
    vocabulary, width = weights["emb.weight"].shape
    blocks = {match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    inner = weights["blocks.0.ffn.key.weight"].shape[0]
    return {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": len(blocks)
    }  # fmt: skip


def renamed(src: Path, weights: Mapping[str, Tensor], size: Mapping[str, int]) -> dict[str, Tensor]:
    """Every tensor under our name, in float32 and our shape: vectors may come as [1, 1, C].

    Args:
        size: as from `sizes`.
    Raises:
        CheckpointError: a tensor is missing, one has no place, or is of another shape or not finite; names them.
    """
    axes = {"V": size["vocab_size"], "C": size["hidden_size"], "F": size["intermediate_size"]}
    names = {theirs: (ours, [axes[axis] for axis in of]) for theirs, ours, of in _names(size["num_hidden_layers"])}
    wrong = [
        f"{name} is missing{_nearest(name, weights.keys() - names.keys())}" for name in names.keys() - weights.keys()
    ]
    wrong += [
        f"{name[:80]} has no place in the model{_nearest(name, names.keys() - weights.keys())}"
        for name in weights.keys() - names.keys()
    ]
    made = {}
    for name in sorted(names.keys() & weights.keys()):
        tensor, (ours, shape) = weights[name], names[name]
        if list(tensor.shape) not in (shape, [1, 1, *shape]):
            wrong.append(f"{name} is {list(tensor.shape)}, not {shape}")
        elif tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            wrong.append(f"{name} holds NaN or Inf")
        else:
            made[ours] = tensor.reshape(shape).float()
    if wrong:
        shown = "; ".join(sorted(wrong)[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise CheckpointError(f"cannot convert {src}: {shown}; it is not a whole RWKV-4 or SpikeGPT state dict")
    return made


def _nearest(name: str, others: Iterable[str]) -> str:
    found = get_close_matches(name[:80], [other[:80] for other in others], n=1)
    return f" (nearest: {found[0]})" if found else ""
