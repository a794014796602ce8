"""One command's worth of work: data, teacher, student, training, test scores, summary."""

import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, set_seed

from snlp_zoo import registry
from snlp_zoo.distill.distiller import Distiller
from snlp_zoo.distill.objectives import OBJECTIVES
from snlp_zoo.errors import CheckpointError, RecipeError
from snlp_zoo.train.checkpoints import started_with
from snlp_zoo.train.files import replace_file, replace_folder, write_json
from snlp_zoo.train.job import Job, StageTexts, read_run_texts, read_tokens, status
from snlp_zoo.train.loop import Progress, Trainer, Weights, make_accelerator
from snlp_zoo.train.metrics import metrics_of
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
from snlp_zoo.train.teacher import augmented, prepare_teacher, with_transfer
from snlp_zoo.train.teacher_checks import (
    check_attention_scores,
    check_layer_map,
    check_positions,
    check_projection,
    check_vocabulary,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


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
        texts = read_run_texts([part for _, part in stages], recipe.stages, finished)
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
        _check_labels(recipe, job.data.label_names)
    config = student_config(_with_start(recipe, before), job.tokenizer, job.data.label_names)
    check_layer_map(recipe, config.num_hidden_layers)
    check_positions(recipe)
    check_projection(recipe, config.hidden_size)
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


def _check_labels(recipe: Recipe, label_names: list[str] | None) -> None:
    for part, key in ((recipe.train, "train"), (recipe.teacher and recipe.teacher.train, "teacher.train")):
        metric, metrics = part and part.metric_for_best_model, metrics_of(label_names)
        if metric and metric not in metrics:
            raise RecipeError(f"{key}.metric_for_best_model: there is no {metric!r} here; use {' or '.join(metrics)}")
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
