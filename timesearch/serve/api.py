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
import base64
import contextlib
import io
import json
import logging
import re
import socket
import traceback
from collections.abc import AsyncIterator, Sequence
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from timesearch.base.errors import ItemError, RequestError, TimeSearchError
from timesearch.base.untrusted import UntrustedError, mend_text, parse_json
from timesearch.data.messages import Block, describe_call, exchanges, heard_seconds
from timesearch.inference.ask import Answer, Asker, check_question
from timesearch.search.episode import Step
from timesearch.search.policy import Policy
from timesearch.serve.guard import EVERY_ADDRESS, Guard, body_of
from timesearch.serve.preparing import Preparations
from timesearch.serve.videos import Videos, file_name, is_named_like_a_video
from timesearch.video.frames import FrameCache, cache_path
from timesearch.video.probe import SUFFIXES

_PAGE = Path(__file__).parent / "page"
_LARGEST = 8 * 2**30
"""Bytes of a dropped video at most."""
_LARGEST_QUESTION = 512 * 2**10
"""Bytes of a question with its options at most: the longest of each, every letter as an escape, are 360 KB."""
_WRITTEN_AT_ONCE = 2**20
_SENTENCE = 500
"""Characters of a refusal at most."""
_JSON = re.compile(r"application/(?:[\w.-]+\+)?json")
_CACHE_NAME = re.compile(r"[0-9a-f]{24}")
_log = logging.getLogger(__name__)


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
    name = socket.gethostname() if host in EVERY_ADDRESS else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


class Question(BaseModel):
    """What is asked about which video."""

    video: str
    question: str
    options: list[str] = Field(default_factory=list, max_length=1000)


def make_app(asker: Asker, policy: Policy, folders: Sequence[Path], uploads: Path, host: str = "127.0.0.1") -> FastAPI:
    """The application.

    Three kinds of work never wait for one another: small work on files goes to Starlette's threads, the steps of
    episodes to asyncio's, and the preparation of videos to `Preparations`.

    Args:
        asker: prepares videos and answers.
        policy: connected already; closed when the application ends.
        folders: the only folders that videos are read from.
        uploads: folder for dropped videos.
        host: the address it is bound to; requests must name it or this machine.
    """
    videos = Videos(folders, uploads)
    preparations = Preparations(asker)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        preparations.close()
        await policy.close()

    app = FastAPI(
        title="timesearch",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={StarletteHTTPException: _refuse, RequestValidationError: _refuse_parameter},
    )
    app.add_middleware(Guard, host=host)

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
        try:
            safe = file_name(name)
        except RequestError as error:
            raise HTTPException(422, str(error)) from error
        if not is_named_like_a_video(safe):
            raise HTTPException(415, f"{safe} is not named like a video ({', '.join(sorted(SUFFIXES))})")
        try:
            partial = await run_in_threadpool(videos.new_partial)
            try:
                if not await _receive(body_of(request, safe, _LARGEST), partial):
                    raise HTTPException(422, f"{safe} is empty (0 bytes)")
                return await run_in_threadpool(videos.keep, partial, safe)
            finally:
                await run_in_threadpool(partial.unlink, missing_ok=True)
        except OSError as error:
            raise HTTPException(507, f"{safe} cannot be kept ({error.strerror}): make room in {uploads}") from error

    @app.post("/api/ask")
    async def ask(request: Request) -> StreamingResponse:
        if not _JSON.fullmatch(request.headers.get("content-type", "").partition(";")[0].strip().lower()):
            raise HTTPException(415, "the question must be sent as application/json")
        body = b"".join([piece async for piece in body_of(request, "the question", _LARGEST_QUESTION)])
        try:
            asked = await run_in_threadpool(_read_question, body)
            video = await run_in_threadpool(videos.path, asked.video)
        except RequestError as error:
            raise HTTPException(422, str(error)) from error
        except ItemError as error:
            raise HTTPException(404, str(error)) from error
        events = _answer(asker, preparations, video, asked)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.get("/api/frames/{name}/{index}")
    def frame(name: str, index: int) -> Response:
        if not _CACHE_NAME.fullmatch(name):
            raise HTTPException(404, "there is no such video")
        try:
            cache = _open(asker, name)
            if not 0 <= index < len(cache):
                raise HTTPException(404, "there is no such frame")
            picture = cache.jpeg(index)
        except (OSError, ItemError) as error:
            raise HTTPException(404, "there is no such video") from error
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "max-age=86400"})

    return app


_SENTENCES = {404: "there is nothing at this address", 405: "this address does not take such a request"}


async def _refuse(_: Request, error: Exception) -> Response:
    """What is wrong with a request, as a sentence under ``detail``."""
    assert isinstance(error, StarletteHTTPException)
    default = error.detail == HTTPStatus(error.status_code).phrase
    said = _SENTENCES.get(error.status_code, error.detail) if default else error.detail
    return JSONResponse({"detail": mend_text(said)[:_SENTENCE]}, error.status_code, headers=error.headers)


