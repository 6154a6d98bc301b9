"""Commands: protocol import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from timesearch.cli.app import app, say, visible

protocols = typer.Typer(help="Prompts and rules by which an agent was trained.", no_args_is_help=True)
app.add_typer(protocols, name="protocol")


@protocols.callback()
def _group() -> None:
    """Prompts and rules by which an agent was trained."""


@protocols.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="Your clone of the TimeSearch-R repository.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the protocol.")] = Path("protocols/timesearch-r"),
) -> None:
    """Read the prompts of a clone of TimeSearch-R, without running anything of it, into a protocol."""
    from timesearch.search.reference import MissingError, import_protocol

    try:
        files = import_protocol(folder, out)
    except MissingError as error:
        for piece in error.pieces:
            typer.echo(f"timesearch: {visible(piece)}", err=True)
        raise typer.Exit(2) from error
    say(f"{len(files)} files in {out}: play by them with `timesearch ask --protocol {out}`, or set search.prompts")
