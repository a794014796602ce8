"""The test Hub and a client of it, each in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]

# The tiny distilled run of the training tests.
_spec = spec_from_file_location("train_conftest", HERE.parent / "train" / "conftest.py")
_train = module_from_spec(_spec)
_spec.loader.exec_module(_train)
cache_folder, teacher_folder, data_folder = _train.cache_folder, _train.teacher_folder, _train.data_folder
recipe_content, trained = _train.recipe_content, _train.trained


class Hub:
    """The running server: faults, log, and what it holds."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def _call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(f"{self.url}/_control/{path}", data)) as response:  # noqa: S310
            return json.load(response)

    def faults(self, *faults: dict[str, Any]) -> None:
        self._call("faults", faults)

    def reset(self) -> None:
        self._call("reset", {})

    def log(self) -> list[str]:
        return self._call("log")

    def repo(self, name: str) -> dict[str, Any] | None:
        return self._call(f"repo/{name}")

    def plant(self, name: str, **files: str) -> None:
        """Put files, path -> text, into a repository as they are."""
        self._call(f"plant/{name}", files)

    def head(self, name: str, branch: str = "main") -> dict[str, str]:
        """Path -> sha256 at a branch's head."""
        repo = self.repo(name)
        return repo["commits"][repo["branches"][branch]]


class ClientError(Exception):
    """What the client raised: its type's name and the message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


class Client:
    """A worker process; `run(code)` gives what the code leaves in `answer`."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.endpoint = environment["HF_ENDPOINT"]
        self.cache = Path(environment["HF_HOME"])
        self.log = self.cache.with_name(f"{self.cache.name}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, HERE / "worker.py"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, code: str, token: str = "") -> Any:
        self.process.stdin.write(json.dumps({"code": code, "token": token}) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        if "error" in reply:
            raise ClientError(reply["error"], reply["message"])
        return reply["answer"]

    def outcome(self, code: str, token: str = "") -> tuple[Any, ClientError | None]:
        """The answer and no error, or no answer and the error."""
        try:
            return self.run(code, token), None
        except ClientError as error:
            return None, error

    def forget(self) -> None:
        """Empty the cache."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def close(self) -> None:
        self.process.kill()  # it has nothing to save, and torch takes its time to leave
        self.process.communicate()


@pytest.fixture(scope="session")
def server():
    process = subprocess.Popen(
        [sys.executable, HERE / "fakehub.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield Hub(int(process.stdout.readline()))
    process.stdin.close()
    process.stdout.close()
    process.wait(20)


@pytest.fixture
def hub(server):
    """The test Hub, empty."""
    server.reset()
    return server


@pytest.fixture(scope="session")
def environment(server, tmp_path_factory):
    """Environment of a process that talks to the test Hub alone."""
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return kept | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }


@pytest.fixture(scope="session")
def worker(environment):
    client = Client(environment)
    yield client
    client.close()


@pytest.fixture
def client(worker):
    """A process that uses the library, with an empty cache."""
    worker.forget()
    return worker


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A saved model and its tokenizer, with leftovers that must not travel."""
    import torch
    from transformers import BertTokenizer

    import snlp_zoo

    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    snlp_zoo.build("spikelm_tiny").save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    for name in ("training_args.bin", "optimizer.pt", "projection.safetensors", "notes.md"):
        (folder / name).write_bytes(b"stays here")
    return folder


@pytest.fixture
def client_error():
    return ClientError
