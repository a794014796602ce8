"""Figures of what a spiking model does: each function returns a matplotlib figure, readable at 800 pixels.

Colours are Okabe and Ito's, told apart with any colour vision. matplotlib is the extra `plots`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from snlp_zoo.energy.markdown import breakdown
from snlp_zoo.errors import EnergyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

    from snlp_zoo.energy import EnergyReport
    from snlp_zoo.energy.record import Recorded

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F"
)  # fmt: skip
FORMATS = ("png", "svg")
_NEURONS = 64  # of a raster: more cannot be told apart


def _figure(height: float = 4.5) -> "tuple[Figure, Axes]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnergyError("figures need matplotlib: pip install 'snlp-zoo[plots]'") from error
    figure = Figure(figsize=(8, height), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def check_ending(path: Path) -> None:
    """Raises EnergyError unless `save` can write there by the path's ending, .png or .svg."""
    if path.suffix.removeprefix(".") not in FORMATS:
        raise EnergyError(f"figures are written as {' or '.join(FORMATS)}, got {path.name!r}")


def save(figure: "Figure", path: Path) -> Path:
    """Write a figure as its ending says.

    Raises:
        EnergyError: as `check_ending`.
    """
    check_ending(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _shortened(names: Sequence[str]) -> list[str]:
    """Module names without what all of them begin with, and without words that say nothing."""
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and len({p[0] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[1:] for p in parts]
    return [".".join(part for part in p if part not in ("layers", "neuron")) for p in parts]


def token_labels(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """Tokens as they read in a text; as the vocabulary writes them if they are only white space or part of a letter."""
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    read = [str(tokenizer.decode([number])).strip() for number in ids]
    return [text if text and "\ufffd" not in text else token for text, token in zip(read, tokens, strict=True)]


def spike_raster(recorded: "Recorded", tokens: Sequence[str], site: str) -> "Figure":
    """Which neurons of one site fired at each step of each token; ternary spikes have two colours and marks.

    Args:
        recorded: of `energy.record`, spikes [T, N, D].
        tokens: N labels; a site with one neuron for all tokens has its own.
    """
    time_steps, length, width = recorded.spikes.shape
    tokens = tokens if length == len(tokens) else ["all tokens"] * length
    shown = min(width, _NEURONS)
    figure, axes = _figure(5.5)
    signs = ((1, "|", BLUE, "+ spike"), (-1, "_", RED, "- spike")) if recorded.ternary else ((1, "|", BLUE, "spike"),)
    for sign, marker, colour, meaning in signs:
        t, n, d = (recorded.spikes[..., :shown].sign() == sign).nonzero(as_tuple=True)
        axes.scatter(n + (t + 0.5) / time_steps, d, s=1000 / shown, marker=marker, c=colour, label=meaning)
    for token in range(1, length):
        axes.axvline(token, color=GREY, linewidth=0.5, alpha=0.5)
    axes.set(xlim=(0, length), ylim=(-1, shown), ylabel=f"neuron (first {shown} of {width})")
    axes.set_xlabel(f"token, T = {time_steps} steps each" if time_steps > 1 else "token")
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if length > 6 else {}
    axes.set_xticks([token + 0.5 for token in range(length)], tokens, parse_math=False, **slanted)
    axes.set_title(f"{site}: {100 * (recorded.spikes != 0).float().mean():.1f} % fired", loc="left", fontsize=11)
    if recorded.ternary:
        figure.legend(loc="outside lower right", ncols=2)
    return figure


def firing_rates(rates: Mapping[str, Any]) -> "Figure":
    """Share of neurons that fired at each site, over all steps.

    Args:
        rates: site -> a rate, or one per time step, as `output.spike_rates`.
    """
    means = [torch.as_tensor(rate).float().mean().item() for rate in rates.values()]
    figure, axes = _figure(max(3.0, 1.2 + 0.19 * len(means)))
    axes.barh(range(len(means)), [100 * mean for mean in means], color=BLUE, height=0.75)
    axes.set_yticks(range(len(means)), _shortened(list(rates)), fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set(xlabel="neurons that fired, %", xlim=(0, max(5.0, 110 * max(means))))
    axes.set_title("Firing rate by site, first layer on top", loc="left")
    return figure


def energy_breakdown(report: "EnergyReport") -> "Figure":
    """Where the energy goes with memory, and the totals of the baselines beside it."""
    found = breakdown(report)
    parts = found[:6] + ([("rest", sum(p[1] for p in found[6:]), sum(p[2] for p in found[6:]))] if found[6:] else [])
    figure, axes = _figure(4.5)
    left = 0.0
    for (role, share, pj), colour in zip(parts, (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY), strict=False):
        axes.barh(0, pj * 1e-6, left=left, color=colour, label=f"{role} {100 * share:.0f} %", height=0.6)
        left += pj * 1e-6
    totals = report.energy_pj["with_memory"]
    names = [name for name in totals if name != "spiking"]
    for row, name in enumerate(names, start=1):
        axes.barh(row, totals[name] * 1e-6, color="white", edgecolor=GREY, hatch="//", height=0.6)
    for row, name in enumerate(["spiking", *names]):
        rounded = float(f"{totals[name] * 1e-6:.3g}")
        axes.text(totals[name] * 1e-6, row, f" {rounded:,g}", va="center")
    axes.set_yticks(range(len(names) + 1), ["spiking", *names])
    axes.invert_yaxis()
    axes.set(xlabel=f"uJ for {report.tokens} tokens, with memory ({report.memory['name']})")
    axes.margins(x=0.1)
    axes.set_title("Estimated energy (not measured)", loc="left")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


def pareto_front(rows: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]]) -> "Figure":
    """Accuracy against estimated energy per token; the best at each energy are outlined and joined.

    Args:
        rows, best: of `pareto.pareto` and `pareto.front`.
    """
    figure, axes = _figure(5)
    longest = max(row["ms_per_text"] for row in rows)
    axes.plot(
        [row["pj_per_token"] * 1e-6 for row in best], [100 * row["accuracy"] for row in best], color=GREY, zorder=1
    )
    thresholds = sorted({row["threshold"] for row in rows})
    markers = dict(zip(thresholds, ("o", "s", "^", "D", "v", "P", "X", "*") * len(thresholds), strict=False))
    colours = dict(zip(thresholds, (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, GREY) * len(thresholds), strict=False))
    for threshold in thresholds:
        some = [row for row in rows if row["threshold"] == threshold]
        axes.scatter(
            [row["pj_per_token"] * 1e-6 for row in some],
            [100 * row["accuracy"] for row in some],
            s=[40 + 160 * row["ms_per_text"] / longest for row in some],
            marker=markers[threshold],
            color=colours[threshold],
            edgecolors=["black" if row in best else "none" for row in some],
            label=f"threshold x {threshold:g}",
            zorder=2,
        )
        for row in some:
            place = (row["pj_per_token"] * 1e-6, 100 * row["accuracy"])
            axes.annotate(f"T={row['time_steps']}", place, (7, -12), textcoords="offset points", fontsize=9)
    axes.set(xlabel="estimated uJ per token, with memory", ylabel="accuracy, %")
    axes.set_title(f"Accuracy, energy, latency (size of a mark; largest {longest:.1f} ms a text)", loc="left")
    axes.margins(0.1)
    axes.set_ylim(top=min(101.0, axes.get_ylim()[1]))
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def membrane_histogram(recorded: "Recorded", site: str) -> "Figure":
    """Charged membranes in units of their threshold, and which of them the gradient of firing reaches."""
    edge = float(recorded.threshold.all())  # 0 where neurons fire at 0, which is no unit
    v = (recorded.membranes / (recorded.threshold.view(-1, 1, 1) if edge else 1)).flatten().float()
    low, high = torch.quantile(v[:: max(1, len(v) // 100_000)], torch.tensor([0.001, 0.999])).tolist()
    low, high = min(low, -1.5 * edge if recorded.ternary else -0.5 * edge), max(high, 1.5 * edge)
    figure, axes = _figure(4.5)
    outside = ~recorded.reached.flatten()
    for some, colour, label in ((v, SKY, "surrogate's window"), (v[outside], GREY, "outside of it")):
        axes.hist(some.clamp(low, high).tolist(), bins=100, range=(low, high), color=colour, label=label)
    for place in (edge, -edge)[: 1 + recorded.ternary]:
        axes.axvline(place, color=RED, linewidth=2, label="threshold" if place == edge else None)
    inside = recorded.reached.float().mean()
    axes.set_title(f"{site}: {100 * inside:.0f} % inside the surrogate's window", loc="left")
    axes.set(xlabel=f"membrane before firing{', in thresholds' if edge else ''}", xlim=(low, high))
    axes.set_ylabel("neurons and steps")
    axes.legend()
    return figure
