"""Nearly 300 values that have broken a program that reads them, or might, by what they pretend to be.

A value that stops a process, hangs it or ends in a traceback belongs here, beside the test of its own.
"""

from __future__ import annotations

import json
import math
from typing import Any

SURROGATE = "\ud83d"
"""Half of a surrogate pair: a str of Python that UTF-8 has no bytes for."""

_DAMAGED_CALLS = (
    *("<tool_call>", "<tool_call>{", "<tool_call></tool_call>", '<tool_call>{"name": 3}</tool_call>'),
    *(f"<tool_call>{opening * 5_000}</tool_call>" for opening in ("[", "{", '{"a":', "(", '["')),
    *('<tool_call>{"name": "seek_video_frames", "arguments": "' + "[" * 3_000 + '"}</tool_call>',),
    '<tool_call>{"name": "seek_video_frames", "arguments": {"query": "\\ud83d", "num_frames": ' + "9" * 5_000 + "}}",
    '<tool_call>{"name": "\\ud83d", "arguments": {"\\ud83d": "\\ud83d"}}</tool_call>',
    "<tool_call>{'name': 'seek_video_frames', 'arguments': {'query': 'a" + "\"')" * 330 + "}}</tool_call>",
    "<tool_call>{a" * 3_000,
)

TEXT: tuple[str, ...] = (
    *(
        "",
        " ",
        "\n",
        "\t\r\n",
        "\0",
        "a\0b",
        "\x1b[31mred",
        "\x7f",
        "\u200b",
        "\u202eright to left",
        "\ufeff",
        "\uffff",
    ),
    *(SURROGATE, f"a{SURROGATE}b", "\udc00", "\ud83d\ude00", "\U0010ffff", "e\u0301" * 500, "ﷺ" * 50, "İıſK"),
    *("a" * 100_000, " " * 100_000, "9" * 8_000, "視" * 300, "\n" * 10_000, "seconds " * 5_000, "1 seconds " * 5_000),
    *("<think>" * 5_000, "</think>" * 5_000, "<answer>" * 5_000, "<answer></answer>" * 3_000, "<think>a</think>" * 999),
    *(
        "<think></think><answer>B</answer>",
        "<answer>B",
        "<think><answer>B</answer>",
        "<answer><answer>B</answer></answer>",
    ),
    *("<|im_start|>system", "<|image_pad|>" * 100, "<|" * 5_000, "<|vision_start|><|image_pad|><|vision_end|>"),
    *("{question}", "{" * 1_000, "%s%n", "{0.__class__}", "${HOME}", "$(id)", "`id`", "'; DROP TABLE runs; --"),
    *(
        "<script>alert(1)</script>",
        "</script><img src=x onerror=1>",
        "&lt;",
        "=cmd|'/c calc'!A0",
        "http://a:b@c?token=d",
    ),
    *(
        "?token" * 3_000,
        "?tokentoken" * 2_000,
        "a:/" * 3_000,
        "Bearer " * 2_000,
        "[in#0/mov" * 2_000,
        "(video): 1 " * 999,
    ),
    *("null", "None", "NaN", "true", "[]", "{}", "B) cat", "(C) or (D)", "\uff22", "b", "ABCDEFG", "B" * 5_000),
    *_DAMAGED_CALLS,
)
NUMBERS: tuple[Any, ...] = (
    *(0, -0.0, -1, 1, 0.5, 1e-320, -1e-9, 1e308, -1e308, math.nan, math.inf, -math.inf, True, False, None),
    *(2**31, -(2**31), 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400),
    *("1", "1.5", "1e999", "nan", "inf", "-inf", "0x10", "1_000", "١٢", "²", "½", "1,5", "9" * 5_000, "1s", " 1 ", ""),
    *([], [1], {}, {"a": 1}, [[[]]]),
)
TIMES: tuple[Any, ...] = (
    *([1.0, 2.0], [2.0, 1.0], [1.0, 1.0], [-1.0, 2.0], [math.nan, 1.0], [0.0, math.inf], [1e308, -1e308], [None, 1.0]),
    *([[1.0, 2.0]], [[1.0, 2.0], [1.0]], [[[1.0, 2.0]]], [["1", "2"]], [1.0] * 10_000, [[0.0, 1.0]] * 5_000, [10**400]),
    *("1-2", "00:15-01:19", "1:2:3:4", "9" * 8_000 + ":1", "12:" * 3_000, "-1:-1", "25:61:61", "2026-11-25T00:00:00Z"),
    *(
        "[[1, 2",
        "```json\n[[1, 2]]\n```",
        '{"start_time": NaN, "end_time": 2}',
        "[[1e999, 2]]",
        "1 to",
        "to 2",
        "- - -",
    ),
)
PATHS: tuple[str, ...] = (
    *(".", "..", "/", "//", "../x.mp4", "a/../../x.mp4", "/etc/passwd", "~/x.mp4", "..\\x.mp4", "a/./b.mp4", "-x.mp4"),
    *(
        "a\0.mp4",
        "a" * 255 + ".mp4",
        "a" * 5_000,
        "a/" * 3_000,
        "視" * 100 + ".mp4",
        f"{SURROGATE}.mp4",
        "con.mp4",
        "x\n.mp4",
    ),
    *(
        "file:///etc/passwd",
        "http://[::1",
        "http://a:99999999/",
        "tar://a::b",
        "tar://" + ":" * 5_000,
        "s3://",
        "x::y::z",
    ),
    *("%2e%2e%2fx.mp4", "a%00.mp4", "a.mp4/", "a.mp4/b", "*.mp4", "[", "a?.mp4", "/proc/self/mem", "/dev/zero"),
)
JSON: tuple[str, ...] = (
    *("", " ", "{", "}", "[", "[1,]", '{"a"', '{"a":}', "nul", "NaN", "Infinity", "-", "1 2", '"', '"\\', '"\\u12'),
    *(
        "[" * 100_000,
        '{"a":' * 50_000,
        "[" * 65 + "]" * 65,
        "9" * 5_000,
        "-" + "9" * 400,
        "1e999",
        '"\\ud83d"',
        '{"a": 1}' * 2,
    ),
    *(
        '{"a": 1, "a": 2}',
        '{"\\ud83d": "\\udc00"}',
        "[NaN, Infinity]",
        "\ufeff{}",
        "// no\n{}",
        "{'a': 1}",
        "{a: 1}",
        "true",
    ),
    *(json.dumps({"choices": choices}) for choices in (None, [], {}, [None], [{}], [{"message": None}], "a", 3)),
    *(
        json.dumps({"choices": [{"message": message}]})
        for message in (
            3,
            [],
            {"content": 3},
            {"content": [1]},
            {"content": None, "tool_calls": 3},
            {"tool_calls": [{}]},
        )
    ),
    json.dumps(
        {"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": "many", "completion_tokens": -1}}
    ),
    json.dumps(
        {"choices": [{"message": {"content": None, "tool_calls": [{"function": {"name": 1, "arguments": []}}]}}]}
    ),
)
YAML: tuple[str, ...] = (
    *("[" * 100_000, "[" * 500, '{"a":' * 500, "- " * 30_000, "? " * 30_000, "&a " * 9_000, "&a [*a]", "&a {<<: *a}"),
    "a: &a {"
    + ", ".join(f"{letter}: 1" for letter in "abcdefghij")
    + "}\n"
    + "".join(f"{chr(n + 1)}: &{chr(n + 1)} {{<<: [{', '.join([f'*{chr(n)}'] * 10)}]}}\n" for n in range(97, 106)),
    "".join(
        f"{chr(n + 1)}: &{chr(n + 1)} [{', '.join([f'*{chr(n)}' if n > 96 else '1'] * 10)}]\n" for n in range(96, 106)
    ),
    *(f"seed: {'9' * 5_000}", f"seed: 0b{'1' * 60_000}", f"seed: {'1:' * 30_000}1", f"seed: {'1:' * 30_000}1.0"),
    *("seed: !!timestamp A", "seed: !!int ''", "seed: !!bool a", "seed: !!set {a: b}", "seed: 9999-99-99"),
    *("seed: !!python/object/apply:os.system [id]", "? [a]\n: b", "1: 2", "<<: a", "- 1", "a: b: c", "seed: .inf"),
    *(
        "frames: {fps: .nan}",
        "frames: {fps: 1e999}",
        'paths: {videos: "a\\0b"}',
        'profile: "\\ud83d"',
        "a: b\n" * 10_000,
    ),
)
BYTES: tuple[bytes, ...] = (
    *(
        b"",
        b"\0",
        b"\xff",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\x80abc",
        b"\xed\xa0\xbd",
        "{}".encode("utf-16"),
        b"PK\x03\x04",
    ),
    *(
        b"\x00" * 10_000,
        bytes(range(256)),
        b"<html><title>502</title>",
        b"\x1f\x8b\x08\x00",
        b"RIFF\xff\xff\xff\xffAVI ",
    ),
    *(b"\xff\xd8\xff\xe0" + b"\0" * 100, b"\x89PNG\r\n\x1a\n", b"[" * 100_000, b"\r\n" * 1_000, b"\xff" * 8 + b"{}"),
)
VALUES: tuple[Any, ...] = (*TEXT, *NUMBERS, *TIMES, *PATHS, *JSON)
"""All of them but the bytes, which no field of a row can hold."""
