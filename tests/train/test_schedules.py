"""Weights and temperatures that change over a run: their values, how recipes write them, what training does."""

import json

import pytest
import torch
from safetensors.torch import load_file

from snlp_zoo.errors import RecipeError
from snlp_zoo.layers.neurons import BaseNode
from snlp_zoo.train.loop import Trainer
from snlp_zoo.train.recipe import dump_recipe, load_recipe
from snlp_zoo.train.schedules import Schedule, value_at


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ({"start": 1.0, "end": 0.0}, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"start": 1.0, "end": 3.0, "until": 0.5}, [1.0, 2.0, 3.0, 3.0, 3.0]),
        ({"start": 1.0, "end": 0.0, "shape": "cosine"}, [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0]),
        ({"start": 0.1, "end": 0.7, "shape": "cosine", "until": 0.25}, [0.1, 0.7, 0.7, 0.7, 0.7]),
    ],
)
def test_values_by_hand(schedule, values):
    got = [Schedule(**schedule).at(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert got == pytest.approx(values, abs=1e-12)
    assert got[0] == values[0]  # both ends exactly
    assert got[-1] == values[-1]


def test_a_number_is_always_itself():
    assert [value_at(0.3, progress) for progress in (0, 0.5, 1)] == [0.3] * 3


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("0.5", 0.5),
        ("[1.0, 0.5]", Schedule(start=1.0, end=0.5)),
        ("{weight: [1, 0.5]}", Schedule(start=1.0, end=0.5)),
        ("{weight: {start: 1, end: 0.5, shape: cosine}}", Schedule(start=1.0, end=0.5, shape="cosine")),
        ("{weight: {start: 0, end: 2, until: 0.5}}", Schedule(start=0.0, end=2.0, until=0.5)),
    ],
)
def test_recipes_write_weights_in_three_ways(make_recipe, tmp_path, written, read):
    recipe = load_recipe(str(make_recipe()), [f"objectives.hidden_mse={written}"])
    assert recipe.objectives["hidden_mse"].weight == read
    (tmp_path / "kept.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "kept.yaml")) == recipe


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objectives.hidden_mse=[1, -1]", ["hidden_mse.weight", "end", "greater than or equal to 0", "-1"]),
        ("objectives.hidden_mse=[1, 2, 3]", ["hidden_mse.weight", "Schedule"]),
        ("objectives.hidden_mse.weight={start: 1, end: 0, untill: 1}", ["untill", "unknown key"]),
        ("objectives.hidden_mse.weight={start: 1}", ["hidden_mse.weight", "end", "required"]),
        ("objectives.hidden_mse.weight={start: 1, end: 0, until: 0}", ["until", "greater than 0"]),
        ("objectives.hidden_mse.weight={start: 1, end: 0, shape: step}", ["shape", "'linear' or 'cosine'"]),
        ("objectives.hidden_mse.weight=.inf", ["hidden_mse.weight", "finite"]),
        ("objectives={hidden_mse: [1, 0]}", ["every weight ends at 0", "keep one up"]),
        ("train.surrogate_temperature=0", ["train.surrogate_temperature", "above 0"]),
        ("train.surrogate_temperature=[1, 0]", ["train.surrogate_temperature", "above 0"]),
    ],
)
def test_mistakes(make_recipe, override, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(make_recipe()), [override])
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


OBJECTIVES = {
    "forward_kl": {"weight": {"start": 0.0, "end": 1.0, "until": 0.5}, "temperature": 2.0},
    "cross_entropy": 0.2,
    "hidden_mse": {"weight": {"start": 2.0, "end": 0.1, "shape": "cosine"}},
}
CHANGES = {  # 12 steps
    "model": {"model_type": "spikebert"},
    "objectives": OBJECTIVES,
    "train": {"surrogate_temperature": [4.0, 0.5], "save_steps": 5},
}


@pytest.fixture
def temperatures(monkeypatch):
    """Every neuron's temperature while a step was done, one set per step of a model with surrogates."""
    seen, real = [], Trainer._step

    def step(self, window):
        losses = real(self, window)
        nodes = [module for module in self.distiller.student.modules() if isinstance(module, BaseNode)]
        if found := {node.surrogate_temperature for node in nodes if hasattr(node, "surrogate_temperature")}:
            seen.append(found)
        return losses

    monkeypatch.setattr(Trainer, "_step", step)
    return seen


