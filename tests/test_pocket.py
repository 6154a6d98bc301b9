"""The pocket world: the same bytes each time, real videos, and questions that need search."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest

from timesearch.base.errors import RequestError
from timesearch.data.rows import read_samples
from timesearch.pocket.dataset import samples_of, write_samples
from timesearch.pocket.filesystem import encode, parse_url
from timesearch.pocket.world import (
    COLOURS,
    PREVIEW,
    SHAPES,
    SIZE,
    WORLDS,
    answer_prior,
    make_scene,
    read_colour,
)
from timesearch.search.budget import preview_plan
from timesearch.settings import Frames, SearchSettings
from timesearch.video.frames import FrameCache, make_frame_cache

FRAMES = Frames(factor=32, min_pixels=4096, max_pixels=4096)
SEARCH = SearchSettings(total_video_tokens=4 * PREVIEW, min_tokens=4, max_tokens=4, max_frames=PREVIEW, patch=32)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[int, FrameCache]:
    """Frame caches of a few videos of the test split, through the real codec."""
    folder = tmp_path_factory.mktemp("pocket")
    opened = {}
    for seed in range(8):
        video = folder / f"{seed}.mp4"
        video.write_bytes(encode(make_scene("guess-proof", "test", seed)))
        make_frame_cache(video, folder / f"{seed}.frames", FRAMES)
        opened[seed] = FrameCache.open(folder / f"{seed}.frames")
    return opened


def test_a_scene_follows_from_its_name_alone():
    assert make_scene("demo", "train", 3) == make_scene("demo", "train", 3)
    assert make_scene("demo", "train", 3) != make_scene("demo", "test", 3)
    assert encode(make_scene("demo", "train", 3)) == encode(make_scene("demo", "train", 3))


def test_events_are_short_apart_and_distinct():
    for seed in range(200):
        scene = make_scene("demo", "train", seed)
        assert 90 <= scene.duration <= 150
        assert len({event.shape for event in scene.events}) == len(scene.events) == 6
        assert len(scene.needles) == 3
        for before, after in zip(scene.events, scene.events[1:], strict=False):
            assert after.start - before.end >= 2
        assert all(2 <= event.end - event.start <= 5 and event.end < scene.duration for event in scene.events)


def test_the_filesystem_serves_a_real_video(tmp_path: Path):
    import av

    with fsspec.open("pocket://demo/train/5.mp4") as remote:
        data = remote.read()
    filesystem = fsspec.filesystem("pocket")
    assert filesystem.info("pocket://demo/train/5.mp4")["size"] == len(data)
    assert "demo/train" in filesystem.ls("pocket://demo", detail=False)
    path = tmp_path / "video.mp4"
    path.write_bytes(data)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        frames = [frame.to_image() for frame in container.decode(stream)]
    scene = parse_url("pocket://demo/train/5.mp4")
    assert len(frames) == int(scene.duration * 4)
    assert frames[0].size == (SIZE, SIZE)
    for event in scene.events:
        assert read_colour(frames[int((event.start + event.end) / 2 * 4)]) == event.colour


@pytest.mark.parametrize("url", ["pocket://nowhere/train/1.mp4", "pocket://demo/other/1.mp4", "pocket://demo/1.avi"])
def test_an_unknown_video_is_said_to_be_missing(url: str):
    with pytest.raises(RequestError):
        parse_url(url)
    with pytest.raises(FileNotFoundError):
        fsspec.filesystem("pocket").info(url)


def test_sample_files_share_no_video(tmp_path: Path):
    write_samples(tmp_path / "train.jsonl", "demo", "train", 6)
    write_samples(tmp_path / "test.jsonl", "demo", "test", 6)
    train, test = read_samples(tmp_path / "train.jsonl"), read_samples(tmp_path / "test.jsonl")
    assert len(train) == len(test) == 18
    assert not {sample.video for sample in train} & {sample.video for sample in test}
    scenes = {(tuple(scene.events), scene.duration) for scene in (parse_url(str(s.source)) for s in [*train, *test])}
    assert len(scenes) == 12


def test_text_alone_answers_no_better_than_the_prior():
    """Neither the question nor anything else in the text tells the colour: the best guess is the commonest answer."""
    for world in WORLDS:
        samples = [sample for seed in range(400) for sample in samples_of(make_scene(world, "heldout", seed))]
        answers = Counter(sample.answer for sample in samples)
        assert max(answers.values()) / len(samples) == pytest.approx(max(answer_prior(world).values()), abs=0.05)
        fitted = {shape: Counter(s.answer for s in samples[::2] if s.meta["shape"] == shape) for shape in SHAPES}
        guesses = [fitted[s.meta["shape"]].most_common(1)[0][0] == s.answer for s in samples[1::2]]
        assert np.mean(guesses) <= max(answer_prior(world).values()) + 0.06


def test_the_uniform_preview_never_shows_what_is_asked(caches: dict[int, FrameCache]):
    for seed in range(300):
        scene = make_scene("demo", "test", seed)
        total = int(scene.duration * FRAMES.fps)
        indices, _ = preview_plan(total, (64, 64), SEARCH)
        assert len(indices) == PREVIEW
        for index in indices:
            event = scene.visible(index / FRAMES.fps)
            assert event is None or not event.needle
    for seed, cache in caches.items():
        scene = make_scene("guess-proof", "test", seed)
        for index in preview_plan(len(cache), cache.size, SEARCH)[0]:
            event = scene.visible(cache.timestamps[index])
            assert read_colour(cache[index]) == (event.colour if event else None)


def test_the_right_frames_give_the_answer(caches: dict[int, FrameCache]):
    right, from_preview, asked = 0, 0, 0
    for seed, cache in caches.items():
        scene = make_scene("guess-proof", "test", seed)
        preview = [read_colour(cache[index]) for index in preview_plan(len(cache), cache.size, SEARCH)[0]]
        for sample in samples_of(scene):
            asked += 1
            right += read_colour(cache[cache.nearest(sample.gt_seconds[0])]) == sample.answer
            seen = [colour for colour in preview if colour]
            from_preview += bool(seen) and seen[0] == sample.answer
    assert right == asked == 24
    assert from_preview / asked < 1 / len(COLOURS) + 0.15
