"""What a run reports: scores of its models on the test split, or on validation where there is no other; held-out texts
that stood in its training texts.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from snlp_zoo.data import TextSet
from snlp_zoo.data.overlap import KINDS
from snlp_zoo.data.streams import Stream
from snlp_zoo.models.converted import is_converted
from snlp_zoo.train.evaluation import evaluate
from snlp_zoo.train.files import write_json
from snlp_zoo.train.job import Job, status
from snlp_zoo.train.loop import Progress
from snlp_zoo.train.metrics import bag_of_words_baseline

logger = logging.getLogger(__name__)
_OF_SPIKES = ("firing_rate", "zero_share", "spikes_per_value")


def test_scores(job: Job, student: PreTrainedModel, teacher: PreTrainedModel | None) -> dict[str, Any]:
    """Test scores of everybody, by metric: {"teacher_accuracy": ..., "student_accuracy": ..., ...}."""
    accelerator, data = job.accelerator, job.data
    test = job.evaluation_loader(data.test, job.recipe.train)
    people = {"teacher": teacher, "student": student}
    scores = {who: evaluate(accelerator, model, test, f"test the {who}") for who, model in people.items() if model}
    fired = {name: scores["student"].pop(name) for name in _OF_SPIKES if name in scores["student"]}
    if job.recipe.baseline and data.label_names is not None and accelerator.is_main_process:
        train, held_out = data.texts.train, data.texts.test
        labels = [split.labels or [] for split in (train, held_out)]
        try:
            with status(accelerator, "fitting the bag-of-words baseline"):
                scores["baseline"] = bag_of_words_baseline(_joined(train), labels[0], _joined(held_out), labels[1])
        except ValueError as error:  # no word stands in two texts, or all have one class
            logger.warning("there is no bag-of-words baseline: %s", error)
    named = {f"{who}_{metric}": value for who, values in scores.items() for metric, value in values.items()}
    what = "tokens" if isinstance(data.test, Stream) else "examples"
    return {f"test_{what}": len(data.test), **named, **fired}


def validation_row(job: Job, progress: Progress) -> dict[str, Any]:
    """What was logged of the best student."""
    rows = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return next((row for row in rows if row["step"] == progress.best_step and "split" in row), {})


def validation_scores(job: Job, row: dict[str, Any]) -> dict[str, Any]:
    """What the best student reached on validation: without its projection, which is no part of it, it has no loss."""
    fired = {name: row[name] for name in _OF_SPIKES if name in row}
    beside = {"step", "split", "max_count", "threshold_scale", *fired}
    named = {f"student_{key}": value for key, value in row.items() if key not in beside}
    return {"validation_examples": len(job.data.validation), **named, **fired}


def _joined(texts: TextSet) -> list[str]:
    """Texts, pairs as one string: what a bag of words sees."""
    return texts.texts if texts.pairs is None else [f"{a} {b}" for a, b in zip(texts.texts, texts.pairs, strict=True)]


def spiking(model: PreTrainedModel) -> dict[str, Any]:
    """In how many steps a student spikes; of a converted one what its spikes are."""
    if not is_converted(model):
        return {"time_steps": model.config.time_steps}
    return {name: getattr(model.config.quantization_config, name) for name in ("code", "max_count", "threshold_scale")}


def report_overlap(job: Job) -> int:
    """Write overlap.json, if anything was held out; how many training texts held validation or test texts."""
    if not job.overlap:
        return 0
    rows, found = (sum(_total(part, keys) for part in job.overlap.values()) for keys in (("rows",), KINDS))
    content = {"held_out": len(job.held_out), "found": found, "stages": {job.recipe.name: job.overlap}}
    if job.accelerator.is_main_process:
        write_json(job.folder / "overlap.json", content)
    if found:
        told = "%d of %d training texts hold validation or test texts (overlap.json); data.overlap is %r"
        logger.warning(told, found, rows, job.recipe.data.overlap)
    return found


def join_overlap(folder: Path, stages: Sequence[Path]) -> dict[str, int]:
    """Write the run's overlap.json from those of its stages, if they have any; what its summary says of them."""
    files = [path / "overlap.json" for path in stages]
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    if not parts:
        return {}
    found = sum(part["found"] for part in parts)
    by_stage = {name: rows for part in parts for name, rows in part["stages"].items()}
    write_json(folder / "overlap.json", {"held_out": parts[-1]["held_out"], "found": found, "stages": by_stage})
    return {"overlap": found}


def _total(part: dict[str, Any], keys: Sequence[str]) -> int:
    return sum(part[key] for key in keys)
