"""Dense models by the names people give them, to be converted: nothing of theirs is executed or unpickled."""

import importlib.metadata
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from snlp_zoo import hub, registry
from snlp_zoo.errors import CheckpointError, ConversionError
from snlp_zoo.models.checkpoint import (
    check_finite,
    locate,
    read_json,
    refuse_elsewhere,
    stored_weights,
)
from snlp_zoo.models.converted_loading import is_conversion, refuse_code, saved_class

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Source(NamedTuple):
    """Where a dense model lies: a folder with config.json and safetensors, or one with a GGUF file of this name."""

    folder: Path
    gguf: str | None = None

    def options(self) -> dict[str, Any]:
        """Of transformers' `from_pretrained`."""
        return {"gguf_file": self.gguf} if self.gguf else {}


def find_source(name: str | Path) -> Source:
    """A dense model by name; nothing but its config.json is read.

    Args:
        name: a zoo entry with `source.weights`, a folder, a .gguf file, an installed package that carries one of these
            (which is found without being imported), or "user/name" on the Hub.
    Raises:
        ConversionError: there is none, it spikes already, its weights are packed in some other way, or it needs `gguf`.
        CheckpointError: its configuration is damaged, asks for code, or there are only pickled weights.
        HubError: the Hub refuses, or cannot be reached.
    """
    if str(name) in registry.list_entries() and not Path(name).exists():
        entry = registry.load_entry(str(name))
        if "weights" not in entry.source:
            raise ConversionError(f"convert: the zoo entry {name} says no source.weights; name a dense model instead")
        name = entry.source["weights"]
    path = Path(name)
    if path.is_file():
        found = _file(path)
    elif path.is_dir():
        found = _folder(path) or Source(path)
    else:
        found = _package(str(name)) or Source(_from_hub(str(name)))
    if found.gguf is None:
        _check_config(found.folder)
    elif find_spec("gguf") is None:
        raise ConversionError(f"convert: reading {found.gguf} needs the package gguf; pip install 'snlp-zoo[gguf]'")
    return found


def _file(path: Path) -> Source:
    if path.suffix in _PICKLES:
        raise CheckpointError(f"cannot load {path}: pickles can execute code and are not read; save it as safetensors")
    if path.suffix != ".gguf":
        raise ConversionError(f"convert: {path} is no .gguf file; name that, or a folder with config.json")
    return Source(path.parent, path.name)


def _folder(path: Path) -> Source | None:
    """The model in a folder: itself, its `model`, or its only GGUF file."""
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return Source(folder)
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ConversionError(f"convert: {path} holds {len(files)} GGUF files; name one, such as {files[0]}")
    return Source(path, files[0].name) if files else None


def _package(name: str) -> Source | None:
    """The model an installed distribution carries; its code is not imported."""
    try:
        files = importlib.metadata.files(name) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    folders = {Path(str(file.locate())).parent for file in files if file.suffix in (".gguf", ".safetensors")}
    return next(filter(None, map(_folder, sorted(folders))), None)


def _from_hub(name: str) -> Path:
    try:
        return hub.find_checkpoint(name)
    except CheckpointError as error:
        if "/" in name:
            raise
        raise ConversionError(
            f"convert: no folder, file, zoo entry or installed package called {name!r}; install the package, or name a "
            "model on the Hub as user/name"
        ) from error


def _check_config(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a saved model: it has neither config.json nor a GGUF file")
    content = read_json(folder / "config.json")
    if is_conversion(content):
        raise ConversionError(f"convert: {folder} is converted already; start from the dense model")
    if content.get("model_type") in registry.model_classes():
        raise ConversionError(f"convert: {folder} holds a {content['model_type']}, which spikes already")
    if packed := content.get("quantization_config"):
        method = packed.get("quant_method") if isinstance(packed, dict) else packed
        raise ConversionError(f"convert: {folder} holds weights packed by {method}; name one with plain weights")
    refuse_code(folder, content)


def load_dense(source: Source, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
    """The model, in evaluation mode, with the head it was saved with.

    Args:
        dtype: of the weights; None: as saved, float32 of GGUF.
    Raises:
        CheckpointError: files are damaged, pickles, or lack tensors; transformers cannot read the model.
    """
    folder = source.folder
    try:
        if source.gguf:
            read = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=source.gguf,
                dtype=dtype or torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
            )
            return _without_quantiser(read).eval()
        stored_weights(*locate(folder))
        content = read_json(folder / "config.json")
        auto = saved_class(folder, content) if content.get("architectures") else AutoModel
        model, info = auto.from_pretrained(
            folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except CheckpointError:
        raise
    except Exception as error:  # transformers, safetensors, gguf and json each raise their own
        raise CheckpointError(f"cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"cannot load {folder}: {missing[0]} of {type(model).__name__} is in no file")
    check_finite(folder, model)
    return model.eval()


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the model, None where it has none.

    Raises:
        CheckpointError: it is damaged, or names files or code elsewhere.
    """
    config = source.folder / "tokenizer_config.json"
    if config.is_file():
        refuse_elsewhere(config, read_json(config))
    elif not source.gguf:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, **source.options())
    except Exception as error:  # json, tokenizers, gguf and transformers each raise their own
        raise CheckpointError(
            f"cannot load the tokenizer in {source.folder}: {' '.join(str(error).split())[:300]}"
        ) from error
    return None if registry.knows_no_words(tokenizer) else tokenizer


def _without_quantiser(read: Any) -> PreTrainedModel:
    """The same tensors in a model that may be saved, which transformers refuses for what it has read from GGUF."""
    config = deepcopy(read.config)
    del config.quantization_config
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    for name, buffer in read.named_buffers():  # those that are not saved, too
        parent, _, last = name.rpartition(".")
        model.get_submodule(parent)._buffers[last] = buffer
    model.tie_weights()
    model.generation_config = read.generation_config
    return model
