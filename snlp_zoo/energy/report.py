"""The estimate: what a model's forward on a batch costs, beside the same network without spikes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from snlp_zoo.energy.costs import COST_TABLES, MEMORY_MODELS, CostTable, Memory, break_even_rate, lookup, qnn_bits
from snlp_zoo.energy.counting import Counting, counting
from snlp_zoo.energy.movement import Traffic, dense_traffic, spiking_traffic, stored_bits
from snlp_zoo.energy.rows import Row
from snlp_zoo.errors import EnergyError
from snlp_zoo.layers.spike_linear import SpikeLinear

STATEMENT = (
    "An estimate from published constants of single operations, not a measurement; on GPUs spiking inference is "
    "normally slower and takes more energy than the dense network."
)
UNTOUCHED = (
    "No matrix product of this model has spikes among its inputs: neurons that stay silent save none of its products."
)
BASELINES = ("dense_fp32", "dense_int8", "qnn")
LEVELS = ("matmul_only", "all_ops", "with_memory")
_DENSE_PRIMITIVE = {"gate": "mul", "counter": "add"}  # for every element, where spikes take integer additions
_SPIKING_ONLY = ("neuron", "amplitude", "scale", "readout")  # what a dense network has no need of


@dataclass(frozen=True)
class EnergyReport:
    """What `estimate` found. Ratios are baseline / spiking: above 1 the spiking network takes less.

    ratios: level -> baseline -> ratio, None where spikes take nothing.
    bounds: of ratios and of totals.pj, [lowest, highest] over the cost tables that know the memory's places.
    energy_pj: level -> "spiking" or a baseline -> picojoules of the whole batch.
    spike_driven_fraction: accumulates caused by spikes, of all accumulates and multiply-accumulates;
    spike_driven_energy_fraction: the same of their energy.
    totals: ac, mac, other (primitives outside products), bytes, pj and pj_per_token (both with memory).
    norm_ops, norm_ops_ratio: Norm#OPS of the linear layers with spiking inputs, and 5.1 / Norm#OPS.
    layers: name, role, kind, spike_driven, nnz, total (what all spikes add up to), elements, rate (nnz / elements), ifr
    (spikes per neuron over all steps; of a code of whole numbers per number), ac, mac, alternative (primitives of one
    multiplication per integer, in place of ac; pj is that of the cheaper), other, bytes, pj.
    time_steps: T; of a converted model the largest of its layers' codes. break_even_rate: in each of the T steps.
    codes: of a converted model its codes, spikes per activation, share of activations without, and the largest count.
    data: what was run, in words.
    coverage: every tensor operation seen, and how often; none was without a price.
    """

    model: str
    time_steps: int
    texts: int
    tokens: int
    ratios: dict[str, dict[str, float | None]]
    bounds: dict[str, Any]
    energy_pj: dict[str, dict[str, float]]
    spike_driven_fraction: float
    spike_driven_energy_fraction: float
    norm_ops: float
    norm_ops_ratio: float | None
    break_even_rate: float
    totals: dict[str, float]
    layers: list[dict[str, Any]]
    costs: dict[str, Any]
    memory: dict[str, Any]
    coverage: dict[str, Any]
    statement: str = STATEMENT
    measured: dict[str, Any] | None = None
    data: str = "given"
    codes: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """A section for a model card."""
        from snlp_zoo.energy.markdown import markdown

        return markdown(self)


def split_texts(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every text of a batch by itself, without its padding: neither companions nor padding change what it costs.

    Raises:
        EnergyError: no input_ids or inputs_embeds, or nothing but padding.
    """
    given = batch.get("input_ids", batch.get("inputs_embeds"))
    if given is None:
        raise EnergyError(f"a batch needs input_ids or inputs_embeds, got {', '.join(batch) or 'nothing'}")
    mask = batch.get("attention_mask")
    mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device) if mask is None else mask
    if not mask.any():
        raise EnergyError(f"the batch {tuple(given.shape[:2])} is only padding; give it at least one token")
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "index") and value is not None}
    inputs["attention_mask"] = mask
    for row in range(len(given)):
        if (kept := mask[row] != 0).any():
            yield {key: _own(value, row, kept, len(given)) for key, value in inputs.items()}


