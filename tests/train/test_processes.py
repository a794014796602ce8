"""Two processes with batch b learn what one process with batch 2 b learns, and end together."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file

import snlp_zoo
from snlp_zoo.distill.distiller import Distiller
from snlp_zoo.train.evaluation import never_empty

# Rounding of summed gradients flips a first spike sooner or later; small steps keep such a difference small.
SETTINGS = {"learning_rate": 2e-4}
# Started like `-m snlp_zoo`, but it ends badly unless there really were two processes, and may stop at a step, or send
# its second process a signal there. Accelerate shards (FSDP2) only what it takes for GPUs.
PROGRAM = """
import os
import signal
import sys
from accelerate import PartialState
from accelerate.utils import DistributedType
from snlp_zoo.cli import main
from snlp_zoo.train.loop import Trainer

real, done = Trainer._step, iter(range(1, 10_000))
if "ACCELERATE_USE_FSDP" in os.environ:
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

def step(self, window):
    number = next(done)
    if number == int(os.environ.get("STOP_AT", 0)):
        os._exit(9)
    if number == int(os.environ.get("SIGNAL_AT", 0)) and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.Signals[os.environ["SIGNAL"]])
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

    def start(*arguments, stop_at=0, cache=None, **more):
        env = environment | {"ACCELERATE_USE_CPU": "true", "STOP_AT": str(stop_at)} | more
        if cache:
            env["SNLP_ZOO_CACHE"] = str(cache)
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program))
        done = python(*launch, "distill", *map(str, arguments), env=env)
        if not stop_at and "SIGNAL" not in more:
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
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "two", one))
    measured = [name for name in ours if name.endswith((".alpha", ".magnitude"))]
    assert len(measured) == 2 * 2 * 8  # two layers of eight neurons
    for name in measured:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)
    warnings = [line for line in done.stderr.splitlines() if "texts were cut" in line]
    assert len(warnings) == len(set(warnings)) == 3


def test_texts_that_the_teacher_labels(run, make_recipe, two_processes, trained, metrics, tmp_path):
    (tmp_path / "more.txt").write_text(
        "\n".join(f"{cue} kalan modor" for cue in ("lumi", "vosh", "sola", "grum", "fenn"))
    )
    data = {"train_size": 32, "transfer": {"source": str(tmp_path / "more.txt")}}
    one, _ = run(data=data, train=SETTINGS | {"epochs": 1, "batch_size": 4})
    two_processes(
        make_recipe(data=data, train=SETTINGS | {"epochs": 1, "batch_size": 2}), "--output-dir", tmp_path / "two"
    )
    assert_same_curves(metrics(tmp_path / "two"), metrics(one))
    assert metrics(one)[-1]["step"] == 9  # 37 texts, 4 at a time


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


@pytest.mark.parametrize("family", ["spikelm", pytest.param("spikingbert", marks=pytest.mark.slow)])
def test_stages_and_text_without_labels_taught_by_two(
    run, make_recipe, two_processes, trained, metrics, tmp_path, family
):
    """Validation losses are means over all processes' tokens and pairs; a stage starts from what rank 0 saved."""
    states = {"hidden_mse": 1.0, "embedding_mse": 0.5, "attention_mse": 1.0}
    general = {"name": "general", "data": {"label": None, "max_length": 10}, "objectives": states}
    changes = {"model": {"model_type": family}, "projection": "shared", "stages": [general, {"name": "task"}]}
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


def test_a_run_goes_on_with_two_processes_and_again_with_one(
    run, make_recipe, two_processes, stop_at, trained, metrics, tmp_path, monkeypatch
):
    """The global batch stays that of the start; without dropout the random states do not matter."""
    real = snlp_zoo.train.loop.Trainer._step
    settings = {"train": SETTINGS | {"save_steps": 2, "eval_steps": 3}}
    whole, summary = run(**settings)
    stop_at(4)
    with pytest.raises(stop_at.error):
        run(into=tmp_path / "broken", **settings)
    monkeypatch.setattr(snlp_zoo.train.loop.Trainer, "_step", real)
    recipe = make_recipe(**settings)
    assert two_processes(recipe, "--output-dir", tmp_path / "broken", "--resume", stop_at=5).returncode
    assert [row["step"] for row in metrics(tmp_path / "broken") if "loss" in row] == [1, 2, 3, 4, 5, 6]
    _, found = run(into=tmp_path / "broken", resume=True, **settings)
    assert_same_curves(metrics(tmp_path / "broken"), metrics(whole))
    assert found["student_accuracy"] == pytest.approx(summary["student_accuracy"])


