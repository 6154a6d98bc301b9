"""The hop world: videos in which what one event shows says which event to look for next.

A video shows each of sixteen shapes once, for 2 to 3 seconds, and beside the shape a *mark*: a small white shape on a
dark plate that names another shape. Colours and marks are drawn for each event alone, so that nothing but the frames
tells them. Questions need one, two or three events (hops):

- *pointer*: "What colour is the shape that the star points to?" The star's mark says what to look for.
- *after*: "What colour is the shape right after the star?" The star's time says where to look: between
  `AHEAD` and `WINDOW` seconds after any frame of it the next event is seen, and no other.

No event is near an instant of the uniform preview. What a method without search can reach is known by construction:
`Question.best_guess`, of whoever reads its frames perfectly. That every hop of a question is necessary is not claimed
but tested (tests/test_hops.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image

from timesearch.pocket.world import (
    COLOURS,
    PREVIEW_MARGIN,
    SHAPES,
    SIZE,
    Event,
    Scene,
    draw_backgrounds,
    generator,
    preview_instants,
    scene_generator,
    shape_mask,
)

WORLD = "hops"
"""Name of the world in `pocket://hops/<split>/<seed>.mp4`."""
LONG: dict[str, float] = {f"{WORLD}-10min": 600.0, f"{WORLD}-60min": 3600.0}
"""Worlds of longer videos, and their seconds: the same two minutes somewhere, and backgrounds around them."""
HOP_WORLDS = (WORLD, *LONG)
HOP_SHAPES = (*SHAPES, "diamond", "moon", "bolt", "hourglass", "crown", "stairs", "fish", "flag")
AHEAD, WINDOW = 4.0, 10.0
"""Seconds after a frame of an event between which the next event is seen, or a second of it at least, and no other."""
PLATE = 36
"""Side of the dark plate in the lower right corner that carries the mark, in pixels of `SIZE`."""

_GAPS = (6.5, 8.5)
"""Seconds from the start of an event to the start of the next. With events of `_LENGTHS`, a frame of one is at most 3
seconds from its end, 3.5 to 8.5 from the start of the next, and 10.5 from the one after that: times may be rounded
down."""
_LENGTHS = (2.0, 2.5, 3.0)
_PLATE_COLOUR = (14, 14, 18)

Link = Literal["points", "after"]
"""From one event to the next: to the one of the shape that its mark names, or to the next in time."""


@dataclass(frozen=True)
class HopEvent(Event):
    """An event with a mark: the shape that it points to."""

    mark: str

    def draw(self, picture: Image.Image, seconds: float) -> None:
        """Paint the shape and, in the lower right corner, its mark."""
        super().draw(picture, seconds)
        glyph = shape_mask(self.mark, PLATE - 8)
        corner = SIZE - PLATE
        picture.paste(_PLATE_COLOUR, (corner, corner, SIZE, SIZE))
        picture.paste((255, 255, 255), (corner + 4, corner + 4), glyph)


@dataclass(frozen=True)
class Question:
    """A question, the links that lead from its first shape to its answer, and the events on the way."""

    links: tuple[Link, ...]
    events: tuple[HopEvent, ...]
    """One a hop; the last has the colour that is asked for."""
    scene: HopScene

    @property
    def hops(self) -> int:
        """Events that have to be seen."""
        return len(self.events)

    @property
    def family(self) -> str:
        """`direct` (one hop), `pointer` or `after`, by the last link."""
        return "direct" if not self.links else "after" if self.links[-1] == "after" else "pointer"

    @property
    def answer(self) -> str:
        """The colour of the last event."""
        return self.events[-1].colour

    @property
    def text(self) -> str:
        """What is asked; it names the first shape alone."""
        return TEXTS[self.links].format(shape=self.events[0].shape)

    def best_guess(self, seconds: Collection[float]) -> float:
        """The chance that the best guess is right of one who reads the frames at these times (s) perfectly.

        It is 1 where they show every hop. Elsewhere a mark that was not seen may name any other shape and a colour that
        was not seen is any, so that the best guess is the colour of most of what the answer may still be.
        """
        shown = {event for event in map(self.scene.visible, seconds) if event is not None}
        chances = dict.fromkeys(COLOURS, 0.0)
        first, *_ = self.events
        for share, event in self._reachable(first, self.links, (first,), shown):
            for colour in COLOURS:
                known = float(event.colour == colour) if event in shown else 1 / len(COLOURS)
                chances[colour] += share * known
        return max(chances.values())

    def _reachable(
        self, event: HopEvent, links: tuple[Link, ...], before: tuple[HopEvent, ...], shown: Collection[Event]
    ) -> Iterator[tuple[float, HopEvent]]:
        """The events that may be asked for, each with its chance, as far as `shown` tells."""
        if not links:
            yield 1.0, event
            return
        others = [other for other in self.scene.events if other not in before]
        if links[0] == "points":
            nexts = [self.scene.pointed(event)] if event in shown else others
        else:
            follower = self.scene.following(event)
            if event in shown and follower in shown:
                nexts = [follower]
            else:  # had the one that follows been shown, its time would tell
                nexts = [other for other in others if other not in shown] if event in shown else others
        nexts = [other for other in nexts if other is not None and other not in before]
        for other in nexts:
            for share, last in self._reachable(other, links[1:], (*before, other), shown):
                yield share / len(nexts), last


@dataclass(frozen=True)
class HopScene(Scene):
    """What a video of the hop world shows, and what is asked about it."""

    events: Sequence[HopEvent]

    def event_of(self, shape: str) -> HopEvent | None:
        """The event of a shape; None where there is none."""
        return next((event for event in self.events if event.shape == shape), None)

    def pointed(self, event: HopEvent) -> HopEvent | None:
        """The event that another one's mark names."""
        return self.event_of(event.mark)

    def following(self, event: HopEvent) -> HopEvent | None:
        """The next event in time."""
        return next((other for other in self.events if other.start > event.start), None)

    def follow(self, shape: str, links: Sequence[Link]) -> tuple[HopEvent, ...] | None:
        """The events from a shape along links; None where they lead nowhere, or to an event twice."""
        event = self.event_of(shape)
        found: list[HopEvent] = []
        for link in (*links, None):
            if event is None or event in found:
                return None
            found.append(event)
            event = self.pointed(event) if link == "points" else self.following(event)
        return tuple(found)

    @cached_property
    def questions(self) -> list[Question]:
        """One question of each kind, about shapes that differ: one of one hop, two of two, two of three."""
        rng = generator(WORLD, "questions", self.split, self.seed)
        shapes = [str(shape) for shape in rng.permutation([event.shape for event in self.events])]
        asked: list[Question] = []
        for links in TEXTS:
            chains = ((shape, self.follow(shape, links)) for shape in shapes)
            shape, chain = next((shape, chain) for shape, chain in chains if chain is not None)
            shapes.remove(shape)
            asked.append(Question(links, chain, self))
        return asked

    @cached_property
    def every_question(self) -> list[Question]:
        """All that can be asked about the video: each kind about each shape from which its links lead somewhere."""
        chains = ((links, self.follow(event.shape, links)) for links in TEXTS for event in self.events)
        return [Question(links, chain, self) for links, chain in chains if chain is not None]

    @cached_property
    def by_text(self) -> dict[str, Question]:
        """`every_question` by what is asked."""
        return {question.text: question for question in self.every_question}

    def without(self, event: HopEvent) -> HopScene:
        """The same video with one event taken out."""
        return replace(self, events=[other for other in self.events if other != event])

    def with_mark(self, event: HopEvent, mark: str) -> HopScene:
        """The same video in which one event has another mark."""
        return replace(self, events=[replace(each, mark=mark) if each == event else each for each in self.events])


