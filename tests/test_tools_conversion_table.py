"""The table of a conversion: perplexity, spikes and energy of a small Llama on two windows of a text."""

import json
import math
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from snlp_zoo.convert.spiking import to_spiking
from snlp_zoo.energy import estimate
from snlp_zoo.layers.spike_statistics import SpikeCounts, spikes_counted

TOOLS = Path(__file__).parent.parent / "tools"
WORDS = [chr(ord("a") + i) for i in range(26)]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    yield import_module("conversion_table")
    sys.modules.pop("conversion_table")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(WORDS),
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "dense")
    drawn = torch.randint(len(WORDS), (45,), generator=torch.Generator().manual_seed(1))
    (tmp_path / "text.txt").write_text(" ".join(WORDS[i] for i in drawn))
    return tmp_path, drawn


def test_table_of_a_small_llama(tool, folder, capsys):
    path, drawn = folder
    model = AutoModelForCausalLM.from_pretrained(path / "dense")
    to_spiking(model, threshold_scale=5.0).save_pretrained(path / "mine")
    given = [path / "dense", path / "text.txt", "--scales", "2,15", "--also", path / "mine", "--device", "cpu"]
    given += ["--window", 20, "--windows", 2, "--counted", 1, "--energy-texts", 2, "--energy-tokens", 6]
    rows = tool.main([str(x) for x in [*given, "--output", path / "out.json"]])
    assert [row["model"] for row in rows] == ["dense", "k = 2", "k = 15", f"{path.name}/mine"]
    assert {row["predicted_tokens"] for row in rows} == {2 * 19}
    assert json.loads((path / "out.json").read_text())["rows"] == rows

    dense = AutoModelForCausalLM.from_pretrained(path / "dense").eval()
    windows = [drawn[start : start + 20].unsqueeze(0) for start in (0, 20)]
    with torch.no_grad():
        expected = sum(dense(ids, labels=ids).loss.item() for ids in windows) / 2
    assert rows[0]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    away = [abs(row["perplexity"] / rows[0]["perplexity"] - 1) for row in rows[1:3]]
    assert 0 < away[1] < away[0]

    mine = to_spiking(dense, threshold_scale=5.0)
    with spikes_counted(mine) as spikes, torch.no_grad():
        mine(windows[0])
    every = sum(spikes.values(), SpikeCounts())
    assert (rows[3]["zero_share"], rows[3]["spikes_per_input"]) == (every.zero_share, every.spikes_per_value)
    found = estimate(mine, {"input_ids": torch.stack([drawn[:6], drawn[22:28]])})
    assert rows[3]["energy"]["totals"] == pytest.approx(found.totals, rel=1e-9)

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    ratios = [f"{found.ratios[level]['dense_int8']:.2f}" for level in tool.LEVELS]
    assert ", ".join(ratios) in lines[-1]


def test_the_end_of_a_text_is_a_batch_of_its_own(tool):
    shapes = [list(ids.shape) for ids in tool.batches_of(torch.arange(33), 10, None, 2)]
    assert shapes == [[2, 10], [1, 10], [1, 3]]
    assert [list(ids.shape) for ids in tool.batches_of(torch.arange(31), 10, None, 4)] == [[3, 10]]
    assert torch.equal(torch.cat(tool.batches_of(torch.arange(40), 10, 3, 2)).flatten(), torch.arange(30))


BAD = [
    (["--scales", "2,x"], "got '2,x'"),
    (["--scales", "2,0"], "got '2,0'"),
    (["--energy-texts", "5", "--energy-tokens", "10"], "has 45 tokens, and energy takes 50: 5 texts of 10"),
    (["--also", "one/model", "two/model", "one/model"], "one/model is there twice"),
]


@pytest.mark.parametrize(("more", "message"), BAD)
def test_what_cannot_be_is_said_before_anything_is_measured(tool, folder, capsys, more, message):
    given = [str(folder[0] / "dense"), str(folder[0] / "text.txt"), "--device", "cpu", *more]
    with pytest.raises(SystemExit, match=message):
        tool.main(given)
    assert "perplexity" not in capsys.readouterr().err


def test_runs_are_told_apart_and_the_bytes_of_weights_are_said(tool, folder, capsys):
    path = folder[0]
    for name in ("one", "two"):
        model = AutoModelForCausalLM.from_pretrained(path / "dense")
        to_spiking(model).save_pretrained(path / name / "model")
    given = [path / "dense", path / "text.txt", "--scales", "2", "--also", path / "one/model", path / "two/model"]
    given += ["--window", 20, "--windows", 1, "--energy-texts", 1, "--energy-tokens", 6, "--device", "cpu"]
    rows = tool.main([str(x) for x in [*given, "--dtype", "bfloat16"]])
    assert [row["model"] for row in rows] == ["dense", "k = 2", "one/model", "two/model"]
    assert capsys.readouterr().err.count("weights of 2 bytes are moved, of 4 in dense float32") == 3
