"""What a policy reads of a tool: the same by our own hand as by transformers, which TRL takes in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
from transformers.utils import get_json_schema

from timesearch.base.errors import RequestError
from timesearch.search.schemas import json_schema
from timesearch.search.tools import TOOLS, method_of


def plain(text: str) -> str:
    """Say it."""
    return text


plain.__doc__ = "Say it.\n\nArgs:\n    text: What to say."


def rich(
    words: list[str], count: int | None = None, kind: Literal["a", "b"] = "a", deep: list[list[float]] | None = None
) -> dict[str, bool]:
    """Take much: a colon,
    and a second line.

    A second paragraph.

    Args:
        words: Of many
            lines: with a colon of its own,

            and a gap.
        count:   How many.
        kind: Which: one of two.
        deep: Lists of lists.

    Returns:
        What came
        of it.

    Raises:
        ValueError: never.
    """
    raise NotImplementedError


def nothing(loud: bool = False, size: float = 0.5) -> None:
    """Only optional ones.

    Args:
        loud: Whether it is loud.
        size: How large.
    """


@pytest.mark.parametrize("function", [*map(method_of, TOOLS), rich, nothing, plain])
def test_a_schema_is_what_transformers_makes(function: Callable[..., Any]) -> None:
    if function is not nothing:
        assert json_schema(function) == get_json_schema(function)
    else:
        with pytest.raises(RequestError, match="NoneType"):
            json_schema(function)


def test_what_cannot_be_described_is_named() -> None:
    def bare(words):  # type: ignore[no-untyped-def]
        """Say.

        Args:
            words: What.
        """

    def untold(words: str) -> str:
        """Say."""
        return words

    def strange(words: set[str]) -> str:
        """Say.

        Args:
            words: What.
        """
        return str(words)

    for function, said in ((bare, "'words'"), (untold, "'words'"), (strange, "set")):
        with pytest.raises(RequestError, match=said):
            json_schema(function)
