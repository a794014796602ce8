"""Scores on a split: of a classifier by its predictions, of a language model by the probability of the text, of an
encoder by its distance from the teacher.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from snlp_zoo.data.batches import model_inputs
from snlp_zoo.data.streams import Crops, Stream
from snlp_zoo.distill.distiller import Distiller
from snlp_zoo.layers.firing import effective_domain_recorded
from snlp_zoo.layers.spike_statistics import SpikeCounts, spikes_counted
from snlp_zoo.layers.watching import evaluating
from snlp_zoo.models.configuration import SpikingConfig
from snlp_zoo.models.converted import is_converted
from snlp_zoo.train.metrics import score, score_language

SAMPLE = 8  # texts on which neurons are looked at
STRIDE = 512  # tokens read at once where a state is carried on: it changes memory alone


def spikes(model: PreTrainedModel) -> bool:
    """Whether a model gives firing rates: a teacher does not, nor a student whose neurons are switched off, nor a
    converted model, whose spikes are counted (`_counted`).
    """
    return isinstance(model.config, SpikingConfig) and getattr(model.config, "spiking", True)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: PreTrainedModel, loader: DataLoader, label: str) -> dict[str, float]:
    """Scores of a model over a loader of global batches, and its firing rate if it spikes. Equal on every rank.

    Of a converted model the rate is 1 - zero_share, which stands beside it, as spikes_per_value does: both are counted
    on one batch, from the middle.

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
    counts: list[SpikeCounts] = []
    with evaluating(model):
        for number, whole in enumerate(tqdm(loader, desc=label, leave=False, mininterval=1.0, disable=None)):
            batch = own_rows(accelerator, whole)
            with _counted(model, counts, when=number == (len(loader) - 1) // 2):
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
    return scores | _shares(counts)


@torch.no_grad()
def predicted_labels(
    accelerator: Accelerator, model: PreTrainedModel, loader: DataLoader, label: str
) -> list[int] | list[float]:
    """The class that a classifier gives each example of a loader of global batches, or its value for a regression, in
    the order of their numbers. Equal on every rank.
    """
    rows: list[tuple[int, Any]] = []
    with evaluating(model):
        for whole in tqdm(loader, desc=label, leave=False, mininterval=1.0, disable=None):
            batch = own_rows(accelerator, whole)
            logits = model(**model_inputs(never_empty(batch, whole), model)).logits.float()
            if len(batch["index"]):
                found = logits.argmax(-1) if logits.shape[-1] > 1 else logits[:, 0]
                rows += zip(batch["index"].tolist(), found.tolist(), strict=True)
    return [value for _, value in sorted(gather_object(rows))]


def _evaluate_language(
    accelerator: Accelerator, model: PreTrainedModel, loader: DataLoader, stream: Stream, label: str
) -> dict[str, float]:
    """`score_language` of a stream whose crops are each read from rest, and the firing rate."""
    asked = {"output_spike_rates": True} if spikes(model) else {}
    rows: list[tuple[int, float]] = []  # where a crop starts, its nats
    fired: list[float] = []  # firing rate times tokens of a batch
    counts: list[SpikeCounts] = []
    with evaluating(model):
        for number, whole in enumerate(tqdm(loader, desc=label, leave=False, mininterval=1.0, disable=None)):
            batch = own_rows(accelerator, whole)
            with _counted(model, counts, when=number == (len(loader) - 1) // 2):
                output = model(**model_inputs(never_empty(batch, whole), model), use_cache=False, **asked)
            if len(batch["index"]):
                rows += zip(batch["index"].tolist(), _nats(output.logits, batch["labels"]).tolist(), strict=True)
                if asked:
                    fired.append(float(output.firing_rate) * int(batch["attention_mask"].sum()))
    nats = sum(value for _, value in sorted(gather_object(rows)))  # in one order, whatever the batches
    scores = score_language(nats, len(stream), stream.utf8_bytes, stream.characters)
    return scores | ({"firing_rate": sum(gather_object(fired)) / len(stream)} if asked else {}) | _shares(counts)


@contextmanager
def _counted(model: nn.Module, counts: list[SpikeCounts], when: bool) -> Iterator[None]:
    """Add the spikes of a converted model's layers to `counts`, if it is time to: counting takes long."""
    if not (when and is_converted(model)):
        yield
        return
    with spikes_counted(model) as found:
        yield
    counts.append(sum(found.values(), SpikeCounts()))


def _shares(counts: list[SpikeCounts]) -> dict[str, float]:
    """What the counts of all processes say; nothing where nothing was counted."""
    if not (counts := gather_object(counts)):
        return {}
    total = sum(counts, SpikeCounts())
    return {
        "firing_rate": 1 - total.zero_share,
        "zero_share": total.zero_share,
        "spikes_per_value": total.spikes_per_value,
    }


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
        negative_loss (minus the weighted sum, so that more is better), every objective's mean over all batches, and the
        firing rate if it spikes. Equal on every rank.
    """
    sums: list[tuple[Tensor, Tensor, float, int]] = []  # losses times units, units, firing rate times tokens, tokens
    asked = {"output_spike_rates": True} if spikes(distiller.student) else {}
    counts: list[SpikeCounts] = []
    with evaluating(distiller):
        for number, whole in enumerate(tqdm(loader, desc=label, leave=False, mininterval=1.0, disable=None)):
            batch = own_rows(accelerator, whole)
            with _counted(distiller.student, counts, when=number == (len(loader) - 1) // 2):
                losses, rate = distiller.losses_and_rate(never_empty(batch, whole), **asked)
            if len(batch["index"]):
                units, tokens = distiller.counts(batch).double(), int(batch["attention_mask"].sum())
                fired = float(rate) * tokens if asked else 0.0
                sums.append(((losses.double() * units).cpu(), units.cpu(), fired, tokens))
    losses, units, fired, tokens = (sum(column) for column in zip(*gather_object(sums), strict=True))
    means = (losses / units.clamp_min(1)).tolist()
    negative = -sum(weight * mean for weight, mean in zip(weights, means, strict=True))
    terms = dict(zip(distiller.objectives, means, strict=True))
    return {"negative_loss": negative, **terms} | ({"firing_rate": fired / tokens} if asked else {}) | _shares(counts)


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
