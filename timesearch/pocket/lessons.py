"""Supervised examples about cached pocket videos, made one by one as training asks for them.

Both datasets are maps from a number to an example, decided by a seed: any process makes the same one, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from timesearch.base.errors import RequestError
from timesearch.base.files import inside
from timesearch.data.messages import Block, Message
from timesearch.data.samples import Sample
from timesearch.pocket.filesystem import parse_url
from timesearch.pocket.traces import Manners, reanswer, write_reanswer, write_trace
from timesearch.pocket.world import COLOURS, SHAPES, Event, Scene, generator, question
from timesearch.search.protocol import SearchProtocol
from timesearch.search.search import Search
from timesearch.settings import SearchSettings
from timesearch.training.supervised import Example

if TYPE_CHECKING:
    from timesearch.retrieval.encoder import Encoder


@dataclass(frozen=True)
class Asked:
    """A question about a pocket video, with the truth beside it."""

    sample: Sample
    scene: Scene
    event: Event

    @property
    def row(self) -> dict[str, Any]:
        """What `Search.open` takes."""
        return {"video": self.sample.video, "question": self.sample.question}


@dataclass
class Corpus:
    """Pocket samples whose videos are cached, and the search over them; `subtitles` and `videos` for tools that look
    there."""

    samples: Sequence[Sample]
    settings: SearchSettings
    encoder: Encoder
    frames: Path
    features: Path
    subtitles: Path | None = None
    videos: Path | None = None

    @cached_property
    def search(self) -> Search:
        """A search over the corpus's caches, made where it is first used, so that each data process has its own."""
        return self._search(self.settings)

    def without(self, tool: str) -> Search:
        """A search that does not offer a tool."""
        if tool not in self._lesser:
            tools = [name for name in self.settings.tools if name != tool]
            self._lesser[tool] = self._search(self.settings.model_copy(update={"tools": tools}))
        return self._lesser[tool]

    @cached_property
    def _lesser(self) -> dict[str, Search]:
        return {}

    def _search(self, settings: SearchSettings) -> Search:
        return Search(
            settings,
            self.encoder,
            self.frames,
            self.features,
            subtitles=self.subtitles,
            source_of=partial(inside, self.videos) if self.videos is not None else lambda name: None,
        )

    @cached_property
    def asked(self) -> list[Asked]:
        """The questions with the truth about them.

        Raises:
            RequestError: a sample is not one of the generator's.
        """
        return [_ask(sample) for sample in self.samples]

    @cached_property
    def system(self) -> Message:
        """The system message."""
        return {"role": "system", "content": SearchProtocol.load(self.settings.prompts).texts["system"]}

    @cached_property
    def tools(self) -> list[dict[str, Any]]:
        """Schemas of the tools."""
        return self.search.schemas


def _ask(sample: Sample) -> Asked:
    if not (sample.source or "").startswith("pocket://"):
        raise RequestError(f"sample {sample.id!r} has no pocket:// source: pocket traces are about generated videos")
    scene = parse_url(str(sample.source))
    for event in scene.needles:
        if question(event.shape) == sample.question:
            return Asked(sample, scene, event)
    raise RequestError(f"sample {sample.id!r} asks nothing that the generator knows about {sample.source}")


class Reading:
    """Re-answer examples on frames drawn at random, 1 to `most`; a share of `unknown` asks for what is not shown.

    Most of the frames show shapes, and two further questions follow about the same frames: each described frame is a
    lesson in reading, each further question one in looking up what was read.
    """

    def __init__(self, corpus: Corpus, count: int, most: int, unknown: float, seed: int) -> None:
        self._corpus, self._count, self._most, self._unknown, self._seed = corpus, count, most, unknown, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Example:
        rng = generator("reading", self._seed, number)
        asked = self._corpus.asked[int(rng.integers(len(self._corpus.asked)))]
        search = self._corpus.search
        search.open(asked.row)
        visible = [asked.scene.visible(seconds) for seconds in search.video.frames.timestamps]
        full = [i for i, event in enumerate(visible) if event is not None]
        empty = [i for i, event in enumerate(visible) if event is None]
        count = int(rng.integers(1, self._most + 1))
        shapes = max(1, int(rng.binomial(count, 0.75)))
        picked = [*rng.choice(full, size=shapes, replace=False), *rng.choice(empty, size=count - shapes, replace=False)]
        indices = sorted(int(index) for index in picked)
        shown = sorted({event.shape for event in (visible[index] for index in indices) if event is not None})
        absent = [shape for shape in SHAPES if shape not in shown]
        messages: list[Message] = []
        content: list[Block] = []
        for turn in range(3):
            shape = str(rng.choice(absent if rng.random() < self._unknown else shown))
            search.question = question(shape)
            content = content or search.ask_from(search.frames(indices))
            asking = search.ask_from([]) if turn else content
            answer = reanswer(asked.scene, shape, content, described=turn == 0)
            messages += [{"role": "user", "content": asking}, answer]
        return Example(f"{asked.sample.id}, reading {number}", messages)


