"""The HTTP API behind the page.

- ``GET /api/videos`` lists `[{"id", "name", "seconds", "prepared"}]`: the videos of the folders that were given, those
  that were dropped, and those of the library.
- ``PUT /api/videos/NAME`` takes the body as a dropped video and answers with its `id` and `name`.
- ``POST /api/ask`` with `{"video", "question", "options"}` answers with server-sent events: `status`, `video`, the
  episode's steps (`preview`, `turn`, `found`, `reanswer`), and at the end `answer` or `error`. `"video": "all"` asks
  all videos that can be searched; the event `video` then comes for each one that is asked.
- ``GET /api/frames/CACHE/INDEX`` is a frame as JPEG; the event `video` names the cache.
- ``/v1``: the agent by OpenAI's API (`timesearch.serve.chat`).
- What the page plays, shows and finds is in `timesearch.serve.media`.

It serves this machine's user: requests must name this machine (so no foreign page reaches it by a name of its own),
files are read in the given folders only, and everything is data for the page, which shows text as text. Where a key is
set, all of it asks for that (`timesearch.serve.keys`); without one, and bound to other addresses than this machine's
own loopback, it serves whoever reaches them.
"""

from __future__ import annotations

import base64
import contextlib
import io
import re
import socket
from collections.abc import AsyncIterator, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from timesearch.base.errors import ItemError, RequestError, TimeSearchError
from timesearch.base.untrusted import UntrustedError, parse_json
from timesearch.data.messages import Block, describe_call, exchanges, heard_seconds
from timesearch.inference.ask import Answer, Asker, check_question
from timesearch.inference.statement import Statement
from timesearch.library.answer import ask_library
from timesearch.library.catalogue import Entry
from timesearch.library.library import Library
from timesearch.library.loose import LooseEntry
from timesearch.search.episode import Step, Watch
from timesearch.search.policy import Policy
from timesearch.serve.chat import add_chat
from timesearch.serve.events import Tell, event, streamed
from timesearch.serve.guard import EVERY_ADDRESS, Guard, body_of, content_type
from timesearch.serve.keys import Keyed
from timesearch.serve.media import add_media
from timesearch.serve.preparing import Preparations
from timesearch.serve.refusals import described, refusal, unforeseen
from timesearch.serve.shelf import ALL, Held, Shelf, open_frames
from timesearch.serve.videos import Videos, file_name, is_named_like_a_video
from timesearch.video.frames import FrameCache, cache_path
from timesearch.video.probe import SUFFIXES

_PAGE = Path(__file__).parent / "page"
_PARTS = frozenset(path.name for path in _PAGE.glob("*.[cj]s*"))
_FRESH = {"Cache-Control": "no-cache"}
_LARGEST = 8 * 2**30
"""Bytes of a dropped video at most."""
_LARGEST_QUESTION = 512 * 2**10
"""Bytes of a question with its options at most: the longest of each, every letter as an escape, are 360 KB."""
_WRITTEN_AT_ONCE = 2**20
_JSON = re.compile(r"application/(?:[\w.-]+\+)?json")
_CACHE_NAME = re.compile(r"[0-9a-f]{24}")


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


def make_app(
    asker: Asker,
    policy: Policy,
    folders: Sequence[Path],
    uploads: Path,
    host: str = "127.0.0.1",
    key: str | None = None,
    *,
    library: Library | None = None,
) -> FastAPI:
    """The application.

    Three kinds of work never wait for one another: small work on files goes to Starlette's threads, the steps of
    episodes to asyncio's, and the preparation of videos to `Preparations`.

    Args:
        asker: prepares videos and answers.
        policy: connected already; closed when the application ends.
        folders: the only folders that videos are read from.
        uploads: folder for dropped videos.
        host: the address it is bound to; requests must name it or this machine.
        key: that requests must bear; None lets all in.
        library: its videos are offered, too; made by the asker's encoder.
    """
    videos = Videos(folders, uploads)
    shelf = Shelf(videos, asker, library)
    preparations = Preparations(asker)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(shelf.attached.clear)
        yield
        preparations.close()
        end_media()
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
    if key is not None:
        app.add_middleware(Keyed, key=key)
    app.add_middleware(Guard, host=host)
    add_chat(app, preparations, shelf)
    end_media = add_media(app, shelf, uploads.parent / "playable")

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html", headers=_FRESH)

    @app.get("/page/{name}")
    def part(name: str) -> FileResponse:
        if name not in _PARTS:
            raise HTTPException(404)
        return FileResponse(_PAGE / name, headers=_FRESH)

    @app.get("/api/videos")
    def list_videos() -> list[dict[str, Any]]:
        return shelf.all()

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
        if not _JSON.fullmatch(content_type(request)):
            raise HTTPException(415, "the question must be sent as application/json")
        body = b"".join([piece async for piece in body_of(request, "the question", _LARGEST_QUESTION)])
        try:
            asked = await run_in_threadpool(_read_question, body)
            video = None if asked.video == ALL else await run_in_threadpool(shelf.held, asked.video)
        except RequestError as error:
            raise HTTPException(422, str(error)) from error
        except ItemError as error:
            raise HTTPException(404, str(error)) from error
        return streamed(partial(_answer, shelf, preparations, video, asked))

    @app.get("/api/frames/{name}/{index}")
    def frame(name: str, index: int) -> Response:
        if not _CACHE_NAME.fullmatch(name):
            raise HTTPException(404, "there is no such video")
        try:
            cache = _open(shelf, name)
            if not 0 <= index < len(cache):
                raise HTTPException(404, "there is no such frame")
            picture = cache.jpeg(index)
        except (OSError, ItemError) as error:
            raise HTTPException(404, "there is no such video") from error
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "max-age=86400"})

    return app


