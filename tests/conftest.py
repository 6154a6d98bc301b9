"""Fixtures that several tests share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Log, logged


def pytest_configure() -> None:
    """Started in the background of a script, Python and its children would ignore the Ctrl-C that tests send."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Tests start some hundred Python programs. Where nothing may be kept of what Python compiles, as in many images of
    # containers, each of them would compile Prefect, MLflow, PyTorch or vLLM anew: half of the time of all tests.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Over several workers, take the longest files first, and in each the longest tests first.

    What is long says so: `@pytest.mark.takes(seconds)`. xdist sends a worker the next file two tests before the end of
    the one that it has, where it would wait behind a long test.
    """
    if not hasattr(config, "workerinput"):
        return
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    longest_first = sorted(files.values(), key=lambda tests: sum(map(_seconds, tests)), reverse=True)
    items[:] = [item for tests in longest_first for item in sorted(tests, key=_seconds, reverse=True)]


def _seconds(item: pytest.Item) -> float:
    mark = item.get_closest_marker("takes")
    return float(mark.args[0]) if mark else 0.0


@pytest.fixture(scope="session")
def golden() -> Path:
    """Inputs with the outputs of the published reference implementation."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def footage() -> Path:
    """Real clips in several codecs."""
    return Path(__file__).parent / "footage"


@pytest.fixture(scope="module")
def server_log() -> Iterator[Log]:
    """What any logger says while a file's tests run."""
    with logged() as kept:
        yield kept


@pytest.fixture
def no_traceback(server_log: Log) -> Iterator[None]:
    """Nothing that a request does reaches the server's log as a traceback, or as a task that nobody looked after."""
    before = len(server_log.records)
    yield
    assert server_log.bad_since(before) == []


@pytest.fixture(autouse=True)
def _no_tracking_server_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow puts the store that a process writes to into the environment, where the next test would find it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