TEXTS: dict[tuple[Link, ...], str] = {
    ("points", "points"): "What colour is the shape two pointers after the {shape}?",
    ("points", "after"): "What colour is the shape right after the one that the {shape} points to?",
    ("points",): "What colour is the shape that the {shape} points to?",
    ("after",): "What colour is the shape right after the {shape}?",
    (): "What colour is the {shape}?",
}
"""Questions by their links; those that few shapes allow come first."""


def is_from_hops(source: str | None) -> bool:
    """Whether a video's URL is one of the hop worlds."""
    return (source or "").startswith(tuple(f"pocket://{world}/" for world in HOP_WORLDS))


def window_after(seconds: float) -> tuple[int, int]:
    """Whole seconds between which the event after the one that a frame at a time shows is seen, and no other."""
    return int(seconds + AHEAD), int(seconds + WINDOW)


def make_hop_scene(split: str, seed: int, world: str = WORLD) -> HopScene:
    """The scene of a video, which follows from its name alone.

    Raises:
        RequestError: an unknown split.
    """
    rng = scene_generator(world, split, seed)
    shapes = [str(shape) for shape in rng.permutation(HOP_SHAPES)]
    starts, lengths, duration = _draw_times(len(shapes), rng, LONG.get(world))
    events = [
        HopEvent(
            start=start,
            end=start + length,
            shape=shape,
            colour=str(rng.choice(list(COLOURS))),
            needle=True,
            size=int(rng.integers(60, 77)),
            centre=(int(rng.integers(44, 53)), int(rng.integers(44, 53))),
            drift=(int(rng.integers(-10, 11)), int(rng.integers(-10, 11))),
            mark=str(rng.choice([other for other in shapes if other != shape])),
        )
        for shape, start, length in zip(shapes, starts, lengths, strict=True)
    ]
    return HopScene(world, split, seed, duration, draw_backgrounds(duration, rng), events)


def _draw_times(count: int, rng: np.random.Generator, long: float | None) -> tuple[list[float], list[float], float]:
    """Starts and lengths of events (s), in quarters of a second, and a duration, `long` if that is given, whose preview
    shows none of them."""
    while True:
        lengths = [float(length) for length in rng.choice(_LENGTHS, size=count)]
        gaps = rng.integers(int(_GAPS[0] * 4), int(_GAPS[1] * 4) + 1, size=count - 1) / 4
        first = float(rng.integers(4, 25)) / 4
        starts = [first, *(first + np.cumsum(gaps)).tolist()]
        duration = float(np.ceil(starts[-1] + lengths[-1] + rng.integers(1, 9)))
        if long is not None:
            before = float(rng.integers(int(4 * (long - duration)))) / 4
            starts, duration = [start + before for start in starts], long
        if not any(
            start - PREVIEW_MARGIN < instant < start + length + PREVIEW_MARGIN
            for instant in preview_instants(duration)
            for start, length in zip(starts, lengths, strict=True)
        ):
            return starts, lengths, duration