_SENTENCES = {404: "there is nothing at this address", 405: "this address does not take such a request"}


async def _refuse(request: Request, error: Exception) -> Response:
    """What is wrong with a request, in a sentence."""
    assert isinstance(error, StarletteHTTPException)
    default = error.detail == HTTPStatus(error.status_code).phrase
    said = _SENTENCES.get(error.status_code, error.detail) if default else error.detail
    return refusal(request.url.path, error.status_code, said, error.headers)


async def _refuse_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return refusal(request.url.path, 422, described(error.errors()))


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
            described(error.errors(include_url=False, include_context=False, include_input=False))
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


def _open(shelf: Shelf, name: str) -> FrameCache:
    """A frame cache of a video of the folders, or else of the library."""
    try:
        return open_frames(cache_path(shelf.asker.frames, name))
    except FileNotFoundError:
        return open_frames(cache_path(shelf.librarian.frames, name))


async def _answer(shelf: Shelf, preparations: Preparations, video: Held | None, asked: Question, say: Tell) -> None:
    """Answer one question, and tell the events of it as they happen."""
    using = contextlib.ExitStack()

    def tell(kind: str, data: Any) -> None:
        say(event(data, kind))

    def watch(step: Step) -> None:
        tell(step.kind, step_data(step))

    async def ask_all() -> Answer | None:
        tell("status", {"text": "looking for the videos that may answer"})
        searched, identity = await run_in_threadpool(shelf.searched)

        def begin(entry: Entry) -> Watch:
            if isinstance(entry, LooseEntry):
                using.enter_context(shelf.attached.use(shelf.held(identity(entry)).path))
            cache = open_frames(cache_path(shelf.librarian.frames, entry.key))
            tell("video", _opened(identity(entry), entry.name, entry.key, cache))
            return watch

        given = await ask_library(
            searched, shelf.librarian, shelf.librarian.encoder, asked.question, asked.options, begin=begin
        )
        if given.answer is None:
            tell("answer", {"predicted_answer": None, "evidence": _evidence(given.statement)})
        return given.answer

    try:
        with using:
            if video is None:
                answer = await ask_all()
                if answer is None:
                    return
            else:
                using.enter_context(await run_in_threadpool(shelf.attached.use, video.path))
                name = video.cache
                if not video.of_library:
                    name = await preparations.prepared(video.path, lambda text: tell("status", {"text": text}))
                cache = await run_in_threadpool(open_frames, cache_path(video.asker.frames, name))
                tell("video", _opened(video.identity, video.name, name, cache))
                answer = await video.asker.ask(name, asked.question, asked.options, watch, shown_as=video.name)
            if answer.prediction.error is None:
                tell("answer", answer_data(answer))
            else:
                tell("error", {"text": answer.prediction.error.message})
    except TimeSearchError as error:
        tell("error", {"text": str(error)})
    except Exception as error:
        tell("error", {"text": unforeseen(error)})


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
    evidence = _evidence(answer.statement)
    heard = heard_seconds(answer.prediction.prediction)
    return {**answer.prediction.model_dump(mode="json", include=told), "heard_seconds": heard, "evidence": evidence}


def _evidence(statement: Statement) -> dict[str, Any]:
    return {**statement.model_dump(mode="json"), "sentences": statement.sentences()}


def _opened(identity: str, name: str, key: str, cache: FrameCache) -> dict[str, Any]:
    """A video whose search begins, as the page gets it."""
    return {
        "id": identity,
        "name": name,
        "cache": key,
        "times": cache.timestamps.tolist(),
        "seconds": cache.end,
        "size": cache.size,
    }
