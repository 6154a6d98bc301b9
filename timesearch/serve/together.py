"""Long work that is done once for all who wait for it, a few pieces at a time, and given up when nobody does."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from timesearch.base.stopping import Stop
from timesearch.inference.ask import Say

T = TypeVar("T")
_NICENESS = 10
"""Of such work: who waits for an answer comes first, at about a tenth of the weight (`man 7 sched`)."""


class _Work:
    """A piece of work, and who waits for it."""

    task: asyncio.Task[None]

    def __init__(self, said: str) -> None:
        self.stop = Stop()
        self.waiting: list[Say] = []
        self.said = said

    def tell(self, text: str) -> None:
        """To all who wait, and to who comes later."""
        self.said = text
        for say in self.waiting:
            say(text)


class Together:
    """The pieces that are under way; used from the event loop's thread.

    Args:
        at_once: pieces that are worked on at a time.
        name: of the threads.
        queued: said while a piece waits for its turn.
    """

    def __init__(self, at_once: int, name: str, queued: str) -> None:
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix=name, initializer=_give_way)
        self._queued = queued
        self._running: dict[str, _Work] = {}

    async def done(self, key: str, say: Say, begin: Callable[[Say, Stop], Awaitable[None]]) -> None:
        """Wait until a piece of work is done, which is begun where it is not under way.

        Cancelled while it waits, it leaves the work to the others who wait, and ends it, child processes included,
        where there are none.

        Args:
            key: of the piece.
            say: told what takes time.
            begin: does it; may say what it does from any thread, and must end when `Stop` asks.
        """
        work = self._running.get(key)
        if work is None:
            work = self._running[key] = _Work(self._queued)
            work.task = asyncio.create_task(self._run(key, work, begin))
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
                self._forget(key, work)

    async def in_turn(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function in one of the threads, when one is free."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def _run(self, key: str, work: _Work, begin: Callable[[Say, Stop], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()

        def say(text: str) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(work.tell, text)

        try:
            await begin(say, work.stop)
        finally:
            self._forget(key, work)

    def _forget(self, key: str, work: _Work) -> None:
        if self._running.get(key) is work:
            del self._running[key]

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
