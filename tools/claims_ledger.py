"""Write snlp_zoo/energy/claims.md: published energy claims beside what our trained models give.

    python tools/claims_ledger.py RUN=DATA_FILE [RUN=DATA_FILE ...] [--limit 16]

RUN is a run's folder or an entry that travels with the package, DATA_FILE has a column `text`. The page is written
anew: what is not named is no longer on it.
"""

import argparse
from pathlib import Path

import torch

from snlp_zoo import registry
from snlp_zoo.checked import read_yaml
from snlp_zoo.data import read_set
from snlp_zoo.data.batches import longest, model_inputs
from snlp_zoo.energy import EnergyReport, estimate
from snlp_zoo.energy.claims import Found, ledger
from snlp_zoo.energy.report import STATEMENT

PAGE = Path(__file__).parent.parent / "snlp_zoo" / "energy" / "claims.md"
SYSTEMS = {"spikelm": "SpikeLM", "spikingbert": "SpikingBERT", "spikebert": "SpikeBERT", "spikegpt": "SpikeGPT"}


def summary(entry: str, data: str, report: EnergyReport) -> Found:
    """One line of the ledger."""
    driven = [row for row in report.layers if row["role"] == "matmul" and row["spike_driven"]]
    rate = sum(row["total"] for row in driven) / max(sum(row["elements"] for row in driven), 1)
    ratios = [report.ratios[level]["dense_fp32"] for level in ("matmul_only", "all_ops", "with_memory")]
    ratios = [ratio or float("inf") for ratio in ratios]
    return Found(entry, data, report.time_steps, rate, report.spike_driven_fraction, *ratios)


def measure(run: str, data: str, limit: int) -> tuple[str, Found]:
    folder = registry.find_checkpoint(run)
    model, tokenizer = registry.load(folder), registry.load_tokenizer(folder)
    texts = read_set(data, label=None).texts[:limit]
    length = longest(tokenizer, model.config)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    report = estimate(model, model_inputs(batch, model))
    recipe = folder.parent / "recipe.yaml"
    name = read_yaml(recipe)["name"] if recipe.is_file() else Path(run).resolve().name
    return SYSTEMS[model.config.model_type], summary(name, f"{limit} texts of {Path(data).name}", report)


def page(found: dict[str, list[Found]]) -> str:
    return (
        "# Published energy claims\n\n"
        f"{STATEMENT}\n\n"
        "A published ratio counts matrix products only: 4.6 pJ for a multiply-accumulate, 0.9 pJ for an accumulate, T "
        "steps at a mean firing rate. From that follows the rate it needs. Our models are smaller and learned other "
        "data; what can be compared is their rate, and in brackets the ratio it gives under the paper's own counting. "
        "`python tools/claims_ledger.py RUN=TEXTS ...` writes this page.\n\n"
        "SpikeGPT's claims of fewer operations multiply the firing rates of its blocks' outputs onto products that see "
        "none of these spikes. In the published wiring every product takes real numbers, so no rate makes them "
        "true.\n\n" + ledger(found) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="RUN=DATA_FILE")
    parser.add_argument("--limit", type=int, default=16)
    options = parser.parse_args()
    if wrong := next((given for given in options.runs if "=" not in given), None):
        parser.error(f"{wrong!r}: want RUN=DATA_FILE")
    torch.manual_seed(0)
    found: dict[str, list[Found]] = {}
    for given in options.runs:
        run, _, data = given.partition("=")
        system, row = measure(run, data, options.limit)
        found.setdefault(system, []).append(row)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(found), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
