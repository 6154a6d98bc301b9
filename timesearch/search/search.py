"""A search: the question, the opened videos, what may still be spent, and what was seen (paper, Section 3.1).

`Search.call` carries out what a policy asks for. It counts calls, answers wrong ones by what to correct, and says when
the budget is spent; a tool (`timesearch.search.tools`) only returns what it found. Training, inference, baselines and
the writers of traces all use this one object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timesearch.base.errors import ItemError
from timesearch.data.messages import Block, Box, Evidence, Message, format_exact, format_seconds, neutralise
from timesearch.dialects import named
from timesearch.dialects.qwen import schema_line
from timesearch.search.budget import filled_size, preview_plan, searched_size
from timesearch.search.pool import Pool
from timesearch.search.protocol import SearchProtocol
from timesearch.search.tools import (
    Tool,
    WrongCallError,
    bind,
    offered,
    schema_of,
    seek_video_frames,
    signature_of,
)
from timesearch.search.videos import Video, open_video
from timesearch.settings import SearchSettings
from timesearch.video.glimpses import WHOLE, Glimpse

if TYPE_CHECKING:
    from timesearch.retrieval.encoder import Encoder
    from timesearch.video.frames import Look


_ANYTHING: dict[str, Any] = {"query": "any", "start_time": 0.0, "end_time": 3600.0, "num_frames": 1}
"""The call that the released agent's training makes for an episode that found nothing."""


