"""The report: one HTML file that carries its data, styles and script, and asks nothing of any network.

What is shown later is stored apart: transcripts in chunks and pictures by video, as JSON that the page parses when an
episode is opened. All of it is data to the page: a content security policy lets nothing run but the report's own
script, known by its hash, and that script makes text nodes, never markup.

Pictures and transcripts have budgets, shared out among the methods; what does not fit is said on the page.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from timesearch.base.batch import Failure
from timesearch.base.errors import ItemError
from timesearch.base.files import atomic_path, inside
from timesearch.base.untrusted import mend_text
from timesearch.data.messages import Message, exchanges, parse_turn, text_of
from timesearch.data.rows import read_rows
from timesearch.data.samples import Prediction
from timesearch.evaluation.episodes import read_predictions
from timesearch.evaluation.results import load_metrics, prediction_files
from timesearch.evaluation.table import TABLE_COLUMNS, method_label, method_order
from timesearch.rewards import REWARDS, answer_letter
from timesearch.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

_FOLDER = Path(__file__).parent
_CHUNK = 25  # transcripts that are parsed together
TRANSCRIPT_BUDGET = 24_000_000
"""Bytes of transcripts in a report."""
THUMBNAIL_BUDGET = 16_000_000
"""Bytes of pictures in a report, as base64."""
_THUMBNAIL_SIDE = 144
_THUMBNAIL_QUALITY = 55
_PREVIEWS = 12  # preview frames of an episode that get a picture, evenly chosen
_TEXT_LIMIT = 20_000  # characters of one turn; a policy that never stops must not fill the page
_TRANSCRIPT_LIMIT = 400_000
_SPOKEN_LIMIT = 200  # characters of a line on the time line
"""Bytes of one transcript's turns, about; what does not fit is counted on the page."""
_TURNS_LIMIT = 200
_ITEMS_LIMIT = 1000
"""Times, options or words in one list of a transcript."""
_GROUP_VALUES = 60
_CURVES = ("reward", *(part.name for part in REWARDS), "search_rate", "tool_calls")


def write_results_report(settings: Settings, out: Path | None = None) -> Path:
    """Write the report of what the stage `evaluate` left in `results/`, with the curves of the training runs.

    Returns:
        The file, `out` or ``results/report.html``.

    Raises:
        RequestError: nothing has been evaluated yet.
    """
    results = settings.paths.results
    target = out or results / "report.html"
    files = prediction_files(settings)
    write_report(files, results / "evaluation", target, settings.paths.frames, settings.paths.train.parent)
    return target


