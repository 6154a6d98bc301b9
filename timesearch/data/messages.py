"""The messages of an episode, and what can be read off them.

This is the one trace format: rewards, evaluation, MLflow and the report all read it. A message has a `role` and
`content`, a string or a list of blocks ``{"type": "text", "text": ...}`` and ``{"type": "image", ...}``. An assistant
turn is what the policy wrote, in its dialect (`timesearch.dialects`); a tool message puts a text block such as
``12.5s`` before each image.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Required, TypedDict

from timesearch.base.untrusted import mend_text
from timesearch.dialects import ToolCall, parse_turn

Box = tuple[float, float, float, float]
"""A region of a picture: its left, top, right and bottom edge, as shares of the width and height."""


class Block(TypedDict, total=False):
    """A piece of a message: words, an image, or (for engines) a whole preview as one video."""

    type: Required[str]
    """``text``, ``image`` or ``video``; published traces hold ``image_url`` too"""
    text: str
    """words; before an image its time, such as ``12.5s``"""
    seconds: float | None
    """time of an image, or of words that a tool found"""
    frame: int
    """index in the frame cache of an image"""
    box: list[float]
    """of a picture of the source: the region that it shows, as `Box`"""
    video: str
    """name of the video, where it is not the sample's"""
    image: Any
    """a PIL image; predictions keep none"""
    jpeg: bytes
    """the image as the frame cache holds it, in place of `image`"""
    frames: list[Block]
    """image blocks of a video"""
    fps: float
    """frames a second of a preview, on its images, where the protocol counts times by it"""


class Message(TypedDict, total=False):
    """One message of an episode."""

    role: Required[str]
    """``system``, ``user``, ``assistant`` or ``tool``"""
    content: Required[str | list[Block]]
    name: str
    """of the tool that answers"""


# A policy may write anything: each of these takes time in proportion to the text (`tests/test_linear.py`).
_CONTROL = re.compile(r"<\|(\w*+)\|>")
_SECONDS = re.compile(r"\s*+(\d++(?:\.\d++)?+)\s*+s\s*+")


def format_seconds(seconds: float) -> str:
    """The text block that stands before a frame: ``12.5s``."""
    return f"{seconds:.1f}s"


def format_exact(seconds: float) -> str:
    """The text block that stands before a picture of the source, which may be one of many in a second: ``12.47s``."""
    return f"{seconds:.2f}s"


def neutralise(text: str) -> str:
    """Text in which nothing is a control token any more: ``<|image_pad|>`` becomes ``<image_pad>``.

    Questions and model outputs go through this, because a tokenizer reads control tokens wherever they stand. Halves of
    surrogate pairs, which no tokenizer and no file takes, are replaced too.
    """
    return _CONTROL.sub(r"<\1>", mend_text(text))


def text_of(message: Message) -> str:
    """All text of a message, joined; images are left out."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return _joined(content)


def _joined(blocks: Sequence[Block]) -> str:
    return "".join(block.get("text", "") for block in blocks if block.get("type") == "text")


def blocks_of(message: Message) -> list[Block]:
    """The blocks of a message; none where its content is plain text."""
    content = message.get("content") or []
    return [] if isinstance(content, str) else content


def times_of(blocks: Sequence[Block]) -> list[float]:
    """Times (s) of the images among some blocks, in their order."""
    times = (block.get("seconds") for block in blocks if block["type"] == "image")
    return [seconds for seconds in times if seconds is not None]


def describe_call(call: ToolCall) -> str:
    """A tool call in a few words, for people: ``seek_video_frames: heart, start_time 10, end_time 20``."""
    if call.error:
        return f"{call.name or 'call'} not understood: {call.error}"
    given = (value if name == "query" else f"{name} {value}" for name, value in call.arguments.items())
    return f"{call.name}: {', '.join(map(str, given))}".removesuffix(": ")


def final_answer(messages: Sequence[Message]) -> str | None:
    """The text inside the last assistant turn's ``<answer>``; None if it has none."""
    assistant = [message for message in messages if message["role"] == "assistant"]
    return parse_turn(text_of(assistant[-1])).answer if assistant else None


