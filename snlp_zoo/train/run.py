"""One command's worth of work: data, teacher, student, training, test scores, summary."""

import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from snlp_zoo import hub, registry
from snlp_zoo.data import load_documents, load_splits, read_documents, read_set
from snlp_zoo.data.batches import loader, longest, tokenise
from snlp_zoo.data.streams import crop_loader, make_stream
from snlp_zoo.distill.distiller import Distiller
from snlp_zoo.distill.objectives import OBJECTIVES
from snlp_zoo.errors import CheckpointError, RecipeError
from snlp_zoo.models.checkpoint import architecture, read_json
from snlp_zoo.models.configuration import SpikingConfig
from snlp_zoo.train.checkpoints import started_with
from snlp_zoo.train.evaluation import evaluate, evaluate_through
from snlp_zoo.train.files import replace_file, replace_folder, write_json
from snlp_zoo.train.job import Job, StageTexts, read_run_texts, read_tokens, status
from snlp_zoo.train.loop import Progress, Trainer, Weights, make_accelerator
from snlp_zoo.train.parts import DataPart
from snlp_zoo.train.processes import loss_of_others_explained
from snlp_zoo.train.recipe import Recipe, dump_recipe, load_recipe, stage_recipes
from snlp_zoo.train.student import (
    find_start,
    find_tokenizer,
    load_projection,
    make_student,
    save_projection,
    student_config,
)
from snlp_zoo.train.summary import join_overlap, report_overlap, spiking, test_scores, validation_row, validation_scores
from snlp_zoo.train.teacher import (
    augmented,
    check_attention_scores,
    check_layer_map,
    check_vocabulary,
    prepare_teacher,
    with_transfer,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
WINDOW = 1024  # tokens in which text is read where no state can be carried on
_AT_ONCE = 4096  # tokens, of several windows


def distill(
    entry_or_recipe: str,
    *,
    output_dir: str | Path | None = None,
    overrides: list[str] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train a student by a recipe: the whole of `snlp-zoo train` and `snlp-zoo distill`.

    Args:
        entry_or_recipe: a zoo entry with a recipe, or the path of a recipe file.
        output_dir: the run folder, runs/<name> by default. It gets recipe.yaml, metrics.jsonl, summary.json, model/
            (the best student, its tokenizer and projection) and checkpoints/; each stage of a recipe with stages gets
            such a folder inside, <number>_<name>, and the last one's model and scores are the run's own.
        overrides: "a.b=value" strings.
        resume: continue the run in the folder from its last checkpoint, with the recipe kept there; finished stages
            are not done again.
    Returns:
        The summary (empty on ranks other than 0): test scores of teacher (if there is one), student and baseline,
        firing rate (if the student spikes), parameters, seconds (teacher_seconds of them until the teacher was there,
        tuned, waited for or read), path; of a language model, `metrics.score_language`
        with every crop read from rest; for text without labels the student's validation scores, negative_loss first;
        for stages the last one's, and all of them as "stages".
    Raises:
        SnlpError: anything wrong with the recipe, the data or the folder; nothing is written before both are read.
        Interrupted: SIGTERM or SIGUSR1 came while a model was trained; `resume` goes on.
        ProcessError: another process of the run is gone.
    """
    with loss_of_others_explained():
        return _distill(entry_or_recipe, output_dir, overrides, resume)


def _distill(
    entry_or_recipe: str, output_dir: str | Path | None, overrides: list[str] | None, resume: bool
) -> dict[str, Any]:
    started = time.monotonic()
    recipe = load_recipe(entry_or_recipe, overrides)
    folder = Path(output_dir or Path("runs") / recipe.name)
    if resume:
        recipe = _recipe_to_resume(recipe, folder, overrides)
    accelerator = make_accelerator(recipe.train.mixed_precision)
    jobs = _read_jobs(accelerator, recipe, folder, resume)
    for job in jobs.values():
        if job:
            _prepare_folder(accelerator, job.folder, job.recipe, job.resume)
    if recipe.stages:  # last: until its recipe is there, the folder holds the run before, without finished stages
        _prepare_folder(accelerator, folder, recipe, resume)
        summary = _train_stages(accelerator, recipe, folder, jobs)
    else:
        (summary,) = (_train_job(job, started) for job in jobs.values() if job)
    if not accelerator.is_main_process:
        return {}
    write_json(folder / "summary.json", summary)
    return summary


def _read_jobs(accelerator: "Accelerator", recipe: Recipe, folder: Path, resume: bool) -> dict[Path, Job | None]:
    """Folder -> what its run or stage works with, None for a finished stage; all that can be wrong is found here."""
    stages, jobs = stage_recipes(recipe, folder), dict[Path, Job | None]()
    done = [resume and bool(recipe.stages) and (path / "summary.json").is_file() for path, _ in stages]
    finished = (*done, False).index(False)  # what lies in later stages' folders is from an earlier start
    with status(accelerator, "reading the texts"):
        texts = read_run_texts([part for _, part in stages], finished)
    for number, ((path, part), read) in enumerate(zip(stages, texts, strict=True)):
        jobs[path] = _read_job(accelerator, part, path, resume and number == finished, read, jobs) if read else None
    accelerator.wait_for_everyone()  # no rank writes before all have looked
    return jobs


def _read_job(
    accelerator: "Accelerator",
    recipe: Recipe,
    folder: Path,
    resume: bool,
    texts: StageTexts,
    before: dict[Path, Job | None],
) -> Job:
    def read_by(other: Recipe) -> tuple[Any, ...]:
        if other.teacher:
            return other.teacher.name, other.teacher.revision
        return other.tokenizer, other.model.init_from

    start, sharing = recipe.model.init_from, [job for job in before.values() if job and job.data.texts is texts.splits]
    same = next((job for job in sharing if read_by(job.recipe) == read_by(recipe)), None)
    if same:  # stages often share their texts
        job = replace(same, recipe=recipe, folder=folder, resume=resume)
    else:
        with status(accelerator, "reading the texts"):
            earlier = before.get(Path(start))
            tokenizer = find_tokenizer(recipe, texts.splits, earlier.tokenizer if earlier else None)
            data = read_tokens(recipe, texts.splits, tokenizer)
        job = Job(accelerator, recipe, tokenizer, data, folder, resume, texts.held_out, texts.overlap)
    if job.labelled:
        _check_objectives(recipe, job.data.label_names)
    config = student_config(_with_start(recipe, before), job.tokenizer, job.data.label_names)
    check_layer_map(recipe, config.num_hidden_layers)
    if recipe.head == "causal-lm":
        check_vocabulary(recipe, config.vocab_size)
    if recipe.teacher and "attention_score_mse" in recipe.objectives:
        check_attention_scores(recipe.teacher)
    if start not in ("teacher", "scratch") and Path(start) not in before:
        find_start(start)
    return job


def _with_start(recipe: Recipe, before: dict[Path, Job | None]) -> Recipe:
    """The recipe as if a converted student started where the stages before it do: they are not trained yet."""
    start = recipe.model.init_from
    while recipe.model.converted and (earlier := before.get(Path(start))):
        start = earlier.recipe.model.init_from
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"init_from": start})})


def _train_stages(
    accelerator: "Accelerator", recipe: Recipe, folder: Path, jobs: dict[Path, Job | None]
) -> dict[str, Any]:
    """Train what is not finished; the last stage's model and scores become the run's own."""
    for path, job in jobs.items():
        if job:
            accelerator = make_accelerator(job.recipe.train.mixed_precision)
            summary = _train_job(replace(job, accelerator=accelerator), time.monotonic())
            if accelerator.is_main_process:
                write_json(path / "summary.json", summary)
            accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return {}
    last, model = list(jobs)[-1], folder / "model"
    summaries = [json.loads((path / "summary.json").read_text(encoding="utf-8")) for path in jobs]
    if any(jobs.values()) or not (model.is_dir() and (folder / "summary.json").is_file()):
        replace_folder(model, lambda target: shutil.copytree(last / "model", target, dirs_exist_ok=True))
    seconds = {
        key: round(sum(summary.get(key, 0) for summary in summaries), 1)
        for key in ("seconds", "teacher_seconds")
        if any(key in summary for summary in summaries)
    }
    own = {"name": recipe.name, **seconds, "path": str(model), "stages": summaries}
    return summaries[-1] | own | join_overlap(folder, list(jobs))


def _train_job(job: Job, started: float) -> dict[str, Any]:
    """Teacher, student, training, scores: the summary of one run or stage."""
    recipe, accelerator = job.recipe, job.accelerator
    config = student_config(recipe, job.tokenizer, job.data.label_names)
    asked = time.monotonic()
    teacher = prepare_teacher(job, recipe.teacher) if recipe.teacher else None
    waited = {"teacher_seconds": round(time.monotonic() - asked, 1)} if teacher else {}
    set_seed(recipe.train.seed)
    some = job.some_texts(recipe.model.equalise) if recipe.model.equalise else None
    student = make_student(recipe, config, teacher, some)
    job = augmented(job)
    found = report_overlap(job)
    progress = _train(with_transfer(job, teacher), student, teacher)
    best = registry.load(job.folder / "model").to(accelerator.device)
    validation = validation_row(job, progress)
    domain = validation.pop("effective_domain", None)
    scores = validation_scores(job, validation) if recipe.head == "encoder" else test_scores(job, best, teacher)
    return {
        "name": recipe.name,
        **scores,
        "parameters": best.num_parameters(),
        **({"teacher_parameters": teacher.num_parameters()} if teacher else {}),
        **spiking(best),
        **({"effective_domain": domain} if domain else {}),
        **({"overlap": found} if job.overlap else {}),
        "seconds": round(time.monotonic() - started, 1),
        **waited,
        "path": str(job.folder / "model"),
    }


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


def _check_objectives(recipe: Recipe, label_names: list[str] | None) -> None:
    divergences = [n for n in recipe.objectives if OBJECTIVES[n].unit == "logit" and n != "logit_mse"]
    if label_names is None and divergences:
        raise RecipeError(f"{divergences[0]} compares classes, and the labels are numbers; use logit_mse instead")


def _prepare_folder(accelerator: "Accelerator", folder: Path, recipe: Recipe, resume: bool) -> None:
    """Make the run folder, keep the recipe there; a fresh start clears the last run's traces but for its model."""
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not resume:
                for leftover in ("checkpoints", "teacher"):
                    shutil.rmtree(folder / leftover, ignore_errors=True)
                for leftover in ("metrics.jsonl", "summary.json", "overlap.json", "energy.json", "energy.md"):
                    (folder / leftover).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write to the run folder {folder}: {error}; choose --output-dir") from error
        replace_file(folder / "recipe.yaml", dump_recipe(recipe))
    accelerator.wait_for_everyone()


def _train(job: Job, student: PreTrainedModel, teacher: PreTrainedModel | None) -> Progress:
    recipe, settings = job.recipe, job.recipe.train
    needs_teacher = any(OBJECTIVES[name].needs_teacher for name in recipe.objectives)
    options = {name: dict(part.model_extra or {}) for name, part in recipe.objectives.items()}
    frozen = teacher if needs_teacher else None
    distiller = Distiller(student, frozen, options, recipe.projection, recipe.layer_map)
    if recipe.head != "causal-lm":  # which reads any length, whatever its crops were
        job.tokenizer.model_max_length = recipe.data.max_length
    load_projection(distiller.projection, recipe.model.init_from)

    def save_model(target: Path, weights: Weights, projection: Weights) -> None:
        student.save_pretrained(target, state_dict=weights)
        job.tokenizer.save_pretrained(target)
        save_projection(projection, target)

    batch_size = settings.batch_size * job.accelerator.num_processes
    if job.resume:
        batch_size = started_with(job.folder / "checkpoints", batch_size)
    loaders = job.loaders(settings, batch_size)
    weights = {name: part.weight for name, part in recipe.objectives.items()}
    trainer = Trainer(job.accelerator, distiller, loaders, settings, weights, job.folder, save_model)
    return trainer.run(job.resume, "distil" if teacher else "train")


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
    """Scores of a saved student, a classifier or a language model: the whole of `snlp-zoo evaluate`.

    A language model of this zoo carries its state through all of the text, so that every token is predicted from all
    before it; validation while training starts every crop afresh, and so is a little worse. Where the state grows with
    the text, in a converted model or a dense one of transformers, text is read in windows, each from its beginning.

    Args:
        data: a file, with labels for a classifier, or anything `data.load_splits` or, for a language model,
            `data.load_documents` knows, whose test split is used, of the run's own data that of the run.
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
    model = registry.load_classifier(folder)
    tokenizer = registry.load_tokenizer(folder)
    labels: dict[Any, str] = model.config.id2label or {}
    names = None if len(labels) == 1 else [labels[number] for number in sorted(labels)]
    columns: dict[str, Any] = {"text": text, "text_pair": text_pair, "label": label, "label_names": names}
    if Path(data).is_file():
        texts = read_set(data, regression=names is None, **columns)
    else:
        texts = load_splits(data, **columns, **_own_splits(_data_of(folder), data)).test
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
    if Path(data).is_file():
        texts = read_documents(data, text)
    else:
        own = _own_splits(part, data)
        texts = load_documents(data, text=text, **{key: own[key] for key in ("name", "seed") if own}).test.texts
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
    positions = getattr(model.config, "max_position_embeddings", window or WINDOW)
    if window is not None and not 1 <= window <= positions:
        raise RecipeError(f"window {window} must be at least 1 token and at most the model's {positions} positions")
    window = window or min(WINDOW, positions)
    windows = crop_loader(stream, tokenizer, window, max(_AT_ONCE // window, 1), shuffle=False)
    scores = evaluate(accelerator, model, windows, "evaluate")
    return {"path": str(folder), "data": data, **size, "window": window, **scores}


def _data_of(folder: Path) -> DataPart | None:
    """What the model in this folder was trained on last; None where it is not that of a run."""
    kept = folder.parent / "recipe.yaml"
    return stage_recipes(load_recipe(str(kept)), folder.parent)[-1][1].data if kept.is_file() else None


def _own_splits(part: DataPart | None, data: str) -> dict[str, Any]:
    """What cut this data into the splits of a run, if it is the run's: another seed's test split was trained on."""
    if part is None or part.source != data:
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
