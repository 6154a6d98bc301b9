"""Predictions in the forms of others: what their scripts need is there, and ours read it to the same scores."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from evaluated import OPTIONS, given, sample_row, searching, write_video

from timesearch.base.files import write_jsonl
from timesearch.cli import main
from timesearch.evaluation.scoring import evaluate_files
from timesearch.evaluation.summary import headline
from timesearch.settings import Evaluate

SETTINGS = Evaluate(bootstrap=0, visual=False)


def predictions(folder: Path) -> Path:
    """Episodes that searched, that did not, that were given frames, that failed, and other kinds of questions."""
    rows = [searching(number, "a.mp4", [[4.5, 9.0], [9.5]], "A" if number % 2 else "B or C") for number in range(4)]
    rows.append(searching(4, "a.mp4", [], "A"))
    rows.append(given(5, "a.mp4", [2.5, 9.0], "a red square"))
    rows.append(sample_row(6, "a.mp4") | {"searched_seconds": [9.0], "predicted_answer": "A"})
    rows.append(searching(7, "a.mp4", [[9.0]], "A") | {"error": {"type": "engine", "message": "gone"}})
    rows.append(searching(8, "a.mp4", [[9.0]], "A") | {"answer": "a red square", "gt_seconds": []})
    open_ended = {"options": [], "type": "open_ended", "answer": "A red square", "meta": {"domain": "shapes"}}
    rows.append(searching(9, "a.mp4", [[9.0]], "red square") | open_ended)
    when = {"options": [], "type": "grounding", "answer": "[[8, 12]]"}
    rows.append(searching(10, "a.mp4", [[9.0]], '{"start_time": 8, "end_time": 10}') | when)
    write_jsonl(folder / "mine.jsonl", rows)
    return folder / "mine.jsonl"


def exported(path: Path, form: str, code: int, *options: str) -> list[dict[str, Any]]:
    out = path.with_name(f"{form}.jsonl")
    with pytest.raises(SystemExit) as ended:
        main(["export", str(path), "--to", form, "--out", str(out), "--params", "none", *options])
    assert (ended.value.code or 0) == code
    return [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []


def scores(path: Path) -> dict[str, Any]:
    (method,) = evaluate_files({"m": path}, SETTINGS, None)
    return headline(method.metrics)


def test_the_references_scripts_find_what_they_need_and_ours_the_same_scores(tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "a.mp4", hue=0)
    path = predictions(tmp_path)
    rows = exported(path, "timesearch-r", 0, "--videos", str(tmp_path / "videos"))
    assert len(rows) == 11
    for row in rows:
        assert all(isinstance(message["content"], list) for message in row["prediction"])
        assert isinstance(json.loads(row["meta"]), dict)
        assert Path(row["video"]).is_file()
        assert row["gt_frame_index"] == ([50] if row["id"] == "q8" else [45, 55])
    first, published = rows[0], json.loads(rows[0]["meta"])
    assert first["question"].endswith("?\nA. a red square\nB. a blue square\nC. nothing")
    assert first["target"] == {"answer": "A"}
    assert rows[8]["target"] == {"answer": "A"}
    assert (published["candidates"], published["correct_choice"], published["duration_group"]) == (OPTIONS, 0, 60)
    assert (published["option2"], published["option3"]) == ("nothing", "N/A")
    assert rows[6]["prediction"][-1]["content"] == [{"type": "text", "text": "<answer>A</answer>"}]
    shown = [block for block in rows[0]["prediction"][3]["content"] if block["type"] == "image"]
    assert [block["image"] for block in shown] == ["<image>", "<image>"]
    mine, theirs = scores(path), scores(tmp_path / "timesearch-r.jsonl")
    turns = {"turns_mean"}  # an episode without messages was given some
    assert {name: mine[name] for name in mine if name not in turns} == {
        name: theirs[name] for name in theirs if name not in turns
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "Video-MME": {
        **{"question_id": "001-1", "videoID": "fFjv93ACGo8", "duration": "short", "domain": "Knowledge"},
        **{"sub_category": "Geography", "task_type": "OCR Problems", "question": "Which one?"},
        **{"options": ["A. one.", "B. two."], "answer": "B"},
    },
    "MLVU": {
        **{"question_id": "x1", "video": "ego_1.mp4", "duration": 480.0, "question": "Which one?"},
        **{"candidates": ["one", "two"], "answer": "two", "question_type": "ego"},
    },
    "LongVideoBench": {
        **{"id": "y_0", "video_id": "y", "video_path": "y.mp4", "question": "Which one?", "duration": 8.0},
        **{"candidates": ["one", "two"], "correct_choice": 1, "duration_group": 15, "question_category": "S2E"},
    },
}


@pytest.mark.parametrize("benchmark", PUBLISHED)
def test_a_benchmarks_row_is_exported_as_it_was_published(tmp_path: Path, benchmark: str) -> None:
    """Each of the reference's scripts reads fields of the benchmark's own row."""
    published = PUBLISHED[benchmark]
    said = [{"role": "assistant", "content": "<answer>B</answer>"}]
    write_jsonl(tmp_path / "mine.jsonl", [{**published, "prediction": said}])
    (row,) = exported(tmp_path / "mine.jsonl", "timesearch-r", 0)
    doc = json.loads(row["meta"])
    assert {name: doc.get(name) for name in published} == published
    assert (row["target"], row["prediction"][-1]["content"][-1]["text"]) == ({"answer": "B"}, "<answer>B</answer>")
    mine, theirs = scores(tmp_path / "mine.jsonl"), scores(tmp_path / "timesearch-r.jsonl")
    assert mine == theirs
    assert mine["qa_accuracy"] == 1.0


def counted_as_searched(row: dict[str, Any]) -> list[float]:
    """Times that the reference's temporal script takes for those of searched frames."""
    times = []
    for message in row["prediction"]:
        for block in message["content"] if message["role"] == "tool" else []:
            with suppress(ValueError):
                times.append(float(block["text"].split("s")[0]) if block["type"] == "text" else None)
    return [time for time in times if time is not None]


