"""The GRPO-CSV reward of one episode, as pure functions over its messages (paper, Section 3.2).

`REWARDS` is the table of its parts: trainer, settings, curves, evaluation and report read it.

- *format*: every assistant turn is one thought followed by exactly one tool call or one answer and nothing else, and
  the last turn answers.
- *accuracy*: the answer is right, by the question's type: the option's letter, the judge, or interval IoU.
- *completeness*: accuracy times the accuracy of the *re-answer*, which the same policy gave when it saw nothing but
  what it found, frames and words; each factor counts as 1 above 0.5. An episode that found nothing has no re-answer
  (None) and is not complete.
- *calls*: how many tool calls were made. It counts for nothing unless a weight is set: a small bonus against tool use
  that dies in training, or a small cost against calls that bring nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

from timesearch.base.untrusted import UntrustedError, parse_json
from timesearch.data.messages import Message, final_answer, text_of
from timesearch.data.samples import LETTERS
from timesearch.dialects import act_of

Judge = Callable[[str, str], float]
"""(reference answer, candidate answer) -> score in [0, 1]"""

_LETTER = re.compile(r"\(?([A-Z])\)?(?:[.:)].*+)?", re.DOTALL)
_BRACKETED = re.compile(r"\(([A-Z])\)")
_NUMBER = r"-?(?<!\d)\d++(?:\.\d++)?+"
"""A number from its first digit on: begun anew at each digit, a long number would be read as often as it has digits."""
_SECONDS = re.compile(rf"\s*+{_NUMBER}s?\s*+")
_ENDS = (("start_time", "end_time"), ("start", "end"))
_OBJECT = re.compile(
    rf"""["']start(?:_time)?["']\s*+:\s*+["']?({_NUMBER})s?["']?\s*+,\s*+["']end(?:_time)?["']\s*+:\s*+["']?({_NUMBER})"""
)
_PAIR = re.compile(rf"({_NUMBER})(?:s(?:ec(?:ond)?)?|,|-|to|\s)++({_NUMBER})")


def format_reward(messages: Sequence[Message]) -> float:
    """1.0 if the episode keeps the format above, else 0.0."""
    acts = [act_of(text_of(message)) for message in messages if message["role"] == "assistant"]
    return float(acts[-1:] == ["answer"] and all(act == "call" for act in acts[:-1]))


def choice_letter(answer: str) -> str | None:
    """The capital letter that an answer is, or begins with as an option does (``B``, ``(B)``, ``B. a dog``).

    None also where the rest names another in brackets: ``(C) or (D)`` is no choice.
    """
    match = _LETTER.fullmatch(answer.strip())
    if match is None or {*_BRACKETED.findall(match[0])} - {match[1]}:
        return None
    return match[1]


