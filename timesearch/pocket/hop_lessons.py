"""Supervised examples about cached videos of the hop world, as `timesearch.pocket.lessons` makes them of the others."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from timesearch.base.errors import RequestError
from timesearch.data.messages import Block, Message, format_seconds
from timesearch.data.samples import Sample
from timesearch.pocket.filesystem import parse_url
from timesearch.pocket.hop_traces import (
    COLOUR_OF,
    RELATION_OF,
    HopManners,
    HopNotes,
    hop_reanswer,
    told_of,
    write_hop_reanswer,
    write_hop_trace,
)
from timesearch.pocket.hops import HOP_SHAPES, HopScene, Question, is_from_hops, window_after
from timesearch.pocket.lessons import Corpus, dialogue
from timesearch.pocket.wordings import Wording, draw_wording
from timesearch.pocket.world import Event, generator
from timesearch.training.supervised import Example

if TYPE_CHECKING:
    import numpy as np

    from timesearch.search.search import Search

_LATEST = 150
"""Seconds; no video of the world is longer by much."""
_LATER = 36
"""Hundreds of seconds by which times are later at most, in an hour."""
_ASKED = 12
"""Hops an exercise"""


@dataclass
class _HopLessons:
    """So many lessons of questions about a corpus."""

    corpus: Corpus
    count: int

    def __len__(self) -> int:
        return self.count

    @cached_property
    def _asked(self) -> list[tuple[Sample, Question]]:
        return questions_of(self.corpus.samples)


@dataclass
class HopEpisodes(_HopLessons):
    """Search episodes with `manners`; a share of `reanswer_share` are re-answer examples instead.

    Args:
        corpus: what is asked and searched; its turns must do for three hops.
        count: examples.
        manners: how the traces behave.
        reanswer_share: in [0, 1].
        seed: decides everything.
        recited: whether re-answers tell what follows in time by what one frame after another shows.
        reworded: say the tools in words drawn anew, each time.
        later: share whose times are later by hundreds of seconds, as in a long video.
    """

    manners: HopManners
    reanswer_share: float
    seed: int
    reworded: bool = False
    recited: bool = True
    later: float = 0.0

    def __getitem__(self, number: int) -> Example:
        rng = generator("hop episode", self.seed, number)
        sample, question = self._asked[int(rng.integers(len(self._asked)))]
        search, row = self.corpus.search, {"video": sample.video, "question": sample.question}
        if rng.random() < self.reanswer_share:
            pair = write_hop_reanswer(search, row, question, bool(rng.random() < 0.6), rng, self.recited)
            if pair is not None:
                return Example(f"{sample.id}, re-answer {number}", self._later(pair, rng))
        trace = self._later(write_hop_trace(search, row, question, self.manners, rng), rng)
        wording = draw_wording(rng, self.corpus.tools) if self.reworded else Wording(self.corpus.tools)
        messages = [self.corpus.system, *wording.say(trace)]
        return Example(f"{sample.id}, episode {number}", messages, wording.tools)

    def _later(self, messages: Sequence[Message], rng: np.random.Generator) -> list[Message]:
        if rng.random() >= self.later:
            return list(messages)
        seconds = 100 * int(rng.integers(1, _LATER + 1))
        return [{**message, "content": _shifted(message["content"], seconds)} for message in messages]


@dataclass
class HopReading(_HopLessons):
    """Re-answers to frames that were not searched but drawn: those of the hops of a question, others, and empty ones.

    Further questions follow about the same frames, each a lesson in looking up what they show. In a share of `unknown`
    a hop of the first question is left out, and a share of `alone` shows no other events. Answers are `recited` or not.
    Where they are `in_time`, all questions have a hop in time, and the other events follow one another.
    """

    unknown: float
    alone: float
    seed: int
    recited: bool = True
    in_time: bool = False
    asked: int = 6
    """questions an example"""

    @cached_property
    def _asked(self) -> list[tuple[Sample, Question]]:
        return [(sample, question) for sample, question in super()._asked if self._fits(question)]

    def _fits(self, question: Question) -> bool:
        return "after" in question.links or not self.in_time

    def __getitem__(self, number: int) -> Example:
        rng = generator("hop reading", self.seed, number)
        sample, question = self._asked[int(rng.integers(len(self._asked)))]
        search = self.corpus.search
        search.open({"video": sample.video, "question": question.text})
        content, notes = self._shown(question, search, rng)
        others = [question.scene.every_question[place] for place in rng.permutation(len(question.scene.every_question))]
        others = [each for each in others if self._fits(each) and not notes.misled(each)]
        known = [each for each in others if set(each.events) <= notes.seen.keys()]
        if self.in_time:
            known = [each for each in known if each != question]
            others = [each for each in others if each not in (question, *known)][:1]
        asked = [question, *known[: self.asked - 2], *others][: self.asked]
        messages: list[Message] = [{"role": "user", "content": content}]
        messages.append(hop_reanswer(question, content, self.recited))
        for each in asked[1:]:
            messages += [{"role": "user", "content": each.text}, hop_reanswer(each, content, self.recited)]
        return Example(f"{sample.id}, reading {number}", messages)

    def _shown(self, question: Question, search: Search, rng: np.random.Generator) -> tuple[list[Block], HopNotes]:
        """Frames to read that do not mislead about the question, and what they show."""
        scene = question.scene
        while True:
            events = list(question.events)
            if rng.random() < self.unknown:
                events.pop(int(rng.integers(len(events))))
            more = 0 if rng.random() < self.alone else int(rng.integers(1, 4))
            if self.in_time:
                first = int(rng.integers(len(scene.events)))
                events += scene.events[first : first + more]
            else:
                events += [scene.events[place] for place in rng.permutation(len(scene.events))[:more]]
            content, notes = search.ask_from(search.frames(_frames_of(events, search, scene, rng))), HopNotes(scene)
            notes.see(content)
            if not notes.misled(question):
                return content, notes


@dataclass
class HopLookup(_HopLessons):
    """Exercises: frames, single hops that they tell of or do not, then the windows to search after some times.

    Looking a key up in frames is a skill of its own, which whole episodes teach slowly and dearly: here it is used a
    dozen times, a third of them for what follows in time, which is the hardest. Where a window begins and ends is a
    table.
    """

    seed: int

    def __getitem__(self, number: int) -> Example:
        rng = generator("hop lookup", self.seed, number)
        sample, question = self._asked[int(rng.integers(len(self._asked)))]
        scene, search = question.scene, self.corpus.search
        first = int(rng.integers(len(scene.events)))
        events = {*scene.events[first : first + int(rng.integers(1, 5))]}
        events |= {scene.events[place] for place in rng.permutation(len(scene.events))[: int(rng.integers(6))]}
        search.open({"video": sample.video, "question": question.text})
        content = search.show(search.frames(_frames_of(events, search, scene, rng)))
        notes = HopNotes(scene)
        notes.see(content)
        relations = (RELATION_OF["points"], COLOUR_OF, RELATION_OF["after"])
        absent = [shape for shape in HOP_SHAPES if shape not in {event.shape for event in notes.seen}]
        said = []
        for _ in range(_ASKED):
            relation = str(rng.choice(relations, p=[0.4, 0.25, 0.35]))
            known = [
                event.shape for event in notes.seen if relation != RELATION_OF["after"] or not notes.misleads(event)
            ]
            shape = str(rng.choice(known if known and rng.random() < 0.85 else absent))
            said.append((f"From {shape}{relation}", f"So {told_of(notes.values, shape, relation)}"))
        times = _times(rng, 4)
        windows = " ".join("{}, {}.".format(*window_after(time)) for time in times)
        said.append((" ".join(map(format_seconds, times)), windows))
        return Example(f"{sample.id}, lookup {number}", dialogue(content, said))


@dataclass
class HopWindows:
    """Exercises without pictures: the window to search after a time, as a call has it, a dozen times."""

    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Example:
        rng = generator("hop windows", self.seed, number)
        messages: list[Message] = []
        for time in _times(rng, _ASKED):
            start, stop = window_after(time)
            messages.append({"role": "user", "content": format_seconds(time)})
            messages.append({"role": "assistant", "content": f'"start_time": {start}, "end_time": {stop}'})
        return Example(f"windows {number}", messages)


def _times(rng: np.random.Generator, count: int) -> list[float]:
    """So many half seconds, half of them of this world's videos and half of an hour."""
    latest = (2 * _LATEST, 200 * _LATER)
    return [int(rng.integers(latest[int(rng.integers(2))])) / 2 for _ in range(count)]


