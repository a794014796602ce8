"""SpikeLM-base on one GPU, on two with DDP and on two with FSDP2: the same losses, and how much faster.

Sums in another order round differently, and a spike more or less is no small difference: how far that alone takes a run
is shown by one GPU with the rows of each batch in reversed order ("reversed").

    python tools/bench_processes.py [--batch 256] [--steps 50] [--seconds 190] [--tiny]

Each of them is started by `accelerate launch` with its file from zoo_configs/accelerate, and trains the 12 x 768
encoder (T = 4) in bfloat16 on made-up tokens from a dense teacher of random weights: 50 steps with the same global
batches of 32 x 128, with a checkpoint in the middle; then steps of --batch texts per GPU are timed; then the FSDP2 run
goes on from that checkpoint once more. `--tiny` tries all of it on two CPU processes; its times mean nothing.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RUNS = {
    "one GPU": ("one_gpu.yaml", 1),
    "reversed": ("one_gpu.yaml", 1),
    "DDP": ("multi_gpu.yaml", 2),
    "FSDP2": ("fsdp2.yaml", 2),
}
OBJECTIVES = {"forward_kl": 1.0, "cross_entropy": 0.5, "hidden_mse": 0.5}
LOSS_BAR, SPEED_BAR, GLOBAL_BATCH = 1e-2, 1.8, 32


# ---- one of the launched processes ----


def make_batches(options: argparse.Namespace, count: int, batch_size: int, vocabulary: int) -> Any:
    import torch

    from snlp_zoo.data.batches import Tokenised, loader

    draw = torch.Generator().manual_seed(count)
    ids = torch.randint(5, vocabulary, (count, 16 if options.tiny else 128), generator=draw).tolist()
    labels = torch.randint(0, 2, (count,), generator=draw).tolist()
    tokenizer: Any = SimpleNamespace(pad_token_id=0)  # all that a loader asks of it
    return loader(Tokenised(ids, None, labels, 0), tokenizer, batch_size, shuffle=True, drop_last=True)


def make_trainer(options: argparse.Namespace, folder: Path) -> Any:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    import snlp_zoo
    from snlp_zoo.distill.distiller import Distiller
    from snlp_zoo.train.loop import Trainer, make_accelerator
    from snlp_zoo.train.recipe import TrainPart

    if options.tiny and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_shards_on_cpu()
    accelerator = make_accelerator("bf16")
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # ranks draw different masks
    student = snlp_zoo.build("spikelm_tiny" if options.tiny else "spikelm_base", **dropout)
    shape = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    teacher = BertForSequenceClassification(BertConfig(**{k: getattr(student.config, k) for k in shape}))
    settings = TrainPart(
        epochs=1, mixed_precision="bf16", learning_rate=1e-4, logging_steps=1, save_steps=max(options.steps // 2, 1)
    )
    vocabulary = student.config.vocab_size
    loaders = (
        make_batches(options, GLOBAL_BATCH * options.steps, GLOBAL_BATCH, vocabulary),
        make_batches(options, 2 * GLOBAL_BATCH, GLOBAL_BATCH, vocabulary),
    )
    folder.mkdir(parents=True, exist_ok=True)
    distiller = Distiller(student, teacher.to(accelerator.device), {name: {} for name in OBJECTIVES})
    return Trainer(
        accelerator,
        distiller,
        loaders,
        settings,
        OBJECTIVES,
        folder,
        lambda target, weights, _: student.save_pretrained(target, state_dict=weights),
    )


def allow_shards_on_cpu() -> None:
    """Accelerate leaves FSDP out where it finds CPUs; for a trial it is told of GPUs."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def time_steps(options: argparse.Namespace, trainer: Any) -> float:
    """Seconds of an optimiser step with --batch texts per GPU, batches made and sent included."""
    import torch

    accelerator, count = trainer.accelerator, 4 if options.tiny else 18
    batch_size = options.batch * accelerator.num_processes
    vocabulary = trainer.distiller.student.config.vocab_size
    warm, started = count // 3, 0.0
    for step, batch in enumerate(make_batches(options, batch_size * count, batch_size, vocabulary), start=1):
        trainer._step([batch])
        if step in (warm, count):
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            accelerator.wait_for_everyone()
            started, before = time.perf_counter(), started
    return (started - before) / (count - warm)


