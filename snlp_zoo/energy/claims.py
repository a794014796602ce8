"""Published energy claims, and the firing rate each would need under its own way of counting.

Every claim counts products only: E_dense = mac MACs, E_spiking = ac T r MACs, so a ratio e needs r = mac / (ac T e).
"""

from dataclasses import dataclass

from snlp_zoo.energy.costs import COST_TABLES, CostTable


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
    """What `estimate` says of one of our models: spikes on the inputs of products, T, and its ratios."""

    entry: str
    time_steps: int
    rate: float
    matmul_only: float
    all_ops: float
    with_memory: float
    data: str


def ledger(found: dict[str, list[Found]]) -> str:
    """The ledger page: each claim, the rate it needs, and what our models of that system give.

    Args:
        found: system -> measurements, in any order.
    """
    table = COST_TABLES["horowitz45"]
    lines = [
        "| system | published | T | rate it needs | if its dense FLOPs were priced as MACs | remark |",
        "|---" * 6 + "|",
    ]
    for claim in CLAIMS:
        rate = claim.needed_rate(table)
        undone = (
            f"{200 * rate:.1f} % (true ratio {claim.ratio / 2:.2f}x at {100 * rate:.1f} %)" if claim.doubled else "-"
        )
        lines.append(
            f"| {claim.system} ({claim.source}) | {claim.claim} | {claim.time_steps} | {100 * rate:.1f} % | {undone} "
            f"| {claim.remark} |"
        )
    lines += [
        "",
        "| our model | data | T | rate at products | products only | all operations | with memory | claim |",
        "|---" * 8 + "|",
    ]
    for claim in CLAIMS:
        if not found.get(claim.system):
            lines.append(f"| no {claim.system} in this zoo yet | - | - | - | - | - | - | not tested |")
        for row in found.get(claim.system, []):
            held = "reproduced" if row.matmul_only >= claim.ratio else "not reproduced"
            where = "" if row.time_steps == claim.time_steps else f" at T = {row.time_steps}"
            lines.append(
                f"| {row.entry} | {row.data} | {row.time_steps} | {100 * row.rate:.1f} % | {row.matmul_only:.2f}x "
                f"| {row.all_ops:.2f}x | {row.with_memory:.2f}x | {claim.ratio:.2f}x {held}{where} |"
            )
    return "\n".join(lines)
