"""Supervised examples about cached videos of the hop world, as `timesearch.pocket.lessons` makes them of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from timesearch.base.errors import RequestError
from timesearch.data.samples import Sample
from timesearch.pocket.filesystem import parse_url
from timesearch.pocket.hop_traces import HopManners, write_hop_reanswer, write_hop_trace
from timesearch.pocket.hops import WORLD, HopScene, Question
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
