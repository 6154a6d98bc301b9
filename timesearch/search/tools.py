"""The tools of a search, each a plain function, and the tuple that lists them.

A tool takes the `Search` it belongs to and then what a policy may write, typed and documented: its signature and its
docstring (Google style) become the JSON schema that the policy reads. It returns what it found, and nothing else:
counting, corrections and wording are the search's. Which tools are offered is a setting (`search.tools`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, Any, get_type_hints

from timesearch.base.errors import RequestError
from timesearch.data.messages import Block, Box, Evidence
from timesearch.retrieval.selection import select_frames
from timesearch.search.pool import from_end_to_end
from timesearch.search.protocol import BoundTool
from timesearch.search.schemas import json_schema

if TYPE_CHECKING:
    from timesearch.search.search import Search

Tool = Callable[..., list[Evidence]]

MAX_LINES = 32
"""Lines of subtitles that one call returns at most: as many words as a few frames take tokens."""
MAX_STRETCH = 30.0
"""Seconds that one call watches at most."""
MAX_FPS = 60.0
MIN_SIDE = 0.02
"""Of a region, as a share of the picture's side: 38 pixels of Full HD."""
_RETURNED = list[dict[str, Any]]
"""What a policy is told that a tool returns: the fields of a block are no part of its schema."""
QUERY_CHARS = 500
"""A longer query is no description of a frame, and no text encoder reads that far."""


class WrongCallError(Exception):
    """A call cannot be carried out as it was written; the text tells the policy what to correct."""


def seek_video_frames(
    search: Search, query: str, start_time: float = 0.0, end_time: float = -1.0, num_frames: int = 8
) -> list[Evidence]:
    """Find the frames of the video that match a description, within a window of time.

    Args:
        query: What the frames should show, in a few words.
        start_time: Start of the window in seconds.
        end_time: End of the window in seconds; -1 stands for the end of the video.
        num_frames: How many frames to return at most.

    Returns:
        The frames, each after its time in seconds.
    """
    pool, end_of_video = search.pool, search.video.frames.end
    words = _words(search, query)
    start, end, count = _window(search, start_time, end_time, num_frames=num_frames)
    if end < 0:
        end = math.inf if pool.covering else end_of_video
    _in_order(start, end, num_frames=count)
    window = pool.window(start, end)
    if not window:
        raise WrongCallError(
            f"no frame lies between {start:g} and {end:g} seconds: the video ends at {end_of_video:.1f} seconds"
        )
    places = list(window)
    indices = pool.indices[places]
    most = int(min(count, search.frames_left, len(window)))
    if words:
        picked = select_frames(
            search.video.features.features[indices],
            search.encoder.encode_text([words])[0],
            most,
            method=search.settings.method,
            places=pool.places[places],
        )
    else:
        picked = [int(place) for place in from_end_to_end(len(window), most)]
    # A picture that is held from before the window is looked at when the window starts.
    earliest = -math.inf if pool.covering else start
    return search.frames([(int(indices[pick]), max(float(pool.times[places[pick]]), earliest)) for pick in picked])


def _words(search: Search, query: Any) -> str:
    """What a call searches for; nothing, where the protocol lets a call do without."""
    rules = search.protocol.rules
    if rules.arguments == "mended":
        query = "" if query is None else str(query)[:QUERY_CHARS]
    return "" if rules.query == "optional" and not query else _few_words(query)


def _few_words(query: Any) -> str:
    if not isinstance(query, str) or not query.strip() or len(query) > QUERY_CHARS:
        raise WrongCallError("query must be a few words of text")
    return query


def _in_order(start: float, end: float, **counted: float) -> None:
    """Refuse a window that ends before it starts, and a count of less than one."""
    ((name, count),) = counted.items()
    if start > end:
        raise WrongCallError(f"start_time {start:g} lies after end_time {end:g}")
    if count < 1:
        raise WrongCallError(f"{name} must be 1 or more")


def _window(search: Search, start: Any, end: Any, **counted: Any) -> tuple[float, float, float]:
    """Numbers of a call as it wrote them, one of them `counted`.

    Where the protocol mends arguments, what is no number is as if it were not given.
    """
    ((name, count),) = counted.items()
    if search.protocol.rules.arguments == "corrected":
        return number("start_time", start), number("end_time", end), number(name, count)
    begin, until = _mended(start, float, 0.0), _mended(end, float, -1.0)
    if not math.isfinite(begin) or not math.isfinite(until):
        raise WrongCallError("start_time and end_time must be finite numbers")
    return begin, until, max(1, _mended(count, int, 8))


def _mended(value: Any, kind: Callable[[Any], float], otherwise: float) -> float:
    """What Python makes of `value`; `otherwise` where it makes nothing."""
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        return otherwise


def search_subtitles(
    search: Search, query: str, start_time: float = 0.0, end_time: float = -1.0, num_lines: int = 8
) -> list[Evidence]:
    """Find what is said in the video: the lines of its subtitles that match some words, within a window of time.

    Args:
        query: Words that may be said.
        start_time: Start of the window in seconds.
        end_time: End of the window in seconds; -1 stands for the end of the video.
        num_lines: How many lines to return at most.

    Returns:
        The lines, each after its time in seconds.
    """
    video, words = search.video, _few_words(query)
    start, end, count = _window(search, start_time, end_time, num_lines=num_lines)
    if video.subtitles is None:
        raise WrongCallError("this video has no subtitles")
    if end < 0:
        end = max(video.frames.end, video.subtitles.end)
    _in_order(start, end, num_lines=count)
    lines = video.subtitles.search(words, start, end, int(min(count, MAX_LINES)))
    return [Evidence(video.name, line.start, text=line.text) for line in lines]


