"""The moments of a library in which something is said: its subtitle indexes, searched beside its frames.

A score of frames and one of words say nothing about each other, so that what is said is a list of its own. A moment is
a line, or neighbouring ones together. It answers a query when it holds most of what the query's words tell: each word
counts the more, the fewer lines of the library hold it (inverse document frequency), and words that only build a
sentence count for nothing. A query whose words nobody says therefore finds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from timesearch.base.errors import ItemError
from timesearch.base.stopping import NEVER, Stop
from timesearch.library.catalogue import Entry
from timesearch.video.subtitles import Line, Subtitles, words_of

_ENOUGH = 0.6
"""Share of what a query's words tell that a moment has to hold."""
_APART = 2.0
"""Seconds between two lines within which they are one moment."""
_LONGEST = 15.0
"""Seconds over which words that answer together may be spread."""
_CHARS = 300
"""Of a moment's words that are shown."""
_SENTENCE = (
    "a about an and any are as at be been but by can could did do does for from had has have he her his how i "
    "in is it its me my no not of on or our say says said she should so some that the their them there these "
    "they this those to us was we were what when where which who whom whose why will with would you your"
)
_BUILDING = frozenset(_SENTENCE.split())
"""English words that only build a sentence; those of other languages are told by how often they are said."""


@dataclass(frozen=True)
class Said:
    """A stretch of a video in which a query's words are said, from `start` to `end` (s).

    `share` is how much of what the query's words tell is among them, up to 1.
    """

    video: Entry
    start: float
    end: float
    text: str
    share: float


@dataclass(frozen=True)
class Heard:
    """What was found among words: moments, the best first, and the videos whose words could not be read."""

    moments: list[Said] = field(default_factory=list)
    damaged: list[Entry] = field(default_factory=list)


def search_words(
    videos: Sequence[Entry],
    words_in: Callable[[Entry], Subtitles | None],
    query: str,
    count: int,
    per_video: int,
    stop: Stop = NEVER,
) -> Heard:
    """The moments in which a query's words are said.

    Args:
        videos: to search in.
        words_in: opens the words of a video; None where it has none.
        query: any text.
        count: moments at most.
        per_video: moments of one video that come before the first of each other one.
        stop: ends it between two videos.

    Raises:
        StoppedError: it was asked to stop.
    """
    spoken = words_of(query)
    asked = [word for word in spoken if word not in _BUILDING] or spoken
    heard = Heard()
    opened: list[tuple[Entry, Subtitles, list[int]]] = []
    lines = 0
    for video in videos:
        stop.check()
        try:
            words = words_in(video)
            if words is not None:
                total, holding = words.count(asked)
                lines += total
                opened.append((video, words, holding))
        except ItemError:
            heard.damaged.append(video)
    among = [sum(holding[place] for *_, holding in opened) for place in range(len(asked))]
    weights = [math.log1p(lines / max(number, 0.5)) for number in among]
    found: list[Said] = []
    for video, words, holding in opened:
        stop.check()
        if _share((place for place, number in enumerate(holding) if number), weights) >= _ENOUGH:
            found += _moments(video, words.holding(asked), weights)
        elif not any(among):  # as it is written: for scripts without spaces between words
            found += [Said(video, line.start, line.end, line.text[:_CHARS], 1.0) for line in words.quoting(query)]
    found.sort(key=lambda moment: (-moment.share, moment.video.name, moment.start))
    seen: dict[str, int] = {}
    first: list[Said] = []
    rest: list[Said] = []
    for moment in found:
        seen[moment.video.key] = seen.get(moment.video.key, 0) + 1
        (first if seen[moment.video.key] <= per_video else rest).append(moment)
    heard.moments.extend([*first, *rest][:count])
    return heard


def _share(places: Iterator[int] | set[int], weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(weights[place] for place in places) / total if total else 0.0


def _moments(video: Entry, lines: Sequence[tuple[Line, set[int]]], weights: Sequence[float]) -> Iterator[Said]:
    """Lines that hold enough, alone or with neighbours that add to it; such lines one after another are one moment."""
    stretches: list[tuple[int, int]] = []
    left = 0
    for right, (line, places) in enumerate(lines):
        near = right > 0 and line.start - lines[right - 1][0].end <= _APART
        left = left if near else right
        if near and stretches and stretches[-1][1] == right:
            first = stretches[-1][0]
            alone = _share(places, weights) >= _ENOUGH
            adds = places - _held(lines[first:right]) and line.end - lines[first][0].start <= _LONGEST
            if alone or adds:
                stretches[-1] = (first, right + 1)
                left = right + 1
                continue
        while left < right and (
            line.end - lines[left][0].start > _LONGEST or lines[left][1] <= _held(lines[left + 1 : right + 1])
        ):
            left += 1
        if _share(_held(lines[left : right + 1]), weights) >= _ENOUGH:
            stretches.append((left, right + 1))
            left = right + 1
    for first, last in stretches:
        part = [line for line, _ in lines[first:last]]
        text = " ".join(line.text for line in part)[:_CHARS]
        share = _share(_held(lines[first:last]), weights)
        yield Said(video, part[0].start, max(line.end for line in part), text, share)


def _held(lines: Sequence[tuple[Line, set[int]]]) -> set[int]:
    return set().union(*(places for _, places in lines))
