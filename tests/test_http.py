"""What of HTTP is worth another try."""

from __future__ import annotations

import socket
import ssl

import aiohttp
import httpx
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from tenacity import RetryError, Retrying

from timesearch.base.errors import RequestError
from timesearch.base.http import BadReplyError, RefusedError, check_address, may_pass, status_may_pass, tries


class WithStatus(Exception):
    """As aiohttp and the model hub say it: by the error's own status, or by its response's."""

    def __init__(self, status: int) -> None:
        self.response = httpx.Response(status)


@pytest.mark.parametrize(
    ("passes", "statuses"),
    [
        (True, (408, 425, 429, 500, 502, 503, 504, 507, 520, 524, 529)),
        (False, (200, 302, 307, 400, 401, 403, 404, 409, 413, 422, 451, 501, 505, 508, 511)),
    ],
)
def test_which_statuses_may_pass(passes: bool, statuses: tuple[int, ...]) -> None:
    assert {status: status_may_pass(status) for status in statuses} == dict.fromkeys(statuses, passes)
    assert all(may_pass(WithStatus(status)) == passes for status in statuses)
    assert all(may_pass(RefusedError(status, b"")) == passes for status in statuses)


def with_cause(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("passes", "error"),
    [
        (True, httpx.ConnectError("refused")),
        (True, httpx.ReadTimeout("late")),
        (True, httpx.RemoteProtocolError("Server disconnected without sending a response.")),
        (True, httpx.RemoteProtocolError("peer closed connection without sending complete message body")),
        (False, httpx.RemoteProtocolError("illegal status line")),
        (False, httpx.UnsupportedProtocol("ftp")),
        (False, httpx.LocalProtocolError("Illegal header value")),
        (False, with_cause(httpx.ConnectError("certificate"), ssl.SSLCertVerificationError("self-signed"))),
        (False, BadReplyError("a web page")),
        (True, aiohttp.ClientConnectionError("gone")),
        (True, aiohttp.ServerTimeoutError("late")),
        (False, aiohttp.InvalidURL("nowhere")),
        (True, TimeoutError()),
        (True, ConnectionResetError()),
        (True, socket.gaierror(socket.EAI_AGAIN, "no name server")),
        (False, OfflineModeIsEnabled("by the environment")),
        (False, FileNotFoundError("x")),
        (False, PermissionError("x")),
        (False, OSError(28, "disk full")),
        (False, ValueError("x")),
    ],
)
def test_which_failures_may_pass(passes: bool, error: BaseException) -> None:
    assert may_pass(error) == passes


def test_tries_end_by_number_by_time_and_where_waiting_is_vain() -> None:
    def asked(error: BaseException, **limits: float) -> int:
        retrying = Retrying(**tries(**limits, longest=0.0))

        def fail() -> None:
            raise error

        with pytest.raises((RetryError, type(error))):
            retrying(fail)
        return int(retrying.statistics["attempt_number"])

    assert asked(ConnectionError(), count=3) == 3
    assert asked(ConnectionError(), seconds=0.0) == 1
    assert asked(RefusedError(501, b""), count=3) == 1


@pytest.mark.parametrize(
    "url", ["", "localhost:8000/v1", "ftp://h/v1", "http://", "http://h:99999/v1", "http://[::1/v1"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match="is no address of a server"):
        check_address(url)
    check_address("http://user:word@[::1]:8000/v1")
