"""What an operation and a byte cost: frozen, cited tables in picojoules, and the firing rate where spikes break even.

Counts name primitives: add, mul, div, exp (floats), iadd (integer accumulate), imul8 (8-bit integer multiply), event
(one spike looked up by its address). A table says what each costs; a report carries the table's name and hash.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256

from snlp_zoo import errors
from snlp_zoo.errors import EnergyError, Named

HOROWITZ = "Horowitz 2014, ISSCC, doi:10.1109/ISSCC.2014.6757323"
HAN = "Han et al. 2015, NeurIPS, table 1"


def lookup(what: str, name: str, known: Mapping[str, Named]) -> Named:
    """As `errors.lookup`, with an EnergyError."""
    return errors.lookup(what, name, known, EnergyError)


@dataclass(frozen=True)
class Cost:
    """pj picojoules for one operation on words of width_bits, or for moving one such word."""

    pj: float
    width_bits: int
    citation: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.pj) and self.pj >= 0 and self.width_bits > 0):
            raise EnergyError(f"a cost must be finite and at least 0 pJ per word of 1 bit or more, got {self}")


@dataclass(frozen=True)
class CostTable:
    """One technology's costs; equal content has an equal hash.

    Args:
        name, version: of the table; change a number and the version changes.
        node_nm, volt: of the process.
        operations: primitive -> Cost.
        places: memory -> Cost of reading or writing one word there.
    """

    name: str
    version: int
    node_nm: int
    volt: float
    operations: tuple[tuple[str, Cost], ...]
    places: tuple[tuple[str, Cost], ...]

    def pj(self, counts: Mapping[str, float]) -> float:
        """Picojoules of these operations: primitive -> how many."""
        prices = dict(self.operations)
        return sum(number * lookup("operation", primitive, prices).pj for primitive, number in counts.items())

    @property
    def mac(self) -> float:
        """Float multiply and add, pJ."""
        return self.pj({"mul": 1, "add": 1})

    def integer_mac(self, bits: int = 8) -> float:
        """Multiply 8-bit weights by `bits`-bit inputs and accumulate, pJ: multiplying is linear in the bits."""
        return self.pj({"imul8": bits / 8, "iadd": 1})

    def pj_per_byte(self, place: str | float) -> float:
        """Of a memory by name, or the number itself."""
        if not isinstance(place, str):
            return Cost(place, 8, "custom").pj
        cost = lookup("memory place", place, dict(self.places))
        return cost.pj * 8 / cost.width_bits

    @property
    def sha256(self) -> str:
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def _table(name: str, *, floats: int = 32, integer_add: tuple[float, int] = (0.1, 32), sram: Cost | None = None):
    add, mul = {32: (0.9, 3.7), 16: (0.4, 1.1)}[floats]
    ratio = "division 7.1 times a multiplication (PMC8934428)"
    operations = (
        ("add", Cost(add, floats, HOROWITZ)),
        ("mul", Cost(mul, floats, HOROWITZ)),
        ("div", Cost(26.3 if floats == 32 else round(7.1 * mul, 2), floats, ratio)),
        ("exp", Cost(10 * (mul + add), floats, "assumption: ten multiply-adds")),
        ("iadd", Cost(*integer_add, HOROWITZ)),
        ("imul8", Cost(0.2, 8, HOROWITZ)),
        ("event", Cost(0.1, 32, "one 32-bit add per event: Lemaire et al. 2022, arXiv:2210.13107")),
    )
    places = (
        ("none", Cost(0.0, 32, "memory is not counted")),
        ("sram", sram or Cost(5.0, 32, HAN)),
        ("dram", Cost(640.0, 32, HAN)),
    )
    return CostTable(name, 1, 45, 0.9, operations, places)


# Accumulators of integers are 32 bits wide: with 8-bit weights and 768 inputs a sum needs 18 (`accumulator_bits`).
COST_TABLES: dict[str, CostTable] = {
    table.name: table
    for table in (
        _table("horowitz45"),
        _table("horowitz45_fp16", floats=16),
        _table("horowitz45_int8", integer_add=(0.03, 8)),  # optimistic: overflows as soon as two numbers are added
        _table("horowitz45_step", sram=Cost(3.12, 1, "STEP, arXiv:2505.11151, as in SpikingJelly's simple_energy")),
    )
}


@dataclass(frozen=True)
class Memory:
    """Where words live and how often they move.

    Args:
        weight, activation, membrane: a place of the cost table, or pJ per byte.
        traffic: how often weights are read. "event": for every accumulate (or multiply-accumulate) that uses one;
            "step": the matrix once per time step; "fold": once per text, all T in one tile; "resident": never.
        reuse_dense, reuse_spiking: uses of a weight per read, for traffic "event".
        event_driven: membranes are read and written for every accumulate, not once per neuron and step.
        spikes: "events" (addresses), "bitmap" (one bit per neuron and step, whatever the rate), or the "cheaper".
    """

    name: str
    weight: str | float = "none"
    activation: str | float = "none"
    membrane: str | float = "none"
    traffic: str = "event"
    reuse_dense: float = 1.0
    reuse_spiking: float = 1.0
    event_driven: bool = False
    spikes: str = "cheaper"

    def __post_init__(self) -> None:
        for field, allowed in {"traffic": TRAFFIC, "spikes": SPIKE_FORMATS}.items():
            lookup(f"memory {field}", getattr(self, field), dict.fromkeys(allowed, True))
        if not (self.reuse_dense >= 1 and self.reuse_spiking >= 1):
            raise EnergyError(
                f"a weight is used at least once per read, got reuse {self.reuse_dense}, {self.reuse_spiking}"
            )


TRAFFIC = ("event", "step", "fold", "resident")
SPIKE_FORMATS = ("events", "bitmap", "cheaper")
MEMORY_MODELS: dict[str, Memory] = {
    memory.name: memory
    for memory in (
        Memory("none"),
        Memory("sram", "sram", "sram", "sram"),
        Memory("dram", "dram", "sram", "sram", traffic="fold"),
    )
}


def qnn_bits(time_steps: int) -> int:
    """Bits of the activation that T binary spikes can stand for: the quantised network to compare with."""
    return math.ceil(math.log2(time_steps + 1))


def accumulator_bits(weight_bits: float, fan_in: int) -> int:
    """Width of an integer sum that cannot overflow."""
    return math.ceil(weight_bits) + math.ceil(math.log2(fan_in))


def break_even_rate(
    time_steps: int,
    *,
    weight: float = 0.0,
    spiking_weight: float | None = None,
    activation: float = 0.0,
    membrane: float = 0.0,
    spike: float = 0.0,
    address: float = 0.0,
    neuron: float = 0.0,
    mac: float = 4.6,
    ac: float = 0.9,
    size: float = 1.0,
    fan_in: int = 768,
    fan_out: int = 768,
    reuse_dense: float = 1.0,
    reuse_spiking: float = 1.0,
    event_driven: bool = False,
) -> float:
    """Below which firing rate a spiking linear layer takes less energy than the same layer with multiplications.

        r* = (mac + w / reuse_dense + a (1/K + 1/M) - T (2 v + neuron) / K)
             / (T (size (ac + w_s / reuse_spiking + 2 v event_driven + address) + spike (1/K + 1/M)))

    With weight reads dominating and equal reuse r* tends to 1 / T.

    Args:
        time_steps: T.
        weight, activation, membrane: w, a, v, pJ for reading or writing one word.
        spiking_weight: w_s, the same of a spiking layer's weight, if it has fewer bits than the dense one's; else w.
        spike: pJ for moving one spike; address: pJ for each accumulate it causes.
        neuron: pJ of one neuron's own arithmetic per step.
        mac, ac: pJ of a multiply-accumulate and of an accumulate. size: accumulates that a spike takes per output.
        fan_in, fan_out: K, M.
        reuse_dense, reuse_spiking, event_driven: as in `Memory`.
    Returns:
        A rate in [0, 1]; 0 where no rate is low enough, 1 where every rate is.
    Raises:
        EnergyError: a negative or infinite cost, or T, K, M, size or reuse below 1.
    """
    spiking_weight = weight if spiking_weight is None else spiking_weight
    costs = (weight, spiking_weight, activation, membrane, spike, address, neuron, mac, ac)
    if not all(math.isfinite(cost) and cost >= 0 for cost in costs) or not ac > 0:
        raise EnergyError(f"break_even_rate: costs are finite, at least 0 pJ, and ac above 0, got {costs}")
    if min(time_steps, size, fan_in, fan_out, reuse_dense, reuse_spiking) < 1:
        raise EnergyError(
            "break_even_rate: time_steps, size, fan_in, fan_out and reuse are at least 1, got "
            f"{time_steps}, {size:g}, {fan_in}, {fan_out}, {reuse_dense}, {reuse_spiking}"
        )
    ends = 1 / fan_in + 1 / fan_out
    dense = mac + weight / reuse_dense + activation * ends
    every_step = time_steps * (2 * membrane + neuron) / fan_in
    per_event = size * (ac + spiking_weight / reuse_spiking + 2 * membrane * event_driven + address) + spike * ends
    return min(1.0, max(0.0, (dense - every_step) / (time_steps * per_event)))