def look_closer(search: Search, time: float, box: list[float]) -> list[Evidence]:
    """Look at a region of the video's picture at one moment, at full resolution.

    Args:
        time: The moment in seconds.
        box: Left, top, right and bottom edge of the region, as shares of the picture from 0 to 1.

    Returns:
        The region, after its time in seconds.
    """
    moment = _moment(search, "time", time)
    region = _region(box)
    _room(search)
    return search.glimpses([moment], region)


def watch(search: Search, start_time: float, end_time: float, fps: float = 4.0) -> list[Evidence]:
    """Watch a short stretch of the video with more frames a second.

    Args:
        start_time: Start of the stretch in seconds.
        end_time: End of the stretch in seconds.
        fps: Frames a second.

    Returns:
        The frames, each after its time in seconds.
    """
    start, end, rate = _moment(search, "start_time", start_time), number("end_time", end_time), number("fps", fps)
    end = min(end, search.video.frames.end)
    if start > end:
        raise WrongCallError(f"start_time {start:g} lies after end_time {end:g}")
    if not 0 < rate <= MAX_FPS:
        raise WrongCallError(f"fps must be more than 0 and at most {MAX_FPS:g}")
    if end - start > MAX_STRETCH:
        raise WrongCallError(f"a stretch is at most {MAX_STRETCH:g} seconds long: name a shorter one")
    _room(search)
    count, most = int((end - start) * rate + 1e-6) + 1, search.frames_left
    if count > most:
        raise WrongCallError(
            f"{end - start:g} seconds at {rate:g} a second are {count} frames, and one call returns {most} at most: "
            "name a shorter stretch or fewer frames a second"
        )
    return search.glimpses([start + place / rate for place in range(count)])


def _moment(search: Search, name: str, value: Any) -> float:
    seconds, end = number(name, value), search.video.frames.end
    if not 0 <= seconds <= end + 1.0:
        raise WrongCallError(f"{name} {seconds:g} lies outside of the video, which ends at {end:.1f} seconds")
    return seconds


def _region(box: Any) -> Box:
    """Four shares as a policy writes them, in a list or as text."""
    if isinstance(box, str) and len(box) <= QUERY_CHARS:
        box = box.strip().strip("[]()").split(",")
    if not isinstance(box, list | tuple) or len(box) != 4:
        raise WrongCallError("box must be four numbers: left, top, right and bottom, from 0 to 1")
    left, top, right, bottom = (number("each side of box", side) for side in box)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise WrongCallError(
            "box must be left, top, right and bottom, from 0 to 1, left before right, top before bottom"
        )
    if min(right - left, bottom - top) < MIN_SIDE:
        raise WrongCallError(f"box must be at least {MIN_SIDE:g} wide and high")
    return left, top, right, bottom


def _room(search: Search) -> None:
    if search.frames_left < 1:
        raise WrongCallError("no further picture fits")


TOOLS: tuple[Tool, ...] = (seek_video_frames, search_subtitles, look_closer, watch)


def offered(names: Sequence[str]) -> list[Tool]:
    """The tools of these names, in their order.

    Raises:
        RequestError: there is no tool of a name, or none is named.
    """
    known = {tool.__name__: tool for tool in TOOLS}
    if not names:
        raise RequestError(f"search.tools is empty: name at least one of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise RequestError(f"search.tools names {name!r}, which is no tool: choose from {', '.join(known)}")
    return [known[name] for name in names]


def bind(described: Sequence[BoundTool]) -> dict[str, BoundTool]:
    """The tools of a protocol by the names by which the policy calls them.

    Raises:
        RequestError: a description names a tool or an argument that there is not.
    """
    known = {tool.__name__: signature_of(tool).parameters for tool in TOOLS}
    for bound in described:
        if bound.tool not in known:
            raise RequestError(f"tools.json names {bound.tool!r}, which is no tool: choose from {', '.join(known)}")
        if unknown := sorted(set(bound.arguments.values()) - known[bound.tool].keys()):
            takes = ", ".join(known[bound.tool])
            raise RequestError(f"tools.json: {bound.tool} takes no argument {unknown[0]!r}, only {takes}")
    return {bound.name: bound for bound in described}


def number(name: str, value: Any) -> float:
    """A number as a policy writes it: 12, "12.5" or "12.5s".

    Raises:
        WrongCallError: it is something else, or not finite.
    """
    if isinstance(value, bool):
        raise WrongCallError(f"{name} must be a number")
    try:
        read = float(value.strip().removesuffix("s") if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        raise WrongCallError(f"{name} must be a number") from None
    if not math.isfinite(read):
        raise WrongCallError(f"{name} must be a finite number")
    return read


def signature_of(tool: Tool) -> inspect.Signature:
    """What a policy may write: the tool's parameters without the search."""
    signature = inspect.signature(tool)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def method_of(tool: Tool) -> Callable[..., list[Block]]:
    """The tool as a method of an object with a `search`, for TRL, which lists the methods of a class as tools.

    Its annotations, defaults and docstring are the tool's, but for the first parameter and for what it returns:
    content blocks, which is what a policy gets of any tool.
    """
    signature = signature_of(tool)

    def method(self: Any, *arguments: Any, **named: Any) -> list[Block]:
        return self.search.call(tool.__name__, signature.bind(*arguments, **named).arguments)

    assert isinstance(tool, FunctionType)
    receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    hints = get_type_hints(tool, localns={"Search": Any})
    method.__name__, method.__qualname__, method.__doc__ = tool.__name__, tool.__name__, tool.__doc__
    method.__annotations__ = {name: hints[name] for name in signature.parameters} | {"return": _RETURNED}
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[receiver, *signature.parameters.values()], return_annotation=_RETURNED
    )
    return method


@cache
def schema_of(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a tool, as TRL renders it in training."""
    return json_schema(method_of(tool))
