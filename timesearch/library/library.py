"""A library as those see it who search in it: open segments, videos by name, and the moments that answer a query.

A query's scores are cosines of its embedding with every frame. Where the best of them does not exceed what unrelated
prompts get among the same frames (`timesearch.retrieval.noise`), nothing answers the query, and that is said. Else the
frames that do exceed it are joined into moments where they are next to each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from timesearch.base.errors import ItemError, RequestError
from timesearch.base.stopping import NEVER, Stop
from timesearch.base.untrusted import mend_text
from timesearch.library.catalogue import FILE, Catalogue, Entry, Root, by_key, file_of
from timesearch.library.index import features_folder, frames_folder, segments_folder, subtitles_folder
from timesearch.library.rows import Segment, Span, exact, scan, slack
from timesearch.library.words import Heard, search_words
from timesearch.retrieval.noise import joined, match_level, noise_level
from timesearch.video.frames import FrameCache, cache_path
from timesearch.video.probe import Fingerprint
from timesearch.video.subtitles import Subtitles, index_path

if TYPE_CHECKING:
    from timesearch.retrieval.encoder import Encoder

PER_VIDEO = 3
"""Moments of one video among the results, as long as other videos have some, too."""
QUERY_CHARS = 500
"""No text encoder reads farther."""
_APART = 2.0
"""Seconds between two frames that answer within which they are one moment."""
_MOST_FRAMES = 2**16
"""Frames that are joined into moments, the best ones, where more exceed the level."""


@dataclass(frozen=True)
class Moment:
    """A stretch of a video whose frames answer a query.

    `start` and `end` (s) are the times of its first and last such frame, and `seconds` that of the best one, which has
    the index `frame` in the frame cache and the cosine `score`.
    """

    video: Entry
    start: float
    end: float
    seconds: float
    frame: int
    score: float


@dataclass(frozen=True)
class Found:
    """What a query found.

    `level` is the score that unrelated prompts reach among the same frames, and `best` the query's best score there:
    where that is no higher, there are no moments. `nearest` are the videos by their best frame, whether that is an
    answer or not. `frames` were looked at, of `videos` videos. `heard` are the moments in which the query's words are
    said, a list of its own.
    """

    moments: list[Moment]
    level: float
    best: float
    nearest: list[Entry]
    frames: int
    videos: int
    heard: Heard = field(default_factory=Heard)

    def why_nothing(self) -> str:
        """That no frame answers, and how that is known."""
        if not self.videos:
            return "there is no such video in the library"
        said = "no frame in {} videos shows this" if self.heard.moments else "nothing in {} videos answers this"
        return (
            f"{said.format(self.videos)}: the best frame scores {self.best:.3f}, and things that are not there up to "
            f"{self.level:.3f}"
        )


@dataclass(frozen=True)
class _State:
    """A catalogue with its open segments."""

    catalogue: Catalogue
    fingerprint: Fingerprint
    segments: dict[str, Segment]
    places: dict[str, int]
    """key -> position of the video in its segment"""


class Library:
    """A library, open for reading; what another process indexes meanwhile is seen by the next call.

    Args:
        folder: of the library.

    Attributes:
        frames: folder of the frame caches.
        features: folder of the feature caches.
        subtitles: folder of the subtitle indexes.

    Raises:
        RequestError: there is no library, or its catalogue is damaged.
        ItemError: `damaged_index`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._lock = threading.Lock()
        self._state = self._read()
        self.frames, self.subtitles = frames_folder(self.folder), subtitles_folder(self.folder)
        self.features = features_folder(self.folder, self._state.catalogue.encoder)

    def _read(self) -> _State:
        before: Fingerprint | None = None
        while True:
            catalogue = Catalogue.read(self.folder)
            fingerprint = Fingerprint.of(self.folder / FILE)
            try:
                folder = segments_folder(self.folder)
                segments = {record.name: Segment.open(folder, record) for record in catalogue.segments}
                return _State(catalogue, fingerprint, segments, _places(catalogue, segments))
            except ItemError:
                if fingerprint == before:
                    raise
                before = fingerprint  # an index run may just have replaced both

    @property
    def catalogue(self) -> Catalogue:
        """The catalogue as it is now."""
        return self._now().catalogue

    def _now(self) -> _State:
        with self._lock, suppress(FileNotFoundError):
            if Fingerprint.of(self.folder / FILE) == self._state.fingerprint:
                return self._state
        with self._lock:
            self._state = self._read()
            return self._state

    def require(self, encoder: Encoder) -> None:
        """Refuse an encoder that did not make this library.

        Raises:
            RequestError: naming both.
        """
        self.catalogue.encoder.require(encoder, self.folder)

    def videos(self, where: str | None = None, since: datetime | None = None) -> list[Entry]:
        """The videos, in order of name.

        Args:
            where: only those in this folder, or this one: a path, or a name as the library writes it.
            since: only those whose file was changed then or later.

        Raises:
            RequestError: `where` is nothing of this library.
        """
        catalogue = self.catalogue
        videos = catalogue.videos if where is None else _below(catalogue, where)
        if since is not None:
            videos = [video for video in videos if video.modified_ns >= since.timestamp() * 1e9]
        return videos

    def video(self, name: str) -> Entry:
        """A video by its name, its key, or, where no other has the same, its file's name.

        Raises:
            RequestError: there is none, or several.
        """
        videos = self.catalogue.videos
        for matches in (
            [video for video in videos if name in (video.name, video.key)],
            [video for video in videos if Path(video.name).name == name],
        ):
            if len(matches) == 1:
                return matches[0]
            if matches:
                raise RequestError(f"{len(matches)} videos are called {name!r}: name one as the library lists it")
        raise RequestError(f"there is no video {name[:200]!r} in this library")

    def path(self, video: Entry) -> Path:
        """The file of a video.

        Raises:
            ItemError: `missing_file` or `unsafe_path`.
        """
        return file_of(video, self._root(video))

    def _root(self, video: Entry) -> Root:
        return next(root for root in self.catalogue.roots if root.label == video.root)

    def state_of(self, video: Entry) -> str:
        """Whether a video is still what was indexed: ``as indexed``, ``changed`` or ``gone``."""
        try:
            status = self.path(video).stat()
        except (ItemError, OSError):
            return "gone"
        same = (status.st_size, status.st_mtime_ns) == (video.size, video.modified_ns)
        return "as indexed" if same else "changed"

    def frame_cache(self, video: Entry) -> FrameCache:
        """The frames of a video.

        Raises:
            ItemError: `missing_cache` or `damaged_cache`.
        """
        return FrameCache.open(cache_path(self.frames, video.key))

    def words(self, video: Entry) -> Subtitles | None:
        """What is said in a video; None where that is not known.

        Raises:
            ItemError: `damaged_subtitles`.
        """
        path = index_path(self.subtitles, video.key)
        return Subtitles(path) if path.is_file() else None

    def find(
        self, encoder: Encoder, query: str, count: int = 10, videos: Sequence[Entry] | None = None, stop: Stop = NEVER
    ) -> Found:
        """`search` for a text, among frames and, beside it, among what is said.

        Args:
            encoder: that of the library.
            query: what to look for.
            count: as `search`.
            videos: as `search`.
            stop: as `search`.
        """
        return find_moments(self.rows(videos), self.words, encoder, query, count, stop)

    def search(
        self,
        query: np.ndarray,
        count: int = 10,
        videos: Sequence[Entry] | None = None,
        stop: Stop = NEVER,
        match: float | None = None,
    ) -> Found:
        """The best moments for a query, of which one video has at most `PER_VIDEO` while others have some left.

        Args:
            query: (D,) float32 unit vector by the library's encoder.
            count: moments at most.
            videos: to search in; all if None.
            stop: ends it.
            match: the score from which the encoder itself calls a frame an answer to this query, where it does.

        Raises:
            StoppedError: it was asked to stop.
        """
        return search_rows(self.rows(videos), query, count, stop, match)

    def rows(self, videos: Sequence[Entry] | None = None) -> Rows:
        """The rows of some of its videos, as they are now; of all if None."""
        state = self._now()
        wanted = by_key(state.catalogue.videos if videos is None else videos)
        chosen = [video for key, video in by_key(state.catalogue.videos).items() if key in wanted]
        return Rows(chosen, state.segments, state.places)


