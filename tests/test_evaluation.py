"""Metrics against golden vectors and other implementations, and the evaluation of whole files."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluated import OPTIONS, make_project, sample_row, searching, write_video
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric
from synthetic import make_video
from test_formats import HAYSTACK_LVBENCH, REFERENCE_MESSAGES, TSTAR

from timesearch.base.errors import RequestError
from timesearch.base.files import write_jsonl
from timesearch.cli import main
from timesearch.evaluation import frames
from timesearch.evaluation.episodes import Columns, Values, frame_times
from timesearch.evaluation.evaluate import run
from timesearch.evaluation.qa import parse_choice, published_choice
from timesearch.evaluation.results import files_by_name, tracked_metrics, write_evaluation, written_scores
from timesearch.evaluation.scoring import evaluate_files
from timesearch.evaluation.statistics import bootstrap_means, mcnemar, paired_bootstrap, percentile_interval
from timesearch.evaluation.summary import compare
from timesearch.evaluation.table import markdown_table, method_label, method_order, print_table, side_notes
from timesearch.evaluation.temporal import (
    nearest_neighbour_distances,
    precision_recall_f1,
    span_coverage,
    temporal_scores,
)
from timesearch.evaluation.visual import ssim_matrix, ssim_precision_recall
from timesearch.report.build import write_report
from timesearch.rewards import answer_letter, interval_iou
from timesearch.settings import Evaluate

WITHOUT_INTERVALS = Evaluate(bootstrap=0)


def score(path: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Metrics of rows, and the ids of those that had a problem, by reason."""
    write_jsonl(path / "rows.jsonl", rows)
    videos = options.pop("videos", None)
    (method,) = evaluate_files({"rows": path / "rows.jsonl"}, Evaluate(bootstrap=0, **options), videos)
    reasons: dict[str, list[str]] = {}
    for failure in method.failures:
        reasons.setdefault(failure.reason, []).append(failure.item)
    return method.metrics, reasons


# Temporal metrics


def test_temporal_metrics_equal_the_golden_vectors(golden: Path) -> None:
    for case in json.loads((golden / "temporal.json").read_text()):
        truth, found = case["gt_seconds"], case["pred_seconds"]
        expected = [case["precision"], case["recall"], case["f1"]]
        assert precision_recall_f1(truth, found, case["threshold"]) == pytest.approx(expected, abs=1e-12)
        distances = [case["annd_precision"], case["annd_recall"]]
        assert nearest_neighbour_distances(truth, found) == pytest.approx(distances, abs=1e-9)


def test_interval_iou_equals_the_golden_vectors(golden: Path) -> None:
    for case in json.loads((golden / "interval_iou.json").read_text()):
        assert interval_iou(case["a"], case["b"]) == pytest.approx(case["iou"], abs=1e-12)


def test_a_frame_exactly_at_the_threshold_counts() -> None:
    assert precision_recall_f1([10.0], [15.0, 15.01]) == (0.5, 1.0, pytest.approx(2 / 3))


def test_nothing_searched_finds_nothing() -> None:
    assert precision_recall_f1([10.0], []) == (0.0, 0.0, 0.0)
    assert precision_recall_f1([], [10.0]) == (0.0, 0.0, 0.0)
    assert nearest_neighbour_distances([10.0], []) is None


def test_inside_a_span_the_distance_is_zero() -> None:
    spans = [[10.0, 20.0], [50.0, 60.0]]
    assert precision_recall_f1(spans, [12.0, 22.0, 40.0], threshold=2.0) == (
        pytest.approx(2 / 3),
        0.5,
        pytest.approx(4 / 7),
    )
    assert span_coverage(spans, [20.0, 61.0]) == 0.5


def test_several_thresholds_at_once() -> None:
    scores = temporal_scores([10.0], [13.0], [5.0, 2.0])
    assert (scores["temporal_f1"], scores["temporal_f1@2"]) == (1.0, 0.0)
    assert scores["annd_recall"] == 3.0


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=6), st.lists(st.floats(0, 1e4), min_size=1, max_size=9))
def test_recall_never_falls_as_frames_are_added(truth: list[float], found: list[float]) -> None:
    fewer, all_of_them = precision_recall_f1(truth, found[:-1]), precision_recall_f1(truth, found)
    assert fewer.recall <= all_of_them.recall <= 1.0
    assert min(all_of_them.precision, all_of_them.recall) <= all_of_them.f1 + 1e-12
    assert all_of_them.f1 <= max(all_of_them.precision, all_of_them.recall) + 1e-12


