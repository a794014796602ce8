"""The published forwards, written once more with nothing of the package in them, and a checkpoint in their layout.

One text of n tokens; C width, F inner width, V vocabulary; weights under the authors' names.
"""

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def norm(x, weights, name):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def mixed(x, weights, name):
    mu = weights[name].reshape(-1)
    return mu * x + (1 - mu) * torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def lif(current):
    """tau 2, threshold 1, hard reset to 0, over tokens."""
    v, spikes = torch.zeros_like(current[0]), []
    for x in current:
        h = v + (x - v) / 2
        spikes.append((h >= 1).to(x.dtype))
        v = torch.where(h >= 1, torch.zeros_like(h), h)
    return torch.stack(spikes)


def wkv(w, u, k, v):
    """Weights of a softmax over the past, distance by distance: no recurrence, no running maximum."""
    n = len(k)
    rows = []
    for t in range(n):
        distance = torch.arange(t - 1, -1, -1, dtype=k.dtype).unsqueeze(1)
        logits = torch.cat([distance * w + k[:t], (u + k[t]).unsqueeze(0)])
        rows.append((logits.softmax(0) * v[: t + 1]).sum(0))
    return torch.stack(rows)


def published(weights, ids, *, spiking=True, binary=True):
    """Logits [n, V] of SpikeGPT, or of the RWKV-4 it was made of."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    fire = lif if spiking else lambda current: current
    x = weights["emb.weight"][ids]
    x = norm((x >= 0).double() if binary else x, weights, "blocks.0.ln0")
    for i in range(len({name.split(".")[1] for name in weights if name.startswith("blocks.")})):
        block = f"blocks.{i}"
        y, att = norm(x, weights, f"{block}.ln1"), f"{block}.att"
        r, k, v = (
            mixed(y, weights, f"{att}.time_mix_{name[0]}") @ weights[f"{att}.{name}.weight"].T
            for name in ("receptance", "key", "value")
        )
        u, w = weights[f"{att}.time_first"].reshape(-1), -weights[f"{att}.time_decay"].reshape(-1).exp()
        x = x + fire((r.sigmoid() * wkv(w, u, k, v)) @ weights[f"{att}.output.weight"].T)
        y, ffn = norm(x, weights, f"{block}.ln2"), f"{block}.ffn"
        k = (mixed(y, weights, f"{ffn}.time_mix_k") @ weights[f"{ffn}.key.weight"].T).relu() ** 2
        r = mixed(y, weights, f"{ffn}.time_mix_r") @ weights[f"{ffn}.receptance.weight"].T
        x = x + fire(r.sigmoid() * (k @ weights[f"{ffn}.value.weight"].T))
    return norm(x, weights, "ln_out") @ weights["head.weight"].T


def official(vocabulary=50, width=16, inner=64, layers=3, seed=0):
    """A state dict with the authors' names and shapes, random numbers large enough for neurons to fire."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    made = {"emb.weight": draw(vocabulary, width), "blocks.0.ln0.weight": 1 + draw(width, scale=0.1)}
    made["blocks.0.ln0.bias"] = draw(width, scale=0.1)
    for i in range(layers):
        block = f"blocks.{i}"
        for name in ("ln1", "ln2"):
            made[f"{block}.{name}.weight"], made[f"{block}.{name}.bias"] = 1 + draw(width, scale=0.1), draw(width)
        made |= {f"{block}.att.time_decay": draw(width), f"{block}.att.time_first": draw(width)}
        for name in ("att.time_mix_k", "att.time_mix_v", "att.time_mix_r", "ffn.time_mix_k", "ffn.time_mix_r"):
            made[f"{block}.{name}"] = torch.rand(1, 1, width, generator=generator)
        for name in ("key", "value", "receptance", "output"):
            made[f"{block}.att.{name}.weight"] = draw(width, width, scale=0.5)
        made[f"{block}.ffn.key.weight"] = draw(inner, width, scale=0.3)
        made[f"{block}.ffn.receptance.weight"] = draw(width, width, scale=0.3)
        made[f"{block}.ffn.value.weight"] = draw(width, inner, scale=0.3)
    made |= {"ln_out.weight": 1 + draw(width, scale=0.1), "ln_out.bias": draw(width, scale=0.1)}
    return made | {"head.weight": draw(vocabulary, width)}


@pytest.fixture(scope="session")
def plain_forward():
    return published


@pytest.fixture
def official_weights():
    return official


@pytest.fixture(scope="session")
def tiny_rwkv4():
    """Folder of a public RWKV-4 of 660 thousand parameters and the logits it should give, if this machine has it."""
    data = os.environ.get("SNLP_DATA", Path(__file__).parents[2].parent / "shared" / "data")
    folder = Path(data) / "fixtures" / "tiny_rwkv4"
    if not folder.is_dir():
        pytest.skip(f"no {folder.name} in the data folder: set SNLP_DATA to one that has fixtures/{folder.name}")
    return folder


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWX"


@pytest.fixture
def letters(tmp_path):
    """Folder of a tokenizer that has a token for each of 50 letters, and the function ids -> text."""
    inner = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="a"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "letters")
    return tmp_path / "letters", lambda ids: "".join(LETTERS[i] for i in ids)