@pytest.mark.slow
def test_sharded_training_is_that_of_one_process(run, make_recipe, two_processes, trained, metrics, tmp_path):
    """FSDP2: sharded weights and optimiser, their checkpoints, evaluation, saving, stages, and another start."""
    states = {"hidden_mse": 1.0, "embedding_mse": 0.5}
    general = {"name": "general", "data": {"label": None}, "objectives": states}
    changes = {"stages": [general, {"name": "task"}]}
    settings = SETTINGS | {"epochs": 1, "save_steps": 4, "eval_steps": 3}
    one, _ = run(**changes, train=settings)
    recipe = make_recipe(**changes, train=settings | {"batch_size": 8})
    shard = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    assert two_processes(recipe, "--output-dir", tmp_path / "two", stop_at=12, **shard).returncode
    checkpoint = tmp_path / "two" / "2_task" / "checkpoints" / "step_0000004"
    assert len(list((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    two_processes(recipe, "--output-dir", tmp_path / "two", "--resume", **shard)
    for stage in ("1_general", "2_task"):
        assert_same_curves(metrics(tmp_path / "two" / stage), metrics(one / stage))


@pytest.mark.slow
def test_further_objectives_are_those_of_one_process(run, make_recipe, two_processes, trained, metrics, tmp_path):
    """All but spike_rate, whose parts add the variance of their rates: its weight is 0 where curves are compared."""
    general = {"cosine": 1.0, "embedding_table_mse": 0.5, "spike_rate": {"weight": 0.0, "target": 0.2}}
    task = {"head_tail_kl": 1.0, "wasserstein": 0.5, "cosine": 0.5, "embedding_table_mse": 0.5}
    stages = [
        {"name": "general", "data": {"label": None, "max_length": 10}, "objectives": general},
        {"name": "task", "objectives": task},
    ]
    changes = {"model": {"init_from": "scratch"}, "stages": stages}
    settings = SETTINGS | {"epochs": 1, "eval_batch_size": 5}
    one, _ = run(**changes, train=settings)
    recipe = make_recipe(**changes, train=settings | {"batch_size": 8})
    two_processes(recipe, "--output-dir", tmp_path / "two")
    for stage in ("1_general", "2_task"):
        ours, theirs = (metrics(folder / stage) for folder in (one, tmp_path / "two"))
        for row, other in zip(ours, theirs, strict=True):
            rate, rates = row.pop("spike_rate", 0.0), other.pop("spike_rate", 0.0)
            assert rate - 1e-5 <= rates <= rate + 1e-3
        assert_same_curves(theirs, ours)


@pytest.mark.slow
def test_one_process_told_to_stop_stops_all_and_they_go_on(make_recipe, two_processes, trained, metrics, tmp_path):
    recipe = make_recipe(train={"batch_size": 8, "epochs": 1})
    arguments = (recipe, "--output-dir", tmp_path / "two")
    done = two_processes(*arguments, SIGNAL="SIGTERM", SIGNAL_AT="3")
    assert [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)] == ["75", "75"]
    assert done.stderr.count("told to stop; step 3 is saved in ") == 1
    assert [path.name for path in (tmp_path / "two" / "checkpoints").iterdir()] == ["step_0000003"]


def test_a_killed_process_ends_the_other_with_a_sentence(make_recipe, two_processes, trained, tmp_path):
    started = time.monotonic()
    recipe = make_recipe(train={"batch_size": 8})
    done = two_processes(recipe, "--output-dir", tmp_path / "two", SIGNAL="SIGKILL", SIGNAL_AT="3")
    assert done.returncode != 0
    assert time.monotonic() - started < 60
    assert "snlp-zoo: another process of this run has ended" in done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr


# ---- a global batch with fewer rows than processes ----


@pytest.mark.parametrize("entry", ["spikelm_tiny", "spikingbert_tiny"])
def test_a_row_of_padding_gives_finite_losses_and_gradients(entry):
    whole = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    whole |= {"labels": torch.tensor([1]), "index": torch.tensor([0])}
    none = {key: value[:0] for key, value in whole.items()}
    objectives = ("forward_kl", "cross_entropy", "hidden_mse", "attention_mse")
    student, teacher = (snlp_zoo.build(entry) for _ in range(2))
    distiller = Distiller(student.train(), teacher, {name: {} for name in objectives})
    assert distiller.counts(none).tolist() == [0, 0, 0, 0]
    losses = distiller(never_empty(none, whole))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
    assert never_empty(whole, whole) is whole


@pytest.mark.slow
def test_a_teacher_tuned_by_two_one_text_at_a_time(run, make_recipe, two_processes, own_cache, metrics, tmp_path):
    teacher = {"train": {"epochs": 1, "max_steps": 4, "batch_size": 1, "logging_steps": 1, "eval_batch_size": 3}}
    settings = SETTINGS | {"epochs": 1, "max_steps": 1}
    one, _ = run(teacher=teacher, train=settings)
    recipe = make_recipe(teacher=teacher, train=settings | {"batch_size": 8})
    two_processes(recipe, "--output-dir", tmp_path / "two", cache=tmp_path / "other-cache")
    assert_same_curves(metrics(tmp_path / "two" / "teacher"), metrics(one / "teacher"))


# Collectives of this group may take 2 seconds; rank 0 comes after 4, as if it had waited for another run's teacher.
LATE = """
import os
import sys
import time
from datetime import timedelta
import torch.distributed as dist
from snlp_zoo.errors import ProcessError
from snlp_zoo.train.processes import loss_of_others_explained, wait_for_all

dist.init_process_group("gloo", timeout=timedelta(seconds=2))
rank = dist.get_rank()
dist.barrier()
if rank == 0 and sys.argv[1] == "late":
    time.sleep(4)
elif rank == 0:
    dist.new_group(backend="gloo")  # as `wait_for_all` begins
    os._exit(0)
try:
    with loss_of_others_explained():
        wait_for_all(2)
    said = "together"
except ProcessError as error:
    said = str(error)
with open(f"late{rank}.txt", "w") as file:
    file.write(said)
if said == "together":
    dist.barrier()
    dist.destroy_process_group()
os._exit(0)
"""


@pytest.mark.parametrize(("first", "said"), [("late", "together"), ("gone", "another process of this run has ended")])
def test_processes_wait_for_one_that_waits_for_another_run(python, environment, tmp_path, first, said):
    program = tmp_path / "late.py"
    program.write_text(LATE)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program), first)
    done = python(*launch, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "late1.txt").read_text().startswith(said)
