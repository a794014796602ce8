"""SIGKILL a short run at many moments and let it go on: does it end in the same bytes as the unbroken run?

    python tools/kill_runs.py RECIPE [--points 20] [--seed 0] [--set KEY=VALUE ...]

Half of the moments are drawn from the time the unbroken run took to train; the others are the appearance of something
in the run folder that is still being written: a checkpoint or a model. Prints one line per moment. Runs are forked from
this program, which has imported all of the package already, and die as any process does.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from snlp_zoo.train.run import distill

SAME = ("metrics.jsonl", "model/model.safetensors")


def _run(options: argparse.Namespace, folder: Path, resume: bool) -> None:
    with folder.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        distill(options.recipe, output_dir=folder, overrides=options.set, resume=resume)


def start(options: argparse.Namespace, folder: Path, resume: bool = False) -> Any:
    process = get_context("fork").Process(target=_run, args=(options, folder, resume))
    process.start()
    return process


def finish(process: Any, folder: Path) -> None:
    process.join()
    if process.exitcode:
        log = folder.with_suffix(".log").read_text()
        raise SystemExit(f"kill_runs: a run that nobody killed ended with code {process.exitcode}:\n{log[-3000:]}")


def moments(seed: int, seconds: float) -> Iterator[tuple[str, Callable[[Path, float], bool]]]:
    """Name and test (run folder, seconds since training began) of each moment, without end."""
    draw = random.Random(seed)  # noqa: S311
    for number in count():
        at, nth = draw.uniform(0, seconds), draw.randint(1, 6)
        kinds: list[tuple[str, Callable[[Path, float], bool]]] = [
            (f"after {at:.2f} s", lambda _, passed, at=at: passed >= at),
            (f"while a checkpoint is written, from step {nth}", lambda f, _, n=nth: writing(f, "step_", n)),
            (f"after {at:.2f} s", lambda _, passed, at=at: passed >= at),
            ("while a model is written", lambda f, _: any(f.glob(".model.new/*"))),
        ]
        yield kinds[number % 4]


def writing(folder: Path, prefix: str, step: int) -> bool:
    asides = folder.glob(f"checkpoints/.{prefix}*.new/*")
    return any(int(path.parent.name.removeprefix(f".{prefix}").removesuffix(".new")) >= step for path in asides)


def kill_at(options: argparse.Namespace, folder: Path, moment: Callable[[Path, float], bool]) -> str:
    """Kill a run at this moment; what lay in its folder then."""
    process, began = start(options, folder), 0.0
    while process.is_alive():
        began = began or (time.monotonic() if (folder / "metrics.jsonl").exists() else 0.0)
        if began and moment(folder, time.monotonic() - began):
            process.kill()
            break
        time.sleep(0.0005)
    process.join()
    if process.exitcode != -signal.SIGKILL:
        return ""
    left = (*folder.glob(".model.*"), *folder.glob("checkpoints/*"), *folder.glob("checkpoints/.*"))
    names = [path.name for path in left]
    lines = (folder / "metrics.jsonl").read_text().count("\n") if (folder / "metrics.jsonl").exists() else 0
    return f"{lines} lines of metrics, {', '.join(sorted(set(names))) or 'no checkpoint'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--points", type=int, default=20, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="as of `snlp-zoo distill`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        teacher = Path(scratch, "teacher")
        finish(start(options, teacher), teacher)  # tunes it, once for all
        whole = Path(scratch, "whole")
        process = start(options, whole)
        while process.is_alive() and not (whole / "metrics.jsonl").exists():
            time.sleep(0.001)
        began = time.monotonic()
        finish(process, whole)
        seconds, failed, killed = time.monotonic() - began, 0, 0
        for number, (name, moment) in enumerate(moments(options.seed, 0.6 * seconds), start=1):
            broken = Path(scratch, f"broken{number}")
            left = kill_at(options, broken, moment)
            killed += bool(left)
            process = start(options, broken, resume=True)
            process.join()
            same = not process.exitcode and all((broken / f).read_bytes() == (whole / f).read_bytes() for f in SAME)
            failed += not same
            log = broken.with_suffix(".log").read_text()
            verdict = "same bytes" if same else f"DIFFERS, code {process.exitcode} {log[-1000:]}"
            print(f"{number:>3} {name}: {left or 'it had ended before'}: {verdict}", flush=True)
            if killed == options.points:
                break
    print(f"{killed} kills, {failed} resumed runs that failed or differ")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
