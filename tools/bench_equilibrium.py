"""Memory and time of one SpikingBERT training step: through the steady state, and through time, at growing T.

    python tools/bench_equilibrium.py [--layers 6] [--size 384] [--batch 16] [--tokens 64]

"equilibrium" is the package as it is: T steps simulated without gradient, gradient through the steady state (its part
of the time is the column "steady ms"). "through time" differentiates the same spiking network with ATan surrogates.
Peak memory is above weights and inputs: allocated by torch on a GPU, resident on a CPU, where every row is a process.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

import snlp_zoo
from snlp_zoo.models import modeling_spikingbert
from snlp_zoo.models.modeling_spikingbert import SpikingBertForSequenceClassification

CASES = [("equilibrium", t) for t in (4, 16, 64, 128)] + [("through time", t) for t in (4, 16, 64)]


def loss_through_time(model: SpikingBertForSequenceClassification, ids: torch.Tensor, labels: torch.Tensor, steps: int):
    encoder = model.base_model
    current, mask = encoder.embed(ids, None, None, None, None)
    modeling_spikingbert.CHUNK = steps
    rates = encoder.simulate(current, mask, steps, {}, False, None, encoder.pool).rates
    logits = model.classifier(encoder.pool(rates[-1], mask))
    return torch.nn.functional.cross_entropy(logits, labels)


def measure(kind: str, steps: int, options: argparse.Namespace) -> dict[str, float]:
    """Peak GB, median milliseconds of a step and of its part through the steady state, after one step of warming up."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    sizes = {"hidden_size": options.size, "intermediate_size": 4 * options.size, "num_hidden_layers": options.layers}
    heads = {"num_attention_heads": 12, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = snlp_zoo.build("spikingbert_4l", **sizes, **heads, time_steps=steps).to(device).train()
    ids = torch.randint(1000, 30000, (options.batch, options.tokens), device=device)
    labels = torch.arange(options.batch, device=device) % 2
    chunk = modeling_spikingbert.CHUNK

    def step() -> None:
        through_time = kind == "through time"
        loss = loss_through_time(model, ids, labels, steps) if through_time else model(ids, labels=labels).loss
        loss.backward()
        model.zero_grad()

    def steady() -> None:
        encoder = model.base_model
        current, mask = encoder.embed(ids, None, None, None, None)
        encoder._equilibrium(current, mask, {}, current, False)[0][-1].sum().backward()
        model.zero_grad()

    def timed(function) -> float:
        times = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e3

    before = _peak(device, reset=True)
    step()
    peak = _peak(device) - before
    row = {"gb": peak, "ms": timed(step), "steady_ms": timed(steady) if kind == "equilibrium" else float("nan")}
    modeling_spikingbert.CHUNK = chunk
    return row


def _peak(device: str, reset: bool = False) -> float:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    torch.cuda.synchronize()
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 2**30


def in_a_process(kind: str, steps: int) -> dict[str, float]:
    """A CPU's peak never falls again within a process."""
    command = [sys.executable, *sys.argv, "--case", json.dumps([kind, steps])]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 6), ("size", 384), ("batch", 16), ("tokens", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*options.case, options)))
        return
    cuda = torch.cuda.is_available()
    if cuda:
        measure("equilibrium", 4, options)  # compiles the kernels
    rows = {case: measure(*case, options) if cuda else in_a_process(*case) for case in CASES}
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}; {options.layers} x {options.size}, {options.batch} x {options.tokens}")
    print(f"{'gradient':<14}{'T':>5}{'peak GB':>10}{'/ T=16':>8}{'ms':>9}{'steady ms':>11}")
    for (kind, steps), row in rows.items():
        ratio = row["gb"] / rows[kind, 16]["gb"]
        print(f"{kind:<14}{steps:>5}{row['gb']:10.3f}{ratio:8.2f}{row['ms']:9.1f}{row['steady_ms']:11.1f}")


if __name__ == "__main__":
    main()
