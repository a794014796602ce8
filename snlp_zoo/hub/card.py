"""The card of a published model and its results in the Hub's two formats, made of what the run folder says."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from transformers import PreTrainedModel

from snlp_zoo import pretrained, registry
from snlp_zoo.checked import dump_yaml, read_yaml
from snlp_zoo.data.files import suffix
from snlp_zoo.errors import CheckpointError
from snlp_zoo.hub.client import RESULTS, digest
from snlp_zoo.models.checkpoint import read_json
from snlp_zoo.models.converted import is_converted, linear_layers, parameter_count, spike_layers


@dataclass(frozen=True)
class Run:
    """What a run folder says of its model; a model folder of its own says nothing but its configuration.

    Args:
        folder: the model's, with config.json.
        summary, recipe: the run's summary.json and recipe.yaml; empty where there is none.
        energy: the run's energy.md, a section as `snlp-zoo energy PATH --output-dir RUN` writes it, or nothing.
        notes: of a shipped model a section on its use, data and their licences.
    """

    folder: Path
    summary: dict[str, Any]
    recipe: dict[str, Any]
    energy: str
    notes: str = ""

    @property
    def dataset(self) -> tuple[str, str | None]:
        """Name of the data set, and its id on the Hub if it is there: the name alone of local files."""
        source = self.recipe.get("data", {}).get("source", "")
        return _name(source[0] if isinstance(source, list) else source)

    @property
    def teacher(self) -> tuple[str, str | None]:
        """Name of the teacher, and its id on the Hub."""
        return _name((self.recipe.get("teacher") or {}).get("name", ""))

    @property
    def split(self) -> str:
        """Where the scores come from."""
        return "test" if {"test_examples", "test_tokens"} & self.summary.keys() else "validation"

    @property
    def scores(self) -> dict[str, float]:
        """The student's finite scores by metric."""
        found = {key.removeprefix("student_"): v for key, v in self.summary.items() if key.startswith("student_")}
        return {key: float(v) for key, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}


def read_run(folder: Path) -> Run:
    """The run a model folder lies in.

    Raises:
        CheckpointError: summary.json is damaged.
        RecipeError: recipe.yaml is.
    """
    run = folder.parent
    if run.resolve() == pretrained.FOLDER.resolve():
        return shipped_run(folder, pretrained.metrics(folder.name))
    if folder.name != "model" or not (run / "recipe.yaml").is_file():
        return Run(folder, {}, {}, "")
    recipe = read_yaml(run / "recipe.yaml")
    if stages := recipe.get("stages"):  # the scores are the last one's, and so are data and teacher
        last = run / f"{len(stages)}_{stages[-1]['name']}" / "recipe.yaml"
        recipe = read_yaml(last) | {"name": recipe["name"]}
    summary = run / "summary.json"
    return Run(folder, read_json(summary) if summary.is_file() else {}, recipe, _text(run / "energy.md"))


def shipped_run(folder: Path, kept: dict[str, Any]) -> Run:
    """The run behind a folder of `pretrained`, of which its metrics.json, `kept`, is the record."""
    scores = {f"{who}_{metric}": v for who in ("student", "teacher") for metric, v in kept[who].items()}
    summary = {f"{kept['split']}_examples": kept["examples"], **scores}
    if "firing_rate" in kept:
        summary["firing_rate"] = kept["firing_rate"]
    recipe = {"name": kept["name"], "data": {"source": kept["dataset"]}, "teacher": {"name": kept["teacher_name"]}}
    return Run(folder, summary, recipe, _text(folder / "energy.md"), "\n\n".join(kept["notes"]))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def make_card(run: Run, model: PreTrainedModel, repo_id: str, licence: str) -> str:
    """README.md with the Hub's metadata (model-index included), checked by reading it back.

    Args:
        repo_id: "user/name", or the zoo entry whose weights are shipped.

    Raises:
        CheckpointError: it does not read back.
    """
    metadata = _metadata(run, model, repo_id, licence)
    sections = [_head(run, model, repo_id), _load(model, repo_id), _table_of_facts(run, model), run.notes, run.energy]
    card = (
        f"---\n{metadata.to_yaml()}\n---\n\n"
        + "\n\n".join(part for part in [*sections, _checksums(run)] if part)
        + "\n"
    )
    read = ModelCard(card).data
    if read.to_dict() != metadata.to_dict():
        raise CheckpointError(f"the card of {repo_id} does not read back; its metadata is {metadata.to_dict()}")
    return card


def make_results(run: Run) -> dict[str, str]:
    """The scores in the Hub's .eval_results form, path -> YAML; none without scores."""
    if not run.scores:
        return {}
    name, hub_id = run.dataset
    where = f"{run.split} split" + ("" if hub_id else ", not a data set of the Hub")
    entries = [
        EvalResultEntry(dataset_id=hub_id or name, task_id=metric, value=value, notes=where)
        for metric, value in run.scores.items()
    ]
    slug = re.sub(r"[^\w.-]+", "_", name)
    return {f"{RESULTS}{slug}.yaml": dump_yaml(eval_result_entries_to_yaml(entries))}


