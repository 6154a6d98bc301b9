"""Rows that others publish, turned into the project's own: benchmarks' questions and other systems' predictions.

A row's form is told by the fields that only it has:

=====================  ==============================================================================================
LongVideoBench         ``video_path``, ``candidates`` (or ``option0`` ...), ``correct_choice``; ``position``: frame
                       numbers of the source video
Haystack-LVBench       the reference's form: ``video``, ``question``, ``target``, ``gt_frame_index``, and the
                       LongVideoBench row as a JSON text in ``meta``; its output files add ``prediction``
Haystack-Ego4D         LV-Haystack's table: ``video_id``, ``frame_indexes_video``, ``video_metadata``
T*                     ``video_path``, ``options`` as one text, ``keyframe_timestamps`` in seconds
Video-MME              ``videoID``, ``question_id``, ``task_type``
MLVU                   ``video``, ``question_type``, ``candidates`` or ``scoring_points``
LVBench                ``key``, and ``qa``: one row a video, one entry a question; or a table of a row a question,
                       with ``time_reference``
=====================  ==============================================================================================

Fields that a sample has no place for stay in its `meta`, where evaluation finds the groups to report by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from timesearch.messages import tagged_answers
from timesearch.samples import LETTERS, Prediction

Row = dict[str, Any]

_OWN_FIELDS = frozenset(Prediction.model_fields)
_EPISODE_FIELDS = ("prediction", "keyframe_timestamps", "searched_seconds", "predicted_answer", "error", "reanswer")
_BULKY_FIELDS = ("frame_distribution", "keyframe_distribution", "grounding_objects")
_LONGVIDEOBENCH_FIELDS = (
    *("id", "video_path", "question", "candidates", "correct_choice", "duration", "position", "gt_frame_index"),
    *(f"option{i}" for i in range(5)),
)
_OPTION_LETTER = re.compile(r"\s*+\(?([A-Z])\s*+[).:]\s*+")
_CLOCK = re.compile(r"(?<!\d)(?:(\d++):)?(\d++):(\d++(?:\.\d++)?+)")


def to_rows(row: Row, number: int) -> list[Row]:
    """Turn a row of any known form into rows of the project's own, with the fields of `Sample` or `Prediction`.

    Args:
        row: an object of a JSON lines, JSON or Parquet file.
        number: its place in the file, from 1; part of the ids of rows that have none.

    Returns:
        One row, or one for each question of a row that holds several. A row in the project's own form, or in none that
        is known, comes back as it is: validation then says what is wrong with it.
    """
    if row.keys() <= _OWN_FIELDS and not isinstance(row.get("meta"), str):
        return [row]
    for knows, convert in _FORMS:
        if knows(row):
            return [{**_episode(row), **sample} for sample in convert(row, number)]
    return [row]


def _episode(row: Row) -> Row:
    """What an output file adds to a sample: messages, searched times, answer, error."""
    found: Row = {name: row[name] for name in _EPISODE_FIELDS if row.get(name) is not None}
    if "keyframe_timestamps" in found:
        found["searched_seconds"] = found.pop("keyframe_timestamps")
    if isinstance(found.get("prediction"), str):
        text = found.pop("prediction")
        found["predicted_answer"] = [text.strip(), *tagged_answers(text)][-1]
    if isinstance(found.get("error"), str):
        found["error"] = {"type": "error", "message": found["error"]}
    return found


def _rest(row: Row, *used: str) -> Row:
    dropped = {*used, *_EPISODE_FIELDS, *_BULKY_FIELDS}
    return {name: value for name, value in row.items() if name not in dropped}


def options_of(value: Any) -> list[str]:
    """Options, without their letters, from a list, from a text of one option a line, or from a mapping by letter."""
    if isinstance(value, dict):
        return [str(text) for _, text in sorted(value.items()) if text is not None]
    lines = value.splitlines() if isinstance(value, str) else [str(item) for item in value or []]
    options = [line.strip() for line in lines if line.strip()]
    marks = [_OPTION_LETTER.match(option) for option in options]
    if options and [mark.group(1) for mark in marks if mark] == list(LETTERS[: len(options)]):
        return [option[mark.end() :] for option, mark in zip(options, marks, strict=True) if mark]
    return options


def _kind(options: list[str]) -> str:
    return "multiple_choice" if options else "open_ended"


def _longvideobench(row: Row, number: int) -> list[Row]:
    numbered = [row[f"option{i}"] for i in range(5) if row.get(f"option{i}") not in (None, "", "N/A")]
    options = options_of(row.get("candidates") or numbered)
    choice = row.get("correct_choice")
    return [
        {
            "id": str(row.get("id") or f"{row.get('video_id', 'question')}_{number}"),
            "video": row["video_path"],
            "question": row["question"],
            "options": options,
            "answer": LETTERS[choice] if isinstance(choice, int) and 0 <= choice < len(options) else "",
            "type": "multiple_choice",
            "duration": row.get("duration"),
            "gt_frame_index": row.get("gt_frame_index") or row.get("position") or [],
            "meta": {
                "benchmark": "LongVideoBench",
                **_rest(row, *_LONGVIDEOBENCH_FIELDS),
            },
        }
    ]


def _reference(row: Row, number: int) -> list[Row]:
    """The reference's rows. `target` holds the answer, alone or in an object; options stand in the published `meta`."""
    meta = _unpacked(row.get("meta"))
    published: Row = {}
    for knows, convert in _FORMS:
        if meta and convert is not _reference and knows(meta):
            published = convert(meta, number)[0]
            break
    target = row.get("target", row.get("answer", published.get("answer", "")))
    answer, spans = _target(target)
    options = options_of(row.get("options") or row.get("candidates")) or published.get("options", [])
    return [
        {
            "id": str(row.get("id", number)),
            "video": row["video"],
            "question": row["question"],
            "options": options,
            "answer": answer or published.get("answer", ""),
            "type": row.get("type") or "multiple_choice",
            "duration": row.get("duration", published.get("duration")),
            "gt_seconds": row.get("gt_seconds") or [],
            "gt_frame_index": row.get("gt_frame_index") or published.get("gt_frame_index", []),
            "gt_spans": row.get("gt_spans") or spans,
            "split": row.get("split") or "",
            "meta": {
                **(published.get("meta") or meta),
                **_rest(row, "meta", "target", "candidates", *_OWN_FIELDS),
            },
        }
    ]


