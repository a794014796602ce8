"""Students of several recipes, each with several seeds: mean and spread of their test scores in one table.

    python tools/compare_recipes.py "short = spikelm_tiny_tweets" "long = spikelm_tiny_tweets train.epochs=2" --seeds 3
    python tools/compare_recipes.py @tools/ablations.txt --seeds 3
    python tools/compare_recipes.py --report   # what is finished of those in --output-dir

Each name stands for a zoo entry or recipe file and changes to it, as for `snlp-zoo train --set`; `--set` changes all,
before these. @FILE holds one student a line; empty lines and comments, #, are skipped.
Every run is a process of its own, --jobs at a time, on the GPU with the fewest of them, in a folder of its own under
--output-dir; one that is finished there is not run again, or refused if its recipe was another. One that fails does not
end the others: the table is of those that finished, errors stand below it, and the exit code is 1. Seeds are those of
the student; runs with the same teacher wait for the first of them to tune it, which counts for no one's seconds.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from snlp_zoo.errors import SnlpError
from snlp_zoo.train.recipe import load_recipe

SCORES = {  # the first one that there is chose the best epoch
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "f1": "F1",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
}


class Job(NamedTuple):
    """One training run."""

    folder: Path
    recipe: str
    changes: list[str]

    @property
    def log(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.log"

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").is_file()

    @property
    def stale(self) -> bool:
        """Whether what is finished was made by another recipe."""
        try:
            return self.finished and load_recipe(str(self.folder / "recipe.yaml")) != load_recipe(
                self.recipe, self.changes
            )
        except SnlpError:  # the run itself says so
            return False


class Parser(argparse.ArgumentParser):
    """Takes @FILE with one argument a line, without empty lines and comments, which begin with #."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return [] if arg_line.strip()[:1] in ("", "#") else [arg_line]


def student(text: str) -> tuple[str, str, list[str]]:
    """Name, recipe and changes in 'NAME = RECIPE key=value ...'."""
    name, _, rest = (part.strip() for part in text.partition("="))
    if not re.fullmatch(r"[\w.-]+", name) or not rest:
        raise argparse.ArgumentTypeError(f"want 'NAME = RECIPE key=value ...', got {text!r}")
    recipe, *changes = rest.split()
    return name, recipe, changes


