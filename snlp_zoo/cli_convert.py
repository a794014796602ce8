"""The command `snlp-zoo convert-checkpoint`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from snlp_zoo import cli_energy
from snlp_zoo.cli_energy import JsonFlag
from snlp_zoo.errors import CheckpointError, lookup

app = typer.Typer()
KINDS = {"spikegpt": "the SpikeGPT authors' .pth", "rwkv4": "RWKV-4, .pth or rwkv.cpp's .bin"}


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