def _own(value: Any, row: int, kept: Tensor, texts: int) -> Any:
    """A text's part of an argument; tensors without an axis of texts are shared, without one of tokens as they are."""
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    return value[row : row + 1, kept] if len(value) == texts else value[:, kept]


def count(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Counting, int, int, int]:
    """Run every text and count: Counting, T (1 where no tensor has an axis of it), texts, tokens.

    Raises:
        EnergyError: an operation without a price, or nothing that spikes.
    """
    texts = list(split_texts(batch))
    silent = EnergyError(f"{type(model).__name__} has no spiking neuron that ran; there is nothing to estimate")
    if not any(isinstance(module, BaseNode | SpikeLinear) for module in model.modules()):
        raise silent
    with counting(model) as counter:
        for text in texts:
            model(**text)
    if not counter.steps and not counter.coded:
        raise silent
    steps = max(counter.steps.values(), default=len(texts)) // len(texts)
    return counter, steps, len(texts), sum(text["attention_mask"].shape[1] for text in texts)


def estimate(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    costs: str | CostTable = "horowitz45",
    memory: str | Memory = "sram",
    baselines: Sequence[str] = BASELINES,
) -> EnergyReport:
    """Energy of a model's forward on a batch, as the operations and bytes it takes on hardware that runs spikes.

    What is counted is what the forward computes without gradients: of a model trained at equilibrium the T steps of its
    spiking network, not its steady state. Neurons count as neurons, whatever this machine computes in their place.

    Args:
        model: takes the batch's entries by name; its neurons are SpikingJelly's or ours, in step mode "m".
        batch: input_ids or inputs_embeds [B, N, ...], attention_mask [B, N] and other arguments of its forward.
        costs: a name in `COST_TABLES`, or a table.
        memory: a name in `MEMORY_MODELS`, or a `Memory`.
        baselines: of "dense_fp32", "dense_int8" (8-bit weights and activations, 32-bit sums) and "qnn" (8-bit weights,
            activations of ceil(log2(T + 1)) bits, in a converted model of the bits that tell all counts up to the
            largest apart); each is this network at T = 1 with real products and no neurons.
            Floats, and what is outside products, are as the table has them; a float takes 4 bytes on every side,
            whatever the model was loaded in.
    Raises:
        EnergyError: nothing spikes, only padding, an unpriced operation, spikes outside their declared alphabet, or an
            unknown table, memory or baseline.
    """
    table = lookup("cost table", costs, COST_TABLES) if isinstance(costs, str) else costs
    memory = lookup("memory model", memory, MEMORY_MODELS) if isinstance(memory, str) else memory
    for name in baselines:
        lookup("baseline", name, dict.fromkeys(BASELINES, True))
    counter, steps, texts, tokens = count(model, batch)
    if counter.problems:
        raise EnergyError("; ".join(f"{where}: {what}" for where, what in counter.problems.items()))
    rows = list(counter.rows.values())
    values = max((layer.values for layer in counter.coded.values()), default=0)
    sides = [_Prices(rows, steps, texts, t, memory, baselines, values) for t in (table, *_others(table, memory))]
    return _report(model, sides, tokens, counter)


def _others(table: CostTable, memory: Memory) -> list[CostTable]:
    """The published tables that know this memory's places."""
    places = {place for place in (memory.weight, memory.activation, memory.membrane) if isinstance(place, str)}
    return [other for other in COST_TABLES.values() if other != table and places <= dict(other.places).keys()]


