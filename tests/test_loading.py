"""Saved models that are damaged, hostile or of another model: loading refuses them before it allocates."""

import json
import math
import os
import re
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig
from transformers.utils import logging as transformers_logging

import snlp_zoo
from snlp_zoo.errors import CheckpointError
from snlp_zoo.models.checkpoint import HEADER_BYTES
from snlp_zoo.registry import build, load_entry, load_tokenizer

ROOT = Path(__file__).parent.parent
IDS = torch.arange(5, 13)[None]


@pytest.fixture
def saved(tmp_path):
    """A saved classifier: one safetensors file, config.json."""
    build("spikelm_tiny").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    build("spikelm_tiny").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change):
    """Apply `change` to the dictionary of saved tensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, message):
    """By `load` and by the Auto class, in one sentence that names a file."""
    for read in (snlp_zoo.load, AutoModelForSequenceClassification.from_pretrained):
        with pytest.raises(CheckpointError, match=message) as error:
            read(folder)
        assert "\n" not in str(error.value)
        assert str(folder) in str(error.value)


def test_tensors_that_are_not_there(saved):
    rewrite(saved, lambda weights: weights.pop("spikelm.layers.1.mlp.up.weight"))
    refused(saved, r"missing or misshapen: spikelm\.layers\.1\.mlp\.up\.weight is in no file; .*allow_missing=True")
    for model in (
        snlp_zoo.load(saved, allow_missing=True),
        AutoModelForSequenceClassification.from_pretrained(saved, allow_missing=True),
    ):
        assert model.spikelm.layers[1].mlp.up.weight.isfinite().all()


def test_tensors_of_another_shape(saved):
    rewrite(saved, lambda weights: weights.update({"classifier.weight": torch.zeros(5, 32)}))
    shapes = r"classifier\.weight is \[5, 32\] in model\.safetensors, \[2, 32\] in the model"
    refused(saved, shapes + ".*ignore_mismatched_sizes=True")
    model = AutoModelForSequenceClassification.from_pretrained(saved, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (2, 32)


def test_tensors_without_a_place(saved):
    rewrite(saved, lambda weights: weights.update({"spikelm.extra": torch.zeros(3)}))
    refused(saved, r"spikelm\.extra in model\.safetensors has no place in the model; save it again with SpikeLMForSeq")


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("classifier.weight", torch.int32, "classifier.weight is I32 in model.safetensors, torch.float32 in the model"),
        ("classifier.weight", torch.float8_e4m3fn, "classifier.weight is F8_E4M3 in model.safetensors"),
        ("classifier.bias", torch.bool, "classifier.bias is BOOL in"),
        ("spikelm.layers.0.mlp.up.neuron.initialized", torch.float32, "is F32 in model.safetensors, torch.bool in"),
    ],
)
def test_tensors_of_another_kind(saved, name, dtype, message):
    rewrite(saved, lambda weights: weights.update({name: weights[name].to(dtype)}))
    refused(saved, re.escape(message))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_kinds_of_floats_are_interchangeable(saved, dtype):
    rewrite(
        saved, lambda weights: weights.update({k: v.to(dtype) for k, v in weights.items() if v.is_floating_point()})
    )
    assert snlp_zoo.load(saved).classifier.weight.dtype == torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(saved, value):
    rewrite(saved, lambda weights: weights["spikelm.layers.0.mlp.down.weight"].view(-1)[17].fill_(value))
    refused(saved, r"spikelm\.layers\.0\.mlp\.down\.weight holds NaN or Inf as torch\.float32")


def test_weights_too_large_for_a_narrow_type(saved):
    rewrite(saved, lambda weights: weights["classifier.weight"].view(-1)[0].fill_(1e6))
    assert snlp_zoo.load(saved).classifier.weight.max() == 1e6
    with pytest.raises(CheckpointError, match=r"classifier\.weight holds NaN or Inf as torch\.float16"):
        snlp_zoo.load(saved, dtype=torch.float16)


def test_headers(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    damaged = {
        "its header claims 0 bytes": bytes(8),
        f"its header claims {2**63} bytes, more than {HEADER_BYTES}": struct.pack("<Q", 2**63) + whole[8:],
        "model.safetensors: .*[Hh]eader": whole[: 8 + length // 2],
        "model.safetensors: .*[Mm]etadata|model.safetensors: .*[Bb]uffer": whole[:-4],
        "model.safetensors: .*; save or download it again": b"",
        "model.safetensors: .*download it again": whole[:8] + b"x" * length + whole[8 + length :],
    }
    for message, data in damaged.items():
        path.write_bytes(data)
        refused(saved, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 10**12}, "hidden_size must be between 1 and 32768, got 1000000000000"),
        ({"time_steps": 1025}, "time_steps must be between 1 and 1024"),
        ({"num_labels": 10**9}, "num_labels must be between 0 and 65536, got 1000000000"),
        ({"num_labels": "many"}, "num_labels must be between"),
        ({"id2label": {"x": "a"}}, "config.json"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps must be between 0 and 1, got nan"),
        ({"firing_k": math.inf}, "firing_k must be at most"),
        ({"initializer_range": "wide"}, "initializer_range"),
        ({"chunk_size_feed_forward": 10**30}, "chunk_size_feed_forward must be at most"),
        ({"pad_token_id": 120}, "pad_token_id must be below vocab_size 120, got 120"),
        ({"hidden_act": "no_such"}, "hidden_act 'no_such'"),
        ({"dtype": "load"}, "dtype must be one of float32, bfloat16, float16, float64, got 'load'"),
        ({"dtype": None, "torch_dtype": "int8"}, "dtype must be one of .*got 'int8'"),
        ({"architectures": "SpikeLMModel"}, "not a model of this zoo"),
        ({"architectures": []}, "not a model of this zoo"),
        ({"model_type": "bert"}, "not a model of this zoo"),
        ({"model_type": ["spikelm"]}, "not a model of this zoo"),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "has no config field 'auto_map'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "has no config field 'quantization_config'"),
        ({"transformers_weights": "../x.safetensors"}, "has no config field 'transformers_weights'"),
        ({"configuration_files": ["config.1.0.json"]}, "has no config field 'configuration_files'"),
        ({"fusion_config": {}}, "has no config field 'fusion_config'"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation must name none from elsewhere"),
        ({"time_stepz": 3}, "no config field 'time_stepz'; did you mean 'time_steps'"),
        ({"label_names": ["a"]}, "has no config field 'label_names'"),
    ],
)
def test_hostile_configurations(saved, change, message):
    edit(saved / "config.json", **change)
    with pytest.raises(CheckpointError, match=message) as error:
        snlp_zoo.load(saved)
    assert "\n" not in str(error.value)
    if message != "not a model of this zoo":
        with pytest.raises((ValueError, OSError, StrictDataclassError)):
            AutoModel.from_pretrained(saved)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"a": ' * 100_000, "[" * 100_000, " " * (1 << 20) + "{}", '{"a": ' + "9" * 5000 + "}"],
)
def test_configurations_that_are_no_json_mapping(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"cannot load .*config\.json: ") as error:
        snlp_zoo.load(saved)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 512},
        {"hidden_size": 32_768},
        {"vocab_size": 2_000_000, "intermediate_size": 262_144},
        {"max_position_embeddings": 1_048_576},
        {"num_labels": 65_536},
    ],
)
def test_a_configuration_within_bounds_allocates_only_what_the_files_hold(saved, change):
    snlp_zoo.load(saved)
    edit(saved / "config.json", **change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(saved, "in the model|must be of one model")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KB


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, None])
def test_an_index_names_only_files_beside_it(sharded, name):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["classifier.bias"] = name
    index.write_text(json.dumps(content))
    refused(sharded, "is not the name of a safetensors file beside it")


def test_indices_that_do_not_fit(sharded):
    index = sharded / "model.safetensors.index.json"
    text = index.read_text()
    shards = sorted(set(json.loads(text)["weight_map"].values()))
    for changes, message in [
        ({"weight_map": []}, "must hold 'metadata' and a 'weight_map'"),
        ({"metadata": None}, "must hold 'metadata' and a 'weight_map'"),
        ({"weight_map": json.loads(text)["weight_map"] | {"x": shards[0]}}, "'x' should be in model-00001.*, is in No"),
    ]:
        index.write_text(text)
        edit(index, **changes)
        refused(sharded, message)
    index.write_text(text)
    content = json.loads(text)
    moved = "spikelm.embeddings.LayerNorm.bias"
    placed, content["weight_map"][moved] = content["weight_map"][moved], shards[-1]
    assert placed != shards[-1]
    index.write_text(json.dumps(content))
    refused(sharded, f"'{re.escape(moved)}' should be in {shards[-1]}, is in {placed}")
    index.write_text(text)
    (sharded / shards[1]).rename(sharded / "away")
    refused(sharded, f"{shards[1]} is missing; save or download it again")


def test_tensors_in_two_shards(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    save_file(load_file(shards[0]) | load_file(shards[1]), shards[1])
    refused(
        sharded, f"({shards[1].name}: .* is in {shards[0].name} too|{shards[0].name}: .* is in {shards[1].name} too)"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_out_of_the_folder(saved, name):
    outside = saved.parent / "outside"
    (saved / name).rename(outside)
    (saved / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{name}: it points outside its folder, to .*outside"):
        snlp_zoo.load(saved)
    (saved / name).unlink()
    outside.rename(saved / "elsewhere")
    (saved / name).symlink_to("elsewhere")  # inside is fine
    assert snlp_zoo.load(saved)(IDS).logits.isfinite().all()


@pytest.mark.parametrize("name", ["adapter_config.json", "shard-00001-model-00001-of-00002.safetensors"])
def test_files_that_would_be_loaded_in_place_of_the_weights(saved, name):
    (saved / name).write_text("{}")
    refused(saved, f"it also holds {name}; put the model in a folder of its own")


def hub_cache(folder, cache, commit="0123456789abcdef0123456789abcdef01234567"):
    """The folder as the Hub's client keeps it: blobs, and links to them in a snapshot."""
    repository = cache / "models--someone--tiny"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(repository / "blobs" / str(i))
        (repository / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{i}")
    return repository / "snapshots" / commit


@pytest.mark.parametrize("layout", ["saved", "sharded"])
def test_a_hub_id_from_the_cache_without_a_network(layout, request, tmp_path):
    folder = request.getfixturevalue(layout)
    expected = snlp_zoo.load(folder)(IDS).logits
    snapshot = hub_cache(folder, tmp_path / "cache")
    assert torch.equal(snlp_zoo.load(snapshot)(IDS).logits, expected)
    options = {"cache_dir": tmp_path / "cache"}
    model = AutoModelForSequenceClassification.from_pretrained("someone/tiny", **options)
    assert torch.equal(model(IDS).logits, expected)
    assert model.config.name_or_path == "someone/tiny"
    model, report = type(model).from_pretrained("someone/tiny", revision="main", output_loading_info=True, **options)
    assert torch.equal(model(IDS).logits, expected)
    assert not report["missing_keys"]


def test_a_hub_id_is_checked_like_a_folder(saved, tmp_path):
    rewrite(saved, lambda weights: weights.update({"classifier.weight": torch.zeros(5, 32)}))
    snapshot = hub_cache(saved, tmp_path / "cache")
    message = r"classifier\.weight is \[5, 32\] in model\.safetensors, \[2, 32\] in the model"
    with pytest.raises(CheckpointError, match=message):
        AutoModel.from_pretrained("someone/tiny", cache_dir=tmp_path / "cache")
    blob = (snapshot / "model.safetensors").resolve()
    blob.rename(tmp_path / "secret")
    blob.symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="points outside its folder"):
        AutoModel.from_pretrained("someone/tiny", cache_dir=tmp_path / "cache")


