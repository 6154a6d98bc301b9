"""The agent by OpenAI's API: ``/v1/models`` and ``/v1/chat/completions``, for whatever speaks to such servers.

The last message of the user is the question. The video is the one that the request's field `video` names, that a
message holds (``{"type": "video_url", "video_url": {"url": ...}}``: a data URL, or the id or name of a listed video) or
whose name stands in a message, the newest first; else the only one there is, attached ones aside. Videos of a library
are listed where one is offered, and none is needed. The answer's text goes on with what it rests on, times included,
and the field `evidence` beside `choices` holds that as data. What the search does meanwhile streams as
`reasoning_content`.

Each question is a search of its own: earlier messages tell which video is meant, and nothing else. What asks for
another kind of answer (`tools`, `n`) is refused; what tunes the writing (`temperature`, `max_tokens`) is the policy's
own matter, and passed over.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import mimetypes
import re
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from timesearch.base.errors import ItemError, RequestError, TemporaryError, TimeSearchError
from timesearch.base.untrusted import UntrustedError, mend_text, parse_json
from timesearch.data.messages import describe_call, exchanges, format_seconds, times_of
from timesearch.data.samples import LETTERS
from timesearch.inference.ask import Answer, check_question
from timesearch.search.episode import Step
from timesearch.search.policy import EngineError
from timesearch.serve.attached import attached_name
from timesearch.serve.events import Tell, event, streamed
from timesearch.serve.guard import body_of
from timesearch.serve.preparing import Preparations
from timesearch.serve.refusals import described, openai_error, refusal, unforeseen
from timesearch.serve.shelf import Held, Shelf
from timesearch.serve.videos import is_named_like_a_video
from timesearch.video.probe import probe

MODEL = "timesearch"
"""The one model that is listed: the policy with its search."""
_LARGEST = 48 * 2**20
"""Bytes of a request at most: a video of 36 MB as a data URL. Larger ones are put to ``/api/videos`` first."""
_PAUSE = 15.0
"""Seconds without news after which a stream says that it goes on: proxies end one that is silent for a minute."""
_NAMED = 20
"""Videos that a refusal lists at most."""
_DATA_URL = re.compile(r"data:([\w.+-]{1,50}/[\w.+-]{1,50})(?:;[\w.+-]{1,50}=[\w.+-]{1,50}){0,4};base64,")
_UNANSWERED = {
    "turns": "No answer: the turns were used up.",
    "context": "No answer: the context was full.",
    None: "No answer.",
}


class _Url(BaseModel):
    url: str


class _Part(BaseModel):
    type: str
    text: str = ""
    video_url: _Url | None = None


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[_Part] | None = None

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content.strip()
        return "\n".join(part.text for part in self.content or () if part.type == "text").strip()

    def videos(self) -> list[str]:
        """Addresses of the videos that it holds.

        Raises:
            RequestError: it holds something that is neither text nor a video.
        """
        found = []
        for part in self.content if isinstance(self.content, list) else ():
            if part.type == "video_url" and part.video_url is not None:
                found.append(part.video_url.url)
            elif part.type != "text":
                raise RequestError(f"a part of type {part.type[:40]!r} is not taken: send text and one video_url")
        return found


class _Streaming(BaseModel):
    include_usage: bool | None = None


class _Format(BaseModel):
    type: str = "text"


class Completion(BaseModel):
    """A request for an answer: what is read of OpenAI's, and two fields of our own."""

    model: str
    messages: list[_Message] = Field(min_length=1, max_length=1000)
    stream: bool | None = None
    stream_options: _Streaming | None = None
    video: str | None = Field(None, description="id or name of a listed video; ours")
    options: list[str] = Field(default_factory=list, max_length=1000, description="choices, without letters; ours")
    n: int | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    logprobs: bool | None = None
    response_format: _Format | None = None

    def check(self) -> None:
        """Refuse what would have to be answered in a way that is not ours.

        Raises:
            RequestError: naming the field.
        """
        for field, asked, why in (
            ("n", self.n not in (None, 1), "there is one answer to a question"),
            ("tools", bool(self.tools), "it searches by its own tools"),
            ("functions", bool(self.functions), "it searches by its own tools"),
            ("logprobs", bool(self.logprobs), "they are not known"),
            ("response_format", (self.response_format or _Format()).type != "text", "it answers in text"),
        ):
            if asked:
                raise RequestError(f"{field} is not taken: {why}")


