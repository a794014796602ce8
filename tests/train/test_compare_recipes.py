"""Many runs at once by tools/compare_recipes.py: one teacher, failures, and what is there when they are stopped."""

import json
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module

import pytest

from snlp_zoo.errors import CheckpointError
from snlp_zoo.train.recipe import load_recipe, stage_recipes
from snlp_zoo.train.teacher import tuned_by_one

from .conftest import REPOSITORY

TOOL = REPOSITORY / "tools" / "compare_recipes.py"
LABELS_ALONE = {"stages.task.objectives", "stages.task.data.transfer"}
LOW_BIT = {"model.config.weight_bits", "stages.general.train.learning_rate", "stages.task.train.learning_rate"}
ABLATIONS = {  # student -> what it changes
    "as_it_is": set(),
    "no_general": {"stages.general"},
    "labels_alone": LABELS_ALONE,
    "no_general_labels_alone": {"stages.general", *LABELS_ALONE},
    "t1": {"model.config.time_steps"},
    "t2": {"model.config.time_steps"},
    "t8": {"model.config.time_steps"},
    "firing_k3": {"model.config.firing_k"},
    "firing_k4": {"model.config.firing_k"},
    "alpha_first_batch": {"model.config.alpha_mode"},
    "alpha_learned": {"model.config.alpha_mode"},
    "binary": {"model.config.neuron"},
    "binary_025": {"model.config.neuron", "model.config.v_threshold"},
    "bits_158": LOW_BIT,
    "bits_1": LOW_BIT,
}
SMALL = ["--set", "train.max_steps=2", "--set", "baseline=false"]


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(TOOL.parent)
    return import_module("compare_recipes")


def test_runs_side_by_side_tune_one_teacher_and_a_failure_ends_no_other(
    make_recipe, own_cache, environment, tmp_path, python, compare
):
    recipe = make_recipe()
    students = [f"good = {recipe}", f"twin = {recipe} train.learning_rate=1e-3", f"bad = {recipe} model.config.tau=0"]
    own = environment | {"SNLP_ZOO_CACHE": str(own_cache)}
    arguments = [*students, "--seeds", "1", "--jobs", "3", *SMALL, "--output-dir", "runs"]
    done = python(str(TOOL), *arguments, env=own, timeout=250)
    assert done.returncode == 1
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("| ")}
    assert lines["good"].endswith("| 1 of 1 |")
    assert lines["bad"].endswith("| 0 of 1 |")
    assert "tau" in done.stdout.partition("bad_0 is not finished")[2]  # the error says what was wrong
    assert len(list((own_cache / "teachers").glob("*/config.json"))) == 1
    assert len(list((tmp_path / "runs").glob("*/teacher"))) == 1  # one of the two tuned it
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/summary.json")]
    assert len(summaries) == 2
    assert len({summary["teacher_accuracy"] for summary in summaries}) == 1
    assert all(0 < summary["teacher_seconds"] < summary["seconds"] for summary in summaries)
    other = python(str(TOOL), f"good = {recipe} train.learning_rate=1e-3", *arguments[3:], env=own)
    assert other.returncode == 2
    assert "runs/good_0: finished with another recipe" in other.stderr
    again = python(str(TOOL), students[0], *arguments[3:], env=own)
    assert (again.returncode, again.stderr) == (0, "")  # and nothing was run
    (tmp_path / "runs" / "twin_0" / "summary.json").unlink()
    left = compare.report(tmp_path / "runs", ["good", "twin"])
    lines = {line.split()[1]: line for line in left.splitlines() if line.startswith("| ")}
    assert lines["good"].endswith("| 1 of 1 |")
    assert lines["twin"].endswith("| 0 of 1 |")


def test_students_that_never_started(tmp_path, compare):
    *_, row = compare.report(tmp_path, ["late"]).splitlines()
    assert row == "| late | not started |"


def test_seconds_are_those_without_the_teacher(tmp_path, compare):
    for seed, waited in enumerate((300.0, 10.0, 200.0)):
        (tmp_path / f"a_{seed}.log").touch()
        (tmp_path / f"a_{seed}").mkdir()
        summary = {"student_accuracy": 0.5, "seconds": 40 + seed + waited, "teacher_seconds": waited}
        (tmp_path / f"a_{seed}" / "summary.json").write_text(json.dumps(summary))
    assert "| - | 41 | 3 of 3 |" in compare.report(tmp_path, ["a"])


def test_students_of_a_file(tmp_path, compare):
    (tmp_path / "students.txt").write_text('# a = b\n\n  # c = d\none = x k={"a":1}\n  \ntwo = y a.b=2  c=3\n')
    parser = compare.Parser(fromfile_prefix_chars="@")
    parser.add_argument("students", nargs="*", type=compare.student)
    got = parser.parse_args([f"@{tmp_path / 'students.txt'}", "three = z"]).students
    assert got == [("one", "x", ['k={"a":1}']), ("two", "y", ["a.b=2", "c=3"]), ("three", "z", [])]


