"""Search episodes about pocket videos, written by a rule that knows the scene: what supervised training imitates.

Every trace runs through the real search, so its frames are what the policy would have been shown. Traces
are imperfect on purpose, in stated shares: only some search well, others narrow the window to the wrong place, look for
the wrong thing, or guess. A policy that imitates them has the skills and bad habits besides, which is what
reinforcement learning can then mend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from timesearch.data.messages import Block, Message, parse_turn, text_of, times_of
from timesearch.dialects.qwen import write_turn
from timesearch.pocket.world import COLOURS, SHAPES, Event, Scene, answer_prior
from timesearch.training.supervised import UNKNOWN

if TYPE_CHECKING:
    from timesearch.search.search import Search


@dataclass(frozen=True)
class Habits:
    """Shares of the ways in which a trace behaves; they sum to 1."""

    good: float
    """searches the asked shape in the whole video, again within windows until it is seen"""
    narrow: float
    """searches the asked shape in a window of 10 to 30 s that misses it"""
    wrong: float
    """searches another shape"""
    guess: float
    """answers at once, by the prior of the world"""
    give_up: float = 0.5
    """chance that a narrow or wrong search that did not show the shape ends in a guess instead of a good search"""
    misread: float = 0.0
    """chance that the colour of a shape that was found is told wrong"""
    halves: bool = False
    """searches both halves of the video by two calls of one turn, where else it searches the whole"""


Manners = dict[str, Habits]
"""Habits by the shape that is asked about."""

CLEAN: Manners = dict.fromkeys(SHAPES, Habits(good=0.9, narrow=0.0, wrong=0.0, guess=0.1))
SKILLED: Manners = dict.fromkeys(SHAPES, Habits(good=0.7, narrow=0.1, wrong=0.1, guess=0.1))
"""What pretraining learns to search from."""
BASE: Manners = dict.fromkeys(SHAPES, Habits(good=0.08, narrow=0.12, wrong=0.25, guess=0.55, give_up=0.8))
"""A base model that can read, call the tool and answer, but seldom searches well."""
WEAK_SHAPES = SHAPES[4:]
COLD_START: Manners = {
    **dict.fromkeys(SHAPES[:4], Habits(good=0.80, narrow=0.06, wrong=0.06, guess=0.08)),
    **dict.fromkeys(WEAK_SHAPES, Habits(good=0.20, narrow=0.10, wrong=0.15, guess=0.55)),
}
"""The imperfect traces of the demo's cold start: on half of the shapes the one who wrote them mostly guessed. A policy
that imitates them has something to learn under greedy decoding too, not in its samples alone."""
GUESSING: Manners = dict.fromkeys(
    SHAPES, Habits(good=0.42, narrow=0.08, wrong=0.10, guess=0.40, give_up=0.8, misread=0.4)
)
"""Traces of one who knows that the commonest answer is mostly right and reads poorly: looking pays less than guessing
for as long as reading has not been learned."""
COLD_STARTS: dict[str, Manners] = {"guess-proof": COLD_START, "demo": COLD_START, "guessable": GUESSING}
"""Manners of each world's cold start."""


def write_trace(
    search: Search,
    row: dict[str, Any],
    scene: Scene,
    target: Event,
    manners: Manners,
    rng: np.random.Generator,
    max_turns: int,
) -> list[Message]:
    """One episode about `target`.

    Args:
        search: over the caches of the video; it is opened anew.
        row: the sample's fields.
        scene: the truth about the video.
        target: the event that is asked about.
        manners: how to behave, by chance.
        rng: decides.
        max_turns: assistant turns at most; the last answers.

    Returns:
        The messages after the system message: user, assistant, tool, ..., assistant.
    """
    search.open(row)
    messages: list[Message] = [{"role": "user", "content": search.preview()}]
    habits = manners[target.shape]
    kinds = ["good", "narrow", "wrong", "guess"]
    kind = str(rng.choice(kinds, p=[habits.good, habits.narrow, habits.wrong, habits.guess]))
    if kind == "guess":
        return [*messages, trace_turn("I can guess.", answer=draw_guess(scene.world, rng))]
    end = scene.duration
    searches = _searches(target, end, habits)
    if kind == "wrong":
        other = str(rng.choice([shape for shape in SHAPES if shape != target.shape]))
        first = trace_turn(f"I need to see the {other}.", {"query": other})
    elif kind == "narrow":
        window = _window_without(target, end, rng)
        first = trace_turn(f"I need to see the {target.shape}.", {"query": target.shape, **window})
    else:
        first = trace_turn(f"I need to see the {target.shape}.", *searches[0])
    tried = 1 if kind == "good" else 0
    turn = first
    for remaining in range(max_turns - 1, -1, -1):
        messages.append(turn)
        calls = parse_turn(text_of(turn)).calls
        if not calls:
            break
        found: list[Block] = []
        for call in calls:
            blocks = search.call(call.name, call.arguments)
            messages.append({"role": "tool", "name": call.name, "content": blocks})
            found += blocks
        seen = describe(scene, found)
        if sees(scene, target, found):
            colour = target.colour
            if rng.random() < habits.misread:
                colour = str(rng.choice([other for other in COLOURS if other != target.colour]))
            turn = trace_turn(f"{seen} The {target.shape} {colour}.", answer=colour)
        elif remaining <= 1 or (kind != "good" and rng.random() < habits.give_up) or tried == len(searches):
            turn = trace_turn(f"{seen} The {target.shape} nothing. I can guess.", answer=draw_guess(scene.world, rng))
        else:
            turn = trace_turn(f"{seen} The {target.shape} nothing.", *searches[tried])
            tried += 1
    return messages


