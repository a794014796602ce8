import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import snlp_zoo
from snlp_zoo.errors import BackendError, CheckpointError, DataError, RecipeError, SnlpError

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no runs/ folder


def test_public_names():
    assert len(snlp_zoo.__all__) <= 20
    assert snlp_zoo.__all__ == sorted(snlp_zoo.__all__)
    for name in snlp_zoo.__all__:
        assert callable(getattr(snlp_zoo, name)), name


def test_public_names_are_what_they_say_after_everything_was_imported():
    """A subpackage must not take a public function's place."""
    from snlp_zoo.train import run

    importlib.import_module("snlp_zoo.cli")
    assert callable(run.distill)
    assert snlp_zoo.load is snlp_zoo.hub.load


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        _ = snlp_zoo.biuld


def test_version_is_the_project_file_s():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert snlp_zoo.__version__ == project["version"]


def test_import_is_light_and_registers_the_models():
    program = """
import sys
import snlp_zoo
heavy = {"datasets", "sklearn", "cupy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
assert not [name for name in sys.modules if name.startswith("snlp_zoo.train")]
from transformers import AutoConfig, AutoModel
AutoModel.from_config(AutoConfig.for_model("spikelm", hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_error_of_ours_can_be_caught_as_one():
    for error, builtin in (
        (BackendError, RuntimeError),
        (CheckpointError, OSError),
        (DataError, ValueError),
        (RecipeError, ValueError),
    ):
        assert issubclass(error, SnlpError)
        assert issubclass(error, builtin)
    assert snlp_zoo.SnlpError is SnlpError


def test_list_entries():
    entries = snlp_zoo.list_entries()
    assert entries == sorted(entries)
    assert {"spikelm_base", "spikelm_tiny", "spikelm_tiny_tweets"} <= set(entries)


def test_build_takes_overrides():
    model = snlp_zoo.build("spikelm_tiny", time_steps=2, num_labels=5)
    assert model.config.time_steps == 2
    assert model.config.hidden_size == 32  # the entry's own
    assert model.classifier.out_features == 5
    assert not model.training


@pytest.mark.parametrize(
    ("task", "ending"),
    [("sequence-classification", "ForSequenceClassification"), ("masked-lm", "ForMaskedLM"), ("encoder", "Model")],
)
def test_build_for_a_task(task, ending):
    assert type(snlp_zoo.build("spikelm_tiny", task=task)).__name__.endswith(ending)


@pytest.mark.parametrize(
    ("entry", "options", "expected"),
    [
        ("spikelm_tinny", {}, "unknown zoo entry 'spikelm_tinny'; did you mean spikelm_tiny"),
        ("spikelm_tiny", {"time_stepps": 2}, "no config field 'time_stepps'; did you mean 'time_steps'"),
        ("spikelm_tiny", {"time_steps": 0}, "time_steps must be between 1 and"),
        ("spikelm_tiny", {"time_steps": "two"}, "time_steps"),
        ("spikelm_tiny", {"task": "masked_lm"}, "unknown task 'masked_lm'; did you mean masked-lm"),
        ("spikelm_tiny", {"task": "config"}, "unknown task 'config'"),
    ],
)
def test_build_explains_mistakes(entry, options, expected):
    with pytest.raises(RecipeError) as caught:
        snlp_zoo.build(entry, **options)
    assert expected in str(caught.value)


def test_load_of_an_untrained_entry_says_how_to_train_it():
    with pytest.raises(CheckpointError) as caught:
        snlp_zoo.load("spikelm_tiny_tweets")
    assert "snlp-zoo distill spikelm_tiny_tweets" in str(caught.value)
    assert "snlp_zoo.build('spikelm_tiny_tweets')" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"), [("spikelm_tinny", "did you mean the zoo entry spikelm_tiny"), ("qqq", "'qqq'")]
)
def test_load_of_an_unknown_name(name, expected):
    with pytest.raises(CheckpointError, match="no folder and no zoo entry") as caught:
        snlp_zoo.load(name)
    assert expected in str(caught.value)


def test_load_of_a_trained_entry(tmp_path):
    model = snlp_zoo.build("spikelm_tiny")
    model.save_pretrained(tmp_path / "runs" / "spikelm_tiny" / "model")
    assert type(snlp_zoo.load("spikelm_tiny")) is type(model)


def test_load_passes_options_on(tmp_path):
    import torch

    snlp_zoo.build("spikelm_tiny", task="masked-lm").save_pretrained(tmp_path / "saved")
    model = snlp_zoo.load(tmp_path / "saved", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert type(model).__name__ == "SpikeLMForMaskedLM"
