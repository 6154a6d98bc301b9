"""An application at a free port, in a thread; and what is logged meanwhile."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class Log(logging.Handler):
    """Keeps what the server logs."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def bad_since(self, before: int) -> list[str]:
        """Tracebacks, and tasks that nobody looked after."""
        late = self.records[before:]
        return [record.getMessage() for record in late if record.exc_info or record.name == "asyncio"]


@contextmanager
def logged() -> Iterator[Log]:
    """What any logger says."""
    kept = Log()
    logging.getLogger().addHandler(kept)
    yield kept
    logging.getLogger().removeHandler(kept)


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of a server of the application."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def readers_of(video: str) -> list[int]:
    """The processes, children of this one, that have a file of this name on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and video.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether something comes to hold; it need not hold for longer than the moment it was seen."""
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return held
