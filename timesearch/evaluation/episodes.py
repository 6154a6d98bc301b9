"""Reading prediction files, and scoring one episode at a time.

What is not as it should be is named, with a reason, and handled as follows:

=====================  ==============================================================================================
``not_json``           a line that cannot be read: left out
``invalid_row``        a row without the fields of a prediction, or with a wrong value: left out
``unknown_type``       a question type other than multiple_choice, open_ended and grounding: left out
``duplicate_id``       an id that the file had before: left out, the first row stands
``empty_prediction``   neither messages, nor an answer, nor searched frames, nor an error: scored as wrong, with no
                       frame found
``episode_error``      the episode ended in an error: scored by what it has, which mostly is wrong
``bad_times``          searched times that are NaN, infinite, negative, or past the video's end: they count as misses
``bad_ground_truth``   such times in the ground truth, spans with such an end or reversed ones, numbers of frames that
                       the video does not have: they are left out of it
``no_ground_truth``    no ground-truth time, in a file whose other rows have some: left out of the temporal and visual
                       metrics
``unknown_frame_rate`` ground truth in frame numbers of a video that is not there, with no rate in `meta`: as above
``bad_group``          a value of a group that is a list of more than 100, or longer than 200 characters: left out of
                       that group; a group of more than 500 values is left out itself
``bad_answer``         the right answer names none of the options, or no interval: left out of the accuracy
``unjudged``           the judge gave no verdict on an open-ended answer: left out of the accuracy
``missing_video``      the visual metrics need the video and it is not there (or why it cannot be read): left out of
                       them
=====================  ==============================================================================================
"""

from __future__ import annotations

import math
import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from timesearch.base.batch import Failure
from timesearch.base.errors import ItemError
from timesearch.data.messages import final_answer, heard_seconds, parse_turn, searched_seconds, text_of
from timesearch.data.rows import read_models
from timesearch.data.samples import Prediction
from timesearch.evaluation.made import Tally, question_digest, shown_in
from timesearch.evaluation.qa import parse_choice, published_choice, published_score
from timesearch.evaluation.temporal import harmonic_mean, span_coverage, temporal_scores
from timesearch.evaluation.tools import Tools
from timesearch.pocket.ceiling import knowable
from timesearch.rewards import answer_letter, interval_iou, parse_intervals

END_TOLERANCE = 1.0
"""Seconds past the stated duration that a time may lie: stated durations and rounded times differ by less."""

_SAME = 0.0005
"""Seconds by which times of one frame may differ: ticks are no finer in Matroska."""
_LONGEST_PATH = 4096
"""Bytes of a path, at most, on Linux."""

_TIMES_HELD = 8_000_000
"""Presentation times that are held for the next episodes: 64 MB, those of 74 hours at 30 frames a second."""
_GROUPS_OF_ONE = 100
"""Values of one group that an episode may have."""
_GROUP_CHARS = 200

Report = Callable[[Failure], None]


class Columns:
    """The metrics of all episodes of a file: one array of numbers a metric, NaN where an episode has none.

    An episode's numbers take 8 bytes each in it, a tenth of what a dictionary of theirs takes.
    """

    __slots__ = ("by_name", "rows")

    def __init__(self) -> None:
        self.by_name: dict[str, array[float]] = {}
        self.rows = 0

    def numbers(self, name: str) -> np.ndarray:
        """The numbers of a metric that some episode has, shape (rows,)."""
        column = self.by_name[name]
        column.extend([math.nan] * (self.rows - len(column)))
        return np.frombuffer(column)


