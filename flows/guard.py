"""Keeps foreign web pages out of the Prefect server of this project.

A browser lets any page that its user opens send requests to this machine. Prefect's settings (`prefect.toml`) keep
such a page from reading answers and from changing anything; they leave open WebSockets, by which it can read all
events, and names of a foreign page's own that lead here (DNS rebinding), by which it becomes the server's own page.
Both are refused here, by the headers `Origin` and `Host`, which a page cannot choose. Programs send no `Origin` and
are let through: who can start one on a machine that reaches the server needs no browser.

It is a plugin of Prefect: an entry point of this project, which Prefect calls wherever it is imported, if
`prefect.toml` enables plugins. `server.api.cors_allowed_origins` lists the pages that are let in besides the server's
own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from prefect.plugins import HookContext, register_hook
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketClose


@register_hook
def setup_environment(*, ctx: HookContext) -> None:
    """Put the guard where Prefect's server puts its middleware for foreign origins."""
    import fastapi.middleware.cors

    fastapi.middleware.cors.CORSMiddleware = Guard  # type: ignore[assignment,misc]


class Guard(CORSMiddleware):
    """Starlette's middleware for foreign origins, which here refuses them, and WebSockets too."""

    def __init__(self, app: Any, allow_origins: Collection[str] = (), **options: Any) -> None:
        super().__init__(app, allow_origins=[*allow_origins], **options)
        self._origins = {origin.strip().lower() for origin in allow_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a foreign page with 403."""
        headers = Headers(scope=scope) if scope["type"] in ("http", "websocket") else None
        if headers is None or is_ours(headers.get("host", ""), headers.get("origin"), self._origins):
            await super().__call__(scope, receive, send)
        elif scope["type"] == "http":
            detail = "a page of another origin may not use this server: see server.api.cors_allowed_origins"
            await JSONResponse({"detail": detail}, 403)(scope, receive, send)
        else:
            await WebSocketClose(1008)(scope, receive, send)


def is_ours(host: str, origin: str | None, origins: Collection[str]) -> bool:
    """Whether a request comes from no page, from the server's own page, or from one of `origins`.

    Args:
        host: the header `Host`. A name that somebody else may own is refused, unless one of `origins` has it; an
            address, and a name without a dot (as containers have), nobody else can lead here.
        origin: the header `Origin`; None where there is none.
        origins: such as ``http://localhost:4200``.
    """
    try:
        parts = urlsplit(f"//{host}")
        named, _ = parts.hostname or "", parts.port  # which is checked when it is asked for
        listed = {urlsplit(each).hostname for each in origins}
    except ValueError:
        return False
    if not (_is_address(named) or "." not in named or named.endswith((".localhost", ".internal")) or named in listed):
        return False
    return origin is None or origin.lower() in origins or origin.lower().partition("://")[2] == host.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
