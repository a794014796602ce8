"""What the benches share: a clock, a watch on memory, and the package with plain loops in the place of its kernels."""

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from snlp_zoo.layers import SpikingLinear
from snlp_zoo.ops import BiSpikeOutput, LIFOutput, WKVOutput, elastic_bispike, lif, wkv4
from snlp_zoo.ops.bispike import elastic_bispike_reference
from snlp_zoo.ops.counts import Counts, counts
from snlp_zoo.ops.lif import lif_reference
from snlp_zoo.ops.surrogates import as_surrogate
from snlp_zoo.ops.wkv4 import fresh_state, wkv4_reference


def clock(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call; between events on "cuda"."""
    if device == "cpu":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median over calls, after one that warms up; device time on a GPU."""
    call()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return statistics.median(clock(call, device) for _ in range(repeats))


class Watched:
    """Context: how far memory rose inside, in bytes: allocated by torch on a GPU, resident on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __enter__(self):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = self.peak = resident()
            self.over = threading.Event()
            self.thread = threading.Thread(target=self._watch)
            self.thread.start()
        return self

    def _watch(self):
        while not self.over.wait(0.005):
            self.peak = max(self.peak, resident())

    def __exit__(self, *error):
        if self.cuda:
            torch.cuda.synchronize()
            self.rise = torch.cuda.max_memory_allocated() - self.before
        else:
            self.over.set()
            self.thread.join()
            self.rise = max(self.peak, resident()) - self.before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# ---- loops


def wkv4_loop(w, u, k, v, state=None, *, backend="auto") -> WKVOutput:
    """`wkv4` by the reference, in float32."""
    out, state = wkv4_reference(w.float(), u.float(), k.float(), v.float(), fresh_state(k) if state is None else state)
    return WKVOutput(out.to(k.dtype), state)


def lif_loop(
    current, v_init, *, tau, v_threshold, v_reset=0.0, decay_input=True, detach_reset=True, surrogate="atan",
    spike_dtype=None, carry_out=True, backend="auto",
) -> LIFOutput:  # fmt: skip
    """`lif` by the reference, in float32."""
    v_init = torch.full_like(current[0], v_reset or 0.0, dtype=torch.float32) if v_init is None else v_init
    spikes, v = lif_reference(
        current.float(), v_init, tau=tau, v_threshold=v_threshold, v_reset=v_reset, decay_input=decay_input,
        detach_reset=detach_reset, surrogate=as_surrogate(surrogate),
    )  # fmt: skip
    return LIFOutput(spikes.to(spike_dtype or current.dtype), v if carry_out else None)


def elastic_bispike_loop(current, v, alpha, *, beta, reset, spike_dtype=None, **_) -> BiSpikeOutput:
    """`elastic_bispike` by the reference, in float32."""
    v = torch.zeros_like(current[0], dtype=torch.float32) if v is None else v
    spikes, v = elastic_bispike_reference(current.float(), v, alpha, beta=beta, reset=reset)
    return BiSpikeOutput(spikes.to(spike_dtype or current.dtype), v)


def spiking_linear_plain(self: SpikingLinear, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """A neuron in front of an ordinary linear layer, whose backward keeps the spikes as they are."""
    return linear(self.neuron(x, from_rest=True, mask=mask), self.quantised_weight(), self.bias)


LOOPS: dict[Callable, Callable] = {
    wkv4: wkv4_loop,
    lif: lif_loop,
    elastic_bispike: elastic_bispike_loop,
    counts: partial(counts, backend="torch"),
}


def counts_settled(x: Tensor, threshold_scale: float, **options) -> Counts:
    """`counts` by its loop, or by its kernel where sums in another order are all that tells them apart: fewer than one
    count in a thousand is then another, which the layers behind answer with many.
    """
    ours, theirs = counts(x, threshold_scale, **options), LOOPS[counts](x, threshold_scale, **options)
    alike = (ours.counts - theirs.counts).abs().mean() < 1e-3
    return ours if alike and torch.allclose(ours.threshold, theirs.threshold) else theirs


@contextmanager
def loops(settled: bool = False) -> Iterator[None]:
    """The ops of `LOOPS` replaced, wherever the package has imported them, and `SpikingLinear` made of plain parts.

    settled: by loops that agree with kernels where rounding decides (`counts_settled`), to be compared, not timed.
    Amplitudes that follow the data (`alpha_mode="ema"`) are still measured by kernels: train with "first_batch".
    """
    found = [
        (module, name, value)
        for key, module in list(sys.modules.items())
        if key.partition(".")[0] == "snlp_zoo"
        for name, value in list(vars(module).items())
        if callable(value) and any(value is op for op in LOOPS)
    ]
    forward, chosen = SpikingLinear.forward, LOOPS | {counts: counts_settled} if settled else LOOPS
    SpikingLinear.forward = spiking_linear_plain  # type: ignore[method-assign]
    for module, name, value in found:
        setattr(module, name, chosen[value])
    try:
        yield
    finally:
        SpikingLinear.forward = forward  # type: ignore[method-assign]
        for module, name, value in found:
            setattr(module, name, value)
