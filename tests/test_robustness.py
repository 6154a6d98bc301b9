"""Bad input is set aside with a reason, a killed run is resumed, a full disk is named, and nothing partial is read."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
from footage import ffmpeg, make_video

from timesearch import FeatureCache, FrameCache
from timesearch.errors import ItemError, RequestError
from timesearch.settings import Frames
from timesearch.video import frames as frames_module
from timesearch.video.frames import cache_frames, make_frame_cache, up_to_date
from timesearch.video.probe import probe
from timesearch.video.sampling import sample_jpegs

SMALL = Frames(max_pixels=16 * 28 * 28, min_pixels=28 * 28)
TIMESEARCH = (sys.executable, "-c", "from timesearch.cli import main; main()")


def timesearch(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*TIMESEARCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    return make_video(folder / "good.mp4", "-g", 10, "-movflags", "+faststart", seconds=4)


def no_samples(path: Path) -> None:
    """A video stream without one frame."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()


def bad_videos(folder: Path, good: Path) -> dict[str, tuple[Path, str]]:
    """Each kind of broken file, and the reason that is expected for it."""
    whole = good.read_bytes()
    late_index = folder / "plain.mp4"
    ffmpeg("-i", good, "-c", "copy", late_index)
    matroska = folder / "plain.mkv"
    ffmpeg("-i", good, "-c", "copy", matroska)
    old = make_video(folder / "plain.avi", "-c:v", "mpeg4", seconds=2).read_bytes()
    half = len(whole) // 2
    contents = {
        "empty.mp4": (b"", "empty_file"),
        "text.mp4": (b"this is no video\n" * 200, "not_a_video"),
        "noise.mkv": (random.Random(0).randbytes(5000), "not_a_video"),
        "no-index.mp4": (late_index.read_bytes()[: late_index.stat().st_size * 2 // 3], "truncated"),
        "cut.mp4": (whole[:half], "truncated"),
        "cut-at-its-end.mp4": (whole[:-500], "truncated"),
        "cut.mkv": (matroska.read_bytes()[: matroska.stat().st_size // 2], "truncated"),
        "cut.avi": (old[: len(old) // 2], "truncated"),
        "holes.mp4": (whole[:half] + bytes(len(whole) // 4) + whole[half + len(whole) // 4 :], "damaged_video"),
        "playlist.mp4": (f"#EXTM3U\n#EXTINF:4,\n{good}\n#EXT-X-ENDLIST\n".encode(), "not_a_video"),
        "list.mp4": (f"ffconcat version 1.0\nfile {good}\n".encode(), "not_a_video"),
    }
    made = {}
    for name, (content, reason) in contents.items():
        (folder / name).write_bytes(content)
        made[name] = (folder / name, reason)
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", folder / "sound.mp4")
    no_samples(folder / "no-frames.mp4")
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    (folder / "folder.mp4").mkdir()
    reasons = {
        "sound.mp4": "no_video_stream",
        "no-frames.mp4": "no_video_stream",
        "loop.mp4": "symlink_loop",
        "folder.mp4": "not_a_file",
        "absent.mp4": "missing_file",
    }
    return made | {name: (folder / name, reason) for name, reason in reasons.items()}


def test_each_broken_video_has_its_reason_and_the_others_are_done(tmp_path: Path, good: Path) -> None:
    bad = bad_videos(tmp_path, good)
    one = make_video(tmp_path / "one.mp4", "-frames:v", 1)
    videos = {name: path for name, (path, _) in bad.items()} | {"good.mp4": good, "one.mp4": one}
    videos["../climbs.mp4"] = good
    out = tmp_path / "out"
    result = cache_frames(videos, out, SMALL)
    reasons = {failure.item: failure.reason for failure in result.failures}
    assert reasons == {name: reason for name, (_, reason) in bad.items()} | {"../climbs.mp4": "unsafe_path"}
    assert sorted(result.done) == ["good.mp4", "one.mp4"]
    assert result.exit_code() == 1
    assert result.exit_code(keep_going=True) == 0
    listed = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert {row["item"]: row["reason"] for row in listed} == reasons
    assert sorted(path.name for path in out.iterdir()) == ["failures.jsonl", "good.mp4.frames", "one.mp4.frames"]
    assert len(FrameCache.open(out / "one.mp4.frames")) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_video(tmp_path: Path, good: Path) -> None:
    video = tmp_path / "locked.mp4"
    shutil.copy(good, video)
    video.chmod(0)
    (failure,) = cache_frames({"locked.mp4": video}, tmp_path / "out", SMALL).failures
    assert failure.reason == "unreadable"


@pytest.mark.parametrize(
    "name",
    [
        "with space.mp4",
        "qu'o\"te.mp4",
        "new\nline.mp4",
        "-dash.mp4",
        "視頻 фильм.mp4",
        "%d:colon,[x];.mp4",
        "$(id).mp4",
    ],
)
def test_names_are_only_names(tmp_path: Path, good: Path, name: str) -> None:
    video = tmp_path / "in" / name
    video.parent.mkdir()
    shutil.copy(good, video)
    assert cache_frames({name: video}, tmp_path / "out", SMALL).done == [name]
    assert FrameCache.open(tmp_path / "out" / f"{name}.frames").meta["source"]["name"] == name


def test_a_name_that_is_not_unicode_can_be_listed(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    (failure,) = cache_frames({name: tmp_path / name}, tmp_path / "out", SMALL).failures
    assert failure.reason == "missing_file"
    assert "caf" in (tmp_path / "out/failures.jsonl").read_text(encoding="utf-8")


def test_a_video_that_changes_while_it_is_read(tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = tmp_path / "growing.mp4"
    shutil.copy(good, video)
    sample = frames_module.sample_jpegs

    def sample_and_change(*arguments: object) -> object:
        yield from sample(*arguments)  # type: ignore[arg-type]
        with video.open("ab") as handle:
            handle.write(b"more")

    monkeypatch.setattr(frames_module, "sample_jpegs", sample_and_change)
    with pytest.raises(ItemError) as caught:
        make_frame_cache(video, tmp_path / "x.frames", SMALL)
    assert caught.value.reason == "changed_while_reading"
    assert not (tmp_path / "x.frames").exists()


def test_a_damaged_cache_is_noticed_and_remade(tmp_path: Path, good: Path) -> None:
    target = tmp_path / "out/good.mp4.frames"
    videos = {"good.mp4": good}
    cache_frames(videos, tmp_path / "out", SMALL)
    whole = target.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], b"", b"PK"):
        target.write_bytes(damaged)
        with pytest.raises(ItemError) as caught:
            FrameCache.open(target).verify()
        assert caught.value.reason == "damaged_cache"
        assert not up_to_date(target, good, SMALL)
        assert cache_frames(videos, tmp_path / "out", SMALL).done == ["good.mp4"]
        assert target.read_bytes() == whole


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    from timesearch.batch import exclusive

    with exclusive(tmp_path), pytest.raises(RequestError, match="another process"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_the_command_says_what_failed(tmp_path: Path, good: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    done = timesearch("frames", good, text, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "1 made, 0 up to date, 1 failed" in done.stdout
    assert f"not_a_video: {text} is not a video file" in done.stderr
    assert "Traceback" not in done.stderr
    assert timesearch("frames", good, text, "--out", tmp_path / "out", "--keep-going", cwd=tmp_path).returncode == 0
    twice = timesearch("frames", good, shutil.copytree(good.parent, tmp_path / "copy") / "good.mp4", cwd=tmp_path)
    assert twice.returncode == 2
    assert "would both become" in twice.stderr


def kill_at(moment: float, *arguments: object, cwd: Path) -> bool:
    """Start the command and kill it after `moment` seconds; whether it was still at work."""
    process = subprocess.Popen(
        [*TIMESEARCH, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=cwd
    )
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def test_frames_killed_at_any_moment_are_resumed(tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    for number in range(4):
        make_video(inputs / f"{number}.mp4", "-g", 50, seconds=6, size="320x240")
    command = ("frames", inputs, "--out", tmp_path / "out", "--workers", 2)
    started = time.monotonic()
    assert timesearch(*command, cwd=tmp_path).returncode == 0
    whole_run = time.monotonic() - started
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    shutil.rmtree(tmp_path / "out")
    moments, finished = random.Random(1), {}
    for _ in range(4):
        killed = kill_at(moments.uniform(0.3, 1) * whole_run, *command, cwd=tmp_path)
        whole = {path.name: path for path in (tmp_path / "out").glob("*.frames")}
        for name, path in whole.items():
            assert path.read_bytes() == expected[name]
        for name, changed in finished.items():
            assert whole[name].stat().st_mtime_ns == changed, "what was finished was redone"
        finished = {name: path.stat().st_mtime_ns for name, path in whole.items()}
        if not killed:
            break
    assert timesearch(*command, cwd=tmp_path).returncode == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected


EMBED = """
import sys, time
from pathlib import Path
import numpy as np
from timesearch.retrieval.features import cache_features
from timesearch.settings import Features

class MeanColour:
    name, pretrained, preprocessing = "mean colour", "none", "none"
    prepare = staticmethod(lambda images: [np.asarray(image).mean(axis=(0, 1)) for image in images])
    def encode_prepared(self, batch):
        time.sleep(0.01)
        rows = np.array(batch)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

caches = {path.stem: path for path in Path(sys.argv[1]).glob("*.frames")}
print("ready", flush=True)
cache_features(caches, Path(sys.argv[2]), MeanColour(), Features(batch_size=1, workers=2))
"""


def test_features_killed_at_any_moment_are_resumed(tmp_path: Path) -> None:
    videos = {f"{number}.mp4": make_video(tmp_path / f"{number}.mp4", seconds=10) for number in range(4)}
    cache_frames(videos, tmp_path / "frames", SMALL)
    out, finished, moments = tmp_path / "out", {}, random.Random(2)
    command = [sys.executable, "-c", EMBED, str(tmp_path / "frames"), str(out)]
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.6))
        process.kill()
        process.wait()
        for path, changed in finished.items():
            assert path.stat().st_mtime_ns == changed, "what was finished was redone"
        finished = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
        for path in finished:
            FeatureCache.open(path).verify()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert sorted(path.name for path in out.iterdir()) == [f"{number}.mp4.safetensors" for number in range(4)]
    for path in out.iterdir():
        FeatureCache.open(path).verify()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here (it needs root)")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_named_and_corrupts_nothing(tmp_path: Path, good: Path, small_disk: Path) -> None:
    long = make_video(tmp_path / "long.mp4", seconds=20, size="320x240")
    done = timesearch("frames", good, long, "--out", small_disk / "out", "--workers", 1, cwd=tmp_path)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    for path in (small_disk / "out").iterdir():
        FrameCache.open(path).verify()


def test_no_ffmpeg_is_left_behind(tmp_path: Path) -> None:
    video = make_video(tmp_path / "long.mp4", seconds=30, size="640x480")
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text()
    sampling = sample_jpegs(video, probe(video), (56, 56), SMALL)
    next(sampling)
    assert children.read_text() != before
    sampling.close()
    assert children.read_text() == before
