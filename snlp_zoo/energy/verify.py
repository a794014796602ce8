"""Where the spikes are: for every product, whether an operand is spikes of the declared alphabet in the data it got."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any

from torch import nn

from snlp_zoo.energy.report import count
from snlp_zoo.errors import EnergyError


@dataclass(frozen=True)
class Verified:
    """One product: its operands' declared kinds, who made the spikes, and what does not hold (None: all does).

    claimed: the model says that this product has spikes on one side; spike_driven: it has.
    """

    layer: str
    operands: tuple[str, ...]
    sources: tuple[str, ...]
    claimed: bool
    spike_driven: bool
    problem: str | None


@dataclass(frozen=True)
class Verification:
    """ok: every claim held. failures: neuron or product -> what did not."""

    model: str
    products: list[Verified]
    failures: dict[str, str]
    spike_driven_fraction: float

    @property
    def ok(self) -> bool:
        return not self.failures

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"ok": self.ok}, indent=2)


def verify_spikes(model: nn.Module, batch: Mapping[str, Any], claimed_fraction: float | None = None) -> Verification:
    """Check a model's claims about its spikes on the data of one batch.

    Claims: a neuron gives its declared alphabet (`spike_kind`); so does every tensor made of its spikes that enters a
    product; modules matching the patterns in the model's `spike_driven` have spikes on one side of every product; the
    spikes of every `SpikeLinear` are of its code's alphabet and say the counts it computes with.

    Args:
        model, batch: as in `estimate`.
        claimed_fraction: a published spike_driven_fraction, to hold within a percentage point.
    Raises:
        EnergyError: an operation without a price, only padding, nothing that spikes, or a claim that is no fraction.
    """
    if claimed_fraction is not None and not 0 <= claimed_fraction <= 1:
        raise EnergyError(f"a spike-driven fraction is between 0 and 1, got {claimed_fraction}")
    counter, *_ = count(model, batch)
    patterns = getattr(model, "spike_driven", ())
    products, failures = [], dict(counter.problems)
    for row in (row for row in counter.rows.values() if row.role == "matmul"):
        operands = [operand for operand in counter.operands if operand.layer == row.name]
        claimed = row.name in counter.coded or any(fnmatch(row.name, pattern) for pattern in patterns)
        problem = next((operand.problem for operand in operands if operand.problem), None)
        if claimed and not row.spike_driven:
            problem = f"declared spike-driven, but it multiplies {row.kind}"
            failures[row.name] = problem
        kinds, sources = tuple(row.kind.split(" x ")), tuple(sorted({o.source for o in operands if o.source}))
        products.append(Verified(row.name, kinds, sources, claimed, row.spike_driven, problem))
    rows = [row for row in counter.rows.values() if row.role == "matmul"]
    driven = sum(row.ac for row in rows if row.spike_driven)
    fraction = driven / max(sum(row.ac + row.mac for row in rows), 1)
    if claimed_fraction is not None and abs(fraction - claimed_fraction) > 0.01:
        failures["spike_driven_fraction"] = f"claimed {claimed_fraction:.4f}, found {fraction:.4f}"
    return Verification(type(model).__name__, products, failures, fraction)
