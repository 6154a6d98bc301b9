"""What the Prefect UI shows besides states and logs. It is a picture of the work, and never stops it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

from timesearch.base.redaction import redact

logger = logging.getLogger(__name__)

_UNREACHABLE = (httpx.HTTPError, PrefectException, OSError)


class Progress:
    """A progress artifact of a task, moved at most every few seconds.

    A thread of its own talks to Prefect: whoever shows progress reads a stage's output, and the stage would soon wait
    for its reader if that waited for Prefect.
    """

    def __init__(self, stage: str, every: float = 5.0) -> None:
        self._stage, self._every = stage, every
        self._percent: float | None = None
        self._ended = threading.Event()
        self._reporter = threading.Thread(target=copy_context().run, args=(self._report,), name="progress", daemon=True)

    def __enter__(self) -> Progress:
        self._reporter.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None and self._percent is not None:
            self._percent = 100.0
        self._ended.set()
        self._reporter.join(self._every)

    def show(self, percent: float) -> None:
        """Show `percent` (0 to 100) done."""
        self._percent = percent

    def _report(self) -> None:
        artifact: UUID | None = None
        shown = None
        ended = False
        while not ended:
            ended = self._ended.wait(self._every)
            percent = self._percent
            if percent is None or percent == shown:
                continue
            try:
                if artifact is None:
                    artifact = _identity(
                        create_progress_artifact(
                            percent, key=f"{self._stage}-progress", description=f"{self._stage}, %"
                        )
                    )
                else:
                    update_progress_artifact(artifact, percent)
                shown = percent
            except _UNREACHABLE as error:
                logger.warning("Prefect did not take the progress of %s: %s; work goes on", self._stage, error)


def show_markdown(key: str, text: str, description: str) -> None:
    """Show a text under `key`, a name of lower-case letters and dashes."""
    try:
        create_markdown_artifact(redact(text), key=key, description=description)
    except _UNREACHABLE as error:
        logger.warning("Prefect did not take the artifact %s: %s", key, error)


def show_plan(stale: Sequence[str], stages: Sequence[str]) -> None:
    """Show which stages are stale at the start of a run."""
    rows = [f"| {stage} | {'changed' if stage in stale else 'up to date'} |" for stage in stages]
    show_markdown("plan", "\n".join(["| stage | DVC says |", "| --- | --- |", *rows]), "what is stale")


def show_results(tree: Path, results: Path) -> str:
    """Show the table of results; returns it, or an empty text where there is none."""
    table = tree / results / "table.md"
    if not table.is_file():
        return ""
    text = table.read_text(encoding="utf-8")
    show_markdown("results", text, "what training bought")
    return text


def _identity(value: Any) -> UUID:
    assert isinstance(value, UUID)
    return value
