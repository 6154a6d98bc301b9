"""The reward of an episode: equal to the reference's, and safe on anything that a policy may write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timesearch.data.messages import Message
from timesearch.data.samples import LETTERS
from timesearch.evaluation.qa import parse_choice
from timesearch.rewards import (
    REWARDS,
    accuracy,
    choice_letter,
    format_reward,
    interval_iou,
    parse_intervals,
    rule_judge,
    score_episode,
    weighed,
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
    [
        *((text, "B") for text in ("B", " B\n", "(B)", "B.", "B:", "B)", "(B", "B. a dog", "B) a dog", "B: a dog")),
        *((text, "B") for text in ("(B) a dog", "(B). a dog", "B. two\nlines", "B. a (B)", "B. C is wrong")),
        *((text, None) for text in ("", " b ", "(b)", "Bee", "B a dog", "B or C", "B, C", "**B**", "[B]", "Answer: B")),
        *((text, None) for text in ("(C) or (B)", "B. not (C)", "\u0392", "\uff22", "((B))", "B" * 100_000)),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    """The reference refuses ``(B)``, ``B)`` and ``B:``, which are how options are written, and takes ``B a dog`` and
    ``B or C``, by which a policy could name several."""
    assert choice_letter(text) == letter


said = st.lists(
    st.one_of(st.sampled_from([*"ABCDEab(). ,:\n'", "a red car", "USA ", "(C) "]), st.text(max_size=3)), max_size=8
).map("".join)


@settings(max_examples=400, deadline=None)
@given(said, st.lists(st.text(min_size=1, max_size=8), max_size=26), st.integers(0, 25))
def test_what_training_rewards_evaluation_counts_as_right(answer: str, options: list[str], right: int) -> None:
    gold = LETTERS[right % (len(options) or 7)]
    if accuracy(answer, gold, "multiple_choice") == 1.0:
        assert parse_choice(answer, options) == gold


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("12.5 seconds to 20 seconds, 31-40", [(12.5, 20.0), (31.0, 40.0)]),
        ("from 1 sec to 2.5 secs", [(1.0, 2.5)]),
        ("1s - 2s", [(1.0, 2.0)]),
        ('{"start_time": 3, "end_time": 4}', [(3.0, 4.0)]),
        ("no times", []),
        ("secsec 1 secsec 2 ond 3", [(1.0, 2.0)]),
        ("-1 to 2, 1.5.6 to 7", [(-1.0, 2.0), (5.6, 7.0)]),
        ("9" * 8_000 + " to " + "9" * 8_000, []),
    ],
)
def test_intervals_in_words(text: str, pairs: list[tuple[float, float]]) -> None:
    assert parse_intervals(text) == pairs


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ('{"start_time": 3, "end_time": 4}', [(3.0, 4.0)]),
        ('```json\n{"start_time": 3, "end_time": 4}\n```', [(3.0, 4.0)]),
        ("```\n[[3, 4], [5.5, 6]]\n```", [(3.0, 4.0), (5.5, 6.0)]),
        ('It is ```JSON {"start_time": 3, "end_time": 4}``` there', [(3.0, 4.0)]),
        ('```json\n[{"start_time": 3, "end_time": 4}, [5, 6]]', [(3.0, 4.0), (5.0, 6.0)]),
        ("[3, 4]", [(3.0, 4.0)]),
        ("```3 to 4```", [(3.0, 4.0)]),
        ("[[3, 4], null, [5], [true, 6], [NaN, 7], 8]", [(3.0, 4.0)]),
        ("[" * 100_000, []),
        ("[[3, " + "9" * 5_000 + "]]", []),
        ('{"start_time": "3"}', []),
    ],
)
def test_intervals_in_json(text: str, pairs: list[tuple[float, float]]) -> None:
    """The reference reads JSON objects, fenced or not, and no plain lists, which are what the prompts here ask for."""
    assert parse_intervals(text) == pairs


GROUNDING, WORDS, TIMES = "[[10, 20]]", "a red bus", '{"start_time": 10, "end_time": 20}'


@pytest.mark.parametrize(
    ("turn", "answer", "kind", "format", "right"),
    [
        # Grounding.
        ("<think>t</think><answer>[[10, 20]]</answer>", GROUNDING, "grounding", 1, 1),
        ("<think>t</think><answer>10 to 15 seconds</answer>", GROUNDING, "grounding", 1, 0.5),
        (
            '<think>t</think><answer>```json\n{"start_time": 10, "end_time": 20}\n```</answer>',
            GROUNDING,
            "grounding",
            1,
            1,
        ),
        # The reference gives 1 where both sides have no length: nothing was found there, so here it is 0.
        ("<think>t</think><answer>[[10, 10]]</answer>", "[[10, 10]]", "grounding", 1, 0),
        ("<think>t</think><answer>[[20, 10]]</answer>", GROUNDING, "grounding", 1, 0),
        # Open-ended. The reference scores 0 from 100 characters on, and so does the judge's server here
        # (`judge.max_candidate_chars`); the rule, which no long answer can mislead, has no such bound.
        ("<think>t</think><answer>The red bus.</answer>", WORDS, "open_ended", 1, 1),
        ("<think>t</think><answer>" + "x" * 100 + "</answer>", "x" * 100, "open_ended", 1, 1),
        ("<think>t</think><answer>a red bus, or a blue one</answer>", WORDS, "open_ended", 1, 0),
        # Tags inside a thought. The reference takes the first tag wherever it stands; here a thought is no act, or a
        # policy that weighs an answer in its thought would be held to it.
        ("<think>maybe <answer>C</answer></think><answer>B</answer>", "B", "multiple_choice", 0, 1),
        ("<think>maybe <answer>B</answer></think><answer>C</answer>", "B", "multiple_choice", 0, 0),
        ("<think>I could <tool_call>{}</tool_call></think><answer>B</answer>", "B", "multiple_choice", 0, 1),
        ("<think>t</think><tool_call>{</tool_call><answer>B</answer>", "B", "multiple_choice", 0, 0),
        ("<think>t</think><answer>A<answer>B</answer></answer>", "B", "multiple_choice", 0, 1),
        # A right answer that a file gives in lower case or with its text.
        ("<think>t</think><answer>B</answer>", "b", "multiple_choice", 1, 1),
        ("<think>t</think><answer>(B) a cat</answer>", "B. a cat", "multiple_choice", 1, 1),
    ],
)
def test_scores_of_all_kinds(turn: str, answer: str, kind: str, format: float, right: float) -> None:
    scores = score_episode(episode(turn), answer, kind, None)
    assert (scores["format"], scores["accuracy"]) == (format, right)


def test_what_has_no_weight_is_not_computed_unless_it_is_watched() -> None:
    paper = {part.name: part.weight for part in REWARDS}
    assert [part.name for part in weighed(paper)] == ["format", "accuracy", "completeness"]
    assert [part.name for part in weighed({**paper, "calls": -0.1, "completeness": 0})] == [
        "format",
        "accuracy",
        "calls",
    ]
    assert [part.name for part in weighed(dict.fromkeys(paper, 0.0))] == ["format", "accuracy"]


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


@pytest.mark.parametrize(
    "said",
    [
        "[[1, 2.5]]",
        "[1, 2.5]",
        '["1", "2.5s"]',
        '```json\n{"start_time": 1, "end_time": 2.5}\n```',
        "```json\n[[1, 2.5]]\n```",
        'It is there:\n```\n{"start_time": 1, "end_time": 2.5}\n``` as seen.',
        '{"start": 1, "end": 2.5}',
        '{"start_time": "1.0", "end_time": "2.5"}',
        '{"time": [[1, 2.5]]}',
        '{"answer": {"start_time": 1, "end_time": 2.5}}',
        'The span is {"start_time": 1, "end_time": 2.5}.',
        "{'start_time': 1, 'end_time': 2.5}",
        '```json\n{"start_time": 1,\n "end_time": 2.5,}\n```',
        "from 1 to 2.5 seconds",
    ],
)
def test_an_interval_is_read_however_it_is_written(said: str) -> None:
    assert parse_intervals(said) == [(1.0, 2.5)]


def test_several_intervals_are_read_from_several_objects_and_fences() -> None:
    one, two = '{"start_time": 1, "end_time": 2}', '{"start_time": 3, "end_time": 4}'
    for said in (f"{one}, {two}", f"{one}\n{two}", f"```json\n{one}\n```\nand\n```json\n{two}\n```", f"[{one}, {two}]"):
        assert parse_intervals(said) == [(1.0, 2.0), (3.0, 4.0)]
    assert parse_intervals('{"label": 3, "of": "two"}') == []
