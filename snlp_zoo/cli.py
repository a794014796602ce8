"""The command line: `snlp-zoo`. Results go to standard output, progress and warnings to standard error."""

import errno
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from snlp_zoo import cli_convert, cli_energy, cli_generate
from snlp_zoo.cli_energy import JsonFlag
from snlp_zoo.doctor import torchvision_mismatch
from snlp_zoo.errors import BackendError, Interrupted, ProcessError, SnlpError
from snlp_zoo.results import Result

app = typer.Typer(
    help="Spiking language models: list, train, evaluate, predict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub; main by default.")]
VerifyFlag = Annotated[bool, typer.Option("--verify", help="Compare every file with the Hub's checksums.")]
_WIDEST = 400  # characters of a text or name that is shown; --json has all of it
_SILENCE = 20  # seconds: rank 0 says a mistake that is everybody's, and the launcher ends this process meanwhile


def main() -> None:
    """Run the command line; a mistake of the user's is one sentence and exit code 2, a run told to stop has code 75."""
    speaks = os.environ.get("RANK", "0") == "0"  # one process
    level = logging.WARNING if speaks else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except SnlpError as error:
        if not speaks and not isinstance(error, Interrupted | ProcessError):
            time.sleep(_SILENCE)
        if speaks or not isinstance(error, Interrupted):
            typer.echo(f"snlp-zoo: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        full = error.errno == errno.ENOSPC  # what was written to may have no name
        if error.filename is None and not full:
            raise
        if not speaks:
            time.sleep(_SILENCE)
        where = "" if error.filename is None else f"{_short(str(error.filename))}: "
        remedy = "make room" if full else "name another one"
        typer.echo(f"snlp-zoo: {where}{error.strerror}; {remedy}", err=True)
        sys.exit(2)
    except Exception as error:
        problem = torchvision_mismatch()  # nothing that needs transformers can run
        if type(error).__name__ == "OutOfMemoryError":  # torch's own, which may be what cannot be imported
            told, *_ = str(error).split(" GPU ")  # after it comes how much which process holds
            problem = f"{told} Take fewer or shorter texts at once: train.batch_size, data.max_length"
        if problem is None:
            raise
        typer.echo(f"snlp-zoo: {problem}", err=True)
        sys.exit(2)


def _short(text: str) -> str:
    return text if len(text) <= _WIDEST else text[:_WIDEST] + " ..."


def _print(result: dict[str, Any], as_json: bool, table: Table) -> None:
    if as_json:
        typer.echo(json.dumps(result))
    else:
        # [x] and :x: are text; a pipe has no width of its own: nothing there should be folded
        console = Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False, highlight=False)
        title, caption, table.title, table.caption = table.title, table.caption, None, None
        for part in filter(None, (title, table, caption)):  # a narrow table would fold a long path
            console.print(part, soft_wrap=part is not table)


def _table(title: str, *columns: str, numbers: bool = False) -> Table:
    """An empty table; `numbers` sets every column but the first flush right."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and i > 0 else "left", overflow="fold")
    return table


@app.command("list")
def list_(json_: JsonFlag = False) -> None:
    """List the zoo's entries."""
    from snlp_zoo import pretrained, registry

    entries = {name: registry.load_entry(name) for name in registry.list_entries()}
    shipped = pretrained.shipped()
    table = _table("Zoo entries", "entry", "model", "recipe", "weights", "what it is")
    for name, entry in entries.items():
        weights = "shipped" if name in shipped else "-"
        table.add_row(name, entry.model_type, entry.recipe or "-", weights, entry.description)
    rows = [
        {"name": name, "model_type": e.model_type, "recipe": e.recipe, "shipped": name in shipped}
        for name, e in entries.items()
    ]
    _print({"entries": rows}, json_, table)


