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
from timesearch.data.messages import Block, Evidence
from timesearch.retrieval.selection import select_frames

if TYPE_CHECKING:
    from timesearch.search.search import Search

Tool = Callable[..., list[Evidence]]

MAX_LINES = 32
"""Lines of subtitles that one call returns at most: as many words as a few frames take tokens."""
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
    video = search.video
    times = video.frames.timestamps
    if not isinstance(query, str) or not query.strip() or len(query) > QUERY_CHARS:
        raise WrongCallError("query must be a few words of text")
    start, end = number("start_time", start_time), number("end_time", end_time)
    count = number("num_frames", num_frames)
    if end < 0:
        end = video.frames.end
    if start > end:
        raise WrongCallError(f"start_time {start:g} lies after end_time {end:g}")
    if count < 1:
        raise WrongCallError("num_frames must be 1 or more")
    window = video.frames.window(start, end)
    if not window:
        raise WrongCallError(
            f"no frame lies between {start:g} and {end:g} seconds: the video ends at {video.frames.end:.1f} seconds"
        )
    picked = select_frames(
        video.features.features[window.start : window.stop],
        search.encoder.encode_text([query])[0],
        int(min(count, search.frames_left, len(window))),
        method=search.settings.method,
        places=video.frames.places[window.start : window.stop],
    )
    # A picture that is held from before the window is looked at when the window starts.
    return search.frames([(window[index], max(float(times[window[index]]), start)) for index in picked])


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
    video = search.video
    if not isinstance(query, str) or not query.strip() or len(query) > QUERY_CHARS:
        raise WrongCallError("query must be a few words of text")
    start, end = number("start_time", start_time), number("end_time", end_time)
    count = number("num_lines", num_lines)
    if video.subtitles is None:
        raise WrongCallError("this video has no subtitles")
    if end < 0:
        end = max(video.frames.end, video.subtitles.end)
    if start > end:
        raise WrongCallError(f"start_time {start:g} lies after end_time {end:g}")
    if count < 1:
        raise WrongCallError("num_lines must be 1 or more")
    lines = video.subtitles.search(query, start, end, int(min(count, MAX_LINES)))
    return [Evidence(video.name, line.start, text=line.text) for line in lines]


TOOLS: tuple[Tool, ...] = (seek_video_frames, search_subtitles)


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
    from transformers.utils.chat_template_utils import get_json_schema

    return get_json_schema(method_of(tool))
