"""Digests of files, remembered by path, size, inode and times of change, so that an unchanged file is not read again.

The digest stays the truth: what is remembered only says of which state of the file it was taken. The memory is one
small SQLite file in the user's cache folder; without it everything works, by reading.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from timesearch.base.files import file_digest

_SETTLED = 2.0
"""Seconds since a file's last change after which a further change must show in its times (some clocks are coarse)."""


def remembered(path: Path, kind: str = "sha256", compute: Callable[[Path], str] = file_digest) -> str:
    """`compute(path)`, or its result from an earlier run if the file has not changed since.

    Args:
        path: an existing file.
        kind: what `compute` computes; results of different kinds are kept apart.
        compute: its errors are passed on and not remembered.
    """
    state = _state(path)
    name = (str(path.absolute()), kind)
    with suppress(sqlite3.Error, OSError), closing(_memory()) as memory:
        row = memory.execute("SELECT state, digest FROM digests WHERE path = ? AND kind = ?", name).fetchone()
        if row and row[0] == state:
            return str(row[1])
    digest = compute(path)
    settled = time.time() - path.stat().st_mtime > _SETTLED
    if settled and _state(path) == state:
        with suppress(sqlite3.Error, OSError), closing(_memory()) as memory, memory:
            memory.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?)", (*name, state, digest))
    return digest


def remember(path: Path, kind: str, value: str) -> None:
    """Let `remembered` give back `value` for `kind` as long as the file does not change."""
    with suppress(sqlite3.Error, OSError), closing(_memory()) as memory, memory:
        memory.execute(
            "INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?)", (str(path.absolute()), kind, _state(path), value)
        )


def _state(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def _memory() -> sqlite3.Connection:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timesearch"
    folder.mkdir(parents=True, exist_ok=True)
    memory = sqlite3.connect(folder / "digests.sqlite", timeout=5)
    memory.execute("CREATE TABLE IF NOT EXISTS digests (path, kind, state, digest, PRIMARY KEY (path, kind))")
    return memory
