"""Videos that came with a question: kept among the uploads for the next one, within bounds.

One that was not asked about for `KEPT_FOR` goes, and while all together are larger than `KEPT`, the one that was not
asked about for longest; its caches go with it. That is looked after when a server starts and with each video that
comes. One that is being worked on stays: a request holds a shared lock on its file (`flock`), which other servers over
the same folder see, and which the system lets go of however the work ends.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from timesearch.base.errors import ItemError
from timesearch.serve.videos import Videos

KEPT_FOR = 7 * 86400.0
"""Seconds since the last question."""
KEPT = 8 * 2**30
"""Bytes of all of them."""
_CUT_OFF = 86400.0
"""Seconds without a byte after which an upload is what a killed server left."""
_NAME = re.compile(r"attached-[0-9a-f]{16}\.\w+")


def attached_name(digest: str, suffix: str) -> str:
    """What an attached video is called.

    Args:
        digest: of its bytes, in hex.
        suffix: with its dot.
    """
    return f"attached-{digest[:16]}{suffix}"


class Attached:
    """The attached videos; may be used by several threads, and by several processes over one folder.

    Args:
        videos: whose folder of uploads holds them.
        forget: removes what was made of a video.
    """

    def __init__(self, videos: Videos, forget: Callable[[Path], None]) -> None:
        self._videos, self._folder, self._forget = videos, videos.uploads.resolve(), forget

    def holds(self, path: Path) -> bool:
        """Whether a video is one of them."""
        return path.parent == self._folder and _NAME.fullmatch(path.name) is not None

    def keep(self, partial: Path, name: str) -> tuple[str, AbstractContextManager[object]]:
        """Give a whole upload its name, and make room for it.

        Args:
            partial: as `Videos.keep`.
            name: as `attached_name`.

        Returns:
            Its identity, and what `use` gives of it.

        Raises:
            OSError: the folder takes no more.
        """
        with self._alone():
            identity = self._videos.keep(partial, name)["id"]
            using = self.use(self._videos.path(identity))
            self._clear()
        return identity, using

    def use(self, path: Path) -> AbstractContextManager[object]:
        """What keeps a video from being cleared away until it is closed; any other video needs none.

        Raises:
            ItemError: `missing_file`: it has just been cleared away.
        """
        if not self.holds(path):
            return nullcontext()
        try:
            file = path.open("rb")
            with suppress(OSError):  # a file system without locks, on which `_remove` gets none either
                fcntl.flock(file, fcntl.LOCK_SH)
            status = path.stat()
            if not os.path.samestat(status, os.fstat(file.fileno())):
                raise FileNotFoundError
        except OSError as error:
            raise ItemError(f"there is no video {path.name} any more: attach it again", "missing_file") from error
        with suppress(OSError):
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))  # by the time of change the caches know it
        return file

    def clear(self) -> None:
        """Clear away what is beyond the bounds, and what uploads left that were cut off."""
        with suppress(OSError), self._alone():  # where there is no folder that can be read, nothing is listed either
            self._clear()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep others, of other processes too, from clearing what was just found to be there."""
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _clear(self) -> None:
        now = time.time()
        held: list[tuple[float, int, Path]] = []
        for path in self._folder.iterdir():
            with suppress(OSError):
                status = path.stat()
                if self.holds(path):
                    held.append((status.st_atime, status.st_size, path))
                elif path.match(".*.partial") and now - status.st_mtime > _CUT_OFF:
                    path.unlink()
        total = sum(size for _, size, _ in held)
        for used, size, path in sorted(held):
            if total <= KEPT and now - used <= KEPT_FOR:
                return
            if self._remove(path):
                total -= size

    def _remove(self, path: Path) -> bool:
        """Remove a video that nobody uses; says whether it did."""
        with suppress(OSError, ItemError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._forget(path)
            path.unlink()
            return True
        return False