# Visual metrics


def test_tstar_ssim_equals_the_golden_vectors(golden: Path) -> None:
    arrays = np.load(golden / "ssim.npz")
    for case in json.loads((golden / "ssim.json").read_text()):
        number = case["case"]
        found = ssim_precision_recall(arrays[f"{number}_gt"], arrays[f"{number}_pred"], mode="tstar")
        assert found == pytest.approx((case["ssim_precision"], case["ssim_recall"]), abs=1e-4)


@pytest.mark.parametrize("size", [(11, 11), (40, 64), (73, 57)])
def test_standard_ssim_equals_scikit_image(size: tuple[int, int]) -> None:
    from skimage.metrics import structural_similarity

    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8).repeat(20, 1).repeat(20, 2)[:, : size[0], : size[1]]
    noise = rng.integers(0, 256, (2, *size, 3), dtype=np.uint8)
    flat = np.full((1, *size, 3), 255, dtype=np.uint8)
    a, b = np.concatenate([smooth, flat]), np.concatenate([smooth[:1], noise, flat])
    expected = [
        [structural_similarity(x, y, gaussian_weights=True, channel_axis=-1, data_range=255) for y in b] for x in a
    ]
    assert np.abs(ssim_matrix(a, b, "standard") - expected).max() < 5e-5


def test_a_frame_equals_itself_in_both_modes() -> None:
    frames = np.random.default_rng(1).integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)
    for mode in ("tstar", "standard"):
        assert ssim_precision_recall(frames, frames, mode) == pytest.approx((1.0, 1.0), abs=1e-5)
        assert ssim_precision_recall(frames, frames[:0], mode) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("gt", "pred", "mode", "words"),
    [
        ((30, 40, 3), (30, 41, 3), "standard", "different sizes"),
        ((30, 40, 4), (30, 40, 4), "tstar", "shape"),
        ((9, 40, 3), (9, 40, 3), "standard", "smaller than the SSIM window"),
        ((30, 40, 3), (30, 40, 3), "wrong", "mode must be"),
    ],
)
def test_frames_that_cannot_be_compared(gt: tuple, pred: tuple, mode: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ssim_precision_recall([np.zeros(gt, np.uint8)], [np.zeros(pred, np.uint8)], mode)


def test_visual_metrics_look_at_the_source_at_exact_times(tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "a.mp4", hue=0)
    row = sample_row(0, "a.mp4") | {"gt_seconds": [9.0], "gt_spans": [], "predicted_answer": "A"}
    same, blue = row | {"searched_seconds": [9.0]}, row | {"id": "blue", "searched_seconds": [2.0]}
    metrics, reasons = score(tmp_path, [same], videos=tmp_path / "videos")
    assert metrics["visual_f1"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["visual_tstar_f1"] == pytest.approx(1.0, abs=1e-6)
    other, _ = score(tmp_path, [blue], videos=tmp_path / "videos")
    assert other["visual_f1"] < 0.98
    none, _ = score(tmp_path, [row | {"searched_seconds": []}], videos=tmp_path / "videos")
    assert (none["visual_f1"], none["visual_episodes"], reasons) == (0.0, 1, {})


def test_visual_metrics_of_many_questions_about_one_video_take_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "videos" / "a.mp4", hue=0)
    rows = [
        sample_row(i, "a.mp4") | {"gt_seconds": [i / 2, i / 2 + 0.2], "searched_seconds": [i / 2, 5.0], "gt_spans": []}
        for i in range(30)
    ]
    (tmp_path / "whole").mkdir()
    together, _ = score(tmp_path / "whole", rows, videos=tmp_path / "videos")
    monkeypatch.setattr(frames, "_TRUTH_BUDGET", 3 * frames._STATISTICS * 160 * 96)
    tracemalloc.start()
    apart, reasons = score(tmp_path, rows, videos=tmp_path / "videos")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reasons == {}
    assert apart == together
    assert peak < 0.5 * 60 * frames._STATISTICS * 160 * 96


def test_a_missing_video_is_named_and_costs_the_visual_metrics_only(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    row = sample_row(0, "a.mp4") | {"searched_seconds": [9.0], "predicted_answer": "A"}
    metrics, reasons = score(tmp_path, [row], videos=tmp_path / "videos")
    assert reasons == {"missing_video": ["q0"]}
    assert (metrics["temporal_recall"], metrics["visual_f1"], metrics["qa_accuracy"]) == (1.0, None, 1.0)


# Answers


def test_parse_choice_equals_the_golden_answers(golden: Path) -> None:
    for case in json.loads((golden / "choices.json").read_text()):
        assert parse_choice(case["response"], case["candidates"]) == case["parsed"], case["response"]


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("b", None),
        ("", None),
        (None, None),
        ("I cannot tell", None),
        ("F", None),
        ("option B.", "B"),
        ("(A) or (C)", "C"),
        ("it must be a blue square, I am sure", "B"),
        ("a blue square", None),
    ],
)
def test_parse_choice(response: str | None, letter: str | None) -> None:
    assert parse_choice(response, OPTIONS) == letter


