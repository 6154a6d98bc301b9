"""One stage through DVC: DVC decides whether it is stale, runs its command, and records what came out."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from timesearch.base.errors import TimeSearchError
from timesearch.base.processes import start_guarded, stop
from timesearch.base.redaction import redact

STAGES = ("download", "models", "frames", "features", "subtitles", "coldstart", "train", "infer", "evaluate")

_UNCHANGED = "didn't change, skipping"
_HINTS = ("To track the changes", "git add", "To enable auto staging", "dvc config core.autostage", "Use `dvc push`")
_EXITED = re.compile(r"exited with (-?\d{1,9})")
_PROGRESS = re.compile(r"^[\w -]++: (?P<done>\d{1,15})/(?P<total>\d{1,15})\b")
_ANSI = re.compile(r"\x1b\[[0-9;?]*+[A-Za-z]")
_TAIL_LINES = 12
_INTERRUPTED = 130
_TEMPORARY = 75


class StageFailedError(TimeSearchError):
    """A stage's command failed; `status` is its exit status, negative or above 128 if a signal ended it."""

    def __init__(self, stage: str, status: int, tail: str) -> None:
        super().__init__(f"stage {stage!r} failed with exit status {status}:", tail)
        self.status = status

    @property
    def passes(self) -> bool:
        """Whether trying again can help: a server or the network was away, or a signal (out of memory) ended it."""
        return self.status == _TEMPORARY or ((self.status < 0 or self.status > 128) and self.status != _INTERRUPTED)


def stale_stages(
    tree: Path, stages: Sequence[str] = STAGES, line: Callable[[str], None] = lambda text: None
) -> list[str]:
    """Those of `stages` whose own inputs or outputs changed, in order; stages after them may turn stale as these run.

    While a stage runs in the tree DVC refuses to look at what it writes: its end is waited for, and `line` is told.

    Raises:
        TimeSearchError: DVC cannot read the project.
    """
    command = [*dvc(), "status", "--json", *stages]
    env = _environment(tree, {})
    with turn(tree, line):
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TimeSearchError(f"dvc status failed in {tree}: {redact(done.stderr.strip() or done.stdout.strip())}")
    changed = json.loads(done.stdout)
    return [stage for stage in stages if stage in changed]


def reproduce(
    stage: str,
    tree: Path,
    *,
    line: Callable[[str], None],
    progress: Callable[[float], None] | None = None,
    env: Mapping[str, str] | None = None,
) -> bool:
    """Bring the outputs of one stage up to date.

    Two runs in one tree take turns: the second waits for the first, even for what is left of a killed one.

    Args:
        stage: name of the stage.
        tree: folder of `dvc.yaml`.
        line: told each line of output, without secrets and terminal codes.
        progress: told per cent done, as the output shows it.
        env: added to the environment of the stage's command.

    Returns:
        True if the stage ran, False if DVC found it up to date.

    Raises:
        StageFailedError: its command failed.
    """
    tail: list[str] = []
    ran = True
    status = None
    with turn(tree, line) as lock:
        process = start_guarded(
            [*dvc(), "repro", "--single-item", stage],
            stdout=subprocess.PIPE,
            cwd=tree,
            env=_environment(tree, env or {}),
            pass_fds=(lock.fileno(),),
            grace=20.0,
        )
        try:
            assert process.stdout is not None
            for raw in process.stdout:
                text = redact(_ANSI.sub("", raw).rstrip())
                if not text or text.lstrip().startswith(_HINTS):
                    continue
                line(text)
                tail = [*tail[-_TAIL_LINES:], text]
                ran = ran and _UNCHANGED not in text
                if exited := _EXITED.search(text):
                    status = int(exited[1])
                if progress and (counts := _PROGRESS.match(text)):
                    progress(100 * int(counts["done"]) / max(1, int(counts["total"])))
            process.wait()
        finally:
            stop(process, patience=30.0)
    if process.returncode:
        raise StageFailedError(stage, process.returncode if status is None else status, "\n".join(tail))
    return ran


@contextmanager
def turn(tree: Path, line: Callable[[str], None]) -> Iterator[IO[str]]:
    """Hold the tree's lock, under which its outputs are written; `line` is told if it is waited for.

    The guard of a stage's processes holds it too, so that it outlives a killed flow.
    """
    path = tree / ".dvc" / "tmp" / "stage.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        waiting = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    line("another run works in this folder: waiting for its stage to end")
                    waiting = True
                time.sleep(0.5)
        _remove_cut_record(path.with_name("rwlock"))
        yield lock


def _remove_cut_record(record: Path) -> None:
    """Remove DVC's record of who reads and writes what, where a kill cut it off: it writes that in place, and refuses
    every command from then on. One that is being written is whole a moment later.
    """
    for _ in range(3):
        try:
            json.loads(record.read_bytes())
        except FileNotFoundError:
            return
        except ValueError:
            time.sleep(0.5)
        else:
            return
    record.unlink(missing_ok=True)


def dvc() -> list[str]:
    """DVC's command, of this environment."""
    return [sys.executable, "-m", "dvc"]


def _environment(tree: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The command `timesearch` and its code are the tree's own, which may be another revision than this."""
    paths = [str(tree.absolute()), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TQDM_MININTERVAL": "10",
        "DVC_NO_ANALYTICS": "1",
        **extra,
    }
