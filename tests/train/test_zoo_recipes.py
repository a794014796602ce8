"""The zoo's own recipes of several stages, small, from end to end."""

import pytest
import torch
import yaml

import snlp_zoo
from snlp_zoo.train.run import distill

SHORT = {"epochs": 1, "batch_size": 16, "max_steps": 4, "learning_rate": 2e-3, "logging_steps": 1}


@pytest.fixture
def extend(recipe_content, tmp_path):
    """Function: the path of a file that extends a zoo recipe with the tests' model, data and teacher."""

    def write(name, stages, **changes):
        own = {key: recipe_content[key] for key in ("model", "data", "teacher")} | {"extends": name, "name": name}
        own["stages"] = [{"name": stage, "train": SHORT} for stage in stages]
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(own | changes))
        return str(path)

    return write


@pytest.mark.parametrize("family", ["spikelm", "spikingbert"])
def test_three_stages(extend, data_folder, tmp_path, metrics, family):
    """SpikingBERT learns attention scores; SpikeLM gives none: probabilities instead."""
    attention = "attention_score_mse" if family == "spikingbert" else "attention_mse"
    states = {"hidden_mse": 1.0, "embedding_mse": 1.0, attention: 1.0}
    recipe = extend("three_stage", ["general", "task", "prediction"], objectives=states)
    text = f"stages.general.data.source=[{data_folder / 'train.tsv'}, {data_folder / 'test.tsv'}]"
    overrides = [text, f"model.model_type={family}", "model.config.time_steps=4"]
    summary = distill(recipe, output_dir=tmp_path / "run", overrides=overrides)
    folders = ["1_general", "2_task", "3_prediction"]
    assert [stage["name"] for stage in summary["stages"]] == [f"three_stage/{folder}" for folder in folders]
    logged = [[row for row in metrics(tmp_path / "run" / folder) if "loss" in row] for folder in folders]
    for rows, terms in zip(logged, (states, states, {"forward_kl"}), strict=True):
        assert set(rows[0]) == {"step", "loss", "learning_rate", *terms}
    assert all(logged[0][-1][name] > 0 for name in states)
    assert logged[0][-1]["loss"] < logged[0][0]["loss"]
    assert summary["stages"][0]["validation_examples"] == 13
    assert summary["stages"][0]["student_negative_loss"] < 0
    assert 0 < summary["firing_rate"] < 1


def test_quantise_starts_from_a_float_student(extend, trained, tmp_path):
    """Low-bit weights, and another T beside."""
    recipe = extend("quantise", ["internal", "prediction"])
    overrides = [f"model.init_from={trained.folder}", "model.config.time_steps=3", "stages.internal.train.max_steps=1"]
    summary = distill(recipe, output_dir=tmp_path / "run", overrides=overrides)
    assert (summary["time_steps"], len(summary["stages"])) == (3, 2)
    assert snlp_zoo.load(tmp_path / "run").config.weight_bits == 1.58
    name = "spikelm.embeddings.word_embeddings.weight"
    ours, start = (snlp_zoo.load(folder).state_dict()[name] for folder in (tmp_path / "run/1_internal", trained.folder))
    assert torch.allclose(ours, start, atol=5e-3)
