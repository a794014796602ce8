"""The commands about energy: `snlp-zoo energy`, `verify`, `pareto`, `plots`."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from snlp_zoo.errors import EnergyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
app = typer.Typer()
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
ModelArgument = Annotated[
    str, typer.Argument(help="A saved folder, user/name on the Hub, or a zoo entry (untrained: random weights).")
]
TextsOption = Annotated[list[str] | None, typer.Option("--text", help="A text to run; may be repeated.")]
DataOption = Annotated[Path | None, typer.Option("--data", help="A .tsv, .csv, .jsonl or .txt file of texts to run.")]
ColumnOption = Annotated[str, typer.Option("--column", help="Column of the text in --data.")]
LimitOption = Annotated[int, typer.Option(help="Texts of --data to run.", min=1)]
TokensOption = Annotated[
    int, typer.Option(help="Length of the random text that runs without --text and --data.", min=1)
]
CostsOption = Annotated[str, typer.Option(help="A cost table: horowitz45, horowitz45_fp16, ...")]
MemoryOption = Annotated[str, typer.Option(help="A memory model: none, sram or dram.")]


@app.command()
def energy(
    path_or_entry: ModelArgument,
    text: TextsOption = None,
    data: DataOption = None,
    column: ColumnOption = "text",
    limit: LimitOption = 16,
    tokens: TokensOption = 128,
    costs: CostsOption = "horowitz45",
    memory: MemoryOption = "sram",
    measured: Annotated[bool, typer.Option("--measured", help="Add joules per token of this NVIDIA GPU.")] = False,
    output_dir: Annotated[Path | None, typer.Option(help="Write energy.json and energy.md there too.")] = None,
    json_: JsonFlag = False,
) -> None:
    """Estimate the energy of a forward, operation by operation, against the network without spikes."""
    from dataclasses import replace

    from snlp_zoo.energy import estimate
    from snlp_zoo.energy.measured import measure

    model, batch, _ = _model_and_batch(path_or_entry, text, data, column, limit, tokens)
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)  # before the work
    joules = measure(model.to(_gpu()), batch) if measured else None  # type: ignore[arg-type]
    report = estimate(model.to("cpu"), batch, costs=costs, memory=memory)  # type: ignore[arg-type]
    report = replace(report, measured=joules, data=_what_ran(text, data))
    if output_dir is not None:
        (output_dir / "energy.json").write_text(report.to_json() + "\n", encoding="utf-8")
        (output_dir / "energy.md").write_text(report.to_markdown() + "\n", encoding="utf-8")
    typer.echo(json.dumps(report.to_dict()) if json_ else report.to_markdown())


@app.command()
def verify(
    path_or_entry: ModelArgument,
    text: TextsOption = None,
    data: DataOption = None,
    column: ColumnOption = "text",
    limit: LimitOption = 16,
    tokens: TokensOption = 128,
    claimed_fraction: Annotated[
        float | None, typer.Option(help="A published spike-driven fraction, to hold within 0.01.")
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """Check where the spikes are: exit code 1 when a claim of the model does not hold in the data."""
    from snlp_zoo.energy import verify_spikes
    from snlp_zoo.energy.markdown import percent

    model, batch, _ = _model_and_batch(path_or_entry, text, data, column, limit, tokens)
    found = verify_spikes(model, batch, claimed_fraction)
    if json_:
        typer.echo(json.dumps(json.loads(found.to_json())))
    else:
        for product in found.products:
            source = f" from {', '.join(product.sources)}" if product.sources else ""
            mark = "FAILS" if product.problem else "spikes" if product.spike_driven else "real"
            typer.echo(f"{mark:7}{product.layer}: {' x '.join(product.operands)}{source}")
        for where, what in found.failures.items():
            typer.echo(f"FAILS  {where}: {what}")
        claims = claimed_fraction is not None or any(product.claimed or product.sources for product in found.products)
        held = "every claim holds" if claims else "the model claims nothing of its products"
        held = held if found.ok else f"{len(found.failures)} of its claims fail"
        share = percent(found.spike_driven_fraction, 2)
        typer.echo(f"{held}; spike-driven fraction {share} ({_what_ran(text, data)})")
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def pareto(
    path_or_entry: Annotated[str, typer.Argument(help="A trained classifier's folder, or a zoo entry in runs/.")],
    data: Annotated[Path, typer.Option(help="A labelled .tsv, .csv or .jsonl file.")],
    time_steps: Annotated[str, typer.Option(help="T, separated by commas.")] = "1,2,4,8",
    thresholds: Annotated[str, typer.Option(help="Factors of the trained thresholds, separated by commas.")] = "1",
    text: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    text_pair: Annotated[str | None, typer.Option(help="Column of the second text.")] = None,
    label: Annotated[str, typer.Option(help="Column of the label.")] = "label",
    limit: Annotated[int | None, typer.Option(help="Score this many texts only.", min=1)] = None,
    costs: CostsOption = "horowitz45",
    memory: MemoryOption = "sram",
    output: Annotated[Path | None, typer.Option(help="Write the figure there, .png or .svg.")] = None,
    json_: JsonFlag = False,
) -> None:
    """Accuracy, energy and latency at several T and thresholds: one table, one figure."""
    quiet_transformers()
    from snlp_zoo import hub, registry
    from snlp_zoo import plots as figures
    from snlp_zoo.data import read_set
    from snlp_zoo.pareto import check_model, front
    from snlp_zoo.pareto import pareto as run

    if output is not None:
        figures.check_ending(output)
    folder = hub.find_checkpoint(path_or_entry)
    model, tokenizer = registry.load_classifier(folder), registry.load_tokenizer(folder)
    check_model(model)
    columns: dict[str, Any] = {"text": text, "text_pair": text_pair, "label": label}
    texts = read_set(data, **columns, label_names=model.config.label_names).subset(limit, seed=0)
    options: dict[str, Any] = {
        "time_steps": _numbers("--time-steps", time_steps, int),
        "thresholds": _numbers("--thresholds", thresholds, float),
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)  # before hours of work
    rows = []
    for row in run(model, tokenizer, texts, costs=costs, memory=memory, **options):
        rows.append(row)
        typer.echo(f"T {row['time_steps']}, threshold x {row['threshold']:g}: {100 * row['accuracy']:.1f} %", err=True)
    best = front(rows)
    if output is not None:
        figures.save(figures.pareto_front(rows, best), output)
    typer.echo(json.dumps({"rows": rows, "front": best}) if json_ else _pareto_table(rows, best))


@app.command()
def plots(
    path_or_entry: ModelArgument,
    output_dir: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("figures"),
    text: Annotated[str | None, typer.Option(help="The text to draw; random tokens without it.")] = None,
    site: Annotated[
        str, typer.Option(help="Neuron of raster and membranes; the first one that fires without it.")
    ] = "",
    format_: Annotated[str, typer.Option("--format", help="png or svg.")] = "png",
    tokens: TokensOption = 12,
) -> None:
    """Draw spikes per token, firing rates, membranes and where the energy goes, for one text."""
    from snlp_zoo import plots as figures
    from snlp_zoo.energy import estimate
    from snlp_zoo.energy.costs import lookup
    from snlp_zoo.energy.record import record

    figures.check_ending(Path(f"figure.{format_}"))
    model, batch, tokenizer = _model_and_batch(path_or_entry, None if text is None else [text], None, "text", 1, tokens)
    output_dir.mkdir(parents=True, exist_ok=True)
    recorded = record(model, batch)
    site = site or next((name for name, found in recorded.items() if found.spikes.any()), next(iter(recorded)))
    chosen = lookup("site", site, recorded)
    ids = batch["input_ids"][0][batch["attention_mask"][0] != 0].tolist()
    labels = [str(i) for i in ids] if tokenizer is None else figures.token_labels(tokenizer, ids)
    made = {
        "raster": figures.spike_raster(chosen, labels, site),
        "rates": figures.firing_rates({name: (found.spikes != 0).float().mean() for name, found in recorded.items()}),
        "membranes": figures.membrane_histogram(chosen, site),
        "energy": figures.energy_breakdown(estimate(model, batch)),
    }
    for name, figure in made.items():
        typer.echo(str(figures.save(figure, output_dir / f"{name}.{format_}")))


def quiet_transformers() -> None:
    """Its load reports and progress bars say nothing that this program does not say itself."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _gpu() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _numbers(option: str, given: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in given.split(",")]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise EnergyError(f"{option} takes {what} separated by commas, got {given!r}") from error


