"""Qwen's dialect, which the paper's agent speaks: tags for thought, call and answer, and a call as JSON.

A turn is ``<think>...</think>`` and then either one ``<tool_call>{json}</tool_call>`` or one ``<answer>...</answer>``.
Training renders and reads it through the checkpoint's chat template; this file says the same in plain functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from timesearch.base.untrusted import MAX_DEPTH, UntrustedError, parse_json
from timesearch.dialects.dialect import Dialect, ToolCall, Turn

# A policy may write anything: each of these takes time in proportion to the text (`tests/test_linear.py`).
_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_TURN = re.compile(
    r"\s*+<think>(?:(?!</?(?:think|answer|tool_call)>).)*+</think>\s*+"
    r"(?P<act><tool_call>(?:(?!</?(?:think|answer|tool_call)>).)*+</tool_call>"
    r"|<answer>(?:(?!</?(?:think|answer|tool_call)>).)*+</answer>)\s*+",
    re.DOTALL,
)

_REPAIRED_CHARS = 1000
"""Length of a damaged call that is still repaired: twice the longest query. The repair takes quadratic time at worst,
0.05 s at this length."""
_REPAIRED_CALLS = 8
"""Damaged calls of one turn that are repaired at most."""


def tagged_answers(text: str) -> list[str]:
    """What stands between ``<answer>`` and ``</answer>``, innermost where they nest, in order."""
    closed = (part.rpartition("<answer>") for part in text.split("</answer>")[:-1])
    return [answer.strip() for _, opened, answer in closed if opened]


def parse_turn(text: str) -> Turn:
    """Read an assistant turn leniently: damaged JSON in a call is repaired where its meaning is plain.

    A turn that calls a tool does not answer, whatever else it says: it has not seen the tool's frames yet.
    """
    thought, closed, spoken = text.partition("<think>")[2].partition("</think>")
    if not closed:
        spoken = text
    repairs = iter(range(_REPAIRED_CALLS))
    calls = [_parse_call(body, repairs) for body in _TOOL_CALL.findall(spoken)]
    answers = [] if calls else tagged_answers(spoken)
    return Turn(
        thought=thought.strip() if closed else None,
        calls=calls,
        answer=answers[-1] if answers else None,
    )


def _parse_call(body: str, repairs: Iterator[int]) -> ToolCall:
    """A call from the JSON that it was written as; each item of `repairs` allows one repair."""
    try:
        value = parse_json(body)
    except UntrustedError:
        value = repaired(body) if next(repairs, None) is not None else None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return ToolCall("", {}, 'not a JSON object with "name" and "arguments"')
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except UntrustedError:
            arguments = None
    if not isinstance(arguments, dict):
        return ToolCall(value["name"], {}, '"arguments" must be a JSON object')
    return ToolCall(value["name"], arguments)


def repaired(body: str) -> Any:
    """What a damaged JSON text means, where that is plain; else None."""
    if len(body) > _REPAIRED_CHARS or sum(map(body.count, "{[(")) > MAX_DEPTH:
        return None
    import json_repair

    try:
        return parse_json(json_repair.repair_json(body))
    except Exception:
        # The library guesses, and stumbles over some texts in ways that it does not name (AssertionError and others).
        return None


def act_of(text: str) -> Literal["call", "answer"] | None:
    """What a turn does that is one thought, then one call or one answer, and nothing else."""
    turn = _TURN.fullmatch(text)
    if turn is None:
        return None
    return "answer" if turn.group("act").startswith("<answer>") else "call"


def write_turn(thought: str, *calls: dict[str, Any], answer: str | None = None) -> str:
    """A well-formed turn: the thought, and the `calls` (`name` and `arguments`) or the answer."""
    if not calls:
        return f"<think>{thought}</think>\n<answer>{answer}</answer>"
    return "\n".join(
        [f"<think>{thought}</think>", *(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)]
    )


def system_text(text: str, tools: Sequence[dict[str, Any] | str]) -> str:
    """The system message with the tools in it, for engines whose chat template adds none.

    They go where the text says ``{tools}``; a text that does not gets them at its end, in the words of Qwen's chat
    templates, so that both ways render to the same tokens.
    """
    if "{tools}" in text:
        return text.replace("{tools}", "\n".join(map(schema_line, tools)))
    return f"{text}\n\n{describe_tools(tools)}"


def schema_line(tool: dict[str, Any] | str) -> str:
    """A tool's JSON schema as chat templates write it; a line that is written already as it is."""
    return tool if isinstance(tool, str) else json.dumps(tool, ensure_ascii=False)


def describe_tools(tools: Sequence[dict[str, Any] | str]) -> str:
    """The tools in the words in which Qwen's chat templates put them after the system text."""
    schemas = "\n".join(map(schema_line, tools))
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{schemas}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


QWEN = Dialect("qwen", ("<think>", "<tool_call>", "<answer>"), parse_turn, act_of, system_text)