class Lookup:
    """Exercises without pictures: a list of what was seen, and the colour of every shape by it.

    Looking up what was read is a skill of its own, which whole episodes teach slowly: one use of it in 150 tokens.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Example:
        rng = generator("lookup", self._seed, number)
        seen = [str(shape) for shape in rng.permutation(SHAPES)[: int(rng.integers(1, 7))]]
        colours = {shape: str(rng.choice(list(COLOURS))) for shape in seen}
        items = [f"{shape} {colours[shape]}" for shape in seen] + ["nothing"] * int(rng.integers(0, 3))
        first = int(rng.integers(len(SHAPES)))
        order = [*SHAPES[first:], *SHAPES[:first]]
        told = f"I see {', '.join(rng.permutation(items))}."
        thought = " ".join(f"The {shape} {colours.get(shape, 'nothing')}." for shape in order)
        messages: list[Message] = [{"role": "user", "content": told}, {"role": "assistant", "content": thought}]
        return Example(f"lookup {number}", messages)


class Episodes:
    """Search episodes with `manners`; a share of `reanswer_share` are re-answer examples instead.

    Args:
        corpus: what is asked and searched.
        count: examples.
        manners: how the traces behave.
        reanswer_share: in [0, 1].
        seed: decides everything.
        reworded_tools: share of episodes whose tool schema is rendered in other words. A server may drop a part of it,
            or space it otherwise, and a policy that has seen one rendering alone would be lost.
    """

    def __init__(
        self,
        corpus: Corpus,
        count: int,
        manners: Manners,
        reanswer_share: float,
        seed: int,
        reworded_tools: float = 0.0,
    ) -> None:
        self._corpus, self._count, self._manners = corpus, count, manners
        self._reanswer_share, self._seed, self._reworded = reanswer_share, seed, reworded_tools

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Example:
        rng = generator("episode", self._seed, number)
        asked = self._corpus.asked[int(rng.integers(len(self._corpus.asked)))]
        search = self._corpus.search
        if rng.random() < self._reanswer_share:
            known = bool(rng.random() < 0.5)
            pair = write_reanswer(search, asked.row, asked.scene, asked.event, known, rng)
            if pair is not None:
                return Example(f"{asked.sample.id}, re-answer {number}", pair)
        turns = self._corpus.settings.max_turns
        trace = write_trace(search, asked.row, asked.scene, asked.event, self._manners, rng, turns)
        tools = self._corpus.tools
        if rng.random() < self._reworded:
            function = {key: value for key, value in tools[0]["function"].items() if key != "return"}
            tools = [{**tools[0], "function": function}]
        return Example(f"{asked.sample.id}, episode {number}", [self._corpus.system, *trace], tools)


def dialogue(shown: Sequence[Block], said: Sequence[tuple[str, str]]) -> list[Message]:
    """Questions with their answers, the first after what is shown."""
    messages: list[Message] = []
    for asking, answering in said:
        asked: Block = {"type": "text", "text": asking}
        messages.append({"role": "user", "content": [asked] if messages else [*shown, asked]})
        messages.append({"role": "assistant", "content": answering})
    return messages


class Lessons(Protocol):
    """A map from a number to an example."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Example: ...


class Batches:
    """Examples of several datasets in shares, those of each run of `size` numbers from one: examples of one kind have
    about one length, and a batch of them little padding.
    """

    def __init__(self, parts: Sequence[tuple[Lessons, float]], size: int) -> None:
        self._parts, self._size = parts, size

    def __len__(self) -> int:
        return min(len(lessons) for lessons, _ in self._parts)

    def __getitem__(self, number: int) -> Example:
        rng = generator("batches", number // self._size)
        drawn = rng.choice(len(self._parts), p=[share for _, share in self._parts])
        return self._parts[int(drawn)][0][number]


class Mixture:
    """Examples of two datasets; `share` of them from the first."""

    def __init__(self, first: Lessons, second: Lessons, share: float) -> None:
        self._first, self._second, self._share = first, second, share

    def __len__(self) -> int:
        return min(len(self._first), len(self._second))

    def __getitem__(self, number: int) -> Example:
        dataset = self._first if generator("mixture", number).random() < self._share else self._second
        return dataset[number]
