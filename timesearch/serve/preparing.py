"""Videos are prepared once for all who ask about them, a few at a time, and apart from everything that is quick."""

from __future__ import annotations

from pathlib import Path

from starlette.concurrency import run_in_threadpool

from timesearch.base.stopping import Stop
from timesearch.inference.ask import Asker, Say
from timesearch.serve.together import Together

_AT_ONCE = 2
"""Videos that are prepared at a time. ffmpeg alone keeps every core busy; the second keeps a long video from holding up
a short one."""


class Preparations:
    """The preparations that are under way; used from the event loop's thread."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self._work = Together(_AT_ONCE, "prepare", "waiting for other videos")

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

        async def prepare(tell: Say, stop: Stop) -> None:
            if not await run_in_threadpool(self._asker.is_ready, video):
                await self._work.in_turn(self._asker.prepare, video, tell, stop)

        await self._work.done(name, say, prepare)
        return name

    def close(self) -> None:
        """End all work."""
        self._work.close()
