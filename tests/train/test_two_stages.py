"""The recipe `two_stage`: any depth and width, altered copies of the task's texts, a stop in its second stage."""

import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from snlp_zoo.errors import RecipeError
from snlp_zoo.train import teacher as teachers
from snlp_zoo.train.loop import Trainer
from snlp_zoo.train.recipe import load_recipe, stage_recipes
from snlp_zoo.train.run import distill

SHORT = {"epochs": 1, "batch_size": 8, "learning_rate": 2e-3, "logging_steps": 1}
AUGMENT = {"copies": 2, "probability": 0.5, "candidates": 3}
WEIGHTS = {"embedding_mse": 0.1, "hidden_mse": 0.1, "forward_kl": 1.0, "cross_entropy": 0.1}
FOLDERS = ["1_general", "2_task"]


@pytest.fixture
def two_stages(recipe_content, data_folder, tmp_path):
    """Function: the path of a file that extends the recipe, with changes of its stages and of whole keys."""

    def write(general=None, task=None, model=None, **changes):
        own = {"extends": "two_stage", "name": "two", **{k: recipe_content[k] for k in ("data", "teacher")}}
        parts = recipe_content["model"]
        own["model"] = parts | {"config": parts["config"] | (model or {})}
        own["stages"] = [
            {"name": "general", "data": {"source": [str(data_folder)]}, "train": SHORT} | (general or {}),
            {"name": "task", "train": SHORT | {"save_steps": 5, "eval_steps": 10}} | (task or {}),
        ]
        path = tmp_path / "two.yaml"
        path.write_text(yaml.safe_dump(own | changes))
        return str(path)

    return write


def test_the_paper_s_weights(two_stages, tmp_path):
    (_, general), (_, task) = stage_recipes(
        load_recipe("two_stage", ["name=x", "model={model_type: spikelm}"]), tmp_path
    )
    assert general.data.label is None
    assert {name: part.weight for name, part in general.objectives.items()} == {"hidden_mse": 1, "embedding_mse": 1}
    assert {name: part.weight for name, part in task.objectives.items()} == WEIGHTS


@pytest.mark.parametrize(
    ("family", "width", "depth", "layer_map"),
    [("spikebert", 32, 3, "skip"), ("spikelm", 16, 1, [1]), ("spikingbert", 16, 4, "spread")],
    ids=str,
)
def test_any_depth_and_width_learns(two_stages, metrics, tmp_path, family, width, depth, layer_map):
    model = {"hidden_size": width, "num_hidden_layers": depth}
    recipe = two_stages(model=model, layer_map=layer_map, task={"train": SHORT | {"max_steps": 4}})
    summary = distill(
        recipe, output_dir=tmp_path / "run", overrides=["model.init_from=scratch", f"model.model_type={family}"]
    )
    general, task = ([row for row in metrics(tmp_path / "run" / folder) if "loss" in row] for folder in FOLDERS)
    for name in ("hidden_mse", "embedding_mse"):
        assert general[-1][name] < general[0][name]
    assert set(task[0]) == {"step", "loss", "learning_rate", *WEIGHTS}
    assert task[0]["loss"] == pytest.approx(sum(WEIGHTS[name] * task[0][name] for name in WEIGHTS), abs=1e-6)
    shapes = {tensor.shape for tensor in load_file(tmp_path / "run/2_task/model/projection.safetensors").values()}
    assert shapes == {(32, width), (32,)}  # goes on with the general stage's
    assert "student_accuracy" in summary


