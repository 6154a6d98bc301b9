"""Rows of published benchmarks, turned into samples."""

from __future__ import annotations

from typing import Any


def to_sample_row(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Return `row` in the project's own form; a row that is in it already comes back unchanged."""
    return row
