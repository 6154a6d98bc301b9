"""Search episodes about the hop world, written by a rule that knows the scene: what supervised training imitates.

A thought tells what the new frames show and when, and follows the hops as far as the frames go that were seen so far::

    I see star@61.5s. So star>moon moon?

A hop is a pair of a key and a value: the shape that a mark names (``star>moon``), a colour (``star=green``), a time
(``star@61.5s``), or which shape is right after another (``star+fish``). The key names shape and relation in one token,
so that a hop is one look at the frame that shows the shape. ``moon?`` says that no frame shows it yet: it is searched
for, as is what comes after a time: in the window that begins there, before it is said what follows. Times are told of
an event's first frame alone. A re-answer has all frames before it, and recites them up to what follows in time::

    So star>moon star, moon+fish fish=red

As in `timesearch.pocket.traces`, every trace runs through the real search, and traces are imperfect on purpose, in
stated shares; here by the number of hops. The fault of its own kind is to stop at an earlier hop, and to answer with
the colour that is seen there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from timesearch.data.messages import Block, Message, final_answer, format_seconds, times_of
from timesearch.pocket.hops import HOP_SHAPES, HopEvent, HopScene, Link, Question, window_after
from timesearch.pocket.traces import trace_turn
from timesearch.pocket.world import COLOURS
from timesearch.training.supervised import UNKNOWN

if TYPE_CHECKING:
    from timesearch.search.search import Search

RELATIONS = (">", "=", "@", "+", "?")
"""What ends a key: the shape that is pointed to, the colour, the time, the shape right after; and what is not noted."""
RELATION_OF: dict[Link, str] = {"points": ">", "after": "+"}
COLOUR_OF, TIME_OF = "=", "@"


@dataclass(frozen=True)
class HopHabits:
    """Shares of the ways in which a trace behaves; they sum to 1."""

    good: float
    """follows every hop, and searches again within windows for what was not seen"""
    short: float
    """stops before the last hop, with the colour that is seen there"""
    astray: float
    """looks for another shape than the one that was named, once"""
    guess: float
    """answers at once"""
    give_up: float = 0.5
    """chance that a search that went astray ends in a guess"""


HopManners = dict[int, HopHabits]
"""Habits by the hops of a question."""

HOP_CLEAN: HopManners = dict.fromkeys((1, 2, 3), HopHabits(good=1.0, short=0.0, astray=0.0, guess=0.0))
HOP_SKILLED: HopManners = {
    1: HopHabits(good=0.85, short=0.0, astray=0.1, guess=0.05),
    2: HopHabits(good=0.8, short=0.05, astray=0.1, guess=0.05),
    3: HopHabits(good=0.8, short=0.05, astray=0.1, guess=0.05),
}
"""What pretraining learns to search from."""
HOP_BASE: HopManners = dict.fromkeys((1, 2, 3), HopHabits(good=0.1, short=0.0, astray=0.3, guess=0.6, give_up=0.8))
HOP_BASE |= {hops: HopHabits(good=0.1, short=0.25, astray=0.2, guess=0.45, give_up=0.8) for hops in (2, 3)}
"""A base model that can read, call the tool and answer, but seldom searches well."""
HOP_COLD_START: HopManners = {
    1: HopHabits(good=0.75, short=0.0, astray=0.1, guess=0.15),
    2: HopHabits(good=0.4, short=0.3, astray=0.1, guess=0.2),
    3: HopHabits(good=0.25, short=0.4, astray=0.15, guess=0.2),
}
"""The imperfect traces of a cold start: the more hops, the more of them stop on the way."""


@dataclass
class HopNotes:
    """What the frames that were seen tell of a scene: values by their keys, and when (s) each event was seen first."""

    scene: HopScene
    values: dict[str, str] = field(default_factory=dict)
    seen: dict[HopEvent, float] = field(default_factory=dict)

    def see(self, blocks: Sequence[Block]) -> str:
        """Note what frames show, and tell it, with the times of what is new: ``I see star@61.5s, star, nothing.``"""
        told = [self._see(seconds) for seconds in times_of(blocks)]
        for before in self.seen:
            after = self.scene.following(before)
            if after in self.seen:
                self.values[f"{before.shape}+"] = after.shape
        return f"I see {', '.join(told)}."

    def _see(self, seconds: float) -> str:
        event = self.scene.visible(seconds)
        if not isinstance(event, HopEvent):
            return "nothing"
        if event in self.seen:
            return event.shape
        self.seen[event] = seconds
        time = format_seconds(seconds)
        self.values |= {f"{event.shape}>": event.mark, f"{event.shape}=": event.colour, f"{event.shape}@": time}
        return f"{event.shape}@{time}"

    def recite(self, shape: str, blocks: Sequence[Block]) -> str:
        """Tell what follows a shape in time by what one frame after another shows: ``moon, nothing, star+fish``.

        Frames are told from the first on, until one shows the shape; the next thing to be told is what follows. So the
        order is read as it is, where what stands behind a key would have to be found by its neighbour, which so small a
        policy does not learn.
        """
        told: list[str] = []
        for event in map(self.scene.visible, times_of(blocks)):
            if isinstance(event, HopEvent) and event.shape == shape:
                break
            told.append(f"{event.shape if isinstance(event, HopEvent) else 'nothing'},")
        return " ".join([*told, told_of(self.values, shape, RELATION_OF["after"])])

    def follow(
        self,
        question: Question,
        hops: int,
        looked: Collection[HopEvent] | None = None,
        recited: Sequence[Block] | None = None,
    ) -> tuple[str, HopEvent | str]:
        """The hops of a question as far as is known.

        Args:
            question: about this scene.
            hops: the last one that is followed.
            looked: events after which a window was searched: only then is it sure what follows them in time. None
                where no search is left, and the frames are all that there is.
            recited: the frames, where what follows in time is told by `recite`.

        Returns:
            What is told of it, and the answer; where a hop is not known, its event.
        """
        told = ["So"]
        for place, (event, link) in enumerate(zip(question.events, question.links[: hops - 1], strict=False)):
            sure = link == "points" or looked is None or event in looked
            if link == "after" and recited is not None:
                told.append(self.recite(event.shape, recited))
            else:
                told.append(told_of(self.values, event.shape, RELATION_OF[link] if sure else TIME_OF))
            if event not in self.seen:
                return " ".join(told), event
            if link == "after" and not (sure and f"{event.shape}+" in self.values):
                return " ".join(told), question.events[place + 1]
        last = question.events[hops - 1]
        told.append(told_of(self.values, last.shape, COLOUR_OF))
        return " ".join(told), last.colour if last in self.seen else last

    def misleads(self, event: HopEvent) -> bool:
        """Whether frames show a later event, and not the one right after: by their order alone it would be that one."""
        return self.scene.following(event) not in self.seen and any(other.start > event.start for other in self.seen)

    def misled(self, question: Question) -> bool:
        """Whether what frames show misleads on a hop of a question as far as it can be followed."""
        for event, link in zip(question.events, question.links, strict=False):
            if event not in self.seen:
                return False
            if link == "after" and self.misleads(event):
                return True
        return False


def told_of(values: Mapping[str, str], shape: str, relation: str) -> str:
    """What is told of one hop: its key and value, or that it is not known.

    Args:
        values: what is known, by its keys.
        shape: where the hop begins.
        relation: of `RELATIONS`.
    """
    key = f"{shape}{relation}"
    return key + values[key] if key in values else f"{shape}?"


def write_hop_trace(
    search: Search,
    row: dict[str, Any],
    question: Question,
    manners: HopManners,
    rng: np.random.Generator,
) -> list[Message]:
    """One episode about a question.

    Args:
        search: over the caches of the video; it is opened anew.
        row: the sample's fields.
        question: the truth about it.
        manners: how to behave, by chance.
        rng: decides.

    Returns:
        The messages after the system message: user, assistant, tool, ..., assistant.
    """
    search.open(row)
    messages: list[Message] = [{"role": "user", "content": search.preview()}]
    habits = manners[question.hops]
    kinds = ["good", "short", "astray", "guess"]
    kind = str(rng.choice(kinds, p=[habits.good, habits.short, habits.astray, habits.guess]))
    if kind == "guess":
        return [*messages, trace_turn("I can guess.", answer=_guess(rng))]
    last = int(rng.integers(question.hops - 1)) if kind == "short" else question.hops - 1
    stray = question.events[int(rng.integers(question.hops))] if kind == "astray" else None
    notes = HopNotes(question.scene)
    tried: dict[HopEvent, int] = {}
    looked: set[HopEvent] = set()
    lost, seen = False, ""
    while True:
        told, wanted = notes.follow(question, last + 1, looked)
        thought = seen + told
        if isinstance(wanted, str):
            return [*messages, trace_turn(thought, answer=wanted)]
        calls = _calls(question, wanted, notes, search.video.frames.end)
        attempt = tried.get(wanted, 0)
        if lost or search.spent or attempt == len(calls):
            return [*messages, trace_turn(f"{thought} I can guess.", answer=_guess(rng))]
        if wanted == stray:
            wrong = str(rng.choice([shape for shape in HOP_SHAPES if shape != wanted.shape]))
            thought = f"{thought.removesuffix(f' {wanted.shape}?')} {wrong}?"
            call, stray, lost = {"query": wrong}, None, bool(rng.random() < habits.give_up)
        else:
            call, tried[wanted] = calls[attempt], attempt + 1
            place = question.events.index(wanted)
            looked |= {question.events[place - 1]} if place and question.links[place - 1] == "after" else set()
        messages.append(trace_turn(thought, call))
        found = search.call("seek_video_frames", call)
        messages.append({"role": "tool", "name": "seek_video_frames", "content": found})
        seen = f"{notes.see(found)} "


def write_hop_reanswer(
    search: Search,
    row: dict[str, Any],
    question: Question,
    known: bool,
    rng: np.random.Generator,
    recited: bool = True,
) -> list[Message] | None:
    """One example of the re-answer task: searched frames alone, the question, and the answer or "I don't know".

    Args:
        search: over the caches of the video; it is opened anew.
        row: the sample's fields.
        question: the truth about it.
        known: whether the frames are to show every hop.
        rng: decides what is searched.
        recited: tell what follows in time by what one frame after another shows.

    Returns:
        A user and an assistant message; None where the search did not give what `known` asks for, or found frames that
        mislead.
    """
    search.open(row)
    shapes = [event.shape for event in question.events]
    if not known:
        shapes.pop(int(rng.integers(len(shapes))))
        shapes.append(str(rng.choice([shape for shape in HOP_SHAPES if shape not in shapes])))
    for shape in shapes[: search.settings.max_turns - 1]:
        search.call("seek_video_frames", {"query": shape})
    content = search.reanswer()
    if content is None:
        return None
    notes = HopNotes(question.scene)
    notes.see(content)
    answer = hop_reanswer(question, content, recited)
    if (final_answer([answer]) == UNKNOWN) == known or notes.misled(question):
        return None
    return [{"role": "user", "content": content}, answer]


def hop_reanswer(question: Question, content: Sequence[Block], recited: bool = True) -> Message:
    """The right answer from frames alone: the hops, in time `recited` or not, and the colour or "I don't know"."""
    notes = HopNotes(question.scene)
    notes.see(content)
    told, found = notes.follow(question, question.hops, recited=content if recited else None)
    return trace_turn(told, answer=found if isinstance(found, str) else UNKNOWN)


def _calls(question: Question, wanted: HopEvent, notes: HopNotes, end: float) -> list[dict[str, Any]]:
    """Arguments of the searches for an event, each to be tried where the one before did not show it."""
    position = question.events.index(wanted)
    if position and question.links[position - 1] == "after":
        start, stop = window_after(notes.seen[question.events[position - 1]])
        return [{"query": "shape", "start_time": start, "end_time": stop}]
    half, third = int(end / 2), int(end / 3)
    windows = [(0, half), (half, int(end)), (0, third), (third, 2 * third), (2 * third, int(end))]
    return [
        {"query": wanted.shape},
        *({"query": wanted.shape, "start_time": start, "end_time": stop} for start, stop in windows),
    ]


def _guess(rng: np.random.Generator) -> str:
    return str(rng.choice(list(COLOURS)))
