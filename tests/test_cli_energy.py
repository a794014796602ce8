"""The commands about energy, as a user runs them."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from snlp_zoo.cli import app
from snlp_zoo.energy.report import STATEMENT, UNTOUCHED
from snlp_zoo.errors import CheckpointError, DataError, EnergyError, HubError
from snlp_zoo.registry import build

runner = CliRunner()


def run(*arguments, code=0):
    result = runner.invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture
def trained(request, tmp_path, monkeypatch):
    """A saved classifier with a tokenizer, and labelled texts."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = build(getattr(request, "param", "spikelm_tiny"), num_labels=2)
    with torch.no_grad():
        model.train()(torch.randint(5, 100, (4, 12)))
    model.eval().save_pretrained(tmp_path / "model")
    words = ["[PAD]", "[UNK]", "a", "fine", "film", "dull"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", model_max_length=64)  # noqa: S106
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "test.tsv").write_text("text\tlabel\na fine film\t1\ndull\t0\na dull film\t0\nfine fine film\t1\n")
    return tmp_path


def test_energy_of_an_entry_and_of_texts(trained):
    entry = json.loads(run("energy", "spikelm_tiny", "--tokens", 9, "--json"))
    assert (entry["tokens"], entry["statement"]) == (9, STATEMENT)
    text = json.loads(run("energy", "model", "--text", "a fine film", "--json"))
    assert (text["texts"], text["tokens"]) == (1, 3)
    told = run("energy", "model", "--data", "test.tsv", "--limit", 2, "--memory", "dram", "--output-dir", "out")
    assert STATEMENT in told
    assert "2 texts, 4 tokens in all" in told
    written = json.loads((trained / "out" / "energy.json").read_text())
    assert (written["memory"]["name"], written["tokens"]) == ("dram", 4)
    assert (trained / "out" / "energy.md").read_text() == told
    both = json.loads(run("energy", "model", "--text", "a fine film", "--data", "test.tsv", "--json"))
    assert (both["texts"], both["data"]) == (5, "as given and of test.tsv")


def test_energy_of_a_model_over_tokens_says_where_its_spikes_are_not(trained):
    assert UNTOUCHED in run("energy", "spikegpt_tiny", "--tokens", 9)
    found = json.loads(run("energy", "spikegpt_tiny", "--tokens", 2000, "--json"))  # no limit to a text's length
    assert (found["time_steps"], found["tokens"], found["spike_driven_fraction"]) == (1, 2000, 0.0)
    assert found["statement"] == f"{STATEMENT} {UNTOUCHED}"
    told = run("verify", "spikegpt_tiny", "--tokens", 9)
    assert "the model claims nothing of its products; spike-driven fraction 0.00 %" in told
    told = run("verify", "spikegpt_tiny", "--tokens", 9, "--claimed-fraction", 0)
    assert "every claim holds; spike-driven fraction 0.00 %" in told


def test_energy_of_converted_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build("spiking_llama_tiny").save_pretrained(tmp_path / "model")
    found = json.loads(run("energy", "model", "--tokens", 9, "--json"))
    assert (found["codes"]["codes"], found["tokens"]) == (["bitwise"], 9)
    assert 0 < found["spike_driven_fraction"] < 1
    assert "(code ternary; the largest count is" in run("energy", "spiking_mamba_tiny", "--tokens", 9)
    assert "spikes model.layers.0.mlp.up_proj: ternary x real" in run("verify", "model", "--tokens", 9)
    with pytest.raises(EnergyError, match="no neuron that keeps a membrane"):
        run("plots", "model")


def test_texts_of_a_language_model_need_no_padding_and_have_no_limit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build("spikegpt_tiny").save_pretrained(tmp_path / "model")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["a", "b"])}, unk_token="a"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "model")
    found = json.loads(run("energy", "model", "--text", "a b b a", "--text", "b", "--json"))
    assert (found["texts"], found["tokens"]) == (2, 5)


def test_texts_that_were_cut_are_counted(trained, caplog):
    found = json.loads(run("energy", "model", "--text", "a film " * 50, "--text", "a", "--json"))
    assert (found["texts"], found["tokens"]) == (2, 65)
    assert "1 of 2 texts were cut at 64 tokens" in caplog.text


def test_a_regression_has_no_accuracy(trained):
    build("spikelm_tiny", num_labels=1).save_pretrained(trained / "model")
    with pytest.raises(EnergyError, match="predicts a number, which has no accuracy"):
        run("pareto", "model", "--data", "test.tsv")


@pytest.mark.parametrize("trained", ["spiking_minilm_tiny"], indirect=True)
def test_a_converted_model_has_no_steps_to_vary(trained):
    with pytest.raises(EnergyError, match="is converted, and its spikes have neither a T"):
        run("pareto", "model", "--data", "test.tsv")


