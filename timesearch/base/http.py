"""Requests over HTTP: which failures are worth another try, how the tries are spaced, how a foreign reply is read.

A server may answer with anything: a login page, an error under status 200, a body without end. A reply is read within
bounds of size and time and checked against a typed model; what does not fit is one of three errors. `RefusedError`: the
server says no. `BadReplyError`: it is no server of this protocol, or a broken one. An `httpx.TransportError`: there was
no answer, and a later one may come (`may_pass`).
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from timesearch.base.errors import RequestError
from timesearch.base.redaction import redact
from timesearch.base.untrusted import UntrustedError, parse_json

if TYPE_CHECKING:
    import httpx

M = TypeVar("M", bound=BaseModel)

MAX_REPLY = 4 * 2**20
"""Bytes of a reply, at most: a turn of 100,000 tokens is under one MiB."""
_MAX_REFUSAL = 64 * 2**10
"""Bytes that are read of what a server says beside an error's status."""
_SHOWN = 300
_PASSING = frozenset({408, 425, 429})
_LASTING = frozenset({501, 505, 506, 508, 510, 511})
"""Statuses above 500 that tell of the request, not of the moment (RFC 9110 and 6585): not implemented, the protocol's
version, loops, a missing extension, a login to the network."""


class RefusedError(Exception):
    """A server answered with an error, by its status or by an error object; `body` is the start of what it wrote."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status, self.body = status, body
        super().__init__(_said(body))


class BadReplyError(Exception):
    """A reply that does not fit the protocol; the text says in a few words what it is."""


def status_may_pass(status: int) -> bool:
    """Whether a request that was answered with an HTTP status may succeed later."""
    return status in _PASSING or (500 <= status < 600 and status not in _LASTING)


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error of this module, httpx, requests, aiohttp or the model hub; None without one."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: after breaks and overload, not refusals or wrong certificates."""
    import httpx

    if (status := status_of(error)) is not None:
        return status_may_pass(status)
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, ssl.SSLCertVerificationError) or getattr(link, "reason", "") == "WRONG_VERSION_NUMBER":
            return False
        link = link.__cause__ or link.__context__
    if isinstance(error, httpx.RemoteProtocolError):  # a connection that broke, or what is no HTTP
        return "closed" in str(error) or "disconnected" in str(error)
    lasting = _loaded("aiohttp.InvalidURL", "huggingface_hub.errors.OfflineModeIsEnabled")
    if isinstance(error, (httpx.UnsupportedProtocol, httpx.LocalProtocolError, *lasting)):
        return False
    broken = _loaded("aiohttp.ClientError", "huggingface_hub.errors.HTTPError")
    return isinstance(error, (httpx.TransportError, TimeoutError, ConnectionError, socket.gaierror, *broken))


def _loaded(*names: str) -> list[type[BaseException]]:
    """The classes of these full names whose modules are loaded: no other module can have raised an error."""
    places = (name.rpartition(".") for name in names)
    return [getattr(sys.modules[module], kind) for module, _, kind in places if module in sys.modules]


def tries(
    *,
    seconds: float | None = None,
    count: int | None = None,
    longest: float = 10.0,
    passes: Callable[[BaseException], bool] = may_pass,
) -> dict[str, Any]:
    """Arguments for tenacity's `Retrying` and `AsyncRetrying`: growing, jittered pauses while a failure may pass.

    Args:
        seconds: no further try begins later than this after the first.
        count: tries at most, the first included.
        longest: seconds of a pause, at most.
        passes: tells failures that are worth another try.
    """
    from tenacity import retry_if_exception, stop_after_attempt, stop_after_delay, wait_random_exponential

    return {
        "retry": retry_if_exception(passes),
        "stop": stop_after_attempt(count) if count is not None else stop_after_delay(seconds or 0.0),
        "wait": wait_random_exponential(multiplier=0.5, max=longest),
    }


def check_address(url: str) -> None:
    """Check that a base URL can be one.

    Raises:
        RequestError: it is not an address.
    """
    import httpx

    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and bool(httpx.URL(url))
    except (ValueError, httpx.InvalidURL):
        fits = False
    if not fits:
        raise RequestError(f"{redact(url)} is no address of a server: write it as http://HOST:PORT/v1")


async def request(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    kind: type[M],
    *,
    content: bytes | None = None,
    timeout: float,
    limit: int = MAX_REPLY,
) -> M:
    """Send a request with a JSON body and read the reply as `kind`.

    Args:
        timeout: seconds until the reply must be whole.
        limit: bytes of the reply, at most.

    Raises:
        RefusedError: the server answered with an error.
        BadReplyError: the reply is not of this kind.
        httpx.TransportError: no answer.
    """
    with _lasting_named():
        body = _Body(limit, timeout)
        try:
            async with (
                asyncio.timeout(timeout),
                client.stream(method, url, content=content, headers=_JSON, follow_redirects=True) as response,
            ):
                body.status = response.status_code
                async for chunk in response.aiter_bytes():
                    if not body.add(chunk):
                        break
        except TimeoutError:
            raise _late(timeout) from None
        return _read(body.whole(), kind, limit)


