"""What a saved folder must be before memory is allocated for it: the weight files, read by their headers alone.

Nothing here unpickles, follows a path out of the folder, or trusts a size that a file claims. What headers cannot show
is a flipped byte inside a tensor: it loads as another number unless it makes NaN or Inf. Checksums find it.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

from snlp_zoo.errors import CheckpointError
from snlp_zoo.layers.quant import PACKED_BUFFERS, storage_mismatch

JSON_BYTES = {"config.json": 1 << 20, "tokenizer_config.json": 8 << 20}
OTHER_JSON_BYTES = 128 << 20  # a tokenizer of a quarter million words has 33 MB
INDEX_BYTES = HEADER_BYTES = 4 << 20  # a model of 512 layers has twenty thousand tensors: 3 MB
_FLOATS = {"F64", "F32", "F16", "BF16"}  # loading converts one to another
_OTHERS = {torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64"}
# What transformers would read in place of model.safetensors, or after it, from wherever it says.
_FOREIGN = re.compile(r"adapter_config\.json|shard-\d+-model-\d+-of-\d+\.safetensors")

_ELSEWHERE = ("_file", "_files")

Fetch = Callable[[str], Path | None]  # file name -> the file, or None where there is none


class Stored(NamedTuple):
    """One tensor in a weight file; dtype as safetensors writes it, "F32"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def locate(name: str | Path, subfolder: str = "", **hub: Any) -> tuple[Path, Fetch]:
    """The folder of a model and how to get a file in it: a local folder, or a Hub id through the cache.

    Args:
        name: folder or Hub id.
        hub: as in transformers: revision, cache_dir, token, local_files_only, ...
    Raises:
        OSError: no such model, from transformers.
    """
    if (folder := Path(name)).is_dir():
        folder = folder / subfolder
        return folder, lambda file: folder / file if (folder / file).is_file() else None
    found = Path(cached_file(name, "config.json", subfolder=subfolder, **hub) or name)
    commit = found.parents[len(Path(subfolder).parts)].name  # the other files come from the same one
    hub = hub | {"revision": commit, "subfolder": subfolder, "_raise_exceptions_for_missing_entries": False}

    def fetch(file: str) -> Path | None:
        path = cached_file(name, file, **hub)
        return None if path is None else Path(path)

    return found.parent, fetch


def read_json(path: Path, limit: int | None = None) -> dict[str, Any]:
    """A JSON file that holds a mapping and has at most `limit` bytes; None takes the limit for files of its name.

    Raises:
        CheckpointError: it does not, or lies outside its folder.
    """
    limit = limit or JSON_BYTES.get(path.name, OTHER_JSON_BYTES)
    refuse_outside(path)
    try:
        if (size := path.stat().st_size) > limit:
            raise CheckpointError(f"cannot load {path}: it has {size} bytes, more than {limit}; save it again")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        message = str(error) or type(error).__name__
        raise CheckpointError(f"cannot load {path}: not valid JSON ({message}); save or download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot load {path}: it must hold a mapping, found {type(content).__name__}")
    return content


