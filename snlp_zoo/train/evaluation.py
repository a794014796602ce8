"""Scores on a split: of a model with a head by its predictions, of an encoder by its distance from the teacher."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, tqdm
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from snlp_zoo.data.batches import model_inputs
from snlp_zoo.distill.distiller import Distiller
from snlp_zoo.layers.firing import effective_domain_recorded
from snlp_zoo.layers.watching import evaluating
from snlp_zoo.models.configuration import SpikingConfig
from snlp_zoo.train.metrics import score

SAMPLE = 8  # texts on which neurons are looked at


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: PreTrainedModel, loader: DataLoader, label: str) -> dict[str, float]:
    """Scores of a model over a loader of global batches, and its firing rate if it spikes. Equal on every rank.

    Args:
        model: unwrapped; its training mode is restored.
        label: what the progress bar says.
    """
    spikes = {"output_spike_rates": True} if isinstance(model.config, SpikingConfig) else {}
    rows: list[tuple[int, np.ndarray, Any]] = []  # example number, logits, label
    fired: list[tuple[float, int]] = []  # firing rate and tokens of a batch
    with evaluating(model):
        for whole in tqdm(loader, desc=label, leave=False, mininterval=1.0, disable=None):
            batch = own_rows(accelerator, whole)
            output = model(**model_inputs(never_empty(batch, whole)), **spikes)
            if len(batch["index"]):
                columns = (batch["index"].tolist(), output.logits.float().cpu().numpy(), batch["labels"].cpu().numpy())
                rows += zip(*columns, strict=True)
                if spikes:
                    fired.append((float(output.firing_rate), int(batch["attention_mask"].sum())))
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    scores = score(np.stack([row[1] for row in rows]), np.stack([row[2] for row in rows]))
    if spikes:
        fired = gather_object(fired)
        scores["firing_rate"] = sum(rate * tokens for rate, tokens in fired) / sum(tokens for _, tokens in fired)
    return scores


@torch.no_grad()
def evaluate_losses(
    accelerator: Accelerator, distiller: Distiller, loader: DataLoader, weights: list[float], label: str
) -> dict[str, float]:
    """`evaluate` for a student without a head, by its distance from the teacher.

    Returns:
        negative_loss (minus the weighted sum, so that more is better), every objective's mean over all batches,
        firing_rate. Equal on every rank.
    """
    sums: list[tuple[Tensor, Tensor, float, int]] = []  # losses times units, units, firing rate times tokens, tokens
    with evaluating(distiller):
        for whole in tqdm(loader, desc=label, leave=False, mininterval=1.0, disable=None):
            batch = own_rows(accelerator, whole)
            losses, rate = distiller.losses_and_rate(never_empty(batch, whole), output_spike_rates=True)
            if len(batch["index"]):
                units, tokens = distiller.counts(batch).double(), int(batch["attention_mask"].sum())
                sums.append(((losses.double() * units).cpu(), units.cpu(), float(rate) * tokens, tokens))
    losses, units, fired, tokens = (sum(column) for column in zip(*gather_object(sums), strict=True))
    means = (losses / units.clamp_min(1)).tolist()
    negative = -sum(weight * mean for weight, mean in zip(weights, means, strict=True))
    terms = dict(zip(distiller.objectives, means, strict=True))
    return {"negative_loss": negative, **terms, "firing_rate": fired / tokens}


def own_rows(accelerator: Accelerator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's rows of a global batch. All are padded alike, so processes round alike, whatever their number."""
    size, rank, processes = len(batch["index"]), accelerator.process_index, accelerator.num_processes
    own = slice(size * rank // processes, size * (rank + 1) // processes)
    return send_to_device({key: value[own] for key, value in batch.items()}, accelerator.device)


def never_empty(batch: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """A process without rows takes part with one that is all padding: the others wait for its sums and its shards."""
    if len(batch["index"]):
        return batch
    stand_in = {key: whole[key][:1].to(value.device) for key, value in batch.items()}
    return stand_in | {"attention_mask": torch.zeros_like(stand_in["attention_mask"])}


def sample(loader: DataLoader, device: torch.device) -> dict[str, Tensor]:
    """Inputs of a few texts of middling length, the same at every look and on every rank."""
    batches = list(loader.batch_sampler)  # type: ignore[arg-type]
    batch = loader.collate_fn(batches[len(batches) // 2][:SAMPLE])
    return send_to_device(model_inputs(batch), device)


@torch.no_grad()
def firing_rates(student: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Firing rate of each of a student's neuron sites on these texts."""
    with evaluating(student):
        output = student(**inputs, output_spike_rates=True)
    return {site: float(rate.mean()) for site, rate in output.spike_rates.items()}


@torch.no_grad()
def effective_domain(student: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Share of membrane potentials whose surrogate gradient is not negligible on these texts, site by site."""
    with evaluating(student), effective_domain_recorded(student.base_model, inputs["attention_mask"]) as shares:
        student(**inputs)
    return {site: round(float(share), 4) for site, share in shares.items()}