def test_options_of_transformers(saved, tmp_path):
    expected = snlp_zoo.load(saved)(IDS).logits
    (tmp_path / "outer").mkdir()
    saved.rename(tmp_path / "outer" / "inner")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "outer", subfolder="inner", device_map="cpu")
    assert torch.equal(model(IDS).logits, expected)
    model.save_pretrained(tmp_path / "other", variant="fp")
    assert torch.equal(type(model).from_pretrained(tmp_path / "other", variant="fp")(IDS).logits, expected)
    with pytest.raises(CheckpointError, match=r"it has no model\.safetensors; only safetensors are loaded"):
        type(model).from_pretrained(tmp_path / "other")
    model = type(model).from_pretrained(tmp_path / "outer", subfolder="inner", time_steps=4, output_hidden_states=True)
    assert len(model(IDS).hidden_states) == 3
    assert torch.equal(
        type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())(IDS).logits, expected
    )


def test_a_head_the_saved_model_did_not_have_starts_afresh_and_says_so(tmp_path, caplog):
    build("spikelm_tiny", task="masked-lm").save_pretrained(tmp_path)
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_propagation()
    try:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    finally:
        transformers_logging.disable_propagation()
        transformers_logging.set_verbosity(before)
    assert model.classifier.weight.isfinite().all()
    assert "classifier.weight" in caplog.text
    assert "cls.predictions.decoder.weight" in AutoModelForMaskedLM.from_pretrained(tmp_path).state_dict()


