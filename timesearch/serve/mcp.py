"""A library as tools for agents, by the Model Context Protocol: over standard input and output, or over HTTP.

The tools only read, and only what is in the library: videos are named as it lists them, and a file is opened by what
the catalogue says of it, below its folder. What takes long is done in threads, a few at a time for all clients, and
ends when the client that waits for it cancels or goes.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Annotated, Any, TypeVar

import numpy as np
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import (
    CallToolResult,
    ContentBlock,
    ImageContent,
    InputRequiredResult,
    TextContent,
    ToolAnnotations,
)
from pydantic import BaseModel, Field, ValidationError

from timesearch.base.errors import RequestError, TimeSearchError
from timesearch.base.stopping import Stop
from timesearch.data.messages import describe_call
from timesearch.inference.ask import Asker
from timesearch.inference.statement import Statement
from timesearch.library.answer import VIDEOS, ask_library
from timesearch.library.catalogue import Entry
from timesearch.library.library import Library, check_query
from timesearch.library.words import Said
from timesearch.retrieval.encoder import Encoder
from timesearch.search.episode import Step
from timesearch.search.policy import Policy
from timesearch.serve.refusals import described
from timesearch.video.exact import read_frames
from timesearch.video.probe import probe

T = TypeVar("T")
Opening = Callable[[], AbstractContextManager[tuple[Asker, Policy]]]
PAGE = 50
"""Videos, moments or lines of one answer at most."""
FRAMES = 8
"""Frames of one answer at most."""
_AT_ONCE = 4
"""Searches, decodings and questions at the same time, each: more would only wait for the same cores and disks."""
_QUALITY = 90
_READ_ONLY = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False)

Where = Annotated[
    str | None, Field(description="only this folder or video: a name as list_videos gives it; null for all videos")
]
Name = Annotated[str, Field(description="name of a video, as list_videos or search gives it")]
Skip = Annotated[int, Field(ge=0, le=10**9, description="`next` of the answer before; 0 for the first")]


class VideoInfo(BaseModel):
    """A video of the library."""

    name: str
    seconds: float = Field(description="its length")
    subtitles: bool = Field(description="whether get_subtitles has its words")
    state: str = Field(description="'as indexed', 'changed' since, or 'gone'")


class Videos(BaseModel):
    """A page of the library's videos."""

    videos: list[VideoInfo]
    total: int
    next: int | None = Field(None, description="`skip` of the next page; null after the last")


class MomentInfo(BaseModel):
    """A stretch of a video whose frames answer a query."""

    video: str
    start: float = Field(description="seconds")
    end: float = Field(description="seconds")
    best: float = Field(description="seconds of the frame that answers best")
    score: float


class SpokenInfo(BaseModel):
    """A stretch of a video in which a query's words are said."""

    video: str
    start: float = Field(description="seconds")
    end: float = Field(description="seconds")
    text: str
    share: float = Field(description="how much of what the query's words tell is said, up to 1")


class Moments(BaseModel):
    """A page of what a query found; `said` tells in words what it means that there is nothing."""

    moments: list[MomentInfo] = Field(description="by what frames show; the best first")
    spoken: list[SpokenInfo] = Field(
        description="by what subtitles say; the best first, and not to be compared with `moments`"
    )
    said: str
    next: int | None = Field(None, description="`skip` of the next page; null after the last")


class FrameInfo(BaseModel):
    """A frame that was sent as an image, in this order."""

    seconds: float
    width: int
    height: int


class Frames(BaseModel):
    """Frames of a video."""

    video: str
    frames: list[FrameInfo]


class LineInfo(BaseModel):
    """Words, and when they are said."""

    start: float
    end: float
    text: str


class Lines(BaseModel):
    """A page of what is said in a video."""

    video: str
    lines: list[LineInfo]
    next: int | None = Field(None, description="`skip` of the next page; null after the last")


class Answered(BaseModel):
    """The answer to a question, and what it rests on."""

    answer: str | None = Field(description="null where no video answers")
    video: str | None = Field(description="the video that answers")
    evidence: Statement
    said: list[str] = Field(description="the evidence in sentences")


class _Answering:
    """Who answers questions: opened at the first one, for a large policy takes its time to load."""

    def __init__(self, open_asker: Opening) -> None:
        self._open, self._held, self._lock = open_asker, ExitStack(), asyncio.Lock()
        self._opened: tuple[Asker, Policy] | None = None

    async def asker(self) -> Asker:
        async with self._lock:
            if self._opened is None:
                asker, policy = await asyncio.to_thread(self._held.enter_context, self._open())
                await policy.connect()
                self._opened = asker, policy
            return self._opened[0]

    async def close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened[1].close()
        self._held.close()


