"""Predictions of a saved model for single texts, without anything that training needs."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from snlp_zoo import hub, registry
from snlp_zoo.data.batches import longest, model_inputs
from snlp_zoo.data.text import refuse_half_pairs
from snlp_zoo.errors import DataError
from snlp_zoo.layers.spike_statistics import SpikeCounts, spikes_counted
from snlp_zoo.models.converted import is_converted

logger = logging.getLogger(__name__)


@torch.no_grad()
def predict(
    path_or_entry: str | Path,
    texts: list[str],
    *,
    pairs: list[str] | None = None,
    revision: str | None = None,
    verify: bool = False,
) -> list[dict[str, Any]]:
    """Label, score and firing rate of each text, or pair of texts.

    Args:
        path_or_entry: a saved folder, a zoo entry (see `find_checkpoint`), or "user/name" on the Hub.
        pairs: the second text of each, for models of pairs.
        revision, verify: as `snlp_zoo.load`.
    Returns:
        One mapping per text: text (and pair), label, score (probability of the label, or the predicted number for
        regression), firing_rate (share of neurons that fired, over sites and steps; of a converted model share of the
        inputs of its layers that have a spike), truncated (whether the text was cut).
    Raises:
        CheckpointError: no such model, or it is damaged.
        DataError: a text that is empty, no Unicode, or no text; one text in place of a list; another number of pairs.
    """
    _check(texts, "text")
    if pairs is not None:
        _check(pairs, "pair")
        if len(pairs) != len(texts):
            raise DataError(f"predict: {len(texts)} texts and {len(pairs)} pairs; give the second text of each")
    folder = hub.find_checkpoint(path_or_entry, revision=revision, verify=verify)
    model = registry.load_classifier(folder)
    tokenizer = registry.load_tokenizer(folder)
    limit = longest(tokenizer, model.config)
    names = [name for _, name in sorted((model.config.id2label or {}).items())]
    predictions = []
    rows = zip(texts, strict=True) if pairs is None else zip(texts, pairs, strict=True)
    for number, parts in enumerate(rows, start=1):
        length = len(tokenizer(*parts, verbose=False)["input_ids"])
        if length > limit:
            logger.warning("text %d has %d tokens and was cut at %d", number, length, limit)
        inputs = tokenizer(*parts, truncation=True, max_length=limit, return_tensors="pt")
        logits, rate = _forward(model, model_inputs(inputs, model))
        best = int(logits.argmax())
        score = (logits if len(logits) == 1 else logits.softmax(-1))[best].item()
        predictions.append(
            {
                **dict(zip(("text", "pair"), parts, strict=False)),
                "label": names[best],
                "score": score,
                "firing_rate": rate,
                "truncated": length > limit,
            }
        )
    return predictions


def _check(texts: list[str], what: str) -> None:
    if isinstance(texts, str):  # its letters would be texts
        raise DataError(f"predict: {what}s are a list, got one text; use [{texts[:40]!r}]")
    for number, text in enumerate(texts, start=1):
        place = f"{what} {number} of {len(texts)}"
        if not isinstance(text, str):
            raise DataError(f"{place} is a {type(text).__name__}; give a string")
        if not text.strip():
            raise DataError(f"{place} is empty; give it at least one word")
        refuse_half_pairs(text, place)


def _forward(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Logits [classes] and firing rate of one text."""
    if not is_converted(model):
        output = model(**inputs, output_spike_rates=True)
        return output.logits[0], output.firing_rate.item()
    with spikes_counted(model) as counted:
        logits = model(**inputs).logits[0]
    return logits, 1 - sum(counted.values(), SpikeCounts()).zero_share