def _report(model: nn.Module, every: "list[_Prices]", tokens: int, counter: Counting) -> EnergyReport:
    """`every`: the rows under the table asked for, and under all others."""
    prices = every[0]
    table, memory, steps, rows = prices.table, prices.memory, prices.steps, prices.rows
    products = [row for row in rows if row.role == "matmul"]
    driven = [row for row in products if row.spike_driven]
    ac, mac = sum(row.ac for row in products), sum(row.mac for row in products)
    layers = [prices.layer(row) for row in rows]
    total = prices.energy["with_memory"]["spiking"]
    time_steps = max([steps, *(layer.time_steps for layer in counter.coded.values())])
    norm_ops, break_even = _norm_ops(driven, steps), _break_even(driven, time_steps, table, memory)
    return EnergyReport(
        model=type(model).__name__,
        time_steps=time_steps,
        texts=prices.texts,
        tokens=tokens,
        ratios=prices.ratios,
        bounds=_bounds(every),
        energy_pj=prices.energy,
        spike_driven_fraction=sum(row.ac for row in driven) / max(ac + mac, 1),
        spike_driven_energy_fraction=sum(map(prices.product, driven)) / (sum(map(prices.product, products)) or 1.0),
        norm_ops=norm_ops,
        norm_ops_ratio=5.1 / norm_ops if norm_ops else None,
        break_even_rate=break_even,
        totals={
            "ac": ac,
            "mac": mac,
            "other": sum(layer["other"] for layer in layers),
            "bytes": sum(layer["bytes"] for layer in layers),
            "pj": total,
            "pj_per_token": total / tokens,
        },
        layers=layers,
        statement=STATEMENT if driven else f"{STATEMENT} {UNTOUCHED}",
        costs={"name": table.name, "version": table.version, "node_nm": table.node_nm, "sha256": table.sha256},
        memory=asdict(memory),
        coverage={"operations": dict(sorted(counter.seen.items())), "unpriced": []},
        codes=_codes(model, rows, counter),
    )


class _Prices:
    """Rows under one table and memory model."""

    def __init__(self, rows, steps: int, texts: int, table: CostTable, memory: Memory, baselines, values=0) -> None:
        self.rows: list[Row] = rows
        self.bits = qnn_bits(max(steps, values - 1))
        self.steps, self.texts, self.table, self.memory = steps, texts, table, memory
        sides = {"spiking": self._spiking(), **{name: self._baseline(name) for name in baselines}}
        self.energy = {level: {side: e[i] for side, e in sides.items()} for i, level in enumerate(LEVELS)}
        self.ratios = {
            level: {name: found[name] / found["spiking"] if found["spiking"] else None for name in baselines}
            for level, found in self.energy.items()
        }

    def product(self, row: Row) -> float:
        """pJ of a row's own operations: of two ways to compute it, the cheaper."""
        first = self.table.pj(row.counts)
        return min(first, self.table.pj(row.alternative)) if row.alternative else first

    def traffic(self, row: Row) -> Traffic:
        return spiking_traffic(row, self.memory, self.steps, self.texts)

    def moving(self, row: Row) -> float:
        """pJ of a row's bytes, and of looking up the events its inputs are, if memory counts at all."""
        pj = self.traffic(row).pj(self.memory, self.table)
        events = row.events if row.role == "matmul" and row.spike_driven and self.memory.name != "none" else 0
        return pj + self.table.pj({"event": events})

    def _spiking(self) -> tuple[float, float, float]:
        matmul = sum(self.product(row) for row in self.rows if row.role == "matmul")
        every = sum(map(self.product, self.rows))
        return matmul, every, every + sum(map(self.moving, self.rows))

    def _baseline(self, name: str) -> tuple[float, float, float]:
        bits = self.bits if name == "qnn" else 8
        mac = self.table.mac if name == "dense_fp32" else self.table.integer_mac(bits)
        weight_bytes, activation_bytes = (4.0, 4.0) if name == "dense_fp32" else (1.0, bits / 8)
        matmul = other = moved = 0.0
        for row in self.rows:
            once = 1 / self.steps if row.timed else 1.0
            if row.role == "matmul":
                matmul += row.dense * once * mac
            elif row.role in _DENSE_PRIMITIVE:
                other += self.table.pj({_DENSE_PRIMITIVE[row.role]: row.dense}) * once
            elif row.role not in _SPIKING_ONLY:
                other += self.table.pj(row.counts) * once
            traffic = dense_traffic(row, self.memory, self.steps, self.texts, weight_bytes, activation_bytes)
            moved += traffic.pj(self.memory, self.table)
        return matmul, matmul + other, matmul + other + moved

    def layer(self, row: Row) -> dict[str, Any]:
        rate, fired = (number / row.elements if row.elements else None for number in (row.nnz, row.events))
        return {
            "name": row.name,
            "role": row.role,
            "kind": row.kind,
            "spike_driven": row.spike_driven,
            "nnz": row.nnz,
            "total": row.total,
            "elements": row.elements,
            "rate": rate,
            "ifr": None if fired is None else fired * (self.steps if row.timed else 1),
            "ac": row.ac,
            "mac": row.mac,
            "alternative": dict(row.alternative),
            "other": 0 if row.role == "matmul" else sum(row.counts.values()),
            "bytes": sum(self.traffic(row)),
            "pj": self.product(row) + self.moving(row),
        }


