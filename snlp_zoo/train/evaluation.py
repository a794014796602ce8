"""Scores on a split: of a classifier by its predictions, of a language model by the probability of the text, of an
encoder by its distance from the teacher.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, tqdm
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from snlp_zoo.data.batches import model_inputs
from snlp_zoo.data.streams import Crops, Stream
from snlp_zoo.distill.distiller import Distiller
from snlp_zoo.layers.firing import effective_domain_recorded
from snlp_zoo.layers.watching import evaluating
from snlp_zoo.models.configuration import SpikingConfig
from snlp_zoo.train.metrics import score, score_language

SAMPLE = 8  # texts on which neurons are looked at
STRIDE = 512  # tokens read at once where a state is carried on: it changes memory alone


def spikes(model: PreTrainedModel) -> bool:
    """Whether a model has neurons: a teacher does not, nor a student whose neurons are switched off."""
    return isinstance(model.config, SpikingConfig) and getattr(model.config, "spiking", True)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: PreTrainedModel, loader: DataLoader, label: str) -> dict[str, float]:
    """Scores of a model over a loader of global batches, and its firing rate if it spikes. Equal on every rank.

    Args:
        model: unwrapped, a classifier, or a language model where the loader gives crops of a stream; its training mode
            is restored.
        label: what the progress bar says.
    """
    if isinstance(loader.dataset, Crops):
        return _evaluate_language(accelerator, model, loader, loader.dataset.stream, label)
    asked = {"output_spike_rates": True} if spikes(model) else {}
    rows: list[tuple[int, np.ndarray, Any]] = []  # example number, logits, label
    fired: list[tuple[float, int]] = []  # firing rate and tokens of a batch
    with evaluating(model):
        for whole in tqdm(loader, desc=label, leave=False, mininterval=1.0, disable=None):
            batch = own_rows(accelerator, whole)
            output = model(**model_inputs(never_empty(batch, whole), model), **asked)
            if len(batch["index"]):
                columns = (batch["index"].tolist(), output.logits.float().cpu().numpy(), batch["labels"].cpu().numpy())
                rows += zip(*columns, strict=True)
                if asked:
                    fired.append((float(output.firing_rate), int(batch["attention_mask"].sum())))
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    scores = score(np.stack([row[1] for row in rows]), np.stack([row[2] for row in rows]))
    if asked:
        fired = gather_object(fired)
        scores["firing_rate"] = sum(rate * tokens for rate, tokens in fired) / sum(tokens for _, tokens in fired)
    return scores


def _evaluate_language(
    accelerator: Accelerator, model: PreTrainedModel, loader: DataLoader, stream: Stream, label: str
) -> dict[str, float]:
    """`score_language` of a stream whose crops are each read from rest, and the firing rate."""
    asked = {"output_spike_rates": True} if spikes(model) else {}
    rows: list[tuple[int, float]] = []  # where a crop starts, its nats
    fired: list[float] = []  # firing rate times tokens of a batch
    with evaluating(model):
        for whole in tqdm(loader, desc=label, leave=False, mininterval=1.0, disable=None):
            batch = own_rows(accelerator, whole)
            output = model(**model_inputs(never_empty(batch, whole), model), use_cache=False, **asked)
            if len(batch["index"]):
                rows += zip(batch["index"].tolist(), _nats(output.logits, batch["labels"]).tolist(), strict=True)
                if asked:
                    fired.append(float(output.firing_rate) * int(batch["attention_mask"].sum()))
    nats = sum(value for _, value in sorted(gather_object(rows)))  # in one order, whatever the batches
    scores = score_language(nats, len(stream), stream.utf8_bytes, stream.characters)
    return scores | ({"firing_rate": sum(gather_object(fired)) / len(stream)} if asked else {})


@torch.no_grad()
def evaluate_through(model: PreTrainedModel, stream: Stream) -> dict[str, float]:
    """`score_language` of a stream that a language model of this zoo reads from its beginning to its end, its state
    carried on, and the firing rate if it spikes.
    """
    asked = {"output_spike_rates": True} if spikes(model) else {}
    crops, cache, nats, fired = Crops(stream, STRIDE), None, 0.0, 0.0
    with evaluating(model):
        for start in tqdm(range(0, len(stream), STRIDE), desc="evaluate", leave=False, mininterval=1.0, disable=None):
            batch = send_to_device(crops.collate([start]), model.device)
            output = model(batch["input_ids"], past_key_values=cache, use_cache=True, **asked)
            cache = output.past_key_values
            nats += float(_nats(output.logits, batch["labels"]))
            fired += float(output.firing_rate) * batch["labels"].numel() if asked else 0.0
    scores = score_language(nats, len(stream), stream.utf8_bytes, stream.characters)
    return scores | ({"firing_rate": fired / len(stream)} if asked else {})


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -ln p over each crop's tokens, float64 [B]; logits [B, N, V], labels [B, N] of the tokens that follow."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(labels).double().sum(1)


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


def sample(loader: DataLoader, device: torch.device, student: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs of a few texts of middling length, the same at every look and on every rank."""
    batches = list(loader.batch_sampler)  # type: ignore[arg-type]
    batch = loader.collate_fn(batches[len(batches) // 2][:SAMPLE])
    return send_to_device(model_inputs(batch, student), device)


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