class Values(MutableMapping[str, float]):
    """The metrics of one episode by name: a new row of `columns`, or of its own."""

    __slots__ = ("_columns", "_row")

    def __init__(self, columns: Columns | None = None) -> None:
        self._columns = Columns() if columns is None else columns
        self._row = self._columns.rows
        self._columns.rows += 1

    def get(self, name: str, default: Any = None) -> Any:
        """The number of a name, or `default`."""
        column = self._columns.by_name.get(name)
        if column is None or self._row >= len(column):
            return default
        number = column[self._row]
        return default if math.isnan(number) else number

    def __getitem__(self, name: str) -> float:
        number: float | None = self.get(name)
        if number is None:
            raise KeyError(name)
        return number

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def __setitem__(self, name: str, number: float) -> None:
        column = self._columns.by_name.setdefault(name, array("d"))
        if self._row >= len(column):
            column.extend([math.nan] * (self._row + 1 - len(column)))
        column[self._row] = number

    def __delitem__(self, name: str) -> None:
        self[name] = math.nan

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._columns.by_name if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(slots=True)
class EpisodeScore:
    """What evaluation keeps of an episode: no messages, so that memory does not grow with them.

    `values` holds the metrics that the episode has a value of; `truth` and `times` are seconds, for the visual metrics;
    `asked` is the digest of the question, `shown` what `timesearch.evaluation.made.shown_in` says of the frames;
    `judged` holds open-ended answers that wait for the judge: the metric that the verdict becomes, and (question, right
    answer, answer).
    """

    id: str
    video: str
    type: str
    groups: dict[str, list[str]]
    duration: float | None
    values: Values = field(default_factory=Values)
    answer: str | None = None
    choice: str | None = None
    unparsed: bool = False
    truth: Sequence[float] = ()
    times: Sequence[float] = ()
    judged: tuple[tuple[str, tuple[str, str, str]], ...] = ()
    calls_by_turn: tuple[int, ...] = ()
    asked: str = ""
    shown: tuple[Any, ...] = ()


@dataclass
class MethodScores:
    """All episodes of one prediction file, scored; `columns` holds their values, row by row in the same order."""

    name: str
    path: Path
    episodes: list[EpisodeScore]
    columns: Columns
    failures: list[Failure]
    tally: Tally = field(default_factory=Tally)
    judged: dict[str, int] | None = None
    tools: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


def read_predictions(path: Path | str, report: Report) -> Iterator[Prediction]:
    """Yield the predictions of a file in the project's form or a published one, line by line.

    Args:
        path: JSON lines, JSON or Parquet.
        report: is told of each row that is left out.

    Raises:
        RequestError: the file is missing, or in no form that is read.
    """
    return read_models(path, Prediction, report)


class Videos:
    """The folder of source videos: where a video lies, its frame rate and its length, each looked up once."""

    def __init__(self, root: Path | str | None) -> None:
        self._root = Path(root) if root else None
        self._known: dict[str, tuple[Path, float | None, float | None] | ItemError] = {}
        self._times: OrderedDict[str, np.ndarray] = OrderedDict()

    def __bool__(self) -> bool:
        return self._root is not None

    def path(self, video: str) -> Path:
        """The video's file: the name under the folder, or the longest end of a foreign path that is there.

        Raises:
            ItemError: `missing_video`, or why the file is no video.
        """
        return self._look_up(video)[0]

    def frame_rate(self, video: str) -> float:
        """Frames a second, on average, as the container states them.

        Raises:
            ItemError: as `path`, or `unknown_frame_rate`.
        """
        path, rate, _ = self._look_up(video)
        if rate is None:
            raise ItemError(f"{path} states no frame rate", reason="unknown_frame_rate")
        return rate

    def frame_times(self, video: str) -> np.ndarray:
        """Presentation time (s) of each frame of the video, by its number; empty where the container states none.

        Raises:
            ItemError: as `path`.
        """
        path = self.path(video)
        if video not in self._times:
            self._times[video] = frame_times(path)
            while len(self._times) > 1 and sum(map(len, self._times.values())) > _TIMES_HELD:
                self._times.popitem(last=False)
        self._times.move_to_end(video)
        return self._times[video]

    def duration(self, video: str) -> float | None:
        """Length in seconds, where the video is there and its container states one."""
        try:
            return self._look_up(video)[2] if self._root else None
        except ItemError:
            return None

    def _look_up(self, video: str) -> tuple[Path, float | None, float | None]:
        if video not in self._known:
            try:
                path = self._find(video)
                self._known[video] = (path, *_header(path))
            except ItemError as error:
                self._known[video] = error
        known = self._known[video]
        if isinstance(known, ItemError):
            raise known
        return known

    def _find(self, video: str) -> Path:
        parts = [part for part in Path(video).parts if part != "/"] if len(video) <= _LONGEST_PATH else []
        if self._root is not None and ".." not in parts:
            for start in range(len(parts)):
                path = self._root.joinpath(*parts[start:])
                if os.path.isfile(path):  # noqa: PTH113, Path.is_file raises for a name that is too long
                    return path
        raise ItemError(f"{video[:200]} is not under {self._root}", reason="missing_video")


