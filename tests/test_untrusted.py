"""The reader of JSON that a model, a file, a server or a user wrote."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timesearch.base.untrusted import MAX_DEPTH, UntrustedError, mend_text, parse_json

finite = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | finite | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(plain)
def test_what_json_writes_is_read_as_json_reads_it(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text) == value


@given(st.text(alphabet='[]{}",:\\ud8fe019.-eEnrtNaInfity \ud800\udfff', max_size=300) | st.binary(max_size=300))
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    try:
        value = parse_json(text)
    except UntrustedError:
        return
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"b":'])
def test_deep_nesting_is_refused_at_any_depth(opening: str) -> None:
    for times in (MAX_DEPTH + 1, 1_000, 100_000, 1_000_000):
        with pytest.raises(UntrustedError, match="nested too deeply"):
            parse_json(opening * times)


def test_brackets_in_strings_do_not_nest() -> None:
    value = ["[" * 500, '"[{' * 500, "\\" * 501 + "{" * 500]
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps([[]] * 500)) == [[]] * 500


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9" * 5_000, None),
        ("-" + "9" * 300, -1e300),
        (str(2**62), 2**62),
        ("[NaN, Infinity, -Infinity, 1e999]", [None] * 4),
        ('"\\ud83d"', "\ufffd"),
        ('"\\ud83d\\ude00"', "\U0001f600"),
        ('{"\\udc00": "\ud800"}', {"\ufffd": "\ufffd"}),
        (b"\xef\xbb\xbf[1]", [1]),
        ("\ufeff[1]", [1]),
        ("[1]".encode("utf-16"), [1]),
    ],
)
def test_members_of_the_kinds(text: str | bytes, value: Any) -> None:
    assert parse_json(text) == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize("text", ["", "{", "[1,]", "nul", "\x00", b"\xff\xfe\xfd", b"\x80abc", "1 2"])
def test_what_is_no_json_is_said(text: str | bytes) -> None:
    with pytest.raises(UntrustedError):
        parse_json(text)


def test_a_longer_text_is_refused_unread() -> None:
    with pytest.raises(UntrustedError, match="longer than 1 MiB"):
        parse_json(" " * 2**21, max_bytes=2**20)


@given(st.text(alphabet=st.characters()))
def test_mended_text_can_be_written(text: str) -> None:
    assert mend_text(text + "\ud83d").encode().decode() == mend_text(text) + "\ufffd"