_TIME = re.compile(r"(?<![\d.])\d+(?=\.\ds)|(?<=_time\": )\d+")
"""Whole seconds of a time in text, or of one in a call."""


def _shifted(content: str | list[Block], seconds: int) -> Any:
    """A message's text with all times so much later."""
    if isinstance(content, str):
        return _TIME.sub(lambda found: str(int(found[0]) + seconds), content)
    return [{**block, "text": _shifted(block["text"], seconds)} if "text" in block else block for block in content]


def _frames_of(events: Collection[Event], search: Search, scene: HopScene, rng: np.random.Generator) -> list[int]:
    """Indices of a frame of each event, at times of two of one, and of some that show nothing, in order."""
    frames = search.video.frames
    twice = sorted(events, key=lambda event: event.start)
    if twice and rng.random() < 0.3:
        twice.append(twice[int(rng.integers(len(twice)))])
    indices = {int(rng.choice(frames.window(event.start, event.end - 0.5))) for event in twice}
    empty = [index for index, seconds in enumerate(frames.timestamps) if scene.visible(seconds) is None]
    indices.update(int(index) for index in rng.choice(empty, size=int(rng.integers(0 if indices else 1, 4))))
    return sorted(indices)


def questions_of(samples: Sequence[Sample]) -> list[tuple[Sample, Question]]:
    """Each sample with the truth about its question.

    Raises:
        RequestError: a sample is none of the hop world.
    """
    found = []
    for sample in samples:
        question = _by_text(str(sample.source)).get(sample.question) if is_of_hops(sample) else None
        if question is None:
            raise RequestError(f"sample {sample.id!r} asks nothing that the generator of the hop world knows")
        found.append((sample, question))
    return found


@cache
def _by_text(source: str) -> dict[str, Question]:
    scene = parse_url(source)
    return scene.by_text if isinstance(scene, HopScene) else {}


def is_of_hops(sample: Sample) -> bool:
    """Whether a sample's video is one of the hop world."""
    return is_from_hops(sample.source)