def _unpacked(meta: Any) -> Row:
    """`meta` as an object: the reference writes it as JSON text, sometimes in a list, sometimes twice over."""
    for _ in range(4):
        if isinstance(meta, list) and len(meta) == 1:
            meta = meta[0]
        elif isinstance(meta, str):
            try:
                meta = json.loads(meta)
            except json.JSONDecodeError:
                return {"text": meta}
        elif isinstance(meta, dict) and isinstance(meta.get("meta"), str):
            meta = meta["meta"]
        else:
            break
    return meta if isinstance(meta, dict) else {}


def _target(target: Any) -> tuple[str, list[list[float]]]:
    """Answer text and spans of a `target`: a letter or text, ``[start, end]``, or an object that holds them."""
    if isinstance(target, dict):
        spans = target.get("time") or []
        if "start_time" in target and "end_time" in target:
            spans = [[target["start_time"], target["end_time"]]]
        answer = target.get("answer")
        return (str(answer) if answer is not None else json.dumps(spans) if spans else ""), spans
    if isinstance(target, list):
        spans = [target] if len(target) == 2 and not isinstance(target[0], list) else target
        return json.dumps(spans), spans
    return ("" if target is None else str(target)), []


def _haystack_ego4d(row: Row, number: int) -> list[Row]:
    """LV-Haystack's own table; frame numbers count in the whole video, whose rate stands in `video_metadata`."""
    options = options_of(row.get("options"))
    metadata = row.get("video_metadata") or {}
    frames = [int(frame) for frame in row["frame_indexes_video"]]
    rate = metadata.get("frame_rate")
    return [
        {
            "id": f"{row['video_id']}_{number}",
            "video": f"{row['video_id']}.mp4",
            "question": row["question"],
            "options": options,
            "answer": _as_letter(row.get("answer"), options),
            "type": _kind(options),
            "duration": metadata.get("video_duration"),
            "gt_frame_index": frames,
            "gt_seconds": [frame / rate for frame in frames] if rate else [],
            "meta": {
                "benchmark": "Haystack-Ego4D",
                **_rest(row, "video_id", "question", "options", "answer", "frame_indexes_video"),
            },
        }
    ]


