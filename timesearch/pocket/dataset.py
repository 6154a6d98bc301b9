"""The pocket profile's questions: `python -m timesearch.pocket.dataset --out data`.

Three questions a video, one for each needle; with `--world hops` five, of one to three hops. The train and test files
share no video.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from timesearch.base.files import write_jsonl
from timesearch.data.samples import Sample
from timesearch.pocket.filesystem import scene_of
from timesearch.pocket.hops import HOP_WORLDS, HopScene, Question
from timesearch.pocket.senses import WORLD as SENSES
from timesearch.pocket.senses import SensesScene
from timesearch.pocket.world import WORLDS, Scene, question

TRAIN_VIDEOS, TEST_VIDEOS = 48, 50
"""Sizes that keep the whole demo within its 15 minutes on two cores."""


def samples_of(scene: Scene, asked: Sequence[Question] | None = None) -> list[Sample]:
    """The questions about one video; of a video of the hop world those `asked`, or one of each kind.

    `gt_seconds` holds the middle of the event that answers, `gt_spans` all of it; in the hop world of every event on
    the way, in the order of the hops, whose number `meta` tells.
    """
    if isinstance(scene, HopScene):
        return [_hop_sample(scene, question) for question in (scene.questions if asked is None else asked)]
    if isinstance(scene, SensesScene):
        return scene.samples
    return [
        Sample(
            id=f"{scene.world}-{scene.split}-{scene.seed}-{event.shape}",
            video=f"{scene.world}/{scene.split}/{scene.seed}.mp4",
            source=scene.url,
            question=question(event.shape),
            answer=event.colour,
            type="open_ended",
            duration=scene.duration,
            gt_seconds=[(event.start + event.end) / 2],
            gt_spans=[(event.start, event.end)],
            split=scene.split,
            meta={"shape": event.shape, "world": scene.world},
        )
        for event in scene.needles
    ]


def _hop_sample(scene: HopScene, asked: Question) -> Sample:
    first = asked.events[0].shape
    return Sample(
        id=f"{scene.world}-{scene.split}-{scene.seed}-{asked.family}-{asked.hops}-{first}",
        video=f"{scene.world}/{scene.split}/{scene.seed}.mp4",
        source=scene.url,
        question=asked.text,
        answer=asked.answer,
        type="open_ended",
        duration=scene.duration,
        gt_seconds=[(event.start + event.end) / 2 for event in asked.events],
        gt_spans=[(event.start, event.end) for event in asked.events],
        split=scene.split,
        meta={"hops": asked.hops, "family": asked.family, "shape": first, "world": scene.world},
    )


def write_samples(path: Path | str, world: str, split: str, videos: int, first: int = 0) -> int:
    """Write the samples of `videos` videos, seeds from `first` on, and return how many there are."""
    rows = [
        sample.model_dump(mode="json", exclude_defaults=True)
        for seed in range(first, first + videos)
        for sample in samples_of(scene_of(world, split, seed))
    ]
    write_jsonl(path, rows)
    return len(rows)


def main() -> None:
    """Write `train.jsonl` and `test.jsonl`."""
    parser = argparse.ArgumentParser(description="Write the pocket profile's sample files.")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder that gets train.jsonl and test.jsonl")
    parser.add_argument("--world", choices=sorted((*WORLDS, *HOP_WORLDS, SENSES)), default="demo")
    parser.add_argument("--train-videos", type=int, default=TRAIN_VIDEOS)
    parser.add_argument("--test-videos", type=int, default=TEST_VIDEOS)
    parser.add_argument("--first-test-video", type=int, default=1000, help="settings were chosen on those below 1000")
    arguments = parser.parse_args()
    for split, videos, first in (
        ("train", arguments.train_videos, 0),
        ("test", arguments.test_videos, arguments.first_test_video),
    ):
        path = arguments.out / f"{split}.jsonl"
        count = write_samples(path, arguments.world, split, videos, first)
        print(f"{path}: {count} questions about {videos} videos")


if __name__ == "__main__":
    main()
