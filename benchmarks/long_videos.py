"""Longer videos without a further training: the hop world's two minutes, alone, in ten minutes, and in an hour.

    uv run python benchmarks/long_videos.py [--train runs/train] [--models models] [--videos 20] [--out runs/long]

A trained policy of the profile `hops` is asked about held-out videos in which the same two minutes stand somewhere
among backgrounds, and so is the search that goes by the pixels of what it finds (`timesearch.pocket.reading`), which
tells what the tools can do at that length. Printed by length are right answers by kind of question, calls, and what a
question costs. That small policy knows times of an hour from exercises of its pretraining; no training had such videos.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.learning import carry_out, play
from timesearch.data.messages import exchanges
from timesearch.data.rows import read_rows, read_samples
from timesearch.data.samples import Prediction
from timesearch.inference.playing import search_maker
from timesearch.pocket.dataset import write_samples
from timesearch.pocket.hop_lessons import questions_of
from timesearch.pocket.hops import HOP_WORLDS
from timesearch.pocket.reading import search_by_reading
from timesearch.profiles import load_profile
from timesearch.retrieval.features import default_encoder
from timesearch.settings import Settings


def settings_of(out: Path, world: str, models: Path, train: Path) -> Settings:
    """The profile, with all that is made in `out`."""
    settings = load_profile("hops")
    root, paths = out / world, settings.paths
    paths.test_samples, paths.train_samples = root / "test.jsonl", root / "train.jsonl"
    paths.videos, paths.frames, paths.features = root / "videos", root / "frames", root / "features"
    paths.models, paths.train, paths.results = models, train, root / "results"
    settings.tracking.uri = f"sqlite:///{(out / 'mlflow.db').absolute()}"
    return settings


Measured = tuple[dict[str, list[float]], dict[str, float]]
"""Right answers by kind of question, and what else is told."""


def measure(settings: Settings, world: str, videos: range) -> tuple[Measured, Measured]:
    """Of the trained policy, with calls and seconds of preparing and of playing; and of the scripted search."""
    from timesearch.retrieval import features
    from timesearch.video import download, frames

    asked = write_samples(settings.paths.test_samples, world, "heldout", len(videos), videos.start)
    write_samples(settings.paths.train_samples, world, "train", 0)
    begun = time.monotonic()
    carry_out(settings, download, frames, features)
    prepared = time.monotonic()
    play(settings, "grpo_csv")
    played = time.monotonic()
    right: dict[str, list[float]] = defaultdict(list)
    calls: list[int] = []
    for _, row in read_rows(settings.paths.results / "predictions" / "grpo_csv.jsonl"):
        prediction = Prediction.model_validate(row)
        kind = f"{prediction.meta['hops']}, {prediction.meta['family']}"
        right[kind].append(float(prediction.predicted_answer == prediction.answer))
        calls.append(len(list(exchanges(prediction.prediction))))
    costs = {
        "calls": float(np.mean(calls)),
        "s to prepare a video": (prepared - begun) / len(videos),
        "s a question": (played - prepared) / asked,
    }
    return (right, costs), read(settings)


def read(settings: Settings) -> Measured:
    """The same questions, answered by a search that reads pixels."""
    search = search_maker(settings, default_encoder(settings))()
    right: dict[str, list[float]] = defaultdict(list)
    calls: list[int] = []
    for sample, question in questions_of(read_samples(settings.paths.test_samples)):
        row = {"video": sample.video, "question": sample.question}
        answer = search_by_reading(search, row, question.events[0].shape, question.links)
        right[f"{question.hops}, {question.family}"].append(float(answer == sample.answer))
        calls.append(search.calls)
    return right, {"calls": float(np.mean(calls))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Play and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, default=Path("runs/train"), help="the trained policy")
    parser.add_argument("--models", type=Path, default=Path("models"), help="with the encoder of its training")
    parser.add_argument("--videos", type=int, default=20)
    parser.add_argument("--first", type=int, default=1000, help="first held-out video")
    parser.add_argument("--out", type=Path, default=Path("runs/long"))
    given = parser.parse_args(arguments)
    measured: dict[str, Measured] = {}
    for world in HOP_WORLDS:
        settings = settings_of(given.out, world, given.models, given.train)
        videos = range(given.first, given.first + given.videos)
        measured[world], measured[f"{world}, scripted"] = measure(settings, world, videos)
    kinds = sorted({kind for right, _ in measured.values() for kind in right})
    table = Table(title=f"{given.videos} videos of each length, five questions a video; right answers in per cent")
    costs = list(next(iter(measured.values()))[1])
    for head in ("", *kinds, *costs):
        table.add_column(head, justify="right")
    for world, (right, told) in measured.items():
        shares = (f"{100 * np.mean(right[kind]):.0f}" for kind in kinds)
        table.add_row(world, *shares, *(f"{told[cost]:.1f}" if cost in told else "–" for cost in costs))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
