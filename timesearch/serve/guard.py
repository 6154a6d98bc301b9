"""What stands before the routes: only requests that name this machine, from its own page, and bodies within bounds."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import AsyncIterator

from fastapi import HTTPException, Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

EVERY_ADDRESS = frozenset({"0.0.0.0", "::"})
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def is_named(header: str, host: str) -> bool:
    """Whether a request's `Host` names this machine, where the server is bound to `host`.

    A foreign page can make a name of its own lead here (DNS rebinding), and its requests bear that name. An address
    cannot be led elsewhere: a server at every address answers to any, and to the machine's own name.
    """
    parts = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+))(?::\d+)?", header)
    if parts is None:
        return False
    name = (parts[1] or parts[2]).lower()
    if name in ("127.0.0.1", "localhost", "::1", host.lower()):
        return True
    if host not in EVERY_ADDRESS:
        return False
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name == socket.gethostname().lower()


class Guard:
    """Refuses requests that name another machine or come from another site's page.

    Plain ASGI: the routes see for themselves when a client leaves.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        app = self._app
        if not is_named(host, self._host):
            app = Response("requests must name this machine: its address, or the name that --host gives it", 400)
        elif headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            app = Response("requests from other sites are refused", 403)  # a picture or player there sends no origin
        elif origin is not None and origin.partition("://")[2] != host:
            app = Response("requests from other sites are refused", 403)
        await app(scope, receive, send_with_headers)


def content_type(request: Request) -> str:
    """What a request says that its body is, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def body_of(request: Request, what: str, most: int) -> AsyncIterator[bytes]:
    """The body of a request, piece by piece.

    Args:
        request: one whose body was not read.
        what: is sent, for the sentence.
        most: bytes; a body that is announced to be longer is refused unread.

    Raises:
        HTTPException: 413 where it is longer, 400 where the client leaves before its end.
    """
    too_long = HTTPException(413, f"{what} is larger than {_spell(most)}")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > most):
        raise too_long
    size = 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > most:
                raise too_long
            yield piece
    except ClientDisconnect as error:
        raise HTTPException(400, f"{what} was cut off") from error


def _spell(size: int) -> str:
    return f"{size // 2**30} GiB" if size >= 2**30 else f"{size // 2**10} KiB"
