"""One command's worth of work: data, teacher, student, training, test scores, summary."""

import json
import logging
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from snlp_zoo import registry
from snlp_zoo.data import TextSet, TextSplits, load_splits, read_set
from snlp_zoo.data.batches import Tokenised, loader, tokenise
from snlp_zoo.distill.distiller import Distiller
from snlp_zoo.distill.objectives import OBJECTIVES
from snlp_zoo.errors import CheckpointError, RecipeError
from snlp_zoo.models.base import SpikingConfig
from snlp_zoo.train.files import replace_file, write_json
from snlp_zoo.train.loop import Trainer, evaluate, make_accelerator
from snlp_zoo.train.metrics import bag_of_words_baseline
from snlp_zoo.train.recipe import Recipe, dump_recipe, load_recipe
from snlp_zoo.train.teacher import label_options, load_tokenizer, prepare_teacher

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class _Data(NamedTuple):
    """The texts of a run and their token ids, split by split."""

    texts: TextSplits
    train: Tokenised
    validation: Tokenised
    test: Tokenised


def distill(
    entry_or_recipe: str,
    *,
    output_dir: str | Path | None = None,
    overrides: list[str] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train a student by a recipe: the whole of `snlp-zoo distill`.

    Args:
        entry_or_recipe: a zoo entry with a recipe, or the path of a recipe file.
        output_dir: the run folder, runs/<name> by default. It gets recipe.yaml, metrics.jsonl, summary.json, model/
            (the best student and its tokenizer) and checkpoints/.
        overrides: "a.b=value" strings.
        resume: continue the run in the folder from its last checkpoint, with the recipe kept there.
    Returns:
        The summary (empty on ranks other than 0): test scores of teacher, student and baseline, firing rate,
        parameters, seconds, path.
    Raises:
        SnlpError: anything wrong with the recipe, the data or the folder; nothing is written before both are read.
    """
    started = time.monotonic()
    recipe = load_recipe(entry_or_recipe, overrides)
    folder = Path(output_dir or Path("runs") / recipe.name)
    if resume:
        recipe = _recipe_to_resume(recipe, folder, overrides)
    accelerator = make_accelerator(recipe.train.mixed_precision)
    tokenizer = load_tokenizer(recipe.teacher)
    with _status(accelerator, "reading the texts"):
        data = _load_data(recipe, tokenizer)
    _check_objectives(recipe, data.texts.label_names)
    config = _student_config(recipe, tokenizer, data.texts.label_names)
    _prepare_folder(accelerator, folder, recipe, resume)
    teacher = prepare_teacher(
        accelerator,
        recipe.teacher,
        tokenizer,
        data.train,
        data.validation,
        data.texts.label_names,
        folder / "teacher",
        resume=resume,
        attentions="attention_mse" in recipe.objectives,
    )
    set_seed(recipe.train.seed)
    student = _make_student(recipe, config, teacher)
    _train(accelerator, recipe, student, teacher, tokenizer, data, folder, resume)
    best = registry.load(folder / "model").to(accelerator.device)
    summary = _summarise(accelerator, recipe, best, teacher, tokenizer, data, folder)
    summary |= {"seconds": round(time.monotonic() - started, 1), "path": str(folder / "model")}
    if not accelerator.is_main_process:
        return {}
    write_json(folder / "summary.json", summary)
    return summary


def _status(accelerator: "Accelerator", doing: str) -> Any:
    """A spinner on standard error, on rank 0 and on a terminal only."""
    return Console(stderr=True).status(doing) if accelerator.is_main_process else nullcontext()


def _recipe_to_resume(recipe: Recipe, folder: Path, overrides: list[str] | None) -> Recipe:
    """The recipe kept in the run folder; a run is never continued with another one."""
    kept = folder / "recipe.yaml"
    if not kept.is_file():
        raise RecipeError(f"nothing to resume in {folder}: it has no recipe.yaml; start without --resume")
    previous = load_recipe(str(kept))
    if previous.name != recipe.name:
        raise RecipeError(f"{folder} holds a run of {previous.name!r}, not of {recipe.name!r}; name its own folder")
    if previous != recipe:
        old, new = (json.dumps(r.model_dump(), indent=0).splitlines() for r in (previous, recipe))
        changed = "; ".join([line.strip(' ,"') for line in new if line not in old][:5])
        if overrides:
            raise RecipeError(
                f"--resume continues with the recipe in {kept}, which differs from the one asked for ({changed}); "
                "leave out --set, or start without --resume"
            )
        logger.warning("continuing with %s, which differs from %s (%s)", kept, recipe.name, changed)
    return previous


def _load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> _Data:
    part = recipe.data
    texts = load_splits(part.source, **part.model_dump(exclude={"source", "max_length"}))
    data = _Data(texts, *(tokenise(tokenizer, s, part.max_length) for s in (texts.train, texts.validation, texts.test)))
    for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if split.truncated:
            logger.warning(
                "%s: %d of %d texts were cut at %d tokens", name, split.truncated, len(split), part.max_length
            )
    return data


def _check_objectives(recipe: Recipe, label_names: list[str] | None) -> None:
    divergences = [name for name in recipe.objectives if name.endswith("_kl")]
    if label_names is None and divergences:
        raise RecipeError(f"{divergences[0]} compares classes, and the labels are numbers; use logit_mse instead")


def _student_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, label_names: list[str] | None) -> SpikingConfig:
    """The student's configuration, checked before anything is written or trained."""
    values = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | recipe.model.config
    config = registry.build_config(recipe.model.model_type, values)
    for name, value in label_options(label_names).items():
        setattr(config, name, value)
    if recipe.data.max_length > config.max_position_embeddings:
        raise RecipeError(
            f"data.max_length {recipe.data.max_length} is more than the model's {config.max_position_embeddings} "
            "positions; lower it or raise model.config.max_position_embeddings"
        )
    if config.vocab_size < len(tokenizer):
        raise RecipeError(f"model.config.vocab_size {config.vocab_size} is less than the tokenizer's {len(tokenizer)}")
    return config


def _make_student(recipe: Recipe, config: SpikingConfig, teacher: PreTrainedModel) -> PreTrainedModel:
    student_class: Any = registry.model_classes()[recipe.model.model_type]["sequence-classification"]
    student = student_class(config)
    if recipe.model.init_from_teacher:
        student.copy_from(teacher)
    return student


def _prepare_folder(accelerator: "Accelerator", folder: Path, recipe: Recipe, resume: bool) -> None:
    """Make the run folder, keep the recipe there; a fresh start clears the last run's traces but for its model."""
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not resume:
                for leftover in ("checkpoints", "teacher"):
                    shutil.rmtree(folder / leftover, ignore_errors=True)
                for leftover in ("metrics.jsonl", "summary.json"):
                    (folder / leftover).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write to the run folder {folder}: {error}; choose --output-dir") from error
        replace_file(folder / "recipe.yaml", dump_recipe(recipe))
    accelerator.wait_for_everyone()


def _train(
    accelerator: "Accelerator",
    recipe: Recipe,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: _Data,
    folder: Path,
    resume: bool,
) -> None:
    needs_teacher = any(OBJECTIVES[name].needs_teacher for name in recipe.objectives)
    options = {name: dict(part.model_extra or {}) for name, part in recipe.objectives.items()}
    distiller = Distiller(student, teacher if needs_teacher else None, options)
    tokenizer.model_max_length = recipe.data.max_length

    def save_model(target: Path) -> None:
        student.save_pretrained(target)
        tokenizer.save_pretrained(target)

    settings, processes = recipe.train, accelerator.num_processes
    loaders = (
        loader(
            data.train, tokenizer, settings.batch_size * processes, seed=settings.seed, shuffle=True, drop_last=True
        ),
        loader(data.validation, tokenizer, settings.eval_batch_size * processes, shuffle=False, drop_last=False),
    )
    weights = {name: part.weight for name, part in recipe.objectives.items()}
    Trainer(accelerator, distiller, loaders, settings, weights, folder, save_model).run(resume, "distil")


def _summarise(
    accelerator: "Accelerator",
    recipe: Recipe,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: _Data,
    folder: Path,
) -> dict[str, Any]:
    """Test scores of everybody, by metric: {"teacher_accuracy": ..., "student_accuracy": ..., ...}."""
    batch_size = recipe.train.eval_batch_size * accelerator.num_processes
    test = loader(data.test, tokenizer, batch_size, shuffle=False, drop_last=False)
    scores = {
        "teacher": evaluate(accelerator, teacher, test, "test the teacher"),
        "student": evaluate(accelerator, student, test, "test the student"),
    }
    firing_rate = scores["student"].pop("firing_rate")
    if recipe.baseline and data.texts.label_names is not None and accelerator.is_main_process:
        train, held_out = data.texts.train, data.texts.test
        labels = [split.labels or [] for split in (train, held_out)]
        with _status(accelerator, "fitting the bag-of-words baseline"):
            scores["baseline"] = bag_of_words_baseline(_joined(train), labels[0], _joined(held_out), labels[1])
    summary: dict[str, Any] = {"name": recipe.name, "test_examples": len(data.test)}
    for who, values in scores.items():
        summary |= {f"{who}_{metric}": value for metric, value in values.items()}
    return summary | {
        "firing_rate": firing_rate,
        "parameters": student.num_parameters(),
        "teacher_parameters": teacher.num_parameters(),
        "time_steps": student.config.time_steps,
    }


def _joined(texts: TextSet) -> list[str]:
    """Texts, pairs as one string: what a bag of words sees."""
    return texts.texts if texts.pairs is None else [f"{a} {b}" for a, b in zip(texts.texts, texts.pairs, strict=True)]


def evaluate_checkpoint(
    path_or_entry: str, data: str, *, text: str = "text", text_pair: str | None = None, label: str = "label"
) -> dict[str, Any]:
    """Scores of a saved student: the whole of `snlp-zoo evaluate`.

    Args:
        data: a labelled file, or anything `data.load_splits` knows, whose test split is used.
        text, text_pair, label: column names.
    Raises:
        SnlpError: the checkpoint or the file cannot be used.
    """
    folder = registry.find_checkpoint(path_or_entry)
    model = registry.load(folder)
    tokenizer = registry.load_tokenizer(folder)
    names = None if len(model.config.label_names) == 1 else model.config.label_names
    columns: dict[str, Any] = {"text": text, "text_pair": text_pair, "label": label, "label_names": names}
    if Path(data).is_file():
        texts = read_set(data, regression=names is None, **columns)
    else:
        texts = load_splits(data, **columns).test
    limit = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    tokens = tokenise(tokenizer, texts, limit)
    if tokens.truncated:
        logger.warning("%d of %d texts were cut at %d tokens", tokens.truncated, len(tokens), limit)
    accelerator = make_accelerator("no")
    batches = loader(tokens, tokenizer, 64, shuffle=False, drop_last=False)
    scores = evaluate(accelerator, model.to(accelerator.device), batches, "evaluate")
    return {"path": str(folder), "data": data, "examples": len(tokens), "truncated": tokens.truncated, **scores}
