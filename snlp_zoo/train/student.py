"""The student of a run: its configuration, and the weights it starts from."""

import logging
from inspect import signature
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snlp_zoo import hub, registry
from snlp_zoo.data import TextSplits
from snlp_zoo.data.tokenizers import train_tokenizer
from snlp_zoo.distill.distiller import gives_attention_scores
from snlp_zoo.distill.objectives import OBJECTIVES
from snlp_zoo.errors import RecipeError
from snlp_zoo.layers.quant import BitLinear
from snlp_zoo.models.checkpoint import read_json
from snlp_zoo.models.transfer import by_short_name, copy_weights, short_name
from snlp_zoo.train.converted import converted_config, make_converted
from snlp_zoo.train.recipe import Recipe
from snlp_zoo.train.teacher import label_options
from snlp_zoo.train.teacher_source import load_tokenizer

logger = logging.getLogger(__name__)
PROJECTION = "projection.safetensors"


def find_tokenizer(
    recipe: Recipe, texts: TextSplits, earlier: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """What makes ids of a run's texts: the teacher's tokenizer; else the recipe's own, trained on the training split
    or saved before; else that of the student it starts from.

    Args:
        earlier: the tokenizer of the stage it starts from, where that is not trained yet.
    Raises:
        RecipeError: none of these is named, or the teacher's cannot be loaded.
        CheckpointError: a saved one cannot be loaded.
        DataError: the texts give none of the size asked for.
    """
    if recipe.teacher:
        return load_tokenizer(recipe.teacher)
    part, start = recipe.tokenizer, recipe.model.init_from
    if part and part.kind:
        read = [*texts.train.texts, *(texts.train.pairs or ()), recipe.data.separator or ""]
        return train_tokenizer(part.kind, read, part.vocab_size)
    if part and part.name:
        return load_saved_tokenizer(part.name)
    if start == "scratch":
        raise RecipeError(
            "tokenizer: without a teacher a run needs one of its own; name tokenizer.kind (characters, bytes, bpe), or "
            "in tokenizer.name a saved one"
        )
    return earlier or load_saved_tokenizer(start)


def load_saved_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or beside a trained model.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = Path(name) if (Path(name) / "tokenizer_config.json").is_file() else hub.find_checkpoint(name)
    return registry.load_tokenizer(folder)


def student_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, label_names: list[str] | None) -> Any:
    """The student's configuration, checked against the recipe, the tokenizer and the labels.

    Raises:
        RecipeError: they do not fit each other, or the place to start from does not exist.
        ConversionError: there is no such layer to convert.
    """
    if recipe.model.converted:
        return converted_config(recipe, tokenizer, label_names)
    if recipe.train.window or recipe.model.equalise:
        key = "train.window" if recipe.train.window else "model.equalise"
        raise RecipeError(f"{key}: that is for converted models; leave it out, or give model.convert")
    values = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if recipe.head == "causal-lm":
        values["eos_token_id"] = tokenizer.eos_token_id
    config = registry.build_config(str(recipe.model.model_type), values | recipe.model.config)
    if recipe.head not in _classes(recipe):
        able = [family for family, classes in registry.model_classes().items() if recipe.head in classes]
        raise RecipeError(f"task: no {recipe.head} of model_type {recipe.model.model_type!r}; use {' or '.join(able)}")
    if recipe.head == "sequence-classification":
        for name, value in label_options(label_names).items():
            setattr(config, name, value)
    positions = getattr(config, "max_position_embeddings", None)  # what walks over tokens has none
    if positions is not None and recipe.data.max_length > positions:
        raise RecipeError(
            f"data.max_length {recipe.data.max_length} is more than the model's {positions} "
            "positions; lower it or raise model.config.max_position_embeddings"
        )
    if config.vocab_size < len(tokenizer):
        raise RecipeError(f"model.config.vocab_size {config.vocab_size} is less than the tokenizer's {len(tokenizer)}")
    needs = {need for name in recipe.objectives for need in OBJECTIVES[name].needs}
    if "attention_scores" in needs and not gives_attention_scores(_classes(recipe)["encoder"]):
        raise RecipeError(
            f"objectives: model_type {recipe.model.model_type!r} does not give the attention scores that "
            "attention_score_mse compares; use attention_mse"
        )
    if recipe.train.surrogate_temperature != 1 and config.gradient != "surrogate":
        raise RecipeError(
            f"train.surrogate_temperature: the neurons of model_type {recipe.model.model_type!r} have no surrogate "
            "whose width could change; leave it out"
        )
    if recipe.model.init_from == "teacher" and not hasattr(_classes(recipe)[recipe.head], "copy_from"):
        raise RecipeError(
            f"model.init_from: model_type {recipe.model.model_type!r} has no layers like a teacher's to start from; "
            "use 'scratch' or a saved student"
        )
    if "spike_rates" in needs and not getattr(config, "spiking", True):
        raise RecipeError("objectives: this student has no neurons (model.config.spiking: false); leave spike_rate out")
    if "attentions" in needs and "output_attentions" not in signature(_classes(recipe)[recipe.head].forward).parameters:
        raise RecipeError(
            f"objectives: model_type {recipe.model.model_type!r} has no attention; leave attention_mse out"
        )
    if "attentions" in needs and getattr(config, "attention", None) == "sdsa":
        raise RecipeError("objectives: attention 'sdsa' has no attention weights to compare; leave attention_mse out")
    return config


