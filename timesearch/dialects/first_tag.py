"""The dialect of the released TimeSearch-R: Qwen's tags, of which the first one acts, wherever it stands.

A call or an answer acts inside a thought too, and what follows the first call is never read. History holds a turn as it
was read: from its last thought on, to the end of its first call (or, without one, its first answer).
"""

from __future__ import annotations

from typing import Any

from timesearch.base.untrusted import UntrustedError, parse_json
from timesearch.dialects.dialect import Dialect, ToolCall, Turn
from timesearch.dialects.qwen import QWEN, repaired

_ACTS = ("tool_call", "answer")


def cut(text: str) -> str:
    """What history holds of a turn."""
    _, thought, spoken = text.rpartition("<think>")
    text = thought + spoken
    for act in _ACTS:
        before, end, _ = text.partition(f"</{act}>")
        if end:
            return before + end
    return text


def parse_turn(text: str) -> Turn:
    """Read a turn by its first tag that is closed; a call or an answer left open is none."""
    text = cut(text)
    found = []
    for act in _ACTS:
        before, opened, rest = text.partition(f"<{act}>")
        inner, closed, _ = rest.partition(f"</{act}>")
        if opened and closed:
            found.append((len(before), act, inner.strip()))
    thought, closed, _ = text.partition("<think>")[2].partition("</think>")
    spoken = thought.strip() if closed else None
    if not found:
        return Turn(spoken)
    _, act, inner = min(found)
    return Turn(spoken, [_parse_call(inner)]) if act == "tool_call" else Turn(spoken, answer=inner)


def _parse_call(body: str) -> ToolCall:
    """A call from the JSON that it was written as; one that is no object cannot be read and has no name."""
    value = _lenient(body)
    if not isinstance(value, dict):
        return ToolCall("", {}, "not a JSON object")
    name, arguments = value.get("name"), value.get("arguments", {})
    called = name if isinstance(name, str) and name else "unknown"
    if isinstance(arguments, str):
        arguments = _lenient(arguments)
    if not isinstance(arguments, dict):
        return ToolCall(called, {}, '"arguments" must be a JSON object')
    return ToolCall(called, arguments)


def _lenient(body: str) -> Any:
    try:
        return parse_json(body)
    except UntrustedError:
        return repaired(body)


FIRST_TAG = Dialect("first_tag", QWEN.marks, parse_turn, QWEN.act_of, QWEN.system_text, cut)
