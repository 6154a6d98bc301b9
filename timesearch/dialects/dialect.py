"""What a dialect is: how an agent writes its thoughts, calls and answers, and how its tools are described to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


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


@dataclass(frozen=True)
class Dialect:
    """One way to write turns. All functions take any text, in time in proportion to its length."""

    name: str
    marks: tuple[str, ...]
    """texts of which a turn in this dialect holds at least one"""
    parse_turn: Callable[[str], Turn]
    """what a turn says, read leniently"""
    act_of: Callable[[str], Literal["call", "answer"] | None]
    """what a turn does that keeps the form (one thought, then one call or one answer); None for any other turn"""
    system_text: Callable[[str, Sequence[dict[str, Any] | str]], str]
    """the system message of a text and the tools' JSON schemas (or their lines), where no chat template adds them"""
    cut: Callable[[str], str] = lambda text: text
    """what history holds of a turn"""
