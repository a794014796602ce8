"""Finds models and zoo entries by file name. Adding a model or an entry is adding files; there is no list to edit.

models/configuration_x.py + models/modeling_x.py are a model, zoo_configs/x.yaml is an entry. An entry with `convert:`
is a model of transformers, made to spike: `family` knows both kinds.
"""

import logging
import pkgutil
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_type_hints

import transformers
from pydantic import Field, TypeAdapter, ValidationError, field_validator
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from snlp_zoo import models, pretrained
from snlp_zoo.checked import Checked, explain_validation, read_yaml
from snlp_zoo.errors import CheckpointError, RecipeError, unknown
from snlp_zoo.models.checkpoint import architecture, check_tokenizer, read_json
from snlp_zoo.models.configuration import SpikingConfig, make_config
from snlp_zoo.models.converted import SpikingConversionConfig, convert_in_place
from snlp_zoo.models.converted_loading import is_conversion, load_converted
from snlp_zoo.results import Result

logger = logging.getLogger(__name__)
Task = Literal["sequence-classification", "masked-lm", "causal-lm", "encoder"]
# task -> (ending of the class name, transformers' Auto class, the Hub's pipeline tag)
TASKS: dict[str, tuple[str, Any, str]] = {
    "sequence-classification": ("ForSequenceClassification", AutoModelForSequenceClassification, "text-classification"),
    "masked-lm": ("ForMaskedLM", AutoModelForMaskedLM, "fill-mask"),
    "causal-lm": ("ForCausalLM", AutoModelForCausalLM, "text-generation"),
    "encoder": ("Model", AutoModel, "feature-extraction"),
}
_MAPPINGS = {  # task -> transformers' configuration class -> model class
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING",
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "encoder": "MODEL_MAPPING",
}
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
_NO_TOKENIZER = "its files are missing; save the one that the model was trained with there"
_OF_FILES = {"packed", "salient", "quant_method"}  # of SpikingConversionConfig: what saved weights are, not a choice


class Entry(Checked):
    """One zoo entry: the data of zoo_configs/<name>.yaml.

    convert: arguments of `convert.to_spiking`, of a model of transformers, whose model_type and config are then meant.
    source: paper, code, and, where convert is given, weights: what `snlp-zoo convert` starts from.
    """

    model_type: str
    config: dict[str, Any]
    task: Task = "sequence-classification"
    description: str = ""
    recipe: str | None = None
    source: dict[str, str] = Field({})
    results: list[Result] = Field([])
    convert: dict[str, Any] | None = None

    @field_validator("convert")
    @classmethod
    def _check_convert(cls, options: dict[str, Any] | None) -> dict[str, Any] | None:
        if options is not None:
            conversion(options)
        return options


def conversion(options: dict[str, Any]) -> SpikingConversionConfig:
    """What `convert:` in an entry or recipe says.

    Raises:
        RecipeError: an argument that `convert.to_spiking` lacks (with the nearest), of another type, or out of range.
    """
    hints = get_type_hints(SpikingConversionConfig.__init__)
    known = [name for name in hints if name not in {*_OF_FILES, "return"}]
    try:
        for name, value in options.items():
            if name not in known:
                raise unknown("option of to_spiking", name, known)
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        return SpikingConversionConfig(**options)
    except ValidationError as error:
        raise RecipeError(f"{name}: {error.errors()[0]['msg']} (got {value!r})") from error
    except ValueError as error:
        raise error if isinstance(error, RecipeError) else RecipeError(str(error)) from error


