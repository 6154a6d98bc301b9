"""Predictions in the forms of others, so that their own scripts score them.

``timesearch-r``: what the evaluation scripts of the reference read as it is. Every message has a list as its content,
and the last one ends with text; `question` holds its options; `target` holds the answer, and the intervals of one in
`time`; `meta` is the published row as JSON text (of Video-MME, MLVU, or LongVideoBench, whose form others are given);
`video` leads from the working directory to the file; `gt_frame_index` holds the frames of the ground truth, counted at
the rate that the video states. In a tool message a text is a time, or does not begin with a number: they count as
searched what does.

``lmms-eval``: the log of samples that lmms-eval writes (`--log_samples`), as of its task longvideobench_val_v: `doc`,
`target`, `resps`, `filtered_resps` and `lvb_acc`, from which its aggregation computes the accuracy. Multiple-choice
questions alone have a place in it.

Both are read again by `timesearch evaluate`, to the same scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

from timesearch.base.batch import Failure
from timesearch.base.errors import ItemError
from timesearch.data.messages import final_answer, format_seconds, text_of
from timesearch.data.samples import LETTERS, Prediction
from timesearch.evaluation.episodes import Videos, read_predictions
from timesearch.evaluation.qa import parse_choice
from timesearch.rewards import answer_letter, parse_intervals
from timesearch.search.protocol import lettered

FORMS = ("timesearch-r", "lmms-eval")
_LISTED = 5
"""Options for which a row of LongVideoBench has a field; the others are ``N/A``."""

Row = dict[str, Any]


def exported(predictions: Path, form: str, videos: Path, report: Callable[[Failure], None]) -> Iterator[Row]:
    """Yield the rows of a prediction file in one of `FORMS`.

    Args:
        predictions: the file.
        form: which form.
        videos: folder of the source videos, as the scripts are to find it.
        report: is told of each row that is left out: as `read_predictions`, ``unknown_frame_rate`` (ground truth in
            seconds, of a video that is not there) and ``not_multiple_choice``.

    Raises:
        RequestError: the file is missing, or in no form that is read.
    """
    folder = Videos(videos)
    for number, prediction in enumerate(read_predictions(predictions, report)):
        try:
            if form == "lmms-eval":
                yield _lmms_eval(prediction, number)
            else:
                yield _timesearch_r(prediction, folder, videos)
        except ItemError as error:
            report(Failure(prediction.id, error.reason, str(error)))


def _timesearch_r(prediction: Prediction, folder: Videos, videos: Path) -> Row:
    """A row of the reference's output files; what its scripts do not read stands beside that, for ours."""
    kept = prediction.model_dump(mode="json", include=_BESIDE, exclude_defaults=True)
    answer = answer_letter(prediction.answer, prediction.options) if prediction.options else None
    intervals = parse_intervals(prediction.answer) if prediction.type == "grounding" else []
    ends: Row = dict(zip(("start_time", "end_time"), intervals[0], strict=True)) if len(intervals) == 1 else {}
    if intervals:
        ends["time"] = [list(interval) for interval in intervals]
    return {
        "id": prediction.id,
        "video": str(videos / prediction.video),
        "question": lettered(prediction.question, prediction.options),
        "target": {"answer": answer or prediction.answer, **ends},
        "type": prediction.type,
        "duration": prediction.duration,
        "gt_frame_index": _frames(prediction, folder),
        "prediction": _messages(prediction),
        "meta": json.dumps(_published(prediction) if prediction.options else prediction.meta, ensure_ascii=False),
        **kept,
    }


_BESIDE = {
    *("gt_seconds", "gt_spans", "searched_seconds", "preview_seconds", "predicted_answer", "reanswer", "error"),
    *("split", "seen", "fingerprint"),
}


def _messages(prediction: Prediction) -> list[Row]:
    """The messages, each with a list as its content and a mark in place of an image; of an episode that has none, its
    searched times and its answer as messages."""
    messages: list[Row] = [dict(message) for message in prediction.prediction]
    if not messages:
        shown = [{"type": kind, **each} for time in prediction.searched_seconds for kind, each in _shown(time)]
        messages = [{"role": "tool", "content": shown}] if shown else []
        if prediction.predicted_answer is not None:
            messages.append({"role": "assistant", "content": f"<answer>{prediction.predicted_answer}</answer>"})
    for message in messages:
        content = message.get("content") or ""
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        message["content"] = [_block(block) for block in blocks]
    if not messages or messages[-1]["content"][-1].get("type") != "text":
        messages.append({"role": "assistant", "content": [{"type": "text", "text": ""}]})
    return messages