def test_pareto_reads_pairs(trained):
    (trained / "pairs.tsv").write_text("text\tother\tlabel\na film\tdull\t1\nfine\ta fine film\t0\n")
    rows = [
        json.loads(run("pareto", "model", "--data", "pairs.tsv", "--time-steps", "2", "--json", *more))["rows"][0]
        for more in ([], ["--text-pair", "other"])
    ]
    assert rows[0]["pj_per_token"] != rows[1]["pj_per_token"]
    with pytest.raises(DataError, match="no column 'second'"):
        run("pareto", "model", "--data", "pairs.tsv", "--text-pair", "second")


def test_verify_exits_with_one_when_a_claim_fails(trained):
    assert "every claim holds" in run("verify", "model")
    found = json.loads(run("verify", "model", "--text", "a fine film", "--json"))
    assert found["ok"]
    assert 0.9 < found["spike_driven_fraction"] < 1
    failed = run("verify", "model", "--claimed-fraction", "0.5", code=1)
    assert "FAILS  spike_driven_fraction: claimed 0.5000" in failed
    assert not json.loads(run("verify", "model", "--claimed-fraction", "0.5", "--json", code=1))["ok"]


@pytest.mark.parametrize("trained", ["spikelm_tiny", "spikingbert_tiny"], indirect=True)
def test_pareto_table_and_figure(trained):
    pytest.importorskip("matplotlib")
    told = json.loads(
        run("pareto", "model", "--data", "test.tsv", "--time-steps", "1,6", "--thresholds", "0.5,1", "--json",
            "--output", "pareto.png")
    )  # fmt: skip
    rows = told["rows"]
    assert [(row["time_steps"], row["threshold"]) for row in rows] == [(t, x) for t in (1, 6) for x in (0.5, 1.0)]
    assert all(0 <= row["accuracy"] <= 1 and row["ms_per_text"] > 0 for row in rows)
    assert rows[0]["pj_per_token"] < rows[2]["pj_per_token"]  # by T
    assert rows[2]["firing_rate"] > rows[3]["firing_rate"]  # lower thresholds fire more
    assert (trained / "pareto.png").stat().st_size > 1000
    table = run("pareto", "model", "--data", "test.tsv", "--time-steps", "2", "--limit", 3)
    assert "| 2 | x 1 |" in table


def test_plots_are_written(trained):
    pytest.importorskip("matplotlib")
    told = run("plots", "model", "--text", "a fine film", "--format", "svg", "--output-dir", "out")
    assert [line.rpartition("/")[2] for line in told.split()] == [
        "raster.svg",
        "rates.svg",
        "membranes.svg",
        "energy.svg",
    ]
    assert all((trained / line).stat().st_size > 1000 for line in told.split())


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        (("energy", "spikelm_tinny"), CheckpointError, "did you mean"),
        (("energy", "nobody/model"), HubError, "no folder and no zoo entry called 'nobody/model'"),
        (("pareto", "nobody/model", "--data", "test.tsv"), HubError, "no folder and no zoo entry"),
        (("energy", "spikelm_tiny", "--text", "a film"), EnergyError, "has no tokenizer"),
        (("energy", "spikelm_tiny", "--costs", "horowitz"), EnergyError, "unknown cost table"),
        (("pareto", "model", "--data", "test.tsv", "--time-steps", "1,two"), EnergyError, "takes whole numbers"),
        (("pareto", "model", "--data", "test.tsv", "--time-steps", "1.5"), EnergyError, "whole numbers .* got '1.5'"),
        (("pareto", "model", "--data", "test.tsv", "--time-steps", "inf"), EnergyError, "whole numbers .* got 'inf'"),
        (("pareto", "model", "--data", "test.tsv", "--thresholds", "1,x"), EnergyError, "takes numbers .* got '1,x'"),
        (("pareto", "model", "--data", "test.tsv", "--thresholds", "inf"), EnergyError, "positive and finite"),
        (("energy", "model", "--text", "a \udcff"), DataError, "text 1 has half of a surrogate pair"),
        (("plots", "model", "--format", "jpg"), EnergyError, "written as png or svg"),
        (("pareto", "model", "--data", "test.tsv", "--time-steps", "0"), EnergyError, "at least 1"),
        (("pareto", "model", "--data", "test.tsv", "--thresholds", "-1"), EnergyError, "thresholds positive"),
    ],
)
def test_mistakes_are_explained(arguments, error, expected, trained):
    with pytest.raises(error, match=expected):
        run(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_measuring_needs_a_gpu(trained):
    with pytest.raises(EnergyError, match="needs an NVIDIA GPU"):
        run("energy", "spikelm_tiny", "--measured", "--tokens", 4)
