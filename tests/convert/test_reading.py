"""Files from elsewhere: what is no state dict is one clear error, runs nothing and allocates nothing."""

import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from snlp_zoo.convert.reading import read_ggmf, read_pth
from snlp_zoo.errors import CheckpointError

SMALL = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(1, 1, 3)}


def saved(tmp_path, content, **options):
    path = tmp_path / "x.pth"
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize(
    "content",
    [
        SMALL,
        OrderedDict(SMALL),
        {"model": SMALL, "step": 7},
        {"state_dict": {f"module.{name}": x for name, x in SMALL.items()}},
        {name: nn.Parameter(x) for name, x in SMALL.items()},
    ],
)
def test_state_dicts_are_found_where_people_put_them(tmp_path, content):
    found = read_pth(saved(tmp_path, content))
    assert found.keys() == SMALL.keys()
    assert all(torch.equal(found[name], SMALL[name]) for name in SMALL)


def test_half_precision_is_kept_as_it_is(tmp_path):
    halves = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(3, dtype=torch.float16)}
    assert {name: x.dtype for name, x in read_pth(saved(tmp_path, halves)).items()} == {
        "a": torch.bfloat16,
        "b": torch.float16,
    }


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("where", ["whole", "inside"])
def test_code_is_never_run(tmp_path, where):
    marker = tmp_path / "ran"
    path = saved(tmp_path, Bomb(marker) if where == "whole" else {**SMALL, "extra": Bomb(marker)})
    with pytest.raises(CheckpointError, match="would run code, which is refused"):
        read_pth(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the file does what this test is about
    assert marker.exists()


@pytest.mark.parametrize("write", [pickle.dump, lambda x, f: torch.save(x, f, _use_new_zipfile_serialization=False)])
def test_plain_pickles_are_not_opened(tmp_path, write):
    marker, path = tmp_path / "ran", tmp_path / "x.pth"
    with path.open("wb") as file:
        write({"extra": Bomb(marker)}, file)
    with pytest.raises(CheckpointError, match=r"not a whole file of torch\.save"):
        read_pth(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(3)], "holds a list, not a state dict"),
        (torch.ones(3), "holds a Tensor, not a state dict"),
        ({}, "holds a dict, not a state dict"),
        ({"a": 3}, "'a' is a int, not a tensor"),
        ({3: torch.ones(3)}, "'3' is a Tensor"),
        ({"a": {"b": torch.ones(3)}}, "'a' is a dict, not a tensor"),
        ({"a": torch.ones(3, dtype=torch.int8)}, r"a is torch\.int8.*nothing quantised"),
        ({"a": torch.eye(3).to_sparse()}, "dense floats"),
        ({"a": torch.empty(10**9, device="meta")}, "dense floats"),
        ({"a": torch.ones(1).expand(10**12)}, "its tensors claim 4000000000000 bytes, it holds 4"),
    ],
    ids=["list", "tensor", "empty", "number", "no name", "nested", "int8", "sparse", "meta", "expanded"],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_what_is_no_state_dict_is_said_in_a_sentence(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        read_pth(saved(tmp_path, content))


@pytest.mark.parametrize("keep", [0, 3, 0.3, 0.9, 0.999])
def test_truncated_files(tmp_path, keep):
    path = saved(tmp_path, SMALL)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r"not a whole file of torch\.save"):
        read_pth(path)


