"""Supervised examples about cached videos of the hop world, as `timesearch.pocket.lessons` makes them of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from timesearch.base.errors import RequestError
from timesearch.data.messages import Block, Message
from timesearch.data.samples import Sample
from timesearch.pocket.filesystem import parse_url
from timesearch.pocket.hop_traces import (
    HopManners,
    describe_hops,
    hop_reanswer,
    write_hop_reanswer,
    write_hop_trace,
)
from timesearch.pocket.hops import HOP_SHAPES, WINDOW, WORLD, HopEvent, HopScene, Question, make_hop_scene
from timesearch.pocket.lessons import Corpus
from timesearch.pocket.wordings import Wording, draw_wording
from timesearch.pocket.world import generator
from timesearch.training.supervised import Example


@dataclass
class HopEpisodes:
    """Search episodes with `manners`; a share of `reanswer_share` are re-answer examples instead.

    Args:
        corpus: what is asked and searched; its turns must do for three hops.
        count: examples.
        manners: how the traces behave.
        reanswer_share: in [0, 1].
        seed: decides everything.
        reworded: say the tools in words drawn anew, each time.
    """

    corpus: Corpus
    count: int
    manners: HopManners
    reanswer_share: float
    seed: int
    reworded: bool = False

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Example:
        rng = generator("hop episode", self.seed, number)
        sample, question = self._asked[int(rng.integers(len(self._asked)))]
        search, row = self.corpus.search, {"video": sample.video, "question": sample.question}
        if rng.random() < self.reanswer_share:
            pair = write_hop_reanswer(search, row, question, bool(rng.random() < 0.6), rng)
            if pair is not None:
                return Example(f"{sample.id}, re-answer {number}", pair)
        trace = write_hop_trace(search, row, question, self.manners, rng)
        wording = draw_wording(rng, self.corpus.tools) if self.reworded else Wording(self.corpus.tools)
        messages = [self.corpus.system, *wording.say(trace)]
        return Example(f"{sample.id}, episode {number}", messages, wording.tools)

    @cached_property
    def _asked(self) -> list[tuple[Sample, Question]]:
        return questions_of(self.corpus.samples)


@dataclass
class HopReading:
    """Re-answers to frames that were not searched but drawn: those of the hops of a question, others, and empty ones.

    Two further questions follow about the same frames. Each described frame is a lesson in reading, each question one
    in looking up what was read. In a share of `unknown` a hop of the question is left out.
    """

    corpus: Corpus
    count: int
    unknown: float
    seed: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Example:
        rng = generator("hop reading", self.seed, number)
        sample, question = self._asked[int(rng.integers(len(self._asked)))]
        scene, search = question.scene, self.corpus.search
        events = list(question.events)
        if rng.random() < self.unknown:
            events.pop(int(rng.integers(len(events))))
        events += [scene.events[place] for place in rng.permutation(len(scene.events))[: int(rng.integers(4))]]
        shown = sorted(set(events), key=lambda event: event.start)
        others = [scene.every_question[place] for place in rng.permutation(len(scene.every_question))]
        asked = [each for each in (question, *others) if _told_by_order(each, shown)]
        asked = [asked[0], *sorted(asked[1:], key=lambda each: not set(each.events) <= set(shown))][:3]
        search.open({"video": sample.video, "question": asked[0].text})
        frames = search.video.frames
        twice = shown if len(shown) < 2 or rng.random() < 0.7 else [*shown, shown[int(rng.integers(len(shown)))]]
        indices = {int(rng.choice(frames.window(event.start, event.end - 0.5))) for event in twice}
        empty = [index for index, seconds in enumerate(frames.timestamps) if scene.visible(seconds) is None]
        indices.update(int(index) for index in rng.choice(empty, size=int(rng.integers(0 if indices else 1, 4))))
        content = search.ask_from(search.frames(sorted(indices)))
        messages: list[Message] = [{"role": "user", "content": content}, hop_reanswer(asked[0], content)]
        for each in asked[1:]:
            messages += [{"role": "user", "content": each.text}, hop_reanswer(each, content, described=False)]
        return Example(f"{sample.id}, reading {number}", messages)

    @cached_property
    def _asked(self) -> list[tuple[Sample, Question]]:
        return questions_of(self.corpus.samples)


class HopLookup:
    """Exercises without pictures: a list of what was seen, and questions that it answers, or not, hop by hop.

    Following marks and order through what was read is a skill of its own, which whole episodes teach slowly and dearly.
    First every shape is looked up: copying what followed a word is learned from many uses of it. Then the ends of some
    windows are told: where a window that begins at a second ends is a table that has to be learned by heart.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Example:
        rng = generator("hop lookup", self._seed, number)
        scene = make_hop_scene("pretrain", int(rng.integers(10**8, 10**9)))
        questions = [scene.questions[place] for place in rng.permutation(len(scene.questions))]
        known = {event for question in questions[: int(rng.integers(1, 4))] for event in question.events}
        others = [scene.events[place] for place in rng.permutation(len(scene.events))[: int(rng.integers(4))]]
        shown = sorted(known.union(others), key=lambda event: event.start)
        content: list[Block] = [{"type": "image", "seconds": math.ceil(2 * event.start) / 2} for event in shown]
        told = describe_hops(questions[0], content)
        items = {event.shape: f"{event.shape}>{event.mark} {event.colour}" for event in shown}
        first = int(rng.integers(len(HOP_SHAPES)))
        order = [*HOP_SHAPES[first:], *HOP_SHAPES[:first]]
        every = " ".join(f"The {items.get(shape, f'{shape} nothing')}." for shape in order)
        starts = rng.integers(200 - int(WINDOW), size=6)
        windows = [f"{start}, {start + int(WINDOW)}." for start in starts]
        messages: list[Message] = [{"role": "user", "content": told}, {"role": "assistant", "content": every}]
        messages += [
            {"role": "user", "content": f"{' '.join(map(str, starts))}."},
            {"role": "assistant", "content": " ".join(windows)},
        ]
        for question in questions:
            if _told_by_order(question, shown):
                answer = hop_reanswer(question, content, described=False)
                messages += [{"role": "user", "content": question.text}, answer]
        return Example(f"lookup {number}", messages)


def _told_by_order(question: Question, shown: Sequence[HopEvent]) -> bool:
    """Whether a list of what was seen, which has no times, tells what comes next as far as the question asks."""
    pairs = zip(question.events, question.events[1:], question.links, strict=False)
    return all(link == "points" or event not in shown or after in shown for event, after, link in pairs)


def questions_of(samples: Sequence[Sample]) -> list[tuple[Sample, Question]]:
    """Each sample with the truth about its question.

    Raises:
        RequestError: a sample is none of the hop world.
    """
    found = []
    known: dict[str | None, dict[str, Question]] = {None: {}}
    for sample in samples:
        source = sample.source if is_of_hops(sample) else None
        if source not in known:
            scene = parse_url(str(source))
            known[source] = scene.by_text if isinstance(scene, HopScene) else {}
        question = known[source].get(sample.question)
        if question is None:
            raise RequestError(f"sample {sample.id!r} asks nothing that the generator of the hop world knows")
        found.append((sample, question))
    return found


def is_of_hops(sample: Sample) -> bool:
    """Whether a sample's video is one of the hop world."""
    return (sample.source or "").startswith(f"pocket://{WORLD}/")
