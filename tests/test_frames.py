"""The frame cache: sampling, true times, sizes, colours, and reading by many at once."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import shutil
import signal
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import structural_similarity
from synthetic import ffmpeg, make_video

from timesearch import FrameCache
from timesearch.base.stopping import Stop, StoppedError
from timesearch.settings import Frames
from timesearch.video.exact import read_frames
from timesearch.video.frames import DecodedFrames, cache_frames, make_frame_cache
from timesearch.video.probe import probe, shown_size, smart_size
from timesearch.video.sampling import ffmpeg_command, sample_jpegs

SMALL = Frames(max_pixels=64 * 28 * 28)
REAL = (
    "av1_video.mkv",
    "bottle-detection.mp4",
    "car-detection.mp4",
    "h264_10bits.mp4",
    "h265_10bits.mp4",
    "h265_video.mp4",
    "nasa_13013.mp4",
)


def cached(video: Path, settings: Frames = SMALL) -> FrameCache:
    target = video.with_name(video.name + ".frames")
    make_frame_cache(video, target, settings)
    return FrameCache.open(target)


def presentation_times(video: Path) -> list[float]:
    """Of every frame, by decoding with PyAV, from the first frame."""
    with av.open(str(video)) as container:
        times = [float(frame.time or 0) for frame in container.decode(container.streams.video[0])]
    return [time - times[0] for time in times]


def first_of_each_slot(times: list[float], fps: float) -> list[float]:
    kept: dict[int, float] = {}
    for time in times:
        kept.setdefault(int((time + 0.001) * fps), time)
    return list(kept.values())


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("fps", [2.0, 3.7])
def test_times_are_those_of_the_decoded_frames(footage: Path, tmp_path: Path, name: str, fps: float) -> None:
    video = tmp_path / name
    video.symlink_to(footage / name)
    cache = cached(video, SMALL.model_copy(update={"fps": fps}))
    np.testing.assert_allclose(cache.timestamps, first_of_each_slot(presentation_times(video), fps), atol=1e-6)


def test_work_that_is_given_up_ends_with_its_ffmpeg_and_leaves_nothing(tmp_path: Path) -> None:
    video = make_video(tmp_path / "video.mp4", seconds=60)
    info, before, amid = probe(video), Stop(), Stop()
    before.ask()
    with pytest.raises(StoppedError):
        make_frame_cache(video, tmp_path / "cache" / "video.frames", SMALL, stop=before)
    assert list((tmp_path / "cache").iterdir()) == []
    sampled = sample_jpegs(video, info, (192, 108), SMALL.model_copy(update={"fps": 25.0}), stop=amid)
    next(sampled)
    (ffmpeg,) = amid._children
    amid.ask()
    with pytest.raises(StoppedError):
        list(sampled)
    assert ffmpeg.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", REAL)
def test_jpegs_look_like_the_frames_before_them(footage: Path, name: str) -> None:
    """SSIM (Wang et al. 2004) of luma and of RGB to the raw output of the same filter graph."""
    from timesearch.video.sampling import PIXELS

    video, settings = footage / name, Frames()
    info = probe(video)
    size = smart_size(info.width, info.height, settings.factor, settings.min_pixels, settings.max_pixels)
    jpegs = [jpeg for _, jpeg in sample_jpegs(video, info, size, settings)]
    command = ffmpeg_command(video, info, size, settings)
    command[command.index("-f") + 1], command[command.index("-vcodec") + 1] = "rawvideo", "rawvideo"
    command = [part.replace(PIXELS, "rgb24") for part in command]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    frames = np.frombuffer(raw, np.uint8).reshape(len(jpegs), size[1], size[0], 3)
    luma, colour = [], []
    for index in range(0, len(jpegs), max(1, len(jpegs) // 8)):
        before, after = Image.fromarray(frames[index]), Image.open(io.BytesIO(jpegs[index])).convert("RGB")
        grey = [np.asarray(image.convert("L")) for image in (before, after)]
        luma.append(structural_similarity(*grey, data_range=255))
        colour.append(structural_similarity(np.asarray(before), np.asarray(after), channel_axis=2, data_range=255))
    assert np.mean(luma) >= 0.98
    assert np.mean(colour) >= 0.98


def test_pixels_are_those_of_the_source(tmp_path: Path) -> None:
    """Against another path to the same picture: PyAV's decoding, Pillow's scaling."""
    video = make_video(tmp_path / "a.mp4", "-crf", 10, size="392x224")
    cache = cached(video, Frames())
    assert cache.size == (392, 224)
    for index in (0, 3, 5):
        (source,) = read_frames(video, [cache.timestamps[index]])
        for mode, bound in (("L", 2), ("RGB", 6)):  # the source's own 4:2:0 blurs the pattern's sharp colours
            one, other = (np.asarray(image.convert(mode), int) for image in (Image.fromarray(source), cache[index]))
            assert np.abs(one - other).mean() < bound


def test_format_is_a_plain_zip_of_jpegs(tmp_path: Path) -> None:
    video = make_video(tmp_path / "a.mp4")
    cache = cached(video)
    with zipfile.ZipFile(cache.path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{index:06d}.jpg" for index in range(6)] + ["meta.json"]
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        meta = json.loads(archive.read("meta.json"))
        assert Image.open(archive.open("000005.jpg")).size == (meta["width"], meta["height"]) == cache.size
    assert meta["source"]["name"] == "a.mp4"
    assert meta["source"]["size"] == video.stat().st_size
    assert len(meta["source"]["sha256"]) == 64
    assert meta["timestamps"] == [0, 0.52, 1, 1.52, 2, 2.52]
    assert meta["fps"] == 2


def test_the_same_video_gives_the_same_bytes(tmp_path: Path) -> None:
    video = make_video(tmp_path / "a.mp4")
    first = cached(video).path.read_bytes()
    assert cached(video).path.read_bytes() == first


@pytest.mark.parametrize(
    ("name", "options", "graph"),
    [
        ("variable.mp4", ("-fps_mode", "vfr"), "select='not(mod(n,7))+lt(t,1)'"),
        ("late.mkv", (), "setpts=PTS+3.4/TB"),
        ("late.ts", ("-output_ts_offset", 7), ""),
        ("gap.mp4", ("-fps_mode", "vfr"), "setpts='PTS+gt(T,1)*5/TB'"),
        ("ntsc.mkv", (), "fps=30000/1001"),
        ("bframes.mp4", ("-c:v", "libx264", "-bf", "3", "-preset", "medium"), ""),
        ("ten.mp4", ("-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-x265-params", "log-level=none"), ""),
        ("old.avi", ("-c:v", "mpeg4"), ""),
        ("web.webm", ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", 8), ""),
        ("no-duration.mkv", ("-live", 1), ""),
        ("odd.mkv", ("-c:v", "libx264", "-pix_fmt", "yuv444p"), "scale=193:107"),
    ],
)
def test_odd_clocks_and_codecs(tmp_path: Path, name: str, options: tuple[object, ...], graph: str) -> None:
    video = make_video(tmp_path / name, *options, graph=graph)
    cache = cached(video)
    np.testing.assert_allclose(cache.timestamps, first_of_each_slot(presentation_times(video), 2), atol=1e-6)
    assert cache.timestamps[0] == 0
    assert len(cache) == len(set(map(cache.jpeg, range(len(cache)))))


def test_rotation_and_sample_aspect(tmp_path: Path) -> None:
    flat = make_video(tmp_path / "flat.mp4", "-crf", 10, size="224x112")
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", 90, "-i", flat, "-c", "copy", turned)
    assert (probe(turned).width, probe(turned).height) == (112, 224)
    upright, original = cached(turned), cached(flat)
    assert upright.size == original.size[::-1]
    expected = np.rot90(np.asarray(original[2]))
    assert np.abs(np.asarray(upright[2]).astype(int) - expected.astype(int)).mean() < 6
    (exact,) = read_frames(turned, [1.0])
    assert exact.shape == (224, 112, 3)
    wide = make_video(tmp_path / "wide.mp4", graph="setsar=2")
    assert (probe(wide).width, probe(wide).height) == (384, 108)
    assert cached(wide).size[0] > 3 * cached(wide).size[1]


def test_interlaced_frames_are_woven_out(tmp_path: Path) -> None:
    """Two fields of different brightness: what is cached has no combs."""
    graph = "geq=lum='if(mod(Y\\,2)\\,200\\,40)':cb=128:cr=128,setfield=tff"
    video = make_video(tmp_path / "i.mp4", "-flags", "+ilme+ildct", "-x264opts", "tff=1", size="224x224", graph=graph)
    with av.open(str(video)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    rows = np.asarray(cached(video)[1].convert("L")).astype(int)[8:-8].mean(axis=1)
    assert np.abs(np.diff(rows)).max() < 20


def test_high_dynamic_range_is_mapped_down(tmp_path: Path) -> None:
    hdr = ("-color_trc", "smpte2084", "-color_primaries", "bt2020", "-colorspace", "bt2020nc")
    x265 = ("-x265-params", "log-level=none:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc")
    video = make_video(tmp_path / "hdr.mp4", "-c:v", "libx265", "-pix_fmt", "yuv420p10le", *hdr, *x265, seconds=1)
    assert probe(video).hdr
    plain = make_video(tmp_path / "sdr.mp4", seconds=1)
    assert not probe(plain).hdr
    mapped, source = np.asarray(cached(video)[0]), np.asarray(cached(plain)[0])
    assert mapped.std() > 10
    assert np.abs(mapped.astype(int) - source.astype(int)).mean() > 5


def test_of_several_streams_the_default_one_is_read(tmp_path: Path) -> None:
    small, large = make_video(tmp_path / "s.mp4", size="112x112"), make_video(tmp_path / "l.mp4", size="336x112")
    both = tmp_path / "both.mkv"
    inputs = ("-i", small, "-i", large, "-map", "0:v", "-map", "1:v", "-c", "copy")
    ffmpeg(*inputs, "-disposition:v:0", 0, "-disposition:v:1", "default", both)
    assert cached(both).size == (336, 112)


def test_a_change_of_size_midway(tmp_path: Path) -> None:
    parts = [
        make_video(tmp_path / "1.ts", size="192x108", seconds=2.2),
        make_video(tmp_path / "2.ts", "-output_ts_offset", 2.2, size="256x144", seconds=2),
    ]
    video = tmp_path / "joined.ts"
    video.write_bytes(b"".join(part.read_bytes() for part in parts))
    cache = cached(video)
    assert len(cache) == 9
    assert np.diff(cache.timestamps).min() > 0.3  # the second part begins within a slot, with a frame of that slot


@given(
    width=st.integers(16, 8000),
    height=st.integers(16, 8000),
    factor=st.sampled_from([14, 28, 32]),
    tokens=st.tuples(st.integers(1, 16), st.integers(64, 1024)),
)
def test_sizes_follow_the_rule(width: int, height: int, factor: int, tokens: tuple[int, int]) -> None:
    low, high = (count * factor**2 for count in tokens)
    new = smart_size(width, height, factor, low, high)
    assert all(side > 0 and side % factor == 0 for side in new)
    if max(width, height) < 16 * min(width, height):
        assert low <= new[0] * new[1] <= high


@pytest.mark.parametrize(
    ("source", "cached_size"),
    [
        ((1280, 720), (588, 336)),
        ((720, 1280), (336, 588)),
        ((3840, 2160), (588, 336)),
        ((333, 777), (280, 672)),
        ((64, 48), (56, 56)),
        ((28, 28), (56, 56)),
    ],
)
def test_sizes_equal_the_processors(source: tuple[int, int], cached_size: tuple[int, int]) -> None:
    """Computed once by `smart_resize` of transformers' Qwen2-VL image processor."""
    assert smart_size(*source, 28, 4 * 784, 256 * 784) == cached_size


