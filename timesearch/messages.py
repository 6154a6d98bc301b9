"""The messages of an episode, and what can be read off them.

This is the one trace format: rewards, evaluation, MLflow and the report all read it. A message has a `role` and
`content`, a string or a list of blocks ``{"type": "text", "text": ...}`` and ``{"type": "image", ...}``. An assistant
turn is ``<think>...</think>`` and then either one ``<tool_call>{json}</tool_call>`` or one ``<answer>...</answer>``;
a tool message puts a text block such as ``12.5s`` before each image.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Block = dict[str, Any]

_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_CONTROL = re.compile(r"<\|(\w*)\|>")
_SECONDS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*s\s*")


def format_seconds(seconds: float) -> str:
    """The text block that stands before a frame: ``12.5s``."""
    return f"{seconds:.1f}s"


def neutralise(text: str) -> str:
    """Text in which nothing is a control token any more: ``<|image_pad|>`` becomes ``<image_pad>``.

    Questions and model outputs go through this, because a tokenizer reads control tokens wherever they stand.
    """
    return _CONTROL.sub(r"<\1>", text)


def text_of(message: Message) -> str:
    """All text of a message, joined; images are left out."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(block.get("text", "") for block in content if block.get("type") == "text")


def tagged_answers(text: str) -> list[str]:
    """What stands between ``<answer>`` and ``</answer>``, innermost where they nest, in order."""
    return [answer.strip() for answer in _ANSWER.findall(text)]


@dataclass(frozen=True)
class ToolCall:
    """A tool call as the policy wrote it; `error` says what is wrong where it cannot be read."""

    name: str
    arguments: dict[str, Any]
    error: str | None = None


@dataclass(frozen=True)
class Turn:
    """What one assistant message says."""

    thought: str | None
    calls: list[ToolCall] = field(default_factory=list)
    answer: str | None = None


def parse_turn(text: str) -> Turn:
    """Read an assistant turn leniently: damaged JSON in a call is repaired where its meaning is plain.

    A turn that calls a tool does not answer, whatever else it says: it has not seen the tool's frames yet.
    """
    thought = _THINK.search(text)
    spoken = text[thought.end() :] if thought else text
    calls = [_parse_call(body) for body in _TOOL_CALL.findall(spoken)]
    answers = [] if calls else tagged_answers(spoken)
    return Turn(
        thought=thought.group(1).strip() if thought else None,
        calls=calls,
        answer=answers[-1] if answers else None,
    )


def _parse_call(body: str) -> ToolCall:
    try:
        value = json.loads(body)
    except (json.JSONDecodeError, RecursionError):
        import json_repair

        try:
            value = json_repair.loads(body[:10_000])
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return ToolCall("", {}, 'not a JSON object with "name" and "arguments"')
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = None
    if not isinstance(arguments, dict):
        return ToolCall(value["name"], {}, '"arguments" must be a JSON object')
    return ToolCall(value["name"], arguments)


def final_answer(messages: Sequence[Message]) -> str | None:
    """The text inside the last assistant turn's ``<answer>``; None if it has none."""
    assistant = [message for message in messages if message["role"] == "assistant"]
    return parse_turn(text_of(assistant[-1])).answer if assistant else None


def tool_frames(messages: Sequence[Message]) -> list[tuple[int, float, Block]]:
    """The frames that tool messages showed, as (assistant turn from 0, seconds, image block), in order.

    Frames shown twice are listed twice. An image without a time before it is left out.
    """
    frames: list[tuple[int, float, Block]] = []
    turn = -1
    for message in messages:
        if message["role"] == "assistant":
            turn += 1
        if message["role"] != "tool" or isinstance(message.get("content"), str):
            continue
        seconds: float | None = None
        for block in message.get("content") or []:
            if block.get("type") == "text":
                match = _SECONDS.fullmatch(block.get("text", ""))
                seconds = float(match.group(1)) if match else None
            elif block.get("type") in ("image", "image_url"):
                if seconds is not None and math.isfinite(seconds):
                    frames.append((turn, seconds, block))
                seconds = None
    return frames


def searched_seconds(messages: Sequence[Message]) -> list[float]:
    """Times (s) of all frames that the tool returned, each time once, in increasing order."""
    return sorted({seconds for _, seconds, _ in tool_frames(messages)})