def start(job: Job, threads: int, gpu: str | None) -> subprocess.Popen:
    """The training as a process of its own, whose output goes to a file beside its folder."""
    command = [sys.executable, "-m", "snlp_zoo", "train", job.recipe, "--json", "--output-dir", str(job.folder)]
    command += [part for change in job.changes for part in ("--set", change)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w", encoding="utf-8") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def run_all(jobs: list[Job], at_once: int, gpus: list[str]) -> None:
    """Run what is not finished; whoever stops this stops the runs too."""
    waiting = [job for job in jobs if not job.finished]
    running: list[tuple[Job, subprocess.Popen, str | None]] = []
    threads = max(1, (os.cpu_count() or 1) // at_once)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                gpu = least_busy(gpus, [gpu for *_, gpu in running])
                job = waiting.pop(0)
                running.append((job, start(job, threads, gpu), gpu))
            time.sleep(0.2)
            for job, process, _ in [one for one in running if one[1].poll() is not None]:
                said = "finished" if process.returncode == 0 else f"ended with code {process.returncode}"
                print(f"{job.folder.name} {said}", file=sys.stderr)
            running = [one for one in running if one[1].returncode is None]
    finally:
        for _, process, _ in running:
            process.terminate()
        for _, process, _ in running:
            process.wait()


def least_busy(gpus: list[str], busy: list[str | None]) -> str | None:
    """The GPU with the fewest runs on it, the first of them, from the GPUs of all runs; None where there are none."""
    return min(gpus, key=busy.count) if gpus else None


def visible_gpus(number: int | None) -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES of the first GPUs that this process may use, of all without a number; of 0 the
    name that hides them; none where there are none.
    """
    found = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(found)]
    if number is not None and number > found:
        raise SystemExit(f"--gpus {number}: there are {found}")
    return [""] if found and number == 0 else names[: found if number is None else number]


def spread(values: list[float], scale: int = 100, digits: int = 1) -> str:
    """Mean and standard deviation, in percent if scale is 100, or the value alone."""
    values = [scale * value for value in values]
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def columns(found: list[dict[str, Any]]) -> dict[str, str]:
    """Heading -> what the runs of one student say."""

    def of(name: str) -> list[float]:
        return [row[name] for row in found]

    shown = {heading: spread(of(f"student_{key}")) for key, heading in SCORES.items() if f"student_{key}" in found[0]}
    if "student_bits_per_character" in found[0]:
        shown = {"bits per character": spread(of("student_bits_per_character"), scale=1, digits=3)}
    elif shown:
        first = next(key for key in SCORES if f"student_{key}" in found[0])
        values = of(f"student_{first}")
        if f"teacher_{first}" in found[0]:
            gaps = [t - s for t, s in zip(of(f"teacher_{first}"), values, strict=True)]
            shown["gap to the teacher"] = spread(gaps)
        shown["least, most"] = f"{100 * min(values):.1f}, {100 * max(values):.1f}"
    rate = f"{spread(of('firing_rate'))} %" if "firing_rate" in found[0] else "-"  # a dense control has none
    own = [row["seconds"] - row.get("teacher_seconds", 0) for row in found]  # the others wait for who tunes it
    return shown | {"firing rate": rate, "seconds": f"{statistics.median(own):.0f}"}


def report(folder: Path, names: list[str]) -> str:
    """A table of the runs that are finished in a folder, one row per student, and the errors of those that are not."""
    rows, errors = {}, []
    for name in names:
        logs = sorted(path for path in folder.glob("*.log") if _student(path) == name)
        summaries = [log.with_suffix("") / "summary.json" for log in logs]
        found = [json.loads(path.read_text(encoding="utf-8")) for path in summaries if path.is_file()]
        runs = f"{len(found)} of {len(logs)}" if logs else "not started"
        rows[name] = (columns(found) if found else {}) | {"runs": runs}
        unfinished = [log for log, summary in zip(logs, summaries, strict=True) if not summary.is_file()]
        errors += [f"{log.stem} is not finished: {_last_words(log)}" for log in unfinished]
    headings = [*dict.fromkeys(heading for row in rows.values() for heading in row if heading != "runs"), "runs"]
    lines = [f"| student | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row.get(h, '-') for h in headings)} |" for name, row in rows.items()]
    return "\n".join(lines + [""] * bool(errors) + errors)


def _student(log: Path) -> str:
    return log.stem.rpartition("_")[0]


def _last_words(log: Path) -> str:
    return " ".join(log.read_text(encoding="utf-8", errors="replace")[-2000:].split())[-500:]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, fromfile_prefix_chars="@")
    parser.add_argument("students", nargs="*", type=student, metavar="'NAME = RECIPE key=value ...'")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--gpus", type=int, help="Use the first so many; all that are visible without it.")
    parser.add_argument("--set", action="append", default=[], metavar="key=value")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/compare"))
    parser.add_argument("--report", action="store_true", help="Run nothing; show what is finished.")
    options = parser.parse_args()
    if min(options.seeds, options.jobs) < 1:
        parser.error(f"--seeds {options.seeds} and --jobs {options.jobs} must be at least 1")
    jobs: list[Job] = []
    for name, recipe, changes in options.students:
        jobs += [
            Job(options.output_dir / f"{name}_{seed}", recipe, [*options.set, *changes, f"train.seed={seed}"])
            for seed in range(options.seeds)
        ]
    names = [name for name, *_ in options.students]
    if twice := {name for name in names if names.count(name) > 1}:
        parser.error(f"runs of one name share a folder; name {', '.join(sorted(twice))} only once")
    if not options.report:
        if not jobs:
            parser.error("name at least one student, or --report")
        if stale := [str(job.folder) for job in jobs if job.stale]:
            parser.error(f"{', '.join(stale)}: finished with another recipe; remove it, or name the student otherwise")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            run_all(jobs, options.jobs, visible_gpus(options.gpus))
        finally:
            print(report(options.output_dir, names))
        sys.exit(not all(job.finished for job in jobs))
    print(report(options.output_dir, names or sorted({_student(log) for log in options.output_dir.glob("*.log")})))


if __name__ == "__main__":
    main()
