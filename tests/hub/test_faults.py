"""Everything that goes wrong between here and the Hub: success with the same weights, or one clear sentence."""

import random
import re

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file

import snlp_zoo
from snlp_zoo.errors import CheckpointError, HubError
from snlp_zoo.hub import find_checkpoint
from snlp_zoo.hub.client import digest

ROUTES = {
    "create": "POST /api/repos/create",
    "validate": "POST /api/validate-yaml",
    "head": "GET /api/models/user/m/revision",
    "tree": "GET /api/models/user/m/tree",
    "preupload": "POST /api/models/user/m/preupload",
    "batch": "POST /user/m.git",
    "put": "PUT /_large",
    "verify": "POST /_large/verify",
    "commit": "POST /api/models/user/m/commit",
    "look": "HEAD /user/m/resolve",
    "weights": "GET /user/m/resolve/.*safetensors",
    "config": "GET /user/m/resolve/.*config",
}
UPLOAD, DOWNLOAD = list(ROUTES)[:9], ["head", "tree", "look", "weights", "config"]
LOAD = """
model = snlp_zoo.load("user/m"{options})
answer = {{name: float(tensor.double().sum()) for name, tensor in model.state_dict().items()}}
"""


def fault(route, kind, **more):
    return {"pattern": ROUTES[route], "kind": kind, **more}


def publish(folder):
    return f"answer = snlp_zoo.publish({str(folder)!r}, 'user/m').commit"


def load(options=""):
    return LOAD.format(options=options)


@pytest.fixture(scope="module")
def weights(saved):
    """What `load` answers for the undamaged model."""
    return {name: float(tensor.double().sum()) for name, tensor in load_file(saved / "model.safetensors").items()}


@pytest.fixture
def holds(hub, saved):
    """Function: whether a branch's head is all of the saved model."""

    def look():
        head = hub.head("user/m")
        return (
            head.get("model.safetensors") == digest(saved / "model.safetensors", like="0" * 64) and "README.md" in head
        )

    return look


@pytest.fixture
def published(hub, client, saved):
    client.run(publish(saved), "hf_write")
    return hub


# ---- uploads that succeed all the same ----

PASSING = [(route, kind, 503) for route in UPLOAD for kind in ("status", "reset")]
PASSING += [("commit", "lost", 0), ("commit", "stale", 0), ("commit", "truncate", 0), ("create", "lost", 0)]
PASSING += [("put", "lost", 0), ("put", "slow", 0), ("tree", "truncate", 0), ("head", "drop", 0), ("commit", "drop", 0)]
PASSING += [("commit", "status", status) for status in (409, 412, 429, 500, 502, 504)]


def test_troubles_of_an_upload_that_pass(hub, client, saved, holds):
    for route, kind, status in PASSING:
        hub.reset()
        hub.faults(fault(route, kind, status=status))
        commit = client.run(publish(saved), "hf_write")
        assert holds(), (route, kind, status)
        assert commit == hub.repo("user/m")["branches"]["main"]
        ours = 2 if kind != "stale" else 3  # no commit is made twice, also where its answer was lost
        assert len(hub.repo("user/m")["commits"]) == ours, (route, kind, status)


def test_an_upload_goes_on_where_it_broke_off(hub, client, client_error, saved, holds):
    hub.faults(fault("commit", "status", status=503, times=99))
    with pytest.raises(client_error, match=r"503 for user/m .*run it again later") as caught:
        client.run(publish(saved), "hf_write")
    assert caught.value.kind == "HubError"
    assert set(hub.head("user/m")) == {".gitattributes"}
    assert sum(line.startswith("PUT") for line in hub.log()) == 1  # in all of the tries together
    hub.faults()
    client.run(publish(saved), "hf_write")
    assert sum(line.startswith("PUT") for line in hub.log()) == 1
    assert holds()


@pytest.mark.parametrize(
    ("token", "repository", "faults", "expected"),
    [
        ("", "user/m", [], "401.*hf auth login.*HF_TOKEN"),
        ("hf_wrong", "user/m", [], "401.*hf auth login"),
        ("hf_read", "user/m", [], "403.*needs write access"),
        ("hf_write", "other/m", [], "403.*write access"),
        ("hf_write", "user/m", [fault("head", "status", status=404, times=99)], "404.*check the name"),
        ("hf_write", "user/m", [fault("commit", "status", status=409, times=99)], "409.*run it again"),
        ("hf_write", "user/m", [fault("commit", "stale", times=99)], "412.*somebody else"),
        ("hf_write", "user/m", [fault("create", "status", status=429, times=99)], "429.*wait some minutes"),
        ("hf_write", "user/m", [fault("head", "status", status=500, times=99)], "500.*problem of its own"),
        ("hf_write", "user/m", [fault("commit", "reset", times=99)], "no connection to the Hub at http://127"),
        ("hf_write", "user/m", [fault("put", "reset", times=99)], "no connection to the Hub at http://127"),
        ("hf_write", "user/m", [fault("put", "flip")], "400 .*does not accept"),
        ("hf_write", "user/m", [fault("validate", "status", status=400)], "user/m: Invalid metadata in README.md"),
    ],
)
def test_an_upload_that_fails_says_why(hub, client, client_error, saved, token, repository, faults, expected):
    hub.faults(*faults)
    with pytest.raises(client_error) as caught:
        client.run(f"snlp_zoo.publish({str(saved)!r}, {repository!r})", token)
    assert caught.value.kind == "HubError"
    assert re.search(expected, caught.value.message), caught.value.message
    assert len(caught.value.message) < 500
    assert not token or token not in caught.value.message
    repo = hub.repo(repository)
    if repo:  # whatever was sent, the head is what it was
        assert not {name for name in hub.head(repository) if "safetensors" in name}
    if faults:
        hub.faults()
        client.run(publish(saved), token)
        assert "model.safetensors" in hub.head(repository)