def _block(block: Row) -> Row:
    if block.get("type") == "image":
        return {"image": "<image>", **block}
    if "seconds" in block:  # words that were found, after their time
        return {**block, "text": f"[{block.get('text', '')}]"}
    return block


def _shown(time: float) -> tuple[tuple[str, Row], tuple[str, Row]]:
    return ("text", {"text": format_seconds(time)}), ("image", {"seconds": time})


def _frames(prediction: Prediction, folder: Videos) -> list[int]:
    """Frame numbers of the ground truth: its own, else those of its times; of a span the middle."""
    if prediction.gt_frame_index:
        return list(prediction.gt_frame_index)
    times = prediction.moments
    if not times:
        return []
    stated = prediction.meta.get("frame_rate") or prediction.meta.get("fps")
    rate = float(stated) if isinstance(stated, int | float) and stated > 0 else folder.frame_rate(prediction.video)
    return [round(time * rate) for time in times if 0 <= time < float("inf")]


def _published(prediction: Prediction) -> Row:
    """The question as its benchmark publishes it."""
    meta = {name: value for name, value in prediction.meta.items() if name not in ("benchmark", "task")}
    options = prediction.options
    letter = answer_letter(prediction.answer, options)
    if prediction.meta.get("benchmark") == "Video-MME":
        choices = [f"{LETTERS[place]}. {option}" for place, option in enumerate(options)]
        asked = {"question_id": prediction.id, "question": prediction.question, "options": choices}
        return {**meta, **asked, "answer": letter or ""}
    if prediction.meta.get("benchmark") == "MLVU":
        asked = {"video": prediction.video, "question": prediction.question, "candidates": options}
        known = {"answer": options[LETTERS.index(letter)] if letter else "", "duration": prediction.duration}
        task = {"question_id": prediction.id, "question_type": prediction.meta.get("task")}
        return {**meta, **asked, **known, **task}
    return _longvideobench(prediction)


def _longvideobench(prediction: Prediction) -> Row:
    """The question as LongVideoBench publishes it: its options in fields of their own, the right one by its place."""
    letter = answer_letter(prediction.answer, prediction.options)
    options = prediction.options
    fields = {f"option{i}": options[i] if i < len(options) else "N/A" for i in range(max(_LISTED, len(options)))}
    video = PurePath(prediction.video).stem
    groups = {"duration_group": 0, "question_category": prediction.type, "video_id": video}
    return {
        **groups,
        **{name: value for name, value in prediction.meta.items() if name != "benchmark"},
        "id": prediction.id,
        "video_path": prediction.video,
        "question": prediction.question,
        "candidates": options,
        **fields,
        "correct_choice": LETTERS.index(letter) if letter else -1,
        "duration": prediction.duration,
    }


def _lmms_eval(prediction: Prediction, number: int) -> Row:
    """A line of the log of samples of the task longvideobench_val_v."""
    letter = answer_letter(prediction.answer, prediction.options)
    if prediction.type != "multiple_choice" or not prediction.options or letter is None:
        raise ItemError(
            f"{prediction.id}: no multiple-choice question with its options and right answer, which is all that this "
            "form has a place for",
            reason="not_multiple_choice",
        )
    said = final_answer(prediction.prediction) if prediction.prediction else prediction.predicted_answer
    turns = [text_of(message) for message in prediction.prediction if message["role"] == "assistant"]
    doc = _longvideobench(prediction) | {"timesearch": prediction.model_dump(mode="json", exclude_defaults=True)}
    asked = lettered(prediction.question, prediction.options)
    found = {
        "id": prediction.id,
        "duration_group": doc["duration_group"],
        "question_category": doc["question_category"],
        "answer": letter,
        "parsed_pred": parse_choice(said, prediction.options) or "",
    }
    return {
        "doc_id": number,
        "doc": doc,
        "target": letter,
        "arguments": [asked],
        "resps": [[turns[-1] if turns else said or ""]],
        "filtered_resps": [said or ""],
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(asked),
        "target_hash": _hash(letter),
        "lvb_acc": found,
        "submission": {prediction.id: said or ""},
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
