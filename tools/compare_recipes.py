"""Students of several recipes, each with several seeds: mean and spread of their test scores in one table.

    python tools/compare_recipes.py "short = spikelm_tiny_tweets" "long = spikelm_tiny_tweets train.epochs=2" --seeds 3

Each name stands for a zoo entry or recipe file and changes to it, as for `snlp-zoo train --set`; `--set` changes all.
Every run is a process of its own, --jobs at a time (on a GPU that is faster), in a folder of its own under
--output-dir; one that is finished there is not run again. Seeds are those of the student; the teacher is the same.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def run(folder: Path, recipe: str, changes: list[str], threads: int) -> dict[str, Any]:
    """Train once, in another process, unless it has been done; the summary."""
    summary = folder / "summary.json"
    if not summary.is_file():
        command = [sys.executable, "-m", "snlp_zoo", "train", recipe, "--json", "--output-dir", str(folder)]
        command += [part for change in changes for part in ("--set", change)]
        folder.parent.mkdir(parents=True, exist_ok=True)
        log, environment = folder.with_suffix(".log"), os.environ | {"OMP_NUM_THREADS": str(threads)}
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
        if code:
            raise SystemExit(f"{folder.name} ended with code {code}: {log.read_text(encoding='utf-8').strip()[-500:]}")
    return json.loads(summary.read_text(encoding="utf-8"))


def spread(values: list[float], scale: int = 100, digits: int = 1) -> str:
    """Mean and standard deviation, in percent if scale is 100, or the value alone."""
    values = [scale * value for value in values]
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def columns(found: list[dict[str, Any]]) -> dict[str, str]:
    """Heading -> what the runs of one student say."""

    def of(name: str) -> list[float]:
        return [row[name] for row in found]

    if "student_bits_per_character" in found[0]:
        shown = {"bits per character": spread(of("student_bits_per_character"), scale=1, digits=3)}
    else:
        accuracy, teacher = of("student_accuracy"), of("teacher_accuracy")
        shown = {
            "accuracy": spread(accuracy),
            "macro F1": spread(of("student_macro_f1")),
            "gap to the teacher": spread([t - s for t, s in zip(teacher, accuracy, strict=True)]),
            "least, most": f"{100 * min(accuracy):.1f}, {100 * max(accuracy):.1f}",
        }
    rate = f"{spread(of('firing_rate'))} %" if "firing_rate" in found[0] else "-"  # a dense control has none
    return shown | {"firing rate": rate, "seconds": f"{statistics.median(of('seconds')):.0f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", metavar="'NAME = RECIPE key=value ...'")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="key=value")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/compare"))
    options = parser.parse_args()
    planned: dict[str, list[tuple[Path, str, list[str]]]] = {}
    for student in options.students:
        name, _, rest = student.partition("=")
        recipe, *changes = rest.split()
        planned[name.strip()] = [
            (options.output_dir / f"{name.strip()}_{seed}", recipe, [*options.set, *changes, f"train.seed={seed}"])
            for seed in range(options.seeds)
        ]
    jobs = [job for some in planned.values() for job in some]
    first, *others = jobs  # the first run tunes the teacher, which the others then find in the cache
    cores = os.cpu_count() or 1
    done = {first[0]: run(*first, cores)}
    with ThreadPoolExecutor(options.jobs) as pool:
        done |= zip(
            [job[0] for job in others],
            pool.map(lambda job: run(*job, max(1, cores // options.jobs)), others),
            strict=True,
        )
    rows = {name: columns([done[folder] for folder, *_ in some]) for name, some in planned.items()}
    headings = ["student", *next(iter(rows.values()))]
    print(f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(row.values())} |")


if __name__ == "__main__":
    main()