def _header(path: Path) -> tuple[float | None, float | None]:
    """Frame rate and length of a video, as far as its container states them.

    Recordings that are joined byte by byte state the length of one: theirs is read off the packets.
    """
    from timesearch.video.clock import Clock
    from timesearch.video.probe import check_readable, choose_stream, open_video

    check_readable(path)
    with open_video(path) as container:
        stream = choose_stream(container, path)
        clock = Clock.of(container, stream)
        duration = float(stream.duration * stream.time_base) if stream.duration else None
        if duration is None and container.duration:
            duration = container.duration / 1_000_000
    rate = float(clock.rate) if clock.rate else None
    if clock.joined:
        times = frame_times(path)
        duration = float(times[-1]) + 1 / (rate or 1) if len(times) else duration
    return rate, duration


def frame_times(path: Path) -> np.ndarray:
    """Presentation times (s) of a video's frames in the order in which they are shown, from the first frame on.

    They are read off the packets, without decoding: at a variable rate a frame's number says nothing of its time. Where
    the clock goes back (two recordings in one file), what follows goes on one frame after what was before.

    Returns:
        Shape (n,) float64; empty where packets carry no such time (AVI, raw streams: their rate is constant).
    """
    import av

    from timesearch.video.clock import Mender, mended_packets
    from timesearch.video.probe import open_video, probe

    info = probe(path)
    with open_video(path) as container:
        stream = next(stream for stream in container.streams.video if stream.index == info.stream)
        try:
            # the last packet is empty, and only says that the stream is at its end
            read = mended_packets(container, stream, Mender(info.clock))
            packets = [(packet.pts, packet.is_discard) for packet in read if packet.size]
        except av.FFmpegError as error:
            raise ItemError(f"{path} cannot be read to its end: {error.strerror}", reason="undecodable") from error
        if info.clock.ordered or any(pts is None for pts, _ in packets):
            return np.empty(0)
        stamps = np.sort(np.array([pts for pts, discarded in packets if not discarded], dtype=np.float64))
        times = stamps * float(stream.time_base or 1) - info.start
        return times[times > -_SAME]  # frames before the first one that decodes are not shown