@dataclass(frozen=True)
class _Asked:
    """A request that can be answered; until `using` is closed, its video is not cleared away."""

    video: Held
    question: str
    options: list[str]
    using: AbstractContextManager[object]


def add_chat(app: FastAPI, preparations: Preparations, shelf: Shelf) -> None:
    """Add the routes to an application.

    Args:
        app: whose refusals `timesearch.serve.refusals.refusal` words.
        preparations: prepares videos, for all who ask.
        shelf: the videos that may be asked about; attached ones become part of them.
    """
    listed = {"id": MODEL, "object": "model", "created": int(time.time()), "owned_by": "timesearch"}

    @app.get("/v1/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [listed]}

    @app.get("/v1/models/{model:path}")
    def get_model(model: str, request: Request) -> Response:
        return JSONResponse(listed) if model == MODEL else _no_model(request, model)

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        body = b"".join([piece async for piece in body_of(request, "the request", _LARGEST)])
        try:
            wanted = await run_in_threadpool(_read, body)
            if wanted.model != MODEL:
                return _no_model(request, wanted.model)
            asked = await run_in_threadpool(_choose, wanted, shelf)
        except OSError as error:
            raise HTTPException(507, f"the video cannot be kept ({error.strerror}): make room") from error
        except ItemError as error:
            raise HTTPException(404 if error.reason == "missing_file" else 400, str(error)) from error
        except RequestError as error:
            raise HTTPException(400, str(error)) from error
        work = _Work(preparations, asked)
        if wanted.stream:
            usage = bool(wanted.stream_options and wanted.stream_options.include_usage)
            return streamed(partial(work.stream, usage), _PAUSE)
        return await work.whole(request)


def _no_model(request: Request, model: str) -> Response:
    said = f"there is no model {model[:80]!r} here: ask for {MODEL!r}"
    return refusal(request.url.path, 404, said, code="model_not_found")


def _read(body: bytes) -> Completion:
    """The request in a body.

    Raises:
        RequestError: it is no JSON, not of that form, or asks for what is not done.
    """
    try:
        wanted = Completion.model_validate(parse_json(body))
    except UntrustedError as error:
        raise RequestError(f"the request is no JSON that can be read ({error})") from error
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestError(described(errors, "the request")) from None
    wanted.check()
    return wanted


def _choose(wanted: Completion, shelf: Shelf) -> _Asked:
    """The question and its video.

    Raises:
        RequestError: there is no question, or no video is named, or several are.
        ItemError: the video is not there, or what is attached is none.
    """
    said = [message for message in wanted.messages if message.role == "user"]
    if not said:
        raise RequestError("there is no message of the user: ask something about a video")
    question = said[-1].text()
    held = [message.videos() for message in said]
    names = _Names(shelf)
    with ExitStack() as using:
        if wanted.video is not None:
            identity = names.identity(wanted.video)
        elif (attached := next((each for each in reversed(held) if each), None)) is not None:
            if len(attached) > 1:
                raise RequestError(f"{len(attached)} videos are attached to a message: ask about one at a time")
            url = attached[0]
            if url[:5].lower() == "data:":
                identity, kept = _keep(url, shelf)
                using.enter_context(kept)
            else:
                identity = names.identity(url)
        else:
            identity, question = names.spoken_of([message.text() for message in said], question)
        check_question(question, wanted.options)
        video = names.held(identity)
        using.enter_context(shelf.attached.use(video.path))
        return _Asked(video, question, wanted.options, using.pop_all())


class _Names:
    """What the videos are called: their names, and the names of their files where no video's name is the same."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf, self._listed = shelf, shelf.names()
        names: dict[str, list[str]] = {}
        files: dict[str, list[str]] = {}
        for name, identity in self._listed:
            names.setdefault(name, []).append(identity)
            files.setdefault(PurePosixPath(name).name, []).append(identity)
        self._called = files | names

    def identity(self, said: str) -> str:
        """The identity of the video that bears a name; `said` itself where none does, for it may be one.

        Raises:
            RequestError: it is an address, or several videos bear the name.
        """
        if "://" in said:
            raise RequestError("a video is attached as a data URL, or named by its id or name; no address is fetched")
        borne = self._called.get(said, [said])
        if len(borne) > 1:
            raise RequestError(
                f"{len(borne)} videos are called {said[:80]!r}: name one by its id ({', '.join(borne[:_NAMED])})"
            )
        return borne[0]

    def held(self, identity: str) -> Held:
        """The video of an identity.

        Raises:
            ItemError: `missing_file`: there is none, and which there are; or its file is gone.
        """
        try:
            return self._shelf.held(identity)
        except ItemError as error:
            listed = any(identity == each for _, each in self._listed)
            said = str(error) if listed else f"there is no video {identity[:80]!r}: {self._known()}"
            raise ItemError(said, reason="missing_file") from error

    def _known(self) -> str:
        names = [name for name, _ in self._listed]
        more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"there are {', '.join(names[:_NAMED])}{more}" if names else "there is none here yet"

    def spoken_of(self, texts: list[str], question: str) -> tuple[str, str]:
        """The video whose name stands in the newest text that has any, and the question without it before.

        Raises:
            RequestError: no video is named, or several are.
        """
        for text in reversed(texts):
            found = [name for name in self._called if _stands_in(name, text)]
            longest = [name for name in found if not any(name != other and name in other for other in found)]
            if len(longest) > 1:
                raise RequestError(f"several videos are named ({', '.join(longest[:_NAMED])}): ask about one at a time")
            if longest:
                before, _, rest = question.partition(longest[0])
                named_first = not before.strip() and rest.lstrip().startswith(":")
                asked = rest.lstrip().removeprefix(":").strip() if named_first else question
                return self.identity(longest[0]), asked
        standing = (identity for _, identity in self._listed if not self._shelf.is_attached(identity))
        match list(islice(standing, 2)):  # what somebody attached is for who names it
            case [only]:
                return only, question
        raise RequestError(f"which video is meant? Name it in the question, or attach one; {self._known()}")


def _stands_in(name: str, text: str) -> bool:
    place = text.find(name)
    while place >= 0:
        around = text[max(0, place - 1) : place] + text[place + len(name) : place + len(name) + 1]
        if not any(letter.isalnum() or letter in "_-/" for letter in around):
            return True
        place = text.find(name, place + 1)
    return False


def _keep(url: str, shelf: Shelf) -> tuple[str, AbstractContextManager[object]]:
    """Write an attached video among those that were dropped, for some time; the same bytes are kept once.

    Returns:
        As `Attached.keep`.

    Raises:
        RequestError: the URL holds no data that can be read.
        ItemError: they are no video.
        OSError: there is no room.
    """
    head = _DATA_URL.match(url)
    if head is None:
        raise RequestError("the attached data URL is none of a video in base64: data:video/mp4;base64,...")
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"the attached data URL is not base64 ({error})") from error
    suffix = mimetypes.guess_extension(head[1].lower()) or ""
    suffix = suffix if is_named_like_a_video(f"video{suffix}") else ".mp4"
    partial = shelf.videos.new_partial()
    try:
        partial.write_bytes(data)
        try:
            probe(partial)
        except ItemError as error:
            raise ItemError("what is attached is no video that can be read", error.reason) from error
        return shelf.attached.keep(partial, attached_name(hashlib.sha256(data).hexdigest(), suffix))
    finally:
        partial.unlink(missing_ok=True)


class _Failed(Exception):
    """A question that got no answer: status, sentence and reason."""

    def __init__(self, status: int, sentence: str, code: str | None = None) -> None:
        super().__init__(sentence)
        self.status, self.code = status, code


class _Work:
    """One question, and the forms that its answer is given in."""

    def __init__(self, preparations: Preparations, asked: _Asked) -> None:
        self._preparations, self._asked = preparations, asked
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": MODEL}

    async def _answer(self, think: Callable[[str], None]) -> Answer:
        """Prepare the video and ask.

        Raises:
            _Failed: there is no answer to be had.
        """
        asked, video = self._asked, self._asked.video
        try:
            with asked.using:
                name = video.cache
                if not video.of_library:
                    name = await self._preparations.prepared(video.path, lambda text: think(f"{text}\n"))
                answer = await video.asker.ask(
                    name, asked.question, asked.options, lambda step: think(thought(step)), shown_as=video.name
                )
        except TemporaryError as error:
            raise _Failed(503, str(error)) from error
        except ItemError as error:
            raise _Failed(400, str(error), error.reason) from error
        except TimeSearchError as error:
            raise _Failed(500, str(error)) from error
        except Exception as error:
            raise _Failed(500, unforeseen(error)) from error
        failed = answer.prediction.error
        if failed is not None:
            raise _Failed(503 if failed.type == EngineError.reason else 500, failed.message, failed.type)
        return answer

    async def whole(self, request: Request) -> Response:
        """The answer in one piece; a client that leaves ends the work."""
        thoughts: list[str] = []
        work = asyncio.create_task(self._answer(thoughts.append))
        left = asyncio.create_task(_left(request))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=499)  # nobody hears it
            answer = work.result()
        except _Failed as error:
            return refusal(request.url.path, error.status, str(error), code=error.code)
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)
        message = {"role": "assistant", "content": text_of(answer), "reasoning_content": "".join(thoughts)}
        choice = {"index": 0, "message": message, "finish_reason": _finish(answer), "logprobs": None}
        body = {
            **self._common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(answer),
            "evidence": evidence_of(answer),
        }
        return JSONResponse(json.loads(mend_text(json.dumps(body, ensure_ascii=False))))

    async def stream(self, usage: bool, tell: Tell) -> None:
        """Tell the answer as events, part by part."""

        def say(delta: dict[str, Any], finish: str | None = None, **more: Any) -> None:
            choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
            tell(event({**self._common, "object": "chat.completion.chunk", "choices": [choice], **more}))

        try:
            say({"role": "assistant", "content": ""})
            answer = await self._answer(lambda text: say({"reasoning_content": text}) if text else None)
            say({"content": text_of(answer)})
            say({}, _finish(answer), evidence=evidence_of(answer))
            if usage:
                told = {"object": "chat.completion.chunk", "choices": [], "usage": _usage(answer)}
                tell(event({**self._common, **told}))
        except _Failed as error:
            tell(event({"error": openai_error(error.status, str(error), error.code)}))
        finally:
            tell("data: [DONE]\n\n")


async def _left(request: Request) -> None:
    """Until the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def thought(step: Step) -> str:
    """A step in a line or two, as what the agent thinks."""
    times = ", ".join(map(format_seconds, times_of(step.blocks)))
    if step.kind == "preview":
        return f"preview: {times}\n"
    if step.kind == "turn" and step.turn is not None:
        said = [step.turn.thought or ("" if step.turn.calls else step.text), *map(describe_call, step.turn.calls)]
        return "".join(f"{each}\n" for each in said if each)
    if step.kind == "found":
        (exchange,) = exchanges([{"role": "tool", "content": list(step.blocks)}])
        words = [each.text for each in exchange.evidence if each.text is not None]
        return f"found: {'; '.join([*([times] if times else []), *words]) or exchange.said}\n"
    return ""


def text_of(answer: Answer) -> str:
    """The answer, and in a second paragraph what it rests on, times included."""
    prediction = answer.prediction
    said = prediction.predicted_answer or _UNANSWERED[prediction.limit]
    letter = said.strip().upper()
    if len(letter) == 1 and letter in LETTERS[: len(prediction.options)]:
        said = f"{letter}. {prediction.options[LETTERS.index(letter)]}"
    return f"{said}\n\n{' '.join(answer.statement.sentences())}"


def evidence_of(answer: Answer) -> dict[str, Any]:
    """What the answer rests on, as data (`timesearch.inference.statement.Statement`)."""
    return answer.statement.model_dump(mode="json")


def _finish(answer: Answer) -> str:
    return "length" if answer.prediction.predicted_answer is None and answer.prediction.limit else "stop"


def _usage(answer: Answer) -> dict[str, Any]:
    used = answer.prediction.usage
    read = used.prefilled + used.cached
    return {
        "prompt_tokens": read,
        "completion_tokens": used.generated,
        "total_tokens": read + used.generated,
        "prompt_tokens_details": {"cached_tokens": used.cached},
    }
