"""Saved models of transformers whose layers spike: loaded as strictly as the zoo's own."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from snlp_zoo.errors import CheckpointError
from snlp_zoo.models.checkpoint import architecture, check_finite, check_weights, locate, read_json, stored_weights
from snlp_zoo.models.converted import METHOD, SpikingConversionConfig, replace_layers


def is_conversion(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a converted model."""
    conversion = config.get("quantization_config")
    return isinstance(conversion, dict) and conversion.get("quant_method") == METHOD


def load_converted(folder: Path, *, allow_missing: bool = False, **options: Any) -> PreTrainedModel:
    """A converted model of transformers, in evaluation mode, as the class it was saved as.

    Safetensors only, whose headers are compared with the configuration before anything is allocated; no code of the
    folder runs.

    Args:
        folder: with config.json, which `is_conversion`.
        allow_missing: tensors that are in no file start afresh.
        options: as in transformers' `from_pretrained`.
    Raises:
        CheckpointError: a file is damaged or points elsewhere; a tensor is missing, unexpected, of another shape or
            kind, or not finite; transformers has no such class; the configuration asks for code from elsewhere.
    """
    content = read_json(folder / "config.json")
    model_class = saved_class(folder, content)
    refuse_code(folder, content)
    try:
        conversion = SpikingConversionConfig(**content["quantization_config"])
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"cannot load {folder}/config.json: {' '.join(str(error).split())[:300]}") from error
    held = stored_weights(*locate(folder), options.get("variant"))
    layers = getattr(config, "num_hidden_layers", 0)
    if layers > len(held):  # before so many are built
        raise CheckpointError(
            f"cannot load {folder}: config.json has num_hidden_layers {layers}, the weights only {len(held)} tensors; "
            "they must be of one model"
        )
    if get_checkpoint_conversion_mapping(config.model_type) is None:
        with torch.device("meta"):
            saved = model_class(config)
        replace_layers(saved, conversion.targets, conversion.layer_options())
        misshapen = options.get("ignore_mismatched_sizes", False)
        if (
            held.keys() <= saved.state_dict().keys()
        ):  # else transformers renames on saving, or finds what is wrong below
            check_weights(folder, held, saved, allow_missing=allow_missing, allow_misshapen=misshapen)
    model, info = model_class.from_pretrained(
        folder, config=config, **options | {"use_safetensors": True, "output_loading_info": True}
    )
    if wrong := sorted(info["unexpected_keys"]) or (not allow_missing and sorted(info["missing_keys"])):
        raise CheckpointError(f"cannot load {folder}: {wrong[0]} is missing or has no place in the model")
    check_finite(folder, model)
    return model.eval()


def saved_class(folder: Path, content: dict[str, Any]) -> Any:
    """transformers' class that a config.json says its model is of; CheckpointError where there is none."""
    name = architecture(content)
    found: Any = getattr(transformers, name, None)
    kind = content.get("model_type")
    of_transformers = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if of_transformers and getattr(found.config_class, "model_type", None) == kind:
        return found
    raise CheckpointError(
        f"cannot load {folder}: config.json is of a {kind!r} of class {name!r}, which transformers "
        f"{transformers.__version__} does not have"
    )


def refuse_code(folder: Path, content: Any) -> None:
    """Raises CheckpointError for what makes transformers fetch code, at any depth of a config.json."""
    for key, value in content.items():
        if value and (key == "auto_map" or (key.endswith("attn_implementation") and "/" in str(value))):
            raise CheckpointError(f"cannot load {folder}: {key!r} in config.json names code from elsewhere; remove it")
        if isinstance(value, dict):
            refuse_code(folder, value)