def test_shown_size() -> None:
    assert shown_size(720, 576, Fraction(64, 45), 0) == (1024, 576)
    assert shown_size(720, 576, Fraction(8, 9), 0) == (720, 648)
    assert shown_size(100, 50, Fraction(1), -90) == (50, 100)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> FrameCache:
    return cached(make_video(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=12))


def test_reading(clip: FrameCache) -> None:
    assert len(clip) == 24
    assert clip[0].mode == "RGB"
    assert clip[-1].tobytes() == clip[23].tobytes()
    assert [image.tobytes() for image in clip.read([5, 2, 5])] == [clip[index].tobytes() for index in (5, 2, 5)]
    assert clip.nearest(3.1) == 6
    assert clip.nearest(-5) == 0
    assert clip.nearest(1e9) == 23
    assert clip.window(1, 2) == range(2, 5)
    assert clip.window(1.1, 1.2) == range(3, 3)
    assert len(clip.window(2, 1)) == 0
    for index in (24, -25):
        with pytest.raises(IndexError, match="24 frames"):
            clip[index]


def test_what_a_caller_draws_on_a_frame_stays_his(clip: FrameCache) -> None:
    before = clip[3].tobytes()
    clip[3].paste((0, 0, 0), (0, 0, 50, 50))
    assert clip[3].tobytes() == before


