"""A Hub in one file for tests: repositories in memory, the endpoints that models need, and faults on demand.

Run as a program it binds 127.0.0.1, prints its port and serves until its standard input closes. Tests steer it through
/_control: POST faults (see Fault), POST reset, POST plant/<user>/<name>, GET log,
GET repo/<user>/<name>. Tokens: hf_write may write for `user`,
hf_read may read. A commit is applied under one lock, entirely or not at all, as on the Hub.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LICENCES = ["apache-2.0", "mit", "other"]
TOKENS = {"hf_write": "write", "hf_read": "read"}


@dataclass
class Fault:
    """Applied to the next `times` requests whose "METHOD path" the pattern matches, after `skip` of them.

    kind: status (answer `status`, do nothing), drop (close), reset (TCP reset), lost (do it, then close without an
    answer), truncate (half the body), flip (one byte of the body, received or sent), slow (wait `seconds`),
    stale (somebody else commits first); `position` is the byte that is flipped.
    """

    pattern: str
    kind: str
    status: int = 503
    times: int = 1
    skip: int = 0
    seconds: float = 0.5
    position: int = -1


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)  # oid -> path -> content, large?

    def commit(self, branch: str, files: dict[str, tuple[bytes, bool]]) -> str:
        oid = hashlib.sha1(
            f"{len(self.commits)} {sorted(files)} {time.time_ns()}".encode(), usedforsecurity=False
        ).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


class Answer(Exception):
    """The reply to a request; raising it ends the handling."""

    def __init__(self, status: int, body: Any = b"", **headers: str):
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


class State:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []

    def fault(self, request: str) -> Fault | None:
        """The fault of this request, and one request less for each that matches it."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    if fault.skip == 0:
                        fault.times -= 1
                        return fault
                    fault.skip -= 1
        return None


