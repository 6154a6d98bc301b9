"""What is wrong with a request, in the form that its address's clients read; and errors that nobody foresaw."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from timesearch.base.untrusted import mend_text

SENTENCE = 500
"""Characters of a refusal at most."""
_log = logging.getLogger(__name__)


def refusal(
    path: str, status: int, sentence: str, headers: Mapping[str, str] | None = None, code: str | None = None
) -> JSONResponse:
    """A sentence under ``detail``; at addresses below ``/v1`` as OpenAI's clients read it.

    Args:
        path: of the request.
        status: 4xx where the request is at fault.
        sentence: what is wrong, and what to do.
        headers: to send with it.
        code: a stable word for programs, of those that OpenAI uses.
    """
    said = mend_text(sentence)[:SENTENCE]
    openai = path == "/v1" or path.startswith("/v1/")
    body: dict[str, Any] = {"error": openai_error(status, said, code)} if openai else {"detail": said}
    return JSONResponse(body, status, headers=headers)


def openai_error(status: int, sentence: str, code: str | None = None) -> dict[str, str | None]:
    """The object under ``error`` of OpenAI's answers."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": sentence, "type": kind, "param": None, "code": code}


def described(errors: Sequence[Any], what: str = "the question") -> str:
    """The first of pydantic's errors, without what was sent."""
    where = ".".join(str(part) for part in errors[0]["loc"])[:SENTENCE]
    return f"{where or what} cannot be read: {errors[0]['msg']}"


def unforeseen(error: Exception) -> str:
    """A sentence for an error that is nobody's request's fault: one question's trouble must not be any other's."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    _log.error("a question failed: %s: %.300s (%s, line %s)", type(error).__name__, error, *place[:2])
    return f"this question could not be answered ({type(error).__name__}): ask it in another way"