def zoo_folder() -> Path:
    """Where zoo_configs lies: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "zoo_configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "zoo_configs"


@cache
def model_classes() -> dict[str, dict[str, Any]]:
    """model_type -> {"config": class, task: class, ...}, from the files in models/."""
    found: dict[str, dict[str, Any]] = {}
    for module_info in pkgutil.iter_modules(models.__path__):
        kind, _, name = module_info.name.partition("_")
        if kind == "modeling":
            configuration = import_module(f"{models.__name__}.configuration_{name}")
            modeling = import_module(f"{models.__name__}.{module_info.name}")
            config = next(c for c in _defined_in(configuration) if issubclass(c, SpikingConfig))
            stem = config.__name__.removesuffix("Config")
            classes = {c.__name__: c for c in _defined_in(modeling)}
            tasks = {task: classes[stem + end] for task, (end, *_) in TASKS.items() if stem + end in classes}
            found[config.model_type] = {"config": config, **tasks}
    return found


def family(model_type: str) -> dict[str, Any]:
    """{"config": class, task: class, ...} of a model of this zoo or of transformers.

    Raises:
        RecipeError: neither has it.
    """
    if model_type in model_classes():
        return model_classes()[model_type]
    if model_type not in CONFIG_MAPPING:
        raise unknown("model_type", model_type, [*model_classes(), *CONFIG_MAPPING])
    config = CONFIG_MAPPING[model_type]
    found = {task: getattr(transformers, mapping).get(config, None) for task, mapping in _MAPPINGS.items()}
    return {"config": config} | {task: c[0] if isinstance(c, tuple) else c for task, c in found.items() if c}


def _defined_in(module: Any) -> list[type]:
    return [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]


def register() -> None:
    """Make every model known to transformers' Auto classes; called once, on `import snlp_zoo`."""
    for model_type, classes in model_classes().items():
        AutoConfig.register(model_type, classes["config"], exist_ok=True)
        for task, (_, auto, _) in TASKS.items():
            if task in classes:
                auto.register(classes["config"], classes[task], exist_ok=True)


def task_of(model: Any) -> str:
    """The task of a model, class or class name, of this zoo or of transformers; "encoder" where it has no such head."""
    name = model if isinstance(model, str) else (model if isinstance(model, type) else type(model)).__name__
    if name.endswith("LMHeadModel"):  # GPT-2's
        return "causal-lm"
    return next((task for task, (ending, *_) in TASKS.items() if name.endswith(ending)), "encoder")


def list_entries() -> list[str]:
    """Names of all zoo entries, sorted."""
    return sorted(path.stem for path in zoo_folder().glob("*.yaml"))


def load_entry(name: str, path: Path | None = None) -> Entry:
    """The zoo entry called `name` (or the one in the file `path`).

    Raises:
        RecipeError: unknown entry (with the nearest names), unknown key, unknown model_type, or one that `convert`
            cannot be about.
    """
    if path is None and name not in list_entries():
        raise unknown("zoo entry", name, list_entries())
    path = path or zoo_folder() / f"{name}.yaml"
    try:
        entry = Entry.model_validate(read_yaml(path))
    except ValidationError as error:
        raise explain_validation(str(path.name), error, Entry) from error
    check_model_type(entry.model_type, entry.convert)
    return entry


def check_model_type(model_type: str, convert: dict[str, Any] | None) -> None:
    """Raises RecipeError for an unknown model_type, a dense one without `convert`, or one of this zoo with it."""
    ours = model_type in model_classes()
    if convert is None and not ours:
        if model_type in CONFIG_MAPPING:
            raise RecipeError(f"model_type {model_type!r} is dense; add 'convert: {{}}' to make it spike")
        raise unknown("model_type", model_type, list(model_classes()))
    if convert is not None and ours:
        raise RecipeError(f"model_type {model_type!r} spikes already; leave 'convert' out")
    family(model_type)


def build_config(model_type: str, values: dict[str, Any]) -> Any:
    """A checked configuration of a family, of this zoo or of transformers.

    Raises:
        RecipeError: unknown field (with the nearest), wrong type, or value out of bounds.
    """
    try:
        return make_config(family(model_type)["config"], **values)
    except RecipeError:
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(f"config: {' '.join(str(error).split())}") from error


def build(entry: str, *, task: Task | None = None, **overrides: Any) -> PreTrainedModel:
    """A freshly initialised model of a zoo entry, in evaluation mode; converted, where the entry says so.

    Args:
        entry: name of a zoo entry, see `list_entries`.
        task: one of `TASKS`; None takes the entry's own.
        overrides: configuration fields to change, e.g. time_steps=2.
    Raises:
        RecipeError: unknown entry, field or task.
    """
    found = load_entry(entry)
    classes = family(found.model_type)
    task = task or found.task
    if task not in classes or task == "config":
        raise unknown("task", task, [name for name in classes if name != "config"])
    model = classes[task](build_config(found.model_type, found.config | overrides))
    if found.convert is not None:
        convert_in_place(model, conversion(found.convert))
    return model.eval()


