"""Low-bit weights against float ones: exactness and time on a GPU; time, size and memory on a CPU.

    python tools/bench_bit_linear.py [--cpu] [--repeats 30]

GPU: sums of ternary weights and ternary spikes must equal the float64 product; then packed layers and a packed
SpikeLM-base (T = 4, batch 32 of 128 tokens) against their bfloat16 selves, weights dequantised, same neurons. Inputs,
weights and outputs rotate through more memory than the second-level cache; CUDA graphs leave launching out.
CPU: a 6 x 384 SpikeLM at batch 1 of 32 tokens, one thread, packed against unpacked, in alternating pairs.
The last lines say which bars are met.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn.functional import linear

import snlp_zoo
from snlp_zoo.layers import SpikingLinear, pack
from snlp_zoo.ops.bit_linear import bit_linear, kernel, pack_weight, quantise, sign_dtype
from snlp_zoo.ops.spike_linear import spike_linear

SHAPES = [(16384, 768, 3072), (16384, 3072, 768), (16384, 768, 768), (512, 384, 1536)]  # M, K, N
SMALL = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
ROTATED = 256 * 2**20  # bytes: five times an H100's second-level cache


def draw_spikes(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """[4, rows / 4, inputs], two thirds of them not 0."""
    return torch.randint(-1, 2, (4, rows // 4, inputs), device="cuda").to(dtype)


def bar(name: str, value: float, limit: float, at_least: bool = True) -> bool:
    met = value >= limit if at_least else value <= limit
    print(f"{'met    ' if met else 'NOT MET'} {name}: {value:.3g} (bar {'>=' if at_least else '<='} {limit:.3g})")
    return met


# ---- GPU


def wrong_sums(inputs: int, dtype: torch.dtype) -> int:
    """How many of the outputs of a packed layer differ from the rounded exact ones."""
    weight, bias = torch.randn(768, inputs, device="cuda"), torch.zeros(768, device="cuda")
    codes, _ = pack_weight(weight, 1.58)
    one, spikes = torch.ones(4, device="cuda"), draw_spikes(16384, inputs, torch.float32)
    spikes[0, 0], spikes[0, 1] = quantise(weight, 1.58)[0][0], 1  # the largest sum there is, and whatever comes
    expected = linear(spikes.double(), quantise(weight, 1.58)[0].double()).to(dtype)
    fast = sign_dtype(spikes, len(weight)) or torch.float32
    got = bit_linear(spikes.to(fast), codes, one[0], bias, bits=1.58, amplitude=one, dtype=dtype)
    return int((got != expected).sum())


def graph_time(calls: list[Callable[[], torch.Tensor]], repeats: int) -> float:
    """Median milliseconds of one call, from replays of a graph of all of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept.extend(call() for call in calls)  # outputs stay, so that each has its own memory
    return event_time(graph.replay, repeats) / len(calls)