def answer_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the right answer, which a file gives as a letter (``B``, ``b``, ``B. a dog``) or an option's text.

    None where it is no answer to these options; without options any letter is one.
    """
    answer = answer.strip()
    if answer in options:
        return LETTERS[list(options).index(answer)]
    letter = choice_letter(answer.upper() if len(answer) == 1 else answer)
    return letter if letter and (not options or letter in LETTERS[: len(options)]) else None


def parse_intervals(text: str) -> list[tuple[float, float]]:
    """[start, end] pairs in seconds, from JSON or from free text such as ``12.5 to 20 seconds, 31-40``.

    JSON may be one pair, the reference's ``{"start_time": 12.5, "end_time": 20}``, or a list of either, alone, between
    fences of three backticks, or under a name such as ``time``; numbers may be texts. Objects are found among other
    words too, several of them, and in Python's quotes.
    """
    fenced = (part.lstrip(ascii_letters) for part in text.split("```")[1::2])
    found: list[tuple[float, float]] = []
    try:
        found = list(_pairs(parse_json(text)))
    except UntrustedError:
        for written in fenced:
            with suppress(UntrustedError):
                found += _pairs(parse_json(written))
    if not found:
        written_out = _OBJECT.findall(text) or _PAIR.findall(text)
        found = [(float(start), float(end)) for start, end in written_out]
    return [pair for pair in found if all(map(math.isfinite, pair))]


def _pairs(value: Any) -> Iterator[tuple[float, float]]:
    """The pairs in a JSON value: it is one itself, a list of some, or an object that holds some under a name."""
    if isinstance(value, dict):
        for start, end in _ENDS:
            if start in value and end in value:
                value = [value[start], value[end]]
                break
        else:
            for inner in value.values():
                if isinstance(inner, list | dict):
                    yield from _pairs(inner)
            return
    if not isinstance(value, list):
        return
    numbers = [_number(item) for item in value]
    if len(numbers) == 2 and numbers[0] is not None and numbers[1] is not None:
        yield numbers[0], numbers[1]
    else:
        for item in value:
            if isinstance(item, list | dict):
                yield from _pairs(item)


def _number(value: Any) -> float | None:
    """A number, or one that is written as a text (``"12.5"``, ``"12.5s"``)."""
    if isinstance(value, str) and len(value) < 40 and _SECONDS.fullmatch(value):
        return float(value.strip().removesuffix("s"))
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def interval_iou(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    """Intersection over union of the unions of two lists of [start, end] intervals; 0 where both are empty."""
    union_a, union_b = _union(a), _union(b)
    shared, i, j = 0.0, 0, 0
    while i < len(union_a) and j < len(union_b):
        (start_a, end_a), (start_b, end_b) = union_a[i], union_b[j]
        shared += max(0.0, min(end_a, end_b) - max(start_a, start_b))
        i, j = (i + 1, j) if end_a < end_b else (i, j + 1)
    total = sum(end - start for start, end in union_a) + sum(end - start for start, end in union_b) - shared
    return shared / total if 0 < total < math.inf else 0.0


def _union(intervals: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Disjoint intervals in order; those that are reversed, of no length or not finite cover nothing."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted((float(pair[0]), float(pair[1])) for pair in intervals if pair[0] < pair[1]):
        if math.isinf(end - start):
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def rule_judge(reference: str, candidate: str) -> float:
    """1.0 if two answers are the same words: case, punctuation, articles and spaces do not count."""
    return float(bool(_normalise(reference)) and _normalise(reference) == _normalise(candidate))


def _normalise(text: str) -> str:
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def accuracy(candidate: str | None, answer: str, question_type: str, judge: Judge = rule_judge) -> float:
    """Score of one answer in [0, 1]: letter match, interval IoU, or the judge, by the question's type."""
    if candidate is None or not candidate.strip():
        return 0.0
    if question_type == "multiple_choice":
        return float(choice_letter(candidate) == answer_letter(answer, ()) is not None)
    if question_type == "grounding":
        return interval_iou(parse_intervals(candidate), parse_intervals(answer))
    return judge(answer, candidate)


def score_episode(
    messages: Sequence[Message],
    answer: str,
    type: str,
    reanswer: str | None,
    judge: Judge = rule_judge,
) -> dict[str, float]:
    """Score an episode.

    Args:
        messages: the episode's messages; only assistant turns are read.
        answer: the right answer.
        type: ``multiple_choice``, ``open_ended`` or ``grounding``.
        reanswer: the answer from the searched frames alone; None if no frame was searched or it was not asked.
        judge: scores open-ended answers.

    Returns:
        The parts of `REWARDS` that the paper has, by name, each in [0, 1].
    """
    right = accuracy(final_answer(messages), answer, type, judge)
    again = accuracy(reanswer, answer, type, judge) if right > 0 else 0.0
    scored = Scored(messages, right, again)
    return {part.name: part.score(scored) for part in REWARDS if part.weight}


def calls(messages: Sequence[Message]) -> int:
    """Tool calls of an episode that were answered."""
    return sum(message["role"] == "tool" for message in messages)


def completeness(right: float, again: float) -> float:
    """Accuracy of the answer times accuracy of the re-answer, each of which counts as 1 above 0.5."""
    return _decided(right) * _decided(again)


def _decided(score: float) -> float:
    return 1.0 if score > 0.5 else score


@dataclass(frozen=True)
class Scored:
    """An episode and the accuracies of its two answers, in [0, 1]: what a part of the reward may look at."""

    messages: Sequence[Message]
    right: float
    again: float


@dataclass(frozen=True)
class Part:
    """A part of the reward."""

    name: str
    weight: float
    """in the sum, where the settings name no other (the released configuration of the paper)"""
    label: str
    """beside the progress bar"""
    score: Callable[[Scored], float]
    reanswers: bool = False
    """whether it needs the re-answer, which costs one more turn an episode"""
    watched: bool = False
    """whether it is told of where its weight is 0 as well"""


REWARDS: tuple[Part, ...] = (
    Part("format", 1.0, "format", lambda scored: format_reward(scored.messages), watched=True),
    Part("accuracy", 0.5, "right", lambda scored: scored.right, watched=True),
    Part("completeness", 0.5, "complete", lambda scored: completeness(scored.right, scored.again), reanswers=True),
    Part("calls", 0.0, "calls", lambda scored: float(calls(scored.messages))),
)
"""All parts, in order."""


def weighed(weights: Mapping[str, float]) -> list[Part]:
    """The parts that a training with these weights computes: those that count, and those that are watched anyway."""
    return [part for part in REWARDS if weights[part.name] or part.watched]
