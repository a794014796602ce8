"""A dense model, converted, in a folder of its own: the whole of `snlp-zoo convert`."""

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snlp_zoo import registry
from snlp_zoo.convert.calibration import CalibrationReport, calibrate
from snlp_zoo.convert.source import find_source, load_dense, load_tokenizer
from snlp_zoo.convert.spiking import to_spiking
from snlp_zoo.convert.targets import check_targets
from snlp_zoo.convert.writing import refuse_full
from snlp_zoo.data.batches import longest
from snlp_zoo.data.demo import load_tweets
from snlp_zoo.data.unlabelled import read_documents
from snlp_zoo.errors import CheckpointError, ConversionError, DataError
from snlp_zoo.models.converted import linear_layers, parameter_count, spike_layers

WINDOW, WINDOWS = 256, 16  # tokens of a calibration batch, and how many are read
TWEETS = 160  # that calibrate where no text is given: some 4,000 tokens
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Conversion:
    """path: the folder written. layers: how many spike. dense: names of linear layers that do not.

    seconds: of everything; loading_seconds: of them until the dense model was there. report: of a calibration.
    """

    path: str
    model: str
    layers: int
    dense: list[str]
    parameters: int
    convert: dict[str, Any]
    seconds: float
    loading_seconds: float
    report: CalibrationReport | None

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"report": self.report and self.report.to_dict()}


def convert(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    options: dict[str, Any] | None = None,
    salient: float | None = None,
    extra_bits: int = 1,
    dtype: str | None = None,
    text: str | Path | None = None,
    report: bool = False,
) -> Conversion:
    """Convert a saved dense model and write it, with its tokenizer, to a new folder.

    Args:
        src: as in `find_source`.
        dst: must not exist, or be empty; None: runs/<src>/model of a zoo entry.
        options: of `to_spiking`; those of a zoo entry are its own where they are not given.
        salient, extra_bits: as in `to_spiking`.
        dtype: of the weights; None: as saved.
        text: a file to calibrate on, as recipes read them; None: tweets, if they are installed.
        report: calibrate the dense model on the text, with a split the converted one.
    Raises:
        ConversionError: as `to_spiking` and `find_source`.
        RecipeError: an option of the wrong type or out of range.
        CheckpointError: dst is there, the model is damaged, or nothing can be written.
        DataError: no text to calibrate on, or no tokenizer to read it with.
    """
    start = time.perf_counter()
    named = str(src) in registry.list_entries() and not Path(src).exists()
    entry = registry.load_entry(str(src)) if named else None
    options = {**((entry and entry.convert) or {}), **(options or {})}
    conversion = registry.conversion(options)
    folder = _new_folder(Path("runs", str(src), "model") if dst is None and named else dst)
    if dtype not in (None, *DTYPES):
        raise ConversionError(f"convert: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    source = find_source(src)
    model = load_dense(source, dtype and getattr(torch, dtype))
    loading_seconds = time.perf_counter() - start
    check_targets(model, conversion.targets)
    tokenizer, found = load_tokenizer(source), None
    batches = _batches(tokenizer, text, model) if report or salient is not None else []
    if batches:
        found = calibrate(model, batches, conversion)
    model = to_spiking(model, **options, salient=salient, extra_bits=extra_bits, calibration=found)
    if report and salient is not None:
        found = calibrate(model, batches)
    _write(model, tokenizer, folder)
    return Conversion(
        str(folder),
        type(model).__name__,
        len(spike_layers(model)),
        list(linear_layers(model)),
        parameter_count(model),
        options,
        time.perf_counter() - start,
        loading_seconds,
        found if report else None,
    )


def _new_folder(dst: str | Path | None) -> Path:
    if dst is None:
        raise ConversionError("convert: name a new folder for the model; only zoo entries have a place of their own")
    refuse_full(Path(dst))
    return Path(dst)


def _batches(
    tokenizer: PreTrainedTokenizerBase | None, text: str | Path | None, model: PreTrainedModel
) -> list[dict[str, torch.Tensor]]:
    """The first WINDOWS windows of the texts, one after another, each a batch of its own."""
    if tokenizer is None:
        raise DataError("convert: texts are needed to calibrate, and the model has no tokenizer to read them with")
    try:
        texts = [tweet.text for tweet in load_tweets()[:TWEETS]] if text is None else read_documents(text)
    except DataError as error:
        raise error if text is not None else DataError(f"{error}; or give a text of your own: --text FILE") from error
    ids: list[int] = []
    size = min(WINDOW, longest(tokenizer, model.config))
    for content in texts:
        if len(ids) < WINDOWS * size:
            ids += tokenizer(content, verbose=False)["input_ids"]
    chosen = torch.tensor(ids[: WINDOWS * size]).unsqueeze(0).split(size, dim=1)
    both = ("input_ids", "decoder_input_ids") if model.config.is_encoder_decoder else ("input_ids",)
    return [dict.fromkeys(both, window) for window in chosen]


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """All of it or nothing."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            aside = Path(scratch, "model")
            model.save_pretrained(aside)
            if tokenizer is not None:
                tokenizer.save_pretrained(aside)
            aside.rename(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {folder}: {' '.join(str(error).split())[:300]}") from error
