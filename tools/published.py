"""Write zoo_configs/claims.md: published scores, and whether they hold here; `--check` fails if it is out of date.

A score is reproduced where a trained model of that system in `zoo_configs/*.yaml` reaches it, as a mean over seeds,
with no more steps T and no more bits of its weights. What cannot hold or fail here says why. No score stands here whose
only source is a memory of it.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from snlp_zoo import registry
from snlp_zoo.results import Paper, Result

PAGE = Path(__file__).parent.parent / "zoo_configs" / "claims.md"
SYSTEMS = {"spikelm": "SpikeLM", "spikingbert": "SpikingBERT", "spikebert": "SpikeBERT", "spikegpt": "SpikeGPT"}

SPIKELM = "arXiv:2406.03287, as the SmoothSpike repository and arXiv:2604.12365 quote it"
SPIKELM_TEXT = "notes on arXiv:2406.03287"
SPIKINGBERT = "arXiv:2308.10873, table 1 of its workshop version"
EXTREME = "Exploring Extreme Quantization in Spiking Language Models, table 1"
SPIKEBERT = "arXiv:2308.15122, as three later repositories and papers quote it"
BRAIN = "the report of arXiv:2509.05276"
SPIKEGPT = "arXiv:2302.13939, as arXiv:2308.10873 quotes it"
NO_DATA = "the data set is not at hand"
NO_TRAIN = "only its development split is at hand, nothing to train on"
UNSETTLED = "sources do not settle whether it is accuracy or F1"
NO_WRITER = "it needs an encoder-decoder, and this zoo has none"
TOO_LARGE = "such a model is not trained in ten minutes on one GPU"
ABLATION = "an ablation of a recipe that reaches its score"
NO_SYSTEM = "this zoo has no such system"


@dataclass(frozen=True)
class Published:
    """A published score on one data set; value is a fraction of 1, but for perplexity.

    size, time_steps, bits: of the model it was reported for, None where the source does not say; size in parameters.
    reason: why it cannot be tested here, or nothing.
    """

    system: str
    dataset: str
    metric: str
    value: float
    size: float | None
    time_steps: int | None
    source: str
    bits: float | None = 32
    reason: str = ""

    @property
    def lower_is_better(self) -> bool:
        return self.metric == "perplexity" or self.metric.startswith("bits_")


def _rows(
    of: tuple, time_steps: int | None, source: str, bits: float | None, scores: dict[str, tuple]
) -> list[Published]:
    """{"data set, metric": (value, reason)}, value in per cent."""
    system, size = of
    return [
        Published(system, *name.split(", "), value / 100, size, time_steps, source, bits, *reason)
        for name, (value, *reason) in scores.items()
    ]


PUBLISHED = [
    *_rows(("SpikeLM", 109e6), 4, SPIKELM, 32, {
        "SST-2, accuracy": (87.0,), "CoLA, matthews": (38.8,), "STS-B, pearson": (84.9,), "RTE, accuracy": (69.0,),
        "MRPC, accuracy or F1": (85.7, UNSETTLED), "QQP, accuracy or F1": (83.9, f"{UNSETTLED}; {NO_DATA}"),
        "QNLI, accuracy": (85.3, NO_TRAIN), "MNLI-m, accuracy": (77.1, NO_DATA), "MNLI-mm, accuracy": (77.2, NO_DATA),
        "GLUE, average": (76.5, NO_DATA),
    }),
    *_rows(("SpikeLM", 109e6), 1, SPIKELM, 32, {
        "SST-2, accuracy": (86.5,), "CoLA, matthews": (37.9,), "STS-B, pearson": (84.3,), "RTE, accuracy": (65.3,),
        "MRPC, accuracy or F1": (85.6, UNSETTLED), "QQP, accuracy or F1": (84.0, f"{UNSETTLED}; {NO_DATA}"),
        "QNLI, accuracy": (84.9, NO_TRAIN), "MNLI-m, accuracy": (76.0, NO_DATA), "MNLI-mm, accuracy": (76.9, NO_DATA),
        "GLUE, average": (75.7, NO_DATA),
    }),
    *_rows(("SpikeLM", None), 4, SPIKELM_TEXT, 32, {
        "XSum, ROUGE-L": (32.9, NO_WRITER), "CNN/DM, ROUGE-L": (39.4, NO_WRITER),
    }),
    *_rows(("SpikingBERT", 50e6), 80, SPIKINGBERT, 32, {
        "SST-2, accuracy": (88.19,), "RTE, accuracy": (66.06,), "MRPC, accuracy": (79.17,), "MRPC, f1": (85.15,),
        "STS-B, pearson": (82.20,), "STS-B, spearman": (81.90,), "QNLI, accuracy": (85.20, NO_TRAIN),
        "QQP, accuracy": (86.82, NO_DATA), "MNLI-m, accuracy": (78.10, NO_DATA),
    }),
    *_rows(("SpikingBERT", 50e6), None, EXTREME, 1.58, {
        "SST-2, accuracy": (87.1,), "MRPC, accuracy": (77.3,), "QNLI, accuracy": (83.1, NO_TRAIN),
        "QQP, accuracy": (85.4, NO_DATA), "MNLI, accuracy": (77.1, NO_DATA),
    }),
    *_rows(("SpikingBERT", 50e6), None, EXTREME, 1, {
        "SST-2, accuracy": (86.7,), "MRPC, accuracy": (75.8,), "QNLI, accuracy": (80.5, NO_TRAIN),
        "QQP, accuracy": (83.8, NO_DATA), "MNLI, accuracy": (75.4, NO_DATA),
    }),
    *_rows(("SpikeBERT", None), 4, SPIKEBERT, 32, {
        "SST-2, accuracy": (85.4,), "CoLA, matthews": (16.9,), "STS-B, pearson": (18.7,), "MRPC, f1": (82.0,),
        "RTE, accuracy": (57.5,), "QNLI, accuracy": (66.4, NO_TRAIN), "QQP, accuracy or F1": (68.2, NO_DATA),
        "MNLI-m, accuracy": (71.4, NO_DATA), "MNLI-mm, accuracy": (71.0, NO_DATA), "GLUE, average": (59.7, NO_DATA),
    }),
    *_rows(("SpikeGPT", 45e6), 1, SPIKEGPT, 32, {"SST-2, accuracy": (80.39,)}),
    *_rows(("SpikeGPT", 216e6), 1, SPIKEGPT, 32, {"SST-2, accuracy": (88.76, TOO_LARGE)}),
    Published("SpikeGPT", "WikiText-103", "perplexity", 39.75, 216e6, 1, "the poster of arXiv:2408.14909",
              reason=f"{NO_DATA}; {TOO_LARGE}"),
    Published("SpikingSSM", "WikiText-103", "perplexity", 33.94, None, None, "the poster of arXiv:2408.14909",
              reason=NO_SYSTEM),
    *_rows(("LIF-BERT", None), 4, SPIKELM, 32, {"SST-2, accuracy": (80.6, NO_SYSTEM)}),
    *_rows(("PSN-BERT", None), 4, SPIKELM, 32, {"SST-2, accuracy": (50.9, NO_SYSTEM)}),
    *_rows(("SpikingBrain-7B", 7e9), None, BRAIN, None, {
        "MMLU, accuracy": (65.84, TOO_LARGE), "CMMLU, accuracy": (71.58, TOO_LARGE),
        "C-Eval, accuracy": (69.80, TOO_LARGE), "ARC-C, accuracy": (43.32, TOO_LARGE),
        "HellaSwag, accuracy": (70.89, TOO_LARGE),
    }),
]  # fmt: skip

OTHERS = [  # what is claimed, source, status, why: claims that are not one score
    ("SpikingBERT: about 2 points less on SST-2 at T = 16, for half of the dense network's energy", SPIKINGBERT,
     "not testable here", "it needs one 50 M model at T = 80 and at T = 16; energy: `snlp_zoo/energy/claims.md`"),
    ("SpikingBERT: 4 to 5 points less without distillation", SPIKINGBERT, "not measured yet", ABLATION),
    ("SpikeLM: firing rates of about 33 % at k = 2 and 17 % at k = 4", SPIKELM_TEXT, "not reproduced",
     "37.6 % and 11.5 % on SST-2, 23 M, one seed: as_it_is and firing_k4 of `tools/ablations.txt`"),
    ("SpikingMamba of 1.3 B: 4.78 points less than Mamba, zero-shot, 2.23 after reinforcement",
     "arXiv:2510.04595, abstract", "not testable here", TOO_LARGE),
    ("SpikingBrain-7B: 0.6875 over 7 tasks with spikes and 8-bit weights, 0.6998 without", BRAIN,
     "not testable here", TOO_LARGE),
]  # fmt: skip


def plain(name: str) -> str:
    """Small letters and digits of a name: SST-2 and sst2 are one data set."""
    return "".join(letter for letter in name.lower() if letter.isascii() and letter.isalnum())


def measured() -> list[tuple[str, str, int, float, Result]]:
    """System, entry, T, bits and result of everything in the zoo that has a value."""
    found = []
    for name in registry.list_entries():
        entry = registry.load_entry(name)
        if entry.convert is None and entry.results:
            config = registry.build_config(entry.model_type, entry.config)
            for result in entry.results:
                if result.value is not None:
                    steps, bits = result.time_steps or config.time_steps, result.bits or config.weight_bits
                    found.append((SYSTEMS[entry.model_type], name, steps, bits, result))
    return found


def status(claim: Published, ours: list[tuple[str, str, int, float, Result]]) -> tuple[str, str]:
    """What became of a claim, and by what."""
    if claim.reason:
        return "not testable here", claim.reason
    alike = [
        (name, steps, bits, result)
        for system, name, steps, bits, result in ours
        if (system, plain(result.dataset), result.metric) == (claim.system, plain(claim.dataset), claim.metric)
        and steps <= (claim.time_steps or steps)
        and bits <= (claim.bits or bits)
    ]
    if not alike:
        return "not measured yet", ""
    sign = -1 if claim.lower_is_better else 1
    name, steps, bits, best = max(alike, key=lambda one: sign * one[3].value)
    reached = sign * best.value >= sign * claim.value
    spread = best.spread(partial(shown, claim.metric))
    by = f"{spread}, {best.number_of_seeds}, {name}, T = {steps}, {bits:g} bit{'s' * (bits != 1)}"
    return ("reproduced" if reached else "not reproduced"), by


def paper_of(system: str, dataset: str, metric: str, steps: int | None, bits: float | None) -> Paper | None:
    """What a paper reports of these bits and at least these steps: of the fewest of them, for the smallest model."""
    alike = [
        claim
        for claim in PUBLISHED
        if (claim.system, plain(claim.dataset), claim.metric) == (system, plain(dataset), metric)
        and (claim.time_steps or steps or 0) >= (steps or 0)
        and claim.bits == bits
    ]
    if not alike:
        return None
    claim = min(alike, key=lambda one: (one.time_steps or 0, one.size or 0))
    return Paper(value=round(claim.value, 4), parameters=claim.size, time_steps=claim.time_steps)


def shown(metric: str, value: float) -> str:
    return f"{value:.2f}" if metric == "perplexity" or metric.startswith("bits_") else f"{100 * value:.2f}"


def page() -> str:
    ours = measured()
    head = ["system", "task", "published", "parameters", "T", "bits", "status", "ours, or why not", "source"]
    rows = []
    for claim in PUBLISHED:
        size = f"{claim.size / 1e6:,.0f} M" if claim.size else ""
        task = f"{claim.dataset}, {claim.metric.replace('_', ' ')}"
        value = shown(claim.metric, claim.value).removesuffix("0")  # papers give one digit or two
        steps, bits = (f"{number:g}" if number else "" for number in (claim.time_steps, claim.bits))
        described = [claim.system, task, value, size, steps, bits]
        rows.append([*described, *status(claim, ours), claim.source])
    counted = {kind: sum(row[6] == kind for row in rows) for kind in dict.fromkeys(row[6] for row in rows)}
    counts = ", ".join(f"{number} {kind}" for kind, number in counted.items())
    return "\n".join(
        [
            "# Published scores",
            "",
            "Reproduced: a trained model of this zoo reaches the score, as a mean over seeds, with no more steps T and "
            "no more bits of its weights; its size and its teacher are not the paper's. Not reproduced: the best such "
            "model does not. Not measured yet: none has been trained. Energy is in `snlp_zoo/energy/claims.md`. "
            "`python tools/published.py` writes this page.",
            "",
            f"{len(rows)} scores: {counts}.",
            "",
            _table(head, rows),
            "",
            _table(["published", "source", "status", "why"], [list(row) for row in OTHERS]),
            "",
        ]
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    new = page()
    if "--check" in sys.argv:
        old = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
        sys.exit(0 if new == old else f"{PAGE.name} is out of date; run python tools/published.py")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