@given(st.text(max_size=40), st.lists(st.text(max_size=8), max_size=6))
def test_parse_choice_gives_an_option_or_none(response: str, options: list[str]) -> None:
    letter = parse_choice(response, options)
    assert letter is None or letter in "ABCDEFG"[: len(options) or 7]


@pytest.mark.parametrize(
    ("turns", "letter", "strict"),
    [
        (["<answer>B</answer>"], "B", "B"),
        (["<answer>B or C</answer>"], "B", "C"),  # MMMU's rule takes the letter that is named last
        (["<answer>(B)</answer>"], "B", "B"),
        (["<answer>B a dog</answer>"], "B", "B"),
        (["B: that one"], "B", None),  # no answer was given, says the strict way
        (["<answer>C</answer>", "<think>Hm.</think>"], "C", None),
        (["I cannot tell"], None, None),
        (["<answer>It is a blue square, I think so</answer>"], None, "B"),
    ],
)
def test_answers_are_read_as_published_beside_the_strict_way(
    tmp_path: Path, turns: list[str], letter: str | None, strict: str | None
) -> None:
    messages = [{"role": "assistant", "content": turn} for turn in turns]
    assert published_choice(messages, None, OPTIONS) == letter
    for gold in "ABC":
        row = sample_row(0, "a.mp4") | {"answer": gold, "prediction": messages}
        by_strict, _ = score(tmp_path, [row])
        by_published, _ = score(tmp_path, [row], qa="published")
        assert by_strict["qa_accuracy"] == by_strict["qa_strict"] == by_published["qa_strict"] == (strict == gold)
        expected = 1 / 3 if letter is None else float(letter == gold)
        assert by_published["qa_accuracy"] == by_strict["qa_published"] == pytest.approx(expected)
        assert by_strict["qa_differ"] == (letter != strict)


