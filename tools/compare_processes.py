"""Loss curves of one process with batch 2b and of two CPU processes with batch b, side by side.

python tools/compare_processes.py [ENTRY_OR_RECIPE] [--steps 12] [--batch-size 16]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def _losses(command: list[str], folder: Path, environment: dict[str, str], arguments: list[str]) -> list[float]:
    subprocess.run(
        [*command, "-m", "snlp_zoo", "distill", *arguments, "--output-dir", str(folder)],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", nargs="?", default="spikelm_tiny_tweets")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16, help="per process, of the two")
    options = parser.parse_args()
    settings = {"train.max_steps": options.steps, "train.logging_steps": 1, "data.test_size": 64, "baseline": "false"}

    def arguments(batch_size: int) -> list[str]:
        changes = settings | {"train.batch_size": batch_size}
        return [options.entry, *(word for key, value in changes.items() for word in ("--set", f"{key}={value}"))]

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with tempfile.TemporaryDirectory() as scratch:
        one = _losses([sys.executable], Path(scratch, "one"), {}, arguments(2 * options.batch_size))
        # without this variable Accelerate would start one process, or look for GPUs
        cpu = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        two = _losses(torchrun, Path(scratch, "two"), cpu, arguments(options.batch_size))
    print(f"{'step':>4}  {'1 process':>10}  {'2 processes':>11}  {'difference':>10}")
    for step, (a, b) in enumerate(zip(one, two, strict=True), start=1):
        print(f"{step:>4}  {a:>10.7f}  {b:>11.7f}  {abs(a - b):>10.1e}")


if __name__ == "__main__":
    main()
