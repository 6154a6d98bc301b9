"""Tools that look at the source: a region of one moment at full size, and a short stretch with more frames."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from players import MeanColour, Puppet, answer_turn, script

from timesearch.data.messages import Evidence, Message, exchanges, text_of
from timesearch.data.samples import Sample
from timesearch.evaluation.tools import Tools
from timesearch.inference.ask import Asker
from timesearch.report.build import _turns
from timesearch.search.episode import run_episode, without_pixels
from timesearch.search.search import Search
from timesearch.search.tools import MAX_STRETCH
from timesearch.serve.api import step_data
from timesearch.settings import Settings
from timesearch.tracking import _readable
from timesearch.video.exact import read_frames, read_timed_frames
from timesearch.video.glimpses import MAX_SOURCE_PIXELS, Glimpses

TOOLS = ["seek_video_frames", "look_closer", "watch"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, footage: Path) -> tuple[Settings, Path, Path, str]:
    """Settings, folder of caches, the clip, and its name in the caches."""
    root = tmp_path_factory.mktemp("source")
    settings = Settings.model_validate(
        {
            "frames": {"factor": 32, "min_pixels": 4096, "max_pixels": 4096},
            "search": {"patch": 32, "max_turns": 12, "max_tokens": 24, "max_frames_per_turn": 6, "tools": TOOLS},
        }
    )
    clip = Path(shutil.copy(footage / "car-detection.mp4", root / "clip.mp4"))
    asker = Asker(settings, Puppet(script(answer_turn())), MeanColour(), root / "cache")
    return settings, root / "cache", clip, asker.prepare(clip)


@pytest.fixture
def source(prepared: tuple[Settings, Path, Path, str], tmp_path: Path) -> Path:
    """A copy of the clip, which a test may take away."""
    return Path(shutil.copy(prepared[2], tmp_path / "clip.mp4"))


@pytest.fixture
def search(prepared: tuple[Settings, Path, Path, str], source: Path) -> Search:
    settings, cache, _, name = prepared
    (features,) = (cache / "features").iterdir()
    made = Search(settings.search, MeanColour(), cache / "frames", features, source_of=lambda _: source)
    made.open({"video": name, "question": "What is on the plate?"})
    return made


def test_a_region_is_shown_from_the_source_at_full_size_and_with_its_true_time(search: Search, source: Path) -> None:
    blocks = search.call("look_closer", {"time": 3.27, "box": [0.25, 0.5, 0.5, 1.0]})
    (found,) = search.evidence
    ((shown, pixels),) = read_timed_frames(source, [3.27])
    assert found == Evidence(search.video.name, shown, box=(0.25, 0.5, 0.5, 1.0), call=1)
    assert shown <= 3.27 + 0.05
    assert blocks[0]["text"] == f"{shown:.2f}s"
    height, width, _ = pixels.shape
    cut = Image.fromarray(pixels[height // 2 :, width // 4 : width // 2])
    image = blocks[1]["image"]
    assert (image.width // 32) * (image.height // 32) <= 24
    assert image.width % 32 == image.height % 32 == 0
    wanted = np.asarray(cut.resize(image.size, Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(np.asarray(image, dtype=float) - wanted).mean() < 3
    blurred = search.video.frames.read([search.video.frames.nearest(shown)])[0].resize((width, height))
    rough = blurred.crop((width // 4, height // 2, width // 2, height)).resize(image.size)
    assert np.abs(np.asarray(rough, dtype=float) - wanted).mean() > 2 * np.abs(np.asarray(image, float) - wanted).mean()


def test_a_stretch_is_watched_more_densely_than_the_cache(search: Search) -> None:
    search.call("watch", {"start_time": 2, "end_time": "2.5s", "fps": 10})
    times = [each.seconds for each in search.evidence if each.seconds is not None]
    assert len(times) == 6
    assert np.all(np.diff(times) > 0.05)
    assert 1.9 < times[0] < times[-1] <= 2.55
    search.call("watch", {"start_time": 2, "end_time": 2.05, "fps": 60})
    again = [each for each in search.evidence if each.call == 2]
    assert len(again) == len({each.seconds for each in again}) < 4  # the source has fewer frames than were asked for
    search.call("watch", {"start_time": 2, "end_time": 2})
    assert len([each for each in search.evidence if each.call == 3]) == 1


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("look_closer", {"time": 3}, "missing a required argument: 'box'"),
    ("look_closer", {"time": 3, "box": None}, "box must be four numbers"),
    ("look_closer", {"time": 3, "box": [0, 0, 1]}, "box must be four numbers"),
    ("look_closer", {"time": 3, "box": {"left": 0}}, "box must be four numbers"),
    ("look_closer", {"time": 3, "box": "here" * 10_000}, "box must be four numbers"),
    ("look_closer", {"time": 3, "box": [0, 0, "wide", 1]}, "each side of box must be a number"),
    ("look_closer", {"time": 3, "box": [0, 0, float("nan"), 1]}, "each side of box must be a finite number"),
    ("look_closer", {"time": 3, "box": [0.5, 0, 0.2, 1]}, "left before right"),
    ("look_closer", {"time": 3, "box": [0, 0, 640, 480]}, "from 0 to 1"),
    ("look_closer", {"time": 3, "box": [0, 0, 0.001, 1]}, "at least 0.02 wide and high"),
    ("look_closer", {"time": -1, "box": [0, 0, 1, 1]}, "time -1 lies outside"),
    ("look_closer", {"time": 1e9, "box": [0, 0, 1, 1]}, "lies outside of the video, which ends at"),
    ("look_closer", {"time": True, "box": [0, 0, 1, 1]}, "time must be a number"),
    ("watch", {"start_time": 5, "end_time": 4}, "start_time 5 lies after end_time 4"),
    ("watch", {"start_time": 1, "end_time": 2, "fps": 0}, "fps must be more than 0"),
    ("watch", {"start_time": 1, "end_time": 2, "fps": 1e9}, "fps must be more than 0 and at most 60"),
    ("watch", {"start_time": 1, "end_time": 4, "fps": 10}, "are 31 frames, and one call returns 6 at most"),
    ("watch", {"start_time": 1, "end_time": "inf"}, "end_time must be a finite number"),
    ("watch", {"start_time": "soon", "end_time": 2}, "start_time must be a number"),
]


@pytest.mark.parametrize(("tool", "arguments", "says"), WRONG)
def test_a_wrong_call_is_answered_by_what_to_correct(
    search: Search, tool: str, arguments: dict[str, Any], says: str
) -> None:
    blocks = search.call(tool, arguments)
    assert says in text_of({"role": "tool", "content": blocks})
    assert len(text_of({"role": "tool", "content": blocks})) < 500
    assert not search.evidence


def test_a_stretch_has_a_longest_length_and_a_picture_its_largest(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timesearch.search.tools.MAX_STRETCH", 5.0)
    said = text_of({"role": "tool", "content": search.call("watch", {"start_time": 1, "end_time": 9, "fps": 0.1})})
    assert "at most 5 seconds long" in said
    assert MAX_STRETCH < 60
    monkeypatch.setattr("timesearch.video.glimpses.MAX_SOURCE_PIXELS", 1000)
    said = text_of({"role": "tool", "content": search.call("look_closer", {"time": 1, "box": [0, 0, 1, 1]})})
    assert "the video file cannot be read (too_large)" in said
    assert MAX_SOURCE_PIXELS >= 7680 * 4320


def test_where_the_source_is_gone_it_says_so_and_the_search_goes_on(search: Search, source: Path) -> None:
    """What was seen before can be shown again for the re-answer."""
    search.call("watch", {"start_time": 2, "end_time": 2.3, "fps": 10})
    seen = search.reanswer()
    source.unlink()
    for name, arguments in (
        ("look_closer", {"time": 5, "box": [0, 0, 0.5, 0.5]}),
        ("watch", {"start_time": 5, "end_time": 5.2}),
    ):
        said = text_of({"role": "tool", "content": search.call(name, arguments)})
        assert "the video file is not there any more: search its cached frames instead" in said
    search.call("seek_video_frames", {"query": "red", "num_frames": 1})
    again = search.reanswer()
    assert seen is not None
    assert again is not None
    pictures = [block["image"] for block in again if "box" in block]
    assert pictures == [block["image"] for block in seen if "box" in block]
    assert [block["seconds"] for block in again if block["type"] == "image"] == sorted(
        block["seconds"] for block in again if block["type"] == "image"
    )


def test_a_picture_is_decoded_once_and_another_file_anew(source: Path, footage: Path, monkeypatch: Any) -> None:
    glimpses = Glimpses(source)
    (first,) = glimpses.at([1.0], (64, 32))
    reads: list[Any] = []

    def count(*arguments: Any) -> Any:
        reads.append(arguments)
        return read_timed_frames(*arguments)

    monkeypatch.setattr("timesearch.video.glimpses.read_timed_frames", count)
    assert glimpses.at([1.0, first.seconds], (64, 32)) == [first]
    assert not reads
    shutil.copy(footage / "bottle-detection.mp4", source)
    (other,) = glimpses.at([1.0], (64, 32))
    assert len(reads) == 1
    assert np.array_equal(np.asarray(other.image), read_frames(source, [1.0], (64, 32))[0])


def test_every_reader_of_a_trace_tells_a_picture_of_the_source(search: Search) -> None:
    name = search.video.name
    call = {"name": "look_closer", "arguments": {"time": 3, "box": [0.1, 0.2, 0.6, 0.7]}}
    stretch = {"name": "watch", "arguments": {"start_time": 1, "end_time": 1.3, "fps": 10}}
    turns = [f"<think>Read.</think>\n<tool_call>\n{json.dumps(each)}\n</tool_call>" for each in (call, stretch)]
    puppet = Puppet(script(*turns, answer_turn("red")))
    steps: list[Any] = []
    sample = Sample(id="1", video=name, question="What is on the plate?", answer="red")
    played = asyncio.run(run_episode(search, puppet, sample, steps.append))
    assert played.error is None
    closer, watched = exchanges(json.loads(played.model_dump_json())["prediction"])
    assert [(each.box, each.frame) for each in closer.evidence] == [((0.1, 0.2, 0.6, 0.7), None)]
    assert len(watched.evidence) == 4
    assert len(played.searched_seconds) == 5
    assert played.reanswer == "red"
    asked: Message = puppet.seen[-1][0]
    assert sum(block["type"] == "image" for block in asked["content"] if isinstance(block, dict)) == 5
    tools = Tools(near=1.0)
    tools.add(played, [3.0], [])
    tools.add(played.model_copy(update={"prediction": []}), [3.0], [])
    counted = {"calls_mean": 0.5, "use_rate": 0.5}
    assert tools.metrics() == {
        "look_closer": {**counted, "first_rate": 0.5, "found_mean": 1.0, "hit_rate": 1.0},
        "watch": {**counted, "first_rate": 0.0, "found_mean": 4.0, "hit_rate": 0.0},
    }
    told = _turns(played.prediction)
    assert list(told[0]["regions"].values()) == [[0.1, 0.2, 0.6, 0.7]]
    assert told[0]["calls"][0]["name"] == "look_closer"
    found = [step_data(step) for step in steps if step.kind == "found"]
    assert found[0]["frames"][0]["picture"].startswith("data:image/jpeg;base64,")
    (message, *_) = [each for each in played.prediction if each["role"] == "tool"]
    assert "region 0.1, 0.2, 0.6, 0.7" in json.dumps(_readable(message, lambda _: None))
    assert without_pixels(message) == message
