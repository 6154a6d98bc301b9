"""Bad input is set aside with a reason, a killed run is resumed, a full disk is named, and nothing partial is read."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from synthetic import ffmpeg, make_encoder, make_video

from timesearch import FeatureCache, FrameCache
from timesearch.base.errors import ItemError
from timesearch.base.files import write_jsonl
from timesearch.cli import main
from timesearch.settings import Frames, Settings
from timesearch.video.frames import VERSION, cache_frames, run
from timesearch.video.probe import probe
from timesearch.video.sampling import sample_jpegs

SMALL = Frames(max_pixels=16 * 28 * 28, min_pixels=28 * 28)
TIMESEARCH = (sys.executable, "-c", "from timesearch.cli import main; main()")


def timesearch(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*TIMESEARCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


LOADED = (
    *(f"timesearch.cli.{name}" for name in ("data", "learning", "inference", "evaluation", "judge", "machine")),
    *(
        "timesearch.settings",
        "timesearch.video.frames",
        "timesearch.retrieval.features",
        "timesearch.retrieval.encoder",
    ),
    *("timesearch.base.batch", "av", "ffmpeg", "imageio_ffmpeg", "open_clip", "safetensors.numpy", "PIL.Image"),
)
"""What the command line imports as it runs."""
Start = Callable[..., ForkServerProcess]


@pytest.fixture(scope="module")
def start() -> Start:
    """Runs the command line in a process forked from one that has loaded all it needs, so that kills hit the work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*LOADED])

    def run(*arguments: object) -> ForkServerProcess:
        process = context.Process(target=main, args=([*map(str, arguments)],))
        process.start()
        return process

    return run


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    return make_video(folder / "good.mp4", "-g", 10, "-movflags", "+faststart", seconds=4)


def bad_videos(folder: Path, good: Path) -> dict[str, str]:
    """Each kind of broken file in a folder, and the reason that is expected for it."""
    whole = good.read_bytes()
    sources = folder.with_name("whole")
    late_index, matroska = sources / "plain.mp4", sources / "plain.mkv"
    old = make_video(sources / "plain.avi", "-c:v", "mpeg4", seconds=2).read_bytes()
    ffmpeg("-i", good, "-c", "copy", late_index)
    ffmpeg("-i", good, "-c", "copy", matroska)
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
    folder.mkdir()
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", folder / "sound.mp4")
    for name in ("zero-length.mp4", "zero-length.avi"):
        ffmpeg("-f", "lavfi", "-i", "testsrc2", "-frames:v", 0, "-movflags", "empty_moov+frag_keyframe", folder / name)
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    (folder / "folder.mp4").mkdir()
    reasons = {
        "sound.mp4": "no_video_stream",
        "zero-length.mp4": "no_frames",
        "zero-length.avi": "no_frames",
        "loop.mp4": "symlink_loop",
        "folder.mp4": "not_a_file",
        "absent.mp4": "missing_file",
        f"{'long name ' * 25}.mp4": "unsafe_path",
    }
    shutil.copy(good, folder / f"{'long name ' * 25}.mp4")
    return reasons | {name: reason for name, (_, reason) in contents.items()}


def reasons_in(failures: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in failures.read_text(encoding="utf-8").splitlines()]
    assert all(row["message"] for row in rows)
    return {row["item"]: row["reason"] for row in rows}


