"""Write the tables of README.md, the zoo and the ledger of results, from zoo_configs; `--check` fails if one is old."""

import sys
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from snlp_zoo import registry
from snlp_zoo.energy.markdown import percent
from snlp_zoo.results import Result

README = Path(__file__).parent.parent / "README.md"
ZOO = ("entry", "paper", "parameters", "T", "measured")
LEDGER = (
    "system", "task", "paper's value", "ours", "teacher", "parameters", "T", "bits", "firing rate",
    "energy ratio: products, all, with memory", "spike-driven", "minutes", "hardware", "commit",
)  # fmt: skip


def _built(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return registry.build(name)


def _zoo_row(name: str) -> list[str]:
    entry, model = registry.load_entry(name), _built(name)
    steps = getattr(model.config, "time_steps", "")  # those of a converted model vary with its inputs
    of: dict[str, str] = {}  # the first metric of each data set is the one it is known by
    for result in entry.results:
        if result.value is not None:
            of.setdefault(result.dataset, f"{_task(result)} {_score(result, result.value)}")
    return [name, entry.source.get("paper", ""), _millions(model.num_parameters()), str(steps), "; ".join(of.values())]


def _ledger_row(name: str, model: PreTrainedModel, result: Result) -> list[str]:
    paper, energy = result.paper, result.energy
    ratios = [energy.products, energy.all_operations, energy.with_memory] if energy else []
    steps = result.time_steps or getattr(model.config, "time_steps", "")
    bits = result.bits or getattr(getattr(model.config, "quantization_config", model.config), "weight_bits", None)
    of = [f"{paper.parameters / 1e6:.0f} M"] if paper and paper.parameters else []
    of += [f"T = {paper.time_steps}"] if paper and paper.time_steps else []
    return [
        name,
        _task(result),
        _score(result, paper.value) + (f" ({', '.join(of)})" if of else "") if paper else "",
        _ours(result),
        _score(result, result.teacher_value),
        _millions(result.parameters or model.num_parameters()),
        str(steps),
        f"{bits:g}" if bits else "",
        "" if result.firing_rate is None else f"{100 * result.firing_rate:.1f} %",
        ", ".join("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
        "" if result.spike_driven_fraction is None else percent(result.spike_driven_fraction, 1),
        "" if result.minutes is None else f"{result.minutes:.1f}",
        result.hardware or "",
        result.commit or "",
    ]


def _ours(result: Result) -> str:
    """Mean +- standard deviation (seeds)."""
    if result.value is None:
        return ""
    return result.spread(partial(_score, result)) + (f" ({result.number_of_seeds})" if result.runs else "")


def _task(result: Result) -> str:
    return f"{result.dataset}, {result.metric.replace('_', ' ')}"


def _score(result: Result, value: float | None) -> str:
    """Scores of a classifier as per cent; bits and perplexities have no hundred."""
    if value is None:
        return ""
    plain = result.metric == "perplexity" or result.metric.startswith("bits_")
    return f"{value:.3f}" if plain else f"{100 * value:.1f}"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M"


def _markdown(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(columns), ["---"] * len(columns), *rows])


def zoo() -> str:
    """The zoo as a Markdown table, one row per entry."""
    return _markdown(ZOO, [_zoo_row(name) for name in registry.list_entries()])


def ledger() -> str:
    """What was measured, and what papers report beside it, one row per entry and result; then what commands add."""
    results = {name: registry.load_entry(name).results for name in registry.list_entries()}
    rows, options = [], dict[str, dict[str, None]]()
    for name, found in results.items():
        model = _built(name) if found else None
        rows += [_ledger_row(name, model, result) for result in found if model is not None]
        for result in found:
            if more := (result.command or "").removeprefix(f"snlp-zoo train {name}").strip():
                options.setdefault(more, {})[name] = None
    listed = [f"- {', '.join(names)}: `{more}`" for more, names in options.items()]
    made = "Where minutes stand, `snlp-zoo train SYSTEM --set train.seed=SEED` makes the run anew"
    return "\n".join([_markdown(LEDGER, rows), "", made + (", with these options:\n" if listed else "."), *listed])


def with_table(text: str, name: str, table: str) -> str:
    """README with this table between its marks."""
    begin, end = f"<!-- {name}: begin (python tools/readme_table.py writes it) -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"README.md lacks the marks {begin!r} and {end!r}")
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    new = with_table(with_table(text, "zoo table", zoo()), "ledger", ledger())
    if "--check" in sys.argv:
        sys.exit(0 if new == text else "README.md: a table is out of date; run python tools/readme_table.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
