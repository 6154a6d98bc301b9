"""How the base policy is pretrained, from nothing but the generator: `timesearch models --rebuild`.

The base stands in for Qwen2.5-VL: it reads frames, knows the tool and the format, and searches badly. Phases, each on
top of the one before:

1. *align*: single frames; the mean vision token of a frame is matched with the embeddings of its colour and shape word.
2. *read*: the re-answer format, few frames and then more, half of the examples without the asked shape, which are
   answered "I don't know".
3. *episodes*: whole searches with the `BASE` habits, mixed with re-answer examples.

Frames are those of real frame caches of rendered and encoded videos, so that nothing differs later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from timesearch.pocket.filesystem import parse_url
from timesearch.pocket.policy import tool_schemas
from timesearch.pocket.traces import UNKNOWN, Habits, write_reanswer, write_trace
from timesearch.pocket.world import COLOURS, SHAPES, Scene, generator, question
from timesearch.search.environment import SearchEnvironment
from timesearch.search.prompts import Prompts
from timesearch.settings import Search
from timesearch.training.supervised import Example

if TYPE_CHECKING:
    from timesearch.search.environment import QueryEncoder

Report = Callable[[str, int, dict[str, float]], None]


@dataclass
class Corpus:
    """Cached videos of the generator, by URL, and the environment that searches them."""

    urls: Sequence[str]
    settings: Search
    encoder: QueryEncoder
    frames: Path
    features: Path

    @cached_property
    def environment(self) -> SearchEnvironment:
        """Made where it is first used, so that each data process has its own."""
        return SearchEnvironment(self.settings, self.encoder, self.frames, self.features)

    @cached_property
    def scenes(self) -> list[Scene]:
        """What the videos show."""
        return [parse_url(url) for url in self.urls]

    @cached_property
    def system(self) -> dict[str, Any]:
        """The system message."""
        return {"role": "system", "content": Prompts.load(self.settings.prompts).texts["system"]}

    @cached_property
    def tools(self) -> list[dict[str, Any]]:
        """Schemas of the tools."""
        return tool_schemas()


def video_name(scene: Scene) -> str:
    """Path of a scene's video under the videos folder."""
    return f"{scene.world}/{scene.split}/{scene.seed}.mp4"


class Reading:
    """Dataset of re-answer examples on frames drawn at random, up to `most` of them; half do not show the shape."""

    def __init__(self, corpus: Corpus, count: int, most: int, seed: int) -> None:
        self._corpus, self._count, self._most, self._seed = corpus, count, most, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Example:
        rng = generator("read", self._seed, number)
        scene = self._corpus.scenes[int(rng.integers(len(self._corpus.scenes)))]
        environment = self._corpus.environment
        target = scene.events[int(rng.integers(len(scene.events)))]
        environment._enter({"video": video_name(scene), "question": question(target)})
        times = environment._opened.frames.timestamps
        shown = [scene.visible(seconds) for seconds in times]
        has = [i for i, event in enumerate(shown) if event == target]
        others = [i for i, event in enumerate(shown) if event is not None and event != target]
        empty = [i for i, event in enumerate(shown) if event is None]
        count = int(rng.integers(1, self._most + 1))
        known = bool(rng.random() < 0.6) and bool(has)
        hits = int(rng.integers(1, min(3, count) + 1)) if known else 0
        others_count = int(rng.binomial(count - hits, 0.7))
        picked = (
            {
                *rng.choice(has, size=hits, replace=False).tolist(),
                *rng.choice(others, size=min(len(others), others_count), replace=False).tolist(),
                *rng.choice(empty, size=count - hits - others_count, replace=False).tolist(),
            }
            if hits <= len(has)
            else {has[0]}
        )
        content = environment._answer_content(sorted(picked))
        answer = target.colour if known else UNKNOWN
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": f"<answer>{answer}</answer>"},
        ]
        return Example(f"read {number}", messages)


class Episodes:
    """Dataset of search episodes with `habits`, `reanswer_share` of them re-answer examples instead."""

    def __init__(self, corpus: Corpus, count: int, habits: Habits, reanswer_share: float, seed: int) -> None:
        self._corpus, self._count, self._habits = corpus, count, habits
        self._reanswer_share, self._seed = reanswer_share, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Example:
        rng = generator("episode", self._seed, number)
        scene = self._corpus.scenes[int(rng.integers(len(self._corpus.scenes)))]
        target = scene.needles[int(rng.integers(len(scene.needles)))]
        row = {"video": video_name(scene), "question": question(target)}
        environment = self._corpus.environment
        if rng.random() < self._reanswer_share:
            messages = write_reanswer(environment, row, scene, target, bool(rng.random() < 0.5), rng)
            if messages is not None:
                return Example(f"re-answer {number}", messages)
        turns = self._corpus.settings.max_turns
        messages = write_trace(environment, row, scene, target, self._habits, rng, turns)
        # A server may render the schema without its "return" part, or with other spaces: the words must not matter.
        tools = self._corpus.tools
        if rng.random() < 0.05:
            function = {key: value for key, value in tools[0]["function"].items() if key != "return"}
            tools = [{**tools[0], "function": function}]
        return Example(f"episode {number}", [self._corpus.system, *messages], tools)


def align(
    model: Any, processor: Any, corpus: Corpus, steps: int, size: int, rate: float, seed: int, report: Report
) -> None:
    """Phase 1, on `size` frames a step at learning rate `rate`; only the vision tower and word embeddings learn."""
    import torch

    ids = processor.tokenizer.convert_tokens_to_ids
    colour_ids = torch.tensor([ids(f"Ġ{colour}") for colour in COLOURS])
    shape_ids = torch.tensor([ids(f"Ġ{shape}") for shape in SHAPES])
    embeddings = model.get_input_embeddings()
    optimizer = torch.optim.AdamW([*model.model.visual.parameters(), *embeddings.parameters()], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    rng = generator("align", seed)
    environment = corpus.environment
    for step in range(1, steps + 1):
        pictures, colours, shapes = [], [], []
        while len(pictures) < size:
            scene = corpus.scenes[int(rng.integers(len(corpus.scenes)))]
            environment._enter({"video": video_name(scene), "question": ""})
            frames = environment._opened.frames
            for event in scene.events:
                window = frames.window(event.start, event.end - 0.5)
                pictures.append(frames[int(rng.choice(window))])
                colours.append(list(COLOURS).index(event.colour))
                shapes.append(SHAPES.index(event.shape))
        batch = processor.image_processor(images=pictures, return_tensors="pt")
        features = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
        means = torch.stack(list(features)).mean(dim=1)
        losses = []
        for wanted, truth in ((colour_ids, colours), (shape_ids, shapes)):
            logits = means @ embeddings.weight[wanted].T
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(truth)))
        right = float((logits.argmax(dim=1) == torch.tensor(shapes)).float().mean())
        optimizer.zero_grad()
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report("align", step, {"colour": float(losses[0].detach()), "shape": float(losses[1].detach()), "right": right})