class _Tools:
    """The tools, each of which the server lists under its name."""

    def __init__(self, library: Library, encoder: Encoder, answering: _Answering) -> None:
        self._library, self._encoder, self._answering = library, encoder, answering
        self._scans, self._decodings, self._questions = (asyncio.Semaphore(_AT_ONCE) for _ in range(3))

    async def list_videos(self, where: Where = None, skip: Skip = 0) -> Videos:
        """List the videos of the library, in order of name, a page at a time."""

        def listed() -> Videos:
            library = self._library
            videos = library.videos(where)
            page = [
                VideoInfo(
                    name=video.name,
                    seconds=round(video.end, 1),
                    subtitles=library.words(video) is not None,
                    state=library.state_of(video),
                )
                for video in videos[skip : skip + PAGE]
            ]
            return Videos(videos=page, total=len(videos), next=_next(skip, len(videos)))

        return await _in_thread(listed)

    async def search(
        self,
        query: Annotated[str, Field(description="what the frames should show, in a few words")],
        where: Where = None,
        skip: Skip = 0,
    ) -> Moments:
        """Find the moments whose frames show something, and those in which it is said: which video, from when to when.

        Nothing is found where no frame stands out from what things score that are not there, and nobody says it.
        """
        stop = Stop()

        def searched() -> Moments:
            check_query(query)
            videos = self._library.videos(where)
            found = self._library.find(self._encoder, query, skip + PAGE + 1, videos, stop)
            page, spoken = found.moments[skip : skip + PAGE], found.heard.moments[skip : skip + PAGE]
            said = f"{len(page)} moments" if page else "no further moments" if skip else found.why_nothing()
            return Moments(
                moments=[_moment(each) for each in page],
                spoken=[_spoken(each) for each in spoken],
                said=f"{said}; said in {len(spoken)}" if spoken else said,
                next=_next(skip, max(len(found.moments), len(found.heard.moments))),
            )

        async with self._scans:
            return await _in_thread(searched, stop)

    async def get_frames(
        self,
        video: Name,
        seconds: Annotated[list[float], Field(min_length=1, max_length=FRAMES, description="times, eight at most")],
        context: Context,
        width: Annotated[
            int | None, Field(ge=16, le=8192, description="pixels; null, or more than the source has, for all of them")
        ] = 512,
    ) -> Annotated[CallToolResult, Frames]:
        """Look at frames of a video: each comes as an image, decoded from the source at its full size or smaller."""
        entry = await _in_thread(lambda: self._library.video(video))
        blocks: list[ContentBlock] = []
        shown: list[FrameInfo] = []
        for number, time in enumerate(seconds, start=1):
            async with self._decodings:  # one at a time, so that a client that goes leaves the others to be decoded
                data, size = await _in_thread(partial(self._frame, entry, time, width))
            shown.append(FrameInfo(seconds=time, width=size[0], height=size[1]))
            blocks.append(TextContent(type="text", text=f"{entry.name} at {time:.1f}s"))
            blocks.append(ImageContent(type="image", data=base64.b64encode(data).decode(), mime_type="image/jpeg"))
            await context.report_progress(number, len(seconds))
        frames = Frames(video=entry.name, frames=shown)
        return CallToolResult(content=blocks, structured_content=frames.model_dump(mode="json"))

    def _frame(self, entry: Entry, seconds: float, width: int | None) -> tuple[bytes, tuple[int, int]]:
        """A frame as JPEG, and its width and height."""
        from PIL import Image

        path = self._library.path(entry)
        if not 0 <= seconds <= entry.end + 1:
            raise RequestError(f"{seconds:g} seconds is no time of {entry.name}: it ends at {entry.end:.1f}")
        info = probe(path)
        size = None
        if width is not None and width < info.width:
            size = (width, max(1, round(info.height * width / info.width)))
        (pixels,) = read_frames(path, [seconds], size)
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=_QUALITY)
        return buffer.getvalue(), (pixels.shape[1], pixels.shape[0])

    async def get_subtitles(
        self,
        video: Name,
        start: Annotated[float, Field(ge=0, description="seconds")] = 0.0,
        end: Annotated[float | None, Field(description="seconds; null for the end of the video")] = None,
        skip: Skip = 0,
    ) -> Lines:
        """Read what is said in a video, in order of time, a page at a time; nothing where it has no subtitles."""

        def read() -> Lines:
            entry = self._library.video(video)
            words = self._library.words(entry)
            lines = [] if words is None else words.within(start, 1e12 if end is None else end, PAGE + 1, skip)
            said = [LineInfo(start=line.start, end=line.end, text=line.text) for line in lines[:PAGE]]
            return Lines(video=entry.name, lines=said, next=_next(skip, skip + len(lines)))

        return await _in_thread(read)

    async def ask(
        self,
        question: Annotated[str, Field(description="what to find out")],
        context: Context,
        where: Where = None,
        options: Annotated[list[str] | None, Field(description="choices, where the answer is one of several")] = None,
    ) -> Answered:
        """Have a question answered by a search: first which video, then when; with what the answer rests on.

        The evidence says which frames support the answer, whether the answer from these alone is the same, how much of
        the video was looked at, and what was searched for in vain.
        """
        telling: set[asyncio.Task[None]] = set()
        steps = 0

        def tell(step: Step) -> None:
            nonlocal steps
            steps += 1
            calls = step.turn.calls if step.turn is not None else []
            message = "; ".join(map(describe_call, calls)) or step.kind
            telling.add(asyncio.ensure_future(context.report_progress(steps, None, message)))

        with _told():
            async with self._questions:
                videos = await asyncio.to_thread(self._library.videos, where)
                asker = await self._answering.asker()
                given = await ask_library(
                    self._library, asker, self._encoder, question, options or [], videos, lambda _: tell
                )
        await asyncio.gather(*telling, return_exceptions=True)
        answer = given.answer.prediction.predicted_answer if given.answer is not None else None
        video = given.video.name if given.video is not None else None
        return Answered(answer=answer, video=video, evidence=given.statement, said=given.statement.sentences())


