"""Giving up work that runs in another thread, down to its child processes."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timesearch.base.errors import TimeSearchError


class StoppedError(TimeSearchError):
    """The work was given up, because nobody waits for it any more."""


class Stop:
    """A request to give up: made in one thread, met in another.

    What works calls `check` between two pieces. A child process that it reads from is killed at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = False
        self._children: set[subprocess.Popen[Any]] = set()

    def ask(self) -> None:
        """Ask to give up; from any thread, any number of times."""
        with self._lock:
            self._asked = True
            for child in self._children:
                child.kill()

    def check(self) -> None:
        """Go on, unless it was asked to give up.

        Raises:
            StoppedError: it was.
        """
        if self._asked:
            raise StoppedError("given up: nobody waits for it any more")

    @contextmanager
    def child(self, process: subprocess.Popen[Any]) -> Iterator[None]:
        """While this is open, `ask` kills `process`; at once where it was asked before."""
        with self._lock:
            self._children.add(process)
            if self._asked:
                process.kill()
        try:
            yield
        finally:
            with self._lock:
                self._children.discard(process)


NEVER = Stop()
"""For work that goes on to its end."""
