"""A recipe: everything one training run needs, as data. YAML read by pydantic; unknown keys are errors.

A recipe is written as an entry of the zoo (whose `recipe:` names a file in zoo_configs/recipes), or as a YAML file with
`extends: <zoo entry, recipe or file>` and what it changes. `--set a.b=value` changes single values last. `stages:` is a
list of named changes to the recipe's own keys, trained one after another; `--set stages.<stage>=null` leaves one out.
"""

import logging
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from snlp_zoo import registry
from snlp_zoo.checked import Checked, dump_yaml, explain_validation, parse_yaml, read_yaml
from snlp_zoo.distill.matching import LAYER_MAPS
from snlp_zoo.distill.objectives import OBJECTIVES, check_options
from snlp_zoo.errors import RecipeError, unknown
from snlp_zoo.train.parts import DataPart, ModelPart, ObjectivePart, TeacherPart, TokenizerPart, TrainPart
from snlp_zoo.train.schedules import value_at

logger = logging.getLogger(__name__)
STAGE_KEYS = ("task", "model", "data", "tokenizer", "teacher", "objectives", "projection", "layer_map", "train")
_WHOLE = ("objectives", "tokenizer")


class Recipe(Checked):
    """One training run."""

    name: str
    task: Literal["causal-lm"] | None = None  # None: a classifier, or an encoder where data.label is null
    model: ModelPart
    data: DataPart
    tokenizer: TokenizerPart | None = None
    teacher: TeacherPart | None = None
    objectives: dict[str, ObjectivePart] = Field({})
    projection: Literal["per_layer", "shared", "normed"] = "per_layer"  # of hidden states to the teacher's width
    layer_map: str | list[int] = "spread"  # `distill.matching.layer_pairs`
    train: TrainPart = TrainPart()
    baseline: bool = True  # bag-of-words logistic regression beside the student
    stages: list[dict[str, Any]] = Field([])  # each: name, and any of STAGE_KEYS, merged over the above

    @property
    def head(self) -> registry.Task:
        """What is trained."""
        return self.task or ("encoder" if self.data.label is None else "sequence-classification")

    @model_validator(mode="before")
    @classmethod
    def _start(cls, content: Any) -> Any:
        """Unless told otherwise a converted student starts from a teacher, of others an encoder or a classifier."""
        model = content.get("model")
        spikes = isinstance(model, dict) and model.get("convert") is None and model.get("model_type")
        if spikes and (content.get("task") or not content.get("teacher")):
            return content | {"model": {"init_from": "scratch"} | model}
        return content

    @field_validator("layer_map")
    @classmethod
    def _known_layer_map(cls, layer_map: str | list[int]) -> str | list[int]:
        if isinstance(layer_map, str) and layer_map not in LAYER_MAPS:
            raise unknown("layer_map", layer_map, LAYER_MAPS)
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
                raise unknown(f"key of stage {name!r}:", key, ["name", *STAGE_KEYS])
        return stages

    @model_validator(mode="after")
    def _fitting_objectives(self) -> "Recipe":
        if self.stages:
            return self  # each of them is checked with what it changes
        if not self.objectives:
            raise RecipeError(f"objectives: name at least 1 of {', '.join(OBJECTIVES)}")
        if not any(value_at(part.weight, 1.0) > 0 for part in self.objectives.values()):
            raise RecipeError("objectives: every weight ends at 0, so nothing tells which student is best; keep one up")
        if self.head == "encoder":
            states = [name for name, objective in OBJECTIVES.items() if not objective.needs_labels]
            if wrong := [name for name in self.objectives if name not in states and name in OBJECTIVES]:
                raise RecipeError(
                    f"objectives: {', '.join(wrong)} cannot be had without labels, and data.label is null; "
                    f"use {', '.join(states)}"
                )
        elif not self.task and not (isinstance(self.data.source, str) and isinstance(self.data.text, str)):
            raise RecipeError("data: source and text may be lists only for text without labels (label: null)")
        return self

    @model_validator(mode="after")
    def _fitting_teacher(self) -> "Recipe":
        if self.stages:
            return self
        if self.teacher is None:
            alone = [name for name, objective in OBJECTIVES.items() if not objective.needs_teacher]
            if wrong := [name for name in self.objectives if name not in alone and name in OBJECTIVES]:
                raise RecipeError(
                    f"teacher: Field required by the objectives {', '.join(wrong)}; name teacher.name, or use "
                    f"{', '.join(alone)}"
                )
            if self.model.init_from == "teacher":
                raise RecipeError("model.init_from: there is no teacher to start from; name one, or use 'scratch'")
            if self.data.augment:
                raise RecipeError("data.augment: the teacher chooses the words, and there is none; leave it out")
            if self.data.transfer:
                raise RecipeError("data.transfer: the teacher labels its texts, and there is none; leave it out")
        elif self.tokenizer:
            raise RecipeError("tokenizer: student and teacher read the same ids, those of the teacher's; leave it out")
        if self.train.metric_for_best_model and self.head != "sequence-classification":
            kind = "a language model" if self.task else "text without labels"
            raise RecipeError(f"train.metric_for_best_model is for classifiers, not for {kind}; leave it out here")
        if self.task:
            self._fitting_language_model()
        self._fitting_splits()
        return self

    def _fitting_splits(self) -> None:
        data, transfer = self.data, self.data.transfer
        asked = [key for key in ("transfer", "disjoint") if getattr(data, key)]
        if transfer and transfer.text_pair:
            asked.remove("transfer")
            if self.head != "sequence-classification" or not data.text_pair:
                raise RecipeError("data.transfer.text_pair is for pairs of texts with labels; leave it out here")
        if asked and (self.head != "sequence-classification" or data.text_pair):
            kind = "text pairs" if data.text_pair else "a language model" if self.task else "text without labels"
            instead = "name its text_pair" if data.text_pair and asked[0] == "transfer" else "leave it out here"
            raise RecipeError(f"data.{asked[0]} is for single texts with labels, not for {kind}; {instead}")

    def _fitting_language_model(self) -> None:
        if self.teacher and self.teacher.tune != "none":
            raise RecipeError(
                f"teacher.tune: a language model is taken as it is, got {self.teacher.tune!r}; set teacher.tune=none"
            )
        if self.model.init_from == "teacher" and not self.model.converted:
            raise RecipeError("model.init_from: language models do not start from a teacher; use 'scratch'")
        if self.data.text_pair or self.data.augment:
            raise RecipeError("data: text_pair and augment are not for language models; leave them out")

    @model_validator(mode="after")
    def _fitting_conversion(self) -> "Recipe":
        if self.stages:
            return self
        if self.model.converted and self.train.surrogate_temperature != 1:
            raise RecipeError("train.surrogate_temperature: a converted model has no surrogates; leave it out")
        if self.model.converted and self.model.init_from == "scratch" and self.model.model_type is None:
            raise RecipeError("model.model_type: of 'scratch' nothing else says what model it is; name one")
        return self

    @model_validator(mode="after")
    def _known_objectives(self) -> "Recipe":
        for name, part in self.objectives.items():
            if name not in OBJECTIVES:
                raise unknown("objective", name, list(OBJECTIVES))
            for option in part.model_extra or {}:
                if option not in OBJECTIVES[name].options():
                    raise unknown(f"option of {name}", option, ["weight", *OBJECTIVES[name].options()])
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
        model = part.model
        if model.model_type is not None:  # refuses unknown fields before anything runs
            if model.convert is not None or model.init_from in ("scratch", "teacher"):  # else converted before
                registry.check_model_type(model.model_type, model.convert)
            registry.build_config(model.model_type, model.config)
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


