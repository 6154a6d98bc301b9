"""The command that serves the encoder to machines that load no model themselves."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from timesearch.cli.app import ParamsOption, app, say
from timesearch.cli.inference import KeyOption
from timesearch.cli.opening import encoder_of, settings_for_asking

encoder_app = typer.Typer(no_args_is_help=True, help="The encoder of frames and queries: serve it.")
app.add_typer(encoder_app, name="encoder", rich_help_panel="Servers")


@encoder_app.callback()
def _group() -> None:
    """Makes `serve` a command of its own name: an application of one command would take its place."""


@encoder_app.command()
def serve(
    model: Annotated[
        str | None, typer.Option("--model", help="open_clip name, or local folder; none: that of the parameters.")
    ] = None,
    pretrained: Annotated[str | None, typer.Option("--pretrained", help="open_clip tag of the weights.")] = None,
    host: Annotated[
        str,
        typer.Option("--host", help="Address or name to listen on; 0.0.0.0 lets in the network: set a key, too."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on.")] = 8782,
    key_file: KeyOption = None,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Serve the encoder by OpenAI's embeddings API, for `--encoder-url` and `features.url` elsewhere."""
    import asyncio

    import uvicorn

    from timesearch.retrieval.encoder import load_encoder
    from timesearch.serve.api import address, listen
    from timesearch.serve.embeddings import make_embeddings_app
    from timesearch.serve.keys import read_key

    key = read_key(key_file)
    listener = listen(host, port)
    encoder = load_encoder(model, pretrained) if model else encoder_of(settings_for_asking(params))[0]
    encoder.encode_text(["a picture"])  # loads it: the first client should not wait for that
    server = uvicorn.Server(
        uvicorn.Config(make_embeddings_app(encoder, host, key), log_level="warning", http="h11", ws="none")
    )

    async def answer() -> None:
        say(f"{encoder.name} embeds at {address(host, listener.getsockname()[1])}/v1 (stop with Ctrl-C)")
        await server.serve([listener])

    with suppress(KeyboardInterrupt):
        asyncio.run(answer())
