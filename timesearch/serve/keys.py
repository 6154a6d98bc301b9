"""The key that requests must bear, where one is set.

Programs send it as ``Authorization: Bearer KEY``. A browser gets a page that asks for it, at whatever address it
opened, and from then on sends a cookie: what a keyed digest makes of the key, so that the key itself is kept nowhere.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path
from urllib.parse import parse_qs, quote

from fastapi import HTTPException, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Receive, Scope, Send

from timesearch.base.errors import RequestError
from timesearch.serve.guard import body_of, content_type
from timesearch.serve.refusals import refusal

VARIABLE = "TIMESEARCH_API_KEY"
"""The environment variable that holds the key, where no file is named."""
_ENTRANCE = Path(__file__).parent / "entrance"
_SHORTEST, _LONGEST = 16, 512
_ADVICE = "make one by `openssl rand -hex 32`"


def read_key(file: Path | None) -> str | None:
    """The key in a file, else in the environment; None where there is neither.

    Raises:
        RequestError: the file cannot be read, or what it holds is no key; the text never repeats it.
    """
    where = str(file or VARIABLE)
    try:
        text = file.read_text("ascii") if file is not None else os.environ.get(VARIABLE)
    except OSError as error:
        raise RequestError(f"the key file {file} cannot be read ({error.strerror}): {_ADVICE}") from error
    except ValueError:
        text = ""
    if text is None:
        return None
    key = text.strip()
    if not _SHORTEST <= len(key) <= _LONGEST or not key.isascii() or not key.isprintable() or " " in key:
        raise RequestError(
            f"{where} holds no key of {_SHORTEST} to {_LONGEST} letters, digits and signs without spaces: {_ADVICE}"
        )
    return key


class Keyed:
    """Lets only requests in that bear the key.

    Plain ASGI, as `Guard`.

    Args:
        app: what they reach.
        key: as `read_key` gives it.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._digest = app, _digest(key)
        token = hmac.new(key.encode(), b"timesearch page", hashlib.sha256).hexdigest()
        # Cookies are of a machine, not of a port: two servers with keys of their own must not take each other's away.
        self._name, self._token = f"timesearch-{token[:8]}", token[8:]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, ask for the key, or take it."""
        app = self._app
        if scope["type"] == "http":
            request = Request(scope, receive)
            if not self._bears(request):
                app = await self._ask(request)
        await app(scope, receive, send)

    def _bears(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._is_key(given.strip())
        token = cookie_parser(request.headers.get("cookie", "")).get(self._name, "")
        return hmac.compare_digest(_digest(token), _digest(self._token))

    def _is_key(self, given: str) -> bool:
        return hmac.compare_digest(_digest(given), self._digest)

    async def _ask(self, request: Request) -> Response:
        path = request.url.path
        if request.method == "GET" and path == "/entrance.css":
            return FileResponse(_ENTRANCE / "entrance.css")
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return _entrance("This server asks for its key.")
        if request.method == "POST" and content_type(request) == "application/x-www-form-urlencoded" and _is_page(path):
            return await self._take(request)
        return refusal(
            path,
            401,
            "this server asks for its key: send it as `Authorization: Bearer KEY`, or open the page in a browser again",
            {"WWW-Authenticate": "Bearer"},
            "invalid_api_key",
        )

    async def _take(self, request: Request) -> Response:
        """Answer the form: the key opens the page that it was asked for at."""
        try:
            body = b"".join([piece async for piece in body_of(request, "the key", 4 * _LONGEST)])
            given = parse_qs(body.decode("ascii"), max_num_fields=2).get("key", [""])[0].strip()
        except (HTTPException, ValueError):
            given = ""
        if not self._is_key(given):
            return _entrance("That is not the key.")
        path = "/" + quote(request.url.path.lstrip("/\\"))  # two slashes would lead to another machine
        query = f"?{request.url.query}" if request.url.query else ""
        response = RedirectResponse(path + query, 303)
        response.set_cookie(self._name, self._token, httponly=True, samesite="lax")
        return response


def _digest(text: str) -> bytes:
    """Digests are compared, so that no time tells how long a key is."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _is_page(path: str) -> bool:
    return not path.startswith(("/api/", "/v1/", "/mcp"))


def _entrance(said: str) -> Response:
    page = (_ENTRANCE / "entrance.html").read_text(encoding="utf-8")
    return HTMLResponse(page.replace("SAID", said), 401, {"WWW-Authenticate": "Bearer", "Cache-Control": "no-store"})