def _codes(model: nn.Module, rows: list[Row], counter: Counting) -> dict[str, Any] | None:
    """Over all layers with a code of whole numbers, each activation counted once."""
    coded = [row for row in rows if row.role == "matmul" and row.name in counter.coded]
    if not coded:
        return None
    layers = [model.get_submodule(name) for name in counter.coded]
    activations = sum(row.elements for row in coded)
    return {
        "codes": sorted({str(layer.code) for layer in layers}),
        "spikes_per_activation": sum(row.spikes for row in coded) / activations,
        "zero_share": 1 - sum(row.nnz for row in coded) / activations,
        "largest_count": max(found.largest for found in counter.coded.values()),
    }


def _norm_ops(driven: list[Row], steps: int) -> float:
    """Sum of IFR_i OPS_(i+1) over sum of OPS_i, linear layers with spiking inputs only (Lu and Sengupta 2020)."""
    linear = [row for row in driven if row.weight_bits and (row.timed or steps == 1)]
    operations = sum(row.dense for row in linear) / steps
    return sum(row.total * row.fan_out for row in linear) / operations if operations else 0.0


def _break_even(driven: list[Row], steps: int, table: CostTable, memory: Memory) -> float:
    """`break_even_rate` of the model's mean layer under these costs, beside a dense_fp32 one; weights count where every
    event reads one.
    """
    linear = [row for row in driven if row.weight_bits] or driven
    if not linear:
        return 0.0
    spikes, sizes = sum(row.spikes for row in linear), sum(row.sizes for row in linear)
    bits = [stored_bits(row.weight_bits or 32) for row in linear]
    word = {name: 4 * table.pj_per_byte(getattr(memory, name)) for name in ("weight", "activation", "membrane")}
    if memory.traffic != "event":
        word["weight"] = 0.0
    return break_even_rate(
        steps,
        **word,
        spiking_weight=word["weight"] * sum(bits) / (32 * len(bits)),
        mac=table.mac,
        ac=sum(table.pj({"iadd" if "iadd" in row.counts else "add": 1}) for row in linear) / len(linear),
        size=sizes / spikes if spikes else 1.0,
        fan_in=round(sum(row.fan_in for row in linear) / len(linear)),
        fan_out=round(sum(row.fan_out for row in linear) / len(linear)),
        reuse_dense=memory.reuse_dense,
        reuse_spiking=memory.reuse_spiking,
        event_driven=memory.event_driven,
    )


def _bounds(every: list[_Prices]) -> dict[str, Any]:
    def span(values: list[float | None]) -> list[float] | None:
        known = [value for value in values if value is not None]
        return [min(known), max(known)] if known else None

    return {
        "pj": span([prices.energy["with_memory"]["spiking"] for prices in every]),
        "ratios": {
            level: {name: span([prices.ratios[level][name] for prices in every]) for name in names}
            for level, names in every[0].ratios.items()
        },
        "tables": [prices.table.name for prices in every],
    }