def _what_ran(texts: list[str] | None, data: Path | None) -> str:
    ran = [*(["as given"] if texts else []), *([f"of {data.name}"] if data else [])]
    return " and ".join(ran) or "random tokens"


def _model_and_batch(
    path_or_entry: str, texts: list[str] | None, data: Path | None, column: str, limit: int, length: int
) -> "tuple[PreTrainedModel, dict[str, Any], PreTrainedTokenizerBase | None]":
    """The model, the texts as token ids, and the tokenizer if it has one."""
    quiet_transformers()
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from snlp_zoo import hub, registry
    from snlp_zoo.data import TextSet, read_set
    from snlp_zoo.data.batches import longest, tokenise
    from snlp_zoo.data.text import refuse_half_pairs
    from snlp_zoo.errors import CheckpointError

    tokenizer = None
    try:
        folder = hub.find_checkpoint(path_or_entry)
    except CheckpointError:
        if path_or_entry not in registry.list_entries():
            raise
        logger.warning("%s is not trained: random weights", path_or_entry)
        model = registry.build(path_or_entry)
    else:
        model = registry.load(folder)
        if texts or data or (folder / "tokenizer_config.json").is_file():
            tokenizer = registry.load_tokenizer(folder)
    if not all(text.strip() for text in texts or []):
        raise EnergyError("--text is empty; give it at least one word")
    for number, one in enumerate(texts or [], start=1):
        refuse_half_pairs(one, f"text {number}")
    if data is not None:
        texts = [*(texts or []), *read_set(data, text=column, label=None).texts[:limit]]
    if texts:
        if tokenizer is None:
            raise EnergyError(f"{path_or_entry} has no tokenizer for texts; leave --text and --data out")
        most = longest(tokenizer, model.config)
        rows = tokenise(tokenizer, TextSet(texts), most)
        if rows.truncated:
            logger.warning("%d of %d texts were cut at %d tokens", rows.truncated, len(rows), most)
        parts = [torch.tensor(row) for row in rows.input_ids]
        # padded here: a language model's tokenizer may have no padding
        ids, mask = (pad_sequence(x, batch_first=True) for x in (parts, [torch.ones_like(part) for part in parts]))
        return model, {"input_ids": ids, "attention_mask": mask}, tokenizer
    generator = torch.Generator().manual_seed(0)
    first = min(5, model.config.vocab_size - 1)
    length = min(length, getattr(model.config, "max_position_embeddings", length))
    ids = torch.randint(first, model.config.vocab_size, (1, length), generator=generator)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tokenizer


def _pareto_table(rows: list[dict[str, Any]], best: list[dict[str, Any]]) -> str:
    lines = ["| T | threshold | accuracy | firing rate | uJ per token | dense / spiking | ms per text | best |"]
    lines.append("|---" * 8 + "|")
    for row in rows:
        lines.append(
            f"| {row['time_steps']} | x {row['threshold']:g} | {100 * row['accuracy']:.1f} % "
            f"| {100 * row['firing_rate']:.1f} % | {row['pj_per_token'] * 1e-6:.3g} | {row['ratio']:.2f}x "
            f"| {row['ms_per_text']:.2f} | {'yes' if row in best else ''} |"
        )
    return "\n".join([*lines, "", "Energy is estimated with memory, not measured; milliseconds are this machine's."])
