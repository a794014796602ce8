"""Scores of a saved student: the whole of `snlp-zoo evaluate`."""

import logging
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from snlp_zoo import hub, registry
from snlp_zoo.data import load_documents, load_splits, read_documents, read_set
from snlp_zoo.data.batches import loader, longest, tokenise
from snlp_zoo.data.streams import crop_loader, make_stream
from snlp_zoo.errors import CheckpointError, DataError, RecipeError
from snlp_zoo.models.checkpoint import architecture, read_json
from snlp_zoo.models.configuration import SpikingConfig
from snlp_zoo.train.evaluation import evaluate, evaluate_through
from snlp_zoo.train.loop import make_accelerator
from snlp_zoo.train.parts import DataPart
from snlp_zoo.train.recipe import stages_of

logger = logging.getLogger(__name__)
WINDOW = 1024  # tokens in which text is read where no state can be carried on
_AT_ONCE = 4096  # tokens, of several windows


def evaluate_checkpoint(
    path_or_entry: str,
    data: str,
    *,
    text: str = "text",
    text_pair: str | None = None,
    label: str = "label",
    separator: str | None = None,
    window: int | None = None,
    revision: str | None = None,
    verify: bool = False,
) -> dict[str, Any]:
    """Scores of a saved student, a classifier or a language model.

    A language model of this zoo carries its state through all of the text, so that every token is predicted from all
    before it; validation while training starts every crop afresh, and so is a little worse. Where the state grows with
    the text, in a converted model or a dense one of transformers, text is read in windows, each from its beginning.

    Args:
        data: a file, with labels for a classifier, or anything `data.load_splits` or, for a language model,
            `data.load_documents` knows, whose test split is used; of the run's own data, a file too, that of the run.
        text, text_pair, label: column names; of a language model the first alone.
        separator: what stands after each text for a language model; None: what did in its run, if that lies around
            it, else its tokenizer's end of text.
        window: tokens of a language model's windows; None: `WINDOW`, or the state is carried on where that can be.
        revision, verify: as `snlp_zoo.load`.
    Raises:
        SnlpError: the checkpoint or the file cannot be used.
    """
    folder = hub.find_checkpoint(path_or_entry, revision=revision, verify=verify)
    if registry.task_of(architecture(read_json(folder / "config.json"))) == "causal-lm":
        return _evaluate_language_model(folder, data, text, separator, window)
    if window is not None or separator is not None:
        raise RecipeError(f"window and separator are of language models; {folder} holds a classifier, leave them out")
    model = registry.load_classifier(folder)
    tokenizer = registry.load_tokenizer(folder)
    labels: dict[Any, str] = model.config.id2label or {}
    names = None if len(labels) == 1 else [labels[number] for number in sorted(labels)]
    columns: dict[str, Any] = {"text": text, "text_pair": text_pair, "label": label, "label_names": names}
    own = _own_splits(_data_of(folder), data)
    if Path(data).is_file() and not own:
        texts = read_set(data, regression=names is None, **columns)
    else:
        splits = load_splits(data, **columns, **own)
        if splits.label_names != names:
            raise DataError(f"{folder} gives numbers, and the labels of {data} are classes; name data of numbers")
        texts = splits.test
    limit = longest(tokenizer, model.config)
    tokens = tokenise(tokenizer, texts, limit)
    if tokens.truncated:
        logger.warning("%d of %d texts were cut at %d tokens", tokens.truncated, len(tokens), limit)
    accelerator = make_accelerator("no")
    batches = loader(tokens, tokenizer, 64, shuffle=False, drop_last=False)
    scores = evaluate(accelerator, model.to(accelerator.device), batches, "evaluate")
    return {"path": str(folder), "data": data, "examples": len(tokens), "truncated": tokens.truncated, **scores}


def _evaluate_language_model(
    folder: Path, data: str, text: str, separator: str | None, window: int | None
) -> dict[str, Any]:
    model, tokenizer = _language_model(folder), registry.load_tokenizer(folder)
    part = _data_of(folder)
    if part is not None and separator is None:
        separator = part.separator
    own = _own_splits(part, data)
    if Path(data).is_file() and not own:
        texts = read_documents(data, text)
    else:
        cut = {key: own[key] for key in ("name", "seed", "test_size") if own}
        texts = load_documents(data, text=text, **cut).test.texts
    stream = make_stream(texts, tokenizer, separator)
    if (largest := int(stream.tokens.max())) >= model.config.vocab_size:
        raise CheckpointError(
            f"cannot evaluate {folder}: its tokenizer gives token {largest}, its model knows "
            f"{model.config.vocab_size}; save both of one training"
        )
    if stream.unknown:
        logger.warning("%d of %d characters are unknown to the tokenizer", stream.unknown, stream.characters)
    accelerator = make_accelerator("no")
    model.to(accelerator.device)
    size = {"tokens": len(stream), "bytes": stream.utf8_bytes, "characters": stream.characters}
    size |= {"unknown": stream.unknown}
    if window is None and isinstance(model.config, SpikingConfig):
        return {"path": str(folder), "data": data, **size, **evaluate_through(model, stream)}
    positions = getattr(model.config, "max_position_embeddings", None)
    if window is not None and not 1 <= window <= (positions or window):
        most = f" and at most the model's {positions} positions" if positions else ""
        raise RecipeError(f"window {window} must be at least 1 token{most}")
    window = window or min(WINDOW, positions or WINDOW)
    windows = crop_loader(stream, tokenizer, window, max(_AT_ONCE // window, 1), shuffle=False)
    scores = evaluate(accelerator, model, windows, "evaluate")
    return {"path": str(folder), "data": data, **size, "window": window, **scores}


def _data_of(folder: Path) -> DataPart | None:
    """What the model in this folder was trained on last; None where it is not that of a run."""
    stages = stages_of(folder.parent)
    return stages[-1].data if stages else None


def _own_splits(part: DataPart | None, data: str) -> dict[str, Any]:
    """What cut this data into the splits of a run, if it is the run's: another seed's test split was trained on."""
    sources = [] if part is None else [part.source] if isinstance(part.source, str) else part.source
    if part is None or Path(data).resolve() not in [Path(source).resolve() for source in sources]:
        return {}
    if len(sources) > 1:
        logger.warning("%s is among what the model was trained on: unless it has a test split, scores say little", data)
        return {}
    return part.model_dump(include={"name", "seed", "disjoint", "validation_size", "test_size"})


def _language_model(folder: Path) -> PreTrainedModel:
    """One of this zoo, or converted; a dense one of transformers too, to compare with."""
    content = read_json(folder / "config.json")
    if "quantization_config" in content or content.get("model_type") in registry.model_classes():
        return registry.load(folder)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    except Exception as error:  # transformers and safetensors each raise their own
        raise CheckpointError(f"cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
