"""Progress bars: one look for everything that takes longer than two seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, soft_wrap=True)


_LINE_EVERY = 5.0
"""Seconds between plain lines where no terminal is."""


class Bar:
    """A running progress bar: `advance` it, and set its `note` (short live figures) as the work goes on."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._next_line = time.monotonic() + _LINE_EVERY

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count further items as done."""
        fields: dict[str, Any] = {} if note is None else {"note": note}
        self._progress.update(self._task, advance=count, **fields)
        if not console.is_terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_EVERY
            self._say()

    def _say(self) -> None:
        """A line such as ``frames: 12/40, 30 s left``, for logs and for whoever follows them."""
        task = self._progress.tasks[self._task]
        total = "" if task.total is None else f"/{task.total:g}"
        left = "" if task.time_remaining is None else f", {task.time_remaining:.0f} s left"
        note = f", {task.fields['note']}" if task.fields["note"] else ""
        console.print(f"{task.description}: {task.completed:g}{total}{left}{note}", markup=False, highlight=False)


@contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Bar]:
    """Show a bar on standard error with done and total, time spent and time left; plain lines where no terminal is."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal) as progress:
        yield Bar(progress, progress.add_task(title, total=total, note=""))
