"""`snlp-zoo generate` on a model and a tokenizer of characters in a folder."""

import json
import sys

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from snlp_zoo import cli, registry
from snlp_zoo.convert import to_spiking
from snlp_zoo.errors import DataError
from snlp_zoo.generate import generate


@pytest.fixture
def folder(tmp_path):
    letters = {chr(97 + i): i for i in range(26)} | {" ": 26, "?": 27}
    inner = Tokenizer(models.WordLevel(letters, unk_token="?"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")  # noqa: S106
    tokenizer.save_pretrained(tmp_path)
    model = registry.build("spikegpt_tiny", vocab_size=28)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["snlp-zoo", "generate", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def greedy(folder, prompt, **options):
    tokenizer, model = registry.load_tokenizer(folder), registry.load(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(ids, do_sample=False, pad_token_id=0, **options)
    return tokenizer.decode(written[0], skip_special_tokens=True)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_the_likeliest_text(folder, run, stream):
    code, out, _ = run(folder, "once upon", "--max-new-tokens", 12, "--temperature", 0, *stream)
    assert code == 0
    assert out == greedy(folder, "once upon", max_new_tokens=12) + "\n"


def test_the_coldest_temperature_takes_the_likeliest(folder, run):
    code, out, _ = run(folder, "once", "--max-new-tokens", 8, "--temperature", 1e-45)
    assert (code, out) == (0, greedy(folder, "once", max_new_tokens=8) + "\n")


def test_beams(folder, run):
    code, out, _ = run(folder, "once", "--max-new-tokens", 8, "--num-beams", 3)
    assert code == 0
    assert out == greedy(folder, "once", max_new_tokens=8, num_beams=3) + "\n"


def test_draws_follow_the_seed(folder, run):
    texts = []
    for seed in (1, 1, 2):
        code, out, _ = run(folder, "a", "--max-new-tokens", 20, "--seed", seed, "--top-p", 0.9, "--json")
        assert code == 0
        answer = json.loads(out)
        assert (answer["prompt"], answer["tokens"]) == ("a", 20)
        assert answer["seconds"] > 0
        texts.append(answer["text"])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_seeds_have_64_bits(folder, run, seed):
    assert run(folder, "a", "--max-new-tokens", 1, "--seed", seed)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["", "--max-new-tokens", 3], "the prompt '' has no tokens"),
        (["a", "--stream", "--json"], "leave one of them out"),
        (["a", "--stream", "--num-beams", 2], "cannot be streamed"),
        (["a", "--top-p", 0], "top_p above 0"),
        (["a", "--temperature", -1], "temperature not negative"),
        (["a", "--max-new-tokens", 0], "at least 1"),
        (["a", "--seed", 2**64], "no number of 64 bits"),
        (["a", "--seed", -(2**63) - 1], "no number of 64 bits"),
        (["\udcff", "--max-new-tokens", 3], "the prompt has half of a surrogate pair, or is not UTF-8"),
    ],
)
def test_mistakes_are_one_sentence(folder, run, arguments, expected):
    code, out, err = run(folder, *arguments)
    assert (code, out) == (2, "")
    assert expected in err
    assert len(err.strip().splitlines()) == 1


def test_models_that_write_no_text(folder, run, tmp_path):
    registry.build("spikelm_tiny").save_pretrained(tmp_path / "other")
    code, _, err = run(tmp_path / "other", "a")
    assert code == 2
    assert "holds a SpikeLMForSequenceClassification, which writes no text" in err
    code, _, err = run(tmp_path / "nowhere", "a")
    assert code == 2
    assert "no folder and no zoo entry" in err


def test_a_tokenizer_of_another_model(folder, run):
    registry.build("spikegpt_tiny", vocab_size=9).save_pretrained(folder)
    code, _, err = run(folder, "zebra")
    assert code == 2
    assert "its tokenizer gives token 25, its model knows 9" in err


def test_more_tokens_than_positions(folder, run):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=28, n_embd=16, n_layer=1, n_head=2, n_positions=8, eos_token_id=None))
    to_spiking(model).save_pretrained(folder)
    assert generate(folder, "zebra", max_new_tokens=4)["tokens"] == 4  # the last is not read
    code, _, err = run(folder, "zebra", "--max-new-tokens", 5)
    assert code == 2
    assert "the prompt's 5 tokens and 5 more do not fit into the 8 positions" in err


def test_the_function_returns_what_the_command_prints(folder):
    pieces = []
    answer = generate(folder, "once", max_new_tokens=6, temperature=0, stream=pieces.append)
    assert "once" + answer["text"] == greedy(folder, "once", max_new_tokens=6)
    assert "".join(pieces) == answer["text"]


def test_one_prompt_at_a_time(folder):
    with pytest.raises(DataError, match="the prompt is one text, got a list"):
        generate(folder, ["ab", "cd"])


def test_a_seed_leaves_the_callers_generator_alone(folder):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert generate(folder, "ab", seed=1)["text"] == generate(folder, "ab", seed=1)["text"]
    assert torch.equal(torch.rand(1), expected)


def test_the_prompt_is_read_as_training_reads_text(folder):
    tokenizer = registry.load_tokenizer(folder)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("$A z", special_tokens=[("z", 25)])
    tokenizer.save_pretrained(folder)
    options = {"max_new_tokens": 4, "temperature": 0}
    model, ids = registry.load(folder), torch.tensor([[0, 1]])
    mask = torch.ones_like(ids)
    written = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, max_new_tokens=4)[0, 2:]
    assert generate(folder, "ab", **options)["text"] == tokenizer.decode(written)
