"""The teacher of a run: tuned on the task by the one loop, cached, reused; what it makes of the run's texts."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)

from snlp_zoo.convert.source import load_dense
from snlp_zoo.data.augment import augment
from snlp_zoo.data.batches import Tokenised
from snlp_zoo.data.overlap import counted
from snlp_zoo.data.text import TextSet
from snlp_zoo.distill.distiller import Distiller
from snlp_zoo.errors import CheckpointError, RecipeError
from snlp_zoo.hub.client import digest
from snlp_zoo.train.evaluation import predicted_labels
from snlp_zoo.train.files import replace_folder
from snlp_zoo.train.job import Job, status
from snlp_zoo.train.loop import Trainer
from snlp_zoo.train.parts import TeacherPart
from snlp_zoo.train.processes import wait_for_all
from snlp_zoo.train.teacher_source import gguf_source, locate_teacher, teacher_from_pretrained

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where tuned teachers are kept: $SNLP_ZOO_CACHE, else snlp_zoo below the user's cache folder."""
    if explicit := os.environ.get("SNLP_ZOO_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snlp_zoo"


def augmented(job: Job) -> Job:
    """The job with altered copies of its training texts, if the recipe asks for them; the teacher chooses the words.

    It does so untuned: with its masked-language-model head, if its checkpoint has one, or by its word embeddings.
    """
    part, options = job.recipe.teacher, job.recipe.data.augment
    if options is None or part is None or not isinstance(job.data.train, Tokenised):
        return job
    config = teacher_from_pretrained(AutoConfig, part)
    has_head = any(name.endswith("ForMaskedLM") for name in config.architectures or ())
    auto = AutoModelForMaskedLM if has_head else AutoModel
    model = (
        teacher_from_pretrained(auto, part, use_safetensors=True, dtype=torch.float32).to(job.accelerator.device).eval()
    )
    with status(job.accelerator, "altering copies of the texts"):
        train = augment(job.data.train, job.tokenizer, model, **options.model_dump(), seed=job.recipe.data.seed)
    return _without_held_out_copies(job, train)


def _without_held_out_copies(job: Job, train: Tokenised) -> Job:
    """The job with these training texts, but for altered copies that have come to hold a held-out text."""
    if not len(job.held_out):
        return replace(job, data=job.data._replace(train=train))
    count = len(job.data.train)
    texts = _read_back(job, train.input_ids[count:])
    found = job.held_out.find(texts)
    gone = found if job.recipe.data.overlap == "drop" else {}
    train = train.take([row for row in range(len(train)) if row - count not in gone]) if gone else train
    overlap = job.overlap | {"copies": counted(texts, found, left_out=len(gone))}
    return replace(job, data=job.data._replace(train=train), overlap=overlap)


def _read_back(job: Job, rows: list[list[int]]) -> TextSet:
    """The texts, or pairs of texts, of these token ids."""
    decode, separator = partial(job.tokenizer.batch_decode, skip_special_tokens=True), job.tokenizer.sep_token_id
    if job.data.texts.train.pairs is None or separator is None:
        return TextSet(decode(rows))
    ends = [row.index(separator) for row in rows]
    first = [row[:end] for row, end in zip(rows, ends, strict=True)]
    return TextSet(decode(first), decode([row[end:] for row, end in zip(rows, ends, strict=True)]))


def with_transfer(job: Job, teacher: PreTrainedModel | None) -> Job:
    """The job with the texts of data.transfer after its training texts, labelled by the teacher as it is now."""
    train, more = job.data.train, job.data.transfer
    if teacher is None or not len(more) or not isinstance(train, Tokenised):
        return job
    batches = job.evaluation_loader(more, job.recipe.train)
    labels: Any = predicted_labels(job.accelerator, teacher, batches, "label the texts to transfer")
    types = None if train.token_type_ids is None else train.token_type_ids + (more.token_type_ids or [])
    known: Any = train.labels
    joined = Tokenised(train.input_ids + more.input_ids, types, known + labels, train.truncated + more.truncated)
    return replace(job, data=job.data._replace(train=joined))


def prepare_teacher(job: Job, part: TeacherPart) -> PreTrainedModel:
    """The teacher on the accelerator's device, in evaluation mode, with a classifier if the texts have labels.

    It is tuned once per task and settings: later runs take it from `cache_folder()`, and runs that start meanwhile wait
    for it. Its batch size counts over all processes, so that the number of processes does not change it. For text
    without labels it is taken as it is, as a language model where the student is one.
    """
    accelerator, label_names = job.accelerator, job.data.label_names
    eager = {"attn_implementation": "eager"} if "attention_mse" in job.recipe.objectives else {}
    if not job.labelled:
        if source := gguf_source(part.name):
            teacher = load_dense(source, torch.float32)
            if eager:
                teacher.set_attn_implementation("eager")
        else:
            auto = AutoModelForCausalLM if job.recipe.head == "causal-lm" else AutoModel
            teacher = teacher_from_pretrained(auto, part, use_safetensors=True, dtype=torch.float32, **eager)
        return teacher.to(accelerator.device).eval()
    if part.tune == "none":
        return _untuned(part, label_names, **eager).to(accelerator.device).eval()
    cached = cache_folder() / "teachers" / _key(job, part)
    with tuned_by_one(cached, accelerator.is_main_process):
        wait_for_all(accelerator.num_processes)  # all find the same
        if not (cached / "config.json").is_file():
            tuned = _tune(job, part)
            if accelerator.is_main_process:
                replace_folder(cached, tuned.save_pretrained)
            accelerator.wait_for_everyone()
    teacher = AutoModelForSequenceClassification.from_pretrained(cached, use_safetensors=True, **eager)
    return teacher.to(accelerator.device).eval()


def _untuned(part: TeacherPart, label_names: list[str] | None, **options: Any) -> PreTrainedModel:
    """A teacher that already has a classifier for this task.

    Raises:
        RecipeError: it has none, or one of other classes, or of the same in another order.
    """
    classes, tune = len(label_names) if label_names else 1, "let teacher.tune be 'full' or 'head'"
    if gguf_source(part.name):
        raise RecipeError(f"teacher {part.name!r} is a language model in a GGUF file, not a classifier; name another")
    options |= {"dtype": torch.float32, "output_loading_info": True}
    teacher, found = teacher_from_pretrained(AutoModelForSequenceClassification, part, use_safetensors=True, **options)
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise RecipeError(f"teacher {part.name!r} has no classifier (there is no {missing}); {tune}")
    if teacher.config.num_labels != classes:
        raise RecipeError(f"teacher {part.name!r} has {teacher.config.num_labels} classes, the data {classes}; {tune}")
    theirs = [str(teacher.config.id2label[number]) for number in range(classes)]
    own = [name.lower() for name in label_names or theirs]
    if (lower := [name.lower() for name in theirs]) != own and sorted(lower) == sorted(own):
        raise RecipeError(
            f"teacher {part.name!r} has the classes {theirs}, the data {label_names}; give data.label_names the "
            f"teacher's order, or {tune}"
        )
    return teacher


@contextmanager
def tuned_by_one(cached: Path, is_main_process: bool = True) -> Iterator[None]:
    """Inside, no other run tunes the teacher that `cached` will hold; one that is there already is free to all.

    The lock is the operating system's: it goes with the process that holds it, however that ends.

    Raises:
        CheckpointError: the folder for locks cannot be written.
    """
    if not is_main_process or (cached / "config.json").is_file():
        yield
        return
    locks = cached.parent.with_name("locks")
    lock = FileLock(locks / cached.name)
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("another run tunes the same teacher; waiting for it")
        lock.acquire()
    except OSError as error:
        raise CheckpointError(f"cannot write to {locks}: {error}; set SNLP_ZOO_CACHE to another folder") from error
    try:
        yield
    finally:
        lock.release()


def _tune(job: Job, part: TeacherPart) -> PreTrainedModel:
    folder = job.folder / "teacher"
    set_seed(part.train.seed)  # of the new classifier
    teacher = teacher_from_pretrained(
        AutoModelForSequenceClassification,
        part,
        use_safetensors=True,
        dtype=torch.float32,
        **dict.fromkeys(_dropouts(teacher_from_pretrained(AutoConfig, part)), part.dropout),
        **label_options(job.data.label_names),
    )
    if part.tune == "head":
        for name, parameter in teacher.base_model.named_parameters():
            parameter.requires_grad_(name.startswith("pooler"))
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        job.accelerator,
        Distiller(teacher, None, {"cross_entropy": {}}),
        job.loaders(part.train, part.train.batch_size),
        part.train,
        {"cross_entropy": 1.0},
        folder,
        lambda target, weights, _: teacher.save_pretrained(target, state_dict=weights),
    )
    trainer.run(job.resume, "tune the teacher")
    return AutoModelForSequenceClassification.from_pretrained(folder / "model", use_safetensors=True)


def _dropouts(config: PreTrainedConfig) -> list[str]:
    """What this model calls dropout; a rate of None is another one's."""
    numbers = [name for name, value in config.to_dict().items() if type(value) in (int, float)]
    return [name for name in numbers if "dropout" in name or name.endswith("pdrop")]


def label_options(label_names: list[str] | None) -> dict[str, Any]:
    """Configuration fields for these classes, or for regression."""
    if label_names is None:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: i for i, name in enumerate(label_names)},
        "problem_type": "single_label_classification",
    }


def _key(job: Job, part: TeacherPart) -> str:
    """Everything the tuned weights depend on, but for what a Hub id stands for without a revision."""
    data, files = job.data, sorted(Path(locate_teacher(part.name)).glob("*.safetensors"))
    parts = [
        part.model_dump(exclude={"train": {"mixed_precision"}}),
        job.accelerator.mixed_precision,
        data.label_names,
        [(split.input_ids, split.labels) for split in (data.train, data.validation) if isinstance(split, Tokenised)],
        [digest(file, like="0" * 64) for file in files],
        [torch.__version__, transformers.__version__],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
