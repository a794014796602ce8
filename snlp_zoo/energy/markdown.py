"""An energy report as a section of a model card."""

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from snlp_zoo.energy.report import EnergyReport

_LEVELS = {"matmul_only": "products only, as papers count", "all_ops": "all operations", "with_memory": "with memory"}


def percent(share: float, digits: int) -> str:
    """A share in percent, never rounded up to the whole."""
    text = f"{100 * share:.{digits}f} %"
    return f"> {100 - 10**-digits:.{digits}f} %" if share < 1 and text.startswith("100") else text


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def markdown(report: "EnergyReport") -> str:
    """Ratios with their bounds, totals, and where the energy goes, as Markdown."""
    names = list(report.ratios["matmul_only"])
    lines = ["## Energy", "", report.statement, ""]
    lines += [
        f"{report.model}, T = {report.time_steps}{_codes(report)}, {report.texts} texts, {report.tokens} tokens "
        f"in all without padding ({report.data}); "
        f"costs `{report.costs['name']}` (sha256 `{report.costs['sha256'][:12]}`), memory `{report.memory['name']}`. "
        "A ratio above 1 means that the spiking network takes less; in brackets least and most over all cost tables.",
        "",
        f"| counted | {' | '.join(f'against {name}' for name in names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for level, meaning in _LEVELS.items():
        cells = []
        for name in names:
            span = report.bounds["ratios"][level][name] or [None, None]
            cells.append(f"{_times(report.ratios[level][name])} ({_times(span[0])} to {_times(span[1])})")
        lines.append(f"| {meaning} | {' | '.join(cells)} |")
    totals, low_high = report.totals, report.bounds["pj"]
    computed = ", ".join(f"{totals[key]:,.0f}" for key in ("ac", "mac", "other"))
    driven = [percent(share, 2) for share in (report.spike_driven_fraction, report.spike_driven_energy_fraction)]
    norm = f"{report.norm_ops_ratio:.2f}" if report.norm_ops_ratio else "-"
    lines += [
        "",
        "| quantity | value |",
        "|---|---|",
        f"| spike-driven fraction of accumulates and multiply-accumulates | {driven[0]} |",
        f"| the same of their energy | {driven[1]} |",
        f"| accumulates, multiply-accumulates, other | {computed} |",
        f"| moved | {totals['bytes'] / 1e6:,.2f} MB |",
        f"| energy with memory | {totals['pj'] * 1e-6:,.2f} uJ "
        f"({low_high[0] * 1e-6:,.2f} to {low_high[1] * 1e-6:,.2f}) |",
        f"| per token | {totals['pj_per_token'] * 1e-6:,.3f} uJ |",
        f"| Norm#OPS, and 5.1 / Norm#OPS | {report.norm_ops:.3f}, {norm} |",
        f"| break-even firing rate under these costs | {100 * report.break_even_rate:.1f} % |",
    ]
    if report.codes:
        found, even = report.codes, report.time_steps * report.break_even_rate
        lines += [
            f"| spikes per activation, and where that breaks even | {found['spikes_per_activation']:.2f}, {even:.2f} |",
            f"| activations without a spike | {percent(found['zero_share'], 1)} |",
        ]
    if report.measured:
        joules, device = report.measured["joules_per_token"], report.measured["device"]
        lines.append(f"| measured on {device}, all of the GPU | {1e6 * joules:,.1f} uJ per token |")
    lines += ["", "| where | share of energy | pJ |", "|---|---|---|"]
    return "\n".join(lines + [f"| {role} | {100 * share:.1f} % | {pj:,.0f} |" for role, share, pj in breakdown(report)])


def _codes(report: "EnergyReport") -> str:
    if not report.codes:
        return ""
    codes, largest = " and ".join(report.codes["codes"]), report.codes["largest_count"]
    return f" at most (code {codes}; the largest count is {largest})"


def breakdown(report: "EnergyReport") -> list[tuple[str, float, float]]:
    """Role, share of the energy and pJ, the largest first; products by what drives them."""
    found: Counter = Counter()
    for layer in report.layers:
        driven = "products of spikes" if layer["spike_driven"] else "products of real numbers"
        found[driven if layer["role"] == "matmul" else layer["role"]] += layer["pj"]
    total = sum(found.values()) or 1.0
    return [(role, pj / total, pj) for role, pj in found.most_common() if pj]
