"""Models by the names people give them: a folder, a trained zoo entry, a repository on the Hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from snlp_zoo import registry
from snlp_zoo.errors import CheckpointError, HubError
from snlp_zoo.hub.client import TRAVELLING, digest, insist, is_repo_id, records


def load(
    path_or_entry: str | Path, *, revision: str | None = None, verify: bool = False, **options: Any
) -> PreTrainedModel:
    """A trained model, in evaluation mode, with the head it was saved with.

    Args:
        path_or_entry: a saved folder (a run folder's `model`), a zoo entry (see `find_checkpoint`), or "user/name"
            on the Hub, from the cache where it is there and the Hub is not.
        revision: branch, tag or commit on the Hub; its main branch by default.
        verify: compare every file's checksum with the Hub's record.
        options: passed to `from_pretrained` (dtype, device_map, ...).
    Raises:
        CheckpointError: no such model, damaged or unverified files, missing or misshapen tensors.
        HubError: the Hub refuses, or cannot be reached.
    """
    return registry.load(find_checkpoint(path_or_entry, revision=revision, verify=verify), **options)


def find_checkpoint(path_or_entry: str | Path, *, revision: str | None = None, verify: bool = False) -> Path:
    """The folder with config.json and weights for a path, a zoo entry or a repository on the Hub.

    Of an entry trained here runs/<entry> comes first, then what travels with the package, so that a run of one's own is
    never passed over; the log says at level INFO which it was.

    Raises:
        CheckpointError: there is none, with how to get one; or `verify` found a file that is not the Hub's.
        HubError: the Hub refuses, or cannot be reached.
    """
    name = str(path_or_entry)
    try:
        folder = registry.find_checkpoint(name)
    except CheckpointError:
        if Path(name).exists() or not is_repo_id(name):
            raise
        folder = None
    if folder is None:
        return _fetch(name, revision, verify)
    if revision is not None or verify:
        raise CheckpointError(
            f"{folder} is a local folder, which has no revisions and no record; name user/name instead"
        )
    return folder


def _fetch(repo_id: str, revision: str | None, verify: bool) -> Path:
    try:
        folder = Path(insist(lambda: snapshot_download(repo_id, revision=revision, allow_patterns=TRAVELLING), repo_id))
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{repo_id} on the Hub is not a saved model: it has no config.json")
        if verify:
            _verify(folder, repo_id)
    except HubError as error:
        raise HubError(f"no folder and no zoo entry called {repo_id!r}; {error}") from error
    return folder


def _verify(folder: Path, repo_id: str) -> None:
    """Compare every file of a cached revision with the Hub's record, or with the one in the cache without the Hub."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    try:
        record = insist(lambda: records(repo_id, folder.name), repo_id)
    except HubError:  # a file in the cache is a link to one whose name is the checksum the Hub gave with it
        record = {name: path.resolve().name for name, path in files.items() if path.is_symlink()}
    for name, path in files.items():
        if name not in record:
            raise CheckpointError(f"{path} is not in the Hub's record of {repo_id}; remove it, and verify online")
        if digest(path, like=record[name]) != record[name]:
            raise CheckpointError(
                f"{name} of {repo_id} is damaged: its checksum is not the Hub's {record[name][:12]}...; "
                f"remove {path.resolve()} and load again"
            )