def architecture(config: dict[str, Any]) -> str:
    """The name of the class that a configuration was saved with, "?" where it says none."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else "?"


def refuse_outside(file: Path) -> None:
    """A file may be a link only inside its folder, or from a Hub cache's snapshot into that repository's blobs."""
    folder = file.parent.resolve()
    snapshots = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    allowed = [folder] if snapshots is None else [folder, snapshots.parent / "blobs"]
    if not any((target := file.resolve()).is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"cannot load {file}: it points outside its folder, to {target}; put the file itself there"
        )


def stored_weights(folder: Path, fetch: Fetch, variant: str | None = None) -> dict[str, Stored]:
    """What the safetensors files of a model hold: model.safetensors, or those its index names.

    Raises:
        CheckpointError: there are none, one is damaged, an index names a file elsewhere or does not say what is in its
            files, or the folder holds files that loading would take in their place.
    """
    if foreign := sorted(path.name for path in folder.iterdir() if _FOREIGN.fullmatch(path.name)):
        raise CheckpointError(f"cannot load {folder}: it also holds {foreign[0]}; put the model in a folder of its own")
    stem = "model" if variant is None else f"model.{variant}"
    if (single := fetch(f"{stem}.safetensors")) is not None:
        return read_headers([single])
    if (index := fetch(f"model.safetensors.index{stem.removeprefix('model')}.json")) is None:
        raise CheckpointError(
            f"cannot load {folder}: it has no {stem}.safetensors; only safetensors are loaded, never pickles"
        )
    content = read_json(index, INDEX_BYTES)
    placed = content.get("weight_map")
    if not (isinstance(placed, dict) and placed and isinstance(content.get("metadata"), dict)):
        raise CheckpointError(f"cannot load {index}: it must hold 'metadata' and a 'weight_map'; save the model again")
    files: dict[str, Path] = {}
    for name in map(str, placed.values()):
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise CheckpointError(f"cannot load {index}: {name[:80]!r} is not the name of a safetensors file beside it")
        if (file := files.get(name) or fetch(name)) is None:
            raise CheckpointError(f"cannot load {folder}: {name} is missing; save or download it again")
        files[name] = file
    held = read_headers(files.values())
    places = {name: stored.file.name for name, stored in held.items()}
    if wrong := sorted(name for name in places.keys() | placed.keys() if places.get(name) != placed.get(name)):
        raise CheckpointError(
            f"cannot load {index}: {wrong[0][:80]!r} should be in {placed.get(wrong[0])}, is in "
            f"{places.get(wrong[0])}; save the model again"
        )
    return held


def read_headers(files: Iterable[Path]) -> dict[str, Stored]:
    """What the files hold, by tensor name; no tensor is read.

    Raises:
        CheckpointError: not a safetensors file, a header that is too large or does not fit the file, a tensor twice.
    """
    held: dict[str, Stored] = {}
    for file in files:
        refuse_outside(file)
        try:
            with file.open("rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
            if not 2 <= length <= HEADER_BYTES:
                raise ValueError(f"its header claims {length} bytes, more than {HEADER_BYTES} or none")
            with safe_open(file, framework="pt") as weights:  # compares sizes and offsets with the file
                for name in weights.keys():  # noqa: SIM118  (no mapping)
                    part = weights.get_slice(name)
                    if name in held:
                        raise ValueError(f"{name[:80]} is in {held[name].file.name} too")
                    held[name] = Stored(file, part.get_dtype(), tuple(part.get_shape()))
        except Exception as error:  # safetensors has its own, and others for what it cannot read
            message = " ".join(str(error).split())[:200]
            raise CheckpointError(f"cannot load {file}: {message}; save or download it again") from error
    return held


def check_weights(
    folder: Path, held: dict[str, Stored], model: nn.Module, *, allow_missing: bool, allow_misshapen: bool
) -> None:
    """Compare what files hold with a model on the meta device; float dtypes are interchangeable, others are not.

    Args:
        held: from `read_headers`.
        model: what was saved; tensors that it shares need to be there once.
        allow_missing, allow_misshapen: tensors that are not there, or not of the model's shape, are no error.
    Raises:
        CheckpointError: names the tensors, their files and both values.
    """
    ours = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in ours.items():
        names.setdefault(id(tensor), []).append(name)
    missing = [group[0] for group in names.values() if not held.keys() & group]
    unexpected = sorted(held.keys() - ours.keys())
    for found, packed in ((unexpected, True), (missing, False)):
        if buffers := [name for name in found if name.endswith(PACKED_BUFFERS)]:
            raise CheckpointError(storage_mismatch(buffers[0].rpartition(".")[0], packed))
    misshapen, mistyped = [], []
    for name in sorted(held.keys() & ours.keys()):
        (file, dtype, shape), tensor = held[name], ours[name]
        if shape != tuple(tensor.shape):
            misshapen.append(f"{name} is {list(shape)} in {file.name}, {list(tensor.shape)} in the model")
        if dtype not in (_FLOATS if tensor.is_floating_point() else {_OTHERS[tensor.dtype]}):
            mistyped.append(f"{name} is {dtype} in {file.name}, {tensor.dtype} in the model")
    absent = [] if allow_missing else sorted(f"{name} is in no file" for name in missing)
    if wrong := absent + ([] if allow_misshapen else misshapen):
        raise CheckpointError(
            f"cannot load {folder}: weights are missing or misshapen: {_few(wrong)}; config.json and weights must be "
            "of one model (to start afresh: missing ones allow_missing=True, misshapen ones "
            "ignore_mismatched_sizes=True)"
        )
    if wrong := mistyped + [f"{name} in {held[name].file.name} has no place in the model" for name in unexpected]:
        raise CheckpointError(f"cannot load {folder}: {_few(wrong)}; save it again with {type(model).__name__}")


def _few(found: list[str]) -> str:
    shown = "; ".join(" ".join(text[:200].split()) for text in found[:3])  # names from a file may hold line breaks
    return shown if len(found) <= 3 else f"{shown} and {len(found) - 3} more"


@torch.no_grad()
def check_finite(folder: Path, model: nn.Module) -> None:
    """Every weight and buffer is a finite number.

    Raises:
        CheckpointError: names the first tensor with NaN or Inf.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN is smallest and largest; no copy is made
            raise CheckpointError(
                f"cannot load {folder}: {name} holds NaN or Inf as {tensor.dtype}; "
                "download it again, or save a model that did not diverge"
            )


def check_tokenizer(folder: Path) -> None:
    """The JSON files of a tokenizer: bounded, inside the folder, and naming no file or code elsewhere.

    Raises:
        CheckpointError: one is not.
    """
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if path.name == "tokenizer_config.json":
            refuse_elsewhere(path, content)


def refuse_elsewhere(path: Path, content: dict[str, Any]) -> None:
    """Raises CheckpointError for a key of a tokenizer's configuration that names a file or code elsewhere."""
    elsewhere = sorted(k for k, value in content.items() if value and (k == "auto_map" or k.endswith(_ELSEWHERE)))
    if elsewhere:
        raise CheckpointError(f"cannot load {path}: {elsewhere[0]!r} names a file or code elsewhere; remove it")