def test_the_mean_of_tstar_leaves_episodes_without_search_out(tmp_path: Path) -> None:
    rows = [searching(0, "a.mp4", [[9.0, 11.0]], "A"), searching(1, "a.mp4", [], "A")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (method,) = evaluate_files({"rows": tmp_path / "rows.jsonl"}, WITHOUT_INTERVALS, None)
    assert (method.metrics["temporal_f1"], method.metrics["temporal_tstar_f1"]) == (0.5, 1.0)
    assert side_notes([method]) == ["rows: temporal F1 100.0 by T*, which leaves episodes without search out"]


def test_right_answers_may_be_letters_or_texts() -> None:
    assert [answer_letter(answer, OPTIONS) for answer in ("B", "B. a blue square", "a blue square", "Z", "")] == [
        *("B", "B", "B"),
        *(None, None),
    ]


def test_answers_come_from_the_messages_and_unparsed_ones_are_wrong(tmp_path: Path) -> None:
    right = searching(0, "a.mp4", [[9.0]], "A") | {"predicted_answer": "C"}
    unparsed = searching(1, "a.mp4", [[9.0]], "who knows") | {"predicted_answer": "A"}
    unanswered = searching(2, "a.mp4", [[9.0]], "A")
    unanswered["prediction"] = unanswered["prediction"][:-1]
    metrics, _ = score(tmp_path, [right, unparsed, unanswered])
    assert (metrics["qa_accuracy"], metrics["qa_unparsed"], metrics["qa_episodes"]) == (pytest.approx(1 / 3), 2, 3)


def test_open_ended_and_grounding_answers(tmp_path: Path) -> None:
    base = {"video": "a.mp4", "question": "?", "searched_seconds": [1.0]}
    rows = [
        base | {"id": "o1", "answer": "The red car.", "type": "open_ended", "predicted_answer": "a red car"},
        base | {"id": "o2", "answer": "red car", "type": "open_ended", "predicted_answer": "a bus"},
        base | {"id": "g1", "gt_spans": [[0, 10]], "type": "grounding", "predicted_answer": "from 5 to 15"},
        base
        | {
            "id": "g2",
            "answer": "[[0, 10]]",
            "type": "grounding",
            "predicted_answer": '{"start_time": 0, "end_time": 10}',
        },
        base | {"id": "g3", "answer": "[0, 10]", "type": "grounding", "predicted_answer": "9" * 5000},
        base | {"id": "g4", "answer": "soon", "type": "grounding", "predicted_answer": "[0, 1]"},
    ]
    metrics, reasons = score(tmp_path, rows)
    assert metrics["qa_accuracy"] == 0.5
    assert metrics["grounding_iou"] == pytest.approx((5 / 15 + 1 + 0) / 3)
    assert (metrics["qa_unparsed"], reasons["bad_answer"]) == (1, ["g4"])
    assert metrics["by"]["type"]["open_ended"]["episodes"] == 2


def test_completeness_is_right_both_times(tmp_path: Path) -> None:
    rows = [searching(i, "a.mp4", [[9.0]], answer) for i, answer in enumerate("AAB")]
    rows[1]["reanswer"] = "C"
    rows.append(searching(3, "a.mp4", [], "A"))
    metrics, _ = score(tmp_path, rows)
    assert (metrics["qa_accuracy"], metrics["reanswer_accuracy"]) == (0.75, pytest.approx(1 / 3))
    assert metrics["completeness"] == 0.25


# Whole files


def test_counts_groups_and_the_two_f1s(tmp_path: Path) -> None:
    rows = [searching(0, "a.mp4", [[9.0], [11.0]], "A"), searching(1, "a.mp4", [[1.0, 9.0, 18.0]], "B")]
    metrics, reasons = score(tmp_path, rows, thresholds=[1.0, 5.0])
    assert reasons == {}
    assert (metrics["episodes"], metrics["frames_mean"], metrics["tool_calls_mean"]) == (2, 2.5, 1.5)
    assert (metrics["temporal_precision"], metrics["temporal_recall"]) == (pytest.approx(2 / 3), 0.75)
    assert metrics["temporal_f1"] == pytest.approx((1.0 + 2 * (1 / 3) * 0.5 / (1 / 3 + 0.5)) / 2)
    assert metrics["temporal_f1_of_means"] == pytest.approx(2 * (2 / 3) * 0.75 / (2 / 3 + 0.75))
    assert metrics["temporal_recall@5"] == 1.0
    assert metrics["span_coverage"] == 1.0
    assert list(metrics["by"]["duration_group"]) == ["15", "60"]
    assert metrics["by"]["duration_group"]["60"]["qa_accuracy"] == 1.0


def test_every_bad_row_is_counted_and_named(tmp_path: Path) -> None:
    base = sample_row(0, "a.mp4") | {"predicted_answer": "A", "searched_seconds": [9.0, 11.0]}
    rows = [
        base | {"id": "good"},
        base | {"id": "good"},
        base | {"id": "no-truth", "gt_seconds": [], "gt_spans": []},
        sample_row(0, "a.mp4") | {"id": "empty"},
        base | {"id": "nan", "searched_seconds": [9.0, math.nan, 11.0, -3.0]},
        base | {"id": "late", "searched_seconds": [9.0, 11.0, 500.0]},
        base | {"id": "bad-truth", "gt_seconds": [9.0, 1e9, math.nan], "gt_spans": []},
        base | {"id": "type", "type": "riddle"},
        base | {"id": "field", "searched_seconds": "soon"},
        base | {"id": "messages", "prediction": [{"content": "no role"}]},
        base | {"id": "failed", "error": {"type": "timeout", "message": "too slow"}},
        base | {"id": "answer", "answer": "Q"},
        base | {"id": "frames", "gt_seconds": [], "gt_spans": [], "gt_frame_index": [30]},
    ]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    with path.open("a") as handle:
        handle.write('{"id": "cut", "vid')
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--predictions", str(path), "--out", str(tmp_path / "out"), "--params", "none.yaml"])
    assert stopped.value.code == 1
    failures = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert {(failure["item"], failure["reason"]) for failure in failures} == {
        ("good", "duplicate_id"),
        ("no-truth", "no_ground_truth"),
        ("empty", "empty_prediction"),
        ("nan", "bad_times"),
        ("late", "bad_times"),
        ("bad-truth", "bad_ground_truth"),
        ("type", "unknown_type"),
        ("field", "invalid_row"),
        ("messages", "invalid_row"),
        ("failed", "episode_error"),
        ("answer", "bad_answer"),
        ("frames", "unknown_frame_rate"),
        ("frames", "no_ground_truth"),
        ("line 14", "not_json"),
    }
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["episodes"], metrics["errors"]) == (9, 1)
    assert metrics["failures"] == {
        reason: sum(f["reason"] == reason for f in failures) for reason in metrics["failures"]
    }
    episodes = (tmp_path / "out" / "evaluation" / "episodes" / "rows.jsonl").read_text().splitlines()
    scores = {row["id"]: row for row in map(json.loads, episodes)}
    assert scores["empty"]["temporal_f1"] == scores["empty"]["qa_accuracy"] == 0.0
    assert scores["nan"]["temporal_precision"] == 0.5
    assert scores["late"]["temporal_precision"] == pytest.approx(2 / 3)
    assert scores["bad-truth"]["temporal_recall"] == 1.0
    assert "temporal_f1" not in scores["no-truth"]
    assert "qa_accuracy" not in scores["answer"]


