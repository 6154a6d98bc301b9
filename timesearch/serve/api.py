"""The HTTP API behind the page.

- ``GET /api/videos`` lists `[{"id", "name"}]`: the videos of the folders that were given, and those that were dropped.
- ``PUT /api/videos/NAME`` takes the body as a dropped video and answers with its `id` and `name`.
- ``POST /api/ask`` with `{"video", "question", "options"}` answers with server-sent events: `status`, `video`, the
  episode's steps (`preview`, `turn`, `frames`, `reanswer`), and at the end `answer` or `error`.
- ``GET /api/frames/CACHE/INDEX`` is a frame as JPEG; the event `video` names the cache.

It serves this machine's user: requests must name this machine (so no foreign page reaches it by a name of its own),
files are read in the given folders only, and everything is data for the page, which shows text as text. There is no
password: bound to other addresses than this machine's own loopback, it serves whoever reaches them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import re
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field

from timesearch.errors import ItemError, RequestError, TimeSearchError
from timesearch.files import atomic_path, inside
from timesearch.inference.ask import Asker
from timesearch.messages import describe_call, exchanges
from timesearch.samples import Prediction
from timesearch.search.episode import Step
from timesearch.search.policy import Policy
from timesearch.video.frames import FrameCache, cache_path

_PAGE = Path(__file__).parent / "page"
_SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts"})
_LARGEST = 8 * 2**30
"""Bytes of a dropped video at most."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_EVERY_ADDRESS = frozenset({"0.0.0.0", "::"})


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one.

    Raises:
        RequestError: the address is not this machine's, or taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0].lower()
        raise RequestError(
            f"cannot listen at {host}, port {port} ({reason}): choose another --host or --port"
        ) from error


def address(host: str, port: int) -> str:
    """What to open in a browser for a server bound to `host`."""
    name = socket.gethostname() if host in _EVERY_ADDRESS else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def is_named(header: str, host: str) -> bool:
    """Whether a request's `Host` names this machine, where the server is bound to `host`.

    A foreign page can make a name of its own lead here (DNS rebinding), and its requests bear that name. An address
    cannot be led elsewhere: a server at every address answers to any, and to the machine's own name.
    """
    parts = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+))(?::\d+)?", header)
    if parts is None:
        return False
    name = (parts[1] or parts[2]).lower()
    if name in ("127.0.0.1", "localhost", "::1", host.lower()):
        return True
    if host not in _EVERY_ADDRESS:
        return False
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name == socket.gethostname().lower()


class Question(BaseModel):
    """What is asked about which video."""

    video: str
    question: str = Field(max_length=4000)
    options: list[str] = Field(default_factory=list, max_length=26)


class Videos:
    """The videos that may be asked about: those of the given folders, and those that were dropped."""

    def __init__(self, folders: Sequence[Path], uploads: Path) -> None:
        self.uploads = uploads
        self._roots = {str(number): folder.resolve() for number, folder in enumerate((*folders, uploads))}

    def all(self) -> list[dict[str, str]]:
        """Identity and name of each, in order of name."""
        found = [
            {"id": f"{number}/{path.relative_to(root).as_posix()}", "name": path.relative_to(root).as_posix()}
            for number, root in self._roots.items()
            if root.is_dir()
            for path in root.rglob("*")
            if path.suffix.lower() in _SUFFIXES and path.is_file() and path.resolve().is_relative_to(root)
        ]
        return sorted(found, key=lambda video: video["name"])

    def path(self, identity: str) -> Path:
        """The file of a video; 404 for anything that is not below a folder that was given."""
        number, _, relative = identity.partition("/")
        try:
            root = self._roots[number]
            path = inside(root, relative).resolve()
        except (KeyError, ValueError, ItemError) as error:
            raise HTTPException(404, "there is no such video") from error
        if not path.is_relative_to(root) or not path.is_file() or path.suffix.lower() not in _SUFFIXES:
            raise HTTPException(404, "there is no such video")
        return path


