import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch

from snlp_zoo import build, load
from snlp_zoo.errors import CheckpointError
from snlp_zoo.train.files import recover_folder, replace_file, replace_folder, write_json


def fill(text):
    def write(folder):
        (folder / "one").write_text(text)
        (folder / "two").write_text(text)

    return write


def content(folder):
    """Every file of a folder; what is beside it must be gone."""
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return {path.name: path.read_text() for path in folder.iterdir()}


@contextmanager
def full_disk(limit):
    """No file grows beyond `limit` bytes: write() fails with EFBIG, as it does with ENOSPC on a full disk."""
    handler, before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "place"


@pytest.fixture
def target(place):
    replace_folder(place / "model", fill("old"))
    return place / "model"


def test_a_new_folder_replaces_the_old_one(target):
    assert content(target) == {"one": "old", "two": "old"}
    replace_folder(target, lambda folder: (folder / "three").write_text("new"))
    assert content(target) == {"three": "new"}


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_write_that_fails_half_way_leaves_the_old_folder(target, error):
    def write(folder):
        (folder / "one").write_text("new")
        raise error

    with pytest.raises(CheckpointError, match=str(error)):
        replace_folder(target, write)
    assert content(target) == {"one": "old", "two": "old"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_whatever_stops_a_write_leaves_the_old_folder(target, error):
    def write(folder):
        (folder / "one").write_text("new")
        raise error

    with pytest.raises(error):
        replace_folder(target, write)
    assert (target / "one").read_text() == "old"
    replace_folder(target, fill("new"))  # leftovers are not in the way
    assert content(target) == {"one": "new", "two": "new"}


def test_a_first_write_that_fails_leaves_nothing(place):
    def write(folder):
        raise OSError("no")

    with pytest.raises(CheckpointError):
        replace_folder(place / "model", write)
    assert list(place.iterdir()) == []


def crash_at_rename(monkeypatch, number):
    """The process dies at rename `number` (from 1) of those that follow."""
    real, calls = os.rename, []

    def rename(*arguments, **more):
        calls.append(arguments)
        if len(calls) == number:
            raise SystemExit("killed")
        return real(*arguments, **more)

    monkeypatch.setattr(os, "rename", rename)


@pytest.mark.parametrize("number", [1, 2])
def test_a_crash_at_either_rename_is_recovered_from(target, monkeypatch, number):
    with monkeypatch.context() as patch:
        crash_at_rename(patch, number)
        with pytest.raises(SystemExit):
            replace_folder(target, fill("new"))
    assert target.exists() == (number == 1)
    recover_folder(target)
    assert content(target) == {"one": "old", "two": "old"}


def test_a_crash_before_the_old_folder_is_removed_keeps_the_new_one(target, monkeypatch):
    with monkeypatch.context() as patch:
        crash_at_rename(patch, 3)
        replace_folder(target, fill("new"))
    leftover = target.with_name(f".{target.name}.old")
    leftover.mkdir()
    recover_folder(target)
    assert content(target) == {"one": "new", "two": "new"}


def test_a_second_rename_that_fails_brings_the_old_folder_back(target, monkeypatch):
    real, calls = os.rename, []

    def rename(*arguments, **more):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("disk gone")
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(CheckpointError, match="disk gone"):
            replace_folder(target, fill("new"))
    assert content(target) == {"one": "old", "two": "old"}


def test_recovering_where_nothing_happened_changes_nothing(target):
    recover_folder(target)
    assert content(target) == {"one": "old", "two": "old"}
    recover_folder(target.parent / "other")
    assert content(target) == {"one": "old", "two": "old"}


def test_a_full_disk_leaves_the_previous_checkpoint_loadable(place):
    target, first, second = place / "model", build("spikelm_tiny"), build("spikelm_tiny", hidden_size=64)
    replace_folder(target, first.save_pretrained)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with full_disk(20_000), pytest.raises(CheckpointError, match="what was there before is unchanged"):
        replace_folder(target, second.save_pretrained)  # 280 KB of weights, 1 KB of configuration
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in place.iterdir()] == ["model"]
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(load(target)(ids).logits, first(ids).logits)


def test_a_full_disk_while_torch_saves_leaves_the_old_folder(target):
    with full_disk(20_000), pytest.raises(CheckpointError):
        replace_folder(target, lambda folder: torch.save(torch.zeros(50_000), folder / "optimizer.bin"))
    assert content(target) == {"one": "old", "two": "old"}


def test_a_path_below_a_file_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot write .*file.model"):
        replace_folder(file / "model", fill("new"))
    with pytest.raises(CheckpointError, match=r"cannot write .*summary.json"):
        write_json(file / "summary.json", {})
    assert file.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_cannot_be_written(target):
    target.parent.chmod(0o500)
    try:
        with pytest.raises(CheckpointError):
            replace_folder(target, fill("new"))
    finally:
        target.parent.chmod(0o700)
    assert content(target) == {"one": "old", "two": "old"}


def test_replace_file_is_all_or_nothing(place):
    path = place / "deep" / "summary.json"
    replace_file(path, "old")
    with full_disk(1_000), pytest.raises(CheckpointError, match=r"cannot write .*summary.json"):
        replace_file(path, "new" * 10_000)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
