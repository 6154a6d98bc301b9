"""What reads text from a model, a file or a user takes time in proportion to it.

Every pattern in the code is found in its source and timed by the methods that the code calls on it, and so is each
function that reads such text: ten times the text may take fifteen times the time.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import io
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from timesearch import rewards
from timesearch.base import redaction, untrusted
from timesearch.data import formats, messages
from timesearch.dialects import first_tag, qwen
from timesearch.evaluation.qa import parse_choice
from timesearch.serve.guard import is_named
from timesearch.video.sampling import _Verdict

ROOT = Path(__file__).parents[1]
SHORT, LONG = 10_000, 100_000
RATIO = 15
FLOOR = 0.002
"""Seconds below which a time is noise."""
UNITS = (
    *(
        " ",
        "\n",
        "9",
        "1.",
        "1:",
        ":",
        "a",
        "A",
        "-",
        "_",
        ".",
        "/",
        "\\",
        '"',
        "'",
        "=",
        "&",
        ";",
        "@",
        "\0",
        "\u0663",
    ),
    *("[", "]", "{", "}", "(", ")", "<", ">", "<|", "|>", "<|a", "\ufffd", "\ud83d", "é", "a b ", "B) ", "(C) "),
    *("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", '<tool_call>{"a', "<think></"),
    *(
        "seconds ",
        "1 seconds ",
        "1 s to ",
        "12-",
        "-1 ",
        "1.5,",
        "```",
        "```json",
        '{"name": "',
        '\\"',
        "[[1, 2],",
        "\\u",
    ),
    *("?token", "token", "?tokentoken=", "&key=", "a:/", "a://b", "Bearer ", "Basic a", "http://a@", "1:2:3 ", "s\n"),
)
"""What is repeated to make a long text. To these come, for a pattern, the words in it."""


def seconds(read: Callable[[str], Any], text: str, times: int = 1, repeats: int = 3) -> float:
    """Processor time of reading a text so many times, the best of a few."""
    best = float("inf")
    gc.disable()  # it goes through all objects of the process, which a long text sets off and a short one does not
    try:
        for _ in range(repeats):
            started = time.process_time()
            for _ in range(times):
                read(text)
            best = min(best, time.process_time() - started)
            if best < RATIO * FLOOR:
                break
    finally:
        gc.enable()
    return best


def superlinear(read: Callable[[str], Any], units: Iterable[str], opening: str = "") -> list[str]:
    """The texts, by how they begin, of which ten times as much takes more than `RATIO` times as long.

    The short text is read ten times over, so that both are measured for about as long. A text is slow if it is so in
    each of five rounds, and its quickest long reading beside the slowest short one: neighbours on a busy machine slow
    down one or the other, and a square would still be seven times the bound.
    """
    slow = []
    for unit in units:
        short, long = (opening + (unit * size)[:size] + "!" for size in (SHORT, LONG))
        longs: list[float] = []
        shorts: list[float] = []
        for _ in range(5):
            longs.append(seconds(read, long))
            if longs[-1] <= RATIO * FLOOR:
                break
            shorts.append(seconds(read, short, times=10))
            if min(longs) <= RATIO / 10 * max(shorts):
                break
        else:
            slow.append(short[:60])
    return slow


# Patterns


def patterns() -> dict[str, tuple[re.Pattern[str], set[str]]]:
    """Each pattern of the code, by file and name or line, with the methods that are called on it."""
    found: dict[str, tuple[re.Pattern[str], set[str]]] = {}
    for path in sorted(file for folder in ("timesearch", "flows", "tasks") for file in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(ROOT).as_posix()
        named = {
            node.value: target.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if not isinstance(call.func, ast.Attribute) or not isinstance(call.func.value, ast.Name):
                continue
            if call.func.value.id != "re" or call.func.attr in ("escape", "error"):
                continue
            if call in named:
                module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
                pattern = getattr(module, named[call])
                used = {
                    use.attr
                    for use in ast.walk(tree)
                    if isinstance(use, ast.Attribute)
                    and isinstance(use.value, ast.Name)
                    and use.value.id == named[call]
                }
                found[f"{name} {named[call]}"] = (pattern, used)
            else:
                constant = call.args[0]
                assert isinstance(constant, ast.Constant), f"{name}, line {call.lineno}: name this pattern at the top"
                used = {"search" if call.func.attr == "compile" else call.func.attr}
                found[f"{name} {constant.value}"] = (re.compile(constant.value), used)
    return found


PATTERNS = patterns()


def test_patterns_are_found() -> None:
    assert {"timesearch/data/messages.py _CONTROL", "timesearch/rewards.py _PAIR"} <= PATTERNS.keys()
    assert all(methods for _, methods in PATTERNS.values()), "each is used where it is made"
    assert superlinear(lambda text: re.search(r"\d+x", text[: len(text) // 20]), ["9"]), "a slow one is noticed"


@pytest.mark.parametrize("name", PATTERNS)
def test_each_pattern_takes_linear_time(name: str) -> None:
    pattern, methods = PATTERNS[name]
    words = re.findall(r"[A-Za-z]+|[^\w\s]+", pattern.pattern)
    units = dict.fromkeys((*UNITS[:30], *words, *(f"{word} " for word in words), *(f"{word}9" for word in words)))
    for method in methods:
        slow = superlinear(calls(pattern, method), units)
        assert not slow, f"{name}.{method} is slow on {slow}"


def calls(pattern: re.Pattern[str], method: str) -> Callable[[str], Any]:
    if method in ("sub", "subn"):
        return lambda text: pattern.sub("", text)
    if method == "finditer":
        return lambda text: list(pattern.finditer(text))
    return getattr(pattern, method)  # type: ignore[no-any-return]


# Readers


def assistant(text: str) -> list[messages.Message]:
    return [{"role": "assistant", "content": text}]


def read_json(text: str) -> None:
    with contextlib.suppress(untrusted.UntrustedError):
        untrusted.parse_json(text)


def read_row(text: str) -> None:
    row = {"key": "v", "question": text, "time_reference": text, "options": text, "answer": text}
    with contextlib.suppress(ValueError):
        formats.to_rows(row, 1)


READERS: dict[str, Callable[[str], Any]] = {
    "parse_turn": messages.parse_turn,
    "neutralise": messages.neutralise,
    "tagged_answers": qwen.tagged_answers,
    "turns by the first tag": first_tag.parse_turn,
    "final_answer": lambda text: messages.final_answer(assistant(text)),
    "exchanges": lambda text: messages.exchanges([{"role": "tool", "content": [{"type": "text", "text": text}]}]),
    "format_reward": lambda text: rewards.format_reward(assistant(text)),
    "choice_letter": rewards.choice_letter,
    "parse_intervals": rewards.parse_intervals,
    "interval_iou": lambda text: rewards.accuracy(text, text, "grounding"),
    "rule_judge": lambda text: rewards.rule_judge(text, text),
    "score_episode": lambda text: rewards.score_episode(assistant(text), "[[1, 2]]", "grounding", text),
    "parse_choice": lambda text: parse_choice(text, [text[:40], text[: len(text) // 10] + "!", "a" + text[1:], "a b"]),
    "redact": redaction.redact,
    "mend_text": untrusted.mend_text,
    "parse_json": read_json,
    "to_rows": read_row,
    "is_named": lambda text: is_named(text, "127.0.0.1"),
    "ffmpeg's log": lambda text: _Verdict.read(io.StringIO(text), 0, 1),
}


@pytest.mark.parametrize("name", READERS)
def test_each_reader_takes_linear_time(name: str) -> None:
    slow = superlinear(READERS[name], UNITS) + superlinear(READERS[name], UNITS, "<think></think><tool_call>[1,")
    assert not slow, f"{name} is slow on {slow}"