def stages_of(run: Path) -> list[Recipe]:
    """Recipes of a finished run's stages, its model's own last; none if the folder keeps no recipe."""
    kept = run / "recipe.yaml"
    return [recipe for _, recipe in stage_recipes(load_recipe(str(kept)), run)] if kept.is_file() else []


def _validated(where: str, content: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise explain_validation(where, error, Recipe) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return dump_yaml(recipe.model_dump())


def _resolve(name: str, seen: tuple[str, ...], relative_to: Path | None = None) -> dict[str, Any]:
    """The recipe called `name` (file, zoo entry or recipes/<name>) as a plain mapping, `extends` merged in."""
    if name in seen:
        raise RecipeError(f"recipes extend each other in a circle: {' -> '.join([*seen, name])}")
    recipes = registry.zoo_folder() / "recipes"
    candidates = [(relative_to or Path()) / name, recipes / f"{name}.yaml"]
    path = next((p for p in candidates if p.suffix in (".yaml", ".yml") and p.is_file()), None)
    if path is None and name not in registry.list_entries():
        if name.endswith((".yaml", ".yml")):
            raise RecipeError(f"there is no file {candidates[0]}; check the path, or name a zoo entry or recipe")
        known = registry.list_entries() + sorted(p.stem for p in recipes.glob("*.yaml"))
        raise unknown("zoo entry or recipe", name, known)
    content = read_yaml(path or registry.zoo_folder() / f"{name}.yaml")
    if "model_type" in content:  # an entry
        return _resolve_entry(Path(name).stem, registry.load_entry(name, path), (*seen, name))
    parent = content.pop("extends", None)
    if parent is not None:
        base = _resolve(str(parent), (*seen, name), path.parent if path else None)
        content = _merge(base, content)
    return {"name": path.stem if path else name} | content if parent is None else content


def _resolve_entry(name: str, entry: registry.Entry, seen: tuple[str, ...]) -> dict[str, Any]:
    if entry.recipe is None:
        trained = [entry for entry in registry.list_entries() if registry.load_entry(entry).recipe]
        raise RecipeError(
            f"zoo entry {name!r} has no recipe to train it; write a YAML file with 'extends: <recipe>' and a model, or "
            f"use one that has, such as {', '.join(get_close_matches(name, trained, cutoff=0))}"
        )
    content = _resolve(entry.recipe, seen)
    if entry.convert is not None and content.get("teacher") and "weights" in entry.source:
        content = _merge(content, {"teacher": {"name": entry.source["weights"]}})
    model = {"model": {"model_type": entry.model_type, "config": entry.config, "convert": entry.convert}}
    return _merge(content, model) | {"name": name}


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, mapping by mapping and stage by stage; objectives and the tokenizer are replaced as a
    whole, so that a term can be dropped.
    """
    merged = dict(base)
    for key, value in changes.items():
        if key == "stages" and _named(value) and _named(base.get(key)):
            theirs, ours = {stage["name"]: stage for stage in value}, {stage["name"]: stage for stage in base[key]}
            merged[key] = [_merge(ours.get(name, {}), theirs.get(name, {})) for name in ours | theirs]
            continue
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict) and key not in _WHOLE
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _set(content: dict[str, Any], override: str) -> None:
    """Apply one "a.b=value"."""
    path, separator, value = override.partition("=")
    if not separator or not path:
        raise RecipeError(f"--set wants key=value, got {override!r}; for example --set train.batch_size=16")
    try:
        parsed = parse_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {path}: {value!r} is not a YAML value") from error
    if path.startswith("stages.") and _named(content.get("stages")):
        _, name, rest = [*path.split(".", 2), ""][:3]
        names = [stage["name"] for stage in content["stages"]]
        if name not in names:
            raise unknown("stage, in --set stages.<stage>.<key>=<value>,", name, names)
        if not rest and not value.strip():
            raise RecipeError(f"--set {path}= has no value; write --set {path}=null to leave the stage out")
        if not rest and parsed is not None:
            raise RecipeError(f"--set {path}: a stage has keys, as in --set {path}.train.epochs=1; null leaves it out")
        if not rest:
            content["stages"] = [stage for stage in content["stages"] if stage["name"] != name]
            return None
        content["stages"] = [dict(stage) for stage in content["stages"]]
        return _set(content["stages"][names.index(name)], f"{rest}={value}")
    stages = content["stages"] if content.get("stages") and _named(content["stages"]) else []
    own = [f"stages.{stage['name']}.{path}" for stage in stages if _hides(stage, path, parsed)]
    if stages and len(own) == len(stages):
        if path.startswith("objectives"):
            raise RecipeError(f"--set {path}: every stage has objectives of its own; use --set {own[-1]}={value}")
        logger.warning("--set %s changes nothing: every stage has its own; use --set %s=%s", path, own[-1], value)
    *parents, last = path.split(".")
    for parent in parents:
        child = content.get(parent)
        content[parent] = dict(child) if isinstance(child, dict) else {} if child is None else {"weight": child}
        content = content[parent]
    content[last] = parsed
    if last == "epochs" and content.get("steps") is not None:
        logger.warning(
            "--set %s changes nothing: steps, %s of them, stand for epochs; set these", path, content["steps"]
        )


def _hides(stage: dict[str, Any], path: str, value: Any) -> bool:
    """Whether what a stage has of its own stands over all of this value at this path of the recipe."""
    content: Any = stage
    for key in path.split("."):
        if not isinstance(content, dict) or (content is stage and key in stage and key in _WHOLE):
            return True
        if key not in content:
            return False
        content = content[key]
    return not (isinstance(content, dict) and isinstance(value, dict))


def _named(stages: Any) -> bool:
    """Whether this is a list of stages with names."""
    return isinstance(stages, list) and all(isinstance(stage, dict) and "name" in stage for stage in stages)
