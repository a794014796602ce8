"""SpikeGPT's two recurrences over tokens, and a training step of it, against loops in PyTorch. For one GPU.

    python tools/bench_spikegpt.py [--batch 8] [--tokens 1024] [--channels 768] [--entry spikegpt_46m] [--no-step]

Milliseconds are medians of forward and backward. "loop" is the reference, one token after another with autograd;
"torch" the package without kernels; "fla" the RWKV-4 kernel of flash-linear-attention, where that is installed. Nothing
of ours is timed before its outputs and gradients agree with the loop's. The step is that of a zoo entry under bfloat16
autocast, with the package's ops and with both of them replaced by loops; their first losses must agree.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from _bench import lif_loop, loops, milliseconds, wkv4_loop
from torch import Tensor

import snlp_zoo
from snlp_zoo.ops import Surrogate, lif, wkv4
from snlp_zoo.ops.backend import available

MEMBRANE = {"tau": 2.0, "v_threshold": 1.0, "v_reset": 0.0, "decay_input": True, "detach_reset": False}
Rows = dict[str, float]  # name -> milliseconds


def compare(
    what: str, variants: dict[str, Callable[..., Tensor]], inputs: list[Tensor], upstream: Tensor, repeats: int
) -> Rows:
    """Times of all variants, of which "loop" says what is right."""

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, upstream)]

    expected = run(variants["loop"])
    tolerance = 1e-4 if upstream.dtype == torch.float32 else 2e-2
    rows = {}
    for name, function in variants.items():
        pairs = zip(run(function), expected, strict=True)
        off = max(((one - other).abs().max() / other.abs().max().clamp_min(1)).item() for one, other in pairs)
        if name != "fla" and not off <= tolerance:
            raise SystemExit(f"bench_spikegpt: {what} by {name} is off by {off:.1e} of the largest, nothing is timed")
        rows[name] = milliseconds(partial(run, function), 3 if name == "loop" else repeats)
        print(f"{what} {name}: {rows[name]:.3f} ms, off by {off:.1e}", file=sys.stderr, flush=True)
    return rows


def bench_wkv4(shape: tuple[int, int, int], dtype: torch.dtype, device: str, repeats: int) -> Rows:
    batch, _, channels = shape
    decay = torch.linspace(-5, 3, channels, device=device)
    u = torch.randn(channels, device=device)
    k, v, upstream = torch.randn(3, *shape, device=device).to(dtype)
    inputs = [x.requires_grad_() for x in (decay, u, k, v)]

    def ours(backend: str, decay: Tensor, *rest: Tensor) -> Tensor:
        return wkv4(-torch.exp(decay), *rest, backend=backend).out

    backends = [*available("wkv4", torch.device(device), dtype), "torch"]
    variants = {name: partial(ours, name) for name in backends}
    if find_spec("fla") and device == "cuda":
        from fla.ops.rwkv4 import fused_recurrent_rwkv4

        state = torch.zeros(batch, 3, 1, channels, device=device, dtype=dtype)
        state[:, 2] = -1e30
        variants["fla"] = lambda decay, u, k, v: fused_recurrent_rwkv4(decay, u, k, v, state)[0]
    variants["loop"] = lambda decay, u, k, v: wkv4_loop(-torch.exp(decay), u, k, v).out
    return compare(f"wkv4 {list(shape)} {dtype}", variants, inputs, upstream, repeats)


def bench_lif(shape: tuple[int, int, int], device: str, repeats: int) -> Rows:
    current, upstream = torch.randn(2, *shape, device=device)
    current = (current * 2 + 0.5).requires_grad_()
    backends = [*available("lif", torch.device(device)), "torch"]

    def ours(backend: str, x: Tensor) -> Tensor:
        return lif(x, None, **MEMBRANE, carry_out=False, backend=backend).spikes

    variants = {name: partial(ours, name) for name in backends}
    variants["loop"] = lambda x: lif_loop(x, None, **MEMBRANE, surrogate=Surrogate("atan")).spikes
    return compare(f"lif {list(shape)}", variants, [current], upstream, repeats)


def bench_step(entry: str, batch: int, tokens: int, device: str, repeats: int) -> Rows:
    """A training step, forward, backward and optimiser."""
    rows, losses = {}, {}
    for name in ("kernels", "loop"):
        torch.manual_seed(0)
        model = snlp_zoo.build(entry).to(device).train()
        ids = torch.randint(model.config.vocab_size, (batch, tokens), device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step(model=model, ids=ids, optimizer=optimizer) -> float:
            torch.manual_seed(1)  # dropout
            with torch.autocast(device, torch.bfloat16):
                loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        if name == "loop":
            with loops():
                losses[name] = step()
                rows[name] = milliseconds(step, 1)
        else:
            losses[name] = step()
            rows[name] = milliseconds(step, repeats)
        print(f"step {name}: {rows[name]:.1f} ms, first loss {losses[name]:.4f}", file=sys.stderr, flush=True)
        del model, optimizer, step
    if abs(losses["kernels"] - losses["loop"]) > 1e-2:
        raise SystemExit(f"bench_spikegpt: first losses disagree, {losses}")
    return rows


def table(results: dict[str, Rows]) -> str:
    lines = [f"{'':<44}{'ms':>10}{'loop /':>10}{'fla /':>10}"]
    for what, rows in results.items():
        for name, ms in rows.items():
            fla = f"{rows['fla'] / ms:10.1f}" if "fla" in rows else f"{'-':>10}"
            lines.append(f"{what + ' ' + name:<44}{ms:10.3f}{rows['loop'] / ms:10.1f}{fla}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 8), ("tokens", 1024), ("channels", 768), ("repeats", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--entry", default="spikegpt_46m")
    parser.add_argument("--no-step", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    shape = options.batch, options.tokens, options.channels
    results = {}
    for dtype in (torch.bfloat16, torch.float32):
        what = f"wkv4 {str(dtype).removeprefix('torch.')}"
        results[what] = bench_wkv4(shape, dtype, device, options.repeats)
    results["lif float32"] = bench_lif((shape[1], shape[0], shape[2]), device, options.repeats)
    if options.no_step or options.entry not in snlp_zoo.list_entries():
        print(f"bench_spikegpt: no training step of {options.entry}", file=sys.stderr)
    else:
        results[f"step {options.entry}"] = bench_step(
            options.entry, options.batch, options.tokens, device, options.repeats // 4 or 1
        )
    print(
        f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, torch {torch.__version__}; B, N, C = {shape}"
    )
    print(table(results))


if __name__ == "__main__":
    main()