def test_the_store_of_decoded_frames_is_bounded() -> None:
    images = [Image.new("RGB", (100, 50), (number, 0, 0)) for number in range(5)]
    store = DecodedFrames(budget=3 * 4 * 100 * 50)
    for number, image in enumerate(images):
        store.put(("cache", number), image)
        store.get(("cache", 0))  # used all along, and so kept
    held = [number for number in range(5) if store.get(("cache", number)) is not None]
    assert held == [0, 3, 4]


def test_threads_processes_and_pickles_share_a_cache(clip: FrameCache) -> None:
    expected = [clip.decode(index).tobytes() for index in range(len(clip))]
    orders = [np.random.default_rng(seed).permutation(len(clip)).tolist() for seed in range(8)]

    def all_right(order: list[int]) -> bool:
        return all(clip[index].tobytes() == expected[index] for index in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(all_right, orders))
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=lambda order=order: exit(not all_right(order))) for order in orders[:3]]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert copy.copy(clip)[7].tobytes() == expected[7]  # by way of __reduce__, as a pickle goes


def test_opening_reads_the_index_alone(clip: FrameCache, tmp_path: Path) -> None:
    path = tmp_path / "copy.frames"
    shutil.copy(clip.path, path)
    cache = FrameCache.open(path)
    path.unlink()
    assert cache[4].tobytes() == clip[4].tobytes()


