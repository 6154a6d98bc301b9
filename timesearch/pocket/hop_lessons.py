"""Supervised examples about cached videos of the hop world, as `timesearch.pocket.lessons` makes them of the others."""

from __future__ import annotations

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
from timesearch.pocket.hops import WORLD, HopEvent, HopScene, Question, make_hop_scene
from timesearch.pocket.lessons import Corpus
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
    """

    corpus: Corpus
    count: int
    manners: HopManners
    reanswer_share: float
    seed: int

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
        return Example(f"{sample.id}, episode {number}", [self.corpus.system, *trace], self.corpus.tools)

    @cached_property
    def _asked(self) -> list[tuple[Sample, Question]]:
        return questions_of(self.corpus.samples)


class HopLookup:
    """Exercises without pictures: a list of what was seen, and questions that it answers, or not, hop by hop.

    Following marks and order through what was read is a skill of its own, which whole episodes teach slowly and dearly.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Example:
        rng = generator("hop lookup", self._seed, number)
        scene = make_hop_scene("pretrain", int(rng.integers(10**8, 10**9)))
        questions = [scene.questions[place] for place in rng.permutation(len(scene.questions))]
        known = {event for question in questions[:3] for event in question.events}
        others = [scene.events[place] for place in rng.permutation(len(scene.events))[: int(rng.integers(4))]]
        shown = sorted(known.union(others), key=lambda event: event.start)
        content: list[Block] = [{"type": "image", "seconds": event.start} for event in shown]
        told = describe_hops(questions[0], content)
        messages: list[Message] = []
        for question in questions:
            if not _told_by_order(question, shown):
                continue
            text = question.text if messages else f"{told} {question.text}"
            messages += [{"role": "user", "content": text}, hop_reanswer(question, content, described=False)]
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
    for sample in samples:
        scene = parse_url(str(sample.source)) if is_of_hops(sample) else None
        questions = scene.questions if isinstance(scene, HopScene) else []
        question = next((each for each in questions if each.text == sample.question), None)
        if question is None:
            raise RequestError(f"sample {sample.id!r} asks nothing that the generator of the hop world knows")
        found.append((sample, question))
    return found


def is_of_hops(sample: Sample) -> bool:
    """Whether a sample's video is one of the hop world."""
    return (sample.source or "").startswith(f"pocket://{WORLD}/")