def write_report(
    files: Mapping[str, Path],
    evaluation: Path,
    out: Path,
    frames: Path | None = None,
    runs: Path | None = None,
) -> None:
    """Write the report of evaluated prediction files.

    Args:
        files: prediction files by method.
        evaluation: folder that `evaluate` wrote: each method's metrics and its episodes' scores.
        out: the HTML file.
        frames: folder of frame caches, for the pictures; None gives none.
        runs: folder of training runs; each ``metrics.jsonl`` below it becomes a curve.

    Raises:
        RequestError: a method has no evaluation.
    """
    names = sorted(files, key=method_order)
    metrics = {name: load_metrics(evaluation / f"{name}.json") for name in names}
    page = _Page(frames, TRANSCRIPT_BUDGET // len(names))
    head, tail = _template()
    with atomic_path(out) as partial, partial.open("w", encoding="utf-8") as handle:
        handle.write(head)
        for number, name in enumerate(names):
            scores = _episode_scores(evaluation / "episodes" / f"{name}.jsonl")
            page.add_method(handle, number, files[name], scores)
        page.write_pictures(handle)
        _write_data(handle, "summary", _summary(names, metrics, page, evaluation, runs))
        handle.write(tail)


def _template() -> tuple[str, str]:
    style, script, page = (
        (_FOLDER / name).read_text(encoding="utf-8") for name in ("report.css", "report.js", "report.html")
    )
    filled = {"style_hash": _hash(style), "script_hash": _hash(script), "style": style, "script": script}
    head, tail = page.split("{data}")
    for name, value in filled.items():
        mark = "{" + name + "}"
        head, tail = head.replace(mark, value), tail.replace(mark, value)
    return head, tail


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _write_data(handle: IO[str], identity: str, value: Any) -> int:
    """Embed a JSON value. ``<`` is escaped, so that no text can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    text = mend_text(text)  # names of files and times of messages pass no reader of JSON on their way here
    handle.write(f'<script type="application/json" id="{identity}">{text}</script>\n')
    return len(text)


def _episode_scores(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for _, row in read_rows(path)}


@dataclass
class _Page:
    """What the page knows of all episodes, gathered while transcripts are written out."""

    frames: Path | None
    budget: int
    samples: dict[str, int] = field(default_factory=dict)
    sample_rows: list[dict[str, Any]] = field(default_factory=list)
    episodes: list[list[Any]] = field(default_factory=list)
    chunks: int = 0
    videos: dict[str, int] = field(default_factory=dict)
    wanted: dict[str, dict[float, None]] = field(default_factory=dict)
    pictured: int = 0
    without_transcript: int = 0
    without_picture: int = 0

    def add_method(self, handle: IO[str], method: int, path: Path, scores: Mapping[str, dict[str, Any]]) -> None:
        """Write the transcripts of a file, and list its episodes."""
        spent = 0
        pending: list[dict[str, Any]] = []
        for prediction in read_predictions(path, _ignore):
            score = scores.get(prediction.id, {})
            place: tuple[int | None, int | None] = (None, None)
            if spent < self.budget:
                place = (self.chunks, len(pending))
                pending.append(self._transcript(prediction, score))
            else:
                self.without_transcript += 1
            self.episodes.append(
                [
                    method,
                    self._sample(prediction, score),
                    _verdict(prediction, score),
                    int(score.get("searched", 0)),
                    score.get("temporal_f1"),
                    int(score.get("frames", 0)),
                    int(score.get("tool_calls", 0)),
                    *place,
                ]
            )
            if len(pending) == _CHUNK:
                spent += self._flush(handle, pending)
        if pending:
            self._flush(handle, pending)

    def _flush(self, handle: IO[str], pending: list[dict[str, Any]]) -> int:
        size = _write_data(handle, f"episodes-{self.chunks}", pending)
        self.chunks += 1
        pending.clear()
        return size

    def _sample(self, prediction: Prediction, score: Mapping[str, Any]) -> int:
        if prediction.id not in self.samples:
            self.samples[prediction.id] = len(self.sample_rows)
            self.sample_rows.append(
                {"id": prediction.id, "question": prediction.question[:400], "groups": score.get("groups", {})}
            )
        return self.samples[prediction.id]

    def _transcript(self, prediction: Prediction, score: Mapping[str, Any]) -> dict[str, Any]:
        preview = _times(prediction.preview_seconds)
        turns = _turns(prediction.prediction)
        if not turns and prediction.searched_seconds:
            turns = [_turn(frames=_times(prediction.searched_seconds))]
        turns = _fitting(turns)
        self._want(prediction.video, [time for turn in turns for time in turn["frames"]], preview)
        reported = {name: score[name] for name in _REPORTED if score.get(name) is not None}
        transcript = {
            "video": prediction.video,
            "duration": score.get("duration"),
            "options": prediction.options,
            "answer": prediction.answer,
            "gold": answer_letter(prediction.answer, prediction.options) if prediction.options else None,
            "said": score.get("answer"),
            "choice": score.get("choice"),
            "reanswer": prediction.reanswer,
            "truth": score.get("truth", []),
            "spans": [_times(span) for span in prediction.gt_spans if len(_times(span)) == 2],
            "preview": preview,
            "turns": turns,
            "scores": {_REPORTED[name]: f"{value:.2f}" for name, value in reported.items()},
            "error": f"{prediction.error.type}: {prediction.error.message}" if prediction.error else None,
            "thumbs": self.videos.get(prediction.video),
        }
        return {name: _cut(value) for name, value in transcript.items()}

    def _want(self, video: str, searched: list[float], preview: list[float]) -> None:
        """Ask for pictures: of searched frames, and of some of the preview."""
        if self.frames is None or not _cache_file(self.frames, video):
            return
        step = max(1, len(preview) // _PREVIEWS)
        self.wanted.setdefault(video, {}).update(dict.fromkeys([*searched, *preview[::step]]))
        self.videos.setdefault(video, len(self.videos))

    def write_pictures(self, handle: IO[str]) -> None:
        """Write the pictures video by video, as many of each as fit into an even share of the budget."""
        left = THUMBNAIL_BUDGET
        for position, (video, times) in enumerate(self.wanted.items()):
            share = left // (len(self.wanted) - position)
            pictures = _pictures(_cache_file(self.frames, video), times, share)
            self.pictured += len(pictures)
            self.without_picture += len(times) - len(pictures)
            left -= _write_data(handle, f"thumbs-{self.videos[video]}", pictures)

    def embedded(self) -> str:
        """What is in the page and what is not, in a sentence."""
        told = len(self.episodes) - self.without_transcript
        text = f"This page carries {told} of {len(self.episodes)} transcripts and {self.pictured} pictures"
        if self.without_picture:
            text += f"; {self.without_picture} further frames are shown by their times only, to keep the file small"
        return text + "."


_REPORTED = {
    "temporal_precision": "temporal precision",
    "temporal_recall": "temporal recall",
    "temporal_f1": "temporal F1",
    "visual_f1": "visual F1",
    "span_coverage": "span coverage",
    "grounding_iou": "IoU",
    "completeness": "completeness",
}


def _ignore(failure: Failure) -> None:
    """Rows that cannot be read are counted by the evaluation, which the page shows."""


def _verdict(prediction: Prediction, score: Mapping[str, Any]) -> str:
    if prediction.error:
        return "error"
    value = score.get("qa_accuracy", score.get("grounding_iou"))
    if value is None:
        return "none"
    if score.get("unparsed"):
        return "unparsed"
    return "right" if value > 0.5 else "wrong"


def _times(seconds: Sequence[float]) -> list[float]:
    """Times to hundredths of a second, the precision by which the page finds their pictures."""
    return [round(time, 2) for time in seconds if 0 <= time < float("inf")]


def _turn(**told: Any) -> dict[str, Any]:
    """A turn of which nothing but `told` is known; `spoken` are its words once more, each after its time, and `regions`
    those of the source that it looked at, by the times of their pictures."""
    said = {"number": 0, "thought": "", "text": "", "calls": [], "answer": None}
    return said | {"frames": [], "words": [], "spoken": [], "regions": {}} | told


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """What each assistant turn thought and did, with the times of the frames that its tools returned.

    Frames that stand before the first turn (a baseline is given its frames) make a turn 0.
    """
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] != "assistant":
            continue
        said = text_of(message)[:_TEXT_LIMIT]
        turn = parse_turn(said)
        plain = turn.thought is None and not turn.calls and turn.answer is None
        calls = [{"name": call.name, "arguments": call.arguments, "error": call.error} for call in turn.calls]
        turns.append(
            _turn(
                number=len(turns) + 1,
                thought=turn.thought or "",
                text=said if plain else "",
                calls=_plain_json(calls),
                answer=turn.answer,
            )
        )
    given = _turn()
    for exchange in exchanges(messages):
        told = turns[exchange.turn - 1] if exchange.turn else given
        for each in exchange.evidence:
            if each.text is not None:
                told["words"].append(each.text[:_TEXT_LIMIT])
                times = _times([each.seconds] if each.seconds is not None else [])
                told["spoken"] += [[time, each.text[:_SPOKEN_LIMIT]] for time in times]
            elif each.seconds is not None:
                told["frames"].extend(_times([each.seconds]))
                if each.box is not None:
                    told["regions"][f"{each.seconds:.2f}"] = list(each.box)
    return [given, *turns] if given["frames"] or given["words"] else turns


def _fitting(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many turns as fit into a transcript, and how many do not."""
    size = 0
    kept: list[dict[str, Any]] = []
    for turn in turns:
        if (beyond := len(turn["frames"]) - _ITEMS_LIMIT) > 0:
            turn["words"].insert(0, f"{beyond} further frames are not shown.")
        turn = _cut(turn)
        size += len(json.dumps(turn))
        if (size > _TRANSCRIPT_LIMIT and kept) or len(kept) == _TURNS_LIMIT:
            left = len(turns) - len(kept)
            words = f"{left} further turn{'s are' if left > 1 else ' is'} not shown, to keep the file small."
            return [*kept, _turn(number=turn["number"], text=words)]
        kept.append(turn)
    return kept


def _cut(value: Any) -> Any:
    """A value of a transcript without what no reader gets to: the ends of long texts and lists."""
    if isinstance(value, str):
        return value if len(value) <= _TEXT_LIMIT else f"{value[:_TEXT_LIMIT]}…"
    if isinstance(value, list):
        return [_cut(item) for item in value[:_ITEMS_LIMIT]]
    if isinstance(value, dict):
        return {key[:_TEXT_LIMIT]: _cut(item) for key, item in islice(value.items(), _ITEMS_LIMIT)}
    return value


def _plain_json(value: Any) -> Any:
    """Arguments that a policy wrote may hold NaN, which JSON has not: such numbers become text."""
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    if isinstance(value, list):
        return [_plain_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain_json(item) for key, item in value.items()}
    return value


def _cache_file(frames: Path | None, video: str) -> Path | None:
    if frames is None:
        return None
    try:
        path = inside(frames, f"{video}.frames")
    except ItemError:
        return None
    return path if path.is_file() else None


def _pictures(path: Path | None, times: Iterable[float], budget: int) -> dict[str, str]:
    """Small JPEGs in base64 of the cached frames nearest to `times`, as many as `budget` bytes hold."""
    from timesearch.video.frames import FrameCache

    pictures: dict[str, str] = {}
    if path is None:
        return pictures
    try:
        cache = FrameCache.open(path)
        for time in times:
            if budget <= 0:
                break
            picture = _thumbnail(cache.decode(cache.nearest(time)))
            pictures[f"{time:.2f}"] = picture
            budget -= len(picture)
    except ItemError:  # a damaged cache costs pictures, not the report; the page counts them as missing
        return pictures
    return pictures


def _thumbnail(image: Image) -> str:
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_THUMBNAIL_QUALITY, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _summary(
    names: Sequence[str], metrics: Mapping[str, dict[str, Any]], page: _Page, evaluation: Path, runs: Path | None
) -> dict[str, Any]:
    columns: list[dict[str, Any]] = [
        {"name": name, "label": label, "share": scale == 100} for label, name, scale in TABLE_COLUMNS
    ]
    comparisons = evaluation / "comparisons.json"
    methods = [
        {
            "name": name,
            "label": method_label(name),
            "cells": {
                column["name"]: {
                    "value": metrics[name][column["name"]],
                    "interval": metrics[name].get("intervals", {}).get(column["name"]),
                }
                for column in columns
            },
            "failures": metrics[name]["failures"],
            "unparsed": metrics[name]["qa_unparsed"],
            "made": _made(metrics[name].get("fingerprint")),
        }
        for name in names
    ]
    questions = len(page.sample_rows)
    scope = f"{questions} question{'s' * (questions != 1)}, {len(names)} method{'s' * (len(names) != 1)}: "
    groups: dict[str, dict[str, None]] = {}
    for sample in page.sample_rows:
        for name, values in sample["groups"].items():
            groups.setdefault(name, {}).update(dict.fromkeys(values))
    useful = {name: list(values) for name, values in groups.items() if 1 < len(values) <= _GROUP_VALUES}
    return {
        "scope": scope + ", ".join(method["label"] for method in methods) + ".",
        "threshold": f"{metrics[names[0]]['threshold']:g}",
        "embedded": page.embedded(),
        "columns": columns,
        "methods": methods,
        "comparisons": json.loads(comparisons.read_text(encoding="utf-8")) if comparisons.is_file() else [],
        "groups": {name: _group_rows(name, names, metrics) for name in useful},
        "group_values": [[name, values] for name, values in useful.items()],
        "plots": [*_plots(names, evaluation), *_curves(runs)],
        "samples": page.sample_rows,
        "episodes": page.episodes,
    }


def _made(fingerprint: Any) -> list[tuple[str, str]]:
    """What a method's numbers are made of, as words and values; nothing of metrics from before there were any."""
    if not isinstance(fingerprint, dict):
        return []
    parts = {name: part for name, part in fingerprint.items() if name not in ("made_of", "digest")}
    flat = {"fingerprint": fingerprint.get("digest") or "none", **(fingerprint.get("made_of") or {})}
    for name, part in parts.items():
        inner = part if isinstance(part, dict) else {"": part}
        flat |= {f"{name.replace('_', ' ')} {each}".strip(): value for each, value in inner.items()}
    return [(name[:200], _cut(value if isinstance(value, str) else json.dumps(value))) for name, value in flat.items()]


def _group_rows(group: str, names: Sequence[str], metrics: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    values = dict.fromkeys(value for name in names for value in metrics[name]["by"].get(group, {}))
    rows = []
    for value in values:
        blocks = [metrics[name]["by"].get(group, {}).get(value) for name in names]
        rows.append(
            {
                "value": value,
                "episodes": max(block["episodes"] for block in blocks if block),
                "scores": [[block["qa_accuracy"], block["temporal_f1"]] if block else None for block in blocks],
            }
        )
    return rows


_PLOTS = (
    ("f1_by_frames", "Temporal F1 against frames used", "searched frames", "temporal F1", True),
    ("accuracy_by_length", "Accuracy against video length", "video length", "accuracy", True),
    ("tool_calls_by_turn", "Tool calls by turn", "turn", "calls an episode", False),
)


def _plots(names: Sequence[str], evaluation: Path) -> Iterator[dict[str, Any]]:
    """Plots of the tables that `evaluate` wrote: method, place on the x axis, value, episodes."""
    tables = json.loads((evaluation / "plots.json").read_text(encoding="utf-8"))
    for table, title, x, y, share in _PLOTS:
        categories, rows = tables[table]["categories"], tables[table]["rows"]
        present = [category for category in categories if any(row[1] == category for row in rows)]
        series = [
            {
                "name": method_label(name),
                "points": [
                    [present.index(label), value, episodes] for method, label, value, episodes in rows if method == name
                ],
            }
            for name in names
        ]
        yield {"title": title, "x": x, "y": y, "share": share, "categories": present, "series": series}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curves(runs: Path | None) -> Iterator[dict[str, Any]]:
    """Curves of training runs, one plot a number; what is no whole row with a step (a kill cut it off) has no point."""
    histories = {
        path.parent.name: [row for _, row in read_rows(path, lambda *_: None) if _is_number(row.get("step"))]
        for path in sorted(runs.glob("*/metrics.jsonl") if runs else [])
    }
    for name in _CURVES:
        series = [
            {
                "name": run_name,
                "points": [[row["step"], row[name]] for row in rows if _is_number(row.get(name))],
            }
            for run_name, rows in histories.items()
            if any("reward" in row for row in rows)
        ]
        if any(one["points"] for one in series):
            words = name.replace("_", " ")
            yield {
                "title": f"Training: {words}",
                "x": "step",
                "y": words,
                "share": False,
                "categories": None,
                "series": [one for one in series if one["points"]],
            }
