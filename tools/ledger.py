"""The ledger of results: what trained runs measured, gathered where their models are, then written into the zoo.

    python tools/ledger.py collect runs/compare/* --output ledger.json   # on the machine that trained
    python tools/ledger.py write ledger.json                             # zoo_configs/*.yaml, README.md, the claims
    python tools/ledger.py write ledger.json --join                      # with the runs that are there already

`collect` makes one record per entry, data set and metric, of runs that differ in their seed or in nothing. Energy is
estimated as `snlp-zoo energy` does it, over the first texts of the reported split, with the model of the first seed.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from published import SYSTEMS, paper_of, plain

from snlp_zoo import registry
from snlp_zoo.checked import dump_yaml, parse_yaml
from snlp_zoo.data import TextSet
from snlp_zoo.data.batches import collate, longest, model_inputs, tokenise
from snlp_zoo.data.text import Columns, read_splits
from snlp_zoo.energy import estimate
from snlp_zoo.errors import EnergyError
from snlp_zoo.results import Result
from snlp_zoo.train.job import read_texts
from snlp_zoo.train.recipe import Recipe, load_recipe, stage_recipes

ROOT = Path(__file__).parent.parent
NAMES = {  # a folder's or Hub data set's name in small letters and digits -> as papers write it
    "sst2": "SST-2", "sst5": "SST-5", "stsb": "STS-B", "mrpc": "MRPC", "rte": "RTE", "cola": "CoLA", "qnli": "QNLI",
    "mr": "MR", "subj": "Subj", "chnsenticorphtl": "ChnSentiCorp", "waimai10k": "Waimai",
}  # fmt: skip
METRICS = {
    "CoLA": ("matthews",), "MRPC": ("f1", "accuracy"), "STS-B": ("pearson", "spearman"),
    "tweets": ("accuracy", "macro_f1"),
}  # fmt: skip
OTHERS = ("accuracy", "pearson", "bits_per_character", "perplexity")  # of other data sets, those that there are
LEVELS = {"products": "matmul_only", "all_operations": "all_ops", "with_memory": "with_memory"}


def dataset_of(recipe: Recipe) -> str:
    """The data set's name as papers write it; no path of this machine."""
    data = recipe.data
    source = data.source if isinstance(data.source, str) else data.source[0]
    name = data.name or Path(source).name.partition(".")[0]
    return NAMES.get(plain(name), name)


def settings(recipe: Recipe) -> dict[str, Any]:
    """Everything in a recipe but its seed, and where files lie, as mappings in mappings; stages by their names."""
    content = recipe.model_dump(exclude={"name": True, "train": {"seed"}, "data": {"name"}})
    content["stages"] = {
        stage["name"]: {key: part for key, part in stage.items() if key != "name"} for stage in content["stages"]
    }
    return _without_places(content)