def test_a_configuration_object_of_ones_own(saved):
    model = snlp_zoo.load(saved)
    encoder = AutoModel.from_pretrained(saved, config=type(model.config)(**load_entry("spikelm_tiny").config))
    assert torch.equal(encoder(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)
    other = type(model.config)(**load_entry("spikelm_tiny").config | {"hidden_size": 64})
    with pytest.raises(CheckpointError, match=r"is \[32\] in model\.safetensors, \[64\] in the model"):
        AutoModel.from_pretrained(saved, config=other)


def test_a_configuration_of_another_family(saved):
    with pytest.raises(CheckpointError, match="spikingbert has no config field"):
        type(build("spikingbert_tiny")).from_pretrained(saved)
    BertConfig().save_pretrained(saved)
    with pytest.raises(CheckpointError, match="cannot load"):
        type(build("spikelm_tiny")).from_pretrained(saved)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "not valid JSON"),
        ("tokenizer.json", "[]", "must hold a mapping"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 3}}', "cannot load the tokenizer"),
        (
            "tokenizer_config.json",
            '{"auto_map": {"AutoTokenizer": ["evil.T", null]}}',
            "'auto_map' names a file or code",
        ),
        ("tokenizer_config.json", '{"vocab_file": "/etc/passwd"}', "'vocab_file' names a file or code elsewhere"),
        ("tokenizer_config.json", " " * (9 << 20), "bytes, more than"),
        ("added_tokens.json", "[" * 100_000, "not valid JSON"),
    ],
)
def test_damaged_tokenizers(tmp_path, name, text, message):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def fuzz(cases):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "fuzz_loader.py"), "--cases", str(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{cases} cases: " in done.stdout
    return done.stdout


def test_damaged_files_end_in_an_error_or_in_a_model():
    found = fuzz(150)
    assert "'refused': " in found
    assert "'loaded, equal': " in found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_damaged_files():
    fuzz(10_000)
