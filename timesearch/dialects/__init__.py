"""How agents write their turns: a dialect is a file here, and an entry of the tuple.

Whoever reads a trace need not know who wrote it: a turn is read by the dialect whose marks are in it. In which one a
policy is spoken to is a setting (`search.dialect`), or a rule of its protocol.
"""

from __future__ import annotations

from typing import Literal

from timesearch.base.errors import RequestError
from timesearch.dialects.dialect import Dialect, ToolCall, Turn
from timesearch.dialects.first_tag import FIRST_TAG
from timesearch.dialects.qwen import QWEN

__all__ = ["DIALECTS", "Dialect", "ToolCall", "Turn", "act_of", "named", "parse_turn", "read_as"]

DIALECTS: tuple[Dialect, ...] = (QWEN, FIRST_TAG)
"""All dialects. A turn is read by the first whose marks it holds, one without marks by the first of all."""


def parse_turn(text: str) -> Turn:
    """Read an assistant turn leniently: damage is mended where the meaning is plain.

    A turn that calls a tool does not answer, whatever else it says: it has not seen what the tool found yet.
    """
    return _of(text).parse_turn(text)


def read_as(dialect: Dialect, text: str) -> Turn:
    """Read the turn of a policy that is spoken to in `dialect`: by that where its marks are there, else leniently."""
    return dialect.parse_turn(text) if any(mark in text for mark in dialect.marks) else parse_turn(text)


def act_of(text: str) -> Literal["call", "answer"] | None:
    """What a well-formed turn does; None for a turn that breaks the form of its dialect."""
    return _of(text).act_of(text)


def named(name: str) -> Dialect:
    """The dialect of a name.

    Raises:
        RequestError: there is none.
    """
    known = {dialect.name: dialect for dialect in DIALECTS}
    if name not in known:
        raise RequestError(f"search.dialect is {name!r}, which is no dialect: choose from {', '.join(known)}")
    return known[name]


def _of(text: str) -> Dialect:
    return next((dialect for dialect in DIALECTS if any(mark in text for mark in dialect.marks)), DIALECTS[0])
