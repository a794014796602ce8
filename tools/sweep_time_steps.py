"""Accuracy of a trained SpikingBERT against T, and what leaving early saves.

    python tools/sweep_time_steps.py runs/NAME --data FILE [--text text] [--label label]

One row per T: accuracy, firing rate, agreement with the largest T; then early exit at growing tolerances: accuracy and
the steps used per text.
"""

import argparse
from pathlib import Path

import torch

import snlp_zoo
from snlp_zoo import registry
from snlp_zoo.data import read_set
from snlp_zoo.data.batches import loader, longest, tokenise
from snlp_zoo.errors import SnlpError

STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
TOLERANCES = (0.2, 0.1, 0.05, 0.02, 0.01)


@torch.no_grad()
def run(model, batches: list[dict[str, torch.Tensor]], **options) -> dict[str, torch.Tensor]:
    """Predictions, labels and, where returned, steps used, over all batches; the mean firing rate."""
    found: dict[str, list[torch.Tensor]] = {"prediction": [], "label": [], "steps": [], "rate": []}
    for batch in batches:
        ids, mask, labels = (batch[key].to(model.device) for key in ("input_ids", "attention_mask", "labels"))
        output = model(ids, mask, output_spike_rates=True, **options)
        found["prediction"].append(output.logits.argmax(-1))
        found["label"].append(labels)
        found["rate"].append(output.firing_rate.view(1))
        found["steps"].append(labels.new_full(labels.shape, -1) if output.steps_used is None else output.steps_used)
    return {key: torch.cat(parts) for key, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", default="text")
    parser.add_argument("--label", default="label")
    options = parser.parse_args()
    try:
        sweep(options)
    except SnlpError as error:
        raise SystemExit(str(error)) from None


def sweep(options: argparse.Namespace) -> None:
    model = snlp_zoo.load(options.model).to("cuda" if torch.cuda.is_available() else "cpu")
    if model.config.model_type != "spikingbert":
        raise SystemExit(
            f"{options.model} is a {type(model).__name__}; only SpikingBERT takes any T, see snlp-zoo pareto"
        )
    tokenizer = registry.load_tokenizer(registry.find_checkpoint(options.model))
    texts = read_set(Path(options.data), text=options.text, label=options.label, label_names=model.config.label_names)
    split = tokenise(tokenizer, texts, min(128, longest(tokenizer, model.config)))
    batches = list(loader(split, tokenizer, 64, shuffle=False, drop_last=False))
    rows = {steps: run(model, batches, time_steps=steps) for steps in STEPS}
    last = rows[STEPS[-1]]["prediction"]
    print(f"{'T':>9}{'accuracy':>10}{'rate':>8}{'as T=128':>10}")
    for steps, row in rows.items():
        accuracy = (row["prediction"] == row["label"]).float().mean().item()
        agreement = (row["prediction"] == last).float().mean().item()
        print(f"{steps:>9}{accuracy:10.4f}{row['rate'].mean().item():8.3f}{agreement:10.4f}")
    print(f"{'tolerance':>9}{'accuracy':>10}{'rate':>8}{'mean':>8}{'median':>8}{'max':>6}  steps used, of {STEPS[-1]}")
    for tolerance in TOLERANCES:
        row = run(model, batches, time_steps=STEPS[-1], early_exit=tolerance)
        accuracy, steps = (row["prediction"] == row["label"]).float().mean().item(), row["steps"].float()
        print(
            f"{tolerance:>9}{accuracy:10.4f}{row['rate'].mean().item():8.3f}"
            f"{steps.mean().item():8.1f}{steps.median().item():8.0f}{steps.max().item():6.0f}"
        )


if __name__ == "__main__":
    main()
