"""Time is not frame number: pictures that are held, clocks that start anew, and streams that do not move."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from players import MeanColour
from synthetic import ffmpeg

from timesearch import FrameCache, select_frames
from timesearch.data.samples import Sample
from timesearch.inference.methods import chosen_frames
from timesearch.retrieval.features import make_feature_cache
from timesearch.search.budget import preview_plan
from timesearch.search.search import Search
from timesearch.settings import Frames, SearchSettings
from timesearch.video.exact import read_frames
from timesearch.video.frames import make_frame_cache

SMALL = Frames(max_pixels=4 * 28 * 28, min_pixels=28 * 28)


def cached(video: Path, settings: Frames = SMALL) -> FrameCache:
    target = video.with_name(video.name + ".frames")
    make_frame_cache(video, target, settings)
    return FrameCache.open(target)


def cache_of(times: list[float], fps: float = 2.0) -> FrameCache:
    """A cache of which only the times are read."""
    meta = {"timestamps": times, "fps": fps, "width": 56, "height": 56}
    return FrameCache(Path("none.frames"), meta, np.zeros((len(times), 3), np.int64), -1)


def screen(path: Path, steps: str, *options: object, seconds: float = 125, rate: int = 10) -> Path:
    """A recording whose grey goes up at each time of `steps`; `options` begin with the filter that keeps frames."""
    shade = "+".join(f"40*gte(T,{step})" for step in ["0", *steps.split()])
    ffmpeg(
        *("-f", "lavfi", "-i", f"color=black:s=96x64:r={rate}:d={seconds}"),
        *("-vf", f"{options[0]},geq=lum='{shade}':cb=128:cr=128", "-fps_mode", "vfr"),
        *("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", *options[1:], path),
    )
    return path


def grey(cache: FrameCache, index: int) -> float:
    return float(np.asarray(cache.decode(index).convert("L"), float).mean())


@given(
    rate=st.fractions(min_value=1, max_value=120, max_denominator=1001),
    fps=st.sampled_from([1.0, 2.0, 3.7]),
    count=st.integers(2, 3000),
    milliseconds=st.booleans(),
    k=st.integers(1, 40),
    bounds=st.tuples(st.floats(-5, 200), st.floats(-5, 200)),
)
@hypothesis_settings(max_examples=150, deadline=None)
def test_at_a_steady_rate_time_is_frame_number(rate, fps, count, milliseconds, k, bounds) -> None:
    """What every constant rate gives is what counting frames gives."""
    times = [round(float(number / rate), 3 if milliseconds else 6) for number in range(count)]
    kept: dict[int, float] = {}
    for time in times:
        kept.setdefault(int((time + 0.001) * fps), time)
    cache = cache_of(list(kept.values()), fps)
    assert cache.steady
    indices, _ = preview_plan(
        len(cache), (64, 64), SearchSettings(total_video_tokens=k, min_tokens=1, max_tokens=1, patch=32)
    )
    assert cache.evenly(k) == [(index, cache.timestamps[index]) for index in indices]
    features = np.random.default_rng(count).standard_normal((len(cache), 4))
    for method in ("uniform", "aks", "gated_logdet"):
        assert select_frames(features, np.eye(4)[0], k, method, cache.places) == select_frames(
            features, np.eye(4)[0], k, method
        )
    inside = np.flatnonzero((cache.timestamps >= bounds[0] - 1e-6) & (cache.timestamps <= bounds[1] + 1e-6))
    if len(inside) or rate >= fps:
        assert list(cache.window(*bounds)) == list(inside)


def test_a_held_picture_is_seen_whenever_it_is_on_the_screen(tmp_path: Path) -> None:
    """20 s of movement, one picture for 100 s, 5 s of movement."""
    cache = cached(screen(tmp_path / "screen.mp4", "20 120", "select='lt(t,20)+eq(n,200)+gte(t,120)'"))
    assert not cache.steady
    assert [time for _, time in cache.evenly(4)] == pytest.approx([15.5, 46.875, 78.125, 109.375])
    assert {index for index, _ in cache.evenly(4)[1:]} == {40}
    assert [index for index, _ in cache.evenly(51)] == list(range(51))
    assert list(cache.window(40, 60)) == [40]
    assert list(cache.window(100, 121)) == [40, 41, 42, 43]
    assert list(cache.window(5.1, 6)) == [11, 12]
    assert not cache.window(125, 140)
    assert [cache.nearest(time) for time in (19.6, 70.0, 119.4, 119.8, 119.96)] == [39, 40, 40, 40, 41]
    picked = select_frames(np.zeros((51, 4)), None, 6, "uniform", cache.places)
    assert len(picked) == 6
    assert 40 in picked
    assert grey(cache, 40) == pytest.approx(80, abs=12)
    source = read_frames(tmp_path / "screen.mp4", [19.6, 70.0, 119.8, 120.0])
    assert [float(pixels.mean()) for pixels in source] == pytest.approx([28, 75, 75, 121], abs=4)


def test_a_search_shows_a_held_picture_at_the_time_of_the_look(tmp_path: Path) -> None:
    cache = cached(screen(tmp_path / "screen.mp4", "20 120", "select='lt(t,20)+eq(n,200)+gte(t,120)'"))
    make_feature_cache(cache.path, tmp_path / "screen.mp4.safetensors", MeanColour(), 8)
    settings = SearchSettings(total_video_tokens=8, min_tokens=2, max_tokens=6, patch=28, max_turns=9)
    search = Search(settings, MeanColour(), tmp_path, tmp_path)
    sample = Sample(id="1", video="screen.mp4", question="What is on the screen?", answer="a", gt_spans=[(40, 60)])
    search.open(sample.model_dump())

    def images(blocks: list[dict]) -> list[tuple[int, float]]:
        labels = [block["text"] for block in blocks if block["type"] == "text"]
        shown = [(block["frame"], block["seconds"]) for block in blocks if block["type"] == "image"]
        assert labels[: len(shown)] == [f"{seconds:.1f}s" for _, seconds in shown]
        return shown

    assert images(search.preview()) == [(31, 15.5), (40, 46.875), (40, 78.125), (40, 109.375)]
    call = lambda *window: images(  # noqa: E731
        search.call("seek_video_frames", {"query": "red", "start_time": window[0], "end_time": window[1]})
    )
    assert call(90, 100) == [(40, 90.0)]
    assert call(40, 60) == [(40, 40.0)]
    assert call(119, 120.5) == [(40, 119.0), (41, 120.0), (42, 120.5)]
    assert call(19, 20) == [(38, 19.0), (39, 19.5), (40, 20.0)]
    again = images(search.reanswer() or [])
    assert again == [(38, 19.0), (39, 19.5), (40, 20.0), (41, 120.0), (42, 120.5)]
    looks = search.frames(chosen_frames(search, "uniform", sample, 6))
    assert [each.frame for each in looks] == [20, 40, 40, 40, 40, 40]
    assert [each.seconds for each in looks] == pytest.approx([10.0, 31.25, 52.083, 72.917, 93.75, 114.583], abs=1e-3)
    assert len(chosen_frames(search, "one_shot_dpp", sample, 6)) == 6


def test_what_is_held_is_the_last_picture_of_its_slot(tmp_path: Path) -> None:
    """A picture that comes amid a slot and stays; the same, more often than a command line can say."""
    video = screen(tmp_path / "amid.mkv", "20.3 120", "select='lt(t,20)+eq(n,200)+eq(n,203)+gte(t,120)'")
    cache = cached(video)
    assert list(cache.timestamps[39:43]) == [19.5, 20.0, 20.3, 120.0]
    assert (cache.shown_at(60), cache.end) == (41, cache.timestamps[-1])
    assert [grey(cache, index) for index in (40, 41, 42)] == pytest.approx([40, 80, 120], abs=15)
    assert list(cache.window(40, 60)) == [41]
    often = screen(tmp_path / "often.mp4", "1", "select='not(mod(n,25))+not(mod(n-3,25))'", seconds=2600)
    times = cached(often).timestamps
    assert len(times) == 1040 + 1000
    assert np.all(np.diff(times) > 0)


@pytest.mark.parametrize("how", ["duration", "sound"])
def test_a_picture_is_held_to_the_end(tmp_path: Path, how: str) -> None:
    """By the length of its packet, or for as long as the sound goes on."""
    video = screen(tmp_path / "part.mp4", "20", "select='lt(t,20)+eq(n,203)'", seconds=30)
    target = tmp_path / "whole.mp4"
    if how == "sound":
        sound = ("-f", "lavfi", "-i", "sine=d=125:r=8000", "-c:v", "copy", "-c:a", "aac")
        ffmpeg("-i", video, *sound, target)
    else:
        with av.open(str(video)) as source, av.open(str(target), "w") as made:
            stream = made.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:
                    packet.duration = round((125 - float(packet.pts * packet.time_base)) / packet.time_base)
                    packet.stream = stream
                    made.mux(packet)
    cache = cached(target)
    assert cache.end == pytest.approx(125, abs=0.2)
    assert [round(time, 1) for _, time in cache.evenly(4)] == pytest.approx([15.5, 46.9, 78.1, 109.4], abs=0.1)
    assert list(cache.window(40, 60)) == list(cache.window(124, 124.5)) == [len(cache) - 1]
    assert not cache.window(126, 130)
    assert FrameCache.open(cache.path).end == cache.end


def test_sound_that_outlasts_a_film_holds_no_picture(tmp_path: Path) -> None:
    video = tmp_path / "film.mp4"
    ffmpeg(
        *("-f", "lavfi", "-i", "testsrc2=s=96x64:r=25:d=3", "-f", "lavfi", "-i", "sine=d=4.5:r=8000"),
        *("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", video),
    )
    cache = cached(video)
    assert "end" not in cache.meta
    assert cache.end == cache.timestamps[-1]


@given(st.lists(st.floats(0.2, 60), min_size=1, max_size=40), st.integers(1, 50))
@hypothesis_settings(max_examples=100, deadline=None)
def test_looks_are_evenly_in_time(gaps: list[float], count: int) -> None:
    """Whatever the rate, a look shows what is on the screen in the middle of its share."""
    times = np.round(np.concatenate([[0], np.cumsum(gaps)]), 6)
    cache = cache_of(list(times))
    looks = cache.evenly(count)
    assert len(looks) == min(count, len(times))
    if cache.steady or count >= len(times):
        return
    middles = (np.arange(count) + 0.5) * (times[-1] + 0.5) / count
    for (index, seconds), middle in zip(looks, middles, strict=True):
        assert times[index] <= middle + 1e-5
        assert index + 1 == len(times) or middle < times[index + 1]
        assert abs(seconds - middle) <= 0.5
        assert cache.shown_at(seconds) == index
