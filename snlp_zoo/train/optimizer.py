"""The optimiser of a run, and how its learning rate changes."""

from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from snlp_zoo.distill.distiller import Distiller
from snlp_zoo.train.parts import TrainPart


def make_optimizer(distiller: Distiller, settings: TrainPart) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    return torch.optim.AdamW(
        _parameter_groups(distiller, settings),
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        eps=settings.adam_epsilon,
        fused=True,
    )


def make_scheduler(optimizer: Any, settings: TrainPart, planned: int) -> Any:
    """The learning rate over a run of `planned` steps."""
    warmup = round(settings.warmup_ratio * planned)
    if settings.min_learning_rate:
        floor = {"min_lr": settings.min_learning_rate}
        return get_scheduler("cosine_with_min_lr", optimizer, warmup, planned, scheduler_specific_kwargs=floor)
    schedule = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    return get_scheduler(schedule, optimizer, warmup, planned)


def _parameter_groups(distiller: Distiller, settings: TrainPart) -> list[dict[str, Any]]:
    """Weight decay on weight matrices only: biases, norms, amplitudes and shares of heads keep their size."""
    decayed: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            decayed[parameter.ndim > 1 and name.endswith("weight")].append(parameter)
    return [
        {"params": decayed[True], "weight_decay": settings.weight_decay},
        {"params": decayed[False], "weight_decay": 0.0},
    ]
