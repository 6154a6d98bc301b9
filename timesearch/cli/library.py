"""Commands: index, search, mcp."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from timesearch.cli.app import ParamsOption, app, say, visible
from timesearch.cli.inference import KeyOption, ModelOption, ProtocolOption, UrlOption
from timesearch.cli.opening import (
    EncoderUrlOption,
    LibraryOption,
    SpeechOption,
    WithinOption,
    default_library,
    print_json,
    settings_for_asking,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from mcp.server.mcpserver import MCPServer

    from timesearch.library.library import Found, Library, Moment
    from timesearch.library.words import Said
    from timesearch.search.policy import Policy


@app.command()
def index(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="DIR...", help="Folders of videos; none: those of the library.")
    ] = None,
    library: LibraryOption = None,
    encoder_url: EncoderUrlOption = None,
    speech: SpeechOption = None,
    params: ParamsOption = Path("params.yaml"),
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Exit with 0 although some videos failed.")] = False,
) -> None:
    """Bring folders of videos into a library, or up to date there; a run that was stopped goes on."""
    from timesearch.base.progress import console
    from timesearch.cli.data import say_left_out
    from timesearch.cli.opening import encoder_for
    from timesearch.library.index import index_folders
    from timesearch.video.probe import SUFFIXES

    def note(text: str) -> None:
        typer.echo(f"  {visible(text)}", err=True)

    place = library or default_library()
    settings = settings_for_asking(params, encoder_url=encoder_url)
    settings.subtitles.speech = speech or settings.subtitles.speech
    with console.status("loading the encoder"):
        encoder, record = encoder_for(place, settings)
    done = index_folders(place, folders or [], settings, encoder, record, note)
    for folder in folders or ():
        say_left_out(folder, SUFFIXES)
    for name in done.vanished[:20]:
        note(f"gone: {name}")
    batch = done.batch
    for failure in batch.failures[:20]:
        note(f"{failure.reason}: {failure.message}")
    if batch.failures:
        note(f"all failures: {place / 'failures.jsonl'}")
    again = ", ".join(f"{count} {stale}" for stale, count in sorted(batch.again.items()))
    say(
        f"index: {len(batch.done)} made{again and f' (in place of {again})'}, {len(batch.skipped)} up to date, "
        f"{len(done.vanished)} gone, {len(batch.failures)} failed; {done.videos} videos with {done.rows} frames can be "
        f"searched in {place}"
    )
    raise typer.Exit(batch.exit_code(keep_going))


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What to look for, in a few words.")],
    within: WithinOption = None,
    since: Annotated[
        str | None, typer.Option("--since", help="Only videos changed on this day or later: 2026-11-30.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, max=1000, help="Moments at most.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")] = False,
    sheet: Annotated[Path | None, typer.Option("--sheet", help="PNG for the best frame of each moment.")] = None,
    library: LibraryOption = None,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Find the moments of a library's videos that show something, or in which it is said."""
    from timesearch.cli.opening import library_with_encoder
    from timesearch.library.library import check_query

    check_query(query)
    day = _day(since)
    opened, encoder = library_with_encoder(library or default_library(), settings_for_asking(params))
    videos = opened.videos(within, day)
    found = opened.find(encoder, query, count, videos)
    for video in found.heard.damaged:
        typer.echo(visible(f"  the words of {video.name} are damaged: `timesearch index` remakes them"), err=True)
    if as_json:
        print_json({"query": query, **_as_json(opened, found)})
    else:
        for line in _lines(opened, found):
            say(visible(line))
    if sheet is not None and found.moments:
        _save(opened, found.moments, sheet)
        if not as_json:
            say(f"saved {sheet}")


def _day(text: str | None) -> datetime | None:
    from datetime import datetime

    from timesearch.base.errors import RequestError

    if text is None:
        return None
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError, OSError) as error:
        raise RequestError(f"--since {text[:50]!r} is no date: write it as 2026-11-30") from error