def write_reanswer(
    search: Search,
    row: dict[str, Any],
    scene: Scene,
    target: Event,
    known: bool,
    rng: np.random.Generator,
) -> list[Message] | None:
    """One example of the re-answer task: searched frames alone, the question, and the answer or "I don't know".

    Args:
        search: over the caches of the video; it is opened anew.
        row: the sample's fields.
        scene: the truth about the video.
        target: the event that is asked about.
        known: whether the frames are to show it.
        rng: decides what is searched.

    Returns:
        A user and an assistant message; None where the search did not give what `known` asks for.
    """
    search.open(row)
    shown: list[Block] = []
    for _ in range(int(rng.integers(1, 4))):
        other = str(rng.choice([shape for shape in SHAPES if shape != target.shape]))
        middle = float(rng.uniform(0, scene.duration))
        near: dict[str, Any] = {"start_time": max(0.0, middle - 20), "end_time": min(scene.duration, middle + 20)}
        shown += search.call("seek_video_frames", {"query": other, **(near if rng.random() < 0.5 else {})})
    if known:
        shown += search.call("seek_video_frames", {"query": target.shape})
    content = search.reanswer()
    if content is None or sees(scene, target, shown) != known:
        return None
    return [{"role": "user", "content": content}, reanswer(scene, target.shape, content)]


def reanswer(scene: Scene, shape: str, content: list[Block], described: bool = True) -> Message:
    """The right answer from frames alone: what each shows, and the shape's colour or "I don't know"."""
    colours = {event.shape: event.colour for event in map(scene.visible, times_of(content)) if event is not None}
    found = f"The {shape} {colours.get(shape, 'nothing')}."
    thought = f"{describe(scene, content)} {found}" if described else found
    return trace_turn(thought, answer=colours.get(shape, UNKNOWN))


def describe(scene: Scene, blocks: list[Block]) -> str:
    """What the shown frames hold, in order, as a trace's thought tells it: ``I see star blue, nothing.``

    The colour comes after the shape, here and in the conclusion: what follows a shape's word is then always a look-up
    of that word, the simplest thing that attention does.
    """
    events = map(scene.visible, times_of(blocks))
    return f"I see {', '.join(f'{event.shape} {event.colour}' if event else 'nothing' for event in events)}."


def draw_guess(world: str, rng: np.random.Generator) -> str:
    """A colour drawn from the world's prior: a guess as good as one can be made without looking."""
    prior = answer_prior(world)
    return str(rng.choice(list(prior), p=list(prior.values())))


def sees(scene: Scene, target: Event, blocks: list[Block]) -> bool:
    """Whether one of the shown frames lies within the target's time."""
    return any(scene.visible(seconds) == target for seconds in times_of(blocks))


def trace_turn(
    thought: str, *calls: dict[str, Any], answer: str | None = None, tool: str = "seek_video_frames"
) -> Message:
    """An assistant turn that answers, or calls a tool, once with each of these arguments."""
    written = write_turn(thought, *({"name": tool, "arguments": call} for call in calls), answer=answer)
    return {"role": "assistant", "content": written}


def _searches(target: Event, end: float, habits: Habits) -> list[list[dict[str, Any]]]:
    """Calls of the turns that look for an event, each after the one before did not show it: the whole video, its
    halves, its thirds; the halves at once instead of the first three where these are the habits."""
    windows = [(0.0, end / 2), (end / 2, end), (0.0, end / 3), (end / 3, 2 * end / 3), (2 * end / 3, end)]
    query = {"query": target.shape}
    within = [{**query, "start_time": int(start), "end_time": int(stop)} for start, stop in windows]
    first = [within[:2]] if habits.halves else [[query], within[:1], within[1:2]]
    return [*first, *([call] for call in within[2:])]


def _window_without(target: Event, end: float, rng: np.random.Generator) -> dict[str, int]:
    while True:
        start = int(rng.integers(0, int(end) - 10))
        stop = min(int(end), start + int(rng.integers(10, 31)))
        if stop <= target.start or start >= target.end:
            return {"start_time": start, "end_time": stop}
