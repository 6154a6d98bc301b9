"""Many items on a local Ray cluster of two workers, one of which dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL.Image import Image
from synthetic import make_video

from timesearch import FeatureCache, FrameCache
from timesearch.base.batch import Made, run_batch
from timesearch.base.errors import ItemError
from timesearch.retrieval.features import cache_features
from timesearch.settings import Features, Frames
from timesearch.video.frames import cache_frames, make_frame_cache

os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # read when Ray is imported; `run_batch` sets it too
ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.takes(20)
def test_an_item_whose_worker_dies_is_tried_again(tmp_path: Path) -> None:
    def work(item: str) -> Made | None:
        mark = tmp_path / item
        if item == "dies once" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "always dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "broken":
            raise ItemError("it is broken", reason="not_a_video")
        return None if item == "done before" else Made(5, "damaged" if item == "dies once" else "")

    items = ["a", "dies once", "broken", "done before", "always dies", "b"]
    failures = tmp_path / "failures.jsonl"
    result = run_batch("test", items, work, failures=failures, workers=2, ray_address="local")
    assert sorted(result.done) == ["a", "b", "dies once"]
    assert result.skipped == ["done before"]
    assert {failure.item: failure.reason for failure in result.failures} == {
        "always dies": "worker_died",
        "broken": "not_a_video",
    }
    assert result.units == 15
    assert result.again == {"damaged": 1}
    assert len(failures.read_text().splitlines()) == 2


def test_frames_on_ray(tmp_path: Path) -> None:
    videos = {f"{number}.mp4": make_video(tmp_path / f"{number}.mp4", seconds=2) for number in range(3)}
    made = cache_frames(videos, tmp_path / "out", Frames(workers=2), ray_address="local")
    assert sorted(made.done) == sorted(videos)
    assert all(len(FrameCache.open(path)) == 4 for path in (tmp_path / "out").iterdir())


def test_features_on_ray(tmp_path: Path) -> None:
    class Colours:
        """An encoder that is quick to start in a worker."""

        name, pretrained, preprocessing, digest = "colours", "", "", ""

        def prepare(self, images: list[Image]) -> np.ndarray:
            return np.stack([np.asarray(image, np.float32).mean(axis=(0, 1)) for image in images])

        def encode_prepared(self, batch: np.ndarray) -> np.ndarray:
            return np.eye(4, dtype=np.float32)[[3 if os.getpid() != here else 0] * len(batch)]

    here = os.getpid()
    make_frame_cache(make_video(tmp_path / "a.mp4", seconds=2), tmp_path / "a.frames", Frames())
    frames = dict.fromkeys(("a.mp4", "b.mp4"), tmp_path / "a.frames")
    result = cache_features(frames, tmp_path / "out", Colours(), Features(workers=2), ray_address="local")  # type: ignore[arg-type]
    assert sorted(result.done) == ["a.mp4", "b.mp4"]
    rows = FeatureCache.open(tmp_path / "out" / "b.mp4.safetensors").features
    assert rows.shape == (4, 4)
    assert (rows[:, 3] == 1).all()
