"""The reward of an episode: equal to the reference's, and safe on anything that a policy may write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timesearch.messages import Message
from timesearch.rewards import (
    accuracy,
    choice_letter,
    format_reward,
    interval_iou,
    parse_intervals,
    rule_judge,
    score_episode,
)

CALL = (
    '<think>where?</think>\n<tool_call>\n{"name": "seek_video_frames", "arguments": {"query": "a star"}}\n</tool_call>'
)
ANSWER = "<think>seen</think>\n<answer>B</answer>"


def episode(*turns: str) -> list[Message]:
    return [{"role": "assistant", "content": turn} for turn in turns]


def test_scores_equal_the_golden_ones(golden: Path) -> None:
    cases = json.loads((golden / "rewards.json").read_text())
    assert len(cases) > 50
    for number, case in enumerate(cases):
        scores = score_episode(case["messages"], case["target"], case["type"], case["reanswer"])
        expected = {name: case[name] for name in ("format", "accuracy", "completeness")}
        assert scores == pytest.approx(expected), f"case {number}"


def test_interval_iou_equals_the_golden_one(golden: Path) -> None:
    for case in json.loads((golden / "interval_iou.json").read_text()):
        assert interval_iou(case["a"], case["b"]) == pytest.approx(case["iou"])


@pytest.mark.parametrize(
    ("turns", "reward"),
    [
        ([ANSWER], 1.0),
        ([CALL, ANSWER], 1.0),
        ([CALL, CALL, ANSWER], 1.0),
        ([CALL], 0.0),
        ([ANSWER, ANSWER], 0.0),
        ([CALL, "<answer>B</answer>"], 0.0),
        ([CALL + CALL.partition("\n")[2], ANSWER], 0.0),
        (["<think>a</think> So: <answer>B</answer>"], 0.0),
        (["<think>a</think><answer>B</answer><answer>C</answer>"], 0.0),
        (["<think>a<think>b</think><answer>B</answer>"], 0.0),
        (["<think>never closed <answer>B</answer>"], 0.0),
        ([""], 0.0),
        ([], 0.0),
    ],
)
def test_format(turns: list[str], reward: float) -> None:
    assert format_reward(episode(*turns)) == reward


@pytest.mark.parametrize(
    ("first", "again", "completeness"),
    [("B", "B", 1.0), ("B", "C", 0.0), ("C", "B", 0.0), ("B", None, 0.0), ("B", "I don't know", 0.0)],
)
def test_completeness_needs_both_answers(first: str, again: str | None, completeness: float) -> None:
    turn = f"<think>seen</think><answer>{first}</answer>"
    assert score_episode(episode(turn), "B", "multiple_choice", again)["completeness"] == completeness


def test_completeness_decides_above_a_half() -> None:
    answer = "[[0, 10]]"
    near, far = "[[0, 8]]", "[[0, 4]]"

    def complete(first: str, again: str) -> float:
        turn = f"<think>seen</think><answer>{first}</answer>"
        return score_episode(episode(turn), answer, "grounding", again)["completeness"]

    assert complete(near, near) == 1.0
    assert complete(near, far) == pytest.approx(0.4)
    assert complete(far, far) == pytest.approx(0.16)


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), (" b ", None), ("(B)", "B"), ("B. a dog", "B"), ("B) a dog", "B"), ("Bee", None), ("", None)],
)
def test_letters(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("12.5 seconds to 20 seconds, 31-40", [(12.5, 20.0), (31.0, 40.0)]),
        ("from 1 sec to 2.5 secs", [(1.0, 2.5)]),
        ("1s - 2s", [(1.0, 2.0)]),
        ('{"start_time": 3, "end_time": 4}', [(3.0, 4.0)]),
        ("no times", []),
    ],
)
def test_intervals_in_words(text: str, pairs: list[tuple[float, float]]) -> None:
    assert parse_intervals(text) == pairs


def test_the_rule_judge_minds_words_only() -> None:
    assert rule_judge("A red bus.", "the red bus") == 1.0
    assert rule_judge("red", "dark red") == 0.0
    assert rule_judge("", "") == 0.0


def test_accuracy_asks_the_judge_for_open_answers_alone() -> None:
    def judge(reference: str, candidate: str) -> float:
        assert (reference, candidate) == ("red", "crimson")
        return 1.0

    assert accuracy("crimson", "red", "open_ended", judge) == 1.0
    assert accuracy("B", "B", "multiple_choice", judge) == 1.0
    assert accuracy(" ", "red", "open_ended", judge) == 0.0


pieces = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", '{"a": [', "B", "0.5, 9"]
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.one_of(pieces, st.text(max_size=5)), max_size=12).map("".join), max_size=4),
    st.one_of(st.none(), st.text(max_size=30)),
    st.sampled_from(["multiple_choice", "open_ended", "grounding"]),
)
def test_any_text_scores_between_zero_and_one(turns: list[str], again: str | None, kind: str) -> None:
    answer = {"grounding": "[[1, 2]]", "multiple_choice": "B", "open_ended": "red"}[kind]
    assert all(0.0 <= value <= 1.0 for value in score_episode(episode(*turns), answer, kind, again).values())


interval = st.tuples(st.floats(0, 100), st.floats(0, 100))


@settings(max_examples=60, deadline=None)
@given(st.lists(interval, max_size=4), st.lists(interval, max_size=4))
def test_iou_is_symmetric_and_bounded(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> None:
    value = interval_iou(a, b)
    assert 0.0 <= value <= 1.0 + 1e-9
    assert value == pytest.approx(interval_iou(b, a))


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_parses_to_intervals(text: str) -> None:
    assert all(len(pair) == 2 for pair in parse_intervals(text))