@app.command()
def info(entry: str, json_: JsonFlag = False) -> None:
    """Show one entry: its configuration, size, source and results."""
    import torch

    from snlp_zoo import pretrained, registry

    found = registry.load_entry(entry)
    with torch.device("meta"):
        parameters = registry.build(entry).num_parameters()
    results = [row.model_dump(exclude_unset=True) for row in found.results]
    kept = pretrained.metrics(entry)
    result = {"name": entry, "parameters": parameters, **found.model_dump(), "results": results, "shipped": kept}
    table = _table(entry, "field", "value")
    for key in ("description", "model_type", "task", "parameters", "recipe"):
        table.add_row(key, str(result[key]))
    for key, value in {**found.config, **(found.convert or {}), **found.source}.items():
        table.add_row(key, str(value))
    if kept:
        scores = ", ".join(f"{name.replace('_', ' ')} {_shown(name, value)}" for name, value in kept["student"].items())
        table.add_row("shipped weights", f"{kept['bytes'] / 1e6:.1f} MB; {kept['dataset']} {kept['split']}: {scores}")
    for row in found.results:
        for i, line in enumerate(_result_lines(row)):
            name = ", ".join(filter(None, (row.dataset, row.split, row.metric.replace("_", " "))))
            table.add_row(name if i == 0 else "", line)
    _print(result, json_, table)


def _result_lines(result: Result) -> list[str]:
    """One result of an entry in words: score, what it is compared with, spikes, cost, and how to make it anew."""
    from snlp_zoo.energy.markdown import percent

    def score(value: float) -> str:
        return _shown(result.metric, value)

    lines = []
    if result.value is not None:
        lines.append(result.spread(score) + (f" ({result.number_of_seeds})" if result.runs else ""))
    others = {"teacher": result.teacher_value, "bag of words": result.baseline_value}
    others["paper"] = result.paper.value if result.paper else None
    lines.append(", ".join(f"{who} {score(value)}" for who, value in others.items() if value is not None))
    spikes = {"firing rate": result.firing_rate, "spike-driven": result.spike_driven_fraction}
    lines.append(", ".join(f"{what} {percent(share, 1)}" for what, share in spikes.items() if share is not None))
    if result.energy:
        ratios = result.energy.model_dump(include={"products", "all_operations", "with_memory"}, exclude_none=True)
        by = ", ".join(f"{ratio:.2f}x {name.replace('_', ' ')}" for name, ratio in ratios.items())
        lines.append(f"energy of the dense float network / its own, estimated: {by}")
    minutes = None if result.minutes is None else f"{result.minutes:g} minutes of training"
    commit = f"commit {result.commit}" if result.commit else None
    lines.append(", ".join(filter(None, (minutes, result.hardware, commit))))
    return [line for line in (*lines, result.command) if line]


@app.command()
def train(
    entry_or_recipe: Annotated[str, typer.Argument(help="A zoo entry with a recipe, or a recipe file.")],
    output_dir: Annotated[Path | None, typer.Option(help="Run folder; runs/<name> by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a value: train.batch_size=16")] = None,
    json_: JsonFlag = False,
) -> None:
    """Train a spiking model by its recipe, a student from its teacher or a language model, and print its scores."""
    cli_energy.quiet_transformers()
    from snlp_zoo.train.run import distill as run

    summary = run(entry_or_recipe, output_dir=output_dir, overrides=set_, resume=resume)
    if summary:  # rank 0
        _print(summary, json_, _summary_table(summary))


app.command("distill", help="Train a student from its teacher: another name of train.")(train)


