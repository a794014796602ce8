"""Weight files of other people, read without running anything that is in them or trusting a size they claim."""

import re
import zipfile
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from snlp_zoo.errors import CheckpointError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PICKLE_BYTES = 16 << 20  # names, shapes and places of ten thousand tensors take 2 MB
GGMF = b"fmgg"  # 0x67676d66, little-endian
_GGMF_TYPES: dict[int, np.dtype] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}  # all others are quantised
_GGMF_VERSIONS = (100, 101)
_NAME_BYTES = 256


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that `torch.save` wrote, by name; in float32, bfloat16, float16 or float64.

    A state dict inside a mapping, as "model" or "state_dict", is found there; a prefix "module." of all names is
    dropped.

    Raises:
        CheckpointError: not a file of torch.save (1.6 or later), damaged, larger when unpacked than on the disk, with
            anything but tensors in it (nothing is ever executed), or with one that is no dense float tensor.
    """
    held_bytes = _check_archive(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch and its unpickler raise many kinds
        reason = " ".join(str(error).split()).partition(". ")[0][:200] or type(error).__name__
        raise CheckpointError(
            f"cannot read {path}: it is damaged, or holds more than tensors and would run code, which is refused "
            f"({reason}); save its state_dict() alone"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not held:
        raise CheckpointError(f"cannot read {path}: it holds a {type(held).__name__}, not a state dict of tensors")
    found: dict[str, Tensor] = {}
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"cannot read {path}: {str(name)[:80]!r} is a {type(tensor).__name__}, not a tensor; a state dict "
                "holds nothing else"
            )
        if tensor.dtype not in _FLOATS or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(
                f"cannot read {path}: {name[:80]} is {tensor.dtype} ({tensor.layout}, {tensor.device}); dense floats "
                "of 16, 32 or 64 bits are converted, nothing quantised"
            )
        found[name] = tensor.detach()
    if all(name.startswith("module.") for name in found):  # trained on many GPUs
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    if (claimed := sum(tensor.nbytes for tensor in found.values())) > held_bytes:
        raise CheckpointError(f"cannot read {path}: its tensors claim {claimed} bytes, it holds {held_bytes}")
    return found


def _check_archive(path: Path) -> int:
    """What torch.save writes is a zip archive of stored files; anything packed could be of any size.

    Returns:
        Bytes of all tensors in it.
    """
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except FileNotFoundError as error:
        raise CheckpointError(f"cannot read {path}: there is no such file; check the path") from error
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(
            f"cannot read {path}: it is not a whole file of torch.save, version 1.6 or later ({error}); "
            "download it again"
        ) from error
    packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
    unpacked = sum(part.file_size for part in parts)
    if packed or unpacked > size:
        raise CheckpointError(
            f"cannot read {path}: unpacked it has {unpacked} bytes, on the disk {size}; torch.save packs nothing"
        )
    if any(part.filename.endswith("data.pkl") and part.file_size > _PICKLE_BYTES for part in parts):
        raise CheckpointError(f"cannot read {path}: its list of tensors has more than {_PICKLE_BYTES} bytes")
    return sum(part.file_size for part in parts if "/data/" in part.filename)


def is_ggmf(path: Path) -> bool:
    """Whether a file is one of rwkv.cpp's.

    Raises:
        CheckpointError: it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            return file.read(4) == GGMF
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def read_ggmf(path: Path) -> dict[str, Tensor]:
    """The tensors of an rwkv.cpp file, by name, in float32.

    Little-endian: 4 bytes "fmgg"; version, n_vocab, n_embed, n_layer and data type (uint32 each); then for every tensor
    the number of its axes, the length of its name and its data type (uint32), its axes from the last to the first
    (uint32), name and numbers.

    Raises:
        CheckpointError: another version, quantised, damaged, or its header does not describe its tensors.
    """
    bytes_ = np.memmap(path, dtype=np.uint8, mode="r")
    header = _words(path, bytes_, 4, 5)
    version, vocabulary, width, layers, _ = header
    if version not in _GGMF_VERSIONS:
        raise CheckpointError(f"cannot read {path}: rwkv.cpp's format {version}; known are {_GGMF_VERSIONS}")
    found = dict(_ggmf_tensors(path, bytes_))
    blocks = {match[1] for name in found if (match := re.match(r"blocks\.(\d+)\.", name))}
    embeddings = tuple(found["emb.weight"].shape) if "emb.weight" in found else None
    if embeddings != (vocabulary, width) or len(blocks) != layers:
        raise CheckpointError(
            f"cannot read {path}: its header says {layers} layers and embeddings {[vocabulary, width]}, its tensors "
            f"{len(blocks)} and {list(embeddings or [])}; convert it from the original again"
        )
    return found


def _words(path: Path, bytes_: np.ndarray, start: int, number: int) -> list[int]:
    """`number` 32-bit words from byte `start` on."""
    if start + 4 * number > len(bytes_):
        raise CheckpointError(f"cannot read {path}: it ends after {len(bytes_)} bytes, inside a tensor's header")
    return np.frombuffer(bytes_[start : start + 4 * number].tobytes(), "<u4").tolist()


def _ggmf_tensors(path: Path, bytes_: np.ndarray) -> Iterator[tuple[str, Tensor]]:
    place, seen = 24, set()
    while place < len(bytes_):
        axes, length, kind = _words(path, bytes_, place, 3)
        if axes not in (1, 2, 3) or not 0 < length <= _NAME_BYTES:
            raise CheckpointError(
                f"cannot read {path}: at byte {place} a tensor of {axes} axes with a name of {length} bytes; damaged"
            )
        shape = _words(path, bytes_, place + 12, axes)[::-1]
        start = place + 12 + 4 * axes + length
        name = bytes_[start - length : start].tobytes().decode("utf-8", "replace")
        if kind not in _GGMF_TYPES:
            raise CheckpointError(f"cannot read {path}: {name[:80]} is of type {kind}, quantised; use FP32 or FP16")
        dtype = _GGMF_TYPES[kind]
        place = start + prod(shape) * dtype.itemsize
        if place > len(bytes_) or name in seen:
            reason = "is there twice" if name in seen else f"claims {shape} numbers, more than the file has"
            raise CheckpointError(f"cannot read {path}: {name[:80]} {reason}; download it again")
        seen.add(name)
        yield name, torch.from_numpy(bytes_[start:place].copy().view(dtype).astype(np.float32).reshape(shape))
