"""Containers as recorders, cameras and joins leave them: what is whole is read whole, and what is not is named."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
from synthetic import ffmpeg, make_video

from timesearch import FrameCache
from timesearch.base.errors import ItemError
from timesearch.cli import main
from timesearch.evaluation.episodes import Videos, frame_times
from timesearch.settings import Frames
from timesearch.video.exact import read_frames
from timesearch.video.frames import make_frame_cache

SMALL = Frames(max_pixels=16 * 28 * 28, min_pixels=28 * 28)
TINY = {"size": "96x64"}


def cached(video: Path) -> FrameCache:
    target = video.with_name(f"{video.name}.frames")
    make_frame_cache(video, target, SMALL)
    return FrameCache.open(target)


@pytest.fixture(scope="module")
def avi(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_video(tmp_path_factory.mktemp("avi") / "whole.avi", "-c:v", "mjpeg", seconds=4, **TINY).read_bytes()


def riff(avi: bytes, size: int) -> bytes:
    return avi[:4] + struct.pack("<I", size) + avi[8:]


def movi(avi: bytes, more: int) -> bytes:
    """Another size of the list of pictures, and of the whole."""
    place = avi.index(b"movi") - 4
    stated = struct.unpack("<I", avi[place : place + 4])[0]
    return riff(avi[:place] + struct.pack("<I", (stated + more) % 2**32) + avi[place + 4 :], len(avi) + 400)


@pytest.mark.parametrize(
    "change",
    [
        lambda avi: riff(avi, len(avi) - 7),
        lambda avi: riff(avi, len(avi) + 220),
        lambda avi: riff(avi, 0xFFFFFFFF),
        lambda avi: riff(avi, 0),
        lambda avi: movi(avi, 1),
        lambda avi: movi(avi, 300),
        lambda avi: movi(avi, -40),
        lambda avi: movi(avi, 2**31),
        lambda avi: riff(avi[: avi.rindex(b"idx1")], 0xFFFFFFFF),
    ],
)
def test_sizes_in_the_header_of_an_avi_are_no_reason_to_refuse_it(
    tmp_path: Path, avi: bytes, change: Callable[[bytes], bytes]
) -> None:
    video = tmp_path / "odd.avi"
    video.write_bytes(change(avi))
    cache = cached(video)
    np.testing.assert_allclose(cache.timestamps, [0, 0.52, 1, 1.52, 2, 2.52, 3, 3.52], atol=1e-6)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("at_a_picture", [False, True])
def test_an_avi_without_its_last_pictures_is_cut_off(
    tmp_path: Path, avi: bytes, share: float, at_a_picture: bool
) -> None:
    end = int(len(avi) * share)
    end = avi.index(b"00dc", end) if at_a_picture else end
    video = tmp_path / "cut.avi"
    video.write_bytes(avi[:end])
    with pytest.raises(ItemError, match="fetch it again") as caught:
        cached(video)
    assert caught.value.reason == "truncated"


def test_a_folder_is_read_whole_and_what_is_left_out_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    video = make_video(folder / "deeper" / "a.mp4", seconds=1, **TINY)
    for suffix in ("3G2", "f4v", "qt"):
        ffmpeg("-i", video, "-c", "copy", "-f", "mov", folder / f"b.{suffix}")
    for suffix in ("m2v", "mpe", "mod"):
        ffmpeg(
            "-i", video, "-c:v", "mpeg2video", "-f", "mpeg2video" if suffix == "m2v" else "vob", folder / f"c.{suffix}"
        )
    ffmpeg("-i", video, "-c:v", "dvvideo", "-s", "720x576", "-pix_fmt", "yuv420p", folder / "d.dv")
    for name in ("a.srt", "list.txt", "noending", ".hidden.txt"):
        (folder / name).touch()
    (folder / "elsewhere").symlink_to(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["frames", str(folder), "--out", str(tmp_path / "out"), "--params", str(tmp_path / "none")])
    said = capsys.readouterr()
    assert "8 made, 0 up to date, 0 failed" in said.out
    assert left.value.code == 0
    assert "as not named like a video" in said.err
    for kind in ("1 .srt", "1 .txt", "1 without ending", "1 link to a folder"):
        assert kind in said.err


@dataclass
class Parts:
    """Recordings of six seconds at 25 frames a second; the second shows other pictures."""

    folder: Path

    def make(self, name: str, *options: object, other: bool = False, **shape: str) -> Path:
        path = self.folder / "".join(filter(str.isalnum, f"{options}{other}{shape}")) / name
        graph = "negate" if other else ""
        return path if path.exists() else make_video(path, *options, seconds=6, graph=graph, **{**TINY, **shape})

    def with_sound(self, name: str) -> bytes:
        """A recording whose sound goes on for a second after its pictures."""
        path = self.folder / f"sound-{name}"
        ffmpeg("-i", self.make(name), "-f", "lavfi", "-i", "sine=d=7", "-c:v", "copy", "-c:a", "aac", path)
        return path.read_bytes()

    def joined(self, name: str, *options: object, later: Sequence[object] = (), **shape: str) -> bytes:
        """Two recordings, one after the other."""
        first = self.make(name, *options)
        return first.read_bytes() + self.make(name, *options, *later, other=True, **shape).read_bytes()


B_FRAMES = ("-c:v", "libx264", "-preset", "fast", "-pix_fmt", "yuv420p")
VP8 = ("-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", 8, "-threads", 1)
MPEG2 = ("-c:v", "mpeg2video", "-bf", 2)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return Parts(tmp_path_factory.mktemp("parts"))


def without_start(parts: Parts, name: str, *options: object, packet: int) -> bytes:
    """A recording that was begun in the middle of a group of pictures: its first key frame is gone."""
    return parts.make(name, "-g", 50, *options).read_bytes()[packet * 8 :]


def with_one_damaged(parts: Parts, name: str, *options: object) -> bytes:
    video = parts.make(name, "-g", 25, *options)
    with av.open(str(video)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    content, packet = video.read_bytes(), packets[103]
    assert content.count(packet) == 1
    return content.replace(packet, packet[:4] + b"\xa5" * (len(packet) - 4))


WHOLE: dict[str, tuple[Callable[[Parts], bytes], float]] = {
    "joined.ts": (lambda parts: parts.joined("a.ts", *B_FRAMES), 12),
    "joined-with-sound.ts": (lambda parts: parts.with_sound("a.ts") + parts.make("a.ts", other=True).read_bytes(), 12),
    "joined-of-two-sizes.ts": (lambda parts: parts.joined("a.ts", size="128x64"), 12),
    "joined-later.ts": (lambda parts: parts.joined("a.ts", later=("-output_ts_offset", 1000)), 12),
    "joined-a-little-later.ts": (lambda parts: parts.joined("a.ts", later=("-output_ts_offset", 6)), 12),
    "wraps.ts": (lambda parts: parts.make("a.ts", "-output_ts_offset", 2**33 / 90000 - 3).read_bytes(), 6),
    "joined.vob": (lambda parts: parts.joined("a.vob", *MPEG2), 12),
    "joined.mpg": (lambda parts: parts.joined("a.mpg", *MPEG2), 12),
    "joined.mkv": (lambda parts: parts.joined("a.mkv", *B_FRAMES), 12),
    "joined.webm": (lambda parts: parts.joined("a.webm", *VP8), 12),
    "joined.h264": (lambda parts: parts.joined("a.h264", *B_FRAMES), 12),
    "camera.h264": (lambda parts: parts.make("a.h264", rate="30").read_bytes(), 6),
    "camera.m2v": (lambda parts: parts.make("a.m2v", *MPEG2).read_bytes(), 6),
    "camera.hevc": (
        lambda parts: parts.make("a.hevc", "-c:v", "libx265", "-x265-params", "log-level=none").read_bytes(),
        6,
    ),
    "still-clock.mkv": (lambda parts: parts.make("a.mkv", "-bsf:v", "setts=ts=0").read_bytes(), 6),
    "clock-stops.mkv": (lambda parts: parts.make("a.mkv", "-bsf:v", "setts=ts=min(PTS\\,2000)").read_bytes(), 6),
    "one-time-astray.mkv": (
        lambda parts: parts.make("a.mkv", "-bsf:v", "setts=ts=PTS-3000*eq(N\\,100)").read_bytes(),
        6,
    ),
    "begun-amid.mpg": (lambda parts: without_start(parts, "a.mpg", *MPEG2, packet=2048 // 8), 6),
    # Up to the next key frame, FFmpeg's threads leave what follows damage in FFV1 to chance: each picture is one here.
    "damaged.mkv": (lambda parts: with_one_damaged(parts, "a.mkv", "-c:v", "ffv1", "-g", 1), 6),
    "damaged.webm": (lambda parts: with_one_damaged(parts, "a.webm", *VP8), 6),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_video_is_read_to_its_end_by_every_reader(tmp_path: Path, parts: Parts, name: str) -> None:
    """The cache holds all of it; the exact reader finds the same pictures at the same times, as frame numbers do."""
    make, seconds = WHOLE[name]
    video = tmp_path / name
    video.write_bytes(make(parts))
    cache = cached(video)
    times = cache.timestamps
    assert seconds - 2.6 * name.startswith("begun") - 0.6 < times[-1] < seconds
    assert np.diff(times).min() > 0.3
    assert np.diff(times).max() < (
        1.1 if "sizes" in name else 0.7
    )  # a picture that waits in ffmpeg's graph goes with it
    pictures = np.stack([np.asarray(cache[index], int) for index in range(len(cache))])
    for wanted in (range(len(cache)), [0, len(cache) - 2]):
        exact = read_frames(video, [times[index] for index in wanted], size=cache.size)
        found = [int(np.abs(pictures - picture.astype(int)).mean(axis=(1, 2, 3)).argmin()) for picture in exact]
        assert found == list(wanted)
    shown = frame_times(video)
    if len(shown):
        assert np.abs(shown[:, None] - times).min(axis=0).max() < 0.05
    duration = Videos(tmp_path).duration(name)
    assert duration is None or duration > times[-1] or not name.startswith(("joined.ts", "joined.vob"))


def test_frames_of_one_time_at_no_rate_are_named(tmp_path: Path, parts: Parts) -> None:
    content = parts.make("a.webm", *VP8, "-bsf:v", "setts=ts=0:duration=0").read_bytes()
    rate = content.index(bytes.fromhex("23e38384"))  # DefaultDuration, four bytes long
    video = tmp_path / "still.webm"
    video.write_bytes(content[:rate] + bytes.fromhex("ec860000") + content[rate + 4 :])  # Void, six bytes long
    with pytest.raises(ItemError, match="one and the same time") as caught:
        cached(video)
    assert caught.value.reason == "no_times"


def test_of_several_streams_one_that_moves_is_read(tmp_path: Path, parts: Parts) -> None:
    """Not the still before it, though it is the default; and every reader takes the same one."""
    still = tmp_path / "still.png"
    ffmpeg("-f", "lavfi", "-i", "color=red:s=128x128", "-frames:v", 1, still)
    for suffix, codec in (("mkv", "copy"), ("mp4", "mjpeg"), ("ts", "mpeg2video")):
        video = tmp_path / f"two.{suffix}"
        streams = ("-map", "0:v", "-map", "1:v", "-c:v:0", codec, "-c:v:1", "copy", "-disposition:v:0", "default")
        ffmpeg("-i", still, "-i", parts.make("a.mp4"), *streams, "-disposition:v:1", 0, video)
        cache = cached(video)
        assert len(cache) == 12
        assert read_frames(video, [5.0])[0].shape == (64, 96, 3)
        assert len(frame_times(video)) == 150