@dataclass(frozen=True)
class Rows:
    """Videos whose rows can be searched together: with the open segments, by name, that hold them, and the place of
    each video, by key, in its segment.
    """

    videos: list[Entry]
    segments: dict[str, Segment]
    places: dict[str, int]

    def __add__(self, other: Rows) -> Rows:
        return Rows([*self.videos, *other.videos], self.segments | other.segments, self.places | other.places)


def search_rows(
    rows: Rows, query: np.ndarray, count: int = 10, stop: Stop = NEVER, match: float | None = None
) -> Found:
    """As `Library.search`, among `rows`."""
    moments: list[Moment] = []
    noise: list[np.ndarray] = []
    bests: list[tuple[float, Entry]] = []
    level = np.inf
    scored: list[tuple[list[Entry], Segment, np.ndarray]] = []
    chosen = sorted(rows.videos, key=lambda video: (video.segment, video.first))
    for name, group in groupby(chosen, key=lambda video: video.segment):
        segment, held = rows.segments[name], list(group)
        scores = scan(segment.rows, query, _joined(held), stop)
        scored.append((held, segment, scores))
        bests += zip(np.maximum.reduceat(scores, _starts(held)).tolist(), held, strict=True)
        noise.append(segment.noise[[rows.places[video.key] for video in held]])
    if scored:
        counts = np.array([video.rows for video in chosen])
        mean = sum(float(scores.sum(dtype=np.float64)) for *_, scores in scored) / counts.sum()
        level = noise_level(joined(np.concatenate(noise), counts), mean, match)
    bests.sort(key=lambda pair: -pair[0])
    best = bests[0][0] if bests else -1.0
    if best > level - slack(query):
        floor = _floor([scores for _, _, scores in scored], level - slack(query))
        picked = [_answering(*each, query, floor) for each in scored]
        best = max((float(scores.max()) for *_, scores in picked if len(scores)), default=best)
        for held, segment, indices, scores in picked:
            keep = scores > level
            moments += _moments(held, segment, indices[keep], scores[keep])
    nearest = [video for _, video in bests[:count]]
    return Found(_ranked(moments, count), level, best, nearest, sum(video.rows for video in chosen), len(chosen))


