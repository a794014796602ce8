"""The commands `snlp-zoo convert` and `snlp-zoo convert-checkpoint`."""

import json
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from snlp_zoo import cli_energy
from snlp_zoo.cli_energy import JsonFlag
from snlp_zoo.errors import CheckpointError, lookup

if TYPE_CHECKING:
    from snlp_zoo.convert.calibration import CalibrationReport

app = typer.Typer()
KINDS = {"spikegpt": "the SpikeGPT authors' .pth", "rwkv4": "RWKV-4, .pth or rwkv.cpp's .bin"}


@app.command()
def convert(
    src: Annotated[
        str,
        typer.Argument(help="A zoo entry, a folder, a .gguf file, an installed package that holds one, or user/name."),
    ],
    dst: Annotated[Path | None, typer.Argument(help="A new folder; runs/<entry>/model of a zoo entry.")] = None,
    threshold_scale: Annotated[float | None, typer.Option(help="k: more spikes, smaller error; 3.")] = None,
    code: Annotated[str | None, typer.Option(help="Of the spikes: bitwise, unary, ternary, ttfs, gif, ...")] = None,
    max_count: Annotated[int | None, typer.Option(help="Largest count of spikes; none by default.")] = None,
    targets: Annotated[
        list[str] | None, typer.Option(help="all-but-head, all, or a pattern of layer names; may be repeated.")
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Counts from each token's smallest input.")] = False,
    levels: Annotated[int | None, typer.Option(help="Of the codes multi_level and gif; 4.")] = None,
    weight_bits: Annotated[float | None, typer.Option(help="32, 8, or, to be trained, 1.58 or 1.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights, such as bfloat16; as saved.")] = None,
    salient: Annotated[float | None, typer.Option(help="Share of input channels that get finer thresholds.")] = None,
    extra_bits: Annotated[int, typer.Option(help="How much finer: V / 2^bits.")] = 1,
    text: Annotated[Path | None, typer.Option(help="Text for --salient and --report; tweets by default.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Show the layers of largest error, and what helps.")] = False,
    json_: JsonFlag = False,
) -> None:
    """Make a dense model of transformers spike, without training."""
    cli_energy.quiet_transformers()
    from snlp_zoo.convert.dense import convert as run

    options: dict[str, Any] = {
        "threshold_scale": threshold_scale,
        "code": code,
        "max_count": max_count,
        "targets": targets[0] if targets and len(targets) == 1 else targets,
        "symmetric": False if asymmetric else None,
        "levels": levels,
        "weight_bits": weight_bits,
    }
    given = {name: value for name, value in options.items() if value is not None}
    made = run(src, dst, options=given, salient=salient, extra_bits=extra_bits, dtype=dtype, text=text, report=report)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if json_:
        typer.echo(json.dumps(made.to_dict() | {"peak_bytes": peak}))
        return
    scale = made.convert.get("threshold_scale", 3.0)
    typer.echo(
        f"{made.path}: {made.model}, {made.parameters:,} parameters; {made.layers} linear layers spike, "
        f"{len(made.dense)} stay dense{f' ({_few(made.dense)})' if made.dense else ''}; threshold_scale {scale:g}, "
        f"code {made.convert.get('code', 'bitwise')}; {made.seconds:.1f} s, {made.loading_seconds:.1f} of them "
        f"loading; peak memory of the process {peak / 1e9:.2f} GB"
    )
    if made.report is not None:
        _show(made.report)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _show(report: "CalibrationReport") -> None:
    """The ten layers of largest error, and what would help."""
    columns = ("layer", "error", "zeros", "spikes per input", "largest count", "cut off", "outlier channels")
    typer.echo(f"\n{report.tokens:,} tokens, the layers of largest error\n\n| {' | '.join(columns)} |")
    typer.echo("|---" * len(columns) + "|")
    for name, layer in report.worst().items():
        counts, channels = layer.counts, layer.outliers
        which = f" ({_few([str(channel) for channel in channels])})" if channels else ""
        typer.echo(
            f"| {name} | {layer.error:.1%} | {counts.zero_share:.1%} | {counts.spikes_per_value:.2f} "
            f"| {counts.largest} | {counts.cut / counts.values:.2%} | {len(channels)} of {len(layer.saliency)}{which} |"
        )
    typer.echo(f"\n{report.advice()}")


@app.command("convert-checkpoint")
def convert_checkpoint(
    kind: Annotated[str, typer.Argument(help="; ".join(f"{kind}: {what}" for kind, what in KINDS.items()) + ".")],
    src: Annotated[Path, typer.Argument(help="The checkpoint; nothing in it is ever executed.")],
    dst: Annotated[Path, typer.Argument(help="A new folder for the model.")],
    binary_embedding: Annotated[
        bool | None,
        typer.Option(help="Embeddings as spikes. Without it spikegpt tries both on --text, rwkv4 keeps them real."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file to measure perplexity on; needs --tokenizer.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of its tokenizer, saved with the model.")] = None,
    spiking: Annotated[
        bool, typer.Option("--spiking", help="rwkv4: put the weights into a SpikeGPT, to be trained.")
    ] = False,
    json_: JsonFlag = False,
) -> None:
    """Make somebody else's checkpoint a model of this zoo."""
    lookup("kind of checkpoint", kind, KINDS, CheckpointError)
    if spiking and kind != "rwkv4":
        raise CheckpointError(f"--spiking is for rwkv4; a {kind} checkpoint is spiking already, leave it out")
    cli_energy.quiet_transformers()
    from snlp_zoo.convert import rwkv4, spikegpt

    options: dict[str, Any] = {"binary_embedding": binary_embedding, "text": text, "tokenizer": tokenizer}
    if kind == "rwkv4":
        made = rwkv4.convert(src, dst, spiking=spiking, **options)
    else:
        made = spikegpt.convert(src, dst, **options)
    if json_:
        typer.echo(json.dumps(made.to_dict()))
        return
    sizes = ", ".join(f"{name} {value}" for name, value in made.config.items())
    typer.echo(f"{made.path}: {made.parameters:,} parameters, {sizes}")
    for embeddings, value in made.perplexities.items():
        typer.echo(f"perplexity with {embeddings} embeddings: {value:.2f}")