def _summary_table(summary: dict[str, Any]) -> Table:
    """One column per contestant; the rest of the summary below."""
    people = [who for who in ("teacher", "student", "baseline") if any(k.startswith(f"{who}_") for k in summary)]
    metrics = [key.removeprefix("student_") for key in summary if key.startswith("student_")]
    counted = next(key for key in ("test_examples", "test_tokens", "validation_examples") if key in summary)
    title = f"{summary['name']}: {summary[counted]} {counted.replace('_', ' ')}, {summary['seconds']:.0f} s"
    table = _table(title, "", *("bag of words" if who == "baseline" else who for who in people), numbers=True)
    for metric in metrics:
        values = [summary.get(f"{who}_{metric}") for who in people]
        table.add_row(metric.replace("_", " "), *("-" if v is None else _shown(metric, v) for v in values))
    parameters = {"teacher": "teacher_parameters", "student": "parameters"}
    cells: dict[str, dict[str, str]] = {
        "parameters": {who: f"{summary[key]:,}" for who, key in parameters.items() if key in summary},
    }
    for key in ("time_steps", "max_count", "threshold_scale"):
        if summary.get(key) is not None:
            cells[key.replace("_", " ")] = {"student": f"{summary[key]:g}"}
    for key in ("firing_rate", "zero_share", "spikes_per_value"):
        if key in summary:
            cells[key.replace("_", " ")] = {"student": _shown(key, summary[key])}
    for name, shown in cells.items():
        table.add_row(name, *(shown.get(who, "-") for who in people))
    for stage in summary.get("stages", [])[:-1]:  # the last one's scores are above
        key = next(key for key in stage if key.startswith("student_"))
        metric, shown = key.removeprefix("student_"), {"student": _shown(key, stage[key])}
        name = f"{stage['name'].rpartition('/')[2]}: {metric.replace('_', ' ')}"
        table.add_row(name, *(shown.get(who, "-") for who in people))
    table.caption = f"saved in {summary['path']}"
    return table


_NO_SHARES = ("perplexity", "bits_per_byte", "bits_per_character", "spikes_per_value")


def _shown(metric: str, value: float) -> str:
    """Shares as per cent; losses, distances and bits have no hundred."""
    whole = metric.endswith(("loss", "mse")) or metric in _NO_SHARES
    return f"{value:.4f}" if whole else f"{100 * value:.1f} %"


@app.command()
def evaluate(
    path_or_entry: Annotated[
        str, typer.Argument(help="A saved folder, a zoo entry (in runs/, or shipped), or user/name on the Hub.")
    ],
    data: Annotated[str, typer.Option(help="A .txt, .tsv, .csv or .jsonl file (also .gz, .xz), or 'tweets'.")],
    text: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    text_pair: Annotated[str | None, typer.Option(help="Column of the second text.")] = None,
    label: Annotated[str, typer.Option(help="Column of the label.")] = "label",
    separator: Annotated[str | None, typer.Option(help="Stands after each text of a language model.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens a language model reads at once.")] = None,
    revision: RevisionOption = None,
    verify: VerifyFlag = False,
    json_: JsonFlag = False,
) -> None:
    """Score a trained classifier on labelled texts, or a language model on any."""
    cli_energy.quiet_transformers()
    from snlp_zoo.train.saved import evaluate_checkpoint

    columns: dict[str, Any] = {"text": text, "text_pair": text_pair, "label": label, "separator": separator}
    scores = evaluate_checkpoint(path_or_entry, data, **columns, window=window, revision=revision, verify=verify)
    table = _table(scores["path"], "metric", "value", numbers=True)
    for key, value in scores.items():
        if key != "path":
            table.add_row(key, _shown(key, value) if isinstance(value, float) else str(value))
    _print(scores, json_, table)


@app.command()
def predict(
    path_or_entry: Annotated[
        str, typer.Argument(help="A saved folder, a zoo entry (in runs/, or shipped), or user/name on the Hub.")
    ],
    texts: Annotated[list[str], typer.Argument(help="One or more texts.")],
    pair: Annotated[
        list[str] | None, typer.Option(help="The second text of the first text, of the next, ..., for models of pairs.")
    ] = None,
    revision: RevisionOption = None,
    verify: VerifyFlag = False,
    json_: JsonFlag = False,
) -> None:
    """Classify texts, or pairs of texts, with a trained model."""
    cli_energy.quiet_transformers()
    from snlp_zoo.predict import predict as run

    predictions = run(path_or_entry, texts, pairs=pair or None, revision=revision, verify=verify)
    table = _table(path_or_entry, "text", "label", "score", "firing rate")
    for row in predictions:
        shown = " | ".join(_short(row[part]) for part in ("text", "pair") if part in row)
        table.add_row(shown, row["label"], f"{row['score']:.3f}", f"{100 * row['firing_rate']:.1f} %")
    _print({"predictions": predictions}, json_, table)


