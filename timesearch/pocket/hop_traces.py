"""Search episodes about the hop world, written by a rule that knows the scene: what supervised training imitates.

A thought tells what was seen, item by item (``star>moon green 61.5s``: the shape, its mark, its colour, its time), then
the hop that this settles, then what to seek next. A hop is told by repeating its item from the shape on, as far as it
is needed, so that reading it off is copying a run of words, the simplest thing that attention does.

As in `timesearch.pocket.traces`, every trace runs through the real search, and traces are imperfect on purpose, in
stated shares; here by the number of hops. The fault of its own kind is to stop at an earlier hop, and to answer with
the colour that is seen there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from timesearch.data.messages import Block, Message, format_seconds, times_of
from timesearch.pocket.hops import HOP_SHAPES, WINDOW, HopEvent, Question
from timesearch.pocket.traces import trace_turn
from timesearch.pocket.world import COLOURS, Event
from timesearch.training.supervised import UNKNOWN

if TYPE_CHECKING:
    from timesearch.search.search import Search


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
    1: HopHabits(good=0.8, short=0.0, astray=0.1, guess=0.1),
    2: HopHabits(good=0.45, short=0.3, astray=0.1, guess=0.15),
    3: HopHabits(good=0.25, short=0.4, astray=0.15, guess=0.2),
}
"""The imperfect traces of a cold start: the more hops, the more of them stop on the way."""


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
    stray = int(rng.integers(question.hops)) if kind == "astray" else None
    seen: list[float] = []
    told: list[str] = []
    for position, event in enumerate(question.events[: last + 1]):
        calls = _calls(question, position, seen, search.video.frames.end)
        followed = bool(position) and question.links[position - 1] == "after"
        if followed or not _shown(question, event, seen):
            told.append("I need to see what follows." if followed else f"I need to see the {event.shape}.")
        else:
            calls = []
        if stray == position and calls:
            wrong = str(rng.choice([shape for shape in HOP_SHAPES if shape != event.shape]))
            told[-1] = f"I need to see the {wrong}."
            calls.insert(0, {"query": wrong})
        for number, call in enumerate(calls):
            messages.append(trace_turn(" ".join(told), call=call))
            found = search.call("seek_video_frames", call)
            messages.append({"role": "tool", "name": "seek_video_frames", "content": found})
            seen += times_of(found)
            told = [describe_hops(question, found)]
            if _shown(question, event, seen):
                break
            told.append("Then nothing." if followed else f"The {event.shape} nothing.")
            lost = stray == position and number == 0 and rng.random() < habits.give_up
            if lost or search.spent or number == len(calls) - 1:
                return [*messages, trace_turn(f"{' '.join(told)} I can guess.", answer=_guess(rng))]
        told.append(_hop(question, position, seen, last))
    return [*messages, trace_turn(" ".join(told), answer=question.events[last].colour)]


def write_hop_reanswer(
    search: Search, row: dict[str, Any], question: Question, known: bool, rng: np.random.Generator
) -> list[Message] | None:
    """One example of the re-answer task: searched frames alone, the question, and the answer or "I don't know".

    Args:
        search: over the caches of the video; it is opened anew.
        row: the sample's fields.
        question: the truth about it.
        known: whether the frames are to show every hop.
        rng: decides what is searched.

    Returns:
        A user and an assistant message; None where the search did not give what `known` asks for.
    """
    search.open(row)
    shapes = [event.shape for event in question.events]
    if not known:
        shapes.pop(int(rng.integers(len(shapes))))
        shapes.append(str(rng.choice([shape for shape in HOP_SHAPES if shape not in shapes])))
    for shape in shapes[: search.settings.max_turns - 1]:
        search.call("seek_video_frames", {"query": shape})
    content = search.reanswer()
    if content is None or all(_shown(question, event, times_of(content)) for event in question.events) != known:
        return None
    return [{"role": "user", "content": content}, hop_reanswer(question, content)]


def hop_reanswer(question: Question, content: Sequence[Block], described: bool = True) -> Message:
    """The right answer from frames alone: what each shows, hop by hop, and the colour or "I don't know".

    What follows an event is told by going on with its item to the next one: ``The star>moon green, fish>ring red.``
    """
    told = [describe_hops(question, content)] if described else []
    shown = [(question.scene.visible(seconds), seconds) for seconds in times_of(content)]
    items = [event for event, _ in shown]
    events = list(question.events)
    while events:
        event = events.pop(0)
        link = question.links[question.hops - len(events) - 1] if events else None
        if event not in items:
            told.append(f"The {event.shape} nothing.")
            return trace_turn(" ".join(told), answer=UNKNOWN)
        place = items.index(event)
        if link == "points":
            told.append(f"The {event.shape}>{event.mark}.")
        elif link == "after":
            if events[0] not in items[place:]:
                told.append(f"The {_told(*shown[place])}, nothing.")
                return trace_turn(" ".join(told), answer=UNKNOWN)
            end = items.index(events[0]) + 1
            told.append(f"The {', '.join(_told(*each) for each in shown[place:end])}.")
            events.pop(0)
        else:
            told.append(f"The {_item(event)}.")
    return trace_turn(" ".join(told), answer=question.answer)


def describe_hops(question: Question, blocks: Sequence[Block]) -> str:
    """What the shown frames hold, in their order: ``I see star>moon green 61.5s, nothing 80.0s.``"""
    return f"I see {', '.join(_told(question.scene.visible(seconds), seconds) for seconds in times_of(blocks))}."


def _told(event: Event | None, seconds: float) -> str:
    return f"{_item(event) if isinstance(event, HopEvent) else 'nothing'} {format_seconds(seconds)}"


def _item(event: HopEvent) -> str:
    return f"{event.shape}>{event.mark} {event.colour}"


def _hop(question: Question, position: int, seen: Sequence[float], last: int) -> str:
    """What a hop settles: the next shape, the time to look after, or the colour."""
    event = question.events[position]
    start = "Then" if position and question.links[position - 1] == "after" else "The"
    if position == last:
        return f"{start} {_item(event)}."
    if question.links[position] == "points":
        return f"{start} {event.shape}>{event.mark}."
    return f"{start} {_told(event, _first_seen(question, event, seen))}."


def _calls(question: Question, position: int, seen: Sequence[float], end: float) -> list[dict[str, Any]]:
    """Arguments of the searches for a hop, each to be tried where the one before did not show it."""
    event = question.events[position]
    if position and question.links[position - 1] == "after":
        start = int(_first_seen(question, question.events[position - 1], seen))
        return [
            {"query": "shape", "start_time": begin, "end_time": start + int(WINDOW)} for begin in (start, start + 4)
        ]
    half, third = int(end / 2), int(end / 3)
    windows = [(0, half), (half, int(end)), (0, third), (third, 2 * third), (2 * third, int(end))]
    return [
        {"query": event.shape},
        *({"query": event.shape, "start_time": start, "end_time": stop} for start, stop in windows),
    ]


def _shown(question: Question, event: HopEvent, seen: Sequence[float]) -> bool:
    return any(question.scene.visible(seconds) == event for seconds in seen)


def _first_seen(question: Question, event: HopEvent, seen: Sequence[float]) -> float:
    return min(seconds for seconds in seen if question.scene.visible(seconds) == event)


def _guess(rng: np.random.Generator) -> str:
    return str(rng.choice(list(COLOURS)))
