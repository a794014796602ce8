"""Writing folders so that a crash or a full disk never costs what was there before."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from snlp_zoo.errors import CheckpointError


def replace_folder(target: Path, write: Callable[[Path], Any]) -> None:
    """Fill a folder beside `target` by `write(folder)`, then put it in target's place.

    Whatever happens, `target` is the old folder or the new one, complete (see `recover_folder`).

    Raises:
        CheckpointError: it cannot be written (read-only, disk full); the old folder is untouched.
    """
    aside, old = _aside(target)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        flush(aside)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        aside.rename(target)
        flush(target.parent, files=False)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        recover_folder(target)
        raise CheckpointError(f"cannot write {target}: {error}; what was there before is unchanged") from error


def flush(path: Path, files: bool = True) -> None:
    """Have the disk hold a file, or a folder and all files in it, before anything relies on them after a power cut."""
    inside = path.rglob("*") if files and path.is_dir() else ()
    for part in (*inside, path):
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def recover_folder(target: Path) -> None:
    """Undo what a crash inside `replace_folder` left: the old folder comes back if the new one is not in place."""
    aside, old = _aside(target)
    if old.exists() and not target.exists():
        old.rename(target)
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _aside(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")


def replace_file(target: Path, text: str) -> None:
    """Write a text file aside, then put it in place.

    Raises:
        CheckpointError: it cannot be written; the old file is untouched.
    """
    aside = target.with_name(f".{target.name}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        flush(aside)
        aside.replace(target)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {target}: {error}") from error


def write_json(target: Path, content: dict[str, Any]) -> None:
    """`replace_file` with JSON."""
    replace_file(target, json.dumps(content, indent=2) + "\n")