@app.command()
def publish(
    path: Annotated[str, typer.Argument(help="A run folder, a saved model, or a zoo entry (in runs/, or shipped).")],
    repository: Annotated[str, typer.Argument(help="user/name on the Hub; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Only people with access see it.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, made if it does not exist; main by default.")] = None,
    licence: Annotated[str, typer.Option("--license", help="The Hub's short name of a licence.")] = "apache-2.0",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show files, sizes and card; no network.")] = False,
    json_: JsonFlag = False,
) -> None:
    """Publish a trained model with its card on the Hub, in one commit; safe to repeat."""
    cli_energy.quiet_transformers()
    from dataclasses import asdict

    from snlp_zoo.hub import publish as run

    options: dict[str, Any] = {"private": private, "revision": revision, "licence": licence, "dry_run": dry_run}
    report = run(path, repository, **options)
    table = _table(f"{report.repo_id}, {report.revision}", "file", "bytes", numbers=True)
    for name, size in report.files.items():
        table.add_row(name, f"{size:,}")
    for name in report.left_out:
        table.add_row(name, "left out")
    table.caption = (
        f"published as {report.url}, commit {report.commit}" if report.commit else "dry run: nothing was sent"
    )
    _print(asdict(report) | {"url": report.url}, json_, table)
    if dry_run and not json_:
        typer.echo(report.card)


@app.command()
def bench(
    op: Annotated[str, typer.Option(help="One op; all of them without it.")] = "",
    json_: JsonFlag = False,
) -> None:
    """Time the neurons of this machine's backends against plain PyTorch and SpikingJelly."""
    from snlp_zoo.bench import OPS, measure

    if op and op not in OPS:
        raise BackendError(f"bench: unknown op {op!r}; use one of {', '.join(OPS)}")

    def progress(row: dict[str, Any]) -> None:
        typer.echo(f"{row['op']} {row['shape']} {row['dtype']} {row['backend']}: {row['ms']:.3f} ms", err=True)

    result = measure([op] if op else list(OPS), progress)
    copy = result["copy_gb_per_s"]
    heading = f"{result['device']}, torch {result['torch']}; one forward and backward, medians"
    title = heading + (f"; copying: {copy:.0f} GB/s" if copy else "")
    faster_than = ["x loop", "x compile", "x SpikingJelly"]
    table = _table(title, "op", "T, B, N, D", "dtype", "backend", "ms", "kernels ms", "bandwidth", *faster_than)
    for row in result["rows"]:
        faster = (f"{row[k] / row['ms']:.1f}" if k in row else "" for k in ("loop_ms", "compile_ms", "spikingjelly_ms"))
        kernels = (f"{row['kernels_ms']:.3f}", f"{row['gb_per_s'] / copy:.2f}") if copy else ("", "")
        shape = ", ".join(map(str, row["shape"]))
        table.add_row(row["op"], shape, row["dtype"], row["backend"], f"{row['ms']:.3f}", *kernels, *faster)
    _print(result, json_, table)


@app.command()
def doctor(json_: JsonFlag = False) -> None:
    """Show versions, devices, the backend each op chooses and why, and problems."""
    from snlp_zoo.doctor import examine

    report = examine()
    table = _table("snlp-zoo doctor", "what", "found")
    table.add_row("python", report["python"])
    for name, found in report["packages"].items():
        table.add_row(name, found or "not installed")
    for name, value in report.get("devices", {}).items():
        table.add_row(name, ", ".join(value) or "none" if isinstance(value, list) else str(value))
    for op, choice in report.get("backends", {}).items():
        table.add_row(f"op {op} on {choice['device']}", f"{choice['backend']} ({choice['reason']})")
    for problem in report["problems"] or ["none found"]:
        table.add_row("problems", problem)
    _print(report, json_, table)
    if report["problems"]:
        raise typer.Exit(1)


app.add_typer(cli_energy.app)
app.add_typer(cli_convert.app)
app.add_typer(cli_generate.app)
