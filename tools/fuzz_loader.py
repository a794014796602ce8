"""Loads saved models that were damaged or made hostile on purpose, and counts what happened.

    python tools/fuzz_loader.py --cases 10000 [--seed 0]

Each case copies a small saved model with its tokenizer, changes it in one to three ways, and loads both. It must end in
an error of this library or in a model whose weights are finite, within a second of processor time, in bounded memory
(RLIMIT_AS stands 1 GB above what is in use after warming up). A flipped byte inside a tensor, or header and
configuration entries that say something else that is valid, load as another model: only checksums tell, and such cases
are counted.
Exits with 1, naming the cases, if any ended otherwise; `--only CASE` repeats one.
"""

import argparse
import faulthandler
import json
import math
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

import snlp_zoo
from snlp_zoo.errors import SnlpError
from snlp_zoo.layers import pack
from snlp_zoo.registry import load_tokenizer

MEMORY, SECONDS = 1 << 30, 1.0
HOSTILE = [
    *(0, 1, -1, 3, 2**31, 2**63, 10**9, 10**30, 0.5, -0.0, 1e-300, 1e308, math.nan, math.inf, -math.inf),
    *(True, False, None, "", "x", "float8_e4m3fn", "../../../../etc/passwd", "/etc/passwd", "a/b:c", "\x00", "😀" * 9),
    *([], {}, [[]], {"a": {}}, [10**9] * 50, "A" * 100_000, {str(i): i for i in range(1000)}),
]
HOSTILE_KEYS = {
    "auto_map": {"AutoModelForSequenceClassification": "evil.Model", "AutoConfig": "evil.Config"},
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "attn_implementation": "someone/kernel",
    "_attn_implementation": "someone/kernel",
    "transformers_weights": "../other.safetensors",
    "configuration_files": ["config.1.0.0.json"],
    "fusion_config": {"patch_embeddings": True},
    "per_layer_config": {"0": {"hidden_size": 10**9}},
    "distributed_config": {"tp_size": 2},
    "num_labels": 10**9,
    "torch_dtype": "load",
    "dtype": "nn",
    "id2label": {str(10**9): "a"},
    "__class__": "str",
    "to_dict": 1,
    "label_names": ["a"],
    "_commit_hash": "main",
    "base_model_prefix": "x",
    "time_stepz": 3,
}
NAMES = [
    "../model.safetensors",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b.safetensors",
    "\x00.safetensors",
    "C:\\x.safetensors",
]


def make_models(folder):
    """A few small saved models: single and sharded, packed and not, every kind of head."""
    kinds = {
        "plain": (snlp_zoo.build("spikelm_tiny"), "50GB"),
        "sharded": (snlp_zoo.build("spikingbert_tiny", task="masked-lm"), "20KB"),
        "packed": (pack(snlp_zoo.build("spikelm_tiny_158"), int8_embeddings=True), "10KB"),
        "encoder": (snlp_zoo.build("spikingbert_tiny_1bit", task="encoder"), "50GB"),
    }
    words = ["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")  # noqa: S106
    for name, (model, shard) in kinds.items():
        model.save_pretrained(folder / name, max_shard_size=shard)
        tokenizer.save_pretrained(folder / name)
    return [folder / name for name in kinds]


def pick(rng, folder, pattern):
    return rng.choice(sorted(folder.glob(pattern)) or [folder / "config.json"])


def change_bytes(rng, folder, pattern="*"):
    path = pick(rng, folder, pattern)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 8]) if data else 0):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def truncate(rng, folder):
    path = pick(rng, folder, "*")
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size + 1)])


def lengthen(rng, folder):
    path = pick(rng, folder, "*")
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice([1, 8, 5000])))


def header_bytes(rng, folder):
    path = pick(rng, folder, "*.safetensors")
    data = bytearray(path.read_bytes())
    if len(data) > 8:
        end = min(len(data), 8 + int.from_bytes(data[:8], "little"))
        data[rng.randrange(end)] = rng.randrange(256)
    path.write_bytes(data)


