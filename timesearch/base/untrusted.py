"""Text that a model, a file, a server or a user wrote, read so that nothing in it can stop the process.

JSON has three ways to break a reader that trusts it: a number of thousands of digits (`ValueError` from ``int``), a
nesting that exhausts the stack (`RecursionError`), and half of a surrogate pair, which can be written nowhere
(`UnicodeEncodeError`, far from where it came in). `parse_json` bounds the first two and mends the third; every reader
of the project goes through it.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from itertools import accumulate
from typing import Any

MAX_DEPTH = 64
"""Lists and objects inside each other, at most. No format that is read here nests deeper than ten."""
MAX_BYTES = 64 * 2**20
"""Bytes (or characters) of one JSON text, at most. The longest row that is read, an episode with its words, is under
one MiB; a file that holds a whole data set gives a bound of its own."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_LONG_INTEGER = re.compile(r"[0-9]{19}")  # 64-bit integers have 19 digits at most
_STRING = re.compile(r'"(?:[^"\\]++|\\.|\\\Z)*+"?', re.DOTALL)  # also one that is left open: a search never restarts
_NO_BRACKETS = re.compile(r"[^\[\]{}]++")
_DIGITS = bytes(b"0"[0] if chr(byte).isdecimal() else b"e"[0] if chr(byte) in "eE" else 32 for byte in range(128)) + (
    b" " * 128
)
"""A text's numbers by their shape: each digit is 0, the mark of an exponent e."""


class UntrustedError(ValueError):
    """A text that is not JSON, or not within bounds; it says why in a few words, to be put into a sentence."""


def marked_encoding(start: bytes) -> str | None:
    """UTF-16 or UTF-32, where a text's first four bytes hold its byte-order mark; UTF-8's says nothing new."""
    marks = (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16")
    return next((name for mark, name in (*marks, (codecs.BOM_UTF16_BE, "utf-16")) if start.startswith(mark)), None)


def mend_text(text: str) -> str:
    """`text` with each half of a surrogate pair, which UTF-8 has no bytes for, replaced by U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


def parse_json(text: str | bytes | bytearray, max_bytes: int = MAX_BYTES) -> Any:
    """Read a JSON text that may be hostile.

    A byte-order mark is passed over. A number that no double holds (``NaN``, ``Infinity``, ``1e999``) is read as None,
    which is what pandas and NumPy mean by it in the files that they write. An integer of more than 64 bits becomes a
    float.

    Args:
        text: JSON; bytes in UTF-8, UTF-16 or UTF-32, told apart as RFC 8259 has it.
        max_bytes: a longer text is refused unread.

    Raises:
        UntrustedError: no JSON, too long, or nested deeper than `MAX_DEPTH`.
    """
    if len(text) > max_bytes:
        raise UntrustedError(f"longer than {max_bytes / 2**20:g} MiB")
    if isinstance(text, bytes | bytearray):
        try:
            text = text.decode(json.detect_encoding(text))
        except UnicodeDecodeError:
            raise UntrustedError("not UTF-8 text") from None
    text = text.removeprefix("\ufeff")
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise UntrustedError("nested too deeply")
    # Most texts hold no long integer, and are then read by the parser's own, faster hooks.
    whole = _whole if _LONG_INTEGER.search(text) else None
    try:
        value = json.loads(text, parse_int=whole, parse_float=_finite, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UntrustedError(f"{error.msg}, {line}column {error.colno}") from None
    return _mended(value) if "\\u" in text or _SURROGATE.search(text) else value


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


def _whole(digits: str) -> int | float | None:
    if len(digits) <= 20 and -(2**63) <= (number := int(digits)) < 2**64:
        return number
    return _finite(digits)


def is_plain(line: bytes) -> bool:
    """Whether a reader that accepts a JSON text, and no lone surrogate, is sure to read it as `parse_json` does.

    That is so without numbers that `parse_json` reads in its own way, and within its depth.
    """
    shape = line.translate(_DIGITS, b"+")
    odd = b"NaN" in line or b"Infinity" in line or b"0" * 19 in shape or b"0e000" in shape
    return not odd and (line.count(b"[") + line.count(b"{") <= MAX_DEPTH or _depth(line.decode("latin-1")) <= MAX_DEPTH)


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings, counted without recursion."""
    brackets = _NO_BRACKETS.sub("", _STRING.sub("", text))
    return max(accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0)


def _mended(value: Any) -> Any:
    """A JSON value whose strings and keys went through `mend_text`; its depth is bounded already."""
    if isinstance(value, str):
        return mend_text(value)
    if isinstance(value, list):
        return [_mended(item) for item in value]
    if isinstance(value, dict):
        return {mend_text(key): _mended(item) for key, item in value.items()}
    return value
