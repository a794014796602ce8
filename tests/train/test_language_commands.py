"""Language models on the command line, on the Hub's card, and on two processes."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from snlp_zoo import registry
from snlp_zoo.cli import app
from snlp_zoo.errors import CheckpointError, RecipeError
from snlp_zoo.hub.card import make_card, make_results, read_run
from snlp_zoo.train.run import distill

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "snlp_zoo")


@pytest.fixture
def recipe(data_folder, tmp_path):
    """Function: the path of a recipe of a few steps, with these training settings."""

    def write(**settings):
        own = {"batch_size": 8, "learning_rate": 2e-3, "logging_steps": 1, "max_steps": 4, "eval_batch_size": 5}
        config = {"hidden_size": 32, "num_hidden_layers": 2, "v_threshold": 0.5, "hidden_dropout_prob": 0.0}
        content = {
            "extends": "language_model",
            "name": "speaker",
            "model": {"model_type": "spikegpt", "config": config},
            "data": {"source": str(data_folder), "max_length": 16},
            "tokenizer": {"kind": "characters"},
            "train": own | settings,
        }
        path = tmp_path / "speaker.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def cli():
    """Function: what a command prints."""

    def run(*arguments):
        done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "120"})
        assert done.exit_code == 0
        return done.stdout

    return run


def test_train_evaluate_and_the_card(cli, recipe, data_folder, tmp_path):
    trained = cli("train", recipe(), "--output-dir", "here")
    rows = ("perplexity", "bits per byte", "bits per character", "firing rate", "parameters", "test tokens", "student")
    assert all(words in trained for words in rows)
    assert "teacher" not in trained
    data = data_folder / "test.tsv"
    table = cli("evaluate", "here", "--data", data)
    assert all(words in table for words in ("perplexity", "bits_per_byte", "characters"))
    scores = json.loads(cli("evaluate", "here", "--data", data, "--json", "--separator", " "))
    summary = json.loads((tmp_path / "here/summary.json").read_text())
    assert scores["perplexity"] > 1
    assert scores["tokens"] == summary["test_tokens"]
    run = read_run(tmp_path / "here/model")
    card = make_card(run, registry.load("here"), "user/speaker", "mit")
    assert "pipeline_tag: text-generation" in card
    assert "Trained on data" in card
    assert "Distilled" not in card
    assert f"| perplexity, test | student {summary['student_perplexity']:.4f} |" in card
    assert set(run.scores) == {"negative_loss", "perplexity", "bits_per_byte", "bits_per_character"}
    assert make_results(run)


def test_what_stands_after_texts_is_that_of_the_last_stage(cli, recipe, data_folder, tmp_path):
    content = yaml.safe_load(recipe(max_steps=1).read_text())
    stages = [{"name": "speak", "data": {"separator": " lumi "}}]
    (tmp_path / "staged.yaml").write_text(yaml.safe_dump(content | {"stages": stages}))
    cli("train", "staged.yaml", "--output-dir", "here")
    scores = json.loads(cli("evaluate", "here", "--data", data_folder / "test.tsv", "--json"))
    assert scores["tokens"] == json.loads((tmp_path / "here/summary.json").read_text())["test_tokens"]


def test_a_window_that_holds_nothing(cli, recipe, data_folder):
    cli("train", recipe(max_steps=1), "--output-dir", "here")
    with pytest.raises(RecipeError, match=r"window -3 must be at least 1 token$"):  # it has no positions to speak of
        cli("evaluate", "here", "--data", data_folder / "test.tsv", "--window", -3)


def test_an_entry_that_is_not_trained_says_how(cli):
    with pytest.raises(CheckpointError, match="train it with 'snlp-zoo train spikegpt_tiny_chars' or use"):
        cli("evaluate", "spikegpt_tiny_chars", "--data", "tweets")


def test_two_processes_learn_what_one_does(python, environment, recipe, metrics, tmp_path):
    """And score alike, though crops and tokens of the last batch are shared out unevenly."""
    distill(str(recipe(batch_size=8)), output_dir=tmp_path / "one")
    env = environment | {"ACCELERATE_USE_CPU": "true"}
    two = python(*LAUNCH, "train", str(recipe(batch_size=4, eval_batch_size=3)), "--output-dir", "two", env=env)
    assert two.returncode == 0, two.stderr
    rows, others = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        numbers = {key: value for key, value in row.items() if isinstance(value, float)}
        assert {key: other[key] for key in numbers} == pytest.approx(numbers, abs=2e-4)
    progress = [
        json.loads((max((tmp_path / f / "checkpoints").iterdir()) / "progress.json").read_text())
        for f in ("one", "two")
    ]
    assert [state["processes"] for state in progress] == [1, 2]
    assert [state["batch_size"] for state in progress] == [8, 8]
