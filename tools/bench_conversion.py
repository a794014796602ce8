"""Models converted to spike counts against the dense ones they come from: the ops, and whole decoders.

    python tools/bench_conversion.py [--device cpu] [--only counts linear prefill decode compiled] [--rounds 3] [--tune]

counts: the kernel against plain operations, GPU only. linear: spike counts and their product with a layer's weights,
both together, against the dense layer; "float" keeps the weights in bfloat16, "int8" has them and the counts in int8.
prefill: prompts of 512 tokens, with a cache, logits of the last token, as `generate` begins, and how long the GPU was
busy in it: small models wait for Python. decode: greedy generation after a prompt of 16, milliseconds per token.
compiled (if asked for, GPU only): that of the 135M model with a static cache, which transformers compiles.
Models are Llamas of random weights in the shapes of SmolLM2-135M and of a 1B model; "count" keeps their weights, "int8"
has weight_bits=8 and max_count=127. On a CPU: float32, at most 512 rows, the 135M model, one prompt of 256 tokens.

Nothing is timed before its result has been checked. Dense and converted calls take turns; milliseconds are medians, a
ratio is the median over the rounds of converted / dense. --tune times other tiles of the int8 product, GPU only.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import linear

from snlp_zoo.ops.counts import counts
from snlp_zoo.ops.int8_linear import int8_linear, quantise_int8

K, LIMIT = 3.0, 127
BACKENDS = ("torch", "triton")
SMOL = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
LARGE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
COUNTS = [(1, 576), (32, 576), (16384, 576), (16384, 1536)]
LAYERS = [(576, 576), (576, 192), (576, 1536), (1536, 576)]
LINEAR = {"cuda": [(16384, *layer) for layer in LAYERS] + [(32, 576, 576), (1, 576, 576)]}
LINEAR["cpu"] = [(rows, *layer) for rows in (1, 512) for layer in LAYERS]
Calls = dict[str, Callable[[], object]]
Row = tuple[str, dict[str, float], dict[str, float]]  # what, milliseconds and ratios to the first by name


def milliseconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """Of one call, the mean over `repeats` in a row; on a GPU from the first launch to the end of the last."""
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def take_turns(what: str, calls: Calls, rounds: int, repeats: int, device: str) -> Row:
    """Medians of every call, and of its ratio to the first one in the same round."""
    for call in calls.values():
        call()
    times = [{name: milliseconds(call, repeats, device) for name, call in calls.items()} for _ in range(rounds)]
    first, *others = calls
    ms = {name: statistics.median(t[name] for t in times) for name in calls}
    ratios = {name: statistics.median(t[name] / t[first] for t in times) for name in others}
    print(what, {name: f"{value:.4f} ms" for name, value in ms.items()}, file=sys.stderr, flush=True)
    return what, ms, ratios


def check(what: str, off: float, limit: float) -> None:
    if not off <= limit:
        raise SystemExit(
            f"bench_conversion: {what} is off by {off:.1e}, at most {limit:.1e} is right: nothing is timed"
        )


# ---- ops


def check_counts(x: Tensor, dtype: torch.dtype) -> None:
    n, threshold = counts(x, K, max_count=LIMIT, dtype=dtype)
    mean = x.double().abs().mean(-1, keepdim=True) / K
    check(f"V of {tuple(x.shape)}", (threshold / mean - 1).abs().max().item(), 2**-21)
    expected = (x.float() / threshold).round().clamp(-LIMIT, LIMIT)
    check(f"counts of {tuple(x.shape)}", (n.float() - expected).abs().max().item(), 0)


def bench_counts(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> Row:
    """From bfloat16."""
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    check_counts(x, dtype)
    calls: Calls = {name: partial(counts, x, K, max_count=LIMIT, dtype=dtype, backend=name) for name in BACKENDS}
    return take_turns(f"counts {list(shape)} {str(dtype).removeprefix('torch.')}", calls, rounds * 3, 50, "cuda")


def bench_linear(shape: tuple[int, int, int], rounds: int, device: str) -> Row:
    rows, inputs, outputs = shape
    half = torch.float32 if device == "cpu" else torch.bfloat16
    x, weight = torch.randn(rows, inputs, device=device), torch.randn(outputs, inputs, device=device) / inputs**0.5
    x, weight = x.to(half), weight.to(half)
    small, scale = quantise_int8(weight)
    n, threshold = counts(x, K, max_count=LIMIT, dtype=torch.int8)
    exact = (n[:64].double() @ small.double().mT) * threshold[:64].double() * scale.double()
    got = int8_linear(n, small, threshold, scale, dtype=half)[:64].double()
    check(f"linear {shape}", ((got - exact).abs().max() / exact.abs().max()).item(), 2 * torch.finfo(half).eps)

    def with_floats() -> Tensor:
        n, threshold = counts(x, K)
        return linear(n, weight) * threshold.to(half)

    def with_int8() -> Tensor:
        n, threshold = counts(x, K, max_count=LIMIT, dtype=torch.int8)
        return int8_linear(n, small, threshold, scale, dtype=half)

    calls: Calls = {
        "dense": partial(linear, x, weight),
        "counts + float": with_floats,
        "counts + int8": with_int8,
        "int8 alone": partial(int8_linear, n, small, threshold, scale, dtype=half),
    }
    repeats = 5 if device == "cpu" and rows > 1 else 50
    return take_turns(f"linear {rows} x {inputs} x {outputs}", calls, rounds * 3, repeats, device)


def tune(shape: tuple[int, int, int]) -> None:
    """Prints the tiles of the int8 product from fastest to slowest, microseconds."""
    from snlp_zoo.ops.int8_linear import triton

    rows, inputs, outputs = shape
    n = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8, device="cuda")
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device="cuda")
    given = weight, torch.ones(rows, 1, device="cuda"), torch.ones(outputs, device="cuda")
    call, rule, found = partial(int8_linear, n, *given, dtype=torch.bfloat16), triton._tile, []
    call()
    own = 1e3 * milliseconds(call, 50, "cuda")
    high, wide = ((16, 32), (16, 32, 64)) if rows <= 32 else ((64, 128, 256), (64, 128, 256))
    for sizes in product(high, wide, (64, 128, 256), (4, 8), (3, 4)):
        tile = triton.Tile(*sizes)
        if (
            tile.rows + tile.outputs
        ) * tile.inputs * tile.stages > 220_000 or tile.rows * tile.outputs > 4096 * tile.warps:
            continue
        triton._tile = lambda *_, chosen=tile: chosen
        try:
            call()
            found.append((1e3 * milliseconds(call, 50, "cuda"), *tile))
        except Exception as error:
            print(f"tune {shape} {tile}: {' '.join(str(error).split())[:120]}", file=sys.stderr)
        finally:
            triton._tile = rule
    best = "  ".join(f"{us:.1f}: {tile}" for us, *tile in sorted(found)[:4])
    print(f"tune {shape}, own {own:.1f} us; rows, outputs, inputs, warps, stages: {best}", flush=True)


# ---- models


def llama(sizes: dict, device: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None, pad_token_id=0)).eval()
    return model if device == "cpu" else model.to(torch.bfloat16)


def variants(name: str, sizes: dict, device: str) -> dict[str, torch.nn.Module]:
    """The dense model, and it converted in two ways; their logits must differ from the dense ones, but not much."""
    from snlp_zoo.convert import to_spiking

    models = {
        "dense": llama(sizes, device),
        "count": to_spiking(llama(sizes, device), threshold_scale=K),
        "int8": to_spiking(llama(sizes, device), threshold_scale=K, max_count=LIMIT, weight_bits=8),
    }
    ids = torch.randint(sizes["vocab_size"], (2, 33), device=device)
    with torch.inference_mode():
        logits = {key: model(ids).logits.double() for key, model in models.items()}
    for key in ("count", "int8"):
        converted = sum(type(module).__name__ == "SpikeLinear" for module in models[key].modules())
        check(f"{name} {key}: layers left dense", 7 * sizes["num_hidden_layers"] - converted, 0)
        error = ((logits[key] - logits["dense"]).norm() / logits["dense"].norm()).item()
        print(f"{name} {key}: logits differ from the dense ones by {error:.3f}", file=sys.stderr, flush=True)
        check(f"{name} {key}: logits", error, 0.6)
        if error == 0:
            raise SystemExit(f"bench_conversion: {name} {key} equals the dense model: nothing is timed")
    return models


@torch.no_grad()  # as `generate` does
def prefill(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=True, logits_to_keep=1).logits


def decode(model: torch.nn.Module, ids: Tensor, tokens: int, cache: str = "dynamic") -> None:
    options = {"do_sample": False, "max_new_tokens": tokens, "cache_implementation": cache}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    if out.shape[1] != ids.shape[1] + tokens:
        raise SystemExit(f"bench_conversion: {out.shape[1] - ids.shape[1]} tokens came, not {tokens}")


def bench_model(name: str, sizes: dict, sections: list[str], rounds: int, device: str) -> list[Row]:
    models, rows = variants(name, sizes, device), []
    shapes = [(1, 256)] if device == "cpu" else [(32, 512), (1, 512)]
    for shape in shapes if "prefill" in sections else []:
        ids = torch.randint(sizes["vocab_size"], shape, device=device)
        calls: Calls = {key: partial(prefill, model, ids) for key, model in models.items()}
        repeats = 1 if device == "cpu" else 3
        rows.append(take_turns(f"{name} prefill {shape[0]} x {shape[1]}", calls, rounds * 3, repeats, device))
        if device == "cuda":
            ms = {key: busy(call) for key, call in calls.items()}
            rows.append((f"{name} prefill {shape[0]} x {shape[1]}, busy", ms, to_first(ms)))
    tokens = 32
    for batch in ((1,) if device == "cpu" else (1, 32)) if "decode" in sections else ():
        ids = torch.randint(sizes["vocab_size"], (batch, 16), device=device)
        calls = {key: partial(decode, model, ids, tokens) for key, model in models.items()}
        what, ms, ratios = take_turns(f"{name} decode, batch {batch}", calls, rounds, 1, device)
        rows.append((f"{what}, a token", {key: value / tokens for key, value in ms.items()}, ratios))
    if "compiled" in sections and device == "cuda" and sizes is SMOL:
        ids = torch.randint(sizes["vocab_size"], (1, 16), device=device)
        calls = {key: partial(decode, models[key], ids, tokens, "static") for key in ("dense", "count")}
        what, ms, ratios = take_turns(f"{name} compiled decode, batch 1", calls, rounds * 3, 1, device)
        rows.append((f"{what}, a token", {key: value / tokens for key, value in ms.items()}, ratios))
    return rows


def busy(call: Callable[[], object]) -> float:
    """Milliseconds in which the GPU computed for one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_time_total for event in profile.key_averages()) / 1e3