def request_now(
    client: httpx.Client,
    method: str,
    url: str,
    kind: type[M],
    *,
    content: bytes | None = None,
    timeout: float,
    limit: int = MAX_REPLY,
) -> M:
    """`request` for a thread that waits for the reply."""
    with _lasting_named():
        body = _Body(limit, timeout)
        options: dict[str, Any] = {"headers": _JSON, "follow_redirects": True, "timeout": timeout}
        with client.stream(method, url, content=content, **options) as reply:
            body.status = reply.status_code
            for chunk in reply.iter_bytes():
                if not body.add(chunk):
                    break
        return _read(body.whole(), kind, limit)


_JSON = {"Content-Type": "application/json"}


class _Body:
    """The bytes of a reply as they come, within bounds."""

    def __init__(self, limit: int, timeout: float) -> None:
        self.status = 0
        self._limit, self._timeout = limit, timeout
        self._deadline = time.monotonic() + timeout
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, chunk: bytes) -> bool:
        """Keep a chunk; False where the rest is not wanted."""
        if time.monotonic() > self._deadline:
            raise _late(self._timeout)
        self._parts.append(chunk)
        self._size += len(chunk)
        if not self._fine():
            return self._size < _MAX_REFUSAL
        if self._size > self._limit:
            raise BadReplyError(f"a reply longer than {self._limit / 2**20:g} MiB")
        return True

    def whole(self) -> bytes:
        data = b"".join(self._parts)
        if not self._fine():
            raise RefusedError(self.status, data[:_MAX_REFUSAL])
        return data

    def _fine(self) -> bool:
        return 200 <= self.status < 300


def _late(timeout: float) -> httpx.ReadTimeout:
    import httpx

    return httpx.ReadTimeout(f"no whole reply within {timeout:g} s")


@contextmanager
def _lasting_named() -> Iterator[None]:
    """What no later try can mend in an exchange becomes a `BadReplyError`."""
    import httpx

    try:
        yield
    except (httpx.DecodingError, httpx.StreamError) as error:
        raise BadReplyError(f"a body that is not in the encoding that it states ({error})") from error
    except httpx.TooManyRedirects as error:
        raise BadReplyError("redirects without end") from error
    except httpx.InvalidURL as error:
        raise BadReplyError(f"a redirect to what is no address ({error})") from error
    except httpx.TransportError as error:
        if may_pass(error):
            raise
        raise BadReplyError(f"no HTTP ({redact(str(error))})") from error


def _read(data: bytes, kind: type[M], limit: int) -> M:
    """A reply's JSON as a model.

    Raises:
        RefusedError: an error object under a status of success; its own code counts where it has one.
        BadReplyError: no JSON, or not of this kind.
    """
    if not data.strip():
        raise BadReplyError("an empty reply")
    try:
        value = parse_json(data, limit)
    except UntrustedError as error:
        raise BadReplyError(f"no JSON ({error}) but {_said(data[:_MAX_REFUSAL])[:100]!r}") from None
    if isinstance(value, dict) and value.get("error"):
        code = value["error"].get("code") if isinstance(value["error"], dict) else None
        raise RefusedError(code if type(code) is int and 400 <= code < 600 else 200, data[:_MAX_REFUSAL])
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        wrong = first["msg"].partition(" or instance of")[0]
        raise BadReplyError(f"JSON of another form ({field[:80]}: {wrong[:120]})") from None


def _said(body: bytes) -> str:
    """What a server wrote, in a line: an error object's message, a page's title, else how it begins."""
    text = body.decode("utf-8", errors="replace")
    try:
        value = parse_json(body)
    except UntrustedError:
        value = None
    if isinstance(value, dict):
        inner = value.get("error") or value
        inner = (inner.get("message") or inner.get("detail") or inner) if isinstance(inner, dict) else inner
        text = inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)
    elif text.lstrip().startswith("<"):
        _, found, rest = text.partition("<title>")
        title = rest.partition("</title>")[0] if found else ""
        text = f"a web page {title.strip()!r}" if title.strip() else "a web page"
    return printable(text) or "an empty reply"


def printable(text: str) -> str:
    """The start of a foreign text in one line, fit for a terminal and without secrets."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text[: 10 * _SHOWN]).split())
    return redact(line)[:_SHOWN]
