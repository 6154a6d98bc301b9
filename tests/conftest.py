"""Fixtures that several tests share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Started in the background of a script, Python and its children would ignore the Ctrl-C that tests send."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Inputs with the outputs of the published reference implementation."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def footage() -> Path:
    """Real clips in several codecs."""
    return Path(__file__).parent / "footage"


@pytest.fixture(autouse=True)
def _no_tracking_server_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow puts the store that a process writes to into the environment, where the next test would find it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
