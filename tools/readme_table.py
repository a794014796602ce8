"""Write the zoo table of README.md from zoo_configs; `--check` fails if it is out of date."""

import sys
from pathlib import Path
from typing import Any

import torch

from snlp_zoo import registry
from snlp_zoo.energy.markdown import percent

README = Path(__file__).parent.parent / "README.md"
MARKS = "<!-- zoo table: begin (python tools/readme_table.py writes it) -->", "<!-- zoo table: end -->"


def _row(name: str) -> str:
    entry = registry.load_entry(name)
    with torch.device("meta"):
        model = registry.build(name)
    paper = entry.source.get("paper", "-")
    results = entry.results or [{}]
    steps = getattr(model.config, "time_steps", "-")  # those of a converted model vary with its inputs
    return "\n".join(
        f"| {name} | {paper} | {model.num_parameters() / 1e6:.2f} M | {steps} | {_cells(result)} |"
        for result in results
    )


def _cells(result: dict[str, Any]) -> str:
    if not result:
        return "- | - | - | - | - | -"
    task = f"{result['dataset']}, {result['metric'].replace('_', ' ')}"
    rate = f"{100 * result['firing_rate']:.1f} %" if "firing_rate" in result else "-"
    paper, teacher = (
        _value(result, f"{who}_value") if f"{who}_value" in result else "-" for who in ("paper", "teacher")
    )
    driven = percent(result["spike_driven_fraction"], 1) if "spike_driven_fraction" in result else "-"
    return f"{task} | {paper} | {teacher} | {_value(result, 'value')} | {rate} | {driven}"


def _value(result: dict[str, Any], key: str) -> str:
    """Scores of a classifier as per cent; bits and perplexities have no hundred."""
    plain = result["metric"] == "perplexity" or result["metric"].startswith("bits_")
    return f"{result[key]:.3f}" if plain else f"{100 * result[key]:.1f}"


def table() -> str:
    """The zoo as a Markdown table, one row per entry and result."""
    columns = "entry | paper | parameters | T | task | paper's value | teacher | ours | firing rate | spike-driven"
    head = f"| {columns} |\n|" + "---|" * 10
    return "\n".join([head, *(_row(name) for name in registry.list_entries())])


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    new = f"{before}{MARKS[0]}\n\n{table()}\n\n{MARKS[1]}{after}"
    if "--check" in sys.argv:
        sys.exit(0 if new == text else "README.md: the zoo table is out of date; run python tools/readme_table.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