def test_missing_files_and_folders(tmp_path):
    for path, message in (
        (tmp_path, "not a whole file"),
        (tmp_path / "nothing.pth", r"nothing\.pth: there is no such"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_pth(path)


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The archive with every part changed by `change(name, bytes)`."""
    with zipfile.ZipFile(path) as old:
        parts = {name: change(name, old.read(name)) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in parts.items():
            new.writestr(name, content)
    return path


def test_packed_archives_are_not_unpacked(tmp_path):
    path = saved(tmp_path, {"a": torch.zeros(10**6)})
    rewritten(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    with pytest.raises(CheckpointError, match="packs nothing"):
        read_pth(path)


def test_an_endless_list_of_tensors_is_refused(tmp_path):
    path = rewritten(
        saved(tmp_path, SMALL), lambda name, content: content + bytes(17 << 20) * name.endswith("data.pkl")
    )
    with pytest.raises(CheckpointError, match="its list of tensors has more than"):
        read_pth(path)


def test_a_storage_smaller_than_its_tensor(tmp_path):
    path = rewritten(saved(tmp_path, SMALL), lambda name, content: content[:4] if "/data/" in name else content)
    with pytest.raises(CheckpointError, match="its tensors claim 36 bytes, it holds 8"):
        read_pth(path)


def test_random_damage_is_an_error_or_other_numbers(tmp_path):
    generator = np.random.default_rng(0)
    content = saved(tmp_path, SMALL).read_bytes()
    path = tmp_path / "damaged.pth"
    for _ in range(300):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[generator.integers(len(damaged), size=4)] = generator.integers(256, size=4)
        path.write_bytes(damaged.tobytes())
        try:
            found = read_pth(path)
        except CheckpointError:
            continue
        assert sum(x.nbytes for x in found.values()) <= len(content)


# rwkv.cpp


def record(name, tensor, kind=0, shape=None, length=None):
    dtype = {0: "<f4", 1: "<f2"}.get(kind, "<f4")
    axes = list(tensor.shape)[::-1] if shape is None else shape
    encoded = name.encode()
    head = struct.pack(f"<3I{len(axes)}I", len(axes), len(encoded) if length is None else length, kind, *axes)
    return head + encoded + tensor.numpy().astype(dtype).tobytes()


def ggmf(*records, version=100, sizes=(2, 3, 1)):
    return b"fmgg" + struct.pack("<5I", version, *sizes, 0) + b"".join(records)


EMB, BLOCK = record("emb.weight", SMALL["a.weight"]), record("blocks.0.ln1.bias", torch.arange(3.0))


def test_a_file_of_rwkv_cpp(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(ggmf(EMB, record("blocks.0.x", torch.arange(4.0).view(2, 2), kind=1)))
    found = read_ggmf(path)
    assert torch.equal(found["emb.weight"], SMALL["a.weight"])
    assert found["blocks.0.x"].tolist() == [[0, 1], [2, 3]]
    assert {x.dtype for x in found.values()} == {torch.float32}


def test_random_damage_of_files_of_rwkv_cpp(tmp_path):
    generator = np.random.default_rng(0)
    content, path = ggmf(EMB, BLOCK), tmp_path / "x.bin"
    errors = 0
    for _ in range(300):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[generator.integers(len(damaged), size=2)] = generator.integers(256, size=2)
        path.write_bytes(damaged.tobytes())
        try:
            assert sum(x.nbytes for x in read_ggmf(path).values()) <= 2 * len(content)  # halves become floats
        except CheckpointError:
            errors += 1
    assert 50 < errors < 300  # the rest hit numbers and names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ggmf(EMB, BLOCK, version=7), "format 7"),
        (ggmf(EMB, BLOCK, sizes=(2, 3, 2)), "says 2 layers .* its tensors 1 and"),
        (ggmf(EMB, BLOCK, sizes=(4, 3, 1)), r"embeddings \[4, 3\], its tensors 1 and \[2, 3\]"),
        (ggmf(BLOCK), "its tensors 1 and"),
        (ggmf(EMB, BLOCK)[:-1], "claims .* more than the file has"),
        (ggmf(EMB, BLOCK)[:30], "inside a tensor's header"),
        (b"fmgg\x64", "inside a tensor's header"),
        (ggmf(EMB, EMB), "emb.weight is there twice"),
        (ggmf(EMB, record("blocks.0.x", torch.ones(2), kind=2)), "of type 2, quantised"),
        (ggmf(EMB, record("blocks.0.x", torch.ones(2), shape=[2**31, 2**31])), "more than the file has"),
        (ggmf(EMB, record("blocks.0.x", torch.ones(2), shape=[1] * 9)), "a tensor of 9 axes"),
        (ggmf(EMB, record("blocks.0.x", torch.ones(2), length=10**6)), "a name of 1000000 bytes"),
    ],
)
def test_damaged_files_of_rwkv_cpp(tmp_path, content, message):
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_ggmf(path)
