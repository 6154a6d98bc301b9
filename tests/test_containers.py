"""Containers as recorders, cameras and joins leave them: what is whole is read whole, and what is not is named."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from synthetic import ffmpeg, make_video

from timesearch import FrameCache
from timesearch.cli import main
from timesearch.errors import ItemError
from timesearch.settings import Frames
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
