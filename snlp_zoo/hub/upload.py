"""Publishing a model: one commit of what the allow-list names, repeated until the Hub holds exactly that."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

from snlp_zoo import registry
from snlp_zoo.errors import HubError
from snlp_zoo.hub.card import make_card, make_results, read_run
from snlp_zoo.hub.client import CARD, RESULTS, digest, insist, is_repo_id, records, travels
from snlp_zoo.models.checkpoint import refuse_outside


@dataclass(frozen=True)
class PublishReport:
    """What was published, or would be.

    Args:
        files: path in the repository -> bytes.
        left_out: files of the folder that are not published.
        card: text of README.md.
        commit: the commit that holds exactly these files; None of a dry run.
    """

    repo_id: str
    revision: str
    files: dict[str, int]
    left_out: list[str]
    card: str
    commit: str | None

    @property
    def url(self) -> str:
        """Where it can be looked at."""
        return f"{constants.ENDPOINT}/{self.repo_id}/tree/{self.revision}"


def publish(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    licence: str = "apache-2.0",
    dry_run: bool = False,
) -> PublishReport:
    """Publish a trained model on the Hub, in one commit, with a card: the whole of `snlp-zoo publish`.

    Safe to repeat after any failure: what was sent is not sent again, and a repository that already holds these files
    gets no commit. Files of an earlier model that are not part of this one go in the same commit; results
    on other data sets stay.

    Args:
        path: a run folder, its `model` folder, any saved model, or a zoo entry (see `find_checkpoint`).
        repo_id: "user/name"; made if it does not exist.
        private: only people with access see it.
        revision: a branch, made if it does not exist; main by default.
        licence: the Hub's short name of the weights' licence.
        dry_run: only say what would be published; needs no network.
    Raises:
        CheckpointError: no such model, or it is damaged.
        HubError: the name or the licence has the wrong form, or the Hub refuses, cannot be reached, or does not hold
            what was sent.
    """
    if not is_repo_id(repo_id):
        raise HubError(f"{repo_id!r} is no repository; write it as user/name, in letters, digits, '-', '_' and '.'")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise HubError(f"{licence!r} is no licence; use one of the Hub's short names, such as apache-2.0, mit or other")
    folder = registry.find_checkpoint(path)
    model = registry.load(folder)  # what cannot be loaded is not published
    run = read_run(folder)
    card = make_card(run, model, repo_id, licence)
    del model
    texts = {name: text.encode() for name, text in {CARD: card, **make_results(run)}.items()}
    own = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and entry.name not in texts)
    for name in filter(travels, own):
        refuse_outside(folder / name)
    contents: dict[str, Path | bytes] = {name: folder / name for name in own if travels(name)} | texts
    commit = None if dry_run else insist(lambda: _attempt(contents, repo_id, revision or "main", private), repo_id)
    sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in contents.items()}
    left_out = [name for name in own if not travels(name)]
    return PublishReport(repo_id, revision or "main", sizes, left_out, card, commit)


def _attempt(contents: dict[str, Path | bytes], repo_id: str, revision: str, private: bool) -> str:
    """Bring the branch to these contents unless it holds them already, as after a lost reply; the branch's head."""
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision != "main":
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise HubError(f"{repo_id} exists and is public; make it private in its settings or leave out --private")
    head, changes = _compare(api, contents, repo_id, revision)
    if changes:
        api.create_commit(
            repo_id, changes, commit_message="Publish with snlp_zoo", revision=revision, parent_commit=head
        )
        head, changes = _compare(api, contents, repo_id, revision)
        if changes:
            wrong = ", ".join(change.path_in_repo for change in changes[:5])
            raise HubError(
                f"{repo_id} does not hold what was sent ({wrong}); somebody else may be writing: run it again"
            )
    return head


def _compare(
    api: HfApi, contents: dict[str, Path | bytes], repo_id: str, revision: str
) -> tuple[str, list[CommitOperationAdd | CommitOperationDelete]]:
    """The branch's head, and what separates it from these contents, by the Hub's record of checksums."""
    head = api.model_info(repo_id, revision=revision).sha
    if head is None:
        raise HubError(f"the Hub does not name the head of {repo_id}; run it again")
    record = records(repo_id, head)
    changes: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in contents.items()
        if name not in record or digest(content, like=record[name]) != record[name]
    ]
    stale = [name for name in record if name not in contents and travels(name) and not name.startswith(RESULTS)]
    return head, changes + [CommitOperationDelete(path_in_repo=name) for name in stale]
