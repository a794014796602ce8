"""Published energy claims, and the firing rate each would need under its own way of counting.

Every claim counts products only: E_dense = mac MACs, E_spiking = ac T r MACs, so a ratio e needs r = mac / (ac T e).
"""

from dataclasses import dataclass

from snlp_zoo.energy.costs import COST_TABLES, CostTable
from snlp_zoo.energy.markdown import percent


@dataclass(frozen=True)
class Claim:
    """ratio: dense energy / spiking energy as published; time_steps: T it was published for.

    paper_ratio: of mac to ac if the paper rounds it (5.1), else None; doubled: show what follows if the paper priced
    the dense network's FLOPs as MACs, which doubles its energy.
    """

    system: str
    source: str
    claim: str
    ratio: float
    time_steps: int
    paper_ratio: float | None = None
    doubled: bool = False
    remark: str = ""

    def needed_rate(self, table: CostTable) -> float:
        """The mean firing rate at which the claim holds, over products alone."""
        mac_over_ac = self.paper_ratio or table.mac / table.pj({"add": 1})
        return mac_over_ac / (self.time_steps * self.ratio)


CLAIMS = (
    Claim("SpikeLM", "arXiv:2406.03287", "3.7x less than BERT", 3.7, 4, remark="amplitudes, norms, softmax left out"),
    Claim("SpikingBERT", "arXiv:2308.10873", "half of the dense network at T = 16", 2.0, 16, 5.1,
          remark="its accuracy table is for T = 80, where the same rate gives 0.40x"),
    Claim("SpikeBERT", "arXiv:2308.15122", "28 % of BERT's energy", 1 / 0.28, 4, doubled=True,
          remark="residuals are integers, not spikes"),
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What `estimate` says of one of our models: the rate at the inputs of its products, ratios to dense_fp32."""

    entry: str
    data: str
    time_steps: int
    rate: float
    spike_driven_fraction: float
    matmul_only: float
    all_ops: float
    with_memory: float


def ledger(found: dict[str, list[Found]]) -> str:
    """Two tables: each claim and the rate it needs; our models of that system, and whether their rates are that low.

    Args:
        found: system -> measurements, in any order.
    """
    table = COST_TABLES["horowitz45"]
    lines = ["| system | published | T | rate it needs | if its dense FLOPs were priced as MACs | remark |"]
    lines.append("|---" * 6 + "|")
    for claim in CLAIMS:
        rate = claim.needed_rate(table)
        undone = f"{200 * rate:.1f} %, and the ratio is {claim.ratio / 2:.2f}x" if claim.doubled else "-"
        lines.append(
            f"| {claim.system} ({claim.source}) | {claim.claim} | {claim.time_steps} | {100 * rate:.1f} % | {undone} "
            f"| {claim.remark} |"
        )
    lines += [
        "",
        "| our model | data | T | rate | spike-driven | products only | all operations | with memory | claim |",
    ]
    lines.append("|---" * 9 + "|")
    for claim in CLAIMS:
        if not found.get(claim.system):
            lines.append(f"| no {claim.system} in this zoo yet" + " | -" * 7 + " | not tested |")
        for row in found.get(claim.system, []):
            needed = claim.needed_rate(table)
            verdict = "low enough" if row.rate <= needed else "too high"
            reached = f"({claim.ratio * needed / row.rate:.2f}x)"
            lines.append(_line(row, f"{verdict} for {claim.ratio:.2f}x at T = {claim.time_steps} {reached}"))
    claimed = [claim.system for claim in CLAIMS]
    lines += [_line(row, "-") for system, rows in found.items() if system not in claimed for row in rows]
    return "\n".join(lines)


def _line(row: Found, verdict: str) -> str:
    return (
        f"| {row.entry} | {row.data} | {row.time_steps} | {100 * row.rate:.1f} % "
        f"| {percent(row.spike_driven_fraction, 2)} | {row.matmul_only:.2f}x | {row.all_ops:.2f}x "
        f"| {row.with_memory:.2f}x | {verdict} |"
    )
