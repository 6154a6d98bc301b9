"""Files in the form that benchmarks and other systems publish, read as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timesearch.base.errors import RequestError
from timesearch.base.files import write_jsonl
from timesearch.data.formats import options_of, to_rows
from timesearch.data.rows import read_rows, read_samples
from timesearch.data.samples import Sample
from timesearch.evaluation.episodes import read_predictions
from timesearch.search.protocol import lettered

LONGVIDEOBENCH = {
    "video_id": "Ab3dEfGhIjK",
    "video_path": "Ab3dEfGhIjK.mp4",
    "subtitle_path": "Ab3dEfGhIjK_en.json",
    "id": "Ab3dEfGhIjK_0",
    "question": "A woman in a green coat opens a door. What is behind it?",
    "question_wo_referring_query": "What is behind it?",
    "candidates": ["a garden", "a stair", "a dog", "a wall", "a boat"],
    "correct_choice": 2,
    "position": [250, 500],
    "topic_category": "NP-News-Programs",
    "question_category": "S2O",
    "level": "L1-Perception",
    "duration_group": 600,
    "starting_timestamp_for_subtitles": 0,
    "duration": 412.3,
    "view_count": 1234,
}
HAYSTACK_LVBENCH = {
    "id": "Ab3dEfGhIjK_0",
    "video": "LongVideoBench/videos/Ab3dEfGhIjK.mp4",
    "question": "What is behind it?\nA. a garden\nB. a stair\nC. a dog\nD. a wall\nE. a boat",
    "target": {"answer": "C"},
    "type": "multiple_choice",
    "gt_frame_index": [250, 500],
    "meta": json.dumps(LONGVIDEOBENCH),
}
HAYSTACK_EGO4D = {
    "video_id": "0aca0078-b6ab-41fb-9dc5-a70b8ad137b2",
    "vclip_id": "6338b73e-393f-4d37-b278-68703b45908c",
    "question": "Where was the ladle before I picked it up?",
    "options": {"A": "in the sink", "B": "on the wall", "C": "in a drawer", "D": "on the table", "E": None},
    "answer": "D",
    "frame_indexes_video": [300, 330],
    "frame_indexes_vclip": [120, 150],
    "video_metadata": {"frame_rate": 30.0, "video_duration": 1800.5, "vclip_interval_in_video": [6.0, 480.0]},
}
TSTAR = {
    "video_id": "fFjv93ACGo8",
    "video_path": "/data/Video-MME/videos/data/fFjv93ACGo8.mp4",
    "question": "Which decoration is there most of?",
    "options": "A) Apples.\nB) Candles.\nC) Berries.\nD) The same number.",
    "answer": "C",
    "gt_frame_index": [75],
    "position": [],
    "duration_group": "short",
    "grounding_objects": {"target_objects": ["apples"], "cue_objects": ["tree"]},
    "keyframe_timestamps": [1.0, 3.0, 17.0],
    "keyframe_distribution": [0.1] * 20,
}
VIDEO_MME = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "How many candles are lit?",
    "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
    "answer": "B",
}
MLVU = {
    "video": "movie101_66.mp4",
    "duration": 480.0,
    "question": "What colour is the main character's coat?",
    "candidates": ["Yellow", "Red", "Green", "Blue"],
    "answer": "Green",
    "question_type": "plotQA",
}
MLVU_GENERATION = {
    "video": "subplot_1.mp4",
    "duration": 300.0,
    "question": "What happens at the window?",
    "answer": "A bird comes in.",
    "question_type": "subPlot",
    "scoring_points": ["a bird"],
}
LVBENCH = {
    "key": "28CIeC8cZks",
    "type": "cartoon",
    "video_info": {"duration_minutes": 65, "fps": 30.0, "resolution": {"width": 1280, "height": 720}},
    "qa": [
        {
            "uid": "1",
            "question": "What year appears?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633",
            "answer": "D",
            "question_type": ["key information retrieval"],
            "time_reference": "00:15-01:19",
        },
        {
            "uid": "2",
            "question": "Who sings?\n(A) a cat\n(B) a bird\n(C) nobody\n(D) all",
            "answer": "A",
            "question_type": ["entity recognition", "reasoning"],
            "time_reference": "01:02:03-01:02:33",
        },
    ],
}
REFERENCE_MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": "You are a helpful video assistant."}]},
    {
        "role": "user",
        "content": [{"type": "video", "video": "<video>", "fps": 2.0}, {"type": "text", "text": "Question: ..."}],
    },
    {
        "role": "assistant",
        "content": [
            {
                "type": "text",
                "text": '<think>a door</think>\n<tool_call>\n{"name": "seek_video_frames", '
                '"arguments": {"query": "a door", "start_time": 0, "end_time": 30}}\n</tool_call>',
            }
        ],
    },
    {
        "role": "tool",
        "name": "seek_video_frames",
        "arguments": {"query": "a door", "start_time": 0.0, "end_time": 30.0, "num_frames": 8},
        "content": [
            {"type": "text", "text": "10.0s"},
            {"type": "image", "image": "<image>"},
            {"type": "text", "text": "20.5s"},
            {"type": "image", "image": "<image>"},
            {"type": "text", "text": "Here are selected frames. They are located at 10.0s,20.5s.\n"},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "<think>a dog</think><answer>C</answer>"}]},
]


def read_one(path: Path, *rows: dict[str, Any]) -> list[Sample]:
    write_jsonl(path / "rows.jsonl", rows)
    return read_samples(path / "rows.jsonl")


def test_longvideobench(tmp_path: Path) -> None:
    path = tmp_path / "lvb_val.json"
    path.write_text(json.dumps([LONGVIDEOBENCH]))
    (sample,) = read_samples(path)
    assert (sample.id, sample.video, sample.answer, sample.type) == (
        "Ab3dEfGhIjK_0",
        "Ab3dEfGhIjK.mp4",
        "C",
        "multiple_choice",
    )
    assert sample.options[2] == "a dog"
    assert (sample.gt_frame_index, sample.duration) == ([250, 500], 412.3)
    assert (sample.meta["duration_group"], sample.meta["question_category"]) == (600, "S2O")


def test_longvideobench_test_split_and_table_form(tmp_path: Path) -> None:
    hidden = {name: value for name, value in LONGVIDEOBENCH.items() if name not in ("correct_choice", "position")}
    flat = {name: value for name, value in hidden.items() if name != "candidates"} | {"id": "flat", "correct_choice": 1}
    flat |= {f"option{i}": option for i, option in enumerate(["a garden", "a stair", "a dog", "N/A", "N/A"])}
    without, numbered = read_one(tmp_path, hidden, flat)
    assert (without.answer, without.gt_frame_index) == ("", [])
    assert (numbered.answer, numbered.options) == ("B", ["a garden", "a stair", "a dog"])


def test_haystack_lvbench(tmp_path: Path) -> None:
    (sample,) = read_one(tmp_path, HAYSTACK_LVBENCH)
    assert (sample.id, sample.answer, sample.gt_frame_index) == ("Ab3dEfGhIjK_0", "C", [250, 500])
    assert sample.video == "LongVideoBench/videos/Ab3dEfGhIjK.mp4"
    assert sample.options == LONGVIDEOBENCH["candidates"]
    assert sample.duration == 412.3
    assert sample.meta["duration_group"] == 600


def test_haystack_ego4d_from_parquet(tmp_path: Path) -> None:
    path = tmp_path / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([HAYSTACK_EGO4D]), path)
    (sample,) = read_samples(path)
    assert sample.video == "0aca0078-b6ab-41fb-9dc5-a70b8ad137b2.mp4"
    assert sample.options == ["in the sink", "on the wall", "in a drawer", "on the table"]
    assert (sample.answer, sample.gt_seconds, sample.gt_frame_index) == ("D", [10.0, 11.0], [300, 330])
    assert sample.duration == 1800.5


def test_video_mme(tmp_path: Path) -> None:
    (sample,) = read_one(tmp_path, VIDEO_MME)
    assert (sample.id, sample.video, sample.answer) == ("001-1", "fFjv93ACGo8.mp4", "B")
    assert sample.options == ["One.", "Two.", "Three.", "Four."]
    assert (sample.duration, sample.meta["duration"], sample.meta["domain"]) == (None, "short", "Knowledge")


def test_mlvu(tmp_path: Path) -> None:
    choice, generation = read_one(tmp_path, MLVU, MLVU_GENERATION)
    assert (choice.answer, choice.type, choice.meta["task"]) == ("C", "multiple_choice", "plotQA")
    assert (generation.answer, generation.type) == ("A bird comes in.", "open_ended")
    assert choice.id != generation.id


def test_lvbench_gives_a_sample_for_each_question(tmp_path: Path) -> None:
    first, second = read_one(tmp_path, LVBENCH)
    assert (first.id, first.video, first.answer) == ("1", "28CIeC8cZks.mp4", "D")
    assert (first.question, first.options) == ("What year appears?", ["1636", "1366", "1363", "1633"])
    assert first.gt_spans == [(15.0, 79.0)]
    assert second.gt_spans == [(3723.0, 3753.0)]
    assert second.meta["question_type"] == ["entity recognition", "reasoning"]


def test_lvbench_as_a_table_of_a_row_a_question(tmp_path: Path) -> None:
    """The form on the model hub: a Parquet file whose rows repeat what belongs to the video."""
    video = {"key": LVBENCH["key"], "type": LVBENCH["type"], "video_path": "28CIeC8cZks.mp4"}
    path = tmp_path / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([video | entry for entry in LVBENCH["qa"]]), path)
    samples = read_samples(path)
    assert samples[0].meta.pop("video_path") == video["video_path"]
    assert samples[1].meta.pop("video_path") == video["video_path"]
    assert samples == read_one(tmp_path, LVBENCH)


def test_tstar_output(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([TSTAR, {**TSTAR, "video_id": "other", "error": "no frames"}]))
    first, second = read_predictions(path, pytest.fail)
    assert first.searched_seconds == [1.0, 3.0, 17.0]
    assert (first.answer, first.gt_frame_index, first.type) == ("C", [75], "multiple_choice")
    assert first.options[3] == "The same number."
    assert "keyframe_distribution" not in first.meta
    assert second.error is not None
    assert second.error.message == "no frames"


def test_reference_output(tmp_path: Path) -> None:
    row = {**HAYSTACK_LVBENCH, "duration": 412.3, "prediction": REFERENCE_MESSAGES}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    (prediction,) = read_predictions(tmp_path / "rows.jsonl", pytest.fail)
    assert prediction.prediction == REFERENCE_MESSAGES
    assert (prediction.answer, prediction.duration) == ("C", 412.3)


def test_reference_output_of_plain_text_and_other_targets(tmp_path: Path) -> None:
    grounding = {
        "id": 7,
        "video": "/root/videos/a.mp4",
        "question": "When?",
        "type": "grounding",
        "target": {"answer": '{"start_time": 3.0, "end_time": 8.5}', "start_time": 3.0, "end_time": 8.5},
        "prediction": "<think>x</think><answer>[3, 8]</answer>",
    }
    write_jsonl(tmp_path / "rows.jsonl", [grounding, {**HAYSTACK_LVBENCH, "prediction": "C"}])
    first, second = read_predictions(tmp_path / "rows.jsonl", pytest.fail)
    assert (first.id, first.gt_spans, first.predicted_answer) == ("7", [(3.0, 8.5)], "[3, 8]")
    assert second.predicted_answer == "C"


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (["A. one", "B. two"], ["one", "two"]),
        ("(A) one\n(B) two\n", ["one", "two"]),
        (["A cat", "B movie"], ["A cat", "B movie"]),
        (["B. one", "A. two"], ["B. one", "A. two"]),
        ({"B": "two", "A": "one", "C": None}, ["one", "two"]),
        (None, []),
    ],
)
def test_options_lose_their_letters_only_where_all_have_them(value: Any, options: list[str]) -> None:
    assert options_of(value) == options


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("A) one\nand more\nB) two\nC) three", ["one and more", "two", "three"]),
        ("A. one B. two C. three", ["one", "two", "three"]),
        ("(A) 168 (B) 167 (C) 15 (D) 416", ["168", "167", "15", "416"]),
        ("(A)168(B)167\n(C)15(D)416", ["168", "167", "15", "416"]),
        ("[a] one; [b] two; [c] three", ["one", "two", "three"]),
        ("a) one\nb) two", ["one", "two"]),
        ("A: one, B: two", ["one", "two"]),
        ("A) see B) below\nB) two", ["see B) below", "two"]),
        ("(A) 1 (B) as in (A) above (C) 3", ["1", "as in (A) above", "3"]),
        ("168\n167\n15\n416", ["168", "167", "15", "416"]),
        ('["168", "167"]', ["168", "167"]),
        ([168.0, 167, "15"], ["168", "167", "15"]),
        (["A. one B. two"], ["one", "two"]),
        ({"a": "one", "b": "two", "c": None}, ["one", "two"]),
        ({str(number): f"o{number}" for number in range(11)}, [f"o{number}" for number in range(11)]),
    ],
)
def test_options_in_all_forms(text: Any, options: list[str]) -> None:
    assert options_of(text) == options
    row = {"video_id": "t", "video_path": "t.mp4", "question": "Q?", "options": text, "answer": "B"}
    (told,) = to_rows({**row, "keyframe_timestamps": []}, 1)
    assert told["options"] == options


@pytest.mark.parametrize(
    "options",
    [
        "A. one B two C three",
        "A. one\nB. two C. three",
        "A) one\nC) three",
        "(A) x (B) y (B) z (C) w",
        "(A) (B) both",
        "one of many",
        ["B. one", "A. two"],
        ["one", None, "three"],
        ["one", {"text": "two"}],
        {"A": "one", "C": "three"},
        {"A": "one", "B": None, "C": "three"},
        {"first": "one", "second": "two"},
        [str(number) for number in range(27)],
    ],
)
def test_options_that_can_be_read_in_two_ways_or_none_are_named(tmp_path: Path, options: Any) -> None:
    row = {"video_id": "t", "video_path": "t.mp4", "question": "Q?", "options": options, "answer": "B"}
    write_jsonl(tmp_path / "rows.jsonl", [{**row, "id": "odd", "keyframe_timestamps": []}, TSTAR])
    failures: list[Any] = []
    assert len(list(read_predictions(tmp_path / "rows.jsonl", failures.append))) == 1
    assert [(failure.item, failure.reason) for failure in failures] == [("odd", "invalid_row")]


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("00:15-01:19", [(15, 79)]),
        ("00:15-00:20, 00:40-00:50", [(15, 20), (40, 50)]),
        ("00:15-00:20,00:40-00:50", [(15, 20), (40, 50)]),
        ("0:10 – 0:20; 1:00 to 1:05 and 2:00", [(10, 20), (60, 65), (120, 120)]),
        ("01:02:03.5-01:02:04,25", [(3723.5, 3724.25)]),
        ("75:30-76:00", [(4530, 4560)]),
        ("", []),
        (None, []),
        ("00:75-01:80", None),
        ("1:60:00-2:00:00", None),
        ("15-20", None),
        ("about 00:15", None),
        ("00:15-", None),
        ("00:15 00:20-x", None),
        ("1:2:3:4", None),
        ("9" * 100_000, None),
        ("0:1" * 50_000, None),
    ],
)
def test_spans_in_all_forms(tmp_path: Path, text: Any, spans: list[Any] | None) -> None:
    row = {"key": "k", "uid": "u", "question": "Q?\n(A) 1\n(B) 2", "answer": "A", "time_reference": text}
    if spans is None:
        with pytest.raises(RequestError, match="not a "):
            read_one(tmp_path, row)
    else:
        assert read_one(tmp_path, row)[0].gt_spans == spans


@pytest.mark.parametrize(
    ("question", "asked", "options"),
    [
        ("Two lines\nof question?\n(A) 1\n(B) 2", "Two lines\nof question?", ["1", "2"]),
        ("How much?\n(A) 168 (B) 167", "How much?", ["168", "167"]),
        ("Who is it, A. or B.?", "Who is it, A. or B.?", []),
        ("A. Smith asks: how much?\n(A) 1\n(B) 2", "A. Smith asks: how much?", ["1", "2"]),
        ("Two lines\nof question?\n168\n167", "Two lines\nof question?", ["168", "167"]),
    ],
)
def test_the_options_behind_a_question(tmp_path: Path, question: str, asked: str, options: list[str]) -> None:
    row = {"key": "k", "uid": "u", "question": question, "answer": "A", "time_reference": ""}
    (sample,) = read_one(tmp_path, row)
    assert (sample.question, sample.options) == (asked, options)


@pytest.mark.parametrize("choice", [1, 1.0, "1"])
def test_numbers_as_floats_and_texts(tmp_path: Path, choice: Any) -> None:
    row = {**LONGVIDEOBENCH, "correct_choice": choice, "position": "[250.0, 500]"}
    ego = {**HAYSTACK_EGO4D, "frame_indexes_video": [300.0, "330"], "answer": "D"}
    first, second = read_one(tmp_path, row, ego)
    assert (first.answer, first.gt_frame_index, second.gt_frame_index) == ("B", [250, 500], [300, 330])
    for odd in ({**row, "correct_choice": 5}, {**row, "position": [2.5]}, {**ego, "frame_indexes_video": [10**30]}):
        with pytest.raises(RequestError, match="line 1"):
            read_one(tmp_path, odd)


def test_an_option_in_the_middle_that_is_none_keeps_its_letter(tmp_path: Path) -> None:
    row = {name: value for name, value in LONGVIDEOBENCH.items() if name != "candidates"}
    row |= {f"option{i}": option for i, option in enumerate(["a", "N/A", "c", "N/A", "N/A"])}
    (sample,) = read_one(tmp_path, row)
    assert (sample.options, sample.answer) == (["a", "N/A", "c"], "C")


_METADATA = {"frame_rate": 30.0, "video_duration": 608.93}
_ROWS = [{**HAYSTACK_EGO4D, "video_id": name, "video_metadata": _METADATA} for name in ("a", "b")]
_COLUMNS = {name: [row[name] for row in _ROWS] for name in HAYSTACK_EGO4D}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(_COLUMNS),
        json.dumps(_COLUMNS, indent=4),
        json.dumps({column: dict(enumerate(values)) for column, values in _COLUMNS.items()}),
        json.dumps(_ROWS),
        json.dumps(_ROWS, indent=1),
        "[" + ",\n".join(map(json.dumps, _ROWS)) + "]",
        json.dumps({"data": _ROWS}),
        json.dumps({"version": 1, "data": _ROWS}, indent=2),
        "\r\n".join(map(json.dumps, _ROWS)),
        "\n\n" + "\n\n".join(map(json.dumps, _ROWS)) + "\n\n",
    ],
)
def test_json_in_all_forms(tmp_path: Path, text: str, name: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert [sample.video for sample in read_samples(tmp_path / name)] == ["a.mp4", "b.mp4"]


def test_one_object_over_many_lines_is_one_row_and_a_cut_list_is_said(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(HAYSTACK_EGO4D, indent=4))
    assert len(read_samples(tmp_path / "one.json")) == 1
    (tmp_path / "cut.json").write_text(json.dumps(_ROWS, indent=4)[:-20])
    with pytest.raises(RequestError, match=r"not JSON \(.*JSON lines, a JSON list"):
        read_samples(tmp_path / "cut.json")
    (tmp_path / "packed.jsonl").write_bytes(b"\x1f\x8b\x08\x00")
    (tmp_path / "rows.parquet").write_bytes(b"no table")
    (tmp_path / "damaged.jsonl").write_bytes(b"PAR1" + b"\x00" * 40)
    for name, words in (("packed.jsonl", "compressed"), ("rows.parquet", "no Parquet"), ("damaged.jsonl", "damaged")):
        with pytest.raises(RequestError, match=words):
            read_samples(tmp_path / name)


def test_an_own_row_is_left_alone() -> None:
    row = {"id": "a", "video": "a.mp4", "question": "What?", "meta": {"question_type": "x"}}
    assert to_rows(row, 1) == [row]


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 1}\n\xff\n{"id": 2}\n' + b"[" * 100_000 + b"\n")
    rows = read_rows(path)
    assert next(rows) == (1, {"id": 1})
    with pytest.raises(RequestError, match="line 2: not UTF-8"):
        next(rows)
    broken: list[int] = []
    assert [row for _, row in read_rows(path, lambda number, error: broken.append(number))] == [{"id": 1}, {"id": 2}]
    assert broken == [2, 4]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = sorted(
    {*LONGVIDEOBENCH, *HAYSTACK_LVBENCH, *HAYSTACK_EGO4D, *TSTAR, *VIDEO_MME, *MLVU, *LVBENCH, "prediction"}
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=9), max_size=3))
def test_no_row_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    failures: list[Any] = []
    found = list(read_predictions(path, failures.append))
    assert len(found) + len(failures) >= len([row for row in rows if row.get("qa") != []])


@pytest.mark.parametrize(
    "listed",
    [
        "\nA. a garden\nB. a stair\nC. a dog\nD. a wall\nE. a boat",
        " (A) a garden (B) a stair (C) a dog (D) a wall (E) a boat",
        "\n\na) a garden\nb) a stair\nc) a dog\nd) a wall\ne) a boat",
        "\na garden\na stair\na dog\na wall\na boat",
    ],
)
def test_options_that_a_question_holds_are_asked_once(listed: str) -> None:
    bare = {"id": "q", "video": "a.mp4", "question": f"What is behind it?{listed}", "answer": "C"}
    options = LONGVIDEOBENCH["candidates"]
    rows = [
        HAYSTACK_LVBENCH | {"question": bare["question"]},
        bare | {"options": options, "type": "multiple_choice"},
        {"video": "a.mp4", "question": bare["question"], "target": "C", "candidates": options},
        {
            "video": "a.mp4",
            "question": bare["question"],
            "question_type": "x",
            "candidates": options,
            "answer": "a dog",
        },
    ]
    for row in rows:
        (read,) = to_rows(row, 1)
        assert (read["options"], read["answer"]) == (options, "C")
        asked = lettered(read["question"], read["options"])
        assert asked == bare["question"]
        assert all(asked.count(option) == 1 for option in options)


def test_options_that_a_question_only_mentions_are_asked() -> None:
    for question in ("Is it a garden or a stair?", "A. Smith or B. Jones?", "a garden\na stair\nor what?"):
        assert lettered(question, ["a garden", "a stair"]).endswith("?\nA. a garden\nB. a stair")


def test_options_that_stand_in_the_question_alone_are_known() -> None:
    row = {key: value for key, value in HAYSTACK_LVBENCH.items() if key != "meta"}
    assert to_rows(row, 1)[0]["options"] == LONGVIDEOBENCH["candidates"]


def test_questions_of_a_kind_that_is_not_scored_are_refused_in_words(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [HAYSTACK_LVBENCH, HAYSTACK_LVBENCH | {"id": "s", "type": "sequence"}])
    told: list[str] = []
    assert len(read_samples(tmp_path / "rows.jsonl", lambda failure: told.append(failure.message))) == 1
    assert "'sequence' questions are not scored here, only multiple_choice, open_ended, grounding" in told[0]


@pytest.mark.parametrize(
    ("target", "kind"),
    [("B", "multiple_choice"), ("a red car", "open_ended"), ([3, 8], "grounding"), ("", "multiple_choice")],
)
def test_the_type_that_a_row_does_not_state_is_that_of_its_answer(target: Any, kind: str) -> None:
    assert to_rows({"video": "a.mp4", "question": "What?", "target": target}, 1)[0]["type"] == kind