def test_the_reference_and_tstar_evaluate_without_conversion(tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "Ab3dEfGhIjK.mp4", hue=0)
    row = HAYSTACK_LVBENCH | {"video": "/abs/root/LongVideoBench/videos/Ab3dEfGhIjK.mp4", "duration": 20.0}
    row |= {"gt_frame_index": [52], "prediction": REFERENCE_MESSAGES}
    metrics, reasons = score(tmp_path, [row], videos=tmp_path / "videos", visual=False, thresholds=[1.0])
    assert reasons == {}
    assert (metrics["qa_accuracy"], metrics["tool_calls_mean"], metrics["frames_mean"]) == (1.0, 1.0, 2.0)
    assert (metrics["temporal_precision"], metrics["temporal_recall"]) == (0.5, 1.0)
    assert metrics["by"]["question_category"]["S2O"]["qa_accuracy"] == 1.0
    write_video(tmp_path / "videos" / "fFjv93ACGo8.mp4", hue=0)
    metrics, reasons = score(tmp_path, [TSTAR], videos=tmp_path / "videos", visual=False)
    assert reasons == {}
    assert (metrics["temporal_precision"], metrics["qa_accuracy"]) == (pytest.approx(1 / 3), None)


def test_odd_groups_and_names_reach_tables_and_records_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["..", "a//b", "a?", "a!", "/", " ", "\ud83d", "x" * 200, "c" * 201, "\n\x1b[31m", "[/red]"]
    metas = [*words, ["p", "q", "p"], list(range(101)), {"a": 1}, None, True]
    rows = [sample_row(number, "a.mp4") | {"meta": {"duration_group": meta}} for number, meta in enumerate(metas)]
    name = "[red] a|b\\\x1b[31m" + "n" * 100
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = files_by_name(sorted(tmp_path.glob("*.jsonl")))
    methods = evaluate_files(files, WITHOUT_INTERVALS, None)
    result = write_evaluation(methods, tmp_path / "results", WITHOUT_INTERVALS, 0)
    assert sorted(failure.item.rpartition("/")[2] for failure in result.failures if failure.reason == "bad_group") == [
        "q12",
        "q12",
        "q8",
        "q8",
    ]
    assert methods[0].metrics["by"]["duration_group"].keys() == {
        *words[:6], "\ufffd", "x" * 200, "\n\x1b[31m", "[/red]", "p", "q", "True",
    }  # fmt: skip
    for method in methods:
        tracked = tracked_metrics(method)
        assert len(tracked) == len(set(tracked)) > 13 * 3
        for key in tracked:
            _validate_metric(key, 0.0, 0, 0)
    assert len({key.split("/")[0] for method in methods for key in tracked_metrics(method)}) == 2
    print_table(methods)
    shown = capsys.readouterr().out
    assert "[red] a|b" in shown
    assert "\x1b" not in shown
    print_table(written_scores(tmp_path / "results"))
    assert capsys.readouterr().out == shown
    table = markdown_table(methods).splitlines()
    assert {line.replace("\\\\", "").replace("\\|", "").count("|") for line in table} == {9}
    write_report(files, tmp_path / "results/evaluation", tmp_path / "report.html")


def test_a_group_of_too_many_values_is_left_out(tmp_path: Path) -> None:
    rows = [sample_row(number, "a.mp4") | {"meta": {"duration_group": number}} for number in range(501)]
    metrics, reasons = score(tmp_path, rows)
    assert reasons["bad_group"] == ["duration_group"]
    assert metrics["failures"]["bad_group"] == 1
    assert metrics["by"].keys() == {"type"}


