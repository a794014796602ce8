"""Two processes with batch b learn what one process with batch 2 b learns."""

import json

import pytest

# Rounding of summed gradients flips a first spike sooner or later; small steps keep such a difference small.
SETTINGS = {"learning_rate": 2e-4}
# Started like `-m snlp_zoo`, but it ends badly unless there really were two processes, and may stop at a step.
PROGRAM = """
import os
import sys
from accelerate import PartialState
from snlp_zoo.cli import main
from snlp_zoo.train.loop import Trainer

real, done = Trainer._step, iter(range(1, 10_000))

def step(self, window):
    if next(done) == int(os.environ.get("STOP_AT", 0)):
        os._exit(9)
    return real(self, window)

Trainer._step = step
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
state = PartialState()
assert state.num_processes == 2, state
with open(f"rank{state.process_index}.txt", "w") as file:
    file.write(str(code))
state.destroy_process_group()
sys.exit(code)
"""


@pytest.fixture
def two_processes(python, environment, tmp_path):
    """Function: `snlp-zoo distill` on two CPU processes."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def start(*arguments, stop_at=0, cache=None):
        env = environment | {"ACCELERATE_USE_CPU": "true", "STOP_AT": str(stop_at)}
        if cache:
            env["SNLP_ZOO_CACHE"] = str(cache)
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program))
        done = python(*launch, "distill", *map(str, arguments), env=env)
        if not stop_at:
            assert done.returncode == 0, done.stderr
            assert sorted(path.name for path in tmp_path.glob("rank*.txt")) == ["rank0.txt", "rank1.txt"]
        return done

    return start


def by_metric(rows):
    return [{k: v for k, v in row.items() if isinstance(v, float)} for row in rows]


def assert_same_curves(rows, others, tolerance=1e-4):
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(by_metric(rows), by_metric(others), strict=True):
        assert row == pytest.approx(other, abs=tolerance)


def test_the_loss_curve_is_that_of_one_process(run, make_recipe, two_processes, trained, metrics, tmp_path):
    objectives = {"forward_kl": 0.8, "cross_entropy": 0.2, "hidden_mse": 0.5, "attention_mse": 1.0}
    data = {"max_length": 10}  # some texts are cut
    one, summary = run(objectives=objectives, data=data, train=SETTINGS)
    recipe = make_recipe(objectives=objectives, data=data, train=SETTINGS | {"batch_size": 8})
    done = two_processes(recipe, "--output-dir", tmp_path / "two", "--json")
    assert_same_curves(metrics(tmp_path / "two"), metrics(one))
    found = json.loads(done.stdout)  # one document: rank 0 alone prints
    assert found["student_accuracy"] == pytest.approx(summary["student_accuracy"])
    assert found["firing_rate"] == pytest.approx(summary["firing_rate"], abs=1e-3)
    warnings = [line for line in done.stderr.splitlines() if "texts were cut" in line]
    assert len(warnings) == len(set(warnings)) == 3


def test_a_teacher_tuned_and_a_narrower_student_taught_by_two(
    run, make_recipe, two_processes, own_cache, metrics, tmp_path
):
    """Projections, accumulation, hidden states only: parts of the student get no gradient at all."""
    changes = {
        "model": {"config": {"hidden_size": 16}},
        "objectives": {"hidden_mse": 1.0},
        "teacher": {"train": {"epochs": 1, "logging_steps": 1}},
    }
    settings = SETTINGS | {"gradient_accumulation_steps": 2, "epochs": 1}
    one, _ = run(**changes, train=settings)
    recipe = make_recipe(**changes, train=settings | {"batch_size": 8})
    two_processes(recipe, "--output-dir", tmp_path / "two", cache=tmp_path / "other-cache")
    assert_same_curves(metrics(tmp_path / "two" / "teacher"), metrics(one / "teacher"))
    assert_same_curves(metrics(tmp_path / "two"), metrics(one))
    assert len(list((tmp_path / "other-cache" / "teachers").iterdir())) == 1


def test_stages_and_text_without_labels_taught_by_two(run, make_recipe, two_processes, trained, metrics, tmp_path):
    """Validation losses are means over all processes' tokens and pairs; a stage starts from what rank 0 saved."""
    states = {"hidden_mse": 1.0, "embedding_mse": 0.5, "attention_mse": 1.0}
    general = {"name": "general", "data": {"label": None, "max_length": 10}, "objectives": states}
    changes = {"projection": "shared", "stages": [general, {"name": "task"}]}
    settings = SETTINGS | {"epochs": 1, "eval_batch_size": 5}
    one, summary = run(**changes, train=settings)
    recipe = make_recipe(**changes, train=settings | {"batch_size": 8})
    done = two_processes(recipe, "--output-dir", tmp_path / "two", "--json")
    for stage in ("1_general", "2_task"):
        assert_same_curves(metrics(tmp_path / "two" / stage), metrics(one / stage))
    found = json.loads(done.stdout)
    assert found["stages"][0]["student_negative_loss"] == pytest.approx(
        summary["stages"][0]["student_negative_loss"], abs=1e-4
    )
    assert found["student_accuracy"] == pytest.approx(summary["student_accuracy"])


@pytest.mark.slow
def test_two_processes_resume_byte_for_byte(make_recipe, two_processes, trained, tmp_path):
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    recipe = make_recipe(model={"config": dropout}, train={"batch_size": 8, "save_steps": 4, "eval_steps": 3})
    two_processes(recipe, "--output-dir", tmp_path / "whole")
    for path in tmp_path.glob("rank*.txt"):
        path.unlink()
    assert two_processes(recipe, "--output-dir", tmp_path / "broken", stop_at=8).returncode != 0
    assert not (tmp_path / "broken" / "summary.json").exists()
    two_processes(recipe, "--output-dir", tmp_path / "broken", "--resume")
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
