"""The stages of a run on a terminal: a table that shows for each of them its state, progress, time spent and left."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


@dataclass
class _Row:
    state: str = "waits"
    began: float = 0.0
    ended: float | None = None
    percent: float = 0.0

    @property
    def spent(self) -> float:
        return (self.ended or time.monotonic()) - self.began


class StageTable:
    """What is known of the stages of the run in this process; stages tell it, and a terminal may show it."""

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}

    def plan(self, stages: Sequence[str]) -> None:
        """Show these stages, none of them begun."""
        self._rows = {stage: _Row() for stage in stages}

    def begin(self, stage: str) -> None:
        """A stage is at work, perhaps once more."""
        self._rows[stage] = _Row("works", time.monotonic())

    def move(self, stage: str, percent: float) -> None:
        """A stage has come to `percent` (0 to 100)."""
        self._rows[stage].percent = percent

    def end(self, stage: str, state: str) -> None:
        """A stage has ended, in a word or two."""
        row = self._rows.setdefault(stage, _Row())
        row.state, row.ended = state, time.monotonic()
        row.percent = 100.0 if state == "done" else row.percent

    def __rich__(self) -> Table:
        table = Table("stage", "", "progress", "spent", "left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for stage, row in self._rows.items():
            shown = row.state in ("works", "done", "failed")
            table.add_row(
                stage,
                Text(row.state, {"works": "bold cyan", "done": "green", "failed": "bold red"}.get(row.state, "dim")),
                ProgressBar(100, row.percent, width=30) if shown else "",
                _minutes(row.spent) if shown else "",
                _minutes(row.spent * (100 / row.percent - 1)) if row.state == "works" and row.percent else "",
            )
        return table


TABLE = StageTable()
"""Of this process."""


@contextmanager
def shown(console: Console) -> Iterator[None]:
    """Show the table while the block runs; of Prefect's log, warnings alone are seen, above it."""
    handlers = [
        handler
        for name in logging.root.manager.loggerDict
        for handler in logging.getLogger(name).handlers
        if isinstance(handler, PrefectConsoleHandler)
    ]
    kept = [(handler, handler.console, handler.level) for handler in handlers]
    for handler in handlers:
        handler.console = console
        handler.setLevel(logging.WARNING)
    try:
        with Live(TABLE, console=console, refresh_per_second=4):
            yield
    finally:
        for handler, earlier, level in kept:
            handler.console = earlier
            handler.setLevel(level)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
