"""How fast the neurons run here: every backend against the plain loop, torch.compile of it, and SpikingJelly's neuron.

Each row is one forward and backward from rest. No backend is timed before it equals the reference loop on its input:
spikes exactly, gradients within rounding. Inputs rotate through more memory than the cache holds; times are medians.
On a GPU `kernels` is a replayed CUDA graph, so launches cost nothing, and `bandwidth` compares it with copying: the
bytes that have to move (current, spikes and their gradients, flags) at the speed of the fastest plain copy.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor

from snlp_zoo.errors import BackendError
from snlp_zoo.ops.backend import available
from snlp_zoo.ops.bispike import elastic_bispike, elastic_bispike_reference
from snlp_zoo.ops.lif import lif, lif_reference
from snlp_zoo.ops.surrogates import Surrogate

GPU_SHAPES = ((4, 32, 128, 3072), (4, 64, 512, 3072), (1024, 8, 1, 768), (4096, 1, 1, 768))  # [T, B, N, D]
CPU_SHAPES = ((4, 8, 128, 768),)
CACHE_BYTES = 2**28  # more than any cache there is
LOOP_STEPS = 1024  # longer loops say nothing new, and take minutes
_STATIC_LOOP = 8  # torch.compile unrolls a loop: beyond so many steps it takes longer than it saves
_LARGE = 2**28  # elements from which a loop's saved tensors crowd out everything else


@dataclass(frozen=True)
class Op:
    """One neuron in all its versions: current [T, ...] and amplitudes [T] (where it has them) to spikes [T, ...]."""

    run: Callable[[Tensor, Tensor, str], Tensor]
    loop: Callable[[Tensor, Tensor], Tensor]
    spikingjelly: Callable[[], neuron.BaseNode]
    bytes_moved: Callable[[int, int], float]  # (elements, bytes of one) -> bytes of forward and backward


def _rest(x: Tensor) -> Tensor:
    return torch.zeros_like(x[0], dtype=torch.float32)


_LIF: dict[str, Any] = {"tau": 2.0, "v_threshold": 1.0, "v_reset": 0.0, "decay_input": True, "detach_reset": True}


def _bispike(x: Tensor, alpha: Tensor, backend: str) -> Tensor:
    return elastic_bispike(x, None, alpha, carry_out=False, backend=backend).spikes


def _bispike_loop(x: Tensor, alpha: Tensor) -> Tensor:
    return elastic_bispike_reference(x.float(), _rest(x), alpha, beta=0.25, reset="symmetric").spikes.to(x.dtype)


def _lif(x: Tensor, _: Tensor, backend: str) -> Tensor:
    return lif(x, None, carry_out=False, backend=backend, **_LIF).spikes


def _lif_loop(x: Tensor, _: Tensor) -> Tensor:
    return lif_reference(x.float(), _rest(x), surrogate=Surrogate("atan"), **_LIF).spikes.to(x.dtype)


OPS = {
    "bispike": Op(
        run=_bispike,
        loop=_bispike_loop,
        spikingjelly=lambda: neuron.TernaryLIFNode(step_mode="m", detach_reset=True),
        bytes_moved=lambda elements, size: elements * (4 * size + 2 * 0.25),  # flags: two bits, written and read
    ),
    "lif": Op(
        run=_lif,
        loop=_lif_loop,
        spikingjelly=lambda: neuron.LIFNode(step_mode="m", detach_reset=True, surrogate_function=surrogate.ATan()),
        bytes_moved=lambda elements, size: elements * 5 * size,  # the backward reads the current again
    ),
}


def _verify(name: str, backend: str, x: Tensor, alpha: Tensor, upstream: Tensor) -> None:
    """Compare with the loop on the last rows of the batch, whose offsets are the largest."""
    spikes = OPS[name].run(x, alpha, backend)
    (grad,) = torch.autograd.grad(spikes, x, upstream)
    rows = slice(-2, None)
    part = x.detach()[:, rows].clone().requires_grad_()
    expected = OPS[name].loop(part, alpha)
    (expected_grad,) = torch.autograd.grad(expected, part, upstream[:, rows])
    tolerance = 1e-5 if x.dtype == torch.float32 else 1e-2
    equal = torch.equal(spikes[:, rows], expected)
    if not equal or not torch.allclose(grad[:, rows], expected_grad, rtol=tolerance, atol=tolerance):
        raise BackendError(f"{name} on {backend}: differs from the reference at {tuple(x.shape)} {x.dtype}: not timed")


def _passes(function: Callable[[Tensor], Tensor], inputs: list[Tensor], upstream: list[Tensor]) -> list[Callable]:
    def one(x: Tensor, grad: Tensor) -> None:
        x = x.detach().requires_grad_()  # a leaf of this stream: its gradient may be captured
        torch.autograd.grad(function(x), x, grad)

    return [lambda x=x, grad=grad: one(x, grad) for x, grad in zip(inputs, upstream, strict=True)]


def _cpu_ms(calls: list[Callable], repeats: int) -> float:
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        calls[i % len(calls)]()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def _gpu_ms(calls: list[Callable], repeats: int, per_call: int = 1) -> float:
    """Median time between events; the queue never runs dry unless launching is what takes the time."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for i in range(repeats):
        calls[i % len(calls)]()
        events[i + 1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / per_call


def _graph_ms(calls: list[Callable], repeats: int) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and allocates outside of the capture
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _gpu_ms([graph.replay], repeats, per_call=len(calls))


def copy_bandwidth() -> float:
    """GB/s of the fastest plain copy on the GPU, bytes read plus bytes written."""
    best = 0.0
    for size in (2**27, 2**28, 2**29):
        source, target = torch.rand(size // 4, device="cuda"), torch.empty(size // 4, device="cuda")
        for copy in (lambda s=source, t=target: t.copy_(s), lambda s=source, t=target: torch.mul(s, 1.0, out=t)):
            best = max(best, 2 * size / _gpu_ms([copy], 20) / 1e6)
    return best


def _run(op: Op, alpha: Tensor, backend: str, x: Tensor) -> Tensor:
    return op.run(x, alpha, backend)


def _measure(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, report: Callable) -> list[dict]:
    """One row per backend for one op, shape and dtype."""
    op, elements = OPS[name], torch.Size(shape).numel()
    on_gpu, size = device == "cuda", dtype.itemsize
    sets = max(1, min(8, -(-CACHE_BYTES // (elements * size)))) if on_gpu else 2
    draw = [torch.randn(shape, device=device).to(dtype) for _ in range(2 * sets)]
    inputs, upstream = [x.requires_grad_() for x in draw[:sets]], draw[sets:]
    time_ms = _gpu_ms if on_gpu else _cpu_ms
    others: dict[str, float] = {}

    def against(label: str, function: Callable[[Tensor], Tensor]) -> None:
        slow = shape[0] > _STATIC_LOOP
        calls = _passes(function, inputs, upstream)[: 2 if slow else None]
        others[label] = time_ms(calls, 3 if slow else 20)
        if on_gpu:
            torch.cuda.empty_cache()

    alpha = torch.full(shape[:1], 0.8, device=device)

    def loop(x: Tensor) -> Tensor:
        return op.loop(x, alpha)

    node = op.spikingjelly().to(device)

    def spikingjelly(x: Tensor) -> Tensor:
        functional.reset_net(node)
        return node(x)

    if shape[0] <= LOOP_STEPS:
        against("loop", loop)
        if shape[0] <= _STATIC_LOOP and elements < _LARGE:
            torch.compiler.reset()
            against("compile", torch.compile(loop))
        against("spikingjelly", spikingjelly)
    rows = []
    for backend in available(name, torch.device(device), dtype) if on_gpu else ["torch"]:
        _verify(name, backend, inputs[0], alpha, upstream[0])
        calls = _passes(partial(_run, op, alpha, backend), inputs, upstream)
        row: dict[str, Any] = {
            "op": name,
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "backend": backend,
        }
        row["ms"] = time_ms(calls, 30)
        if on_gpu:
            row["kernels_ms"] = _graph_ms(calls, 20)
            row["gb_per_s"] = op.bytes_moved(elements, size) / row["kernels_ms"] / 1e6
        row |= {f"{label}_ms": value for label, value in others.items()}
        report(row)
        rows.append(row)
    return rows


def measure(ops: list[str], report: Callable[[dict], None] = lambda row: None) -> dict[str, Any]:
    """Time `ops` on the GPU, or on the CPU without one.

    Args:
        ops: names from `OPS`.
        report: called with each row as it is ready.
    Returns:
        device, torch's version, copy_gb_per_s (None on the CPU) and rows.
    Raises:
        BackendError: a backend differs from the reference.
    """
    on_gpu = torch.cuda.is_available()
    device, shapes = ("cuda", GPU_SHAPES) if on_gpu else ("cpu", CPU_SHAPES)
    dtypes = (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "copy_gb_per_s": copy_bandwidth() if on_gpu else None,
        "rows": [],
    }
    for name in ops:
        for shape in shapes:
            for dtype in dtypes:
                result["rows"] += _measure(name, shape, dtype, device, report)
    return result