def test_a_card_that_the_hub_refuses(hub, client, client_error, saved):
    with pytest.raises(client_error, match=r'Invalid metadata in README\.md.*"license" must be one of') as caught:
        client.run(f"snlp_zoo.publish({str(saved)!r}, 'user/m', licence='no-such')", "hf_write")
    assert caught.value.kind == "HubError"
    assert not [line for line in hub.log() if line.startswith("PUT")]  # found before anything was sent


# ---- downloads ----

MENDED = [(route, kind) for route in DOWNLOAD for kind in ("status", "reset", "slow")]
MENDED += [("weights", "truncate"), ("config", "truncate"), ("tree", "truncate"), ("weights", "drop")]


def test_troubles_of_a_download_that_pass(published, client, weights):
    for route, kind in MENDED:
        client.forget()
        published.faults(fault(route, kind, seconds=0.1))
        assert client.run(load(", verify=True")) == weights, (route, kind)
    client.forget()
    published.faults(fault("weights", "status", status=429))
    assert client.run(load()) == weights


@pytest.mark.parametrize(
    ("name", "options", "faults", "expected"),
    [
        ("user/nobody", "", [], "no folder and no zoo entry called 'user/nobody'; the Hub answers 401.*check the name"),
        ("user/m", ", revision='v9'", [], "404.*check the name and the revision"),
        ("user/m", "", [fault("weights", "status", status=403)], "403"),
        ("user/m", "", [fault("weights", "status", status=503, times=99)], "503.*run it again later"),
        ("user/m", "", [fault("head", "status", status=500, times=99)], "500.*problem of its own"),
        ("user/m", "", [fault("weights", "reset", times=99)], "no connection to the Hub"),
    ],
)
def test_a_download_that_fails_says_why(published, client, client_error, name, options, faults, expected):
    client.forget()
    published.faults(*faults)
    with pytest.raises(client_error) as caught:
        client.run(f"snlp_zoo.load({name!r}{options})")
    assert caught.value.kind == "HubError"
    assert re.search(expected, caught.value.message), caught.value.message


def test_a_flipped_byte_is_found_and_mended(published, client, client_error, weights):
    client.forget()
    published.faults(fault("weights", "flip"))
    assert client.run(load()) != weights  # safetensors have no checksum of their own
    with pytest.raises(client_error, match=r"model\.safetensors of user/m is damaged.*remove (\S+) and load") as caught:
        client.run(load(", verify=True"))
    assert caught.value.kind == "CheckpointError"
    blob = re.search(r"remove (\S+) and", caught.value.message)[1]
    client.run(f"import os; os.remove({blob!r})")
    assert client.run(load(", verify=True")) == weights


def test_a_flipped_byte_of_the_header_is_found_by_itself(published, client, client_error, weights):
    client.forget()
    published.faults(fault("weights", "flip", position=7))
    with pytest.raises(client_error, match="cannot load") as caught:
        client.run(load())
    assert caught.value.kind == "CheckpointError"
    with pytest.raises(client_error, match=r"model\.safetensors of user/m is damaged"):
        client.run(load(", verify=True"))


def test_a_file_that_the_hub_does_not_know(published, client, client_error):
    client.forget()
    folder = client.run("from snlp_zoo.hub import find_checkpoint; answer = str(find_checkpoint('user/m'))")
    client.run(f"open('{folder}/model.safetensors.index.json', 'w').write('{{}}')")
    with pytest.raises(client_error, match=r"index\.json is not in the Hub's record"):
        client.run(load(", verify=True"))


def test_the_cache_serves_where_the_hub_does_not(published, client, weights, monkeypatch):
    client.forget()
    client.run(load())
    published.faults({"pattern": "", "kind": "status", "times": 999})
    assert client.run(load()) == weights  # a Hub in trouble
    requests = len(published.log())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(client.cache / "hub"))  # this process is offline
    model = snlp_zoo.load("user/m", verify=True)
    assert {name: float(tensor.double().sum()) for name, tensor in model.state_dict().items()} == weights
    for name, revision in (("user/other", None), ("user/m", "v9")):
        with pytest.raises(HubError, match=f"HF_HUB_OFFLINE keeps {name} out of reach, and the cache"):
            snlp_zoo.load(name, revision=revision)
    weights_file = (find_checkpoint("user/m") / "model.safetensors").resolve()
    data = bytearray(weights_file.read_bytes())
    data[-2] ^= 1
    weights_file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors of user/m is damaged"):
        snlp_zoo.load("user/m", verify=True)
    weights_file.unlink()
    with pytest.raises(HubError, match="cache does not hold all of it"):
        snlp_zoo.load("user/m")
    assert len(published.log()) == requests