class Search:
    """One question at a time, and the tools that look for its answer.

    An image block is ``{"type": "image", "image": PIL, "frame": index in the frame cache, "seconds": time}``. The time
    is that of the look: of a picture that is held, it may lie after that from which it is shown.

    Args:
        settings: budgets, prompts, tools and the selection method.
        encoder: embeds queries in the space of the feature caches.
        frames: folder of frame caches.
        features: folder of feature caches.
        subtitles: folder of subtitle indexes; None does without.
        source_of: the file of a video by its name, for tools that look at it; None where none is known.
        encoded: image blocks carry the JPEG bytes of the frame cache under ``jpeg`` in place of a decoded ``image``:
            for engines behind HTTP, which decode for themselves.

    Attributes:
        question: the question with its options, free of control tokens.
        videos: the opened videos by name, in the order in which the row names them.
        evidence: all that tools found, in order of the calls.
        calls: tool calls so far.
        room: frames that still fit into the policy's context; None where that is not known.

    Raises:
        RequestError: an unknown prompt set, tool or dialect.
    """

    def __init__(
        self,
        settings: SearchSettings,
        encoder: Encoder,
        frames: Path | str,
        features: Path | str,
        encoded: bool = False,
        subtitles: Path | str | None = None,
        source_of: Callable[[str], Path | None] = lambda name: None,
    ) -> None:
        self.settings = settings
        self.encoder = encoder
        self.protocol = SearchProtocol.load(settings.prompts)
        self.dialect = named(self.protocol.rules.dialect or settings.dialect)
        self.tools = {tool.__name__: tool for tool in offered(settings.tools)}
        self._bound = {name: bound for name, bound in bind(self.protocol.tools).items() if bound.tool in self.tools}
        self._frames, self._features, self._encoded = Path(frames), Path(features), encoded
        self._subtitles = Path(subtitles) if subtitles is not None else None
        self._source_of = source_of
        self._forget()

    def _forget(self) -> None:
        self.videos: dict[str, Video] = {}
        self.question = ""
        self.kind = ""
        self._duration: float | None = None
        self.evidence: list[Evidence] = []
        self._corrections: list[tuple[int, Block]] = []
        self.calls = 0
        self.room: int | None = None

    def open(self, row: dict[str, Any]) -> None:
        """Open the video of a sample, and forget the search before.

        Args:
            row: a sample's fields; `video`, `question` and `options` are used.

        Raises:
            ItemError: `unsafe_path`, `missing_cache` or `damaged_cache`.
            CacheMismatchError: the features belong to other frames, or were made by another encoder.
        """
        self._forget()
        name = row["video"]
        self.videos[name] = open_video(
            name,
            self._frames,
            self._features,
            self.encoder,
            self._encoded,
            self._subtitles,
            self._source_of(name),
        )
        self.pool = Pool.of(self.video.frames, self.protocol.rules)
        self.question = neutralise(self.protocol.question(row["question"], row.get("options") or []))
        self.kind, self._duration = str(row.get("type") or ""), row.get("duration")

    @property
    def video(self) -> Video:
        """The opened video; the first of several."""
        assert self.videos, "open comes before a search"
        return next(iter(self.videos.values()))

    @property
    def words(self) -> str:
        """Digest of what is said in the opened video as far as it can be searched; empty where nothing can."""
        subtitles = self.video.subtitles if self.videos and "search_subtitles" in self.tools else None
        return subtitles.made_of if subtitles is not None else ""

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """JSON schemas of the tools: as TRL renders them in training, or as the protocol describes them."""
        described = {bound.tool: bound.schema for bound in self._bound.values()}
        return [described.get(name) or schema_of(tool) for name, tool in self.tools.items()]

    @property
    def descriptions(self) -> list[str]:
        """`schemas` as lines of text; those of the protocol byte for byte."""
        lines = {bound.tool: bound.line for bound in self._bound.values()}
        return [lines.get(name) or schema_line(schema_of(tool)) for name, tool in self.tools.items()]

    @property
    def most_calls(self) -> int:
        """Calls that are carried out at most."""
        return self.settings.max_turns - (self.protocol.rules.last_turn == "answers")

    @property
    def spent(self) -> bool:
        """Whether no further call will be carried out: the next turn has to answer."""
        return self.calls >= self.most_calls

    @property
    def frames_left(self) -> int:
        """Frames that one call may return at most."""
        most = self.settings.max_frames_per_turn
        return most if self.room is None else min(most, self.room)

    def preview(self, most: int | None = None) -> list[Block]:
        """Content of the user message: a time and an image for each preview frame, then the question.

        Args:
            most: frames at most; None leaves it to the settings.
        """
        frames, rules = self.video.frames, self.protocol.rules
        settings = self.settings if most is None else self.settings.model_copy(update={"max_frames": most})
        indices, size = preview_plan(len(frames), frames.size, settings, rules)
        looks = frames.evenly(len(indices))
        if rules.spread == "ends":
            looks = [(index, float(frames.timestamps[index])) for index in indices]
        if rules.times == "index":
            looks = [(index, index / frames.meta["fps"]) for index, _ in looks]
        shown = self.video.preview(looks, size)
        if rules.times == "index":
            # What Qwen2.5-VL takes for the rate of a video, from which it tells the times of its frames.
            sampled = len(looks) / len(frames) * frames.meta["fps"]
            shown = [{**block, "fps": sampled} if block["type"] == "image" else block for block in shown]
        return [*shown, *self.say("user", question=self.question, duration=self.duration)]

    @property
    def duration(self) -> str:
        """The length of the video as the protocol tells it."""
        if self.protocol.rules.duration == "end":
            return format_seconds(self.video.frames.end)
        return str(len(self.pool) / self.pool.rate if self._duration is None else self._duration)

    def call(self, name: str, arguments: dict[str, Any]) -> list[Block]:
        """Carry out a tool call that a policy wrote.

        Args:
            name: of the tool.
            arguments: as the policy wrote them; of any names and types.

        Returns:
            Content of the tool message: what was found, and a word on how to go on; or what to correct.

        Raises:
            ItemError: a cache was damaged or lost meanwhile.
        """
        tool, arguments = self._tool_of(name, arguments)
        if tool is None:
            known = " or ".join(self.tool_names)
            return self.correct(f"there is no tool {neutralise(name)[:50]!r}, only {known}")
        try:
            signature_of(tool).bind(**arguments)
        except TypeError as error:
            return self.correct(neutralise(str(error))[:100])
        self.calls += 1
        if self.calls > self.most_calls or self.room == 0:
            return self.say("overflow")
        over = self.spent and self.protocol.rules.last_call == "overflow"
        try:
            found = [replace(each, call=self.calls) for each in tool(self, **arguments)]
        except WrongCallError as error:
            return [*self.correct(str(error)), *(self.say("overflow") if over else [])]
        self.evidence += found
        times = ",".join(label_of(each) for each in found if each.seconds is not None)
        return [*self.show(found), *self.say("overflow" if over else "next", count=len(found), times=times)]

    @property
    def tool_names(self) -> list[str]:
        """The tools by the names by which the policy calls them."""
        called = {bound.tool: name for name, bound in self._bound.items()}
        return [called.get(name, name) for name in self.tools]

    def _tool_of(self, name: str, arguments: dict[str, Any]) -> tuple[Tool | None, dict[str, Any]]:
        """The tool that a policy calls by `name`, and the arguments by the tool's names for them."""
        if name not in self.tool_names:
            return None, {}
        bound = self._bound.get(name)
        tool = self.tools[bound.tool if bound else name]
        if bound:
            arguments = {bound.arguments.get(key, key): value for key, value in arguments.items()}
        if self.protocol.rules.arguments == "mended":
            needed = {key: None for key, each in signature_of(tool).parameters.items() if each.default is each.empty}
            known = {key: value for key, value in arguments.items() if key in signature_of(tool).parameters}
            arguments = needed | {key: value for key, value in known.items() if value is not None}
        return tool, arguments

    def correct(self, problem: str) -> list[Block]:
        """The answer to a call that cannot be carried out."""
        said = self.say("correction", problem=problem)
        self._corrections += [(len(self.evidence), block) for block in said]
        return said

    def glimpses(self, seconds: Sequence[float], box: Box = WHOLE) -> list[Evidence]:
        """Pictures of the source on the screen at `seconds`, each once, cut to `box`.

        Raises:
            WrongCallError: the source is gone, or cannot be read.
        """
        try:
            found = self._glimpses(self.video, seconds, box)
        except ItemError as error:
            why = "is not there any more" if error.reason == "missing_file" else f"cannot be read ({error.reason})"
            raise WrongCallError(f"the video file {why}: search its cached frames instead") from error
        return [Evidence(self.video.name, each.seconds, box=box) for each in found]

    def _glimpses(self, video: Video, seconds: Sequence[float], box: Box) -> list[Glimpse]:
        if video.source is None:
            raise ItemError(f"the file of {video.name} is not known", reason="missing_file")
        width, height = video.source.size()
        cut = max(1, round((box[2] - box[0]) * width)), max(1, round((box[3] - box[1]) * height))
        return video.source.at(seconds, filled_size(cut, self.settings, self.protocol.rules), box)

    def say(self, part: str, **values: object) -> list[Block]:
        """A text of the protocol, filled in."""
        return [{"type": "text", "text": self.protocol.render(part, self.kind, **values)}]

    def frames(self, looks: Sequence[int | Look]) -> list[Evidence]:
        """Frames of the opened video, each by its index in the frame cache, or by that and the time of a look at it."""
        times = self.video.frames.timestamps
        pairs = (look if isinstance(look, tuple) else (look, times[look]) for look in looks)
        return [Evidence(self.video.name, float(seconds), frame=int(index)) for index, seconds in pairs]

    def show(self, found: Sequence[Evidence]) -> list[Block]:
        """What was found as the policy sees it: each frame as a time and an image, words behind their time.

        Raises:
            ItemError: a picture of the source is kept no more, and the file is gone.
        """
        blocks: list[Block] = []
        for (video, box, worded), group in groupby(found, lambda each: (each.video, each.box, each.frame is None)):
            opened = self.videos.get(video, self.video)
            if box is not None:
                times = [each.seconds for each in group if each.seconds is not None]
                blocks += opened.show_source(self._glimpses(opened, times, box), box)
            elif worded:
                blocks += [_words(each) for each in group]
            else:
                looks = [(each.frame, each.seconds) for each in group if each.frame is not None]
                blocks += opened.show(looks, searched_size(opened.frames.size, self.settings, self.protocol.rules))
        return blocks

    def ask_from(self, found: Sequence[Evidence]) -> list[Block]:
        """Content of a request to answer the question from `found` alone."""
        return [*self.show(found), *self.say("reanswer", question=self.question)]

    def reanswer(self) -> list[Block] | None:
        """`ask_from` all evidence in order of time, each piece once: a picture at the earliest time at which it was
        looked at; or, by the protocol, as the calls found it, with the corrections between. Where nothing was found,
        from a frame of an arbitrary query, if the protocol says so; else None.
        """
        found = self.evidence or self._anything()
        if not found:
            return None
        if self.protocol.rules.reanswer_frames == "by_call":
            return [*self._in_order(found), *self.say("reanswer", question=self.question)]
        order = {name: position for position, name in enumerate(self.videos)}
        pieces = sorted(
            found,
            key=lambda each: (order.get(each.video, 0), each.seconds if each.seconds is not None else float("inf")),
        )
        once: dict[object, Evidence] = {}
        for each in pieces:
            once.setdefault(replace(each, call=0) if each.frame is None else (each.video, each.frame), each)
        return self.ask_from(list(once.values()))

    def _anything(self) -> list[Evidence]:
        """The frame that stands for those of an episode that found none, by the rule `unsearched`."""
        if self.protocol.rules.unsearched == "incomplete":
            return []
        self.room = None  # of the context of the search, which a re-answer does not share
        try:
            return seek_video_frames(self, **_ANYTHING)
        except WrongCallError:
            return []

    def _in_order(self, found: Sequence[Evidence]) -> list[Block]:
        """Frames as calls found them, and what was said to calls that failed, in order of the calls."""
        blocks: list[Block] = []
        shown = 0
        for place, said in self._corrections:
            blocks += [*self.show(found[shown:place]), said]
            shown = place
        return blocks + self.show(found[shown:])

    def asking(self, content: list[Block]) -> list[Message]:
        """The conversation of a re-answer: the system text of its own, where the protocol has one, and `content`."""
        system = self.protocol.texts.get("reanswer_system")
        opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        return [*opening, {"role": "user", "content": content}]


def label_of(found: Evidence) -> str:
    """The time before a picture or words; to hundredths of a second for a picture of the source."""
    if found.seconds is None:
        return ""
    return format_seconds(found.seconds) if found.box is None else format_exact(found.seconds)


def _words(found: Evidence) -> Block:
    """A text block with `seconds` in it, by which readers of the trace know that it was found."""
    time = "" if found.seconds is None else f"{format_seconds(found.seconds)} "
    return {"type": "text", "text": time + neutralise(found.text or ""), "seconds": found.seconds}
