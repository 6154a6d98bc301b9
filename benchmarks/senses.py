"""What each tool is for: the world of senses, with all tools and without each, by a policy that reads pixels and words.

    uv run python benchmarks/senses.py [--videos 20] [--first 0]

The videos are rendered, encoded, cached and indexed as everywhere; frames are found by features that know which shape
each frame shows, so that what is measured is the tools and not an encoder.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from timesearch.pocket.senses import TOOL_OF, SensesScene, answer_by_reading, encode, make_senses_scene
from timesearch.pocket.world import SHAPES
from timesearch.retrieval.features import make_feature_cache
from timesearch.search.search import Search
from timesearch.settings import Frames, SearchSettings
from timesearch.video.frames import FrameCache, make_frame_cache
from timesearch.video.subtitles import index_subtitles

TOOLS = ("seek_video_frames", *TOOL_OF.values())


class Oracle:
    """An encoder with one axis for each shape and one for all else; it is told what the frames show, in order."""

    name, pretrained, preprocessing, digest = "oracle", "", "", "oracle"

    def __init__(self, axes: Sequence[int] = ()) -> None:
        self._axes = iter(axes)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) unit rows."""
        axes = [next((i for i, shape in enumerate(SHAPES) if shape in text), len(SHAPES)) for text in texts]
        return _rows(axes)

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(N, D) unit rows."""
        return self.encode_prepared(self.prepare(images))

    def prepare(self, images: Sequence[Image.Image]) -> np.ndarray:
        """The axes of the next images."""
        return np.array([next(self._axes) for _ in images])

    def encode_prepared(self, batch: np.ndarray) -> np.ndarray:
        """(N, D) unit rows."""
        return _rows(batch)


def _rows(axes: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.eye(len(SHAPES) + 1, dtype=np.float32)[axes]


def prepare(scenes: Sequence[SensesScene], root: Path) -> None:
    """Videos, frame caches, features and subtitle indexes of scenes, in folders of these names under `root`."""
    videos = {}
    for scene in scenes:
        name = scene.samples[0].video
        video, cache = root / "videos" / name, root / "frames" / f"{name}.frames"
        features = root / "features" / f"{name}.safetensors"
        for path in (video, cache, features):
            path.parent.mkdir(parents=True, exist_ok=True)
        videos[name] = video
        video.write_bytes(encode(scene))
        make_frame_cache(video, cache, Frames(factor=32, min_pixels=4096, max_pixels=4096))
        shown = [scene.visible(float(seconds)) for seconds in FrameCache.open(cache).timestamps]
        axes = [SHAPES.index(event.shape) if event else len(SHAPES) for event in shown]
        make_feature_cache(cache, features, Oracle(axes), batch_size=64)
    index_subtitles(videos, root / "subtitles")


def accuracy(scenes: Sequence[SensesScene], root: Path, without: str | None = None) -> dict[str, float]:
    """Share of right answers by kind of question, with all tools but `without`."""
    settings = SearchSettings(
        tools=[tool for tool in TOOLS if tool != without],
        patch=32,
        min_tokens=4,
        max_tokens=4,
        max_turns=8,
        max_frames_per_turn=8,
    )
    search = Search(
        settings,
        Oracle(),
        root / "frames",
        root / "features",
        subtitles=root / "subtitles",
        source_of=lambda name: root / "videos" / name,
    )
    right: dict[str, list[bool]] = {sense: [] for sense in TOOL_OF}
    for scene in scenes:
        for sample in scene.samples:
            said = answer_by_reading(search, sample.model_dump())
            right[str(sample.meta["sense"])].append(said == sample.answer)
    return {sense: float(np.mean(answers)) for sense, answers in right.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Accuracy in the world of senses with and without each tool.")
    parser.add_argument("--videos", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="seed of the first video, of the split heldout")
    arguments = parser.parse_args()
    scenes = [make_senses_scene("heldout", arguments.first + number) for number in range(arguments.videos)]
    with tempfile.TemporaryDirectory() as folder:
        prepare(scenes, Path(folder))
        print(f"| tools | {' | '.join(TOOL_OF)} |\n| --- | {'---: | ' * len(TOOL_OF)}")
        for without in (None, *TOOL_OF.values()):
            shares = accuracy(scenes, Path(folder), without)
            cells = " | ".join(f"{100 * share:.0f}" for share in shares.values())
            print(f"| {f'without {without}' if without else 'all'} | {cells} |")


if __name__ == "__main__":
    main()
