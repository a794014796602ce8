"""What a training run works with, read and checked before anything is written or trained."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from snlp_zoo.data import TextSet, TextSplits, load_documents, load_splits, load_transfer, load_unlabelled
from snlp_zoo.data.batches import Tokenised, loader, tokenise
from snlp_zoo.data.files import refuse_missing
from snlp_zoo.data.overlap import HeldOut, counted, without_rows
from snlp_zoo.data.streams import CropBatches, Crops, Stream, crop_loader, make_stream
from snlp_zoo.errors import DataError
from snlp_zoo.train.parts import TrainPart
from snlp_zoo.train.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class Data(NamedTuple):
    """The texts of a run and their token ids, split by split, a stream each for a language model; text without labels
    for an encoder has an empty test split; no text to transfer is an empty split too.
    """

    texts: TextSplits
    train: Tokenised | Stream
    validation: Tokenised | Stream
    test: Tokenised | Stream
    transfer: Tokenised

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes; None for regression and for text without labels."""
        return self.texts.label_names


@dataclass(frozen=True)
class Job:
    """One training run: a recipe without stages, or one stage.

    Args:
        folder: gets recipe.yaml, metrics.jsonl, summary.json, model/, checkpoints/ and, while it is tuned, teacher/.
        resume: continue from the last checkpoint in the folder, if there is one.
        held_out: validation and test texts of all labelled stages; none stands in the training texts, but where
            data.overlap is "report".
        overlap: which of those did, in the training texts and the texts to transfer; see `data.overlap.counted`.
    """

    accelerator: "Accelerator"
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    data: Data
    folder: Path
    resume: bool
    held_out: HeldOut
    overlap: dict[str, dict[str, Any]]

    @property
    def labelled(self) -> bool:
        """Whether its texts have labels, and a classifier learns them."""
        return self.recipe.head == "sequence-classification"

    def loaders(self, settings: TrainPart, batch_size: int) -> tuple[DataLoader, DataLoader]:
        """Global batches for training, `batch_size` over all processes, and for validation."""
        train = self._loader(self.data.train, batch_size, seed=settings.seed, shuffle=True)
        return train, self.evaluation_loader(self.data.validation, settings)

    def evaluation_loader(self, split: Tokenised | Stream, settings: TrainPart) -> DataLoader:
        """Global batches of a split, every example or token once."""
        return self._loader(split, settings.eval_batch_size * self.accelerator.num_processes, shuffle=False)

    def some_texts(self, number: int) -> dict[str, Tensor]:
        """A batch of training texts, or crops of them, the same every time."""
        return next(iter(self._loader(self.data.train, number, seed=self.recipe.data.seed, shuffle=True)))

    def _loader(self, split: Tokenised | Stream, batch_size: int, *, seed: int = 0, shuffle: bool) -> DataLoader:
        if isinstance(split, Stream):
            length = self.recipe.data.max_length
            return crop_loader(split, self.tokenizer, length, batch_size, seed=seed, shuffle=shuffle)
        return loader(split, self.tokenizer, batch_size, seed=seed, shuffle=shuffle, drop_last=shuffle)


def read_texts(recipe: Recipe) -> TextSplits:
    """The texts of a recipe.

    Raises:
        DataError: they cannot be read.
    """
    part = recipe.data
    options = part.model_dump(exclude={"source", "max_length", "augment", "transfer", "overlap", "separator"})
    if recipe.head == "sequence-classification":
        splits = load_splits(str(part.source), **options)  # the recipe refuses lists here
        more = load_transfer(**part.transfer.model_dump(), seed=part.seed) if part.transfer else TextSet([])
        return replace(splits, transfer=more)
    for key in ("label", "label_names", "disjoint"):
        del options[key]
    if recipe.head == "causal-lm":
        del options["text_pair"]
        return load_documents(part.source, **options)
    del options["test_size"]
    return TextSplits(*load_unlabelled(part.source, **options), TextSet([]), None)


class StageTexts(NamedTuple):
    """The texts of a stage, where recipes agree the same texts; the others are as in `Job`."""

    splits: TextSplits
    held_out: HeldOut
    overlap: dict[str, dict[str, Any]]


