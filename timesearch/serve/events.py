"""Server-sent events: what some work tells while it goes on, until it ends or the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi.responses import StreamingResponse

from timesearch.base.untrusted import mend_text

Tell = Callable[[str], None]
"""Takes one event, as text."""
_SILENCE = ": it goes on\n\n"


def event(data: Any, name: str | None = None) -> str:
    """An event with its data as JSON, and its name where it has one."""
    named = "" if name is None else f"event: {name}\n"
    return f"{named}data: {mend_text(json.dumps(data, ensure_ascii=False))}\n\n"


def streamed(work: Callable[[Tell], Awaitable[None]], pause: float | None = None) -> StreamingResponse:
    """Answer with what `work` tells, as it tells it; when the client leaves, the work ends.

    Args:
        work: is called once the answer has begun.
        pause: seconds of silence after which a comment keeps the connection open; None: it is left silent.
    """
    return StreamingResponse(
        _events(work, pause), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _events(work: Callable[[Tell], Awaitable[None]], pause: float | None) -> AsyncIterator[str]:
    told: asyncio.Queue[str | None] = asyncio.Queue()

    async def run() -> None:
        try:
            await work(told.put_nowait)
        finally:
            told.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while True:
            try:
                said = await asyncio.wait_for(told.get(), pause)
            except TimeoutError:
                said = _SILENCE
            if said is None:
                break
            yield said
    finally:
        task.cancel()
