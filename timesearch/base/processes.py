"""Child processes that never outlive their parent.

A command runs under a small guard (`python -m timesearch.base.processes`, standard library only) in a process group of
its own. The guard ends the whole group when it is told to stop, when the command ends, and when the parent is gone,
however that died: a process killed by SIGKILL runs no clean-up of its own, so somebody else has to watch it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_POLL = 0.3
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def start_guarded(
    command: Sequence[str],
    *,
    grace: float = 5.0,
    stdout: int | IO[bytes] | IO[str] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[str]:
    """Start `command` under a guard; its exit status is the command's.

    `terminate()` or SIGINT on the returned process asks the whole group to stop, and after `grace` seconds kills it.

    Args:
        command: program and arguments; no shell is involved.
        grace: seconds between the request to stop and SIGKILL.
        stdout: where standard output and error go together, as for `subprocess.Popen`.
        env: the whole environment; None passes this process's on.
        cwd: working directory of the command.
        pass_fds: open files that the guard keeps, a lock for example; the command does not get them.
    """
    guard = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(grace), *command]
    return subprocess.Popen(
        guard,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=None if stdout is None else subprocess.STDOUT,
        env=env,
        cwd=cwd,
        pass_fds=pass_fds,
        text=True,
        errors="replace",
    )


def stop(process: subprocess.Popen[str], patience: float = 15.0) -> None:
    """Stop a guarded process and wait until its group is gone."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _die_with_guard() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _reap(child: subprocess.Popen[bytes]) -> None:
    """Collect ended members of the group, of which this process is the adoptive parent; keep the child's status."""
    child.poll()
    while child.returncode is not None:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


def _end_group(child: subprocess.Popen[bytes], first: int, grace: float) -> None:
    deadline = time.monotonic() + grace
    number = first
    while True:
        _reap(child)
        if not _group_alive(child.pid):
            return
        if number:
            os.killpg(child.pid, number)
            number = 0
        elif time.monotonic() > deadline:
            os.killpg(child.pid, signal.SIGKILL)
        time.sleep(0.05)


def _guard(parent: int, grace: float, command: list[str]) -> int:
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, frame: asked.append(received))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_guard)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    while child.poll() is None and not asked and os.getppid() == parent:
        try:
            child.wait(_POLL)
        except subprocess.TimeoutExpired:
            continue
    _end_group(child, asked[0] if asked else signal.SIGTERM, grace)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    raise SystemExit(_guard(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
