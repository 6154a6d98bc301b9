"""A file, whole or the part of it that a request asks for, as players ask (RFC 9110, sections 13 and 14)."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from email.utils import formatdate
from pathlib import Path

from fastapi import Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

_RANGE = re.compile(r"bytes[ \t]*=[ \t]*(\d{1,18})?-(\d{1,18})?", re.ASCII | re.IGNORECASE)
"""One range. More than one, other units, and what cannot be read are answered by the whole file, as the RFC allows: no
player asks for several."""
_PIECE = 2**18
"""Bytes that are read at once; the next when the client has taken these."""


class Part(Response):
    """An answer with a file or a part of it: 200, 206, 304 or 416. Plain ASGI.

    The file is opened once, and what is checked is what is sent. Where it shrinks meanwhile the connection is closed,
    so that nobody takes the piece for the whole.

    Args:
        path: links followed; it must not be a link.
        kind: its media type.

    Raises:
        OSError: it is not there, may not be read, or is no regular file.
    """

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__()
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            self._file.close()
            raise FileNotFoundError(f"{path} is no regular file")
        self._size, self._kind = status.st_size, kind
        self._tag = f'"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"'
        self._date = formatdate(status.st_mtime, usegmt=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        with self._file:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Headers(scope=scope)
        head = {
            "Accept-Ranges": "bytes",
            "Cache-Control": "private, no-cache",
            "ETag": self._tag,
            "Last-Modified": self._date,
        }
        if unchanged(asked, self._tag):
            await Response(status_code=304, headers=head)(scope, receive, send)
            return
        first, last = 0, self._size
        status = 200
        wanted = self._range(asked)
        if wanted is not None:
            first, last = wanted
            if first >= last:
                head["Content-Range"] = f"bytes */{self._size}"
                await Response(status_code=416, headers=head)(scope, receive, send)
                return
            status = 206
            head["Content-Range"] = f"bytes {first}-{last - 1}/{self._size}"
        head |= {"Content-Type": self._kind, "Content-Length": str(last - first)}
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in head.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        if scope["method"] == "HEAD":
            first = last
        leaving = asyncio.ensure_future(_left(receive))
        try:
            while first < last and not leaving.done():
                piece = await run_in_threadpool(os.pread, self._file.fileno(), min(_PIECE, last - first), first)
                if not piece:
                    return
                first += len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        finally:
            leaving.cancel()
        if first >= last:
            await send({"type": "http.response.body", "body": b""})

    def _range(self, asked: Headers) -> tuple[int, int] | None:
        """First byte and the one after the last; nothing between them where there is no such part, None for all."""
        condition = asked.get("if-range")
        if condition is not None and condition not in (self._tag, self._date):
            return None
        said = _RANGE.fullmatch(asked.get("range", "").strip())
        if said is None or said[1] is said[2] is None:
            return None
        if said[1] is None:
            return max(0, self._size - int(said[2])), self._size
        first = int(said[1])
        if said[2] is None:
            return first, self._size
        if int(said[2]) < first:
            return None  # no range at all
        return first, min(int(said[2]) + 1, self._size)


async def _left(receive: Receive) -> None:
    """Wait until the client leaves: what is sent to it then goes nowhere, and would still be read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def unchanged(asked: Headers, tag: str) -> bool:
    """Whether the client holds what bears `tag` already."""
    known = asked.get("if-none-match")
    return known is not None and (known.strip() == "*" or tag in [each.strip() for each in known.split(",")[:32]])