class Scorer:
    """Scores episodes one by one: everything except the visual metrics and the judge's verdicts."""

    def __init__(
        self,
        thresholds: Sequence[float],
        groups: Sequence[str],
        videos: Videos,
        report: Report,
        published: bool = False,
    ) -> None:
        self._published = published
        self._thresholds = thresholds
        self._groups = groups
        self._videos = videos
        self._report = report
        self._group_sets: dict[str, dict[str, list[str]]] = {}
        self.columns = Columns()
        """The values of the episodes that were scored, in their order."""
        self._same: dict[Any, Any] = {}
        """Names of videos and counts of calls, of which many episodes have equal ones: each is held once."""
        self.without_truth: list[str] = []
        """Ids of episodes without ground-truth times."""
        self.tally = Tally()
        self.tools = Tools(thresholds[0])

    def score(self, prediction: Prediction) -> EpisodeScore:
        """Score one episode."""
        episode = EpisodeScore(
            prediction.id,
            self._same.setdefault(prediction.video, prediction.video),
            prediction.type,
            self._group(prediction),
            prediction.duration,
            Values(self.columns),
        )
        self.tally.add(prediction)
        shown = shown_in(prediction)
        episode.asked, episode.shown = question_digest(prediction), self._same.setdefault(shown, shown)
        if episode.duration is None:
            episode.duration = self._videos.duration(prediction.video)
        episode.times = _searched(prediction)
        answered = bool(prediction.prediction) or prediction.predicted_answer is not None
        if prediction.error:
            self._fail(prediction, "episode_error", f"{prediction.error.type}: {prediction.error.message}")
        elif not answered and not episode.times:
            self._fail(prediction, "empty_prediction", "neither messages nor an answer nor searched frames")
        self._count(prediction, episode)
        self._score_times(prediction, episode)
        known = knowable(prediction.source, prediction.question, episode.times)
        if known is not None:
            episode.values["knowable"] = known
        if answered or prediction.error or not episode.times:
            self._score_answer(prediction, episode)
        return episode

    def _fail(self, prediction: Prediction, reason: str, message: str) -> None:
        self._report(Failure(prediction.id, reason, f"{prediction.id}: {message}"))

    def _group(self, prediction: Prediction) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {"type": [prediction.type]}
        for name in self._groups:
            value = prediction.meta.get(name)
            if isinstance(value, str | int | float | list) and value not in ("", []):
                listed = value if isinstance(value, list) else [value]
                if len(listed) > _GROUPS_OF_ONE or any(len(str(item)) > _GROUP_CHARS for item in listed):
                    self._fail(prediction, "bad_group", f"its {name} is no name of a group: left out of that group")
                else:
                    found[name] = list(dict.fromkeys(map(_word, listed)))
        return self._group_sets.setdefault(str(found), found)

    def _count(self, prediction: Prediction, episode: EpisodeScore) -> None:
        made = tuple(
            len(parse_turn(text_of(message)).calls)
            for message in prediction.prediction
            if message.get("role") == "assistant"
        )
        episode.calls_by_turn = self._same.setdefault(made, made)
        calls = sum(episode.calls_by_turn) if prediction.prediction else prediction.tool_calls
        episode.values.update(
            frames=len(episode.times),
            preview_frames=len(prediction.preview_seconds),
            tool_calls=calls,
            turns=len(episode.calls_by_turn) or prediction.turns,
            searched=float(bool(episode.times or heard_seconds(prediction.prediction))),
            error=float(prediction.error is not None),
        )

    def _score_times(self, prediction: Prediction, episode: EpisodeScore) -> None:
        end = math.inf if episode.duration is None else episode.duration + END_TOLERANCE
        truth, spans = self._ground_truth(prediction, end)
        self.tools.add(prediction, truth, spans)
        if not truth and not spans:
            self.without_truth.append(prediction.id)
            return
        sound = [time for time in episode.times if _sound(time, end)]
        bad = len(episode.times) - len(sound)
        if bad:
            message = f"{bad} of {len(episode.times)} searched times are no time of the video: they count as misses"
            self._fail(prediction, "bad_times", message)
        scores = temporal_scores(truth or spans, sound, self._thresholds)
        if bad:
            scores = _with_misses(scores, len(sound), bad)
        if spans:
            scores["span_coverage"] = span_coverage(spans, sound)
        episode.values.update(scores)
        if episode.times:
            for part in ("precision", "recall", "f1"):
                episode.values[f"temporal_tstar_{part}"] = scores[f"temporal_{part}"]
        episode.truth = array("d", truth or [(start + stop) / 2 for start, stop in spans])
        episode.times = sound

    def _ground_truth(self, prediction: Prediction, end: float) -> tuple[list[float], list[tuple[float, float]]]:
        """Times and spans of the ground truth: `gt_seconds`, else the times of `gt_frame_index`; `gt_spans`."""
        truth = list(prediction.gt_seconds)
        if not truth and prediction.gt_frame_index:
            truth = self._times_of(prediction)
        sound = [time for time in truth if _sound(time, end)]
        spans = [span for span in prediction.gt_spans if all(_sound(time, end) for time in span) and span[0] <= span[1]]
        for whole, kept, words in ((truth, sound, "times"), (prediction.gt_spans, spans, "spans")):
            if len(kept) < len(whole):
                message = (
                    f"{len(whole) - len(kept)} of {len(whole)} ground-truth {words} are not of the video: left out"
                )
                self._fail(prediction, "bad_ground_truth", message)
        return sound, spans

    def _times_of(self, prediction: Prediction) -> list[float]:
        """When the ground truth's frames are shown; NaN for a number that the video does not have."""
        numbers = prediction.gt_frame_index
        try:
            shown = self._videos.frame_times(prediction.video)
            if len(shown):
                return [float(shown[number]) if 0 <= number < len(shown) else math.nan for number in numbers]
            rate = self._videos.frame_rate(prediction.video)
        except ItemError as error:
            stated = prediction.meta.get("frame_rate") or prediction.meta.get("fps")
            if not isinstance(stated, int | float) or not 0 < stated < math.inf:
                message = f"ground truth in frame numbers needs the video's frame rate: {error}"
                self._fail(prediction, "unknown_frame_rate", message)
                return []
            rate = float(stated)
        return [number / rate for number in numbers]

    def _score_answer(self, prediction: Prediction, episode: EpisodeScore) -> None:
        episode.answer = final_answer(prediction.prediction) if prediction.prediction else prediction.predicted_answer
        if prediction.type == "grounding":
            self._score_intervals(prediction, episode)
            return
        if not prediction.answer.strip():
            return
        if prediction.type == "multiple_choice":
            self._score_choice(prediction, episode)
        else:
            self._ask(prediction, episode, "qa_accuracy", episode.answer)
            episode.unparsed = not (episode.answer or "").strip()
            if prediction.reanswer is not None:
                self._ask(prediction, episode, "reanswer_accuracy", prediction.reanswer)

    def _score_intervals(self, prediction: Prediction, episode: EpisodeScore) -> None:
        gold = parse_intervals(prediction.answer) or prediction.gt_spans
        if interval_iou(gold, gold):
            said = parse_intervals(episode.answer or "")
            episode.values["grounding_iou"] = interval_iou(said, gold)
            if prediction.reanswer is not None:
                episode.values["reanswer_accuracy"] = interval_iou(parse_intervals(prediction.reanswer), gold)
            episode.unparsed = not said
        elif prediction.answer.strip():
            self._fail(prediction, "bad_answer", f"the right answer {prediction.answer[:80]!r} names no interval")

    def _score_choice(self, prediction: Prediction, episode: EpisodeScore) -> None:
        gold = answer_letter(prediction.answer, prediction.options)
        if gold is None:
            message = f"the right answer {prediction.answer!r} is none of the {len(prediction.options)} options"
            self._fail(prediction, "bad_answer", message)
            return
        episode.choice = parse_choice(episode.answer, prediction.options)
        episode.unparsed = episode.choice is None
        strict = float(episode.choice == gold)
        letter = published_choice(prediction.prediction, episode.answer, prediction.options)
        published = published_score(letter, gold, prediction.options)
        episode.values["qa_strict"], episode.values["qa_published"] = strict, published
        episode.values["qa_differ"] = float(letter != episode.choice)
        episode.values["qa_accuracy"] = published if self._published else strict
        if prediction.reanswer is not None:
            again = parse_choice(prediction.reanswer, prediction.options)
            episode.values["reanswer_accuracy"] = float(again == gold)

    def _ask(self, prediction: Prediction, episode: EpisodeScore, metric: str, answer: str | None) -> None:
        episode.values[metric] = 0.0
        if answer and answer.strip():
            episode.judged += ((metric, (prediction.question, prediction.answer, answer)),)


def _searched(prediction: Prediction) -> list[float]:
    """Times of the searched frames, each once: as the row lists them, else as its messages show them."""
    times = prediction.searched_seconds or searched_seconds(prediction.prediction)
    return list(dict.fromkeys(times))


def _word(value: Any) -> str:
    """The name of a group: tables make 60 into 60.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _sound(time: Any, end: float) -> bool:
    return math.isfinite(time) and 0 <= time <= end


def _with_misses(scores: dict[str, float], sound: int, bad: int) -> dict[str, float]:
    """Scores of an episode, with `bad` searched frames more that are right of nothing."""
    diluted = dict(scores)
    for name in scores:
        if name.startswith("temporal_precision"):
            ending = name.removeprefix("temporal_precision")
            diluted[name] = scores[name] * sound / (sound + bad)
            diluted[f"temporal_f1{ending}"] = harmonic_mean(diluted[name], scores[f"temporal_recall{ending}"])
    return diluted