@pytest.mark.parametrize("stage", ["general", "task"])
@pytest.mark.parametrize(
    ("layer_map", "message"),
    [([1, 2, 3], r"layer_map \[1, 2, 3\].* 1 to 2 .*student's 2"), ([1, 5], "1 to 2"), ("skipp", "'skipp'.*skip")],
)
def test_a_wrong_map_is_told_before_anything_runs(two_stages, tmp_path, stage, layer_map, message):
    with pytest.raises(RecipeError, match=message):
        distill(two_stages(**{stage: {"layer_map": layer_map}}), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- altered copies ----


def test_copies_are_the_student_s_alone(run, metrics, monkeypatch, own_cache):
    seen, real = {}, teachers.augment

    def watched(*arguments, **options):
        seen["from"], seen["to"] = arguments[0], real(*arguments, **options)
        return seen["to"]

    monkeypatch.setattr(teachers, "augment", watched)
    folder, summary = run(data={"augment": AUGMENT}, train={"epochs": 1, "logging_steps": 1})
    assert len(seen["from"]) == 96
    assert len(seen["to"]) == 288
    assert [row["step"] for row in metrics(folder) if "loss" in row] == list(range(1, 19))  # 288 texts, 16 at a time
    teacher = [row["step"] for row in metrics(folder / "teacher") if "loss" in row]
    assert teacher[-1] == 24  # 4 epochs of 96
    assert summary["test_examples"] == 40
    assert seen["to"].input_ids[:96] == seen["from"].input_ids != seen["to"].input_ids[96:192]


def test_a_teacher_with_a_head_predicts_the_words(run, teacher_folder, tmp_path, monkeypatch):
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    BertForMaskedLM(BertConfig.from_pretrained(teacher_folder)).save_pretrained(tmp_path / "headed")
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path / "headed")
    seen, real = [], teachers.augment
    monkeypatch.setattr(teachers, "augment", lambda *a, **o: seen.append(a[2]) or real(*a, **o))
    teacher = {"name": str(tmp_path / "headed"), "train": {"max_steps": 1}}
    run(data={"augment": AUGMENT | {"copies": 1}, "train_size": 16}, teacher=teacher, train={"max_steps": 1})
    assert [type(model).__name__ for model in seen] == ["BertForMaskedLM"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copies": 0}, "data.augment.copies: .*greater than or equal to 1"),
        ({"copies": 1000}, "less than or equal to 100"),
        ({"probability": 1.5}, "data.augment.probability: .*less than or equal to 1"),
        ({"candidates": 0}, "data.augment.candidates"),
        ({"copy": 1}, "data.augment.copy: unknown key; did you mean 'copies'"),
    ],
)
def test_augmentation_is_bounded(two_stages, options, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(two_stages(task={"data": {"augment": options}}))


# ---- resume ----


@pytest.fixture
def second_stage(two_stages):
    """36 steps on altered copies, with dropout and a weight that falls, after 12 on raw text."""
    task = {"data": {"augment": AUGMENT}, "objectives": WEIGHTS | {"hidden_mse": [1.0, 0.1]}}
    return two_stages(task=task, model={"hidden_dropout_prob": 0.1})


def same_files(folder, other):
    names = [f"{stage}/{name}" for stage in FOLDERS for name in ("metrics.jsonl", "model/projection.safetensors")]
    for name in [*names, *(f"{stage}/model/model.safetensors" for stage in (*FOLDERS, "."))]:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def test_stopped_in_the_second_stage_it_goes_on_there(second_stage, trained, stop_at, monkeypatch, tmp_path):
    real, options = Trainer._step, {"overrides": ["stages.task.train.max_steps=16"]}
    stop_at(12 + 8)
    with pytest.raises(stop_at.error):
        distill(second_stage, output_dir=tmp_path / "run", **options)
    monkeypatch.setattr(Trainer, "_step", real)
    torch.manual_seed(321)
    distill(second_stage, output_dir=tmp_path / "run", resume=True, **options)
    distill(second_stage, output_dir=tmp_path / "whole", **options)
    same_files(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_told_to_stop_in_the_second_stage_it_goes_on_there(second_stage, environment, trained, tmp_path):
    """The same in processes of their own, by SIGTERM."""
    folder, options = tmp_path / "run", {"env": environment, "cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "snlp_zoo", "distill", second_stage, "--output-dir", str(folder)]
    process = subprocess.Popen(command, **options)
    log, deadline = folder / "2_task" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.005)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert f"is saved in {folder / '2_task'}: go on with --resume" in errors
    first = (folder / "1_general" / "summary.json").stat().st_mtime_ns
    assert not (folder / "2_task" / "summary.json").exists()
    done = subprocess.run([*command, "--resume"], timeout=120, **options)
    assert done.returncode == 0, done.stderr
    assert (folder / "1_general" / "summary.json").stat().st_mtime_ns == first
    distill(second_stage, output_dir=tmp_path / "whole")
    same_files(folder, tmp_path / "whole")