def _moment(moment: Any) -> MomentInfo:
    return MomentInfo(
        video=moment.video.name,
        start=moment.start,
        end=moment.end,
        best=moment.seconds,
        score=round(moment.score, 4),
    )


def _spoken(moment: Said) -> SpokenInfo:
    return SpokenInfo(
        video=moment.video.name,
        start=moment.start,
        end=moment.end,
        text=moment.text,
        share=round(moment.share, 4),
    )


def _next(skip: int, total: int) -> int | None:
    return skip + PAGE if total > skip + PAGE else None


@contextmanager
def _told() -> Iterator[None]:
    """An expected error is told to the agent, as a sentence."""
    try:
        yield
    except TimeSearchError as error:
        raise ToolError(str(error)) from error


async def _in_thread(work: Callable[[], T], stop: Stop | None = None) -> T:
    """Do `work` in a thread; where nobody waits for it any more, ask it to stop."""
    with _told():
        try:
            return await asyncio.to_thread(work)
        except asyncio.CancelledError:
            if stop is not None:
                stop.ask()
            raise


class _Server(MCPServer):
    """Refuses arguments that a tool does not have, which the SDK passes over: a video that an agent named by another
    word than `where` would be any video.
    """

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context | None = None
    ) -> CallToolResult | InputRequiredResult:
        for tool in await self.list_tools():
            known = tool.input_schema.get("properties", {})
            wrong = [argument for argument in arguments if argument not in known]
            if tool.name == name and wrong:
                raise ToolError(
                    f"Error executing tool {name}: it has no argument {', '.join(map(repr, wrong))[:200]}; "
                    f"it takes {', '.join(known)}"
                )
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            if not isinstance(error.__cause__, ValidationError):
                raise
            told = described(error.__cause__.errors(), "the call")
            raise ToolError(f"Error executing tool {name}: {told}") from error


def make_server(library: Library, encoder: Encoder, open_asker: Opening) -> MCPServer:
    """The server.

    Args:
        library: what its tools read.
        encoder: that of the library.
        open_asker: opens who answers questions, at the first one.
    """
    answering = _Answering(open_asker)

    @asynccontextmanager
    async def life(_: MCPServer) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await answering.close()

    server = _Server(
        "timesearch",
        title="timesearch: a library of videos",
        instructions=(
            "Search a library of videos. `search` finds moments by what they show, and others by what is said; look at "
            f"them by `get_frames` before you rely on them. `ask` searches up to {VIDEOS} videos for an answer, and "
            "says what it rests on: do not repeat an answer whose evidence does not agree as if it were certain."
        ),
        log_level="WARNING",
        lifespan=life,
    )
    tools = _Tools(library, encoder, answering)
    for tool in (tools.list_videos, tools.search, tools.get_frames, tools.get_subtitles, tools.ask):
        server.add_tool(tool, annotations=_READ_ONLY)
    return server
