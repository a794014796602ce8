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
from snlp_zoo.train.teacher import tuned_by_one

from .conftest import REPOSITORY

TOOL = REPOSITORY / "tools" / "compare_recipes.py"
SMALL = ["--set", "train.max_steps=2", "--set", "baseline=false"]


def test_runs_side_by_side_tune_one_teacher_and_a_failure_ends_no_other(
    make_recipe, own_cache, environment, tmp_path, python, monkeypatch
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
    (tmp_path / "runs" / "twin_0" / "summary.json").unlink()
    monkeypatch.syspath_prepend(TOOL.parent)
    left = import_module("compare_recipes").report(tmp_path / "runs", ["good", "twin"])
    lines = {line.split()[1]: line for line in left.splitlines() if line.startswith("| ")}
    assert lines["good"].endswith("| 1 of 1 |")
    assert lines["twin"].endswith("| 0 of 1 |")


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