def _lines(library: Library, found: Found) -> list[str]:
    """A line a moment, those in which it is said last; or that no frame answers, and why."""
    lines = [] if found.moments else [found.why_nothing()]
    lines += [f"{moment.score:.3f}  {_place(library, moment)}" for moment in found.moments]
    lines += [f"said   {_place(library, moment)}  {moment.text}" for moment in found.heard.moments]
    return lines


def _place(library: Library, moment: Moment | Said) -> str:
    """From when to when, and in which video."""
    span = f"{_clock(moment.start)}-{_clock(moment.end)}" if moment.end > moment.start else _clock(moment.start)
    state = library.state_of(moment.video)
    return f"{span:<15}  {moment.video.name}{'' if state == 'as indexed' else f'  ({state})'}"


def _clock(seconds: float) -> str:
    """A time as players show it, such as 1:02:03.5."""
    minutes, rest = divmod(round(10 * seconds), 600)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest / 10:04.1f}" if hours else f"{minutes}:{rest / 10:04.1f}"


def _as_json(library: Library, found: Found) -> dict[str, Any]:
    return {
        "moments": [
            {
                "video": moment.video.name,
                "key": moment.video.key,
                "start": moment.start,
                "end": moment.end,
                "seconds": moment.seconds,
                "score": round(moment.score, 4),
                "state": library.state_of(moment.video),
            }
            for moment in found.moments
        ],
        "said": [
            {
                "video": moment.video.name,
                "key": moment.video.key,
                "start": moment.start,
                "end": moment.end,
                "text": moment.text,
                "share": round(moment.share, 4),
                "state": library.state_of(moment.video),
            }
            for moment in found.heard.moments
        ],
        "best": round(found.best, 4),
        "level": round(found.level, 4) if found.videos else None,
        "videos": found.videos,
        "frames": found.frames,
    }


def _save(library: Library, moments: list[Moment], sheet: Path) -> None:
    from timesearch.data.messages import format_seconds
    from timesearch.inference.ask import as_request, picture_sheet

    with as_request():
        pictures = [
            (f"{format_seconds(moment.seconds)} {moment.video.name}", library.frame_cache(moment.video)[moment.frame])
            for moment in moments
        ]
    picture_sheet(pictures, sheet)


@app.command()
def mcp(
    library: LibraryOption = None,
    model: ModelOption = None,
    url: UrlOption = None,
    port: Annotated[
        int | None,
        typer.Option("--http", min=0, max=65535, help="Serve HTTP at this port of this machine; 0 takes a free one."),
    ] = None,
    key_file: KeyOption = None,
    protocol: ProtocolOption = None,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Offer a library to agents by the Model Context Protocol: on standard input and output, or at a port."""
    import anyio

    from timesearch.cli.opening import library_with_encoder
    from timesearch.inference.ask import Asker, answering_policy
    from timesearch.serve.mcp import make_server

    settings = settings_for_asking(params, protocol)
    opened, encoder = library_with_encoder(library or default_library(), settings)

    @contextmanager
    def asking() -> Iterator[tuple[Asker, Policy]]:
        with answering_policy(settings, model, url) as policy:
            yield Asker(settings, policy, encoder, opened.folder), policy

    server = make_server(opened, encoder, asking)
    with suppress(KeyboardInterrupt):
        if port is None:
            anyio.run(server.run_stdio_async)
        else:
            _serve_http(server, port, key_file)


def _serve_http(server: MCPServer, port: int, key_file: Path | None) -> None:
    import asyncio

    import uvicorn
    from starlette.types import ASGIApp

    from timesearch.serve.api import address, listen
    from timesearch.serve.keys import Keyed, read_key

    host, key = "127.0.0.1", read_key(key_file)
    listener = listen(host, port)
    app: ASGIApp = server.streamable_http_app(host=host)
    config = uvicorn.Config(app if key is None else Keyed(app, key), log_level="warning", http="h11", ws="none")

    async def answer() -> None:
        typer.echo(f"agents reach the library at {address(host, listener.getsockname()[1])}/mcp (stop with Ctrl-C)")
        await uvicorn.Server(config).serve([listener])

    asyncio.run(answer())
