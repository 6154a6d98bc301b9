"""Failures of fetching from a model hub: some may pass, others ask for another request."""

from __future__ import annotations

import socket

from timesearch.errors import RequestError, TemporaryError, TimeSearchError

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


def unreached() -> tuple[type[BaseException], ...]:
    """What is raised where the hub does not answer, or answers with an error."""
    from huggingface_hub.errors import HTTPError

    return ConnectionError, TimeoutError, socket.gaierror, HTTPError


def fetch_error(what: str, error: BaseException) -> TimeSearchError:
    """The error to raise where `error` ended a fetch.

    Args:
        what: a sentence without its end: what cannot be fetched or loaded.
        error: what a library raised; the reason is looked for in the errors that led to it, too.

    Returns:
        TemporaryError if the hub could not be reached or is busy; RequestError if it refused, or nothing tells.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    message = f"{what}: {(str(error).splitlines() or [repr(error)])[0][:300]}"
    link: BaseException | None = error
    while link is not None:
        status = getattr(getattr(link, "response", None), "status_code", None)
        if status is not None:
            return (TemporaryError if status in _PASSING else RequestError)(message)
        if isinstance(link, unreached()) and not isinstance(link, OfflineModeIsEnabled):
            return TemporaryError(message)
        link = link.__cause__ or link.__context__
    return RequestError(message)
