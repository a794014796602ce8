"""The command `snlp-zoo generate`."""

import json
from typing import Annotated

import typer

from snlp_zoo.cli_energy import JsonFlag, quiet_transformers
from snlp_zoo.errors import DataError

app = typer.Typer()


@app.command()
def generate(
    path_or_entry: Annotated[
        str, typer.Argument(help="A saved folder, a zoo entry (in runs/, or shipped), or user/name on the Hub.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 100,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Divides logits before a token is drawn; 0 takes the likeliest. Left out it is 1, with beams 0."
        ),
    ] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this share of probability.")] = 1.0,
    num_beams: Annotated[
        int, typer.Option(help="Continuations followed side by side; more than 1 draw only with --temperature.")
    ] = 1,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text while it is written.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub; main by default.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with the Hub's checksums.")] = False,
    json_: JsonFlag = False,
) -> None:
    """Continue a prompt with a trained causal language model."""
    if stream and json_:
        raise DataError("generate: --stream prints text and --json one object; leave one of them out")
    quiet_transformers()
    from snlp_zoo.generate import generate as run

    begun = False

    def show(piece: str) -> None:
        nonlocal begun
        typer.echo(piece if begun else prompt + piece, nl=False)
        begun = True

    result = run(
        path_or_entry,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        num_beams=num_beams,
        seed=seed,
        stream=show if stream else None,
        revision=revision,
        verify=verify,
    )
    if json_:
        typer.echo(json.dumps(result))
    else:
        typer.echo("" if stream else prompt + result["text"])
