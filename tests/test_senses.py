"""The world of senses: each question needs its tool, proven by a policy that reads pixels and words alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.senses import accuracy, prepare
from timesearch.pocket.filesystem import parse_url
from timesearch.pocket.senses import FLASH, PLATE_BOX, TOOL_OF, SensesScene, make_senses_scene, read_mark
from timesearch.pocket.world import COLOURS, preview_instants
from timesearch.video.frames import FrameCache

VIDEOS = 7


def scenes(count: int) -> list[SensesScene]:
    return [make_senses_scene("heldout", seed) for seed in range(count)]


def test_a_scene_follows_from_its_name_and_shows_nothing_at_the_preview() -> None:
    for scene in scenes(60):
        assert parse_url(scene.url) == scene
        assert sorted(event.colour for event in scene.events) == sorted(COLOURS)
        assert len({scene.spoken.shape, scene.small.shape, scene.before.shape}) == 3
        assert not any(map(scene.visible, preview_instants(scene.duration)))
        begins = scene.flash.start
        assert int(begins * 2) == int((begins + FLASH) * 2), "an instant of the cache would show it"
        assert begins * 2 % 1 > 0.05
        assert scene.before.end < begins < scene.before.end + 2
        assert not any(event.start < begins + FLASH and begins < event.end for event in scene.events)
        said = " ".join(words for _, _, words in scene.lines)
        assert [event.shape for event in scene.events if event.shape in said.split()] == [scene.spoken.shape]


@pytest.mark.takes(60)
def test_each_question_needs_its_tool_and_no_other(tmp_path: Path) -> None:
    """Through the real codec, caches, subtitle stream and tools."""
    made = scenes(VIDEOS)
    prepare(made, tmp_path)
    assert min(accuracy(made, tmp_path).values()) >= 0.95
    for sense, tool in TOOL_OF.items():
        shares = accuracy(made, tmp_path, without=tool)
        others = [share for other, share in shares.items() if other != sense]
        assert shares[sense] <= 0.35, tool
        assert min(others) >= 0.95, tool
    for scene in made:
        frames = FrameCache.open(tmp_path / "frames" / f"{scene.samples[0].video}.frames")
        assert not any(abs(scene.flash.start + FLASH / 2 - time) < FLASH / 2 for time in frames.timestamps)
    left, top, *_ = (round(side * 320) for side in PLATE_BOX)
    whole = made[0].frame(made[0].small.start).crop((left, top, 320, 320))
    assert read_mark(whole) == made[0].small.mark
