"""Two commands at once in one folder: one works, the other is refused with a sentence that names it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from players import Puppet, answer_turn, build_library, script, search_turn
from scripted import OracleEncoder

from timesearch.base.errors import RequestError
from timesearch.base.exclusive import LOCK, BusyError, contents, exclusive
from timesearch.cli import main
from timesearch.data.rows import read_samples
from timesearch.search.engine_transformers import TransformersPolicy

Start = Callable[..., BaseProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Runs a function in a fork of this process, with an argument list of its own and its words in a file."""
    started = []

    def fork(work: Callable[..., object], *arguments: object, said: Path = Path(os.devnull)) -> BaseProcess:
        def child() -> None:
            sys.stdout = sys.stderr = said.open("a", buffering=1)
            work(*arguments)

        process = get_context("fork").Process(target=child)
        process.start()
        started.append(process)
        return process

    yield fork
    for process in started:
        process.kill()
        process.join()


def hold(folder: Path, ready: Path, seconds: float = 60) -> None:
    sys.argv = ["/somewhere/bin/timesearch", "infer", "--url", "http://user:planted@host/?token=planted"]
    with exclusive(folder):
        ready.touch()
        time.sleep(seconds)


def wait_for(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_free(folder: Path) -> bool:
    with exclusive(folder):
        return True


def test_who_works_in_a_folder_is_named(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "out"
    other = start(hold, folder, tmp_path / "ready")
    wait_for((tmp_path / "ready").exists)
    with pytest.raises(BusyError) as refusal, exclusive(folder):
        pass
    host = os.uname().nodename
    assert re.fullmatch(
        rf"`timesearch infer --url .+` \(process {other.pid} on {host}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\) "
        rf"works in {folder}: try again when it has ended",
        str(refusal.value),
    )
    assert "planted" not in str(refusal.value) + (folder / LOCK).read_text()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(BusyError), exclusive(tmp_path / "link"):
        pass
    os.kill(other.pid or 0, signal.SIGKILL)
    other.join()
    assert (folder / LOCK).exists()
    assert is_free(folder)
    assert not (folder / LOCK).exists()


def test_inside_a_block_that_holds_the_folder_it_is_free_and_in_another_thread_it_is_not(tmp_path: Path) -> None:
    refused = []

    def elsewhere() -> None:
        try:
            is_free(tmp_path)
        except BusyError as error:
            refused.append(str(error))

    with exclusive(tmp_path), exclusive(tmp_path / "."):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert f"(process {os.getpid()} on " in refused[0]
    assert is_free(tmp_path)


def test_a_child_that_inherits_the_lock_holds_it_when_its_parent_was_killed(tmp_path: Path, start: Start) -> None:
    def parent() -> None:
        with exclusive(tmp_path / "out") as lock:
            assert lock is not None
            child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
            (tmp_path / "child").write_text(str(child.pid))
            time.sleep(60)

    killed = start(parent)
    wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    read, write = os.pipe()  # the child's standard input ends with its parent; a SIGSTOP keeps it
    child = int((tmp_path / "child").read_text())
    os.kill(child, signal.SIGSTOP)
    killed.kill()
    killed.join()
    with pytest.raises(BusyError, match="what is left of `"), exclusive(tmp_path / "out"):
        pass
    os.kill(child, signal.SIGKILL)
    os.close(read), os.close(write)

    def freed() -> bool:
        try:
            return is_free(tmp_path / "out")
        except BusyError:
            return False

    wait_for(freed)


def test_what_a_kill_left_is_cleared_and_what_another_process_writes_below_is_not(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "results", tmp_path / "results" / "predictions"
    theirs.mkdir(parents=True)
    left, kept, alive = (
        ours / ".a.jsonl.0123abcd.partial",
        ours / ".notes.partial",
        theirs / ".b.jsonl.0123abcd.partial",
    )
    for path in (left, kept, alive):
        path.touch()
    with exclusive(ours):
        assert not alive.exists()
    alive.touch(), left.touch()

    def other() -> None:
        with exclusive(theirs):
            alive.touch()
            held.set()
            go_on.wait()

    held, go_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    with exclusive(ours):
        assert not left.exists()
        assert alive.exists()
        assert contents(ours) == [kept, theirs]
    go_on.set()
    thread.join()


@pytest.mark.parametrize(
    "note",
    [b"", b"{", b"[]", b"{}", b'{"pid": "1e999"}', b'{"pid": 1e400}', b"9" * 9000, b"\xff\xfe\x00", b"[" * 9000],
)  # fmt: skip
def test_a_note_that_says_nothing_is_a_process_without_a_name(
    tmp_path: Path, note: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timesearch.base.exclusive._NOTE_WITHIN", 0)
    path = tmp_path / LOCK
    path.write_bytes(note)
    with path.open() as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match=r"^another process works in "), exclusive(tmp_path):
            pass
    assert is_free(tmp_path)


def test_control_characters_of_a_note_stay_in_it(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.write_text(json.dumps({"pid": 1, "host": "h\x1b[31m", "command": "a\nb", "since": "\u202e"}))
    with path.open() as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(BusyError) as refusal, exclusive(tmp_path):
            pass
    assert str(refusal.value).isprintable()


def test_where_no_folder_can_be_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RequestError, match="is a file, where a folder is needed"), exclusive(place):
            pass
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / LOCK).mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / LOCK).symlink_to(tmp_path / "victim")
    for place in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(RequestError, match="is no file"), exclusive(place):
            pass
    assert not (tmp_path / "victim").exists()


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    with exclusive(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "c").mkdir()
    with exclusive(tmp_path / "c"):
        pass
    assert (tmp_path / "c").is_dir()


def test_without_locks_or_the_right_to_write_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        with exclusive(tmp_path) as lock:
            assert lock is None
    assert "its file system has no locks (No locks available)" in capsys.readouterr().err

    def read_only(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        with exclusive(tmp_path) as lock:
            assert lock is None


# Every command that writes a folder: its arguments, the folder, and the function that does its work.
COMMANDS: dict[str, tuple[Sequence[str], str, str]] = {
    "download": ([], "cache/videos", "timesearch.video.download.run_batch"),
    "models": ([], "models", "timesearch.models._bring"),
    "frames": ([], "cache/frames", "timesearch.base.batch.run_batch"),
    "frames of files": (["a.mp4", "--out", "my/frames"], "my/frames", "timesearch.base.batch.run_batch"),
    "features": ([], "cache/features", "timesearch.base.batch.run_batch"),
    "coldstart": ([], "runs/coldstart", "timesearch.training.coldstart.coldstart_here"),
    "train": ([], "runs/train", "timesearch.training.launch._run"),
    "infer": ([], "results/predictions", "timesearch.inference.infer.write_failures"),
    "evaluate": ([], "results", "timesearch.evaluation.evaluate.evaluate_files"),
    "evaluate of files": (
        ["--predictions", "own.jsonl", "--out", "my/results"], "my/results",
        "timesearch.evaluation.scoring.evaluate_files",
    ),
    "report": ([], "results", "timesearch.report.build.write_results_report"),
    "curate": (["--out", "curation"], "curation", "timesearch.training.curate._curate"),
}  # fmt: skip


def command_line(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command whose work is a stand-in: it writes into the command's folder, and waits amid that for `go-on`."""
    arguments, folder, work = COMMANDS[command]

    def write(*_: object, **__: object) -> Any:
        with (place / folder / "written.txt").open("w") as file:
            print(os.getpid(), "began", file=file, flush=True)
            wait_for((place / "go-on").exists)
            print(os.getpid(), "ended", file=file)
        raise SystemExit(0)

    monkeypatch.chdir(place)
    monkeypatch.setattr("timesearch.tracking.stage_run", lambda *_: nullcontext())
    monkeypatch.setattr("timesearch.inference.infer.stage_run", lambda *_: nullcontext(Mock()))
    monkeypatch.setattr("timesearch.evaluation.evaluate.stage_run", lambda *_: nullcontext())
    monkeypatch.setattr("timesearch.retrieval.features.default_encoder", lambda _: OracleEncoder())
    monkeypatch.setattr(work, write)
    monkeypatch.setattr(sys, "argv", ["timesearch", command.split()[0], *arguments])
    main([command.split()[0], *arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_of_two_at_once_one_works_and_one_is_refused(
    command: str, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    for name in ("data/train.jsonl", "data/test.jsonl"):
        (tmp_path / name).write_text('{"id": "1", "video": "a.mp4", "question": "?", "answer": "red"}\n')
    for name in ("own.jsonl", "a.mp4", "results/predictions/grpo_csv.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "params.yaml").write_text(
        "judge: {kind: rule}\ninfer: {baselines: []}\ntrain: {generation: transformers}\n"
    )
    for name in ("runs/train", "runs/coldstart"):
        (tmp_path / name).mkdir(parents=True)
    if command == "infer":  # with nothing to play, its work is to put the files into order
        (tmp_path / "data/test.jsonl").write_text("")
        monkeypatch.setattr("timesearch.inference.infer._report", lambda *_: None)
        monkeypatch.setattr("timesearch.inference.infer.read_samples", lambda *_: [])
    said = [tmp_path / "said-0", tmp_path / "said-1"]
    folder = COMMANDS[command][1]
    first = start(command_line, command, tmp_path, monkeypatch, said=said[0])
    wait_for(lambda: first.exitcode is not None or (tmp_path / folder / "written.txt").exists())
    second = start(command_line, command, tmp_path, monkeypatch, said=said[1])
    second.join(60)
    (tmp_path / "go-on").touch()
    assert second.exitcode == 75, said[1].read_text()
    first.join(60)
    assert first.exitcode == 0, said[0].read_text()
    words = said[1].read_text().strip()
    assert words.startswith(f"timesearch: `timesearch {command.split()[0]}")
    assert f"(process {first.pid} on " in words
    assert f"works in {folder}: try again when it has ended" in words
    assert "\n" not in words
    lines = (tmp_path / folder / "written.txt").read_text().splitlines()
    assert lines == [f"{first.pid} began", f"{first.pid} ended"]
    assert not (tmp_path / folder / LOCK).exists()


@pytest.mark.parametrize("later", [0, 2, 5])
def test_two_infers_leave_every_row_once(
    later: int, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second starts after `later` rows of the first are written; then it is started again, until it is let in."""
    settings = build_library(tmp_path, videos=2, questions=3)
    settings.infer.concurrency, settings.tracking.traced_episodes = 1, 0
    settings.infer.baselines = ["coldstart"]
    for folder in (settings.paths.coldstart, settings.paths.train):
        folder.mkdir(parents=True)
    (tmp_path / "params.yaml").write_text(json.dumps(settings.model_dump(mode="json")))
    speak = script(search_turn(num_frames=1), answer_turn())

    def slowly(messages: Any) -> str:
        time.sleep(0.03)
        return speak(messages)

    monkeypatch.setattr(TransformersPolicy, "load", classmethod(lambda *_: Puppet(slowly)))
    monkeypatch.setattr("timesearch.retrieval.encoder.load_encoder", lambda *_, **__: OracleEncoder())
    monkeypatch.setattr("timesearch.inference.infer.stage_run", lambda *_: nullcontext(Mock()))
    monkeypatch.setattr("timesearch.inference.infer._report", lambda *_: None)
    folder = settings.paths.results / "predictions"
    arguments = ["infer", "--params", str(tmp_path / "params.yaml")]
    said = [tmp_path / "first", *(tmp_path / f"second-{number}" for number in range(1000))]
    first = start(main, arguments, said=said[0])
    written = folder / "coldstart.jsonl.partial"
    wait_for(lambda: not later or (written.exists() and len(written.read_text().splitlines()) >= later))
    codes = []
    while 0 not in codes:
        second = start(main, arguments, said=said[len(codes) + 1])
        second.join()
        codes.append(second.exitcode)
        assert codes[-1] in (0, 75), said[len(codes)].read_text()
    first.join()
    assert first.exitcode in (0, 75 if not later else 0)
    ids = sorted(sample.id for sample in read_samples(settings.paths.test_samples))
    for method in ("coldstart", "grpo_csv"):
        rows = [json.loads(line) for line in (folder / f"{method}.jsonl").read_text().splitlines()]
        assert sorted(row["id"] for row in rows) == ids
        assert Counter(row["error"] for row in rows) == {None: len(ids)}
    assert sorted(path.name for path in folder.iterdir()) == [
        "coldstart.json", "coldstart.jsonl", "grpo_csv.json", "grpo_csv.jsonl",
    ]  # fmt: skip