STATE = State()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def flipped(content: bytes, position: int) -> bytes:
    """One bit of one byte is another: the last byte of a file of weights is part of a number."""
    data = bytearray(content)
    data[position % len(data)] ^= 0x40
    return bytes(data)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def serve(self) -> None:
        self.path, _, self.query = self.path.partition("?")
        request, body = f"{self.command} {unquote(self.path)}", self.read_body()
        fault = None
        if not self.path.startswith("/_control"):
            STATE.log.append(request)
            fault = STATE.fault(request)
        kind = fault.kind if fault else ""
        if kind == "slow":
            time.sleep(fault.seconds)
        elif kind == "flip" and self.command == "PUT" and body:
            body = flipped(body, fault.position)
        elif kind == "stale":
            with STATE.lock:
                for repo in STATE.repos.values():
                    files = repo.commits[repo.branches["main"]]
                    repo.commit("main", files | {"NOTES": (str(time.time_ns()).encode(), False)})
        if kind in ("drop", "reset"):
            return self.hang_up(reset=kind == "reset")
        answer = Answer(fault.status, {"error": "on demand"}) if kind == "status" else self.answer(request, body)
        if kind == "lost":
            return self.hang_up()
        if kind == "flip" and self.command == "GET" and answer.body:
            answer.body = flipped(answer.body, fault.position)
        self.reply(answer, kind)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            size = int(self.headers.get("Content-Length", 0))
            if len(body := self.rfile.read(size)) < size:
                raise ConnectionError("the client died while it sent")
            return body
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def hang_up(self, *, reset: bool = False) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        with contextlib.suppress(OSError):
            if not reset:
                self.connection.shutdown(socket.SHUT_RDWR)
            self.connection.close()

    def reply(self, answer: Answer, kind: str) -> None:
        body = answer.body
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(len(body))} | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if kind == "truncate" else body)
        if kind == "truncate":
            self.wfile.flush()
            self.hang_up()

    def answer(self, request: str, body: bytes) -> Answer:
        for pattern, function in ROUTES:
            if found := re.fullmatch(pattern, request):
                try:
                    with STATE.lock:
                        function(self, body, *found.groups())
                except Answer as answer:
                    return answer
                raise AssertionError(f"{function.__name__} gave no answer")
        return Answer(404, {"error": f"no route for {request}"})

    # ---- who may do what ----

    def role(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        return TOKENS.get(token)

    def may_write(self, name: str) -> None:
        if self.role() is None:
            raise Answer(401, {"error": "Invalid username or password."})
        if self.role() == "read" or not name.startswith("user/"):
            raise Answer(403, {"error": "Forbidden"}, X_Error_Message="you don't have the rights")

    def repo(self, name: str) -> Repo:
        repo = STATE.repos.get(name)
        if repo is None or (repo.private and self.role() is None):
            status = 404 if self.role() else 401
            raise Answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return repo

    def revision(self, name: str, revision: str) -> tuple[str, dict[str, tuple[bytes, bool]]]:
        repo = self.repo(name)
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise Answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return oid, repo.commits[oid]

    # ---- endpoints ----

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        self.may_write(name)
        if name in STATE.repos:
            raise Answer(409, {"error": "You already created this model repo", "url": self.url(name)})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        STATE.repos[name] = Repo(private)
        STATE.repos[name].commit("main", {".gitattributes": (b"*.safetensors filter=lfs\n", False)})
        raise Answer(200, {"url": self.url(name)})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        self.may_write(name)
        repo = self.repo(name)
        if branch in repo.branches:
            raise Answer(409, {"error": "Reference already exists"})
        repo.branches[branch] = repo.branches["main"]
        raise Answer(200, {})

    def validate(self, body: bytes) -> None:
        found = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], flags=re.DOTALL)
        licence = re.search(r"^license: ([\w.-]+)$", found[1], flags=re.MULTILINE) if found else None
        if licence is None or licence[1] not in LICENCES:
            raise Answer(400, {"errors": [{"message": f'"license" must be one of {LICENCES}'}], "warnings": []})
        raise Answer(200, {"errors": [], "warnings": []})

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        oid, files = self.revision(name, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        raise Answer(200, {"id": name, "sha": oid, "private": self.repo(name).private, "siblings": siblings})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        _, files = self.revision(name, revision)
        rows: list[dict[str, Any]] = []
        for path, (content, large) in files.items():
            pointer = f"version 1\noid sha256:{sha256(content)}\nsize {len(content)}\n".encode()
            row = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(pointer if large else content)}
            if large:
                row["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer)}
            rows.append(row)
        raise Answer(200, rows)

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        self.may_write(name)
        _, files = self.revision(name, revision)
        rows = []
        for asked in json.loads(body)["files"]:
            large = asked["path"].endswith(".safetensors") or asked["size"] > 10_000_000
            content = files.get(asked["path"], (None, False))[0]
            oid = None if content is None else sha256(content) if large else git_sha1(content)
            mode = "lfs" if large else "regular"
            rows.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise Answer(200, {"files": rows})

    def batch(self, body: bytes, name: str) -> None:
        self.may_write(name)
        rows = []
        for asked in json.loads(body)["objects"]:
            row = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in STATE.large:
                upload, verify = self.url(f"_large/{asked['oid']}"), self.url("_large/verify")
                row["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            rows.append(row)
        raise Answer(200, {"transfer": "basic", "objects": rows})

    def put_large(self, body: bytes, oid: str) -> None:
        STATE.large[oid] = body
        raise Answer(200)

    def verify_large(self, body: bytes) -> None:
        asked = json.loads(body)
        content = STATE.large.get(asked["oid"])
        if content is None or sha256(content) != asked["oid"] or len(content) != asked["size"]:
            STATE.large.pop(asked["oid"], None)
            raise Answer(400, {"error": "checksum mismatch"})
        raise Answer(200, {})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        self.may_write(name)
        repo = self.repo(name)
        header, *lines = [json.loads(line) for line in body.splitlines()]
        head, files = self.revision(name, branch)
        if header["value"].get("parentCommit") not in (None, head):
            raise Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(files)
        for line in lines:
            value, path = line["value"], line["value"]["path"]
            if line["key"] == "file":
                files[path] = (base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                content = STATE.large.get(value["oid"])
                if content is None or sha256(content) != value["oid"]:
                    raise Answer(400, {"error": f"LFS pointer of {path} points to nothing"})
                files[path] = (content, True)
            elif files.pop(path, None) is None:
                raise Answer(404, {"error": f"{path} does not exist"}, X_Error_Code="EntryNotFound")
        oid = repo.commit(branch, files)
        raise Answer(200, {"commitUrl": self.url(f"{name}/commit/{oid}"), "commitOid": oid, "success": True})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        oid, files = self.revision(name, revision)
        if path not in files:
            raise Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        content, large = files[path]
        etag = sha256(content) if large else git_sha1(content)
        headers = {"X_Repo_Commit": oid, "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
        if large:
            headers |= {"X_Linked_Etag": f'"{etag}"', "X_Linked_Size": str(len(content))}
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            raise Answer(206, content[start:], **headers)
        raise Answer(200, content, **headers)

    # ---- control ----

    def set_faults(self, body: bytes) -> None:
        STATE.faults = [Fault(**fault) for fault in json.loads(body)]
        raise Answer(200, {})

    def reset(self, body: bytes) -> None:
        STATE.reset()
        raise Answer(200, {})

    def get_log(self, body: bytes) -> None:
        raise Answer(200, STATE.log)

    def look(self, body: bytes, name: str) -> None:
        if name not in STATE.repos:
            raise Answer(200, None)
        repo = STATE.repos[name]
        commits = {oid: {path: sha256(file[0]) for path, file in files.items()} for oid, files in repo.commits.items()}
        raise Answer(200, {"private": repo.private, "branches": repo.branches, "commits": commits})

    def plant(self, body: bytes, name: str) -> None:
        """Put files, path -> text, into a repository as they are, as somebody with other tools may."""
        repo = STATE.repos[name]
        planted = {path: (text.encode(), False) for path, text in json.loads(body).items()}
        repo.commit("main", repo.commits[repo.branches["main"]] | planted)
        raise Answer(200, {})

    def url(self, path: str) -> str:
        return f"http://{urlsplit('//' + self.headers['Host']).netloc}/{path}"


NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{NAME}/branch/(.+)", Handler.branch),
    (rf"POST /api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (rf"POST /api/models/{NAME}/commit/(.+)", Handler.commit),
    (rf"GET /api/models/{NAME}/tree/([^/]+)", Handler.tree),
    (rf"GET /api/models/{NAME}/revision/(.+)", Handler.info),
    (rf"GET /api/models/{NAME}", Handler.info),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"POST /_large/verify", Handler.verify_large),
    (r"PUT /_large/(\w+)", Handler.put_large),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    (r"POST /_control/faults", Handler.set_faults),
    (r"POST /_control/reset", Handler.reset),
    (r"GET /_control/log", Handler.get_log),
    (rf"GET /_control/repo/{NAME}", Handler.look),
    (rf"POST /_control/plant/{NAME}", Handler.plant),
]


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
