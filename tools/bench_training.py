"""Time and memory of one training step of SpikeLM-base on one GPU, against the plain loop and against dense encoders.

    python tools/bench_training.py [--steps 10] [--profile]

Every row is the same 12 x 768 encoder with a two-class head, batch 32 of 128 tokens, bfloat16 autocast and fused AdamW.
"kernels" is the package as it is. "loop" runs each neuron as the reference loop in front of an ordinary linear layer,
with frozen amplitudes (it does not even measure them). "dense" has no neurons: at T=4 with the same matrix products, at
T=1 an ordinary BERT. Nothing is reported unless the first loss of "kernels" agrees with that of "loop".
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from _bench import Watched, loops, milliseconds, spiking_linear_plain

import snlp_zoo
from snlp_zoo.layers import ElasticBiSpike, SpikingLinear

MODES = ("reduce-overhead", "default", "eager")  # of torch.compile; the first replays CUDA graphs
SIZES = {"time_steps": 4, "batch": 32, "tokens": 128}


@contextmanager
def variant(name: str) -> Iterator[None]:
    """The package as it is, with its neurons replaced by loops, or without neurons."""
    if name != "dense":
        with loops() if name == "loop" else nullcontext():
            yield
        return
    saved = ElasticBiSpike.forward, SpikingLinear.forward
    ElasticBiSpike.forward, SpikingLinear.forward = lambda self, x, **_: x, spiking_linear_plain
    try:
        yield
    finally:
        ElasticBiSpike.forward, SpikingLinear.forward = saved


def make_step(name: str, time_steps: int, mode: str) -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    alpha_mode = "first_batch" if name == "loop" else "ema"
    model = snlp_zoo.build("spikelm_base", time_steps=time_steps, alpha_mode=alpha_mode).cuda().train()
    ids = torch.randint(1000, 30000, (SIZES["batch"], SIZES["tokens"]), device="cuda")
    labels = torch.arange(SIZES["batch"], device="cuda") % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        model(ids)  # amplitudes are measured once, before anything is compiled
    forward = model if mode == "eager" else torch.compile(model, mode=mode)

    def step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure(name: str, time_steps: int, mode: str, steps: int) -> dict[str, float]:
    """Median milliseconds per step, peak gigabytes above weights, optimizer state and inputs, first loss."""
    torch.compiler.reset()
    with variant(name):
        step = make_step(name, time_steps, mode)
        loss, *_ = [step().item() for _ in range(3)]
        with Watched(torch.device("cuda")) as memory:
            step()
        ms = milliseconds(step, steps)
    del step
    gc.collect()
    torch.cuda.empty_cache()
    # a replayed graph keeps its memory in a pool of its own, which no counter of a step sees
    return {"ms": ms, "gb": float("nan") if mode == MODES[0] else memory.rise / 2**30, "loss": loss}


def profile() -> None:
    with variant("kernels"):
        step = make_step("kernels", SIZES["time_steps"], "default")
        for _ in range(3):
            step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            for _ in range(3):
                step()
            torch.cuda.synchronize()
    print(trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="print the costliest GPU kernels of a compiled step")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_training: needs a CUDA device")
    torch.set_float32_matmul_precision("high")
    if arguments.profile:
        profile()
    rows = {}
    t = SIZES["time_steps"]
    # the loop only eagerly: compiling 96 unrolled loops and their backward would take longer than all the rest
    cases = [("loop", t, "eager"), *((name, t, mode) for mode in MODES for name in ("kernels", "dense"))]
    cases += [("dense", 1, MODES[0])]
    for name, time_steps, mode in cases:
        key = f"{name} T={time_steps} {mode}"
        rows[key] = measure(name, time_steps, mode, arguments.steps)
        print(key, rows[key], file=sys.stderr, flush=True)
    if abs(rows[f"loop T={t} eager"]["loss"] - rows[f"kernels T={t} eager"]["loss"]) > 1e-2:
        raise SystemExit(f"bench_training: the losses disagree, nothing is reported: {rows}")
    loop, dense = rows[f"loop T={t} eager"], rows[f"dense T={t} {MODES[0]}"]["ms"]
    dense_gb = rows[f"dense T={t} default"]["gb"]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {SIZES}")
    print(f"{'variant':<32}{'ms/step':>9}{'/ dense':>9}{'loop /':>9}{'peak GB':>9}{'/ dense':>9}{'/ loop':>9}")
    for key, row in rows.items():
        print(
            f"{key:<32}{row['ms']:9.1f}{row['ms'] / dense:9.2f}{loop['ms'] / row['ms']:9.2f}"
            f"{row['gb']:9.2f}{row['gb'] / dense_gb:9.2f}{row['gb'] / loop['gb']:9.2f}"
        )


if __name__ == "__main__":
    main()
