"""Sample files and the messages of an episode."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timesearch.base.batch import Failure
from timesearch.base.errors import ItemError, RequestError
from timesearch.base.files import atomic_path, inside, json_digest, sequence_digest, write_jsonl
from timesearch.data import rows
from timesearch.data.messages import Evidence, exchanges, final_answer, format_seconds, parse_turn, searched_seconds
from timesearch.data.rows import read_samples
from timesearch.data.samples import Prediction, Sample
from timesearch.training.data import usable_samples

ROW = {"id": "a", "video": "a.mp4", "question": "What?", "answer": "red", "type": "open_ended"}


def test_read_samples_keeps_fields(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    write_jsonl(path, [{**ROW, "gt_spans": [[1.0, 2.5]]}, {**ROW, "id": "b"}])
    first, second = read_samples(path)
    assert first.gt_spans == [(1.0, 2.5)]
    assert second.id == "b"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([json.dumps(ROW), '{"id": '], ["line 2", "not JSON"]),
        ([json.dumps(ROW), "[1, 2]"], ["line 2", "object"]),
        ([json.dumps({**ROW, "type": "riddle"})], ["line 1", "'type'"]),
        ([json.dumps(ROW), json.dumps(ROW)], ["'a'", "more than once"]),
    ],
)
def test_a_broken_line_is_named_with_file_and_line(tmp_path: Path, lines: list[str], words: list[str]) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(RequestError) as raised:
        read_samples(path)
    assert all(word in str(raised.value) for word in [str(path), *words])


def test_broken_lines_are_set_aside_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    lines = [ROW, {**ROW, "type": "riddle", "id": "b"}, {**ROW, "id": "c", "options": ["x"] * 27}, {**ROW, "id": "d"}]
    path.write_text("\n".join(['{"id": ', "[1, 2]", *map(json.dumps, [*lines, ROW])]))
    failures: list[Failure] = []
    assert [sample.id for sample in read_samples(path, failures.append)] == ["a", "d"]
    assert [(failure.item, failure.reason) for failure in failures] == [
        ("line 1", "not_json"),
        ("line 2", "not_json"),
        ("b", "unknown_type"),
        ("c", "invalid_row"),
        ("a", "duplicate_id"),
    ]
    path.write_text("\n".join(['{"id": ', "[1, 2]"]))
    with pytest.raises(RequestError, match=r"no row that can be used \(2 left out\)"):
        read_samples(path, failures.append)


TEXTS = r"""
null true 0 -0 1 -1 0.5 1e5 1E+5 1e-7 1e999 -1e999 NaN Infinity 007 +5 1. .5 1e 9223372036854775807 9223372036854775808
18446744073709551616 123456789012345678901234567890 1234567890123456789012.5e3 "" "a" "5" "\ud83d" "\ud83d\ude00"
"\u0000" "1e999" "NaN" [] [1] [NaN] [[1,2]] [[1,null]] [null] ["a","b"] {} {"a":1e999} {"a":{"b":[1e400]}}
{"a":1,"a":2} "a
"""
VALUES = [
    *TEXTS.split(),
    '"\ufeff"',
    '"\ud83d"',
    '"\t"',
    "[" * 70 + "]" * 70,
    '{"a":' * 65 + "1" + "}" * 65,
    "1" * 5000,
]
NAMES = [*Prediction.model_fields, "video_path", "candidates", "options\\u0041", "\\ud800"]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=5), st.sampled_from(["", " ", "}"])
)
def test_the_fast_way_reads_a_line_as_the_long_way_does(
    tmp_path_factory: pytest.TempPathFactory, odd: list[tuple[str, str]], end: str
) -> None:
    fields = {name: json.dumps(value) for name, value in ROW.items()} | dict(odd)
    line = "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}" + end
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    path.write_bytes(line.encode("utf-8", "surrogatepass"))
    for model in (Sample, Prediction):
        ways = []
        for plain in (rows.is_plain, lambda _: False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(rows, "is_plain", plain)
                failures: list[Failure] = []
                found = [repr(row) for row in rows.read_models(path, model, failures.append)]
                ways.append((found, failures))
        assert ways[0] == ways[1]


def test_many_rows_read_as_few_do(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({**ROW, "id": str(number), "duration": 5.0}) for number in range(20_001)]
    lines[7] = json.dumps({**ROW, "id": "7", "meta": {"deep": [1e300]}, "duration": float("nan")})
    path.write_text("\n".join(lines[:-1]))
    few = read_samples(path)
    path.write_text("\n".join(lines))
    many = read_samples(path)
    assert isinstance(few, list)
    assert not isinstance(many, list)
    assert (len(few), len(many)) == (20_000, 20_001)
    assert [sample.id for sample in many] == [str(number) for number in range(20_001)]
    assert list(islice(many, 20_000)) == few
    assert (many[7], many[-1].id, [sample.id for sample in many[510:514]]) == (
        few[7],
        "20000",
        ["510", "511", "512", "513"],
    )
    with pytest.raises(IndexError):
        many[20_001]


HALF = {"video_path": "v.mp4", "candidates": ["a", "b"]}  # looks like LongVideoBench, and has no question


def test_half_a_row_of_a_benchmark_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    write_jsonl(path, [ROW, HALF])
    with pytest.raises(RequestError, match=r"samples.jsonl, line 2: not a row of the benchmark .*'question'"):
        read_samples(path)


def test_training_takes_letters_and_lists_what_it_cannot_use(tmp_path: Path) -> None:
    choice = {**ROW, "type": "multiple_choice", "options": ["red", "blue"]}
    answers = {"letter": "B", "text": "blue", "lower": "b", "marked": "B. blue", "none": "green", "far": "C"}
    path = tmp_path / "samples.jsonl"
    write_jsonl(path, [HALF, *({**choice, "id": name, "answer": answer} for name, answer in answers.items())])
    for cache in ("a.mp4.frames", "a.mp4.safetensors"):
        (tmp_path / cache).touch()
    usable, rejected = usable_samples(path, tmp_path, tmp_path)
    assert {sample.id: sample.answer for sample in usable} == dict.fromkeys(["letter", "text", "lower", "marked"], "B")
    assert [(failure.item, failure.reason) for failure in rejected] == [
        ("line 1", "invalid_row"),
        ("none", "bad_answer"),
        ("far", "bad_answer"),
    ]


def test_a_missing_file_is_a_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        read_samples(tmp_path / "none.jsonl")


def test_a_prediction_is_a_sample_with_an_episode() -> None:
    prediction = Prediction(**ROW, prediction=[{"role": "assistant", "content": "<answer>red</answer>"}])
    assert Prediction.model_validate_json(prediction.model_dump_json()) == prediction
    assert isinstance(prediction, Sample)


def test_paths_stay_inside_their_root(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/../b.mp4") == tmp_path / "b.mp4"
    for outside in ("../b.mp4", "/etc/passwd", ".", "a/../../b"):
        with pytest.raises(ItemError) as raised:
            inside(tmp_path, outside)
        assert raised.value.reason == "unsafe_path"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "value.txt"
    target.write_text("old")

    def write_half() -> None:
        with atomic_path(target) as partial:
            partial.write_text("half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("items", [[], [["a", "0"]], [["\udc80", None], ["é", 1.5], {"b": 1, "a": []}]])
def test_a_sequence_has_the_digest_of_its_list(items: list[Any]) -> None:
    assert sequence_digest(iter(items)) == (len(items), json_digest(items))


def test_json_digest_ignores_key_order() -> None:
    assert json_digest({"a": 1, "b": [2]}) == json_digest({"b": [2], "a": 1}) != json_digest({"a": 1, "b": [3]})


def test_parse_turn_reads_thought_call_and_answer() -> None:
    call = parse_turn('<think>look</think>\n<tool_call>\n{"name": "f", "arguments": {"query": "x"}}\n</tool_call>')
    assert (call.thought, call.answer) == ("look", None)
    assert (call.calls[0].name, call.calls[0].arguments) == ("f", {"query": "x"})
    assert parse_turn("<think>seen</think><answer> B </answer>").answer == "B"
    assert parse_turn("<answer>.</think> <answer>blue</answer>").answer == "blue", "a tag left open is no answer"


def test_a_turn_that_calls_does_not_answer() -> None:
    assert parse_turn('<tool_call>{"name": "f", "arguments": {}}</tool_call><answer>B</answer>').answer is None


def test_damaged_json_is_repaired_where_its_meaning_is_plain() -> None:
    (call,) = parse_turn("<tool_call>{'name': 'f', 'arguments': {'query': 'red star',}").calls
    assert (call.name, call.arguments, call.error) == ("f", {"query": "red star"}, None)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='<>/{}[]":,tool_callansweriknm\\ 019', max_size=120))
def test_any_text_parses_to_something(text: str) -> None:
    turn = parse_turn(f"<think>a</think><tool_call>{text}")
    assert all(call.error or call.name for call in turn.calls)


def test_searched_frames_are_read_from_tool_messages_only() -> None:
    image = {"type": "image", "frame": 3}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "0.0s"}, image]},
        {"role": "assistant", "content": "<think>a</think>"},
        {"role": "tool", "content": [{"type": "text", "text": format_seconds(12.54)}, image, image]},
        {"role": "assistant", "content": [{"type": "text", "text": "<answer>B</answer>"}]},
    ]
    assert searched_seconds(messages) == [12.5]
    (exchange,) = exchanges(messages)
    assert (exchange.turn, exchange.evidence) == (1, (Evidence(seconds=12.5, frame=image.get("frame")),))
    assert final_answer(messages) == "B"