@dataclass(frozen=True)
class Evidence:
    """Something of a video that a search found: a frame, or words."""

    video: str = ""
    """Name of the video; empty in a trace, where it is the sample's."""
    seconds: float | None = None
    """When it is shown or said; None for words without a time."""
    frame: int | None = None
    """Index in the frame cache; None for words, for pictures of the source, and in traces that others wrote."""
    box: Box | None = None
    """Of a picture of the source, the region that it shows; None for all else."""
    text: str | None = None
    """The words; None for a frame."""
    call: int = 0
    """Number of the tool call that found it, from 1."""


@dataclass(frozen=True)
class Exchange:
    """A tool call and what came back."""

    turn: int
    """Number of the assistant turn, from 1; 0 for what was given before the first."""
    call: ToolCall | None
    """None for what was given at once, and for a message that no call stands for."""
    evidence: tuple[Evidence, ...]
    said: str
    """The words beside the evidence: what to do next, or what to correct."""
    message: Message = field(compare=False, repr=False)


def exchanges(messages: Sequence[Message]) -> list[Exchange]:
    """Pair the tool messages of an episode with the calls that they answer, in order.

    The first tool message after an assistant turn answers its first call, the second its second, and so on. Rewards,
    evaluation, report, page, tracking and command line all read what a search did through this function.
    """
    found: list[Exchange] = []
    turn = 0
    calls: Iterator[ToolCall] = iter(())
    for message in messages:
        if message["role"] == "assistant":
            turn += 1
            calls = iter(parse_turn(text_of(message)).calls)
        elif message["role"] == "tool":
            seen = evidence_in(message)
            of_evidence = {id(block) for _, blocks in seen for block in blocks}
            content = message.get("content") or ""
            rest = [block for block in blocks_of(message) if id(block) not in of_evidence]
            said = content if isinstance(content, str) else _joined(rest)
            found.append(Exchange(turn, next(calls, None), tuple(each for each, _ in seen), said.strip(), message))
    return found


def evidence_in(message: Message) -> list[tuple[Evidence, tuple[Block, ...]]]:
    """What a tool message shows, in order, each with its blocks; what is shown twice is listed twice.

    A frame is an image after a text block that holds nothing but its time; an image without one is left out. Words
    are a text block with a field `seconds`.
    """
    found: list[tuple[Evidence, tuple[Block, ...]]] = []
    label: Block | None = None
    seconds: float | None = None
    for block in blocks_of(message):
        kind, video = block.get("type"), block.get("video") or ""
        if kind == "text" and "seconds" in block:
            found.append((Evidence(video, block["seconds"], text=block.get("text", "")), (block,)))
        elif kind == "text":
            match = _SECONDS.fullmatch(block.get("text", ""))
            label, seconds = block, float(match.group(1)) if match else None
        elif kind in ("image", "image_url"):
            if label is not None and seconds is not None and math.isfinite(seconds):
                each = Evidence(video, seconds, frame=block.get("frame"), box=box_of(block))
                found.append((each, (label, block)))
            label = seconds = None
    return found


def heard_seconds(messages: Sequence[Message]) -> list[float]:
    """Times (s) of all words that tools returned, each time once, in increasing order."""
    times = (each.seconds for exchange in exchanges(messages) for each in exchange.evidence if each.text is not None)
    return sorted({seconds for seconds in times if seconds is not None})


def box_of(block: Block) -> Box | None:
    """The region that a block of a trace names; None where it names none."""
    sides = block.get("box")
    if not isinstance(sides, list) or len(sides) != 4:
        return None
    if not all(isinstance(side, int | float) and 0 <= side <= 1 for side in sides):
        return None
    left, top, right, bottom = map(float, sides)
    return left, top, right, bottom


def searched_seconds(messages: Sequence[Message]) -> list[float]:
    """Times (s) of all frames that tools returned, each time once, in increasing order."""
    times = (each.seconds for exchange in exchanges(messages) for each in exchange.evidence if each.text is None)
    return sorted({seconds for seconds in times if seconds is not None})
