"""What the base policies are pretrained on, phase by phase; `timesearch.pocket.pretrain` carries it out.

A base stands in for Qwen2.5-VL: it reads frames, knows the tool and the format, and searches badly. That of each kind
of world has a recipe, named as the encoder that it goes with (`models.encoder`). Both begin by *align*: single frames,
whose vision tokens are matched with the embeddings of the words for what they show. The vision tower is frozen then,
in *pocket* until the last phase: the noisy gradients of whole episodes would undo what it has learned about shapes.
Good episodes come before bad ones, because copying the asked shape into the query is learned from consistent examples
alone. The last phase, *base*, takes few steps on episodes that spoil the behaviour and leave the skill.

*pocket*: *see* (re-answers on few frames, look-ups without frames, episodes that search well), *search* (more frames,
questions that the frames do not answer, faulty episodes among good ones).

*pocket-senses*: *look-up* (what frames, plates and flashes tell, beside episodes that take the right tool), *skill*
(faulty episodes among good ones, and such as lack a tool).

*pocket-hops*: *look-up* (what frames tell of each shape, again and again, beside some whole questions), *search*
(episodes that follow every hop, the tools said in many ways), *skill* (faulty episodes, re-answers to what was
searched, and windows in time), *order* (re-answers that recite one frame after another up to what follows in time), and
*settle* (the same as the rate falls, most of it about time).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from timesearch.pocket.hop_lessons import HopEpisodes, HopLookup, HopReading, HopWindows
from timesearch.pocket.hop_traces import HOP_BASE, HOP_CLEAN, HOP_SKILLED
from timesearch.pocket.hops import HOP_SHAPES, WORLD, HopEvent
from timesearch.pocket.lessons import Batches, Corpus, Episodes, Lessons, Lookup, Mixture, Reading
from timesearch.pocket.policy import Parts, hop_parts, make_hop_tokenizer, make_senses_tokenizer, make_tokenizer
from timesearch.pocket.senses import MARKS, SensesScene
from timesearch.pocket.senses import WORLD as SENSES
from timesearch.pocket.senses_lessons import SensesEpisodes, SensesLookup, readings_of
from timesearch.pocket.senses_traces import SENSES_BASE, SENSES_CLEAN, SENSES_SKILLED
from timesearch.pocket.traces import BASE, CLEAN, SKILLED
from timesearch.pocket.world import COLOURS, SHAPES, Event, Scene
from timesearch.training.supervised import Plan

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerFast

    from timesearch.search.search import Search

    Read = tuple[Image, tuple[int, ...]]


@dataclass(frozen=True)
class Phase:
    """One phase after *align*."""

    title: str
    lessons: Lessons
    plan: Plan
    sees: bool = False
    """train the vision tower too"""


@dataclass(frozen=True)
class Recipe:
    """How a base policy is made."""

    world: str
    videos: int
    """of the split `pretrain`, which are nobody else's"""
    align_steps: int
    tokenizer: Callable[[str], PreTrainedTokenizerFast]
    """from the name of the prompts"""
    words: tuple[tuple[str, ...], ...]
    """tokens that tell what an event shows, a tuple for each thing that is told"""
    pictures: Callable[[Scene, Search, np.random.Generator], list[Read]]
    """from an opened video: pictures, and the places of the tokens that tell what each shows in each of `words`"""
    phases: Callable[[Corpus, int], Sequence[Phase]]
    """from the corpus and the seed"""
    layers: int = 3
    """of the language model"""
    parts: Parts | None = None
    """of tokens that begin as sums"""


_COUNT = 10**6
"""Numbers of a dataset that makes its examples as they are asked for."""


def _frames_of_events(
    told: Callable[[Event], tuple[int, ...]],
) -> Callable[[Scene, Search, np.random.Generator], list[Read]]:
    """A cached frame of each event, and what is told of it."""

    def pictures(scene: Scene, search: Search, rng: np.random.Generator) -> list[Read]:
        frames = search.video.frames
        indices = [int(rng.choice(frames.window(event.start, event.end - 0.5))) for event in scene.events]
        return [(frames[index], told(event)) for index, event in zip(indices, scene.events, strict=True)]

    return pictures


def _shape_and_colour(event: Event) -> tuple[int, ...]:
    return SHAPES.index(event.shape), list(COLOURS).index(event.colour)


def _shape_colour_and_mark(event: Event) -> tuple[int, ...]:
    assert isinstance(event, HopEvent)
    return HOP_SHAPES.index(event.shape), list(COLOURS).index(event.colour), HOP_SHAPES.index(event.mark)


_SENSES_KEYS = (*(f"Ġ{shape}=" for shape in SHAPES), "Ġplate=", "Ġflash=")
_SENSES_VALUES = (*COLOURS, *MARKS)


def _senses_pictures(scene: Scene, search: Search, rng: np.random.Generator) -> list[Read]:
    assert isinstance(scene, SensesScene)
    return [
        (picture, (_SENSES_KEYS.index(f"Ġ{key}"), _SENSES_VALUES.index(value)))
        for picture, key, value in readings_of(scene, search, rng)
    ]


