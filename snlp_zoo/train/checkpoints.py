"""Checkpoints of a run: all that decides its next step, in one folder that appears complete or not at all.

    checkpoints/step_0000012/   weights, optimiser (sharded under FSDP2), random states per process, progress.json

Every process takes part; rank 0 moves the folder into place. They hold pickles of their own making, are read from the
run's own folder only, and are never published: the best student lies in model/, as safetensors.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import load
from torch import nn
from transformers import set_seed

from snlp_zoo.errors import CheckpointError
from snlp_zoo.train.files import flush
from snlp_zoo.train.parts import TrainPart
from snlp_zoo.train.processes import others_lost


class Checkpoints:
    """The checkpoints in one folder, the last `settings.keep_checkpoints` of them.

    Args:
        module: what was prepared, once.
        folder: holds nothing else.
    """

    def __init__(self, accelerator: Accelerator, module: nn.Module, folder: Path, settings: TrainPart) -> None:
        self.accelerator, self.module, self.folder, self.settings = accelerator, module, folder, settings
        self.last_step: int | None = None  # of the checkpoint saved or loaded last
        if not accelerator.is_fsdp2:  # names without "module.", so that any number of processes can read them
            accelerator.register_save_state_pre_hook(self._unwrap_saved)
            accelerator.register_load_state_pre_hook(self._unwrap_loaded)

    def _unwrap_saved(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights[:] = [self.accelerator.unwrap_model(model).state_dict() for model in models]

    def _unwrap_loaded(self, models: list[nn.Module], folder: str) -> None:
        models[:] = [self.accelerator.unwrap_model(model) for model in models]

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint with `state` as its progress.json; every process calls this.

        Raises:
            CheckpointError: it cannot be written; those before are untouched.
        """
        if step == self.last_step:
            return
        main, target = self.accelerator.is_main_process, self.folder / f"step_{step:07d}"
        aside = target.with_name(f".{target.name}.new")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_space()
            if main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(aside))
            if main:
                text = json.dumps(state | {"processes": self.accelerator.num_processes})
                (aside / "progress.json").write_text(text, encoding="utf-8")
            self.accelerator.wait_for_everyone()
            if main:
                flush(aside)
                os.replace(aside, target)
                flush(self.folder, files=False)
                for old in self.all()[: -self.settings.keep_checkpoints]:  # half removed, it must not look whole
                    shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            if isinstance(error, CheckpointError) or others_lost(error):
                raise
            raise CheckpointError(f"cannot write {target}: {error}; the checkpoints before are unchanged") from error
        self.accelerator.wait_for_everyone()
        self.last_step = step

    def _check_space(self) -> None:
        weights = [*self.module.parameters(), *self.module.buffers()]
        parts = [3 if w.requires_grad else 1 for w in weights]  # Adam keeps two moments
        needed = sum(n * w.numel() * w.element_size() for n, w in zip(parts, weights, strict=True))
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise CheckpointError(
                f"a checkpoint needs {needed:,} bytes and {self.folder} has {free:,} free; make room, or lower "
                "train.keep_checkpoints, then go on with --resume; the checkpoints before are unchanged"
            )

    def load(self, take: Callable[[dict[str, Any]], None]) -> None:
        """Go on from the last checkpoint, if there is one; `take` gets the state that was saved with it.

        Random states belong to a process. On another number of processes all are drawn anew, from seed and step.

        Raises:
            CheckpointError: it cannot be read.
        """
        if self.accelerator.is_main_process:
            for leftover in self.folder.glob(".*"):
                shutil.rmtree(leftover, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if not (found := self.all()):
            return  # killed before the first checkpoint: from the start
        last, rank = found[-1], self.accelerator.process_index
        try:
            state = json.loads((last / "progress.json").read_text(encoding="utf-8"))
            same = state["processes"] == self.accelerator.num_processes
            if same:
                load(last / f"random_states_{rank}.pkl")  # accelerate would go on without it
            self.accelerator.load_state(str(last))
            take(state)
            self.last_step = state["progress"]["step"]
            if not same:
                set_seed(self.settings.seed + state["progress"]["step"] + rank)
        except Exception as error:  # json, safetensors and torch each raise their own
            if others_lost(error):
                raise
            raise CheckpointError(
                f"cannot resume from {last}: {' '.join(str(error).split())[:300]}; delete that folder to "
                "resume from the one before, or start without --resume"
            ) from error

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(self.folder.glob("step_*"))


def started_with(folder: Path, batch_size: int) -> int:
    """The global batch of the run whose checkpoints these are, or `batch_size` where there are none.

    It stays when the number of processes changes, so that steps and epochs keep their meaning.
    """
    try:
        last = max(folder.glob("step_*"))
        return json.loads((last / "progress.json").read_text(encoding="utf-8"))["batch_size"]
    except (OSError, ValueError, KeyError):  # none yet, or damaged: `load` says so
        return batch_size
