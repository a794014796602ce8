"""The one training loop, on Accelerate: teachers are tuned and students are distilled by it.

    batches -> losses per objective -> weighted over ranks and accumulation -> step -> evaluate -> checkpoint

Everything that decides the next step lies in the checkpoint, so a resumed run continues bit for bit on a CPU.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    set_seed,
    tqdm,
)
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from snlp_zoo.distill.distiller import Distiller
from snlp_zoo.errors import CheckpointError, DataError, Interrupted, RecipeError
from snlp_zoo.layers.neurons import set_surrogate_temperature
from snlp_zoo.models.converted import set_window
from snlp_zoo.registry import task_of
from snlp_zoo.train.checkpoints import Checkpoints
from snlp_zoo.train.evaluation import (
    effective_domain,
    evaluate,
    evaluate_losses,
    firing_rates,
    never_empty,
    own_rows,
    sample,
    spikes,
)
from snlp_zoo.train.files import recover_folder, replace_file, replace_folder
from snlp_zoo.train.firing import FiringWatch
from snlp_zoo.train.graphs import ReplayedSteps, can_replay, padded
from snlp_zoo.train.optimizer import make_optimizer, make_scheduler
from snlp_zoo.train.parts import TrainPart, warn_of_unreached_windows, window_number
from snlp_zoo.train.processes import StopSignals
from snlp_zoo.train.schedules import Schedule, value_at

Weights = dict[str, Tensor]


def make_accelerator(mixed_precision: str) -> Accelerator:
    """The accelerator of a run."""
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    shared = PartialState._shared_state
    if shared.get("distributed_type") == DistributedType.FSDP:  # written there by that run, read as unknown by this one
        shared["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(
        kwargs_handlers=[
            # an objective on hidden states alone leaves the head and some projections without gradients
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=timedelta(minutes=10)),
        ],
        mixed_precision=mixed_precision,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.is_fsdp2:  # autocast, as everywhere else: losses and norms stay in float32
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    return accelerator


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # optimiser steps done
    epoch: int = 0
    batch: int = 0  # batches done in this epoch
    best: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    done: bool = False
    firing: FiringWatch = field(default_factory=FiringWatch)


class Trainer:
    """Trains a `Distiller`; see the module's first lines.

    Args:
        loaders: global batches for training and validation; every process takes its rows of each.
        weights: objective name -> weight, in the distiller's order. Like the surrogates' temperature a weight may
            change from the first step of all epochs to the last; validation always takes those of the end.
        folder: `metrics.jsonl`, `checkpoints/` and the best `model/` go here (rank 0 writes).
        save_model: writes the student into a folder, from its weights and those of its projection.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        distiller: Distiller,
        loaders: tuple[DataLoader, DataLoader],
        settings: TrainPart,
        weights: dict[str, float | Schedule],
        folder: Path,
        save_model: Callable[[Path, Weights, Weights], None],
    ) -> None:
        self.accelerator, self.settings, self.folder, self.save_model = accelerator, settings, folder, save_model
        self.names, self.progress = list(weights), Progress()
        if settings.freeze_embeddings:
            base: Any = distiller.student.base_model
            getattr(base, "embeddings", base.get_input_embeddings()).requires_grad_(False)
        optimizer = make_optimizer(distiller, settings)
        accelerator.free_memory()
        if accelerator.is_fsdp2:
            _shard_by_layer(accelerator, distiller)
        self.module, self.optimizer = accelerator.prepare(distiller, optimizer)
        if isinstance(self.module, DistributedDataParallel):
            self.module.broadcast_buffers = False  # amplitudes are averaged by the neurons, once for all
        self.loader, self.eval_loader = loaders
        self.distiller: Distiller = accelerator.unwrap_model(self.module)
        register_fsdp_forward_method(self.distiller, "losses_and_rate")  # does nothing without FSDP2
        self.sample = (
            sample(self.eval_loader, accelerator.device, distiller.student) if spikes(distiller.student) else None
        )
        self.checkpoints = Checkpoints(accelerator, self.module, folder / "checkpoints", settings)
        self.stop = StopSignals(accelerator.num_processes)
        self.weights = torch.zeros(len(weights), device=accelerator.device)  # of the step in progress
        self.scheduled = [settings.surrogate_temperature, *weights.values()]
        self.values: list[float] = []  # of all that is scheduled, at the step in progress
        self.window: int | None = None  # of `settings.window`, at the step in progress
        per_epoch = -(-len(self.loader) // settings.gradient_accumulation_steps)
        self.planned = planned = settings.steps or per_epoch * settings.epochs
        self.total_steps = min(settings.max_steps or planned, planned)
        self.eval_steps, self.save_steps = settings.eval_steps or per_epoch, settings.save_steps or per_epoch
        self.scheduler = make_scheduler(self.optimizer, settings, planned)
        self.replayed = ReplayedSteps(self.module, self._backward) if can_replay(accelerator, settings) else None
        # ranks start from the same weights and draw different dropout masks
        set_seed(settings.seed, device_specific=True)

    def run(self, resume: bool, label: str) -> Progress:
        """Train to the end, or from the last checkpoint to the end.

        Raises:
            Interrupted: told to stop by SIGTERM or SIGUSR1; a checkpoint is saved.
        """
        warn_of_unreached_windows(self.settings.window, self._share(self.total_steps - 1))
        with self.stop, self._tracked():
            return self._run(resume, label)

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        accelerator = self.accelerator
        if self.settings.tracker:
            accelerator.log_with = [self.settings.tracker]
            accelerator.project_configuration.logging_dir = str(self.folder)
            values = self.settings.model_dump().items()  # trackers take no pairs and no schedules
            settings = {name: str(v) if isinstance(v, tuple | dict | list) else v for name, v in values}
            accelerator.init_trackers(self.folder.name, settings)
        try:
            yield
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()
            accelerator.trackers = []

    def _run(self, resume: bool, label: str) -> Progress:
        if resume:
            self._load_checkpoint()
        self._trim_metrics()
        progress = self.progress
        bar = tqdm(total=self.total_steps, initial=progress.step, desc=label, mininterval=1.0, disable=None)
        while not progress.done:
            self.loader.batch_sampler.set_epoch(progress.epoch)  # type: ignore[union-attr]
            batches = skip_first_batches(self.loader, progress.batch) if progress.batch else self.loader
            for window in _windows(iter(batches), self.settings.gradient_accumulation_steps):
                losses = self._step(window)
                bar.update()
                self._after_step(losses, len(window))
                if self.stop.received_by_any():
                    self._stop()
                if progress.done:
                    break
            else:
                progress.epoch, progress.batch = progress.epoch + 1, 0
        bar.close()
        return progress

    def _step(self, window: list[dict[str, Tensor]]) -> Tensor:
        """One optimiser step over the batches of an accumulation window; the objectives' global means [objectives]."""
        if not self.distiller.student.training:  # once: it walks over all modules, and whoever evaluates puts them back
            self.module.train()
        self._follow_schedules()
        means = self._replay(self.replayed, *window) if self.replayed else self._accumulate(window)
        self.accelerator.clip_grad_norm_(self.module.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return means

    def _accumulate(self, window: list[dict[str, Tensor]]) -> Tensor:
        """Gradients of the batches of a window; the objectives' global means."""
        totals = torch.stack([self.distiller.counts(batch) for batch in window]).sum(0).to(self.weights.device)
        means = torch.zeros_like(self.weights)
        for i, whole in enumerate(window):
            batch = own_rows(self.accelerator, whole)
            # a mean of unequal ranks' means is not the mean: each micro-batch counts by its share of the whole
            share = self.distiller.counts(batch) / totals.clamp_min(1)
            with _no_sync(self.accelerator, self.module, i < len(window) - 1):
                with self.accelerator.autocast():  # FSDP2 alone does not have it already
                    losses = self.module(never_empty(batch, whole)) * share
                # gradients are averaged over ranks, the shares already add up to one
                self.accelerator.backward((losses * self.weights).sum() * self.accelerator.num_processes)
            means += losses.detach()
        return means

    def _replay(self, replayed: ReplayedSteps, batch: dict[str, Tensor]) -> Tensor:
        """`_accumulate` of one batch, without launching its kernels one by one."""
        return replayed(padded(own_rows(self.accelerator, batch), *self.distiller.configs))

    def _backward(self, batch: dict[str, Tensor]) -> Tensor:
        with self.accelerator.autocast():
            losses = self.module(batch)
        (losses * self.weights).sum().backward()
        return losses.detach()

    def _follow_schedules(self) -> None:
        """Weights, temperature and window of this step; set where they change only: a compiled student would compile
        again.
        """
        progress = self._share(self.progress.step)
        values = [value_at(scheduled, progress) for scheduled in self.scheduled]
        if values[1:] != self.values[1:]:
            self.weights.copy_(torch.tensor(values[1:]))  # in place: a captured step reads them there
        if values[:1] != self.values[:1]:
            set_surrogate_temperature(self.distiller.student, values[0])
        self.values = values
        if self.settings.window and (number := window_number(self.settings.window, progress)) != self.window:
            self.window = number
            set_window(self.distiller.student, **self._window())
            if self.replayed:
                self.replayed.forget()

    def _share(self, step: int) -> float:
        """How far into the planned run a step is, in [0, 1]."""
        return step / (self.planned - 1) if self.planned > 1 else 1.0

    def _window(self) -> dict[str, Any]:
        """The window in force, if there is one."""
        return {} if self.window is None else self.settings.window[self.window].model_dump(exclude={"until"})

    def _after_step(self, losses: Tensor, batches: int) -> None:
        progress, settings = self.progress, self.settings
        progress.step, progress.batch = progress.step + 1, progress.batch + batches
        progress.done = progress.step >= self.total_steps
        if self.sample and progress.firing.due(progress.step):
            sites = firing_rates(self.distiller.student, self.sample)
            progress.firing.look(progress.step, sites, self.distiller.student.config)
        if progress.step % settings.logging_steps == 0 or progress.done:
            self._log_losses(losses)
        if progress.step % self.eval_steps == 0 or progress.done:
            self._evaluate()
        if progress.step % self.save_steps == 0 or progress.done:
            self._save_checkpoint()

    def _stop(self) -> None:
        self._save_checkpoint()
        raise Interrupted(f"told to stop; step {self.progress.step} is saved in {self.folder}: go on with --resume")

    def _log_losses(self, losses: Tensor) -> None:
        losses = self.accelerator.reduce(losses, "sum")
        if not torch.isfinite(losses).all():
            raise DataError(
                f"the loss is not finite at step {self.progress.step}: "
                f"{dict(zip(self.names, losses.tolist(), strict=True))}; lower train.learning_rate"
            )
        terms = {name: round(value, 7) for name, value in zip(self.names, losses.tolist(), strict=True)}
        total = round(float((losses * self.weights).sum()), 7)
        self._write(
            {"step": self.progress.step, "loss": total, **terms, "learning_rate": self.scheduler.get_last_lr()[0]}
            | self._window()
        )

    def _evaluate(self) -> None:
        progress = self.progress
        student = self.distiller.student
        if task_of(student) == "encoder":  # no head, no predictions
            weights = [value_at(weight, 1.0) for weight in self.scheduled[1:]]
            scores = evaluate_losses(self.accelerator, self.distiller, self.eval_loader, weights, "validate")
        else:
            scores = evaluate(self.accelerator, student, self.eval_loader, "validate")
        domain = {}
        if self.sample and student.config.gradient != "equilibrium":
            domain = effective_domain(student, self.sample)
        more = {"effective_domain": domain} if domain else {}
        self._write({"step": progress.step, "split": "validation", **scores, **more, **self._window()})
        if self.window not in (None, window_number(self.settings.window, self._share(self.total_steps - 1))):
            return  # what a wider window reaches, the model that is wanted does not
        first = next(iter(scores))
        metric = scores[self.settings.metric_for_best_model or first]
        if progress.best is None or metric > progress.best:
            progress.best, progress.best_step, progress.evaluations_since_best = metric, progress.step, 0
            weights = self.accelerator.get_state_dict(self.module)  # of all shards, on every rank's behalf
            student_weights, projection = (_part(weights, name) for name in ("student.", "projection."))
            self._on_main(
                lambda: replace_folder(self.folder / "model", lambda f: self.save_model(f, student_weights, projection))
            )
        else:
            progress.evaluations_since_best += 1
        patience = self.settings.early_stopping_patience
        progress.done = progress.done or (patience is not None and progress.evaluations_since_best >= patience)

    def _write(self, row: dict[str, Any]) -> None:
        def append() -> None:
            try:
                with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise CheckpointError(f"cannot write {self.folder / 'metrics.jsonl'}: {error}") from error

        self._on_main(append)
        domain = {f"effective_domain/{site}": share for site, share in row.get("effective_domain", {}).items()}
        values = {name: value for name, value in (row | domain).items() if isinstance(value, float)}
        self.accelerator.log(values, row["step"])

    def _on_main(self, action: Callable[[], None]) -> None:
        if self.accelerator.is_main_process:
            action()
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self) -> None:
        state = {
            "progress": asdict(self.progress),
            "scheduler": self.scheduler.state_dict(),
            "batch_size": self.loader.batch_sampler.batch_size,  # type: ignore[union-attr]
        }
        self.checkpoints.save(self.progress.step, state)

    def _load_checkpoint(self) -> None:
        self._on_main(lambda: recover_folder(self.folder / "model"))

        def take(state: dict[str, Any]) -> None:
            progress = state["progress"]
            self.progress = Progress(**progress | {"firing": FiringWatch(**progress.get("firing", {}))})
            self.scheduler.load_state_dict(state["scheduler"])

        self.checkpoints.load(take)

    def _trim_metrics(self) -> None:
        """Drop logged steps that will be done again."""

        def trim() -> None:
            path = self.folder / "metrics.jsonl"
            rows = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= self.progress.step]
            if kept != rows:
                replace_file(path, "".join(kept))

        self._on_main(trim)


def _part(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _shard_by_layer(accelerator: Accelerator, distiller: Distiller) -> None:
    """Let FSDP2 gather one layer of this student at a time, and the student by itself, to evaluate it."""
    plugin, student = accelerator.state.fsdp_plugin, distiller.student
    if getattr(student.config, "alpha_mode", None) == "learned":
        raise RecipeError("alpha_mode 'learned' measures its start in whole weights, FSDP2 has shards; use DDP")
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    present = {type(module).__name__ for module in student.modules()}
    layers = present.intersection(student._no_split_modules or ())
    plugin.transformer_cls_names_to_wrap = [*sorted(layers), type(student).__name__]


def _windows(batches: Iterator[dict[str, Tensor]], size: int) -> Iterator[list[dict[str, Tensor]]]:
    while window := list(islice(batches, size)):
        yield window


def _no_sync(accelerator: Accelerator, module: nn.Module, active: bool) -> Any:
    return accelerator.no_sync(module) if active else nullcontext()