def _pocket_phases(corpus: Corpus, seed: int) -> list[Phase]:
    shown = Mixture(Reading(corpus, _COUNT, 4, 0.3, seed), Episodes(corpus, _COUNT, CLEAN, 0.0, seed), 0.5)
    skilled = Episodes(corpus, _COUNT, SKILLED, 0.25, seed + 1, reworded_tools=0.05)
    mixed = Mixture(Reading(corpus, _COUNT, 8, 0.4, seed + 1), skilled, 0.4)
    base = Episodes(corpus, _COUNT, BASE, 0.3, seed + 2, reworded_tools=0.05)
    see = Mixture(Lookup(_COUNT, seed), shown, 0.25)
    return [
        Phase("see", see, Plan(200, 48, 1.5e-3, warmup=20, decay=False, seed=seed)),
        Phase("search", mixed, Plan(150, 40, 1.5e-3, warmup=20, seed=seed)),
        Phase("base", base, Plan(50, 40, 5e-4, seed=seed), sees=True),
    ]


def _plan(seed: int, steps: int, rate: float = 1.5e-3, decay: bool = False) -> Plan:
    """Batches of one kind each, as `Batches` makes them."""
    return Plan(steps, 24, rate, warmup=20, decay=decay, seed=seed, save_steps=50, in_order=True)


def _hop_phases(corpus: Corpus, seed: int) -> list[Phase]:
    plan = partial(_plan, seed)
    lookup, windows = HopLookup(corpus, _COUNT, seed), HopWindows(_COUNT, seed)
    reading = HopReading(corpus, _COUNT, unknown=0.25, alone=0.25, seed=seed, recited=False)
    recited = HopReading(corpus, _COUNT, unknown=0.25, alone=0.4, seed=seed)
    in_time = HopReading(corpus, _COUNT, unknown=0.15, alone=0.4, seed=seed + 1, in_time=True)
    clean = HopEpisodes(corpus, _COUNT, HOP_CLEAN, 0.0, seed, reworded=True, later=0.25)
    skilled = HopEpisodes(corpus, _COUNT, HOP_SKILLED, 0.0, seed + 1, reworded=True, later=0.25)
    short = HopEpisodes(corpus, _COUNT, HOP_CLEAN, 1.0, seed + 2, recited=False)
    searched = HopEpisodes(corpus, _COUNT, HOP_CLEAN, 1.0, seed + 2, later=0.25)
    base = HopEpisodes(corpus, _COUNT, HOP_BASE, 0.2, seed + 3, reworded=True, later=0.25)
    return [
        Phase("look-up", Batches([(lookup, 0.4), (reading, 0.35), (clean, 0.25)], 24), plan(240)),
        Phase("search", Batches([(clean, 0.35), (short, 0.1), (reading, 0.3), (lookup, 0.25)], 24), plan(240)),
        Phase(
            "skill",
            Batches([(skilled, 0.4), (short, 0.15), (reading, 0.2), (lookup, 0.1), (windows, 0.15)], 24),
            plan(240),
        ),
        Phase(
            "order",
            Batches(
                [(recited, 0.15), (in_time, 0.2), (skilled, 0.3), (searched, 0.15), (lookup, 0.1), (windows, 0.1)], 24
            ),
            plan(240),
        ),
        Phase(
            "settle",
            Batches([(skilled, 0.3), (in_time, 0.38), (searched, 0.17), (windows, 0.15)], 24),
            plan(440, decay=True),
        ),
        Phase("base", base, plan(40, 4e-4, decay=True)),
    ]


def _senses_phases(corpus: Corpus, seed: int) -> list[Phase]:
    plan = partial(_plan, seed)
    lookup = SensesLookup(corpus, _COUNT, seed)
    clean = SensesEpisodes(corpus, _COUNT, seed, SENSES_CLEAN, reanswer_share=0.3)
    skilled = SensesEpisodes(corpus, _COUNT, seed + 1, SENSES_SKILLED, reanswer_share=0.3, withheld=0.1)
    base = SensesEpisodes(corpus, _COUNT, seed + 2, SENSES_BASE, reanswer_share=0.2, withheld=0.1)
    return [
        Phase("look-up", Batches([(lookup, 0.5), (clean, 0.5)], 24), plan(240)),
        Phase("skill", Batches([(lookup, 0.25), (skilled, 0.75)], 24), plan(240, decay=True)),
        Phase("base", base, plan(40, 4e-4, decay=True)),
    ]


RECIPES = {
    "pocket": Recipe(
        world="guess-proof",
        videos=500,
        align_steps=400,
        tokenizer=make_tokenizer,
        words=(tuple(f"Ġ{shape}" for shape in SHAPES), tuple(f"Ġ{colour}" for colour in COLOURS)),
        pictures=_frames_of_events(_shape_and_colour),
        phases=_pocket_phases,
    ),
    "pocket-senses": Recipe(
        world=SENSES,
        videos=300,
        align_steps=300,
        tokenizer=make_senses_tokenizer,
        words=(_SENSES_KEYS, _SENSES_VALUES),
        pictures=_senses_pictures,
        phases=_senses_phases,
        parts=hop_parts,
    ),
    "pocket-hops": Recipe(
        world=WORLD,
        videos=500,
        align_steps=600,
        tokenizer=make_hop_tokenizer,
        words=(tuple(f"Ġ{shape}>" for shape in HOP_SHAPES), tuple(COLOURS), HOP_SHAPES),
        pictures=_frames_of_events(_shape_colour_and_mark),
        phases=_hop_phases,
        layers=4,
        parts=hop_parts,
    ),
}
"""By the name of the encoder."""