def test_nobody_there(client, client_error, saved):
    for code in ("snlp_zoo.load('user/m')", publish(saved)):
        with pytest.raises(
            client_error, match=r"no connection to the Hub at http://127\.0\.0\.1:9 .*check the network"
        ):
            client.run(f"from huggingface_hub import constants; constants.ENDPOINT = 'http://127.0.0.1:9'; {code}")
    client.run(f"from huggingface_hub import constants; constants.ENDPOINT = {client.endpoint!r}")


def test_the_token_is_told_to_nobody(hub, client, client_error, saved):
    hub.faults(fault("commit", "status", times=2))
    report = client.run(
        f"from dataclasses import asdict; answer = asdict(snlp_zoo.publish({str(saved)!r}, 'user/m'))", "hf_write"
    )
    with pytest.raises(client_error) as caught:
        client.run(publish(saved).replace("user/m", "other/m"), "hf_write")
    told = client.log.read_text()
    assert "503 for user/m" in told  # the tries are told
    for text in (str(report), caught.value.message, told, *(path.read_text() for path in client.cache.rglob("*.json"))):
        assert "hf_write" not in text


# ---- schedules of faults, and kills ----


def campaign(hub, client, saved, weights, holds, seeds):
    """Random faults on an upload, then on a download: counts of what succeeded."""
    counts = {"uploads": 0, "downloads": 0}
    for seed in seeds:
        rng = random.Random(seed)
        hub.reset()
        client.forget()
        kinds = ["status", "drop", "reset", "lost", "truncate", "flip", "slow", "stale"]

        def schedule(routes, kinds=kinds, rng=rng):
            for _ in range(rng.randint(1, 4)):
                more = {"status": rng.choice([429, 500, 502, 503, 504]), "seconds": 0.05}
                times, skip = rng.choice([1, 1, 2]), rng.choice([0, 0, 1])
                yield fault(rng.choice(routes), rng.choice(kinds), times=times, skip=skip, **more)

        hub.faults(*schedule(UPLOAD))
        _, error = client.outcome(publish(saved), "hf_write")
        if error is None:
            counts["uploads"] += 1
        else:
            assert error.kind == "HubError", (seed, error)
            assert hub.repo("user/m") is None or holds() or "model.safetensors" not in hub.head("user/m"), seed
            hub.faults()
            client.run(publish(saved), "hf_write")  # what passes, passes
        assert holds(), seed
        hub.faults(*schedule(DOWNLOAD))
        answer, error = client.outcome(load(", verify=True"))
        if error is None:
            counts["downloads"] += 1
            assert answer == weights, seed
        else:
            assert error.kind in ("HubError", "CheckpointError"), (seed, error)
    return counts


def test_random_faults(hub, client, saved, weights, holds):
    counts = campaign(hub, client, saved, weights, holds, range(1000, 1003))
    assert counts["uploads"] + counts["downloads"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_random_fault_schedules(hub, client, saved, weights, holds):
    counts = campaign(hub, client, saved, weights, holds, range(100))
    print(counts)  # noqa: T201
    assert min(counts.values()) >= 50


KILLED = """
import os, random, signal
from huggingface_hub import close_session
rng = random.Random({seed})
for i in range({kills}):
    close_session()
    pid = os.fork()
    if pid == 0:
        snlp_zoo.publish([{small!r}, {large!r}][i % 2], "user/m")
        os._exit(0)
    sleep(rng.uniform(0, {longest}))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
close_session()
answer = snlp_zoo.publish({small!r}, "user/m").commit
"""


def test_a_killed_upload_leaves_a_complete_head(hub, client, saved, holds, tmp_path):
    """Two models of different files in turn, killed at random: every commit there ever was is one of them, whole."""
    large = tmp_path / "shards"
    snlp_zoo.load(saved).save_pretrained(large, max_shard_size="40KB")
    whole = [set(snlp_zoo.publish(path, "user/m", dry_run=True).files) | {".gitattributes"} for path in (saved, large)]
    hub.faults({"pattern": "", "kind": "slow", "seconds": 0.01, "times": 9999})
    code = KILLED.format(seed=0, kills=20, small=str(saved), large=str(large), longest=0.8)
    commit = client.run(code, "hf_write")
    repo = hub.repo("user/m")
    assert repo["branches"]["main"] == commit
    assert holds()
    contents = [set(files) for files in repo["commits"].values()][1:]
    for files in contents:
        tokenizer = {"tokenizer.json", "tokenizer_config.json"}
        assert files in whole or files - tokenizer in whole, files
    print(len(contents), "commits")  # noqa: T201