def test_what_is_no_frame_does_not_count_as_searched(tmp_path: Path) -> None:
    rows = [searching(0, "a.mp4", [[9.0], [4.5]], "A"), searching(1, "a.mp4", [], "A"), sample_row(2, "a.mp4")]
    for row in rows:
        row["gt_seconds"], row["gt_spans"], row["gt_frame_index"] = [], [], [45]
    rows[0]["prediction"][3]["content"].append({"type": "text", "text": "12.0s what is said", "seconds": 12.0})
    rows[0]["prediction"].pop()  # ends with what was found
    write_jsonl(tmp_path / "mine.jsonl", rows)
    theirs = exported(tmp_path / "mine.jsonl", "timesearch-r", 0)
    assert [counted_as_searched(row) for row in theirs] == [[9.0, 4.5], [], []]
    assert [row["prediction"][-1]["content"][-1]["type"] for row in theirs] == ["text"] * 3
    assert scores(tmp_path / "mine.jsonl")["frames_mean"] == scores(tmp_path / "timesearch-r.jsonl")["frames_mean"]


def test_intervals_stand_in_the_target(tmp_path: Path) -> None:
    when = {"options": [], "type": "grounding", "answer": "[[8, 12], [14, 16]]", "gt_seconds": [], "gt_spans": []}
    write_jsonl(tmp_path / "mine.jsonl", [searching(0, "a.mp4", [[9.0]], "[[8, 10]]") | when])
    (row,) = exported(tmp_path / "mine.jsonl", "timesearch-r", 0)
    assert row["target"] == {"answer": "[[8, 12], [14, 16]]", "time": [[8, 12], [14, 16]]}


def test_the_log_of_lmms_eval_aggregates_to_our_accuracy(tmp_path: Path) -> None:
    path = predictions(tmp_path)
    rows = exported(path, "lmms-eval", 1)
    assert [row["doc_id"] for row in rows] == list(range(9))
    named = {*("doc_id", "doc", "target", "arguments", "resps", "filtered_resps"), *("doc_hash", "prompt_hash")}
    assert all(row.keys() >= named for row in rows)
    assert rows[0]["filtered_resps"] == ["B or C"]
    right = [row["lvb_acc"]["answer"] == row["lvb_acc"]["parsed_pred"] for row in rows]
    (method,) = evaluate_files({"m": path}, SETTINGS, None)
    own = [episode.values["qa_accuracy"] for episode in method.episodes if "qa_strict" in episode.values]
    assert sum(right) == sum(own)
    again = scores(tmp_path / "lmms-eval.jsonl")
    assert again["qa_accuracy"] == pytest.approx(sum(own) / len(own))
    assert again["temporal_episodes"] == 9


def test_a_log_that_lmms_eval_wrote_is_read(tmp_path: Path) -> None:
    doc = {"id": "x", "video_path": "a.mp4", "question": "?", "candidates": ["one", "two"], "correct_choice": 1}
    rows = [{"doc_id": 0, "doc": doc, "target": "B", "resps": [["B"]], "filtered_resps": ["B. two"]}]
    write_jsonl(tmp_path / "log.jsonl", rows)
    assert scores(tmp_path / "log.jsonl")["qa_accuracy"] == 1.0


def test_what_cannot_be_exported_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = predictions(tmp_path)
    assert exported(path, "timesearch-r", 1, "--videos", str(tmp_path)) == []
    assert "unknown_frame_rate" in (said := capsys.readouterr().err) or "missing_video" in said
    assert exported(path, "nobody", 2) == []
    assert "timesearch-r, lmms-eval" in capsys.readouterr().err
