"""A stopped run that goes on gives what it would have given: dropout and shuffling come from the checkpoint too."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from snlp_zoo.errors import CheckpointError, RecipeError
from snlp_zoo.train.loop import Trainer
from snlp_zoo.train.run import distill

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
CHANGES = {
    "model": {"config": DROPOUT},
    "train": {"epochs": 2, "eval_steps": 4, "save_steps": 3, "keep_checkpoints": 3},  # 6 steps an epoch
}


@pytest.fixture
def go_on(monkeypatch, run):
    """Function: resume after a stop, as a new process would, with other random numbers drawn before."""
    real = Trainer._step

    def resume(folder, **changes):
        monkeypatch.setattr(Trainer, "_step", real)
        torch.manual_seed(321)
        return run(into=folder, resume=True, **changes)[1]

    return resume


@pytest.fixture(scope="module")
def unbroken(recipe_content, tmp_path_factory):
    """The same run without a stop."""
    folder = tmp_path_factory.mktemp("unbroken")
    content = recipe_content | {"train": recipe_content["train"] | CHANGES["train"]}
    model = content["model"]
    content["model"] = model | {"config": model["config"] | DROPOUT}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    summary = distill(str(folder / "recipe.yaml"), output_dir=folder / "run")
    return folder / "run", summary


def assert_same_run(folder, other):
    for name in ("metrics.jsonl", "model/model.safetensors", "model/config.json", "recipe.yaml"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    last = [max((f / "checkpoints").iterdir()) for f in (folder, other)]
    assert last[0].name == last[1].name
    assert (last[0] / "model.safetensors").read_bytes() == (last[1] / "model.safetensors").read_bytes()


def scores(summary):
    return {key: value for key, value in summary.items() if key not in ("seconds", "teacher_seconds", "path")}


def test_dropout_matters(unbroken, run, losses):
    folder, _ = run(train=CHANGES["train"] | {"max_steps": 2})
    assert losses(folder) != losses(unbroken[0])[:2]


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(1, id="before-anything"),
        pytest.param(3, id="before-the-first-checkpoint"),
        pytest.param(6, id="after-an-evaluation"),
        pytest.param(7, id="between-the-epochs"),
        pytest.param(9, id="in-the-second-epoch"),
    ],
)
def test_resume_after_a_stop(unbroken, run, stop_at, go_on, tmp_path, step):
    stop_at(step)
    with pytest.raises(stop_at.error):
        run(into=tmp_path / "run", **CHANGES)
    summary = go_on(tmp_path / "run", **CHANGES)
    assert_same_run(tmp_path / "run", unbroken[0])
    assert scores(summary) == scores(unbroken[1])


def test_stopped_twice_the_first_time_in_the_middle_of_a_log_line(unbroken, run, stop_at, go_on, tmp_path):
    stop_at(5)
    with pytest.raises(stop_at.error):
        run(into=tmp_path / "run", **CHANGES)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    stop_at(6)  # at step 9
    with pytest.raises(stop_at.error):
        run(into=tmp_path / "run", resume=True, **CHANGES)
    go_on(tmp_path / "run", **CHANGES)
    assert_same_run(tmp_path / "run", unbroken[0])


def test_stopped_while_a_checkpoint_is_written(unbroken, run, stop_at, go_on, tmp_path, monkeypatch):
    from accelerate import Accelerator

    real, calls = Accelerator.save_state, []

    def save_state(self, folder, **more):
        calls.append(folder)
        real(self, folder, **more)
        if len(calls) == 2:
            raise stop_at.error

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", save_state)
        with pytest.raises(stop_at.error):
            run(into=tmp_path / "run", **CHANGES)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [".step_0000006.new", "step_0000003"]
    go_on(tmp_path / "run", **CHANGES)
    assert_same_run(tmp_path / "run", unbroken[0])
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_resuming_a_finished_run_changes_nothing(unbroken, run, go_on, tmp_path):
    run(into=tmp_path / "run", **CHANGES)
    summary = go_on(tmp_path / "run", **CHANGES)
    assert_same_run(tmp_path / "run", unbroken[0])
    assert scores(summary) == scores(unbroken[1])


@pytest.mark.parametrize(
    "step", [pytest.param(2, id="before-its-first-checkpoint"), pytest.param(6, id="after-a-checkpoint")]
)
def test_stopped_while_the_teacher_is_tuned(run, stop_at, go_on, tmp_path, monkeypatch, step):
    teacher = {"dropout": 0.1, "train": {"epochs": 2, "save_steps": 4, "eval_steps": 5, "logging_steps": 1}}
    changes = {"teacher": teacher, "train": {"max_steps": 2}}
    monkeypatch.setenv("SNLP_ZOO_CACHE", str(tmp_path / "cache-unbroken"))
    whole, _ = run(**changes)
    monkeypatch.setenv("SNLP_ZOO_CACHE", str(tmp_path / "cache-stopped"))
    stop_at(step)
    with pytest.raises(stop_at.error):
        run(into=tmp_path / "stopped", **changes)
    go_on(tmp_path / "stopped", **changes)
    for name in ("teacher/metrics.jsonl", "teacher/model/model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (whole / name).read_bytes(), name


# ---- errors ----


def test_nothing_to_resume(run, tmp_path):
    with pytest.raises(RecipeError, match=r"nothing to resume in .*nowhere.*without --resume"):
        run(into=tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_run_of_another_name_is_not_resumed(unbroken, run):
    before = (unbroken[0] / "metrics.jsonl").read_bytes()
    with pytest.raises(RecipeError, match="holds a run of 'tiny', not of 'other'"):
        run(into=unbroken[0], resume=True, name="other", **CHANGES)
    assert (unbroken[0] / "metrics.jsonl").read_bytes() == before


def test_resume_with_other_values_says_which(unbroken, make_recipe):
    with pytest.raises(RecipeError, match=r"differs from the one asked for \(.*epochs.*9"):
        distill(str(make_recipe(**CHANGES)), output_dir=unbroken[0], overrides=["train.epochs=9"], resume=True)


def test_resume_with_the_same_values_goes_on(run, stop_at, make_recipe, tmp_path, monkeypatch, metrics):
    path, overrides = str(make_recipe(**CHANGES)), ["train.max_steps=4"]
    real = Trainer._step
    stop_at(4)
    with pytest.raises(stop_at.error):
        distill(path, output_dir=tmp_path / "run", overrides=overrides)
    monkeypatch.setattr(Trainer, "_step", real)
    distill(path, output_dir=tmp_path / "run", overrides=overrides, resume=True)
    assert [row["step"] for row in metrics(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]


def test_resume_without_the_overrides_keeps_them(run, stop_at, make_recipe, tmp_path, monkeypatch, metrics):
    path, real = str(make_recipe(**CHANGES)), Trainer._step
    stop_at(4)
    with pytest.raises(stop_at.error):
        distill(path, output_dir=tmp_path / "run", overrides=["train.max_steps=5"])
    monkeypatch.setattr(Trainer, "_step", real)
    distill(path, output_dir=tmp_path / "run", resume=True)
    assert max(row["step"] for row in metrics(tmp_path / "run")) == 5


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", lambda data: data[:100]),
        ("model.safetensors", None),
        ("optimizer.bin", lambda data: data[: len(data) // 2]),
        ("progress.json", lambda data: b"{"),
        ("progress.json", lambda data: b'{"progress": {"step": 6}}'),
        ("progress.json", None),
        ("random_states_0.pkl", lambda data: b""),
        ("random_states_0.pkl", lambda data: data[: len(data) // 2]),
        ("random_states_0.pkl", None),
    ],
)
def test_a_damaged_checkpoint_is_named(unbroken, go_on, tmp_path, name, damage):
    shutil.copytree(unbroken[0], tmp_path / "run")
    for later in ("step_0000009", "step_0000012"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / later, ignore_errors=True)
    path = tmp_path / "run" / "checkpoints" / "step_0000006" / name
    data = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(data))
    with pytest.raises(CheckpointError, match=r"cannot resume from .*step_0000006.*delete that folder") as caught:
        go_on(tmp_path / "run", **CHANGES)
    assert "\n" not in str(caught.value)


def test_without_the_damaged_checkpoint_the_one_before_serves(unbroken, go_on, tmp_path):
    shutil.copytree(unbroken[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_0000012")
    go_on(tmp_path / "run", **CHANGES)
    assert_same_run(tmp_path / "run", unbroken[0])


# ---- real processes ----


def test_a_process_told_to_stop_saves_and_goes_on_byte_for_byte(unbroken, make_recipe, environment, trained, tmp_path):
    """As schedulers do, by SIGTERM: exit code 75, a checkpoint of that very step, and nothing lost."""
    recipe = make_recipe(**CHANGES)
    command = [sys.executable, "-m", "snlp_zoo", "distill", str(recipe), "--output-dir", str(tmp_path / "run")]
    options = {"env": environment, "cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **options)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.005)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    last = max((tmp_path / "run" / "checkpoints").iterdir())
    progress = json.loads((last / "progress.json").read_text())["progress"]
    assert f"told to stop; step {progress['step']} is saved in {tmp_path / 'run'}: go on with --resume" in errors
    assert progress["step"] < 12
    done = subprocess.run([*command, "--resume"], timeout=120, **options)
    assert done.returncode == 0, done.stderr
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (unbroken[0] / name).read_bytes(), name


def test_a_full_disk_is_said_before_anything_is_written(run, monkeypatch, tmp_path):
    free = iter([10**9, 10**9, 1000])  # a teacher may be tuned first
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free, 1000)))
    with pytest.raises(CheckpointError, match=r"a checkpoint needs [\d,]+ bytes and .*checkpoints has 1,000 free"):
        run(into=tmp_path / "run", train={"save_steps": 1})
    for path in tmp_path.glob("run/**/checkpoints/*"):
        assert (path / "progress.json").is_file()


def test_a_killed_process_goes_on_byte_for_byte(make_recipe, environment, trained, metrics, tmp_path):
    """72 steps; killed a few steps past the second checkpoint, in the middle of an epoch of 12."""
    long = {"epochs": 6, "batch_size": 8, "eval_steps": 9, "save_steps": 4}
    recipe = make_recipe(model={"config": DROPOUT}, train=long)

    def start(folder, *more):
        command = [sys.executable, "-m", "snlp_zoo", "distill", str(recipe), "--output-dir", str(folder), *more]
        return subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    unbroken, broken = start(tmp_path / "whole"), start(tmp_path / "broken")
    log, deadline = tmp_path / "broken" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and broken.poll() is None:
        if log.exists() and '"step": 9,' in log.read_text():
            broken.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    broken.communicate()
    assert broken.returncode == -signal.SIGKILL
    assert len(metrics(tmp_path / "broken")) < 70
    resumed = start(tmp_path / "broken", "--resume")
    for process in (unbroken, resumed):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
