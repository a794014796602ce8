"""The student of a run that is a transformers model whose linear layers are made to spike: `models.converted`."""

import logging
from copy import deepcopy
from math import isclose
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from snlp_zoo import hub, registry
from snlp_zoo.convert.equalise import equalise
from snlp_zoo.convert.spiking import check_targets
from snlp_zoo.data.batches import model_inputs
from snlp_zoo.distill.objectives import OBJECTIVES
from snlp_zoo.errors import CheckpointError, RecipeError
from snlp_zoo.models.converted import METHOD, SpikingConversionConfig, convert_in_place, is_converted, set_window
from snlp_zoo.train.parts import refuse_untrainable
from snlp_zoo.train.recipe import Recipe
from snlp_zoo.train.teacher import label_options
from snlp_zoo.train.teacher_source import teacher_from_pretrained

logger = logging.getLogger(__name__)

_OF_WINDOWS = ("max_count", "threshold_scale")  # what may change of a model that is converted already
_NEEDS = {  # what objectives ask of a student, and such a model does not give
    "spike_rates": "leave spike_rate out",
    "attention_scores": "use attention_mse for attention_score_mse",
}


def converted_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, label_names: list[str] | None) -> Any:
    """The configuration of the model that is converted, or was; checked against the recipe, tokenizer and labels.

    Raises:
        RecipeError: they do not fit each other, there is nothing to start from, or it cannot be trained.
        ConversionError: there are no layers as `model.convert` wants them.
    """
    part, config = recipe.model, _start_config(recipe, tokenizer)
    asked = {"model_type": part.model_type} if part.model_type else {}
    for name, value in (asked | part.config).items():
        theirs = getattr(config, name, None)
        if theirs != value and not (isinstance(value, float) and isclose(value, theirs or 0.0, rel_tol=1e-6)):
            raise RecipeError(
                f"model: {name} is {value!r}, and {theirs!r} in what model.init_from {part.init_from!r} is; leave it "
                "out of model, or name another start"
            )
    if recipe.head == "sequence-classification":
        for name, value in label_options(label_names).items():
            setattr(config, name, value)
    _check_sizes(recipe, config, len(tokenizer))
    _check_objectives(recipe, config)
    _check_conversion(recipe, config)
    return config


def make_converted(
    recipe: Recipe, config: Any, teacher: PreTrainedModel | None, batch: dict[str, Tensor]
) -> PreTrainedModel:
    """A copy of the teacher, a saved model or a new one, converted as the recipe says if it is not yet.

    Args:
        config: of `converted_config`.
        batch: texts on which channels are made equal, if the recipe says so.
    Raises:
        CheckpointError: the saved model cannot be loaded.
        ConversionError: its channels cannot be made equal.
    """
    start, auto = recipe.model.init_from, registry.TASKS[recipe.head][1]
    eager = {"attn_implementation": "eager"} if "attention_mse" in recipe.objectives else {}
    student: Any
    if start == "teacher":
        student = deepcopy(teacher)
    elif start == "scratch":
        student = auto.from_config(config, **eager)
    else:
        folder = hub.find_checkpoint(start)
        try:
            student = auto.from_pretrained(folder, config=config, use_safetensors=True, dtype=torch.float32, **eager)
        except Exception as error:  # transformers and safetensors each raise their own
            raise CheckpointError(f"cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
    options = recipe.model.convert or {}
    if is_converted(student) and recipe.model.equalise:
        logger.warning("model.equalise is ignored: %s is converted already, and equalise is for dense models", start)
    if not is_converted(student):
        if recipe.model.equalise:
            equalise(student, {name: x.to(student.device) for name, x in model_inputs(batch, student).items()})
        convert_in_place(student, registry.conversion(options))
    elif options.keys() & set(_OF_WINDOWS):
        now = student.config.quantization_config
        set_window(student, **{name: options.get(name, getattr(now, name)) for name in _OF_WINDOWS})
    return student


def _start_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Any:
    part = recipe.model
    if part.init_from == "teacher" and recipe.teacher:
        return teacher_from_pretrained(AutoConfig, recipe.teacher)
    if part.init_from == "scratch":
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
        values = {"vocab_size": len(tokenizer)} | special | part.config
        return registry.build_config(str(part.model_type), values)
    folder = hub.find_checkpoint(part.init_from)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot load {folder}/config.json: {' '.join(str(error).split())[:300]}") from error


def _check_sizes(recipe: Recipe, config: Any, tokens: int) -> None:
    positions = getattr(config, "max_position_embeddings", recipe.data.max_length)
    if recipe.data.max_length > positions:
        raise RecipeError(f"data.max_length {recipe.data.max_length} is more than the model's {positions} positions")
    if config.vocab_size < tokens:
        raise RecipeError(f"the model knows {config.vocab_size} tokens, the tokenizer {tokens}; use both of one model")


def _check_objectives(recipe: Recipe, config: Any) -> None:
    needs = {need for name in recipe.objectives for need in OBJECTIVES[name].needs}
    for need, instead in _NEEDS.items():
        if need in needs:
            raise RecipeError(f"objectives: a converted model gives no {need.replace('_', ' ')}; {instead}")
    if "attentions" in needs and not hasattr(config, "num_attention_heads"):
        raise RecipeError(f"objectives: a {config.model_type} has no attention; leave attention_mse out")


def _check_conversion(recipe: Recipe, config: Any) -> None:
    """What is dense needs a conversion that fits it; what was converted keeps its own, but for the window."""
    options, auto = recipe.model.convert, registry.TASKS[recipe.head][1]
    before = getattr(config, "quantization_config", None) or {}
    if isinstance(before, dict) and before.get("quant_method") == METHOD:
        kept = SpikingConversionConfig(**before)
        refuse_untrainable(kept)
        for name, value in (options or {}).items():
            if name not in _OF_WINDOWS and getattr(kept, name) != value:
                raise RecipeError(
                    f"model.convert: {name} is {value!r}, and {recipe.model.init_from} was converted with "
                    f"{getattr(kept, name)!r}; leave it out, or start from the dense model"
                )
        return
    if options is None:
        raise RecipeError(
            f"model.convert: the model of model.init_from {recipe.model.init_from!r} is dense; say how it is to spike, "
            "{} for the usual way, or name a model_type of this zoo"
        )
    try:
        with torch.device("meta"):
            model = auto.from_config(deepcopy(config))
    except ValueError as error:
        raise RecipeError(f"task: transformers has no {recipe.head} of model_type {config.model_type!r}") from error
    check_targets(model, registry.conversion(options).targets)