def to_first(ms: dict[str, float]) -> dict[str, float]:
    first, *others = ms
    return {key: ms[key] / ms[first] for key in others}


def table(rows: list[Row]) -> str:
    lines = [f"{'':<34}{'':>16}{'ms':>10}{'ratio':>8}"]
    for what, ms, ratios in rows:
        for name, value in ms.items():
            ratio = f"{ratios[name]:8.2f}" if name in ratios else f"{'1':>8}"
            lines.append(f"{what:<34}{name:>16}{value:10.4f}{ratio}")
            what = ""
    return "\n".join(lines)


def main() -> None:
    sections = ["counts", "linear", "prefill", "decode"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--only", nargs="+", default=sections, choices=[*sections, "compiled"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    device, rounds, rows = options.device, options.rounds, []
    torch.manual_seed(0)
    if options.tune:
        for size in LINEAR["cuda"]:
            tune(size)
    if "counts" in options.only and device == "cuda":
        rows += [bench_counts(shape, dtype, rounds) for dtype in (torch.int8, torch.bfloat16) for shape in COUNTS]
    if "linear" in options.only:
        rows += [bench_linear(size, rounds, device) for size in LINEAR[device]]
    for name, sizes in {"135M": SMOL, "1B": LARGE}.items():
        if {"prefill", "decode", "compiled"} & set(options.only) and (device == "cuda" or sizes is SMOL):
            rows += bench_model(name, sizes, options.only, rounds, device)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}")
    print(table(rows))


if __name__ == "__main__":
    main()