def _metadata(run: Run, model: PreTrainedModel, repo_id: str, licence: str) -> ModelCardData:
    _, _, tag = registry.TASKS[registry.task_of(model)]
    name, hub_id = run.dataset
    results = [
        EvalResult(
            task_type=tag,
            dataset_type=hub_id or name,
            dataset_name=name,
            dataset_split=run.split,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in run.scores.items()
    ]
    return ModelCardData(
        license=licence,
        library_name="snlp_zoo",
        pipeline_tag=tag,
        tags=["snlp_zoo", "spiking-neural-network", model.config.model_type],
        base_model=run.teacher[1],
        datasets=[hub_id] if hub_id else None,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _head(run: Run, model: PreTrainedModel, repo_id: str) -> str:
    name = run.recipe.get("name", run.folder.parent.name)
    entry = registry.load_entry(name) if name in registry.list_entries() else None
    sentences = [entry.description] if entry and entry.description else []
    converted = is_converted(model)
    of = "of transformers, converted by snlp_zoo" if converted else "of snlp_zoo"
    sentences.append(f"A spiking language model ({model.config.model_type}) {of}.")
    if teacher := run.teacher[0]:
        sentences.append(f"Distilled from {teacher} on {run.dataset[0]}.")
    elif run.recipe:
        sentences.append(f"{'Scored' if run.notes else 'Trained'} on {run.dataset[0]}.")  # notes say what on
    if entry and "paper" in entry.source:
        sentences.append(f"{'Conversion' if converted else 'Architecture'}: {entry.source['paper']}.")
    if entry and "model" in entry.source:
        sentences.append(f"Dense model: {entry.source['model']}.")
    return f"# {repo_id.rpartition('/')[2]}\n\n" + " ".join(sentences)


def _load(model: PreTrainedModel, repo_id: str) -> str:
    auto = registry.TASKS[registry.task_of(model)][1].__name__
    if "/" not in repo_id:
        return f"""## How to load

```python
import snlp_zoo  # the weights are part of the package
from transformers import {auto}, AutoTokenizer

folder = snlp_zoo.find_checkpoint("{repo_id}")
model = {auto}.from_pretrained(folder)  # or snlp_zoo.load("{repo_id}")
tokenizer = AutoTokenizer.from_pretrained(folder)
```

`snlp-zoo {"generate" if registry.task_of(model) == "causal-lm" else "predict"} {repo_id} "a text"` tries it."""
    return f"""## How to load

```python
import snlp_zoo  # registers the model; no remote code
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{repo_id}")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
```

`snlp_zoo.load("{repo_id}", verify=True)` also compares every file with the Hub's checksums."""


def _table_of_facts(run: Run, model: PreTrainedModel) -> str:
    facts = {"parameters": f"{parameter_count(model):,}"} | _spiking_facts(model)
    if "firing_rate" in run.summary:
        facts["firing rate"] = f"{100 * run.summary['firing_rate']:.1f} %"
    for metric, value in run.scores.items():
        others = {"teacher": f"teacher_{metric}", "bag of words": f"baseline_{metric}"}
        compared = [f"{who} {run.summary[key]:.4f}" for who, key in others.items() if key in run.summary]
        compared.insert(0, f"student {value:.4f}")
        facts[f"{metric.replace('_', ' ')}, {run.split}"] = ", ".join(compared)
    return _table("## The model", "what", "value", facts)


def _spiking_facts(model: PreTrainedModel) -> dict[str, str]:
    conversion = getattr(model.config, "quantization_config", None)
    if conversion is None:
        steps, bits = model.config.time_steps, model.config.weight_bits
        return {"time steps T": str(steps), "bits of the layers' linear weights": str(bits)}
    layers = spike_layers(model)
    return {
        "linear layers with spikes as inputs": f"{len(layers)}, {len(linear_layers(model))} are dense",
        "threshold": f"mean of a token's inputs / {conversion.threshold_scale:g}",
        "code of the spikes": conversion.code,
        "largest count of spikes": str(conversion.max_count or "none"),
        "bits of these layers' weights": f"{conversion.weight_bits:g}",
    }


def _checksums(run: Run) -> str:
    sums = {path.name: f"`{digest(path, like='0' * 64)}`" for path in sorted(run.folder.glob("model*.safetensors"))}
    return _table("## Checksums", "file", "sha256", sums)


def _table(title: str, left: str, right: str, rows: dict[str, str]) -> str:
    return "\n".join([title, "", f"| {left} | {right} |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _name(source: str) -> tuple[str, str | None]:
    """The name to show for a path, package or Hub id, and the Hub id if it is one; no path of this machine is shown."""
    written = source.startswith(("/", ".", "~")) or source.count("/") > 1 or "\\" in source
    local = written or Path(source).exists() or suffix(source) is not None
    return (Path(source).stem or "?", None) if local and source else (source, source if "/" in source else None)
