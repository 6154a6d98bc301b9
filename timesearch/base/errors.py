"""The errors that timesearch raises on purpose, each a sentence that says what is wrong, where, and what to do."""

from __future__ import annotations


def _in_a_line(text: str) -> str:
    """`text` with what steers a terminal, breaks a line or cannot be seen as escapes: foreign names may hold it."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class TimeSearchError(Exception):
    """Base of all errors raised on purpose; its text is fit to be shown to a person as it is.

    Args:
        message: a sentence; what cannot be shown in a line is escaped.
        end: lines to be shown below it, such as the end of a log.
    """

    def __init__(self, message: str = "", end: str = "") -> None:
        super().__init__("\n".join(map(_in_a_line, [message, *end.splitlines()])))


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


def first_line(error: BaseException) -> str:
    """The first line of what an error says; of one that says nothing, what it is."""
    return (str(error).splitlines() or [repr(error)])[0]


def last_line(error: BaseException) -> str:
    """The last line: of errors that say at length where they come from, and then what they are."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]