def work(options: argparse.Namespace) -> None:
    import torch

    torch.set_float32_matmul_precision("high")
    folder = Path(options.folder)
    if options.reversed:
        reverse_rows()
    trainer = make_trainer(options, folder)
    main = trainer.accelerator.is_main_process
    trainer.run(False, "train")
    found: dict[str, Any] = {"processes": trainer.accelerator.num_processes, "kind": type(trainer.module).__name__}

    def keep(**more: Any) -> None:
        found.update(more)
        if main:
            (folder / "found.json").write_text(json.dumps(found))

    keep()
    if options.reversed:
        return trainer.accelerator.end_training()
    keep(seconds=time_steps(options, trainer))
    if trainer.accelerator.device.type == "cuda":
        keep(gb=torch.cuda.max_memory_allocated() / 2**30)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        resume(options, folder, trainer)
        keep(resumed=True)
    trainer.accelerator.end_training()


def reverse_rows() -> None:
    from snlp_zoo.train import loop

    in_order = loop.own_rows
    loop.own_rows = lambda *batch: {key: rows.flip(0) for key, rows in in_order(*batch).items()}


def resume(options: argparse.Namespace, folder: Path, trainer: Any) -> None:
    """Train from the sharded checkpoint in the middle to the end, in a folder of its own."""
    again = folder / "again"
    if trainer.accelerator.is_main_process:
        middle = sorted((folder / "checkpoints").iterdir())[0]
        shutil.copytree(middle, again / "checkpoints" / middle.name)
    trainer.accelerator.wait_for_everyone()
    make_trainer(options, again).run(True, "resume")


# ---- the program that launches them ----


def launch(options: argparse.Namespace, name: str, folder: Path, timeout: float) -> str:
    """Start one run and wait for it; what went wrong, or nothing."""
    file, processes = RUNS[name]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1" if options.tiny else "4"}
    if options.tiny:
        environment["ACCELERATE_USE_CPU"] = "true"
    elif processes == 1:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    config = REPOSITORY / "zoo_configs" / "accelerate" / file
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [str(Path(__file__).resolve()), "--folder", str(folder), "--steps", str(options.steps)]
    command += ["--batch", str(options.batch), *(["--tiny"] if options.tiny else [])]
    command += ["--reversed"] if name == "reversed" else []
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout)
            problem = f"ended with code {code}" if code else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher and its processes, a session of their own
            process.wait()
            problem = f"stopped after {timeout:.0f} s"
    return problem and f"{problem}\n{log.read_text()[-3000:]}"


def losses(folder: Path) -> dict[int, float]:
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def report(options: argparse.Namespace, folders: dict[str, Path]) -> None:
    found = {name: folder / "found.json" for name, folder in folders.items()}
    measured = {name: json.loads(path.read_text()) if path.exists() else {} for name, path in found.items()}
    reference = losses(folders["one GPU"])
    alone = measured["one GPU"].get("seconds")
    print(f"\n{options.steps} steps of {GLOBAL_BATCH} texts; then {options.batch} texts per GPU are timed")
    print(
        f"{'run':<9}{'steps':>6}{'last loss':>11}{'apart: first':>14}{'mean':>9}{'largest':>9}"
        f"{'resumed':>10}{'ms/step':>10}{'speed':>8}{'GB':>7}"
    )
    for name, folder in folders.items():
        own, seen = losses(folder), measured[name]
        again = losses(folder / "again") if seen.get("resumed") else {}
        shared, repeated = own.keys() & reference.keys(), own.keys() & again.keys()
        apart = [abs(own[step] - reference[step]) for step in sorted(shared)] or [float("nan")]
        parted = max((abs(own[step] - again[step]) for step in repeated), default=float("nan"))
        seconds = seen.get("seconds", float("nan"))
        speed = seen.get("processes", 1) * alone / seconds if alone else float("nan")
        last = own[max(own)] if own else float("nan")
        print(
            f"{name:<9}{len(own):>6}{last:>11.5f}{apart[0]:>14.5f}{statistics.mean(apart):>9.5f}{max(apart):>9.5f}"
            f"{parted:>10.5f}{1000 * seconds:>10.1f}{speed:>8.2f}{seen.get('gb', float('nan')):>7.1f}"
        )
    print(f"bars: largest difference to one GPU at most {LOSS_BAR}, speed at least {SPEED_BAR}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="texts per GPU while steps are timed; 256")
    parser.add_argument("--steps", type=int, help="of the losses that are compared; 50")
    parser.add_argument("--seconds", type=float, default=190, help="for all of it")
    parser.add_argument("--tiny", action="store_true", help="a trial on two CPU processes")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--reversed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch, options.steps = options.batch or (8 if options.tiny else 256), options.steps or 50
    if options.folder:
        work(options)
        return
    until = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch, name.replace(" ", "_")) for name in RUNS}
        for left, (name, folder) in zip((3, 2, 1, 0), folders.items(), strict=True):
            started = time.monotonic()
            problem = launch(options, name, folder, until - started - 40 * left)
            print(f"{name}: {time.monotonic() - started:.0f} s {problem}", flush=True)
        report(options, folders)


if __name__ == "__main__":
    main()
