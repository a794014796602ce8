"""How many bytes a spiking layer moves, and how many the same layer moves in a dense network.

Counted: weights, membranes, states of recurrences, spikes, the real inputs and outputs of products, words gathered
from tables. Inputs of norms, softmax and activations stay in registers, on both sides.
"""

import math
from typing import NamedTuple

from snlp_zoo.energy import prices
from snlp_zoo.energy.costs import CostTable, Memory
from snlp_zoo.energy.rows import Row


class Traffic(NamedTuple):
    """Bytes read and written."""

    weight: float = 0.0
    activation: float = 0.0
    membrane: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":  # type: ignore[override]
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))

    def pj(self, memory: Memory, table: CostTable) -> float:
        places = (memory.weight, memory.activation, memory.membrane)
        return sum(size * table.pj_per_byte(place) for size, place in zip(self, places, strict=True))


def _moved_bytes(row: Row, time_steps: int, format_: str) -> float:
    """Spikes as addresses with a time tag, as a bitmap (two bits for ternary), or the cheaper; real words: 4 bytes."""
    total = 0.0
    for kind in {kind for kind, _ in row.moved}:
        words, events, address_bits = (row.moved[kind, what] for what in ("words", "events", "address_bits"))
        if kind not in ("binary", "scaled", "ternary", "code"):
            total += words * prices.REAL_BYTES
            continue
        as_events = (address_bits + events * math.ceil(math.log2(time_steps))) / 8
        as_bitmap = (row.moved[kind, "bitmap_bits"] or words * (2 if kind == "ternary" else 1)) / 8
        total += {"events": as_events, "bitmap": as_bitmap, "cheaper": min(as_events, as_bitmap)}[format_]
    return total


def stored_bits(bits: float) -> int:
    """Bits a weight takes in memory."""
    return 2 if bits == 1.58 else int(bits)


def _matrix_reads(row: Row, memory: Memory, uses: float, reuse: float, times: float) -> float:
    """Weight words: for every use, or the matrix `times` times."""
    if not row.weight_bits or memory.traffic == "resident":
        return 0.0
    return uses / reuse if memory.traffic == "event" else row.fan_in * row.fan_out * times


def _state(row: Row) -> Traffic:
    """A recurrence's state, read and written for every token: as long-lived as a membrane, on both sides."""
    return Traffic(membrane=2 * prices.WKV4_STATE * row.outputs * prices.REAL_BYTES)


def spiking_traffic(row: Row, memory: Memory, time_steps: int, texts: int) -> Traffic:
    """Of a row as it was counted."""
    if row.role == "gather":
        return Traffic(weight=row.bytes) if row.weight_bits else Traffic(activation=row.bytes)
    moved = _moved_bytes(row, time_steps, memory.spikes)
    if row.role == "neuron":
        return Traffic(activation=moved, membrane=2 * (row.state or row.elements) * prices.REAL_BYTES)
    if row.role == "recurrence":
        return _state(row)
    if row.role != "matmul":
        return Traffic()
    reuse = memory.reuse_spiking if row.spike_driven else memory.reuse_dense
    every_step = row.steps or texts * (time_steps if row.timed else 1)
    times = every_step if memory.traffic == "step" else texts
    weights = _matrix_reads(row, memory, row.ac + row.mac, reuse, times) * stored_bits(row.weight_bits) / 8
    to_neuron = row.spike_driven and not row.steps  # outputs of a layer with a code are real numbers
    written = 0.0 if to_neuron else row.outputs * prices.REAL_BYTES
    per_event = 2 * row.ac * prices.REAL_BYTES if memory.event_driven and row.spike_driven else 0.0
    return Traffic(weights, moved + written, per_event)


def dense_traffic(
    row: Row, memory: Memory, time_steps: int, texts: int, weight_bytes: float, activation_bytes: float
) -> Traffic:
    """Of the same row in a dense network, which does everything once."""
    steps = time_steps if row.timed else 1
    if row.role == "gather":
        size = row.bytes / steps
        return Traffic(weight=size) if row.weight_bits else Traffic(activation=size)
    if row.role == "recurrence":
        return _state(row)
    if row.role != "matmul":
        return Traffic()
    uses = row.dense / steps
    words = (sum(number for (_, what), number in row.moved.items() if what == "words") + row.outputs) / steps
    weights = _matrix_reads(row, memory, uses, memory.reuse_dense, texts)
    return Traffic(weights * weight_bytes, words * activation_bytes)
