"""The errors that timesearch raises on purpose, each a sentence that says what is wrong, where, and what to do."""

from __future__ import annotations


class TimeSearchError(Exception):
    """Base of all errors raised on purpose; its text is fit to be shown to a person as it is."""


class RequestError(TimeSearchError):
    """The request itself is wrong (a bad argument, setting or sample file): nothing was done. Exit code 2."""


class ItemError(TimeSearchError):
    """One item of many cannot be processed: it is quarantined and the others go on. Exit code 1.

    `reason` is a short stable word for counting and filtering, such as ``not_a_video``.
    """

    reason = "failed"

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class CacheMismatchError(TimeSearchError):
    """A cached file does not belong to what it is used with; the text names both sides."""


class TemporaryError(TimeSearchError):
    """Something outside did not answer: the same request may succeed later. Exit code 75 (EX_TEMPFAIL of sysexits)."""