def make_student(
    recipe: Recipe, config: Any, teacher: PreTrainedModel | None, batch: dict[str, Tensor] | None = None
) -> PreTrainedModel:
    """A student with the weights the recipe asks for: a classifier, an encoder for text without labels, or a language
    model.

    Raises:
        RecipeError: none of the weights to start from fits.
        CheckpointError: the saved student to start from cannot be loaded.
    """
    if recipe.model.converted:
        return make_converted(recipe, config, teacher, batch or {})
    student = _classes(recipe)[recipe.head](config)
    if recipe.model.init_from == "teacher":
        student.copy_from(teacher)
    elif recipe.model.init_from != "scratch":
        copy_student(student, recipe.model.init_from)
    return student


def _classes(recipe: Recipe) -> dict[str, Any]:
    return registry.model_classes()[str(recipe.model.model_type)]


def find_start(path_or_entry: str) -> Path:
    """The folder of a saved student that training can start from.

    Raises:
        RecipeError: its weights are packed.
        CheckpointError: there is none.
    """
    folder = hub.find_checkpoint(path_or_entry)
    if read_json(folder / "config.json").get("packed"):
        raise RecipeError(
            f"model.init_from: {path_or_entry} is packed for inference; name the student it was made from"
        )
    return folder


def copy_student(student: PreTrainedModel, path_or_entry: str) -> list[str]:
    """Copy a saved student's weights into another, in place, by name and shape; what keeps its start is logged.

    Names count without the prefix of the family, so that encoders and classifiers start from each other. The buffers
    of a module (a neuron's amplitudes and whether they were measured) only make sense together. A student of float
    weights starts from what low-bit ones act as.

    Returns:
        Names that were not copied.
    Raises:
        RecipeError: no layer fits, or the weights are packed.
        CheckpointError: no such model, or it is damaged.
    """
    source = registry.load(find_start(path_or_entry))
    ours, theirs = by_short_name(student), by_short_name(source)
    if student.config.weight_bits == 32:
        bits = {name: module for name, module in source.named_modules() if isinstance(module, BitLinear)}
        theirs |= {short_name(source, f"{name}.weight"): module.quantised_weight() for name, module in bits.items()}
    parameters = {short_name(student, name) for name, _ in student.named_parameters()}
    buffers = ours.keys() - parameters
    torn = {n.rpartition(".")[0] for n in buffers if n not in theirs or theirs[n].shape != ours[n].shape}
    theirs = {n: t for n, t in theirs.items() if n not in buffers or n.rpartition(".")[0] not in torn}
    copied, not_copied = copy_weights(ours, theirs, lambda name: name)
    if not any(name.startswith("layers.") for name in parameters.intersection(copied)):
        raise RecipeError(f"model.init_from: no layer of {path_or_entry} fits the student; name another or 'scratch'")
    if not_copied:
        logger.warning("not copied from %s: %s", path_or_entry, ", ".join(not_copied))
    return list(not_copied)


def save_projection(weights: dict[str, Tensor], folder: Path) -> None:
    """Keep what maps the student's states to the teacher's beside the student, for a run that starts from it."""
    if state := {name: tensor.contiguous() for name, tensor in weights.items()}:
        save_file(state, folder / PROJECTION)


def load_projection(projection: nn.Module, init_from: str) -> None:
    """Go on with the projection kept beside the student a run starts from, where there is one that fits."""
    if init_from in ("teacher", "scratch"):
        return
    path = hub.find_checkpoint(init_from) / PROJECTION
    theirs = load_file(path) if path.is_file() else {}
    ours = projection.state_dict()
    if {n: t.shape for n, t in theirs.items()} == {n: t.shape for n, t in ours.items()}:
        projection.load_state_dict(theirs)
