"""One command at a time writes into a folder; a second one is refused, and told who works there.

Who works in a folder holds a lock on the file `.timesearch.lock` in it, and writes into it who that is. The system
lets go of the lock when its process ends, however it ends, so that a kill leaves a file but no lock. The file is
removed with the lock's end: no output of a stage contains it.

The locks are `flock`, which local file systems have, and NFS and most cluster file systems too, between their machines.
Where there is none (Lustre mounted without `flock`, some FUSE), a line says that two commands at once are not told
apart there.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from timesearch.base.errors import RequestError, TemporaryError
from timesearch.base.progress import console
from timesearch.base.redaction import redact
from timesearch.base.untrusted import UntrustedError, parse_json

LOCK = ".timesearch.lock"
"""Name of the file in a folder that is worked in."""
_PARTIAL = ".*." + "[0-9a-f]" * 8 + ".partial"
"""What `timesearch.base.files.atomic_path` writes to."""
_NOTE_BYTES = 4096
_NOTE_WITHIN = 1.0
"""Seconds within which the holder of a lock has written who it is."""

_held: dict[Path, tuple[int, int | None]] = {}
"""Lock files that this process holds: the thread that took them, and the open file."""


class BusyError(TemporaryError):
    """Another process works in the folder; the text names it."""


@contextmanager
def exclusive(folder: Path) -> Iterator[int | None]:
    """Hold `folder` for this process, and clear what a killed process left half-written in it.

    Inside a block that holds it already, in the same thread, this does nothing.

    Yields:
        The open lock file. A child process that inherits it holds the folder too, also when this process is killed.
        None where there is nothing to hold: a folder that cannot be written, or a file system without locks.

    Raises:
        BusyError: another process works in the folder.
        RequestError: `folder` is a file.
    """
    path = folder.resolve() / LOCK
    thread, held = _held.get(path, (None, None))
    if thread == threading.get_ident():
        yield held
        return
    ours = not folder.exists()
    handle = _take(path, folder)
    if handle is None:
        yield None
        return
    _held[path] = threading.get_ident(), handle
    try:
        _clear(path.parent)
        yield handle
    finally:
        del _held[path]
        with suppress(OSError):
            path.unlink()  # while it is still held: who opens the path after this makes a file of their own
            if ours:
                folder.rmdir()  # where nothing was made in it
        os.close(handle)


def contents(folder: Path) -> list[Path]:
    """What is in a folder that is held, in order of name, without the lock."""
    return sorted(path for path in folder.iterdir() if path.name != LOCK) if folder.is_dir() else []


def _take(path: Path, folder: Path) -> int | None:
    deadline = time.monotonic() + _NOTE_WITHIN
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = _open(path)
        except FileNotFoundError:  # the folder was removed again, by who made it and found nothing to do
            continue
        except (FileExistsError, NotADirectoryError) as error:
            raise RequestError(f"{error.filename} is a file, where a folder is needed: name another place") from error
        if handle is None:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.lstat()):
                    _write_note(handle)
                    return handle
        except BlockingIOError as error:
            holder = _holder(handle)
            if holder or time.monotonic() > deadline:
                os.close(handle)
                raise BusyError(
                    f"{holder or 'another process'} works in {folder}: try again when it has ended"
                ) from error
            time.sleep(0.02)
        except OSError as error:
            os.close(handle)
            console.print(
                f"{folder}: its file system has no locks ({error.strerror}): see to it that no other command writes "
                "there meanwhile",
                markup=False,
                highlight=False,
            )
            return None
        os.close(handle)


def _open(path: Path) -> int | None:
    """The lock file, made where it is not there; None in a folder that cannot be written."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise RequestError(f"{path} is no file ({error.strerror}): remove it") from error
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    try:  # another user's, who may hold it
        return os.open(path, flags | os.O_RDONLY)
    except OSError:
        return None


def _write_note(handle: int) -> None:
    name = Path(sys.argv[0]).name
    command = ["timesearch" if name == "__main__.py" else name, *sys.argv[1:]]
    note = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": redact(shlex.join(command))[:200],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(note).encode(), 0)


def _holder(handle: int) -> str:
    """Who holds the lock, in words; empty where they have not written it yet."""
    try:
        note = parse_json(os.pread(handle, _NOTE_BYTES, 0))
        pid, host, command, since = int(note["pid"]), note["host"], note["command"], note["since"]
    except (UntrustedError, TypeError, KeyError, ValueError, OverflowError):
        return ""
    ended = host == socket.gethostname() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists()
    named = f"`{command}` (process {pid} on {host}, since {since})"
    printable = "".join(letter if letter.isprintable() else "?" for letter in named)
    return f"what is left of {printable}" if ended else printable


def _clear(folder: Path) -> None:
    """Remove partial files of killed processes, but not from folders below that another process holds."""
    for place, folders, files in os.walk(folder):
        if LOCK in files and Path(place) != folder:
            folders.clear()
            continue
        for name in fnmatch.filter(files, _PARTIAL):
            Path(place, name).unlink(missing_ok=True)
