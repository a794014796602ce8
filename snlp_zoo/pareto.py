"""Accuracy, energy and latency of one trained model at other time steps and thresholds, without training again."""

import copy
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snlp_zoo.data import TextSet
from snlp_zoo.data.batches import loader, longest, model_inputs, tokenise
from snlp_zoo.energy import CostTable, Memory, estimate
from snlp_zoo.errors import EnergyError
from snlp_zoo.layers import ElasticBiSpike
from snlp_zoo.layers.neurons import BaseNode
from snlp_zoo.models.converted import is_converted

ENERGY_TEXTS = 8  # texts whose operations are counted; all are scored


def varied(model: PreTrainedModel, time_steps: int, threshold: float = 1.0) -> PreTrainedModel:
    """A copy with other time steps, and firing thresholds times `threshold`.

    Elastic bi-spike neurons take the amplitudes of the steps there are, and the last one's for steps beyond; their
    amplitude moves with their threshold.

    Raises:
        EnergyError: time_steps below 1 or threshold not positive; other time steps than 1 of a model that has none,
            since its neurons walk over tokens.
    """
    if time_steps < 1 or not 0 < threshold < math.inf:
        raise EnergyError(
            f"time steps must be at least 1 and thresholds positive and finite, got {time_steps} and {threshold}"
        )
    made = copy.deepcopy(model)
    if any(getattr(node, "over_tokens", False) for node in made.modules()):
        if time_steps != 1:
            raise EnergyError(
                f"{type(model).__name__} has one time step for each token, its neurons walk over tokens; sweep "
                f"thresholds at --time-steps 1, got {time_steps}"
            )
    else:
        made.config.time_steps = time_steps
    for node in made.modules():
        if isinstance(node, ElasticBiSpike):
            kept = torch.arange(time_steps, device=node.alpha.device).clamp_max(node.time_steps - 1)
            alpha = threshold * node.alpha.detach()[kept]
            node.alpha = nn.Parameter(alpha) if isinstance(node.alpha, nn.Parameter) else alpha
            node.magnitude, node.time_steps = node.magnitude[kept], time_steps
        elif isinstance(node, BaseNode):
            node.v_threshold *= threshold
            if getattr(node, "v_threshold_negative", None) is not None:
                node.v_threshold_negative *= threshold
    return made


def check_model(model: PreTrainedModel) -> None:
    """Raises EnergyError for a model that has no accuracy, or no steps and thresholds that can be varied."""
    if model.config.num_labels == 1:
        raise EnergyError(f"{type(model).__name__} predicts a number, which has no accuracy; use a model of classes")
    if is_converted(model):
        raise EnergyError(
            f"{type(model).__name__} is converted, and its spikes have neither a T of its own nor trained thresholds; "
            "convert it anew with another threshold_scale or max_count"
        )


def pareto(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: TextSet,
    *,
    time_steps: Iterable[int] = (1, 2, 4, 8),
    thresholds: Iterable[float] = (1.0,),
    costs: str | CostTable = "horowitz45",
    memory: str | Memory = "sram",
    batch_size: int = 32,
) -> Iterator[dict[str, Any]]:
    """One row for each time_steps and threshold.

    Args:
        texts: labelled; all are scored and timed, the first ENERGY_TEXTS are counted.
        time_steps, thresholds, costs, memory: as in `varied` and `energy.estimate`.
    Yields:
        time_steps, threshold, accuracy, firing_rate, pj_per_token, ratio (dense_fp32 with memory / spiking),
        spike_driven_fraction, ms_per_text (this machine's, in batches).
    Raises:
        EnergyError: as `varied` and `check_model`.
    """
    check_model(model)
    limit = longest(tokenizer, model.config)
    tokens = tokenise(tokenizer, texts, limit)
    batches = list(loader(tokens, tokenizer, batch_size, shuffle=False, drop_last=False))
    counted = tokenise(tokenizer, texts.take(list(range(min(ENERGY_TEXTS, len(texts))))), limit)
    (sample,) = loader(counted, tokenizer, ENERGY_TEXTS, shuffle=False, drop_last=False)
    for steps in time_steps:
        for threshold in thresholds:
            candidate = varied(model, steps, threshold)
            report = estimate(candidate, model_inputs(sample, candidate), costs=costs, memory=memory)
            yield {
                "time_steps": steps,
                "threshold": threshold,
                **_score(candidate, batches, len(texts)),
                "pj_per_token": report.totals["pj_per_token"],
                "ratio": report.ratios["with_memory"]["dense_fp32"],
                "spike_driven_fraction": report.spike_driven_fraction,
            }


@torch.no_grad()
def _score(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], texts: int) -> dict[str, float]:
    right, seconds = 0, 0.0
    fired: list[float] = []
    for batch in batches:
        inputs = model_inputs(batch, model)
        fired.append(float(model(**inputs, output_spike_rates=True).firing_rate) * len(batch["labels"]))
        started = time.perf_counter()
        output = model(**inputs)
        seconds += time.perf_counter() - started
        right += int((output.logits.argmax(-1) == batch["labels"]).sum())
    return {"accuracy": right / texts, "firing_rate": sum(fired) / texts, "ms_per_text": 1e3 * seconds / texts}


def front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that no other beats in accuracy at less or equal energy, by energy."""
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["pj_per_token"], -row["accuracy"])):
        if not best or row["accuracy"] > best[-1]["accuracy"]:
            best.append(row)
    return best