def load(path_or_entry: str | Path, **options: Any) -> PreTrainedModel:
    """A trained model, in evaluation mode, with the head it was saved with.

    Args:
        path_or_entry: a saved folder (a run folder's `model`), or a zoo entry; see `find_checkpoint`.
        options: passed to `from_pretrained` (dtype, device_map, allow_missing, ...).
    Raises:
        CheckpointError: no such folder or trained entry; files that are damaged, too large or point elsewhere; weights
            that are missing, too many, of another shape or kind, or not finite. A flipped byte that leaves a finite
            number shows in checksums alone.
    """
    folder = find_checkpoint(path_or_entry)
    content = read_json(folder / "config.json")
    name = architecture(content)
    classes = model_classes().get(str(content.get("model_type")), {})
    model_class = next((c for c in classes.values() if c.__name__ == name), None)
    if model_class is None and not is_conversion(content):
        raise CheckpointError(f"{folder} holds a {name}, not a model of this zoo; 'snlp-zoo convert' makes it spike")
    try:
        if model_class is None:
            return load_converted(folder, **options)
        loaded = model_class.from_pretrained(folder, **options)
    except CheckpointError:
        raise
    except Exception as error:  # transformers, safetensors, json and huggingface_hub each raise their own
        raise CheckpointError(f"cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
    return loaded.eval()


def load_classifier(folder: Path) -> PreTrainedModel:
    """`load` for a model that is asked for labels.

    Raises:
        CheckpointError: as `load`, or the model has no classifier.
    """
    model = load(folder)
    if task_of(model) != "sequence-classification":
        raise CheckpointError(f"{folder} holds a {type(model).__name__}, which has no classifier; train it on a task")
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model.

    Raises:
        CheckpointError: missing or damaged.
    """
    check_tokenizer(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # json, tokenizers and transformers each raise their own
        there = any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern))
        told = " ".join(str(error).split())[:300] if there else _NO_TOKENIZER
        raise CheckpointError(f"cannot load the tokenizer in {folder}: {told}") from error
    if knows_no_words(tokenizer):
        raise CheckpointError(f"cannot load the tokenizer in {folder}: {_NO_TOKENIZER}")
    return tokenizer


def knows_no_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether there are special tokens only: what transformers makes, silently, of a folder without tokenizer files."""
    return len(tokenizer) <= len(tokenizer.all_special_ids)


def find_checkpoint(path_or_entry: str | Path) -> Path:
    """The folder with config.json and weights for a path or a zoo entry: of an entry that was trained here runs/<entry>
    comes first, then what travels with the package (`pretrained`).

    Raises:
        CheckpointError: there is none; says how to get one.
    """
    name = str(path_or_entry)
    candidates = [Path(name), Path(name) / "model", Path("runs") / name / "model"]
    candidates += [pretrained.FOLDER / name] if name in pretrained.shipped() else []
    for folder in candidates:
        if (folder / "config.json").is_file():
            logger.info("%s is loaded from %s", name, folder)
            return folder
    if name in list_entries():
        entry = load_entry(name)
        command = "train" if entry.task == "causal-lm" else "distill"
        train = f"train it with 'snlp-zoo {command} {name}' or " if entry.recipe else ""
        if "weights" in entry.source:
            train = f"make it with 'snlp-zoo convert {name}' or "
        raise CheckpointError(
            f"{name} has no trained checkpoint in runs/{name}; {train}use snlp_zoo.build({name!r}) for fresh weights"
        )
    if Path(name).exists():
        raise CheckpointError(f"{name} is not a saved model: it has no config.json")
    nearest = get_close_matches(name, list_entries(), n=3)
    hint = f"; did you mean the zoo entry {' or '.join(nearest)}?" if nearest else ""
    raise CheckpointError(f"no folder and no zoo entry called {name!r}{hint}")