def header_length(rng, folder):
    path = pick(rng, folder, "*.safetensors")
    length = rng.choice([0, 1, 2, 100, 10**6, 10**8, 10**9, 2**40, 2**63, 2**64 - 1, rng.getrandbits(64)])
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


@cache
def large_header(count):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"x{i}": entry for i in range(count)}).encode()
    return struct.pack("<Q", len(text)) + text


def header_large(rng, folder):
    pick(rng, folder, "*.safetensors").write_bytes(large_header(rng.choice([1000, 50_000, 200_000])))


def write_header(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def header_entry(rng, folder):
    """Another kind, shape, name or place for one tensor, in a header that is otherwise in order."""
    path = pick(rng, folder, "*.safetensors")
    try:
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : min(end, 1 << 20)])
        name = rng.choice([key for key in header if key != "__metadata__"])
        entry = header[name]
        what = rng.randrange(6)
        if what == 0:
            entry["dtype"] = rng.choice(
                ["F64", "F32", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "C64", "?"]
            )
        elif what == 1:
            entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [10**9] * 3, [-1], "x", []])
        elif what == 2:
            header[rng.choice([name + "x", "", "../x", "a" * 5000])] = header.pop(name)
        elif what == 3:
            entry["data_offsets"] = rng.choice([[0, 4], [0, 2**63], [8, 0], [-4, 0], [0], "x", [0.5, 1]])
        elif what == 4:
            del header[name]
        else:
            header["__metadata__"] = rng.choice([{}, None, [], {"format": "tf"}, {"format": 1}, "x"])
        write_header(path, header, data[end:])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):  # an earlier change broke it
        change_bytes(rng, folder)