def test_a_path_cannot_lead_out_of_the_videos_folder(tmp_path: Path) -> None:
    write_video(tmp_path / "secret.mp4", hue=0)
    (tmp_path / "videos").mkdir()
    row = sample_row(0, "../secret.mp4") | {"searched_seconds": [9.0], "predicted_answer": "A"}
    _, reasons = score(tmp_path, [row], videos=tmp_path / "videos")
    assert reasons == {"missing_video": ["q0"]}


def test_a_benchmark_without_times_is_no_problem(tmp_path: Path) -> None:
    row = sample_row(0, "a.mp4") | {"gt_seconds": [], "gt_spans": [], "predicted_answer": "A"}
    metrics, reasons = score(tmp_path, [row])
    assert reasons == {}
    assert (metrics["temporal_f1"], metrics["qa_accuracy"]) == (None, 1.0)


def test_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = [searching(i, "a.mp4", [[float(i), 9.0]], "ABC"[i % 3]) for i in range(12)]
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("b", "a")}
    for folder in ("first", "second"):
        methods = evaluate_files(files, Evaluate(bootstrap=200), None)
        write_evaluation(methods, tmp_path / folder, Evaluate(bootstrap=200), seed=0)
    written = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*"))
    assert len(written) >= 9
    for path in written:
        assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes(), path


# Intervals and comparisons


def test_intervals_cover_the_mean_and_narrow_with_more_episodes() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.2, (400, 2))
    values[:, 1] = np.nan
    draws = bootstrap_means(values.T, 500, seed=0)
    low, high = percentile_interval(draws[:, 0]) or (0, 0)
    assert low < values[:, 0].mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / 20, rel=0.2)
    assert percentile_interval(draws[:, 1]) is None
    few = percentile_interval(bootstrap_means(values[:25].T, 500, seed=0)[:, 0]) or (0, 0)
    assert few[1] - few[0] > 2 * (high - low)


def test_gaps_are_left_out_of_the_draws() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((50, 3))
    values[:20, 1] = values[:, 2] = np.nan
    draws = bootstrap_means(values.T, 40, seed=3)
    rng = np.random.default_rng(3)
    for draw in draws:
        drawn = values[rng.integers(0, 50, 50)]
        assert draw[:2] == pytest.approx(np.nanmean(drawn[:, :2], axis=0))
        assert math.isnan(draw[2])


def test_values_are_a_mapping_over_columns_that_all_episodes_share() -> None:
    columns = Columns()
    a, b = Values(columns), Values(columns)
    a.update(x=1, y=2.0)
    b["z"] = 0.0
    assert (dict(a), dict(b), len(a), len(b)) == ({"x": 1.0, "y": 2.0}, {"z": 0.0}, 2, 1)
    assert ("x" in b, b.get("x"), b.get("w", 5), a.get("z")) == (False, None, 5, None)
    assert columns.numbers("y") == pytest.approx([2, math.nan], nan_ok=True)
    del a["x"]
    assert list(a) == ["y"]
    with pytest.raises(KeyError):
        a["x"]


def test_mcnemar_is_the_exact_binomial_test() -> None:
    a = [True] * 10 + [False] * 2 + [True] * 5
    b = [False] * 10 + [True] * 2 + [True] * 5
    tail = sum(math.comb(12, k) for k in range(3)) / 2**12
    assert mcnemar(a, b) == {"only_a": 10, "only_b": 2, "p_value": pytest.approx(2 * tail)}
    assert mcnemar([True], [True])["p_value"] == 1.0


def test_paired_bootstrap_sees_a_difference_that_every_episode_shows() -> None:
    a = np.random.default_rng(0).uniform(0, 0.8, 50)
    better = paired_bootstrap(a, a + 0.1, 500, seed=0)
    assert better["difference"] == pytest.approx(0.1)
    assert (better["low"], better["high"]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert better["p_value"] == 0.0
    assert paired_bootstrap(a, a, 500, seed=0)["p_value"] == 1.0


def test_methods_are_compared_on_the_episodes_that_both_have(tmp_path: Path) -> None:
    good = [searching(i, "a.mp4", [[9.0, 11.0]], "A") for i in range(8)]
    poor = [searching(i, "a.mp4", [[9.0, 1.0]], "B") for i in range(2, 10)]
    write_jsonl(tmp_path / "grpo_csv.jsonl", good)
    write_jsonl(tmp_path / "coldstart.jsonl", poor)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("grpo_csv", "coldstart")}
    settings_ = Evaluate(bootstrap=100, thresholds=[2.0])
    methods = evaluate_files(files, settings_, None)
    (pair,) = compare(methods, settings_, seed=0)
    assert (pair["a"], pair["b"], pair["episodes"]) == ("coldstart", "grpo_csv", 6)
    assert pair["qa_accuracy"] == {"difference": 1.0, "only_a": 0, "only_b": 6, "p_value": 0.03125}
    assert pair["temporal_f1"]["low"] > 0
    table = markdown_table(methods).splitlines()
    assert table[2].startswith("| cold start |")
    assert "100.0 ± 0.0" in table[3]