def _without_places(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    words = ("teacher", "scratch")  # of model.init_from, which else is a folder
    own = {key: part for key, part in content.items() if key != "source" and (key != "init_from" or part in words)}
    kept = {key: _without_places(part) for key, part in own.items()}
    return {key: part for key, part in kept.items() if part != {} or own[key] == {}}


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys, and the values that make new settings of old ones; a mapping that lost a key stands as a whole."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() <= new.keys():
        for key, value in new.items():
            yield from differences(old.get(key), value, f"{path}.{key}" if path else key)
    elif old != new:
        yield path, new


def more_texts(recipe: Recipe) -> dict[str, list[str]]:
    """Dotted key -> names of files that stages read beside the data set, and of a language model's own; no path of this
    machine.
    """
    _, last = stage_recipes(recipe, Path())[-1]
    found = {"data.source": _names(recipe.data.source)} if last.task else {}
    for stage in recipe.stages:
        data = stage.get("data") or {}
        for key, part in {"data": data, "data.transfer": data.get("transfer") or {}}.items():
            if source := part.get("source"):
                found[f"stages.{stage['name']}.{key}.source"] = _names(source)
    return found


def _names(source: str | list[str]) -> list[str]:
    return [Path(one).name for one in ([source] if isinstance(source, str) else source)]


def command_of(recipe: Recipe) -> str | None:
    """The command that makes this run anew, but for its seed; None where no zoo entry is behind it."""
    if recipe.name not in registry.list_entries() or registry.load_entry(recipe.name).recipe is None:
        return None
    entry = load_recipe(recipe.name)
    old, new, texts = settings(entry), settings(recipe), more_texts(entry)
    new["stages"] = dict.fromkeys(old["stages"]) | new["stages"]  # what was left out is null
    changes = [*differences(old, new), *(one for one in more_texts(recipe).items() if one not in texts.items())]
    options = (shlex.quote(f"{key}={json.dumps(value)}") for key, value in changes)
    return " ".join([f"snlp-zoo train {recipe.name}", *(f"--set {option}" for option in options)])


def energy_of(folder: Path, recipe: Recipe, seed: int, number: int) -> dict[str, Any]:
    """Ratios to the dense network, and the spike-driven fraction, over the first texts that are reported on; nothing,
    and a line that says why, where there can be no estimate, as of a dense control.
    """
    model, tokenizer = registry.load(folder / "model"), registry.load_tokenizer(folder / "model")
    texts = read_texts(recipe).test
    some = texts.take(list(range(min(number, len(texts)))))
    length = min(longest(tokenizer, model.config), recipe.data.max_length)
    tokens = tokenise(tokenizer, TextSet(some.texts, some.pairs), length)
    batch = collate(tokens, range(len(tokens)), tokenizer.pad_token_id or 0)
    try:
        report = estimate(model, model_inputs(batch, model))
    except EnergyError as error:
        print(f"{folder}: {error}", file=sys.stderr)
        return {}
    ratios = {key: report.ratios[level]["dense_fp32"] for key, level in LEVELS.items()}
    shown = {key: round(value, 3) for key, value in ratios.items() if value is not None}
    fraction = {"spike_driven_fraction": math.floor(1e6 * report.spike_driven_fraction) / 1e6}  # never up to the whole
    return fraction | {"energy": shown | {"texts": len(some), "seed": seed}}


def weight_bits(folder: Path) -> float:
    """Bits of the weights inside a saved model's encoder or decoder."""
    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    return config.get("quantization_config", config).get("weight_bits", 32)


def selected(recipe: Recipe) -> tuple[str, str]:
    """The split that scores are of, by the name it has where it lies, and how the epoch was chosen."""
    data = recipe.data
    if recipe.head != "sequence-classification":
        return "test", "best validation loss"
    own, _ = read_splits(str(data.source), data.name, Columns(str(data.text), data.text_pair, data.label), None)
    split = "test" if "test" in own or "validation" not in own else "validation"
    carved = not {"test", "validation"} <= set(own)
    where = "texts held out from train" if carved else "the validation split"
    return split, f"best epoch on {where}"


def hardware() -> str:
    """The GPU of this machine, or its cores."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def commit() -> str | None:
    """The checkout's commit, if git is there to tell."""
    try:
        told = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return told.stdout.strip() or None


def collect(folders: list[Path], number: int = 16) -> list[dict[str, Any]]:
    """Records of all finished runs in these folders.

    Raises:
        SystemExit: runs of one entry and data set differ in more than their seeds, or a folder is named twice.
    """
    groups: dict[tuple[str, str], list[tuple[int, Path, Recipe]]] = {}
    counted = Counter(folder.resolve() for folder in folders)
    if twice := [str(folder) for folder, times in counted.items() if times > 1]:
        raise SystemExit(f"{', '.join(twice)}: named more than once; a run counts once")
    for folder in folders:
        if not (folder / "summary.json").is_file():
            print(f"{folder}: left out, for it holds no finished run", file=sys.stderr)
            continue
        recipe = load_recipe(str(folder / "recipe.yaml"))
        _, last = stage_recipes(recipe, folder)[-1]
        groups.setdefault((recipe.name, dataset_of(last)), []).append((recipe.train.seed, folder, recipe))
    records = []
    for (entry, dataset), runs in sorted(groups.items()):
        runs.sort(key=lambda run: run[0])
        first = settings(runs[0][2])
        for _, folder, recipe in runs[1:]:
            different = [key for key, _ in differences(first, settings(recipe))]
            if different:
                raise SystemExit(
                    f"{entry}: {folder} and {runs[0][1]} differ in {', '.join(sorted(different))}, not in their seeds "
                    "alone; collect them one after another"
                )
        records += _records(entry, dataset, runs, number)
    return records


def _records(entry: str, dataset: str, runs: list[tuple[int, Path, Recipe]], number: int) -> list[dict[str, Any]]:
    seed, folder, recipe = runs[0]
    _, last = stage_recipes(recipe, folder)[-1]
    summaries = [json.loads((path / "summary.json").read_text(encoding="utf-8")) for _, path, _ in runs]

    def of(key: str) -> list[float]:
        return [summary[key] for summary in summaries if key in summary]

    split, selection = selected(last)
    teaching = of("teacher_seconds") or [0.0] * len(runs)
    minutes = [(seconds - taught) / 60 for seconds, taught in zip(of("seconds"), teaching, strict=True)]
    common = {
        "seeds": [seed for seed, *_ in runs],
        "firing_rate": _mean(of("firing_rate")),
        **energy_of(folder, last, seed, number),
        "parameters": summaries[0]["parameters"],
        "time_steps": summaries[0].get("time_steps"),
        "bits": weight_bits(folder),
        "minutes": round(statistics.mean(minutes), 2),
        "teacher_minutes": round(max(of("teacher_seconds")) / 60, 2) if of("teacher_seconds") else None,
        "overlap": max(of("overlap"), default=None),
        "selection": selection,
        "command": command_of(recipe),
    }
    records = []
    for metric in METRICS.get(dataset, OTHERS):
        if values := of(f"student_{metric}"):
            scores = {
                "value": _mean(values),
                "deviation": round(statistics.stdev(values), 5) if len(values) > 1 else None,
                "least": round(min(values), 5),
                "most": round(max(values), 5),
                "teacher_value": _mean(of(f"teacher_{metric}")),
                "baseline_value": _mean(of(f"baseline_{metric}")),
            }
            record = {"entry": entry, "dataset": dataset, "split": split, "metric": metric, **scores, **common}
            records.append({key: value for key, value in record.items() if value is not None})
    return records


def _mean(values: list[float]) -> float | None:
    return round(statistics.mean(values), 5) if values else None


SAME = ("split", "parameters", "time_steps", "bits", "overlap", "selection", "command")  # what runs of one kind share
MEANS = ("firing_rate", "teacher_value", "baseline_value", "minutes")


def pooled(before: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The result of the runs behind both; energy is the older one's, the commit and torch are the newer one's.

    Raises:
        SystemExit: they are not of one kind.
    """
    if different := [key for key in SAME if before.get(key) != record.get(key)]:
        raise SystemExit(f"{record['entry']}: what the zoo has differs in {', '.join(different)}; write without --join")
    both = [(len(one["seeds"]), one) for one in (before, record)]
    runs = sum(count for count, _ in both)

    def mean(key: str) -> float:
        return sum(count * one[key] for count, one in both) / runs

    value, teaching = mean("value"), [one["teacher_minutes"] for _, one in both if "teacher_minutes" in one]
    squares = sum(
        (count - 1) * one.get("deviation", 0) ** 2 + count * (one["value"] - value) ** 2 for count, one in both
    )
    newer = {key: part for key, part in record.items() if key not in before or key in ("commit", "torch")}
    joined = {
        "value": round(value, 5),
        "deviation": round(math.sqrt(squares / (runs - 1)), 5),
        "least": min(one["least"] for _, one in both),
        "most": max(one["most"] for _, one in both),
        "seeds": [*before["seeds"], *record["seeds"]],
        **{key: round(mean(key), 2 if key == "minutes" else 5) for key in MEANS if key in before and key in record},
        **({"teacher_minutes": max(teaching)} if teaching else {}),
        "hardware": "; ".join(dict.fromkeys(one["hardware"] for _, one in both)),
    }
    return before | newer | joined


def put(text: str, records: list[dict[str, Any]], join: bool = False) -> str:
    """An entry's file with these results in place of, or joined with, those of the same data set and metric.

    The rest stands as it is. What a paper reports stays with the data set, and so does the way its name is written.
    """
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    start = next((i for i, line in enumerate(lines) if line.startswith("results:")), len(lines))
    end = next((i for i, line in enumerate(lines) if i > start and line[0] not in " -\n"), len(lines))
    dash = next(
        (line[: line.index("-") + 2] for line in lines[start + 1 : end] if line.lstrip().startswith("- ")), None
    )
    first = [i for i in range(start + 1, end) if dash and lines[i].startswith(dash)]
    blocks = ["".join(lines[i:j]) for i, j in pairwise([*first, end])]
    comments = "".join(lines[start + 1 : first[0]]) if first else ""
    kept = (parse_yaml("".join(lines[start:end])) or {}).get("results") or []
    margin = dash[:-2] if dash else "  "
    blocks = blocks or [block_of(result, margin) for result in kept]  # written in one line
    old = {what(result): (result, block) for result, block in zip(kept, blocks, strict=True)}
    for record in records:
        before, _ = old.get(what(record), ({}, ""))
        stays = {key: before[key] for key in ("dataset", "paper") if key in before}
        record = pooled(before, record) if join and "value" in before else record
        result = {key: value for key, value in record.items() if key != "entry"} | stays
        Result.model_validate(result)
        old[what(record)] = result, block_of(result, margin)
    return "".join([*lines[:start], "results:\n", comments, *(block for _, block in old.values()), *lines[end:]])


def what(result: dict[str, Any]) -> tuple[str, str]:
    """What a result is of, however the data set's name is written."""
    return plain(result["dataset"]), result["metric"]


def block_of(result: dict[str, Any], margin: str) -> str:
    """One result as YAML, a mapping in as few lines as it takes: entries stay a page long."""
    dumped = dump_yaml(result, default_flow_style=True, width=116)
    return f"{margin}- {indent(dumped, f'{margin}  ').lstrip()}"


def write(records: list[dict[str, Any]], join: bool = False) -> None:
    """Put records into their entries' files, in place of what is there or joined with it."""
    texts = {}  # all of them first: nothing is written where one of them is refused
    for entry in sorted({record["entry"] for record in records}):
        registry.load_entry(entry)  # one clear error for an entry that there is not
        path = registry.zoo_folder() / f"{entry}.yaml"
        own = [_with_paper(record) for record in records if record["entry"] == entry]
        texts[path] = put(path.read_text(encoding="utf-8"), own, join)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        registry.load_entry(path.stem)


def _with_paper(record: dict[str, Any]) -> dict[str, Any]:
    """The record with what a paper reports for such a model, if one does."""
    system = SYSTEMS.get(registry.load_entry(record["entry"]).model_type, "")
    known = {"steps": record.get("time_steps"), "bits": record.get("bits")}
    paper = paper_of(system, record["dataset"], record["metric"], **known)
    return record | ({"paper": paper.model_dump(exclude_none=True)} if paper else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("folders", nargs="+", type=Path)
    collecting.add_argument("--output", type=Path, default=Path("ledger.json"))
    collecting.add_argument("--limit", type=int, default=16, help="Texts that energy is estimated on.")
    collecting.add_argument("--commit", default=commit(), help="Where there is no git to ask.")
    collecting.add_argument("--hardware", default=hardware(), help="What trained, if that is not what collects.")
    collecting.add_argument("--sharing", type=int, default=1, help="Trainings that ran side by side.")
    writing = commands.add_parser("write")
    writing.add_argument("records", type=Path)
    writing.add_argument("--join", action="store_true", help="Add these runs to those of the same kind in the zoo.")
    options = parser.parse_args()
    if options.command == "collect":
        where = options.hardware + (f", shared by {options.sharing} trainings" if options.sharing > 1 else "")
        more = {"hardware": where, "torch": torch.__version__} | ({"commit": options.commit} if options.commit else {})
        records = [record | more for record in collect(options.folders, options.limit)]
        options.output.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        print(f"{len(records)} records in {options.output}")
        return
    if not options.records.is_file():
        parser.error(f"there is no file {options.records}; `collect` writes one")
    write(json.loads(options.records.read_text(encoding="utf-8")), options.join)
    for page in ("readme_table.py", "published.py"):
        subprocess.run([sys.executable, Path(__file__).parent / page], check=True)


if __name__ == "__main__":
    main()
