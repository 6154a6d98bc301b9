"""Search episodes about the world of senses, written by a rule that knows the scene: what supervised training imitates.

A thought tells what was found and what follows, in the words of `timesearch.pocket.hop_traces`::

    It says star. So star?
    I see star@61.5s. So star=red

``star@61.5s`` is where to look closer or to watch, ``plate=ring`` and ``flash=red`` what is seen there. As elsewhere,
every trace runs through the real search, and traces are imperfect on purpose, in stated shares. The fault of this world
is to take a tool that shows nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from timesearch.data.messages import Block, Message, format_seconds, times_of
from timesearch.pocket.senses import MARKS, PLATE_BOX, TEXTS, TOOL_OF, Sense, SensesScene
from timesearch.pocket.traces import trace_turn
from timesearch.pocket.world import COLOURS, SHAPES, Event
from timesearch.training.supervised import UNKNOWN

if TYPE_CHECKING:
    from timesearch.search.search import Search

SPOKEN = "shape to find"
"""What is searched for in what is said."""
STRETCH = 6
"""Seconds that are watched, from the whole second on in which a shape was seen: a flash ends 4.9 s after it at most."""


@dataclass(frozen=True)
class SensesHabits:
    """Shares of the ways in which a trace behaves; they sum to 1."""

    good: float
    """takes the tool that the question needs"""
    other: float
    """takes a tool that shows nothing, once"""
    guess: float
    """answers at once"""
    give_up: float = 0.5
    """chance that the wrong tool ends in a guess"""


SENSES_CLEAN = SensesHabits(good=1.0, other=0.0, guess=0.0)
SENSES_SKILLED = SensesHabits(good=0.8, other=0.15, guess=0.05, give_up=0.2)
SENSES_BASE = SensesHabits(good=0.1, other=0.45, guess=0.45, give_up=0.8)
"""A base model that knows the tools and seldom takes the right one."""
SENSES_COLD_START = SensesHabits(good=0.4, other=0.45, guess=0.15, give_up=0.9)
"""The imperfect traces of a cold start: the wrong tool mostly ends in a guess, so that it matters which comes first."""


@dataclass(frozen=True)
class SensesQuestion:
    """A question of the world, with the truth about it."""

    scene: SensesScene
    sense: Sense

    @property
    def named(self) -> Event:
        """The event whose shape has to be found among the frames."""
        return {"said": self.scene.spoken, "small": self.scene.small, "brief": self.scene.before}[self.sense]

    @property
    def text(self) -> str:
        """What is asked."""
        return TEXTS[self.sense].format(shape=self.named.shape)

    @property
    def told(self) -> str:
        """The end of the thought that answers: a key and its value."""
        key = {"said": self.named.shape, "small": "plate", "brief": "flash"}[self.sense]
        return f"{key}={self.answer}"

    @property
    def answer(self) -> str:
        """The right answer."""
        if self.sense == "small":
            return self.scene.small.mark
        return self.scene.spoken.colour if self.sense == "said" else self.scene.flash.colour

    def answered_by(self, blocks: Sequence[Block]) -> bool:
        """Whether some blocks hold all that the answer needs."""
        pictures = [block for block in blocks if block["type"] == "image"]
        if self.sense == "small":
            return any(block.get("box") == PLATE_BOX and self._shows(block, self.scene.small) for block in pictures)
        if self.sense == "brief":
            return any(self._shows(block, self.scene.flash) for block in pictures)
        lines = [block["text"].split() for block in blocks if block["type"] == "text" and "seconds" in block]
        heard = any(self.named.shape in words for words in lines)
        return heard and any(self._shows(block, self.named) for block in pictures if "box" not in block)

    def _shows(self, block: Block, event: Event) -> bool:
        return event.start <= float(block["seconds"] or 0.0) < event.end


def seen_in(scene: SensesScene, blocks: Sequence[Block]) -> str:
    """What cached frames show, as a thought tells it: ``I see star@61.5s.``"""
    shown = ((time, scene.visible(time)) for time in times_of([block for block in blocks if "box" not in block]))
    told = (f"{event.shape}@{format_seconds(time)}" if event else "nothing" for time, event in shown)
    return f"I see {', '.join(told)}."


def write_senses_trace(
    search: Search, row: dict[str, Any], question: SensesQuestion, habits: SensesHabits, rng: np.random.Generator
) -> list[Message]:
    """One episode about a question.

    Args:
        search: over the caches of the video; it is opened anew. Without the tool that the question needs, the episode
            is a guess.
        row: the sample's fields.
        question: the truth about it.
        habits: how to behave, by chance.
        rng: decides.

    Returns:
        The messages after the system message: user, assistant, tool, ..., assistant.
    """
    search.open(row)
    messages: list[Message] = [{"role": "user", "content": search.preview()}]
    kind = str(rng.choice(["good", "other", "guess"], p=[habits.good, habits.other, habits.guess]))
    needed = TOOL_OF[question.sense]
    guess = trace_turn("I can guess.", answer=_guess(question.sense, rng))
    if kind == "guess" or needed not in search.tools:
        return [*messages, guess]
    useless = [tool for tool in TOOL_OF.values() if tool != needed and tool in search.tools]
    stray = str(rng.choice(useless)) if kind == "other" and useless else None
    shape = question.named.shape
    found: list[Block] = []
    thought, wanted = (f"So {shape}?", "seek_video_frames")
    if question.sense == "said":
        thought, wanted = ("So what?", needed)
    seen: float | None = None
    while not search.spent:
        tool, stray = (stray, None) if stray and wanted == needed else (wanted, stray)
        call = _arguments(tool, shape, seen, search.video.frames.end, rng)
        messages.append(trace_turn(thought, call, tool=tool))
        blocks = search.call(tool, call)
        messages.append({"role": "tool", "name": tool, "content": blocks})
        found += blocks
        if tool != wanted:
            if rng.random() < habits.give_up:
                return [*messages, guess]
            thought = f"It shows nothing. {_again(thought)}"
        elif question.answered_by(found):
            told = seen_in(question.scene, blocks) if question.sense == "said" else "I see it."
            return [*messages, trace_turn(f"{told} So {question.told}", answer=question.answer)]
        elif tool == "search_subtitles":
            thought, wanted = f"It says {shape}. So {shape}?", "seek_video_frames"
        elif tool == "seek_video_frames":
            times = [time for time in times_of(blocks) if question.scene.visible(time) == question.named]
            if not times:
                break
            seen, wanted = times[0], needed
            thought = f"{seen_in(question.scene, blocks)} So {shape}@{format_seconds(seen)}"
        else:
            break
    return [*messages, guess]


def _again(thought: str) -> str:
    """The end of a thought, to be thought once more."""
    return f"So {thought.rpartition('So ')[2]}"


def _arguments(tool: str, shape: str, seen: float | None, end: float, rng: np.random.Generator) -> dict[str, Any]:
    """What a tool is called with as far as is known: a wrong one is used at some time if none was seen."""
    time = float(rng.integers(int(end) - STRETCH)) if seen is None else seen
    arguments: dict[str, dict[str, Any]] = {
        "search_subtitles": {"query": SPOKEN},
        "seek_video_frames": {"query": shape, "num_frames": 1},
        "look_closer": {"time": format_seconds(time), "box": PLATE_BOX},
        "watch": {"start_time": int(time), "end_time": int(time) + STRETCH},
    }
    return arguments[tool]


def write_senses_reanswer(
    search: Search, row: dict[str, Any], question: SensesQuestion, known: bool, rng: np.random.Generator
) -> list[Message] | None:
    """One example of the re-answer task: the evidence alone, the question, and the answer or "I don't know".

    Args:
        search: over the caches of the video; it is opened anew.
        row: the sample's fields.
        question: the truth about it.
        known: whether the evidence is to hold what the answer needs.
        rng: decides what is searched beside.

    Returns:
        A user and an assistant message; None where the search did not give what `known` asks for.
    """
    trace = write_senses_trace(search, row, question, SENSES_CLEAN, rng)
    if not known:
        search.open(row)
        for message in trace[:-3]:
            if message["role"] == "tool":
                search.call("seek_video_frames", {"query": str(rng.choice(SHAPES)), "num_frames": 1})
        if not search.calls:
            search.call("seek_video_frames", {"query": question.named.shape, "num_frames": 1})
    content = search.reanswer()
    if content is None or question.answered_by(content) != known:
        return None
    answer = question.answer if known else UNKNOWN
    thought = f"So {question.told}" if known else "So what?"
    return [{"role": "user", "content": content}, trace_turn(thought, answer=answer)]


def _guess(sense: Sense, rng: np.random.Generator) -> str:
    return str(rng.choice(MARKS if sense == "small" else list(COLOURS)))