def weights_not_finite(rng, folder):
    path = pick(rng, folder, "*.safetensors")
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    if start + 4 <= len(data):
        at = start + 4 * rng.randrange((len(data) - start) // 4)
        data[at : at + 4] = struct.pack("<f", rng.choice([math.nan, math.inf, -math.inf]))
    path.write_bytes(data)


def read(path):
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # an earlier change broke or removed it
        return {}


def json_value(rng, folder):
    """One value, at any depth, of any JSON file, replaced."""
    path = pick(rng, folder, "*.json")
    content = read(path)
    node = content
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not (isinstance(node[key], dict | list) and node[key]) or rng.random() < 0.2:
            node[key] = rng.choice(HOSTILE)
            break
        node = node[key]
    path.write_text(json.dumps(content))


def config_value(rng, folder):
    path = folder / "config.json"
    content = read(path)
    if isinstance(content, dict) and content:
        content[rng.choice(sorted(content))] = rng.choice(HOSTILE)
    path.write_text(json.dumps(content))


def config_key(rng, folder):
    path = rng.choice([folder / "config.json", folder / "config.json", folder / "tokenizer_config.json"])
    key = rng.choice(sorted(HOSTILE_KEYS))
    path.write_text(json.dumps(read(path) | {key: HOSTILE_KEYS[key]} if isinstance(read(path), dict) else {}))


def json_whole(rng, folder):
    texts = [
        "",
        "[]",
        "1",
        "null",
        "{",
        "[" * 100_000,
        '{"a":' * 50_000,
        " " * 3_000_000,
        "\ufeff{}",
        '{"a": 1e999999}',
    ]
    pick(rng, folder, "*.json").write_text(rng.choice(texts))


def index_entry(rng, folder):
    path = pick(rng, folder, "*.index.json")
    content = read(path)
    placed = content.get("weight_map") if isinstance(content, dict) else None
    if isinstance(placed, dict) and placed:
        name, what = rng.choice(sorted(placed)), rng.randrange(3)
        if what == 0:
            placed[name] = rng.choice([*NAMES, *HOSTILE])
        elif what == 1:
            placed[name] = rng.choice(sorted(map(str, placed.values())))
        else:
            del placed[name]
    path.write_text(json.dumps(content))


def replace_file(rng, folder):
    path = pick(rng, folder, "*")
    data = path.read_bytes()
    path.unlink()
    what = rng.randrange(5)
    if what == 0:
        path.symlink_to(rng.choice(["/etc/passwd", "/dev/zero", "nowhere", str(folder.parent / "outside")]))
    elif what == 1:
        path.mkdir()
    elif what == 2:
        path.write_bytes(b"")
    elif what == 3:
        path.write_bytes(rng.randbytes(len(data)))


CHANGES = [
    *(change_bytes, change_bytes, truncate, lengthen, header_bytes, header_bytes, header_length, header_large),
    *(header_entry, header_entry, weights_not_finite, json_value, json_value, config_value, config_value, config_key),
    *(json_whole, index_entry, index_entry, replace_file),
]


@cache
def original_content(folder):
    return content(snlp_zoo.load(folder))


def content(model):
    weights = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    return weights, model.config.to_dict() | {"_name_or_path": ""}


def one_case(case, originals, folder):
    """Returns (changes, outcome, error text, seconds); what is no `SnlpError` comes out as it is."""
    rng = random.Random(case)  # noqa: S311
    original = rng.choice(originals)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    changes = rng.sample(CHANGES, k=rng.choice([1, 1, 1, 2, 3]))
    for change in changes:
        if all(path.is_file() for path in folder.iterdir()):  # else an earlier change left nothing to change
            change(rng, folder)
    faulthandler.dump_traceback_later(60, exit=True)  # a hang ends here
    start, outcome, message = time.process_time(), "", ""
    try:
        model = snlp_zoo.load(folder)
        outcome = "loaded"
        load_tokenizer(folder)
    except SnlpError as error:
        outcome, message = ("tokenizer refused" if outcome else "refused"), str(error)
        if "\n" in message or len(message) > 3000:
            raise ValueError(f"the message is long or has many lines: {message[:200]!r}") from error
    seconds = time.process_time() - start
    faulthandler.cancel_dump_traceback_later()
    if outcome == "loaded":
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise ArithmeticError("a model with NaN or Inf was returned")
        outcome = "loaded, equal" if content(model) == original_content(original) else "loaded, other values"
    return [change.__name__ for change in changes], outcome, message, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="first case")
    parser.add_argument("--only", type=int, help="one case, with its message")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    cases = range(options.seed, options.seed + options.cases) if options.only is None else [options.only]
    outcomes, others, failures, slowest = Counter(), Counter(), [], (0.0, -1)
    with tempfile.TemporaryDirectory() as home:
        originals = make_models(Path(home) / "originals")
        for folder in originals:  # warm up
            snlp_zoo.load(folder)
            load_tokenizer(folder)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        for case in cases:
            try:
                changes, outcome, message, seconds = one_case(case, originals, Path(home) / "case")
            except BaseException as error:  # a panic of a library in Rust is no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                failures.append(f"case {case}: {type(error).__name__}: {str(error)[:300]}")
                continue
            outcomes[outcome] += 1
            if outcomes.total() % 500 == 0:
                print(dict(outcomes), file=sys.stderr, flush=True)
            others.update(set(changes) if outcome == "loaded, other values" else ())
            slowest = max(slowest, (seconds, case))
            if seconds > SECONDS:
                failures.append(f"case {case}: {seconds:.2f} s ({', '.join(changes)}): {outcome} {message[:200]}")
            if options.only is not None:
                print(changes, outcome, message)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{len(cases)} cases: {dict(outcomes)}; {len(failures)} failed")
    print(f"slowest {slowest[0]:.3f} s (case {slowest[1]}); peak memory grew by {grown:.0f} MB")
    print(f"other values after {dict(others)}")
    print("\n".join(failures[:50]))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