def test_every_step_has_its_own_weights_and_temperature(run, metrics, temperatures):
    folder, _ = run(**CHANGES)
    rows = [row for row in metrics(folder) if "loss" in row]
    assert len(rows) == 12
    weights = {name: value if isinstance(value, float) else value["weight"] for name, value in OBJECTIVES.items()}
    schedules = {name: Schedule(**value) if isinstance(value, dict) else value for name, value in weights.items()}
    for number, row in enumerate(rows):  # the first step has the start, the last one the end
        total = sum(value_at(schedule, number / 11) * row[name] for name, schedule in schedules.items())
        assert row["loss"] == pytest.approx(total, abs=2e-6)
    assert [len(seen) for seen in temperatures] == [1] * 12
    assert [min(seen) for seen in temperatures] == pytest.approx([4.0 - 3.5 * number / 11 for number in range(12)])


def test_binary_neurons_of_spikelm_have_a_temperature(run, temperatures):
    run(model={"config": {"neuron": "lif"}}, train={"surrogate_temperature": 2.0, "max_steps": 1})
    assert temperatures == [{2.0}]


def test_the_run_is_another_one_than_without_schedules(run, losses):
    ours, _ = run(train={"max_steps": 3}, objectives=OBJECTIVES)
    plain, _ = run(train={"max_steps": 3}, objectives=OBJECTIVES | {"hidden_mse": 2.0})
    assert losses(ours)[0] == losses(plain)[0]
    assert losses(ours)[2] != losses(plain)[2]


def test_a_resumed_run_repeats_the_weights(run, stop_at, monkeypatch, tmp_path):
    unbroken, _ = run(**CHANGES)
    real = Trainer._step
    stop_at(8)
    with pytest.raises(stop_at.error):
        run(into=tmp_path / "broken", **CHANGES)
    monkeypatch.setattr(Trainer, "_step", real)
    torch.manual_seed(321)
    run(into=tmp_path / "broken", resume=True, **CHANGES)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (unbroken / name).read_bytes()


def test_an_earlier_stop_leaves_the_schedule_that_of_all_epochs(run, metrics):
    whole, _ = run(**CHANGES)
    short, _ = run(**CHANGES | {"train": CHANGES["train"] | {"max_steps": 4}})
    losses = [[row["loss"] for row in metrics(folder) if "loss" in row] for folder in (whole, short)]
    assert losses[0][:4] == losses[1]


def test_the_best_encoder_is_chosen_by_the_last_weights(run, metrics):
    folder, summary = run(
        data={"label": None},
        objectives={"hidden_mse": [0.1, 3.0], "embedding_mse": [1.0, 0.0]},
        train={"epochs": 3, "eval_steps": 3},
    )
    rows = [row for row in metrics(folder) if "split" in row]
    assert len(rows) == 6
    for row in rows:
        assert row["negative_loss"] == pytest.approx(-3.0 * row["hidden_mse"], rel=1e-6)
    assert summary["student_negative_loss"] == max(row["negative_loss"] for row in rows)


def test_a_saved_student_knows_no_temperature(run):
    changes = {"model": {"model_type": "spikebert"}}
    folders = [run(**changes, train={"surrogate_temperature": value, "max_steps": 1})[0] for value in (2.0, 1.0)]
    ours, theirs = (json.loads((folder / "model" / "config.json").read_text()) for folder in folders)
    assert ours == theirs
    names = [load_file(folder / "model" / "model.safetensors").keys() for folder in folders]
    assert names[0] == names[1]


@pytest.mark.parametrize("family", ["spikelm", "spikingbert"])
def test_a_student_without_surrogates_is_told_before_anything_runs(run, tmp_path, family):
    with pytest.raises(RecipeError, match=f"neurons of model_type '{family}' have no surrogate"):
        run(into=tmp_path / "run", model={"model_type": family}, train={"surrogate_temperature": [2.0, 1.0]})
    assert not (tmp_path / "run").exists()
