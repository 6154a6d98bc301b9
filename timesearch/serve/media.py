"""What the page shows of videos: the player's file, single pictures, and the moments that a search finds.

- ``GET /api/video?video=ID`` says how a browser gets to play it (`Playable`), and whether it has been prepared.
- ``GET /api/media?video=ID`` is the file, in parts as players ask for them.
- ``POST /api/playable`` with `{"video", "encode"}` makes a file that browsers play, and answers with server-sent
  events: `status` as it goes on, then `ready` with the address of the file, or `error`. It ends when the client leaves.
- ``GET /api/played/NAME`` is that file.
- ``GET /api/picture?video=ID&seconds=S&width=W`` is the picture on the screen then, as JPEG.
- ``GET /api/search?query=Q`` is the moments that show something, of all videos that can be searched.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from timesearch.base.errors import ItemError, RequestError, TimeSearchError
from timesearch.base.stopping import Stop, StoppedError
from timesearch.base.untrusted import UntrustedError, mend_text, parse_json
from timesearch.inference.ask import Say
from timesearch.library.library import Moment
from timesearch.library.words import Said
from timesearch.serve.events import Tell, event, streamed
from timesearch.serve.guard import body_of, content_type
from timesearch.serve.pictures import WIDTHS, Pictures
from timesearch.serve.playable import MP4, Made, Making, Playable, playable
from timesearch.serve.ranges import Part, unchanged
from timesearch.serve.shelf import Held, Shelf
from timesearch.serve.together import Together

T = TypeVar("T")
_MOMENTS = 24
_LARGEST_BODY = 2**14
_AT_ONCE = 2
"""Files that are looked into or decoded, and searches, at a time, each; and files that are made."""
_LATEST = 1e7
_NAME = re.compile(r"[0-9a-f]{24}")
_POLL = 0.1
"""Seconds between two looks at whether who waits for a search is still there."""

Identity = Annotated[str, Query(max_length=20_000)]


class _Wanted(BaseModel):
    """A video that is to be made fit for browsers; `encode` where a copy of its pictures does not play either."""

    video: str
    encode: bool = False


def add_media(app: FastAPI, shelf: Shelf, cache: Path) -> Callable[[], None]:
    """Add the routes.

    Args:
        app: the application.
        shelf: the videos.
        cache: folder for what is made for browsers.

    Returns:
        What ends all work that is under way.
    """
    pictures, made = Pictures(), Made(cache)
    making = Together(_AT_ONCE, "playable", "waiting for other videos")
    looking, searching = asyncio.Semaphore(_AT_ONCE), asyncio.Semaphore(_AT_ONCE)

    @app.get("/api/video")
    async def describe(request: Request, video: Identity) -> dict[str, Any]:
        held = await _held(shelf, video)
        found = await _in_turn(request, looking, lambda: playable(held.path))
        return await run_in_threadpool(_described, held, found)

    @app.api_route("/api/media", methods=["GET", "HEAD"])
    async def file(request: Request, video: Identity) -> Part:
        held = await _held(shelf, video)
        found = await _in_turn(request, looking, lambda: playable(held.path))
        return await _part(held.path, found.media_type)

    @app.api_route("/api/played/{name}", methods=["GET", "HEAD"])
    async def played(name: str) -> Part:
        path = await run_in_threadpool(made.find, name) if _NAME.fullmatch(name) else None
        if path is None:
            raise HTTPException(404, "there is no such file any more: open the video again")
        return await _part(path, MP4)

    @app.post("/api/playable")
    async def make(request: Request) -> StreamingResponse:
        if content_type(request) != "application/json":
            raise HTTPException(415, "the request must be sent as application/json")
        body = b"".join([piece async for piece in body_of(request, "the request", _LARGEST_BODY)])
        try:
            wanted = _Wanted.model_validate(parse_json(body))
        except (UntrustedError, ValidationError) as error:
            raise HTTPException(422, "the request names no video that can be read") from error
        held = await _held(shelf, wanted.video)
        return streamed(partial(_make, shelf, made, making, held, wanted.encode))

    @app.get("/api/picture")
    async def picture(
        request: Request,
        video: Identity,
        seconds: Annotated[float, Query(ge=0, le=_LATEST, allow_inf_nan=False)] = 0.0,
        width: int = max(WIDTHS),
    ) -> Response:
        if width not in WIDTHS:
            raise HTTPException(422, f"pictures are {' or '.join(map(str, WIDTHS))} pixels wide")
        held = await _held(shelf, video)
        tag = await run_in_threadpool(pictures.tag, held, seconds, width)
        headers = {"Cache-Control": "private, no-cache", "ETag": tag}
        if unchanged(request.headers, tag):
            return Response(status_code=304, headers=headers)
        jpeg = await _in_turn(request, looking, lambda: pictures.at(held, seconds, width))
        return Response(jpeg, media_type="image/jpeg", headers=headers)

    @app.get("/api/search")
    async def search(request: Request, query: Annotated[str, Query(max_length=4000)]) -> dict[str, Any]:
        stop = Stop()
        found, identities = await _in_turn(
            request, searching, lambda: shelf.find(mend_text(query), _MOMENTS, stop), stop
        )

        def placed(each: Moment | Said) -> dict[str, Any]:
            video = each.video
            return {"video": identities[video.key], "name": video.name, "start": each.start, "end": each.end}

        moments = [
            {**placed(moment), "seconds": moment.seconds, "score": round(moment.score, 4)}
            for moment in found.moments
            if moment.video.key in identities
        ]
        heard = [{**placed(said), "text": said.text} for said in found.heard.moments if said.video.key in identities]
        said = "" if found.moments else found.why_nothing()
        return {"moments": moments, "heard": heard, "videos": found.videos, "said": said}

    return making.close


async def _held(shelf: Shelf, identity: str) -> Held:
    try:
        return await run_in_threadpool(shelf.held, identity)
    except ItemError as error:
        raise HTTPException(404, str(error)) from error


async def _in_turn(request: Request, turns: asyncio.Semaphore, work: Callable[[], T], stop: Stop | None = None) -> T:
    """Do work in a thread when it is its turn; not at all where the client has left by then, which is asked to stop."""
    async with turns:
        if await request.is_disconnected():
            raise HTTPException(400, "the client has left")
        doing = asyncio.ensure_future(run_in_threadpool(work))
        while stop is not None and not doing.done():
            await asyncio.wait([doing], timeout=_POLL)
            if await request.is_disconnected():
                stop.ask()
        try:
            return await doing
        except StoppedError as error:
            raise HTTPException(400, "the client has left") from error
        except RequestError as error:
            raise HTTPException(422, str(error)) from error
        except (ItemError, OSError) as error:
            raise HTTPException(404, str(error)) from error


async def _part(path: Path, kind: str) -> Part:
    try:
        return await run_in_threadpool(Part, path, kind)
    except OSError as error:
        raise HTTPException(404, "there is no such video any more") from error


def _described(held: Held, found: Playable) -> dict[str, Any]:
    frames = held.frames()
    return {
        "id": held.identity,
        "name": held.name,
        "type": found.type,
        "making": found.making,
        "why": found.why,
        "start": found.start,
        "seconds": found.seconds or (0.0 if frames is None else frames.end),
        "prepared": held.is_prepared(),
    }


async def _make(shelf: Shelf, made: Made, making: Together, held: Held, encode: bool, say: Tell) -> None:
    """Make a file fit for browsers, and tell the events of it."""
    try:
        with await run_in_threadpool(shelf.attached.use, held.path):
            found = await making.in_turn(playable, held.path)
            if found.making is None:
                say(event({"text": found.why}, "error"))
                return
            how: Making = "encode" if encode else found.making
            name = await run_in_threadpool(made.name, held.path, how)
            if await run_in_threadpool(made.find, name) is None:
                await making.done(
                    name, lambda text: say(event({"text": text}, "status")), _maker(made, making, held, how)
                )
            path = await run_in_threadpool(made.find, name)
            if path is None:
                raise ItemError(f"{held.name} is gone", reason="missing_file")
            start = (await making.in_turn(playable, path)).start
            say(event({"address": f"api/played/{name}", "start": start}, "ready"))
    except TimeSearchError as error:
        say(event({"text": str(error)}, "error"))


def _maker(made: Made, making: Together, held: Held, how: Making) -> Callable[[Say, Stop], Awaitable[None]]:
    async def make(say: Say, stop: Stop) -> None:
        await making.in_turn(made.make, held.path, how, say, stop)

    return make
