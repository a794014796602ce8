"""Predictions of a saved model for single texts, without anything that training needs."""

import logging
from pathlib import Path
from typing import Any

import torch

from snlp_zoo import hub, registry
from snlp_zoo.data.batches import longest, model_inputs
from snlp_zoo.errors import DataError

logger = logging.getLogger(__name__)


@torch.no_grad()
def predict(
    path_or_entry: str | Path, texts: list[str], *, revision: str | None = None, verify: bool = False
) -> list[dict[str, Any]]:
    """Label, score and firing rate of each text.

    Args:
        path_or_entry: a saved folder, a zoo entry trained into runs/<entry>, or "user/name" on the Hub.
        revision, verify: as `snlp_zoo.load`.
    Returns:
        One mapping per text: text, label, score (probability of the label, or the predicted number for regression),
        firing_rate (share of neurons that fired, over sites and steps), truncated (whether the text was cut).
    Raises:
        CheckpointError: no such model, or it is damaged.
        DataError: an empty text.
    """
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise DataError(f"text {number} of {len(texts)} is empty; give it at least one word")
    folder = hub.find_checkpoint(path_or_entry, revision=revision, verify=verify)
    model = registry.load_classifier(folder)
    tokenizer = registry.load_tokenizer(folder)
    limit = longest(tokenizer, model.config)
    predictions = []
    for number, text in enumerate(texts, start=1):
        length = len(tokenizer(text, verbose=False)["input_ids"])
        if length > limit:
            logger.warning("text %d has %d tokens and was cut at %d", number, length, limit)
        inputs = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
        output = model(**model_inputs(inputs, model), output_spike_rates=True)
        logits = output.logits[0]
        best = int(logits.argmax())
        score = (logits if len(logits) == 1 else logits.softmax(-1))[best].item()
        rate = output.firing_rate.item()
        predictions.append(
            {
                "text": text,
                "label": model.config.label_names[best],
                "score": score,
                "firing_rate": rate,
                "truncated": length > limit,
            }
        )
    return predictions