def test_exact_frames_are_the_nearest_ones(footage: Path) -> None:
    video = footage / "bottle-detection.mp4"
    with av.open(str(video)) as container:
        frames = [
            (float(frame.time), frame) for frame in container.decode(video=0) if frame.time > 38 or frame.time < 1
        ]
        wanted = [39.2, 0.31, 500.0, 0.31, -1.0]
        nearest = [min(frames, key=lambda pair: abs(pair[0] - time))[1].to_ndarray(format="rgb24") for time in wanted]
    found = read_frames(video, wanted)
    assert all(np.array_equal(one, other) for one, other in zip(found, nearest, strict=True))
    (small,) = read_frames(video, [2.0], size=(64, 48))
    assert small.shape == (48, 64, 3)


def test_a_changed_video_or_parameter_redoes_that_item_alone(tmp_path: Path) -> None:
    videos = {name: make_video(tmp_path / name, seconds=1) for name in ("a.mp4", "b.mp4")}
    out = tmp_path / "out"
    assert sorted(cache_frames(videos, out, SMALL).done) == ["a.mp4", "b.mp4"]
    assert sorted(cache_frames(videos, out, SMALL).skipped) == ["a.mp4", "b.mp4"]
    make_video(videos["b.mp4"], seconds=2)
    result = cache_frames(videos, out, SMALL)
    assert (result.done, result.again) == (["b.mp4"], {"of another video": 1})
    videos["a.mp4"].touch()
    assert not cache_frames(videos, out, SMALL).done
    assert cache_frames(videos, out, SMALL.model_copy(update={"fps": 4.0})).again == {"of other parameters": 2}
    assert not list(out.glob(".*"))