def make_app(asker: Asker, policy: Policy, folders: Sequence[Path], uploads: Path, host: str = "127.0.0.1") -> FastAPI:
    """The application.

    Args:
        asker: prepares videos and answers.
        policy: connected already; closed when the application ends.
        folders: the only folders that videos are read from.
        uploads: folder for dropped videos.
        host: the address it is bound to; requests must name it or this machine.
    """
    videos = Videos(folders, uploads)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await policy.close()

    app = FastAPI(title="timesearch", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        if not is_named(request.headers.get("host", ""), host):
            return Response("requests must name this machine: its address, or the name that --host gives it", 400)
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            return Response("requests from other sites are refused", 403)
        response: Response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")

    @app.get("/page.{kind}")
    def part(kind: str) -> FileResponse:
        if kind not in ("css", "js"):
            raise HTTPException(404)
        return FileResponse(_PAGE / f"page.{kind}")

    @app.get("/api/videos")
    def list_videos() -> list[dict[str, str]]:
        return videos.all()

    @app.put("/api/videos/{name}")
    async def drop(name: str, request: Request) -> dict[str, str]:
        safe = re.sub(r"[^\w.-]+", "_", Path(name).name).lstrip(".")
        if Path(safe).suffix.lower() not in _SUFFIXES:
            raise HTTPException(415, f"{name} is not named like a video ({', '.join(sorted(_SUFFIXES))})")
        size = 0
        with atomic_path(videos.uploads / safe) as partial, partial.open("wb") as file:
            async for chunk in request.stream():
                size += len(chunk)
                if size > _LARGEST:
                    raise HTTPException(413, f"{name} is larger than {_LARGEST // 2**30} GiB")
                await asyncio.to_thread(file.write, chunk)
        return {"id": f"{len(folders)}/{safe}", "name": safe}

    @app.post("/api/ask")
    async def ask(asked: Question) -> StreamingResponse:
        events = _answer(asker, videos.path(asked.video), asked)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.get("/api/frames/{name}/{index}")
    def frame(name: str, index: int) -> Response:
        try:
            cache = FrameCache.open(cache_path(asker.frames, name))
        except ItemError as error:
            raise HTTPException(404, "there is no such video") from error
        if not 0 <= index < len(cache):
            raise HTTPException(404, "there is no such frame")
        return Response(cache.jpeg(index), media_type="image/jpeg", headers={"Cache-Control": "max-age=86400"})

    return app


async def _answer(asker: Asker, video: Path, asked: Question) -> AsyncIterator[str]:
    """The events of one question, as they happen."""
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[str, Any] | None] = asyncio.Queue()

    def say(text: str) -> None:
        loop.call_soon_threadsafe(events.put_nowait, ("status", {"text": text}))

    async def work() -> None:
        try:
            name = await asyncio.to_thread(asker.prepare, video, say)
            cache = FrameCache.open(cache_path(asker.frames, name))
            events.put_nowait(("video", {"cache": name, "times": cache.timestamps.tolist(), "size": cache.size}))
            prediction = await asker.ask(
                name, asked.question, asked.options, lambda step: events.put_nowait((step.kind, step_data(step)))
            )
            events.put_nowait(
                ("answer", answer_data(prediction))
                if prediction.error is None
                else ("error", {"text": prediction.error.message})
            )
        except TimeSearchError as error:
            events.put_nowait(("error", {"text": str(error)}))
        finally:
            events.put_nowait(None)

    task = asyncio.create_task(work())
    try:
        while (event := await events.get()) is not None:
            yield f"event: {event[0]}\ndata: {json.dumps(event[1])}\n\n"
        await task
    finally:
        task.cancel()


def step_data(step: Step) -> dict[str, Any]:
    """A step as the page gets it: words, and frames by index and time (s)."""
    frames = [
        {"frame": block["frame"], "seconds": block["seconds"]} for block in step.blocks if block["type"] == "image"
    ]
    data: dict[str, Any] = {"turn": step.number, "frames": frames}
    if step.kind == "found":
        (exchange,) = exchanges([{"role": "tool", "content": list(step.blocks)}])
        data["words"] = [each.text for each in exchange.evidence if each.text is not None]
        data["said"] = exchange.said
    if step.turn is not None:
        data["thought"] = step.turn.thought or ("" if step.turn.calls else step.text)
        data["calls"] = [{"said": describe_call(call), "arguments": call.arguments} for call in step.turn.calls]
    return data


def answer_data(prediction: Prediction) -> dict[str, Any]:
    """The end of an episode as the page gets it."""
    return prediction.model_dump(
        mode="json", include={"predicted_answer", "reanswer", "searched_seconds", "outcome", "limit", "turns", "usage"}
    )