async def _refuse_parameter(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": _describe(error.errors())}, 422)


def _describe(errors: Sequence[Any]) -> str:
    """The first of pydantic's errors, without what was sent."""
    where = ".".join(str(part) for part in errors[0]["loc"])[:_SENTENCE]
    return f"{where or 'the question'} cannot be read: {errors[0]['msg']}"


def _read_question(body: bytes) -> Question:
    """The question in a request's body.

    Raises:
        RequestError: it is no JSON, not of that form, or no question.
    """
    try:
        asked = Question.model_validate(parse_json(body))
    except UntrustedError as error:
        raise RequestError(f"the question is no JSON that can be read ({error})") from error
    except ValidationError as error:
        raise RequestError(
            _describe(error.errors(include_url=False, include_context=False, include_input=False))
        ) from None
    check_question(asked.question, asked.options)
    return asked


async def _receive(pieces: AsyncIterator[bytes], target: Path) -> int:
    """Write a body to a file, a MiB at a time, off the event loop; gives its size in bytes."""
    size = 0
    with target.open("wb") as file:
        held = bytearray()
        async for piece in pieces:
            held += piece
            size += len(piece)
            if len(held) >= _WRITTEN_AT_ONCE:
                await run_in_threadpool(file.write, held)
                held = bytearray()
        await run_in_threadpool(file.write, held)
    return size


def _open(asker: Asker, name: str) -> FrameCache:
    """A frame cache; those that were used last stay open."""
    path = cache_path(asker.frames, name)
    return _open_state(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _open_state(path: Path, modified_ns: int) -> FrameCache:
    return FrameCache.open(path)


async def _answer(asker: Asker, preparations: Preparations, video: Path, asked: Question) -> AsyncIterator[str]:
    """The events of one question, as they happen; when the client leaves, the work for it ends."""
    events: asyncio.Queue[tuple[str, Any] | None] = asyncio.Queue()

    def tell(kind: str, data: Any) -> None:
        events.put_nowait((kind, data))

    async def work() -> None:
        try:
            name = await preparations.prepared(video, lambda text: tell("status", {"text": text}))
            cache = await run_in_threadpool(_open, asker, name)
            tell("video", {"cache": name, "times": cache.timestamps.tolist(), "size": cache.size})
            answer = await asker.ask(
                name,
                asked.question,
                asked.options,
                lambda step: tell(step.kind, step_data(step)),
                shown_as=mend_text(video.name),
            )
            if answer.prediction.error is None:
                tell("answer", answer_data(answer))
            else:
                tell("error", {"text": answer.prediction.error.message})
        except TimeSearchError as error:
            tell("error", {"text": str(error)})
        except Exception as error:  # one question that goes wrong must not be any other's trouble
            place = traceback.extract_tb(error.__traceback__)[-1]
            _log.error("a question failed: %s: %.300s (%s, line %s)", type(error).__name__, error, *place[:2])
            tell(
                "error",
                {"text": f"this question could not be answered ({type(error).__name__}): ask it in another way"},
            )
        finally:
            events.put_nowait(None)

    task = asyncio.create_task(work())
    try:
        while (event := await events.get()) is not None:
            yield f"event: {event[0]}\ndata: {mend_text(json.dumps(event[1], ensure_ascii=False))}\n\n"
    finally:
        task.cancel()


def _picture(block: Block) -> str | None:
    """A picture of the source as a data URL, for no address gives it; None for a frame of the cache, which has one."""
    if "frame" in block:
        return None
    data = block.get("jpeg")
    if data is None:
        buffer = io.BytesIO()
        block["image"].save(buffer, "JPEG", quality=85)
        data = buffer.getvalue()
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def step_data(step: Step) -> dict[str, Any]:
    """A step as the page gets it: words, and frames by index and time (s)."""
    frames = [
        {"frame": block.get("frame"), "seconds": block["seconds"], "picture": _picture(block)}
        for block in step.blocks
        if block["type"] == "image"
    ]
    data: dict[str, Any] = {"turn": step.number, "frames": frames}
    if step.kind == "found":
        (exchange,) = exchanges([{"role": "tool", "content": list(step.blocks)}])
        words = [each for each in exchange.evidence if each.text is not None]
        data["words"] = [each.text for each in words]
        data["said_at"] = [each.seconds for each in words]
        data["said"] = exchange.said
    if step.turn is not None:
        data["thought"] = step.turn.thought or ("" if step.turn.calls else step.text)
        data["calls"] = [{"said": describe_call(call), "arguments": call.arguments} for call in step.turn.calls]
    return data


def answer_data(answer: Answer) -> dict[str, Any]:
    """The end of an episode as the page gets it; `evidence` is what the answer rests on."""
    told = {"predicted_answer", "reanswer", "searched_seconds", "outcome", "limit", "turns", "usage"}
    evidence = {**answer.statement.model_dump(mode="json"), "sentences": answer.statement.sentences()}
    heard = heard_seconds(answer.prediction.prediction)
    return {**answer.prediction.model_dump(mode="json", include=told), "heard_seconds": heard, "evidence": evidence}