def find_moments(
    rows: Rows,
    words: Callable[[Entry], Subtitles | None],
    encoder: Encoder,
    query: str,
    count: int = 10,
    stop: Stop = NEVER,
) -> Found:
    """As `Library.find`, among `rows` and, by `words`, what is said in their videos."""
    found = search_rows(rows, encoder.encode_text([query])[0], count, stop, match_level(encoder, query))
    return replace(found, heard=search_words(rows.videos, words, query, count, PER_VIDEO, stop))


def check_query(query: str) -> None:
    """Refuse what no encoder should be given.

    Raises:
        RequestError: the query is empty, too long, or no text.
    """
    if not query.strip():
        raise RequestError("the query is empty: write what you look for, in a few words")
    if len(query) > QUERY_CHARS:
        raise RequestError(f"the query is {len(query)} characters long: {QUERY_CHARS} at most are read")
    if mend_text(query) != query or "\0" in query:
        raise RequestError("the query holds a character that is cut in two or in another encoding: write it in UTF-8")


def _places(catalogue: Catalogue, segments: dict[str, Segment]) -> dict[str, int]:
    """The position of each video in its segment, told by its first row.

    Raises:
        ItemError: `damaged_index`: a video has no rows in the segments.
    """
    places: dict[str, int] = {}
    for name, group in groupby(
        sorted(catalogue.videos, key=lambda video: (video.segment, video.first)), key=lambda video: video.segment
    ):
        segment = segments.get(name)
        for video in group:
            if segment is None or video.first + video.rows > len(segment.rows):
                raise ItemError(f"the index has no rows of {video.name}: run `timesearch index`", "damaged_index")
            places[video.key] = int(np.searchsorted(segment.firsts, video.first))
    return places


