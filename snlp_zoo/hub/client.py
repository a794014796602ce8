"""What downloads and uploads share: which files travel, what the Hub says of them, and what to do when it says no."""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from snlp_zoo.errors import HubError, SnlpError

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

CARD, RESULTS = "README.md", ".eval_results/"
# Everything that is ever sent or fetched: no pickles, no code, no optimizer states.
TRAVELLING = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja"),
    CARD,
    f"{RESULTS}*.yaml",
]
WAITS = (1.0, 4.0, 16.0)  # seconds before each new try; huggingface_hub repeats most requests by itself, too
_CURES = {
    400: "it does not accept what was sent",
    401: "check the name, and log in with 'hf auth login' or set HF_TOKEN if the repository is private or yours",
    403: "the token may not do this; publishing needs write access, and a gated model its owner's consent",
    404: "check the name and the revision, and log in with 'hf auth login' if the repository is private",
    409: "something else is changing the repository; run it again",
    412: "somebody else keeps committing to the repository; run it again",
    429: "too many requests; wait some minutes and run it again",
}


def travels(path: str) -> bool:
    """Whether a file of a repository is one of those that are sent and fetched."""
    inside = "/" in path.removeprefix(RESULTS)  # a pattern's star would reach into folders
    return not inside and any(fnmatchcase(path, pattern) for pattern in TRAVELLING)


def is_repo_id(name: str) -> bool:
    """Whether a name has the form user/name, as repositories on the Hub do."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, flags=re.ASCII) is not None


def records(repo_id: str, revision: str) -> dict[str, str]:
    """The Hub's record of a revision: path -> sha256 of large files, git's sha1 of the others."""
    tree = HfApi().list_repo_tree(repo_id, revision=revision, recursive=True)
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in tree if isinstance(file, RepoFile)}


def digest(source: Path | bytes, like: str) -> str:
    """The checksum of a file or text, of the same kind as `like`."""
    algorithm = "sha256" if len(like) == 64 else "sha1"
    checksum = hashlib.new(algorithm, usedforsecurity=False)
    if algorithm == "sha1":
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        checksum.update(b"blob %d\0" % size)
    if isinstance(source, bytes):
        checksum.update(source)
    else:
        with source.open("rb") as file:
            while chunk := file.read(1 << 20):
                checksum.update(chunk)
    return checksum.hexdigest()


def insist(attempt: Callable[[], Answer], repo_id: str) -> Answer:
    """Call until it returns, waiting out troubles that pass; `attempt` must be safe to repeat.

    Raises:
        HubError: the trouble does not pass, or has not after the last try.
    """
    for wait in (*WAITS, None):
        try:
            return attempt()
        except SnlpError:
            raise
        except Exception as error:  # huggingface_hub, httpx and json each raise their own
            problem = explain(error, repo_id)
            if wait is None or not _passes(error):
                raise problem from error
            logger.warning("%s; trying again", problem)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def explain(error: BaseException, repo_id: str) -> HubError:
    """One sentence for whatever huggingface_hub raised: what is wrong and what to do. It never quotes the token."""
    # A ValueError itself lists what is wrong with the card, or with the name of a repository or file.
    chain = [] if type(error) is ValueError else _chain(error)
    status = _status(chain)
    if status is not None:
        server = " ".join((next(e for e in chain if isinstance(e, HfHubHTTPError)).server_message or "").split())[:200]
        cure = _CURES.get(status, "it has a problem of its own; run it again later, what was sent is not sent twice")
        text = f"the Hub answers {status} for {repo_id}{f' ({server})' if server else ''}: {cure}"
    elif any(isinstance(e, OfflineModeIsEnabled) for e in chain) or constants.HF_HUB_OFFLINE:
        text = f"HF_HUB_OFFLINE keeps {repo_id} out of reach, and the cache does not hold all of it; unset it"
    elif network := next(filter(_is_network, chain), None):
        why = type(network).__name__
        text = f"no connection to the Hub at {constants.ENDPOINT} for {repo_id} ({why}); check the network"
    else:
        text = f"{repo_id}: {' '.join(str(error).split())[:300]}"
    token = get_token()
    return HubError(text.replace(token, "***") if token else text)


def _passes(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment: not where nobody answers at all, or may be asked."""
    chain = _chain(error)
    status = _status(chain)
    if status is not None:
        return status in (408, 409, 412, 429) or status >= 500
    return any(_is_network(e) or isinstance(e, json.JSONDecodeError) for e in chain) and not any(
        type(e).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError", "OfflineModeIsEnabled") for e in chain
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _status(chain: list[BaseException]) -> int | None:
    return next((e.response.status_code for e in chain if isinstance(e, HfHubHTTPError)), None)


def _is_network(error: BaseException) -> bool:
    """Known by its package, which is httpx or httpx2 with the version of huggingface_hub."""
    return type(error).__module__.startswith("httpx") or isinstance(error, ConnectionError)
