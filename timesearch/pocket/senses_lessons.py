"""Supervised examples about videos of the world of senses, as `timesearch.pocket.lessons` makes them of others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from timesearch.base.errors import RequestError
from timesearch.data.messages import Block, format_seconds
from timesearch.data.samples import Sample
from timesearch.pocket.filesystem import parse_url
from timesearch.pocket.hop_traces import told_of
from timesearch.pocket.lessons import Corpus, dialogue
from timesearch.pocket.senses import FLASH, PLATE_BOX, TOOL_OF, WORLD, Marked, SensesScene
from timesearch.pocket.senses_traces import (
    STRETCH,
    SensesHabits,
    SensesQuestion,
    write_senses_reanswer,
    write_senses_trace,
)
from timesearch.pocket.world import SHAPES, generator
from timesearch.training.supervised import Example
from timesearch.video.glimpses import WHOLE

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from timesearch.search.search import Search


@dataclass
class _SensesLessons:
    """So many lessons of questions about a corpus, decided by a seed."""

    corpus: Corpus
    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    @cached_property
    def _asked(self) -> list[tuple[Sample, SensesQuestion]]:
        return [(sample, question_of(sample)) for sample in self.corpus.samples]

    def _draw(self, rng: np.random.Generator) -> tuple[Sample, SensesQuestion, dict[str, Any]]:
        sample, question = self._asked[int(rng.integers(len(self._asked)))]
        return sample, question, {"video": sample.video, "question": sample.question}


@dataclass
class SensesEpisodes(_SensesLessons):
    """Search episodes with `habits`; a share of `reanswer_share` are re-answer examples, of `withheld` ones in which a
    tool is not offered."""

    habits: SensesHabits
    reanswer_share: float = 0.0
    withheld: float = 0.0

    def __getitem__(self, number: int) -> Example:
        rng = generator("senses episode", self.seed, number)
        sample, question, row = self._draw(rng)
        if rng.random() < self.reanswer_share:
            pair = write_senses_reanswer(self.corpus.search, row, question, bool(rng.random() < 0.6), rng)
            if pair is not None:
                return Example(f"{sample.id}, re-answer {number}", pair)
        search = self.corpus.search
        if rng.random() < self.withheld:
            search = self.corpus.without(str(rng.choice(list(TOOL_OF.values()))))
        trace = write_senses_trace(search, row, question, self.habits, rng)
        return Example(f"{sample.id}, episode {number}", [self.corpus.system, *trace], search.schemas)


@dataclass
class SensesLookup(_SensesLessons):
    """Exercises: cached frames, a plate or a flash among them or not, and what they tell of some keys."""

    def __getitem__(self, number: int) -> Example:
        rng = generator("senses lookup", self.seed, number)
        sample, question, row = self._draw(rng)
        scene, search = question.scene, self.corpus.search
        search.open(row)
        places = rng.permutation(len(scene.events))[: int(rng.integers(1, 5))]
        events = [scene.events[int(place)] for place in sorted(places)]
        content, values = self._frames(events, search, rng)
        extra = rng.random()
        if extra < 0.4:
            marked = scene.events[int(rng.integers(len(scene.events)))]
            content += _plate(marked, search, rng)
            values["plate="] = marked.mark
        elif extra < 0.8:
            content += _flash(scene, search, rng)
            values["flash="] = scene.flash.colour
        said = []
        for _ in range(10):
            key = f"{rng.choice(SHAPES)}=" if rng.random() < 0.2 else str(rng.choice(list(values)))
            said.append((f"From {key}", f"So {told_of(values, key[:-1], key[-1])}"))
        times = [int(each) / 2 for each in rng.integers(200, size=4)]
        windows = " ".join(f"{int(time)}, {int(time) + STRETCH}." for time in times)
        said.append((" ".join(map(format_seconds, times)), windows))
        return Example(f"{sample.id}, lookup {number}", dialogue(content, said))

    def _frames(
        self, events: list[Marked], search: Search, rng: np.random.Generator
    ) -> tuple[list[Block], dict[str, str]]:
        frames = search.video.frames
        values: dict[str, str] = {}
        indices = []
        for event in events:
            index = int(rng.choice(frames.window(event.start, event.end - 0.5)))
            indices.append(index)
            values[f"{event.shape}="] = event.colour
        return search.show(search.frames(indices)), values


def _plate(event: Marked, search: Search, rng: np.random.Generator) -> list[Block]:
    time = event.start + float(rng.integers(int(2 * (event.end - event.start)))) / 2
    return search.call("look_closer", {"time": time, "box": PLATE_BOX})[:-1]


def _flash(scene: SensesScene, search: Search, rng: np.random.Generator) -> list[Block]:
    start = scene.flash.start + FLASH - 0.1 - float(rng.integers(1, STRETCH))
    stretch = {"start_time": max(0.0, start), "end_time": scene.flash.start + FLASH - 0.1 + float(rng.integers(0, 2))}
    return search.call("watch", stretch)[:-1]


def readings_of(scene: SensesScene, search: Search, rng: np.random.Generator) -> list[tuple[Image, str, str]]:
    """A picture of each kind from each event of an opened video: of the cache, and of the source where one looks closer
    or watches.

    Returns:
        Pictures with the key and the value that they tell.
    """
    found: list[tuple[Image, str, str]] = []
    frames = search.video.frames
    for event in scene.events:
        index = int(rng.choice(frames.window(event.start, event.end - 0.5)))
        found.append((frames[index], f"{event.shape}=", event.colour))
    marked = scene.events[int(rng.integers(len(scene.events)))]
    plate = _plate(marked, search, rng)
    flash = search.call("look_closer", {"time": scene.flash.start + FLASH / 2, "box": list(WHOLE)})
    for blocks, key, value in ((plate, "plate=", marked.mark), (flash, "flash=", scene.flash.colour)):
        found += [(block["image"], key, value) for block in blocks if block["type"] == "image"]
    return found


def question_of(sample: Sample) -> SensesQuestion:
    """The truth about a sample.

    Raises:
        RequestError: it is none of the world.
    """
    scene = parse_url(str(sample.source)) if is_of_senses(sample) else None
    if not isinstance(scene, SensesScene) or sample.meta.get("sense") not in TOOL_OF:
        raise RequestError(f"sample {sample.id!r} asks nothing that the generator of the world of senses knows")
    return SensesQuestion(scene, sample.meta["sense"])


def is_of_senses(sample: Sample) -> bool:
    """Whether a sample's video is one of the world of senses."""
    return (sample.source or "").startswith(f"pocket://{WORLD}/")