def _below(catalogue: Catalogue, where: str) -> list[Entry]:
    """The videos in a folder, or the one that is named.

    Raises:
        RequestError: it is no folder or video of the library.
    """
    named = [video for video in catalogue.videos if where in (video.key, video.name)]
    prefix = where.rstrip("/") + "/"
    named = named or [video for video in catalogue.videos if video.name.startswith(prefix)]
    if named:
        return named
    real: Path | None = None
    with suppress(OSError, RuntimeError, ValueError):
        real = Path(where).expanduser().resolve()
    root = catalogue.root_of(real) if real is not None else None
    if real is None or root is None:
        covered = [root.label for root in catalogue.roots if real is not None and root.folder.is_relative_to(real)]
        found = [video for video in catalogue.videos if video.root in covered]
    else:
        places = ((video, root.folder / video.relative) for video in catalogue.videos if video.root == root.label)
        found = [video for video, path in places if path.is_relative_to(real)]
    if not found:
        raise RequestError(f"{where[:200]!r} is no folder or video of this library: `timesearch index` it first")
    return found


def _joined(videos: Sequence[Entry]) -> list[Span]:
    """Where the rows of videos lie that are in order of them, neighbours as one span."""
    spans: list[Span] = []
    for video in videos:
        last = video.first + video.rows
        if spans and spans[-1][1] == video.first:
            spans[-1] = (spans[-1][0], last)
        else:
            spans.append((video.first, last))
    return spans


def _starts(videos: Sequence[Entry]) -> np.ndarray:
    """Where the scores of each video begin, where those of one follow those of another."""
    return np.cumsum([0, *(video.rows for video in videos[:-1])])


def _floor(scored: Sequence[np.ndarray], floor: float) -> float:
    """The score from which frames are joined into moments: `floor`, or higher where too many exceed it."""
    above = [scores[scores > floor] for scores in scored]
    count = sum(map(len, above))
    if count <= _MOST_FRAMES:
        return floor
    return float(np.partition(np.concatenate(above), count - _MOST_FRAMES)[count - _MOST_FRAMES])


def _answering(
    videos: list[Entry], segment: Segment, scores: np.ndarray, query: np.ndarray, floor: float
) -> tuple[list[Entry], Segment, np.ndarray, np.ndarray]:
    """Rows of a segment above `floor`, with their exact scores."""
    starts = _starts(videos)
    picked = np.flatnonzero(scores > floor)
    owner = np.searchsorted(starts, picked, side="right") - 1
    indices = picked - starts[owner] + np.array([video.first for video in videos])[owner]
    return videos, segment, indices, exact(segment.rows, indices, query)


def _moments(videos: list[Entry], segment: Segment, indices: np.ndarray, scores: np.ndarray) -> Iterable[Moment]:
    """Rows at increasing `indices`, joined where they are of one video and near each other in time."""
    if not len(indices):
        return
    firsts = np.array([video.first for video in videos])
    owner = np.searchsorted(firsts, indices, side="right") - 1
    times = segment.times[indices]
    breaks = np.flatnonzero((np.diff(owner) != 0) | (np.diff(times) > _APART)) + 1
    for part in np.split(np.arange(len(indices)), breaks):
        video = videos[owner[part[0]]]
        top = part[int(np.argmax(scores[part]))]
        yield Moment(
            video=video,
            start=float(times[part[0]]),
            end=float(times[part[-1]]),
            seconds=float(times[top]),
            frame=int(indices[top]) - video.first,
            score=float(scores[top]),
        )


def _ranked(moments: Iterable[Moment], count: int) -> list[Moment]:
    """The best moments, the higher ones first; those of a video beyond `PER_VIDEO` come after all others'."""
    ordered = sorted(moments, key=lambda moment: (-moment.score, moment.video.name, moment.start))
    seen: dict[str, int] = {}
    first: list[Moment] = []
    rest: list[Moment] = []
    for moment in ordered:
        seen[moment.video.key] = seen.get(moment.video.key, 0) + 1
        (first if seen[moment.video.key] <= PER_VIDEO else rest).append(moment)
    return [*first, *rest][:count]
