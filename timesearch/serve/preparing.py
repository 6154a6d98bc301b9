"""Videos are prepared once for all who ask about them, a few at a time, and apart from everything that is quick."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from timesearch.base.stopping import Stop
from timesearch.inference.ask import Asker, Say

_AT_ONCE = 2
"""Videos that are prepared at a time. ffmpeg alone keeps every core busy; the second keeps a long video from holding up
a short one."""
_NICENESS = 10
"""Of preparation: who waits for an answer comes first, at about a tenth of the weight (`man 7 sched`)."""


class _Preparation:
    """The work on one video, and who waits for it."""

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.stop = Stop()
        self.waiting: list[Say] = []
        self.said = "waiting for other videos"

    def tell(self, text: str) -> None:
        """To all who wait, and to who comes later."""
        self.said = text
        for say in self.waiting:
            say(text)


class Preparations:
    """The preparations that are under way; used from the event loop's thread."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="prepare", initializer=_give_way)
        self._running: dict[str, _Preparation] = {}

    async def prepared(self, video: Path, say: Say) -> str:
        """The name under which the caches know a video, once they hold it.

        Cancelled while it waits, it leaves the work to the others who wait, and ends it, ffmpeg included, where there
        are none.

        Args:
            video: the file.
            say: told what takes time.

        Raises:
            TimeSearchError: the video cannot be used, or the caches cannot be written.
        """
        name = await run_in_threadpool(self._asker.name_of, video)
        if await run_in_threadpool(self._asker.is_known_ready, video, name):
            return name
        work = self._running.get(name)
        if work is None:
            work = self._running[name] = _Preparation()
            work.task = asyncio.create_task(self._prepare(name, video, work))
            work.task.add_done_callback(_heed)
        work.waiting.append(say)
        say(work.said)
        try:
            await asyncio.shield(work.task)
        finally:
            work.waiting.remove(say)
            if not work.waiting:
                work.stop.ask()
                work.task.cancel()
                self._forget(name, work)
        return name

    async def _prepare(self, name: str, video: Path, work: _Preparation) -> None:
        loop = asyncio.get_running_loop()

        def say(text: str) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(work.tell, text)

        try:
            if not await run_in_threadpool(self._asker.is_ready, video):
                await loop.run_in_executor(self._pool, self._asker.prepare, video, say, work.stop)
        finally:
            self._forget(name, work)

    def _forget(self, name: str, work: _Preparation) -> None:
        if self._running.get(name) is work:
            del self._running[name]

    def close(self) -> None:
        """End all work."""
        for work in self._running.values():
            work.stop.ask()
        self._pool.shutdown(cancel_futures=True)


def _heed(task: asyncio.Task[None]) -> None:
    """Take note of how a task ended, which asyncio would complain of where nobody waited for it any more."""
    if not task.cancelled():
        task.exception()


def _give_way() -> None:
    """Let this thread, and the processes that it starts, compute when others do not; where the system can do that."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
