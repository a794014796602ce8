"""Official SpikeGPT checkpoints: converted, they are the published forward; what is no checkpoint is an error."""

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from snlp_zoo.cli import app
from snlp_zoo.convert.spikegpt import convert
from snlp_zoo.errors import CheckpointError, DataError, RecipeError
from snlp_zoo.registry import load

IDS = torch.randint(0, 50, (60,), generator=torch.Generator().manual_seed(3))


def saved(path, weights):
    torch.save(weights, path)
    return path


@torch.no_grad()
def logits_of(folder):
    return load(folder).double()(IDS.unsqueeze(0)).logits[0]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_converted_model_is_the_published_forward(tmp_path, official_weights, plain_forward, dtype, binary):
    weights = {name: x.to(dtype) for name, x in official_weights(layers=7).items()}  # the authors rescale the seventh
    made = convert(saved(tmp_path / "x.pth", weights), tmp_path / "made", binary_embedding=binary)
    assert sorted(p.name for p in (tmp_path / "made").glob("*.[js]*")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert made.parameters == sum(x.numel() for x in weights.values()) == load(tmp_path / "made").num_parameters()
    assert made.config == {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 7,
                           "binary_embedding": binary}  # fmt: skip
    expected = plain_forward(weights, IDS, binary=binary)
    torch.testing.assert_close(logits_of(tmp_path / "made"), expected, rtol=0, atol=1e-9)
    other = plain_forward(weights, IDS, binary=not binary)
    assert (other - expected).abs().max() > 1


def test_neurons_fire_and_matter(official_weights, plain_forward):
    weights = official_weights(layers=7)
    with_neurons, without = (plain_forward(weights, IDS, spiking=spiking) for spiking in (True, False))
    assert (with_neurons - without).abs().max() > 1  # else the comparison above would show nothing


def test_other_shapes_and_wrappings(tmp_path, official_weights, plain_forward):
    weights = official_weights()
    flat = {name: x.flatten() if x.shape[:2] == (1, 1) else x for name, x in weights.items()}
    wrapped = {"model": {f"module.{name}": x for name, x in flat.items()}, "iteration": 3}
    convert(saved(tmp_path / "x.pth", wrapped), tmp_path / "made", hidden_dropout_prob=0.5)
    assert load(tmp_path / "made").config.hidden_dropout_prob == 0.5
    torch.testing.assert_close(logits_of(tmp_path / "made"), plain_forward(weights, IDS), rtol=0, atol=1e-9)


def drawn(weights, plain_forward, binary, length):
    """A text that the model with these embeddings would write."""
    ids = [7]
    for _ in range(length - 1):
        probabilities = plain_forward(weights, torch.tensor(ids), binary=binary)[-1].softmax(-1)
        ids.append(int(torch.multinomial(probabilities, 1)))
    return torch.tensor(ids)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("file", [True, False])
def test_a_text_decides_between_embeddings(tmp_path, official_weights, plain_forward, letters, binary, file):
    weights, (tokenizer, spelt) = official_weights(layers=2), letters
    ids = drawn(weights, plain_forward, binary, 50)
    text = spelt(ids.tolist())
    (tmp_path / "text.txt").write_text(text)
    made = convert(
        saved(tmp_path / "x.pth", weights), tmp_path / "made", text=tmp_path / "text.txt" if file else text,
        tokenizer=tokenizer,
    )  # fmt: skip
    assert load(tmp_path / "made").config.binary_embedding == made.config["binary_embedding"] == binary
    for name, option in (("binary", True), ("real", False)):
        loss = cross_entropy(plain_forward(weights, ids, binary=option)[:-1], ids[1:]).item()
        assert made.perplexities[name] == pytest.approx(math.exp(loss), rel=1e-4)
    assert (tmp_path / "made" / "tokenizer.json").is_file()


def test_without_a_text_embeddings_are_as_trained(tmp_path, official_weights, letters):
    src = saved(tmp_path / "x.pth", official_weights())
    made = convert(src, tmp_path / "made")
    assert (made.config["binary_embedding"], made.perplexities) == (True, {})
    made = convert(src, tmp_path / "real", binary_embedding=False, text="abcabc", tokenizer=letters[0])
    assert (made.config["binary_embedding"], made.perplexities.keys()) == (False, {"real"})


def without(name):
    return lambda weights: {key: x for key, x in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("blocks.1.att.output.weight"), r"blocks\.1\.att\.output\.weight is missing;"),
        (lambda w: {**without("ln_out.bias")(w), "ln_out.bais": w["ln_out.bias"]},
         r"ln_out\.bais has no place in the model \(nearest: ln_out\.bias\); ln_out\.bias is missing \(nearest"),
        (lambda w: w | {"head_q.weight": torch.ones(2)}, r"head_q\.weight has no place in the model;"),
        (lambda w: w | {"head.weight": torch.ones(50, 17)}, r"head\.weight is \[50, 17\], not \[50, 16\]"),
        (lambda w: w | {"blocks.0.att.time_mix_k": torch.ones(16, 1, 1)}, r"time_mix_k is \[16, 1, 1\], not \[16\]"),
        (lambda w: w | {"blocks.2.ffn.value.weight": w["blocks.2.ffn.value.weight"].T.contiguous()}, "not"),
        (lambda w: w | {"ln_out.bias": torch.full((16,), torch.nan)}, r"ln_out\.bias holds NaN or Inf"),
        (lambda w: w | {"emb.weight": torch.full((50, 16), torch.inf)}, r"emb\.weight holds NaN or Inf"),
        (without("emb.weight"), r"emb\.weight must be a matrix, it has no such tensor"),
        (lambda w: w | {"emb.weight": torch.ones(50)}, r"emb\.weight must be a matrix, it has \[50\]"),
        (lambda w: w | {"blocks.999999999.ln1.weight": torch.ones(16)},
         r"blocks\.3\.att\.key\.weight is missing.*and \d+ more"),
        (lambda w: {f"transformer.{name}": x for name, x in w.items()},
         r"emb\.weight must be a matrix, it has no such tensor \(nearest: transformer\.emb\.weight\)"),
    ],
)  # fmt: skip
def test_every_tensor_is_accounted_for(tmp_path, official_weights, change, message):
    src = saved(tmp_path / "x.pth", change(official_weights()))
    with pytest.raises(CheckpointError, match=message):
        convert(src, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]  # nothing was written


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text": "abc"}, DataError, "needs a tokenizer"),
        ({"text": "a", "tokenizer": "letters"}, DataError, "two tokens at least, this one 1"),
        ({"tokenizer": "nothing"}, CheckpointError, "tokenizer in"),
        ({"hidden_size": 17}, CheckpointError, r"blocks\.0\.att\.key\.weight is \[16, 16\], not \[17, 17\]"),
        ({"taw": 2.0}, RecipeError, "no config field 'taw'; did you mean 'tau'"),
        ({"v_threshold": -1.0}, RecipeError, "v_threshold"),
    ],
)
def test_bad_options_write_nothing(tmp_path, official_weights, letters, options, error, message):
    src = saved(tmp_path / "x.pth", official_weights())
    options = {key: tmp_path / value if key == "tokenizer" else value for key, value in options.items()}
    with pytest.raises(error, match=message):
        convert(src, tmp_path / "made", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letters", "x.pth"]


def test_sizes_out_of_bounds(tmp_path, official_weights):
    src = saved(tmp_path / "x.pth", official_weights(vocabulary=2_000_001, width=1, inner=4, layers=1))
    with pytest.raises(RecipeError, match="vocab_size must be between 1 and 2000000, got 2000001"):
        convert(src, tmp_path / "made")
    src = saved(tmp_path / "x.pth", official_weights(vocabulary=0))
    with pytest.raises(RecipeError, match="vocab_size must be between 1 and 2000000, got 0"):
        convert(src, tmp_path / "made")


def test_a_tokenizer_of_another_vocabulary(tmp_path, official_weights, letters):
    src = saved(tmp_path / "x.pth", official_weights(vocabulary=20))
    with pytest.raises(DataError, match="gives token 49, the checkpoint knows 20"):
        convert(src, tmp_path / "made", text="aX", tokenizer=letters[0])


def test_what_is_there_is_not_overwritten(tmp_path, official_weights):
    src, dst = saved(tmp_path / "x.pth", official_weights()), tmp_path / "made"
    dst.mkdir()
    convert(src, dst)  # an empty folder is as good as none
    before = (dst / "config.json").stat().st_mtime_ns
    for path in (dst, src):
        with pytest.raises(CheckpointError, match="it exists; name a new folder"):
            convert(src, path)
    assert (dst / "config.json").stat().st_mtime_ns == before


def test_where_nothing_can_be_written(tmp_path, official_weights):
    src = saved(tmp_path / "x.pth", official_weights())
    with pytest.raises(CheckpointError, match=r"cannot write .*x\.pth/made"):
        convert(src, src / "made")


def run(*arguments):
    return CliRunner().invoke(app, ["convert-checkpoint", *map(str, arguments)])


def test_the_command(tmp_path, official_weights, letters):
    src = saved(tmp_path / "x.pth", official_weights())
    (tmp_path / "text.txt").write_text("abcabcabc")
    told = run("spikegpt", src, tmp_path / "a", "--text", tmp_path / "text.txt", "--tokenizer", letters[0])
    assert told.exit_code == 0, told.output
    assert "12,176 parameters, vocab_size 50" in told.stdout
    assert "perplexity with binary embeddings: " in told.stdout
    assert "perplexity with real embeddings: " in told.stdout
    found = json.loads(run("spikegpt", src, tmp_path / "b", "--no-binary-embedding", "--json").stdout)
    assert found["config"]["binary_embedding"] is False
    assert load(found["path"]).config.binary_embedding is False


def test_the_command_refuses(tmp_path, official_weights):
    src = saved(tmp_path / "x.pth", official_weights())
    for arguments, message in (
        (("spikgpt", src, tmp_path / "a"), "unknown kind of checkpoint 'spikgpt', .*did you mean 'spikegpt'"),
        (("spikegpt", src, tmp_path / "a", "--spiking"), "--spiking is for rwkv4"),
    ):
        with pytest.raises(CheckpointError, match=message):
            raise run(*arguments).exception
