"""What a training run works with, read and checked before anything is written or trained."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from snlp_zoo.data import TextSet, TextSplits, load_splits, load_unlabelled
from snlp_zoo.data.batches import Tokenised, loader, tokenise
from snlp_zoo.train.recipe import DataPart, Recipe, TrainPart

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class Data(NamedTuple):
    """The texts of a run and their token ids, split by split; text without labels has an empty test split."""

    texts: TextSplits
    train: Tokenised
    validation: Tokenised
    test: Tokenised

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
    """

    accelerator: "Accelerator"
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    data: Data
    folder: Path
    resume: bool

    @property
    def labelled(self) -> bool:
        """Whether its text has labels: if not, an encoder without a head learns the teacher's states."""
        return self.recipe.data.label is not None

    def loaders(self, settings: TrainPart, batch_size: int) -> tuple[DataLoader, DataLoader]:
        """Global batches for training, `batch_size` over all processes, and for validation."""
        train = loader(self.data.train, self.tokenizer, batch_size, seed=settings.seed, shuffle=True, drop_last=True)
        return train, self.evaluation_loader(self.data.validation, settings)

    def evaluation_loader(self, split: Tokenised, settings: TrainPart) -> DataLoader:
        """Global batches of a split, every example once."""
        batch_size = settings.eval_batch_size * self.accelerator.num_processes
        return loader(split, self.tokenizer, batch_size, shuffle=False, drop_last=False)


def load_data(part: DataPart, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The texts of a recipe as token ids; says how many were cut.

    Raises:
        DataError: they cannot be read, or do not fit the tokenizer.
    """
    options = part.model_dump(exclude={"source", "max_length", "augment"})
    if part.label is None:
        for key in ("label", "label_names", "test_size"):
            del options[key]
        texts = TextSplits(*load_unlabelled(part.source, **options), TextSet([]), None)
    else:
        texts = load_splits(str(part.source), **options)  # the recipe refuses lists here
    splits = {name: getattr(texts, name) for name in ("train", "validation", "test")}
    tokens = {name: tokenise(tokenizer, split, part.max_length) for name, split in splits.items() if len(split)}
    for name, split in tokens.items():
        if split.truncated:
            logger.warning(
                "%s: %d of %d texts were cut at %d tokens", name, split.truncated, len(split), part.max_length
            )
    return Data(texts, tokens["train"], tokens["validation"], tokens.get("test", Tokenised([], None, None, 0)))


def status(accelerator: "Accelerator", doing: str) -> Any:
    """A spinner on standard error, on rank 0 and on a terminal only."""
    return Console(stderr=True).status(doing) if accelerator.is_main_process else nullcontext()