def test_each_broken_video_has_its_reason_and_the_others_are_done(tmp_path: Path, good: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    bad = bad_videos(folder, good)
    make_video(folder / "one.mp4", "-frames:v", 1)
    videos = (folder, good, folder / "absent.mp4")
    done = timesearch("frames", *videos, "--out", out, cwd=tmp_path)
    assert done.returncode == 1
    assert f"frame caches: 2 made, 0 up to date, {len(bad)} failed" in done.stdout
    assert f"  not_a_video: {folder / 'text.mp4'} is not a video file" in done.stderr
    assert "Traceback" not in done.stderr
    assert reasons_in(out / "failures.jsonl") == bad
    assert sorted(path.name for path in out.iterdir()) == ["failures.jsonl", "good.mp4.frames", "one.mp4.frames"]
    assert len(FrameCache.open(out / "one.mp4.frames")) == 1
    again = timesearch("frames", *videos, "--out", out, "--keep-going", cwd=tmp_path)
    assert again.returncode == 0
    assert f"0 made, 2 up to date, {len(bad)} failed" in again.stdout
    assert timesearch("frames", good, folder / "one.mp4", "--out", out, cwd=tmp_path).returncode == 0
    assert not (out / "failures.jsonl").exists()


def test_a_path_that_climbs_out_of_the_data_root_is_refused(tmp_path: Path, good: Path) -> None:
    settings = Settings(frames=SMALL)
    for name, path in settings.paths:
        setattr(settings.paths, name, tmp_path / "project" / path)
    climbing = ["../climbs.mp4", "/etc/passwd", "a/../../../climbs.mp4"]
    shutil.copytree(good.parent, settings.paths.videos)
    shutil.copy(good, settings.paths.videos.parent / "climbs.mp4")
    samples = [{"id": str(number), "video": video, "question": "?"} for number, video in enumerate(climbing)]
    write_jsonl(settings.paths.train_samples, samples)
    write_jsonl(settings.paths.test_samples, [{"id": "good", "video": "good.mp4", "question": "?"}])
    result = run(settings)
    assert result.done == ["good.mp4"]
    assert result.exit_code() == 1
    plain = ["../climbs.mp4", "/etc/passwd", "../../climbs.mp4"]
    assert reasons_in(settings.paths.frames / "failures.jsonl") == dict.fromkeys(plain, "unsafe_path")
    files = sorted(path.name for path in tmp_path.rglob("*") if path.suffix == ".frames")
    assert files == ["good.mp4.frames"]


def without_roots_privilege() -> list[str]:
    """What to put before a command so that permissions hold for it, whoever runs the tests."""
    if os.geteuid() != 0:
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root may read everything, and there is no setpriv to give that up")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]


def test_unreadable_permissions(tmp_path: Path, good: Path) -> None:
    command, folder, out = without_roots_privilege(), tmp_path / "open/closed", tmp_path / "out"
    for name in ("locked.mp4", "open/closed/inside.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(good, tmp_path / name)
    (tmp_path / "locked.mp4").chmod(0)
    folder.chmod(0)
    try:
        videos = [good, tmp_path / "locked.mp4", folder / "inside.mp4", tmp_path / "open"]
        command += [*TIMESEARCH, "frames", *map(str, videos), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    finally:
        folder.chmod(0o700)
    assert done.returncode == 1, done.stderr
    unreadable = ("locked.mp4", "inside.mp4", "closed")
    assert reasons_in(out / "failures.jsonl") == dict.fromkeys(unreadable, "unreadable")
    FrameCache.open(out / "good.mp4.frames").verify()


NAMES = (
    "with space.mp4",
    "qu'o\"te.mp4",
    "new\nline.mp4",
    "-dash.mp4",
    "視頻 фильм.mp4",
    "%d:colon,[x];*?.mp4",
    "$(id).mp4",
    "視" * 78 + ".mp4",
)


@pytest.mark.takes(25)
def test_names_are_only_names(tmp_path: Path, good: Path, start: Start) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(good, folder / name)
    broken = "bro\nken \x1b[31m -dash 視.mp4"
    (folder / broken).write_text("no video")
    done = timesearch("frames", folder, "--out", out, "--workers", 2, cwd=tmp_path)
    assert done.returncode == 1
    assert f"{len(NAMES)} made, 0 up to date, 1 failed" in done.stdout
    assert r"bro\nken \x1b[31m -dash 視.mp4 is not a video file" in done.stderr
    assert reasons_in(out / "failures.jsonl") == {broken: "not_a_video"}
    for name in NAMES:
        assert FrameCache.open(out / f"{name}.frames").meta["source"]["name"] == name
    again = timesearch("frames", "--out", out, "--", *NAMES, cwd=folder)
    assert again.returncode == 0
    assert f"0 made, {len(NAMES)} up to date" in again.stdout
    embedding = start("features", out, "--out", tmp_path / "features", "--model", make_encoder(tmp_path / "encoder"))
    embedding.join()
    assert embedding.exitcode == 0
    assert {path.name for path in (tmp_path / "features").iterdir()} == {f"{name}.safetensors" for name in NAMES}


def test_a_name_that_is_not_unicode_can_be_listed(tmp_path: Path) -> None:
    done = timesearch("frames", os.fsdecode(b"caf\xe9.mp4"), "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "missing_file" in done.stderr
    assert reasons_in(tmp_path / "out/failures.jsonl") == {r"caf\xe9.mp4": "missing_file"}


def grow(video: Path) -> None:
    with video.open("ab") as handle:
        handle.write(b"more")


def shrink(video: Path) -> None:
    os.truncate(video, 1000)


def replace(video: Path) -> None:
    shutil.copy(video, video.with_suffix(".new"))
    video.with_suffix(".new").replace(video)


@pytest.mark.parametrize("change", [grow, shrink, replace, Path.unlink])
def test_a_video_that_changes_while_it_is_read(tmp_path: Path, good: Path, change: Callable[[Path], None]) -> None:
    video, out = make_video(tmp_path / "changing.mp4", seconds=20, size="320x240"), tmp_path / "out"

    def change_it() -> None:
        while not list(out.glob(".changing.mp4*.partial")):
            time.sleep(0.001)
        change(video)

    changing = threading.Thread(target=change_it)
    changing.start()
    result = cache_frames({"changing.mp4": video, "good.mp4": good}, out, SMALL)
    changing.join()
    assert (result.done, result.exit_code()) == (["good.mp4"], 1)
    assert reasons_in(out / "failures.jsonl") == {"changing.mp4": "changed_while_reading"}
    assert sorted(path.name for path in out.iterdir()) == ["failures.jsonl", "good.mp4.frames"]


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
        result = cache_frames(videos, tmp_path / "out", SMALL)
        assert (result.done, result.again) == (["good.mp4"], {"damaged": 1})
        assert target.read_bytes() == whole


def test_a_cache_of_another_format_is_named_and_remade(tmp_path: Path, good: Path, start: Start) -> None:
    out, embedded, encoder = tmp_path / "out", tmp_path / "features", make_encoder(tmp_path / "encoder")
    shutil.copy(good, tmp_path / "other.mp4")
    videos = (good, tmp_path / "other.mp4")
    assert timesearch("frames", *videos, "--out", out, cwd=tmp_path).returncode == 0
    old = out / "good.mp4.frames"
    whole = old.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as current, zipfile.ZipFile(old, "w") as archive:
        for name in current.namelist():
            content = current.read(name)
            if name == "meta.json":
                content = json.dumps(json.loads(content) | {"version": 1}).encode()
            archive.writestr(name, content)
    embedding = start("features", out, "--out", embedded, "--model", encoder)
    embedding.join()
    assert embedding.exitcode == 1
    assert reasons_in(embedded / "failures.jsonl") == {"good.mp4": "outdated_cache"}
    message = f"{old} has format 1, and format {VERSION} is needed: run the stage 'frames' again to remake it"
    assert message in (embedded / "failures.jsonl").read_text()
    assert (embedded / "other.mp4.safetensors").is_file()
    remade = timesearch("frames", *videos, "--out", out, cwd=tmp_path)
    assert remade.returncode == 0
    assert "1 made (in place of 1 of another format), 1 up to date, 0 failed" in remade.stdout
    assert old.read_bytes() == whole


def test_two_videos_of_one_name_are_refused(tmp_path: Path, good: Path) -> None:
    twice = timesearch("frames", good, shutil.copytree(good.parent, tmp_path / "copy") / "good.mp4", cwd=tmp_path)
    assert twice.returncode == 2
    assert "would both become" in twice.stderr


def killed_at_random_moments(start: Start, command: Sequence[object], out: Path, kills: int, seed: int) -> list[int]:
    """Start over and kill, `kills` times over, then let the command complete; gives how many files each kill left.

    After a kill, each file is either whole or absent. The completed run leaves what a run without a kill leaves, and
    does not touch the files that were finished before.
    """

    def finish() -> float:
        started = time.monotonic()
        process = start(*command)
        process.join()
        assert process.exitcode == 0
        return time.monotonic() - started

    def state() -> dict[str, tuple[int, int]]:
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("[!.]*")}

    finish()
    expected = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.rmtree(out)
    whole_run = finish()
    moments, left = random.Random(seed), []
    for _ in range(5 * kills):
        shutil.rmtree(out)
        started, process = time.monotonic(), start(*command)
        process.join(moments.uniform(0, whole_run))
        process.kill()
        process.join()
        finished = state()
        if process.exitcode == -signal.SIGKILL:
            left.append(len(finished))
        else:
            whole_run = time.monotonic() - started  # it was over before its moment: the machine has become faster
        assert {name: (out / name).read_bytes() for name in finished} == {name: expected[name] for name in finished}
        finish()
        assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
        assert {name: state()[name] for name in finished} == finished, "what was finished was redone"
        if len(left) == kills:
            return left
    raise AssertionError(f"only {len(left)} of {kills} kills came before the end of a run of {whole_run:.1f} s")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of videos whose caches take a second or so."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(12):
        make_video(folder / f"{number}.mp4", "-g", 50, seconds=4 + number % 3, size="320x240")
    return folder


@pytest.mark.takes(15)
def test_frames_killed_at_random_moments_are_resumed(tmp_path: Path, start: Start, many: Path) -> None:
    command = ("frames", many, "--out", tmp_path / "out", "--workers", 2, "--params", tmp_path / "none.yaml")
    left = killed_at_random_moments(start, command, tmp_path / "out", kills=8, seed=1)
    assert len(set(left)) > 1, "the kills came at different states of the work"


@pytest.mark.takes(15)
def test_features_killed_at_random_moments_are_resumed(tmp_path: Path, start: Start, many: Path) -> None:
    frames, out = tmp_path / "frames", tmp_path / "out"
    cache_frames({video.name: video for video in many.iterdir()}, frames, SMALL.model_copy(update={"fps": 8.0}))
    encoder = make_encoder(tmp_path / "encoder")
    command = ("features", frames, "--out", out, "--workers", 2, "--model", encoder, "--params", tmp_path / "none.yaml")
    left = killed_at_random_moments(start, command, out, kills=8, seed=2)
    assert len(set(left)) > 1, "the kills came at different states of the work"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here (it needs root)")
    yield folder
    subprocess.run(["umount", folder], check=True)


def check_what_is_left(folder: Path) -> None:
    for path in folder.iterdir():
        (FrameCache if path.suffix == ".frames" else FeatureCache).open(path).verify()


def test_a_full_disk_is_named_and_corrupts_nothing(tmp_path: Path, good: Path, small_disk: Path) -> None:
    long = make_video(tmp_path / "long.mp4", seconds=20, size="320x240")
    done = timesearch("frames", good, long, "--out", small_disk / "out", "--workers", 1, cwd=tmp_path)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (small_disk / "out").iterdir()] == ["good.mp4.frames"]
    check_what_is_left(small_disk / "out")


def test_features_on_a_full_disk(
    tmp_path: Path, good: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames, out = tmp_path / "frames", small_disk / "out"
    cache_frames({f"{number}.mp4": good for number in range(9)}, frames, SMALL)
    (small_disk / "filler").write_bytes(bytes(240_000))
    with pytest.raises(SystemExit) as ended:
        main(["features", str(frames), "--out", str(out), "--model", str(make_encoder(tmp_path / "encoder"))])
    assert ended.value.code == 2
    assert "No space left on device" in capsys.readouterr().err
    assert 0 < len(list(out.iterdir())) < 9
    check_what_is_left(out)


def test_a_limit_on_the_size_of_files_corrupts_nothing(tmp_path: Path, good: Path) -> None:
    """What a full disk is to a user who may not mount one."""
    long = make_video(tmp_path / "long.mp4", seconds=20, size="320x240")
    arguments = ("frames", good, long, "--out", tmp_path / "out", "--workers", 1)
    limited = subprocess.run(
        [*TIMESEARCH, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (262_144, 262_144)),
    )
    assert limited.returncode == 2
    assert "File too large" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.mp4.frames"]
    done = timesearch(*arguments, cwd=tmp_path)
    assert "1 made, 1 up to date, 0 failed" in done.stdout
    check_what_is_left(tmp_path / "out")


def test_without_room_for_its_log_a_pass_judges_nothing(
    good: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    with pytest.raises(OSError, match="No space left for ffmpeg's log"):
        list(sample_jpegs(good, probe(good), (56, 56), SMALL))


def test_no_ffmpeg_is_left_behind(tmp_path: Path) -> None:
    video = make_video(tmp_path / "long.mp4", seconds=30, size="640x480")
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text()
    sampling = sample_jpegs(video, probe(video), (56, 56), SMALL)
    next(sampling)
    assert children.read_text() != before
    sampling.close()
    assert children.read_text() == before