def _tstar(row: Row, number: int) -> list[Row]:
    options = options_of(row.get("options"))
    identity = row.get("id") or f"{row.get('video_id') or row['video_path'].rsplit('/', 1)[-1]}_{number}"
    answer = row.get("gt_answer") if row.get("gt_answer") is not None else row.get("answer")
    return [
        {
            "id": str(identity),
            "video": row["video_path"],
            "question": row.get("question", ""),
            "options": options,
            "answer": _as_letter(answer, options),
            "type": _kind(options),
            "duration": row["duration"] if isinstance(row.get("duration"), (int, float)) else None,
            "gt_frame_index": row.get("gt_frame_index") or row.get("position") or [],
            "meta": _rest(
                row, "id", "video_path", "question", "options", "gt_answer", "answer", "gt_frame_index", "position"
            ),
        }
    ]


def _video_mme(row: Row, number: int) -> list[Row]:
    return [
        {
            "id": str(row["question_id"]),
            "video": f"{row['videoID']}.mp4",
            "question": row["question"],
            "options": options_of(row["options"]),
            "answer": row.get("answer") or "",
            "type": "multiple_choice",
            "meta": {"benchmark": "Video-MME", **_rest(row, "question_id", "question", "options", "answer")},
        }
    ]


def _mlvu(row: Row, number: int) -> list[Row]:
    """MLVU gives the right answer as an option's text; its generation tasks have no options."""
    options = options_of(row.get("candidates"))
    return [
        {
            "id": str(row.get("question_id") or f"{row['question_type']}_{number}"),
            "video": row["video"],
            "question": row["question"],
            "options": options,
            "answer": _as_letter(row.get("answer"), options),
            "type": _kind(options),
            "duration": row.get("duration"),
            "meta": {
                "benchmark": "MLVU",
                "task": row["question_type"],
                **_rest(row, "question_id", "video", "question", "candidates", "answer", "duration", "question_type"),
            },
        }
    ]


def _lvbench(row: Row, number: int) -> list[Row]:
    """LVBench puts the options behind the question, a line each, and names the evidence as ``mm:ss-mm:ss``."""
    entries = row.get("qa", row)
    entries = entries if isinstance(entries, list) else [entries]
    samples = []
    for position, entry in enumerate(entries, start=1):
        question, _, listed = entry["question"].partition("\n")
        span = [_clock_seconds(clock) for clock in _CLOCK.findall(entry.get("time_reference") or "")]
        samples.append(
            {
                "id": str(entry.get("uid") or f"{row['key']}_{position if 'qa' in row else number}"),
                "video": f"{row['key']}.mp4",
                "question": question,
                "options": options_of(listed),
                "answer": entry.get("answer") or "",
                "type": "multiple_choice",
                "gt_spans": [span] if len(span) == 2 else [],
                "meta": {
                    "benchmark": "LVBench",
                    "video_type": row.get("type"),
                    **_rest(entry, "key", "uid", "type", "question", "answer"),
                },
            }
        )
    return samples


def _clock_seconds(clock: tuple[str, str, str]) -> float:
    hours, minutes, seconds = clock
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)


def _as_letter(answer: Any, options: list[str]) -> str:
    """The letter of an answer given as an option's text; any other answer as it is."""
    if answer is None:
        return ""
    return LETTERS[options.index(answer)] if answer in options else str(answer)


_FORMS: list[tuple[Callable[[Row], bool], Callable[[Row, int], list[Row]]]] = [
    (lambda row: "frame_indexes_video" in row and "video_id" in row, _haystack_ego4d),
    (lambda row: "key" in row and ("qa" in row or {"question", "time_reference"} <= row.keys()), _lvbench),
    (lambda row: "videoID" in row and "task_type" in row, _video_mme),
    (lambda row: "video_path" in row and ("keyframe_timestamps" in row or isinstance(row.get("options"), str)), _tstar),
    (lambda row: "video_path" in row and ("candidates" in row or "option0" in row), _longvideobench),
    (lambda row: "video" in row and "question_type" in row and "target" not in row, _mlvu),
    (lambda row: "video" in row and "question" in row and ("target" in row or "meta" in row), _reference),
]