@pytest.mark.parametrize(
    ("students", "said"),
    [
        (["a = x", "a = y"], "name a only once"),
        (["a b"], "want 'NAME = RECIPE key=value ...'"),
        (["a = x", "--jobs", "0"], "--jobs 0 must be at least 1"),
    ],
)
def test_students_that_are_refused(compare, monkeypatch, capsys, students, said):
    monkeypatch.setattr(sys, "argv", ["compare_recipes.py", *students])
    with pytest.raises(SystemExit):
        compare.main()
    assert said in capsys.readouterr().err


def test_ablations_change_what_they_say(compare):
    """Also with texts of one's own, which all of them are given first."""
    parser = compare.Parser(fromfile_prefix_chars="@")
    parser.add_argument("students", nargs="*", type=compare.student)
    students = parser.parse_args([f"@{TOOL.parent / 'ablations.txt'}"]).students
    assert [name for name, *_ in students] == list(ABLATIONS)
    texts = ["stages.general.data.source=[texts.txt.xz]", "stages.task.data.transfer.source=[reviews.txt.xz]"]
    found = {name: load_recipe(recipe, texts + changes) for name, recipe, changes in students}
    base = leaves(found["as_it_is"])
    for name, recipe in found.items():
        own = leaves(recipe)
        changed = {key for key in base.keys() | own.keys() if base.get(key) != own.get(key)}
        # a key that went, or was replaced as a whole, stands for all below it
        want = ABLATIONS[name]
        assert {next((top for top in want if f"{key}.".startswith(f"{top}.")), key) for key in changed} == want, name
        assert [part.model.model_type for _, part in stage_recipes(recipe, TOOL)] == ["spikelm"] * len(recipe.stages)
    assert len({tuple(sorted(leaves(recipe).items())) for recipe in found.values()}) == len(found)
    low_bit = {stage["name"]: stage["train"]["learning_rate"] for stage in load_recipe("spikelm_mini_158_sst2").stages}
    assert low_bit == {stage["name"]: stage["train"]["learning_rate"] for stage in found["bits_1"].stages}
    assert found["labels_alone"].stages[1]["data"]["transfer"] is None
    assert list(found["no_general_labels_alone"].stages[0]["objectives"]) == ["cross_entropy"]


def leaves(recipe):
    """Dotted key -> value as text, stages by their names."""

    def walk(key, value):
        if not isinstance(value, dict):
            return {key: str(value)}
        return {k: v for name, part in value.items() for k, v in walk(f"{key}.{name}".lstrip("."), part).items()}

    content = recipe.model_dump()
    return walk("", content | {"stages": {stage["name"]: stage for stage in content["stages"]}})


@pytest.mark.slow
def test_stopped_driver_stops_its_runs(make_recipe, environment, tmp_path):
    command = [sys.executable, str(TOOL), f"long = {make_recipe(train={'epochs': 10_000})}", "--seeds", "1"]
    driver = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    folder = tmp_path / "runs" / "compare"
    deadline = time.monotonic() + 120
    while not (folder / "long_0" / "metrics.jsonl").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    driver.send_signal(signal.SIGTERM)
    out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 143
    assert "| 0 of 1 |" in out
    size = (folder / "long_0" / "metrics.jsonl").stat().st_size
    time.sleep(0.5)
    assert (folder / "long_0" / "metrics.jsonl").stat().st_size == size


HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("is_main_process", [True, False])
def test_teacher_lock_waits_until_its_holder_dies(tmp_path, is_main_process):
    cached = tmp_path / "teachers" / "abc"
    (tmp_path / "locks").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "locks" / "abc")], stdout=subprocess.PIPE, text=True
    )
    with holder, holder.stdout as output:
        assert output.readline() == "held\n"
        entered = threading.Event()

        def enter():
            with tuned_by_one(cached, is_main_process):
                entered.set()

        waiter = threading.Thread(target=enter)
        waiter.start()
        assert entered.wait(0.5) is not is_main_process  # other ranks wait for their main process instead
        holder.kill()
        holder.wait()
        assert entered.wait(10)
        waiter.join()


def test_a_cached_teacher_needs_no_lock(tmp_path):
    cached = tmp_path / "teachers" / "abc"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    with tuned_by_one(cached):
        assert [path.name for path in tmp_path.iterdir()] == ["teachers"]  # a cache that cannot be written to serves


def test_a_cache_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match=r"cannot write to .*locks.*SNLP_ZOO_CACHE"),
        tuned_by_one(tmp_path / "file" / "teachers" / "abc"),
    ):
        pass