def event_time(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def time_linear(rows: int, inputs: int, outputs: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a bfloat16 layer, a packed layer, and the FP8 product alone where that is chosen."""
    copies = max(2, ROTATED // (2 * rows * (inputs + outputs)) + 1)
    dense, packed, alone = [], [], []
    for _ in range(copies):
        weight, bias = torch.randn(outputs, inputs, device="cuda"), torch.randn(outputs, device="cuda").bfloat16()
        signs, scale = quantise(weight, 1.58)
        codes, amplitude = pack_weight(weight, 1.58)[0], torch.rand(4, device="cuda") + 0.5
        spikes = draw_spikes(rows, inputs, torch.bfloat16)
        half, fast = (signs * scale).bfloat16(), sign_dtype(spikes, outputs)
        dense.append(lambda x=spikes, w=half, b=bias: linear(x, w, b))
        if fast is None:
            packed.append(lambda x=spikes, c=codes, s=scale, b=bias: bit_linear(x, c, s, b, bits=1.58))
            continue
        options = {"bits": 1.58, "amplitude": amplitude, "dtype": torch.bfloat16}
        x, w = spikes.to(fast), signs.to(fast)
        packed.append(lambda x=x, c=codes, s=scale, b=bias, o=options: bit_linear(x, c, s, b, **o))
        flat, by_row = x.flatten(0, 1), kernel._scales(amplitude, scale, rows, outputs, "torch")
        options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        alone.append(lambda x=flat, w=w, r=by_row, b=bias, o=options: torch._scaled_mm(x, w.mT, *r, b, **o))
    with torch.inference_mode():
        result = {"bf16": graph_time(dense, repeats), "packed": graph_time(packed, repeats)}
        return result | ({"product": graph_time(alone, repeats)} if alone else {})


def time_training(rows: int, inputs: int, outputs: int, repeats: int) -> list[float]:
    """Milliseconds of the forward in training, which packs spikes for its backward: in bfloat16, and where FP8 pays."""
    calls: list[list[Callable[[], torch.Tensor]]] = [[], []]
    amplitude = torch.ones(4, device="cuda")
    for _ in range(max(2, ROTATED // (2 * rows * (inputs + outputs)) + 1)):
        spikes = draw_spikes(rows, inputs, torch.bfloat16).requires_grad_()
        weight = quantise(torch.randn(outputs, inputs, device="cuda"), 1.58)[0].bfloat16().requires_grad_()
        for into, low_bit in zip(calls, (False, True), strict=True):
            into.append(lambda x=spikes, w=weight, b=low_bit: spike_linear(x, amplitude, w, None, 2, b))
    return [graph_time(some, repeats) for some in calls]


def base_models() -> dict[str, torch.nn.Module]:
    """SpikeLM-base in bfloat16: with dequantised weights, and packed."""
    torch.manual_seed(0)
    model = snlp_zoo.build("spikelm_base", weight_bits=1.58).to("cuda")
    with torch.no_grad():
        model.train()(torch.randint(1000, 30000, (8, 128), device="cuda"))  # measures the amplitudes
    model.eval()
    dense = copy.deepcopy(model)
    for layer in dense.modules():
        if isinstance(layer, SpikingLinear):
            layer.weight.data = layer.quantised_weight().detach()
            layer.bits = 32
    return {"bf16": dense.bfloat16(), "packed": pack(model).bfloat16()}


def time_forward(model: torch.nn.Module, mode: str, repeats: int) -> float:
    ids = torch.randint(1000, 30000, (32, 128), device="cuda")
    mask = torch.ones_like(ids)
    torch.compiler.reset()
    with torch.inference_mode():
        if mode == "graph":
            return graph_time([lambda: model(ids, attention_mask=mask).logits], repeats)
        run = torch.compile(model, mode="reduce-overhead") if mode == "compiled" else model
        for _ in range(3):
            run(ids, attention_mask=mask)
        return event_time(lambda: run(ids, attention_mask=mask), repeats)


def on_gpu(repeats: int) -> bool:
    wrong = {(k, d): wrong_sums(k, d) for k in (768, 1536, 3072) for d in (torch.float32, torch.bfloat16)}
    exact = not any(wrong.values())
    print(f"wrong outputs, ternary x ternary, float32 and bfloat16 output: {list(wrong.values())}")
    forwards: dict[str, float] = {}
    models = base_models()
    for mode in ("eager", "graph", "compiled"):
        try:
            ms = {name: time_forward(model, mode, repeats) for name, model in models.items()}
        except Exception as error:
            print(f"forward, {mode}: {' '.join(str(error).split())[:300]}")
            continue
        forwards[mode] = ms["bf16"] / ms["packed"]
        print(f"forward, {mode}: bf16 {ms['bf16']:.2f} ms, packed {ms['packed']:.2f} ms, {forwards[mode]:.2f}x")
    del models
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; milliseconds")
    print(f"{'M x K x N':>20} {'bf16':>8} {'packed':>8} {'ratio':>6} {'product':>8} {'training':>16} {'ratio':>6}")
    ratios = []
    for shape in SHAPES:
        ms = time_linear(*shape, repeats)
        ratios.append(ms["bf16"] / ms["packed"])
        name, alone = " x ".join(map(str, shape)), ms.get("product", float("nan"))
        half, fast = time_training(*shape, repeats)
        print(f"{name:>20} {ms['bf16']:8.4f} {ms['packed']:8.4f} {ratios[-1]:6.2f} {alone:8.4f}", end=" ")
        print(f"{half:7.4f} {fast:8.4f} {half / fast:6.2f}")
    bars = [bar("linear against bf16, smaller of the two MLP shapes", min(ratios[:2]), 1.3)]
    bars.append(bar("exact sums", float(exact), 1.0))
    bars.append(bar("whole forward against bf16, best mode of both", max(forwards.values(), default=0.0), 1.15))
    return all(bars)


# ---- CPU


def small_model(bits: float, packed: bool = False, **sizes) -> torch.nn.Module:
    torch.manual_seed(0)
    model = snlp_zoo.build("spikelm_base", weight_bits=bits, **(SMALL | sizes))
    with torch.no_grad():
        model.train()(torch.randint(100, model.config.vocab_size, (4, 32)))
    return pack(model) if packed else model.eval()


def linear_bytes(folder: Path) -> int:
    """Bytes of the encoder's linear weights, with scales, without biases and norms."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".layers." in name and ".norm." not in name]  # noqa: SIM118
        return sum(file.get_tensor(name).nbytes for name in names if ".weight" in name)


def disk_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Bytes of linear weights and of the whole file."""
    sizes = {}
    for name, bits, int8 in [("32", 32, False), ("1.58", 1.58, False), ("1", 1, False), ("1.58, int8", 1.58, True)]:
        model = small_model(bits)
        (model if bits == 32 else pack(model, int8_embeddings=int8)).save_pretrained(folder / name)
        sizes[name] = linear_bytes(folder / name), (folder / name / "model.safetensors").stat().st_size
    return sizes


@torch.inference_mode()
def paired_times(models: list[torch.nn.Module], repeats: int) -> list[list[float]]:
    """Milliseconds of each forward, the models taking turns."""
    ids, times = torch.randint(100, 30000, (1, 32)), [[] for _ in models]
    for turn in range(repeats + 3):
        for model, into in zip(models, times, strict=True):
            start = time.perf_counter()
            model(ids)
            if turn >= 3:
                into.append(1e3 * (time.perf_counter() - start))
    return times


def peak_of_loading_and_running(folder: str) -> int:
    """In a process of its own: bytes by which resident memory peaks above what importing took, and one layer run."""
    status = Path("/proc/self/status")

    def field(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) * 1024

    ids = torch.randint(5, 100, (1, 32))
    with torch.inference_mode():
        snlp_zoo.load(Path(folder) / "warm")(ids)  # what libraries prepare once; the layer itself is freed
        before = field("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        snlp_zoo.load(Path(folder) / "measured")(ids)
    return field("VmHWM") - before


def memory(folder: Path, bits: float) -> int:
    """The same, for weights of these bits and a vocabulary so small that linear weights are nearly all there is."""
    for name, layers in (("warm", 1), ("measured", 6)):
        sizes = SMALL | {"num_hidden_layers": layers, "vocab_size": 120, "max_position_embeddings": 64}
        small_model(bits, bits != 32, **sizes).save_pretrained(folder / name)
    command = [sys.executable, __file__, "--measure", str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc then returns what is freed: peaks of what is in use
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def on_cpu(repeats: int) -> bool:
    torch.set_num_threads(1)
    unpacked, dense = small_model(1.58), small_model(32)
    packed = pack(copy.deepcopy(unpacked))
    ids = torch.randint(100, 30000, (1, 32))
    with torch.no_grad():
        difference = (packed(ids).logits - unpacked(ids).logits).abs().max().item()
    times = paired_times([packed, unpacked, dense], repeats)
    medians = [statistics.median(t) for t in times]
    ratio = statistics.median(u / p for p, u in zip(times[0], times[1], strict=True))
    with tempfile.TemporaryDirectory() as folder:
        sizes = disk_sizes(Path(folder))
        peaks = {bits: memory(Path(folder) / str(bits), bits) for bits in (32, 1.58, 1)}
    float_linear = sizes["32"][0]
    print(f"6 x 384, batch 1 of 32 tokens, T = 4, one thread, torch {torch.__version__}; largest difference of logits")
    print(f"between packed and unpacked {difference:.1e}; medians of {repeats} forwards, milliseconds:")
    print(f"packed 1.58 bit {medians[0]:.1f}, unpacked 1.58 bit {medians[1]:.1f}, 32 bit {medians[2]:.1f}")
    print(f"{'weights':>12} {'linear MB':>10} {'of float32':>10} {'file MB':>8} {'of float32':>10}")
    for name, (weights, file) in sizes.items():
        shares = f"1/{float_linear / weights:.1f}", f"1/{sizes['32'][1] / file:.2f}"
        print(f"{name:>12} {weights / 1e6:10.2f} {shares[0]:>10} {file / 1e6:8.1f} {shares[1]:>10}")
    print("peak memory of loading and running: " + ", ".join(f"{b} bit {p / 1e6:.1f} MB" for b, p in peaks.items()))
    bars = [bar("packed against unpacked, paired", ratio, 1.0), bar("difference of logits", difference, 1e-5, False)]
    bars.append(bar("linear weights on disk, 1.58 bit of float32", sizes["1.58"][0] / float_linear, 1 / 14, False))
    bars.append(bar("linear weights on disk, 1 bit of float32", sizes["1"][0] / float_linear, 1 / 28, False))
    bars.append(bar("peak memory, 1.58 bit, of float32's linear weights", peaks[1.58] / float_linear, 1 / 6, False))
    return all(bars)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the CPU part, on a machine with a GPU too")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(peak_of_loading_and_running(arguments.measure)))
        sys.exit()
    gpu = torch.cuda.is_available() and not arguments.cpu
    sys.exit(not (on_gpu if gpu else on_cpu)(arguments.repeats))