def test_accuracy_by_hops_stands_in_table_and_metrics_where_questions_tell_their_hops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hops: list[Any] = [1, 1, 2, 3, "3", "|\x1b[31m"]
    rows = [
        searching(i, "a.mp4", [[9.0, 11.0]], "A" if i % 2 else "B") | {"meta": {"hops": each}}
        for i, each in enumerate(hops)
    ]
    write_jsonl(tmp_path / "grpo_csv.jsonl", rows)
    write_jsonl(tmp_path / "uniform.jsonl", [row | {"meta": {}} for row in rows])
    settings = Evaluate(bootstrap=0, groups=["hops"])
    methods = evaluate_files({name: tmp_path / f"{name}.jsonl" for name in ("uniform", "grpo_csv")}, settings, None)
    write_evaluation(methods, tmp_path / "results", settings, 0)
    head, _, uniform, trained = (tmp_path / "results" / "table.md").read_text().splitlines()
    assert head.endswith("| tool calls | 1 hop | 2 hops | 3 hops |")
    assert uniform.endswith("| – | – | – |")
    assert trained.endswith("| 50.0 | 0.0 | 50.0 |")
    written = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert "hops" not in written["uniform"]
    assert written["grpo_csv"]["hops"]["3"]["episodes"] == 2
    assert tracked_metrics(methods[1])["grpo_csv/hops/1/qa_accuracy"] == 0.5
    print_table(methods)
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert printed.index("calls") < printed.index("hops")


def test_methods_stand_in_the_order_of_the_table() -> None:
    names = ["other", "grpo_csv", "one_shot_topk", "uniform", "grpo", "one_shot", "coldstart", "base", "oracle"]
    ordered = ["uniform", "one_shot", "one_shot_topk", "oracle", "base", "coldstart", "grpo", "grpo_csv", "other"]
    assert sorted(names, key=method_order) == ordered
    assert method_label("one_shot_topk") == "one-shot retrieval (topk)"


# The stage


def test_the_stage_writes_results_and_records_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import mlflow

    project = make_project(tmp_path)
    outcome = run(project)
    assert outcome.failures == []
    results = tmp_path / "results"
    metrics = json.loads((results / "metrics.json").read_text())
    assert list(metrics) == ["uniform", "grpo_csv"]
    assert metrics["uniform"]["visual_episodes"] == 6
    assert metrics["grpo_csv"]["temporal_f1@5"] >= metrics["grpo_csv"]["temporal_f1"]
    assert not any(isinstance(value, (dict, list)) for value in metrics["uniform"].values())
    assert (results / "plots" / "f1_by_frames.csv").read_text().startswith("method,frames,temporal_f1,episodes\n")
    assert (results / "report.html").stat().st_size > 10_000
    assert "GRPO-CSV" in capsys.readouterr().out
    mlflow.set_tracking_uri(project.tracking.uri)
    (record,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert record.data.metrics["grpo_csv/temporal_f1"] == pytest.approx(metrics["grpo_csv"]["temporal_f1"])
    assert record.data.metrics["uniform/duration_group/15/qa_accuracy"] == 1.0
    names = {item.path for item in mlflow.MlflowClient().list_artifacts(record.info.run_id)}
    assert {"report.html", "metrics.json", "table.md", "evaluation"} <= names


def test_the_stage_leaves_predictions_aside_that_the_settings_do_not_ask_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = make_project(tmp_path, episodes=3)
    project.evaluate.visual = False
    predictions = tmp_path / "results" / "predictions"
    (predictions / "base.jsonl").write_text("of an earlier run, and no JSON\n")
    assert run(project).failures == []
    assert "not scored, as infer.baselines does not name them: predictions of base" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "results" / "metrics.json").read_text())) == ["uniform", "grpo_csv"]
    assert "of an earlier run" not in (tmp_path / "results" / "report.html").read_text()
    project.infer.baselines, project.train.rewards["completeness"] = [], 0.0
    with pytest.raises(RequestError, match=r"holds no predictions of grpo: run `timesearch infer`"):
        run(project)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_prediction_breaks_the_evaluation(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    times = st.lists(st.floats() | st.integers(-5, 30), max_size=4)
    block = st.dictionaries(st.sampled_from(["type", "text", "image", "seconds"]), st.text(max_size=4), max_size=3)
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(["assistant", "tool", "user"])},
        optional={"content": st.none() | st.text(max_size=30) | st.lists(block, max_size=3)},
    )
    rows = data.draw(
        st.lists(
            st.fixed_dictionaries(
                {"id": st.sampled_from("abc"), "video": st.just("a.mp4"), "question": st.text(max_size=3)},
                optional={
                    "type": st.sampled_from(["multiple_choice", "open_ended", "grounding"]),
                    "options": st.lists(st.text(max_size=3), max_size=3),
                    "answer": st.text(max_size=3),
                    "searched_seconds": times,
                    "gt_seconds": times,
                    "gt_spans": st.lists(st.tuples(st.floats(), st.floats()), max_size=2),
                    "duration": st.floats() | st.none(),
                    "prediction": st.lists(message, max_size=4),
                    "predicted_answer": st.text(max_size=4),
                },
            ),
            max_size=4,
        )
    )
    metrics, reasons = score(tmp_path_factory.mktemp("fuzz"), rows)
    assert metrics["episodes"] + len(reasons.get("duplicate_id", [])) + len(reasons.get("invalid_row", [])) == len(rows)
    json.dumps(metrics, allow_nan=False)


