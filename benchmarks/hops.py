"""What can be known in the hop world: by frames chosen at once, and by a search that reads what it finds.

    uv run python benchmarks/hops.py [--videos 60] [--encoder models/encoder]

Videos of the split `heldout` are rendered, downloaded, cached and embedded by the code of the pipeline, with an encoder
that is trained for it unless a folder is named (two minutes of one core). No policy plays. Printed by hops:

- *found*: how often the query of a hop, its shape in the whole video or any shape in the window after the hop before,
  brings a frame of it;
- *ceiling* of each way to choose frames at once: the chance that the best guess is right of one who reads them
  perfectly (`timesearch.pocket.hops.Question.best_guess`);
- *oracle frames, read*: how often the pixels of the frames of all hops give the right answer;
- *scripted search*: how often the search that goes by the pixels of what it finds gives the right answer
  (`timesearch.pocket.reading`), and with how many calls.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from timesearch.data.samples import Sample
from timesearch.inference.methods import chosen_frames
from timesearch.pocket.encoder import CURRICULA, train_encoder
from timesearch.pocket.hop_lessons import questions_of
from timesearch.pocket.hops import WORLD, Question, window_after
from timesearch.pocket.lessons import Corpus
from timesearch.pocket.pretrain import cached_corpus
from timesearch.pocket.reading import Notes, search_by_reading
from timesearch.profiles import load_profile
from timesearch.retrieval.encoder import load_encoder
from timesearch.search.search import Search

FRAMES = (5,)
"""Frames of the methods that choose them at once."""
METHODS = ("uniform", "one_shot_dpp", "one_shot_topk")


def found_by_hop(search: Search, row: dict[str, str], question: Question) -> list[bool]:
    """Whether the first query of each hop brings a frame of it, the hops before being known."""
    found = []
    for position, event in enumerate(question.events):
        search.open(row)
        call: dict[str, object] = {"query": event.shape}
        if position and question.links[position - 1] == "after":
            start, stop = window_after(question.events[position - 1].start)
            call = {"query": "shape", "start_time": start, "end_time": stop}
        search.call("seek_video_frames", call)
        seen = [each.seconds for each in search.evidence if each.seconds is not None]
        found.append(any(question.scene.visible(seconds) == event for seconds in seen))
    return found


def measure(corpus: Corpus, sample: Sample, question: Question) -> dict[str, list[float]]:
    """Figures of one question by name."""
    search, row = corpus.search, {"video": sample.video, "question": sample.question}
    figures: dict[str, list[float]] = {"found": [float(each) for each in found_by_hop(search, row, question)]}
    search.open(row)
    times = search.video.frames.timestamps
    for method in METHODS:
        for count in FRAMES:
            looks = chosen_frames(search, method, sample, count)
            seconds = [float(look[1] if isinstance(look, tuple) else times[look]) for look in looks]
            figures[f"ceiling of {method}, {count} frames"] = [question.best_guess(seconds)]
    notes = Notes()
    frames = search.video.frames
    notes.add((times[index], frames[index]) for index in map(frames.nearest, sample.gt_seconds))
    figures["oracle frames, read"] = [float(notes.answer(question.events[0].shape, question.links) == sample.answer)]
    answer = search_by_reading(search, row, question.events[0].shape, question.links)
    figures["scripted search"] = [float(answer == sample.answer)]
    figures["its calls"] = [float(search.calls)]
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure what can be known in the hop world.")
    parser.add_argument("--videos", type=int, default=60)
    parser.add_argument("--encoder", type=Path, help="a trained encoder's folder")
    parser.add_argument("--steps", type=int, default=400, help="of the encoder that is trained without it")
    arguments = parser.parse_args()
    settings = load_profile("hops")
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.encoder or train_encoder(
            Path(scratch) / "encoder", arguments.steps, curriculum=CURRICULA["pocket-hops"]
        )
        encoder = load_encoder(str(folder))
        corpus = cached_corpus(settings, encoder, Path(scratch), WORLD, "heldout", arguments.videos)
        for sample, question in questions_of(corpus.samples):
            for name, values in measure(corpus, sample, question).items():
                figures[name][f"{question.hops}, {question.family}"] += values
    kinds = sorted({kind for by_kind in figures.values() for kind in by_kind})
    table = Table(title=f"{arguments.videos} videos, {5 * arguments.videos} questions")
    for head in ("", *kinds, "2 and 3 hops"):
        table.add_column(head, justify="right")
    for name, by_kind in figures.items():
        several = [value for kind, values in by_kind.items() if kind[0] != "1" for value in values]
        cells = [f"{np.mean(values):.3f}" for values in (*(by_kind[kind] for kind in kinds), several)]
        table.add_row(name, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
