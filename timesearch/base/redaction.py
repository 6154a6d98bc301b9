"""Secrets are taken out of every text that leaves a process: logs, artifacts, records and error messages."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

_HIDDEN = "***"
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL|AUTH_STRING", re.IGNORECASE)
# Texts that are redacted may come from anywhere: each takes time in proportion to them (`tests/test_linear.py`).
_USER_INFO = re.compile(r"(\w:/{1,2})[^/\s@'\"]++@")
_QUERY = re.compile(
    r"([?&;](?=[\w.-]++=[^&;\s'\"#<>])"
    r"(?:[\w.-]*?(?:token|secret|signature|password|api_?key|access_?key|credential)[\w.-]*+|sig|key|auth)=)"
    r"[^&;\s'\"#<>]++",
    re.IGNORECASE,
)
_HEADER = re.compile(r"\b(Bearer|Basic)\s++[A-Za-z0-9._~+/=-]{6,}+")
_SHORTEST = 6
"""Values of secret variables below this length (such as ``1``) are words, not secrets."""


def redact(text: str) -> str:
    """Replace secrets in `text` by ``***``.

    Secrets are the user part of URLs, query parameters and authorisation headers that carry a credential, and the
    value of every environment variable whose name says that it holds one (``HF_TOKEN``, ``AWS_SECRET_ACCESS_KEY``).
    """
    for name in list(os.environ):
        # Another thread may take a variable away meanwhile, as MLflow's does while it is imported.
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST and _SECRET_NAME.search(name) and value in text:
            text = text.replace(value, _HIDDEN)
    text = _USER_INFO.sub(rf"\1{_HIDDEN}@", text)
    text = _QUERY.sub(rf"\1{_HIDDEN}", text)
    return _HEADER.sub(rf"\1 {_HIDDEN}", text)


def show_log(log: Path, start: int) -> int:
    """Print on standard error what another process has written to a log from `start` on; returns the log's length."""
    if not log.is_file():
        return start
    with log.open("rb") as handle:
        handle.seek(start)
        text = handle.read()
    sys.stderr.write(redact(text.decode("utf-8", "replace")))
    sys.stderr.flush()
    return start + len(text)


def redact_value(value: Any) -> Any:
    """`redact` in all strings of a JSON value."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_value(item) for item in value]
    return value