def test_times_and_spans_that_are_none_of_the_video_are_named(tmp_path: Path) -> None:
    base = {"video": "a.mp4", "question": "?", "duration": 100, "searched_seconds": [50]}
    rows = [
        base | {"id": "half-past", "gt_spans": [[40, 60], [240, 260]]},
        base | {"id": "over-end", "gt_spans": [[90, 130]]},
        base | {"id": "reversed", "gt_spans": [[60, 40]]},
        base | {"id": "nan", "gt_spans": [[math.nan, 60], [40, 60]]},
        base | {"id": "seconds", "gt_seconds": [50, 250]},
        base | {"id": "unknown length", "duration": math.nan, "gt_seconds": [50]},
        base | {"id": "negative length", "duration": -1, "gt_seconds": [50]},
        base | {"id": "letters", "options": [str(number) for number in range(27)]},
        base | {"id": "huge", "gt_frame_index": [10**30]},
        base | {"id": "name", "video": "x" * 300 + ".mp4", "gt_frame_index": [12.0]},
        base | {"id": "nul", "video": "a\0.mp4"},
        base | {"id": ""},
    ]
    (tmp_path / "videos").mkdir()
    metrics, reasons = score(tmp_path, rows, videos=tmp_path / "videos", visual=False)
    assert reasons["bad_ground_truth"] == ["half-past", "over-end", "reversed", "nan", "seconds"]
    assert reasons["invalid_row"] == ["negative length", "letters", "huge", "nul", "line 12"]
    assert reasons["unknown_frame_rate"] == ["name"]
    assert (metrics["episodes"], metrics["span_coverage"]) == (7, 1.0)


def test_frame_numbers_count_on_where_a_second_recording_is_joined(tmp_path: Path) -> None:
    for kind, codec in (("ts", "libx264"), ("vob", "mpeg2video")):
        one = make_video(tmp_path / f"one.{kind}", "-c:v", codec, seconds=2, size="160x96")
        joined = tmp_path / f"joined.{kind}"
        joined.write_bytes(one.read_bytes() * 3)
        times = frame_times(joined)
        assert len(times) == 150
        assert np.diff(times) == pytest.approx(0.04, abs=1e-3)


def test_a_frame_number_stands_for_the_time_at_which_it_is_shown(tmp_path: Path) -> None:
    from fractions import Fraction

    import av

    (tmp_path / "videos").mkdir()
    with av.open(str(tmp_path / "videos" / "vfr.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time in (*range(0, 2000, 100), *range(2000, 30_000, 2000)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), time // 120, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    row = {"id": "a", "video": "vfr.mp4", "question": "?", "searched_seconds": [22.0]}
    metrics, reasons = score(
        tmp_path,
        [row | {"gt_frame_index": [30]}, row | {"id": "b", "gt_frame_index": [30, 34, -1]}],
        videos=tmp_path / "videos",
        visual=False,
        thresholds=[0.1],
    )
    assert metrics["temporal_f1"] == 1.0
    assert reasons == {"bad_ground_truth": ["b"]}
