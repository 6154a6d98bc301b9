"""Failures of fetching from a model hub: some may pass, others ask for another request."""

from __future__ import annotations

import socket

from timesearch.base.errors import RequestError, TemporaryError, TimeSearchError, first_line
from timesearch.base.http import may_pass, status_of


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
    message = f"{what}: {first_line(error)[:300]}"
    link: BaseException | None = error
    while link is not None:
        if may_pass(link):
            return TemporaryError(message)
        if status_of(link) is not None:
            return RequestError(message)
        link = link.__cause__ or link.__context__
    return RequestError(message)