def read_run_texts(recipes: Sequence[Recipe], stages: list[dict[str, Any]], finished: int) -> list[StageTexts | None]:
    """The texts of a run's stages; where data.overlap is "drop", no training text holds what a labelled stage is scored
    on.

    Args:
        stages: as the run's recipe has them; none where `recipes` is that alone.
        finished: how many of the first stages are finished; they get None.
    Raises:
        DataError: they cannot be read, or every training text of a stage is held out.
    """
    read: dict[str, TextSplits] = {}
    labelled = [recipe.head == "sequence-classification" for recipe in recipes]
    keys = [f"{recipe.head} {recipe.data.model_dump_json(exclude={'augment'})}" for recipe in recipes]
    wanted = [n for n, own in enumerate(labelled) if n >= finished or (own and finished < len(recipes))]
    settings = [_settings(*one) for one in zip(recipes, stages or [{}], strict=True)]
    for number in wanted:  # before anything is fetched
        for setting, sources in settings[number].items():
            for source in sources:
                refuse_missing(source, setting)
    for number in wanted:
        if keys[number] not in read:
            try:
                read[keys[number]] = read_texts(recipes[number])
            except DataError as error:
                if not stages:
                    raise
                changed_by = f"whose texts --set {' or '.join(settings[number])} changes"
                raise DataError(f"stage {stages[number]['name']!r}, {changed_by}: {error}") from error
    tasks = {key for key, own in zip(keys, labelled, strict=True) if own}
    scored = [splits for key, splits in read.items() if key in tasks]
    held_out = HeldOut(split for splits in scored for split in (splits.validation, splits.test))
    recipe_of = dict(zip(keys, recipes, strict=True))
    checked = {key: _without_overlap(splits, held_out, recipe_of[key]) for key, splits in read.items()}
    return [checked[key] if number >= finished else None for number, key in enumerate(keys)]


def _settings(recipe: Recipe, stage: dict[str, Any]) -> dict[str, list[str]]:
    """What `--set` calls the sources of a stage's texts -> those sources; {} is a recipe without stages."""
    own, found = stage.get("data") or {}, dict[str, list[str]]()
    parts = (("data", recipe.data, own), ("data.transfer", recipe.data.transfer, own.get("transfer") or {}))
    for key, part, given in parts:
        if part:
            place = f"stages.{stage['name']}.{key}" if "source" in given else key
            found[f"{place}.source"] = [part.source] if isinstance(part.source, str) else part.source
    return found


def _without_overlap(splits: TextSplits, held_out: HeldOut, recipe: Recipe) -> StageTexts:
    """Texts that hold held-out ones are left out; of a language model's documents those runs of words are."""
    overlap: dict[str, dict[str, Any]] = {}
    if not len(held_out):
        return StageTexts(splits, held_out, overlap)
    kept: dict[str, TextSet] = {}
    for name in ("train", "transfer"):
        texts = kept[name] = getattr(splits, name)
        found = held_out.find(texts)
        if recipe.data.overlap == "drop":
            gone = set(found)
            if recipe.head == "causal-lm":
                gone = {row for row, one in found.items() if one.kind != "contained"}
                cut = [held_out.cut(text) if row in found else text for row, text in enumerate(texts.texts)]
                kept[name] = TextSet(cut)
            kept[name] = without_rows(kept[name], gone)
        if len(texts):
            overlap[name] = counted(texts, found, left_out=len(texts) - len(kept[name]))
    if not len(kept["train"]):
        raise DataError(
            f"all {len(splits.train)} training texts hold validation or test texts; give others, or set "
            "data.overlap=report"
        )
    return StageTexts(replace(splits, train=kept["train"], transfer=kept["transfer"]), held_out, overlap)


def read_tokens(recipe: Recipe, texts: TextSplits, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The texts as token ids; says how many were cut, and how many characters the tokenizer does not know.

    Raises:
        DataError: texts, tokenizer and max_length do not fit each other.
    """
    part, none = recipe.data, Tokenised([], None, None, 0)
    splits = {name: getattr(texts, name) for name in ("train", "validation", "test")}
    if recipe.head == "causal-lm":
        streams = {name: make_stream(split.texts, tokenizer, part.separator) for name, split in splits.items()}
        CropBatches(Crops(streams["train"], part.max_length), 1, shuffle=True)  # refuses a stream that is too short
        for name, stream in streams.items():
            if stream.unknown:
                logger.warning("%s: %d of %d characters are unknown", name, stream.unknown, stream.characters)
        return Data(texts, **streams, transfer=none)
    splits["transfer"] = texts.transfer
    tokens = {name: tokenise(tokenizer, split, part.max_length) for name, split in splits.items() if len(split)}
    for name, split in tokens.items():
        if split.truncated:
            logger.warning(
                "%s: %d of %d texts were cut at %d tokens", name, split.truncated, len(split), part.max_length
            )
    return Data(texts, **{name: tokens.get(name, none) for name in splits})


def status(accelerator: "Accelerator", doing: str) -> Any:
    """A spinner on standard error, on rank 0 and on a terminal only."""
    return Console(stderr=True).status(doing) if accelerator.is_main_process else nullcontext()
