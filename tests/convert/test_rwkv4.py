"""Dense RWKV-4 checkpoints, as they are and as a start for SpikeGPT."""

import json
import struct

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from snlp_zoo.cli import app
from snlp_zoo.convert import rwkv4
from snlp_zoo.errors import CheckpointError
from snlp_zoo.registry import load

IDS = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(3))


def as_ggmf(path, weights, kind=0):
    """Their names in rwkv.cpp's format: matrices in `kind`, vectors in FP32, decays as -exp."""
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    with path.open("wb") as file:
        file.write(b"fmgg" + struct.pack("<5I", 100, *weights["emb.weight"].shape, layers, kind))
        for name, tensor in weights.items():
            x = -tensor.exp() if name.endswith("time_decay") else tensor
            x = x.flatten() if x.ndim == 3 else x
            own = kind if x.ndim == 2 else 0
            file.write(struct.pack(f"<3I{x.ndim}I", x.ndim, len(name), own, *reversed(x.shape)))
            file.write(name.encode() + x.numpy().astype("<f2" if own else "<f4").tobytes())
    return path


@torch.no_grad()
def logits_of(folder, ids=IDS):
    return load(folder).double()(ids.unsqueeze(0)).logits[0]


@pytest.mark.parametrize("spiking", [False, True])
@pytest.mark.parametrize("kind", [0, 1, "pth"])
def test_the_converted_model_is_the_published_forward(tmp_path, official_weights, plain_forward, kind, spiking):
    weights = official_weights(layers=7)
    if kind == 1:
        weights = {name: x.half().float() if x.ndim == 2 else x for name, x in weights.items()}
    src = tmp_path / "x"
    if kind == "pth":
        torch.save(weights, src)
    else:
        as_ggmf(src, weights, kind)
    made = rwkv4.convert(src, tmp_path / "made", spiking=spiking)
    assert (made.config["spiking"], made.config["binary_embedding"]) == (spiking, False)
    expected = plain_forward(weights, IDS, spiking=spiking, binary=False)
    # log(-w) of a rounded w = -exp(raw) is raw up to rounding
    torch.testing.assert_close(logits_of(tmp_path / "made"), expected, rtol=0, atol=1e-9 if kind == "pth" else 1e-4)


def test_a_public_checkpoint_gives_the_logits_it_should(tmp_path, tiny_rwkv4):
    made = rwkv4.convert(tiny_rwkv4 / "tiny-rwkv-660K-FP32.bin", tmp_path / "made")
    assert made.parameters == 661_504
    assert {made.config[key] for key in ("vocab_size", "intermediate_size")} == {256}
    expected = torch.from_numpy(np.fromfile(tiny_rwkv4 / "expected_logits.bin", "<f4"))
    model, ids = load(tmp_path / "made"), torch.tensor([list(b'"in')])
    with torch.no_grad():
        assert (model(ids).logits[0, -1] - expected).abs().max() < 1e-4
        past = None
        for token in ids.split(1, 1):  # and token by token
            output = model(token, past_key_values=past, use_cache=True)
            past = output.past_key_values
        assert (output.logits[0, -1] - expected).abs().max() < 1e-4


def test_a_public_checkpoint_starts_a_spiking_model(tmp_path, tiny_rwkv4):
    src = tiny_rwkv4 / "tiny-rwkv-660K-FP32.bin"
    rwkv4.convert(src, tmp_path / "dense")
    rwkv4.convert(src, tmp_path / "spiking", spiking=True, wiring="spike_driven")
    dense, spiking = load(tmp_path / "dense"), load(tmp_path / "spiking")
    assert spiking.config.spiking
    assert spiking.config.wiring == "spike_driven"
    theirs = dense.state_dict()
    assert all(torch.equal(x, theirs[name]) for name, x in spiking.state_dict().items())
    assert not torch.allclose(logits_of(tmp_path / "dense"), logits_of(tmp_path / "spiking"))


def test_decays_that_do_not_decay(tmp_path, official_weights):
    weights = official_weights()
    src = as_ggmf(tmp_path / "x", weights)
    content = src.read_bytes()
    decay = -weights["blocks.1.att.time_decay"].exp()
    src.write_bytes(content.replace(decay.numpy().tobytes(), decay.neg().numpy().tobytes()))
    with pytest.raises(CheckpointError, match=r"blocks\.1\.att\.time_decay must be negative, its largest is"):
        rwkv4.convert(src, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_the_dense_network_has_no_spikes(tmp_path, official_weights):
    src = as_ggmf(tmp_path / "x", official_weights())
    with pytest.raises(CheckpointError, match="needs spiking=True"):
        rwkv4.convert(src, tmp_path / "made", binary_embedding=True)
    made = rwkv4.convert(src, tmp_path / "made", spiking=True, binary_embedding=True)
    assert made.config["binary_embedding"]


def test_the_command(tmp_path, official_weights, letters):
    src = as_ggmf(tmp_path / "x", official_weights())
    (tmp_path / "text.txt").write_text("abcabc")
    options = ["--spiking", "--text", str(tmp_path / "text.txt"), "--tokenizer", str(letters[0]), "--json"]
    told = CliRunner().invoke(app, ["convert-checkpoint", "rwkv4", str(src), str(tmp_path / "made"), *options])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert (found["config"]["spiking"], found["perplexities"].keys()) == (True, {"real"})


def test_files_that_are_none(tmp_path):
    for content in (b"", b"fmg", b"GGUF" + bytes(100)):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot read"):
            rwkv4.convert(tmp_path / "x", tmp_path / "made")
    with pytest.raises(CheckpointError, match="cannot read"):
        rwkv4.convert(tmp_path / "nothing", tmp_path / "made")
