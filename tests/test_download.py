"""Downloads from a real HTTP server that breaks off, refuses, and changes its files."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
from synthetic import make_video

from timesearch.base.errors import ItemError
from timesearch.data.samples import Sample
from timesearch.settings import Download, Frames
from timesearch.video import download as download_module
from timesearch.video import frames as frames_module
from timesearch.video.download import TRY_AGAIN, download_videos, fetch
from timesearch.video.subtitles import find_subtitles

BODY = random.Random(0).randbytes(300_000)


@dataclass
class Host:
    """A server's files and moods; `breaks` cuts that many answers short, `busy` answers 503 that many times."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    breaks: int = 0
    busy: int = 0
    moved: dict[str, str] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    sent: int = 0


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    state = Host()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            state.requests[self.command] += 1
            body = state.files.get(self.path.lstrip("/"))
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if self.path.lstrip("/") in state.moved:
                self.send_response(302)
                self.send_header("Location", state.moved[self.path.lstrip("/")])
                self.send_header("Content-Length", "0")
                return self.end_headers()
            if self.path == "/secret.mp4":
                return self.plain(403)
            if state.busy and self.command == "GET":
                state.busy -= 1
                return self.plain(503)
            if body is None:
                return self.plain(404)
            first, last = 0, len(body) - 1
            if wanted and state.ranges:
                first, last = int(wanted[1]), min(int(wanted[2] or last), last)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
            else:
                self.send_response(200)
            self.send_header("ETag", hashlib.sha256(body).hexdigest()[:8])
            self.send_header("Accept-Ranges", "bytes" if state.ranges else "none")
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            part = body[first : last + 1]
            if self.command == "GET":
                if state.breaks and len(part) > 100:
                    state.breaks -= 1
                    part, self.close_connection = part[: len(part) // 2], True
                state.sent += len(part)
                self.wfile.write(part)

        def plain(self, code: int) -> None:
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(download_module, "_CHUNK", 2**16)
    monkeypatch.setattr(download_module, "_archives", {})
    yield state
    server.shutdown()


def sample(video: str, source: str | None, sha256: str | None = None) -> Sample:
    return Sample(id=video, video=video, source=source, sha256=sha256, question="?")


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("ranges", [True, False])
def test_breaks_and_overload_are_outlived(host: Host, tmp_path: Path, ranges: bool) -> None:
    host.files["a.mp4"], host.ranges, host.breaks, host.busy = BODY, ranges, 1, 1
    fetch(f"{host.url}/a.mp4", tmp_path / "a.mp4", digest(BODY))
    assert (tmp_path / "a.mp4").read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_download_goes_on_where_it_broke_off(host: Host, tmp_path: Path) -> None:
    host.files["a.mp4"] = BODY
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download_module, "_append", cut_off_after(200_000))
        with pytest.raises(KeyboardInterrupt):
            fetch(f"{host.url}/a.mp4", tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists()
    host.sent = 0
    fetch(f"{host.url}/a.mp4", tmp_path / "a.mp4", digest(BODY))
    assert (tmp_path / "a.mp4").read_bytes() == BODY
    assert host.sent < 150_000


def test_a_source_that_changed_in_between_is_not_spliced(host: Host, tmp_path: Path) -> None:
    host.files["a.mp4"] = BODY
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download_module, "_append", cut_off_after(200_000))
        with pytest.raises(KeyboardInterrupt):
            fetch(f"{host.url}/a.mp4", tmp_path / "a.mp4")
    host.files["a.mp4"] = BODY[::-1]
    fetch(f"{host.url}/a.mp4", tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == BODY[::-1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def cut_off_after(count: int, damage: bytes = b"") -> object:
    def append(remote: io.BufferedIOBase, unfinished: Path) -> None:
        unfinished.write_bytes(remote.read(count - len(damage)) + damage)
        raise KeyboardInterrupt

    return append


@pytest.mark.parametrize("damage", [b"?", BODY + BODY], ids=["another byte", "too many bytes"])
def test_a_damaged_part_is_thrown_away_and_the_rest_of_the_run_mends_it(
    host: Host, tmp_path: Path, damage: bytes
) -> None:
    host.files["a.mp4"] = BODY
    one = sample("a.mp4", f"{host.url}/a.mp4", digest(BODY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download_module, "_append", cut_off_after(200_000, damage))
        with pytest.raises(KeyboardInterrupt):
            download_videos([one], tmp_path, Download())
    (part,) = tmp_path.glob(".*.download")
    assert part.read_bytes().endswith(damage)
    assert download_videos([one], tmp_path, Download()).done == ["a.mp4"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.mp4": BODY}


def test_a_source_that_is_not_what_the_sample_says_leaves_nothing(host: Host, tmp_path: Path) -> None:
    host.files |= {"cut.ts": BODY[: 188 * 700], "good.mp4": BODY}  # an MPEG-TS that ends early is a video all the same
    samples = [
        sample("cut.ts", f"{host.url}/cut.ts", digest(BODY)),
        sample("good.mp4", f"{host.url}/good.mp4", digest(BODY)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download_module, "_append", cut_off_after(50_000))
        with pytest.raises(KeyboardInterrupt):
            download_videos(samples, tmp_path, Download(workers=1))
    for _ in range(2):
        result = download_videos(samples, tmp_path, Download(retries=0))
        assert [(failure.item, failure.reason) for failure in result.failures] == [("cut.ts", "checksum_mismatch")]
        assert result.exit_code() == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["failures.jsonl", "good.mp4"]


def test_parts_of_several_videos_are_told_apart(host: Host, tmp_path: Path) -> None:
    """One name begins as the other does: what is left of one is no business of the other."""
    long = "a.mp4" + "視" * 70
    host.files = {"1": BODY, "2": BODY[::-1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download_module, "_append", cut_off_after(200_000))
        with pytest.raises(KeyboardInterrupt):
            fetch(f"{host.url}/2", tmp_path / f"{long}.mp4")
    (part,) = tmp_path.iterdir()
    for name in ("a.mp4", f"{long}.mkv"):
        fetch(f"{host.url}/1", tmp_path / name)
    assert part.exists()
    host.sent = 0
    fetch(f"{host.url}/2", tmp_path / f"{long}.mp4")
    assert host.sent < 150_000
    assert (tmp_path / f"{long}.mp4").read_bytes() == BODY[::-1]
    assert not part.exists()


def test_each_failure_has_its_reason(host: Host, tmp_path: Path) -> None:
    host.files |= {"good.mp4": BODY, "other.mp4": BODY}
    samples = [
        sample("good.mp4", f"{host.url}/good.mp4", digest(BODY)),
        sample("other.mp4", f"{host.url}/other.mp4", "0" * 64),
        sample("none.mp4", f"{host.url}/none.mp4"),
        sample("secret.mp4", f"{host.url}/secret.mp4"),
        sample("gone.mp4", str(tmp_path / "gone.mp4")),
        sample("nowhere.mp4", None),
        sample("other-there.mp4", None, digest(BODY)),
        sample("odd.mp4", "gopher-nonesuch://x/y"),
        sample("../climbs.mp4", f"{host.url}/good.mp4"),
        sample("member.mp4", f"tar://member.mp4::{host.url}/good.mp4"),
    ]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/other-there.mp4").write_bytes(b"another video")
    result = download_videos(samples, tmp_path / "out", Download(retries=0))
    assert result.done == ["good.mp4"]
    assert result.exit_code() == 1
    listed = [json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()]
    assert listed == [asdict(failure) for failure in sorted(result.failures, key=lambda failure: failure.item)]
    assert {failure.item: failure.reason for failure in result.failures} == {
        "other.mp4": "checksum_mismatch",
        "none.mp4": "not_found",
        "secret.mp4": "forbidden",
        "gone.mp4": "not_found",
        "nowhere.mp4": "no_source",
        "other-there.mp4": "no_source",
        "odd.mp4": "download_failed",
        "../climbs.mp4": "unsafe_path",
        "member.mp4": "not_an_archive",
    }
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["failures.jsonl", "good.mp4", "other-there.mp4"]


def test_a_server_that_stays_down_is_named(tmp_path: Path) -> None:
    with pytest.raises(ItemError) as caught:
        fetch("http://127.0.0.1:9/a.mp4", tmp_path / "a.mp4", retries=1)
    assert caught.value.reason == "unreachable"
    assert "tried 2 times" in str(caught.value)


def test_a_model_hub_that_is_away_is_unreachable(tmp_path: Path) -> None:
    """In a process of its own, as the hub's address is read when its library is imported."""
    code = (
        f"from timesearch.video.download import fetch; fetch('hf://datasets/a/b/c.mp4', {str(tmp_path)!r}, retries=1)"
    )
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "ItemError: hf://datasets/a/b/c.mp4: [Errno 111] Connection refused (tried 2 times)" in done.stderr


@pytest.mark.parametrize(("source", "status"), [("http://127.0.0.1:9/a.mp4", 75), ("/no/a.mp4", 0)])
def test_an_unreachable_source_asks_for_another_try_of_who_makes_one(tmp_path: Path, source: str, status: int) -> None:
    from typer.testing import CliRunner

    from timesearch.cli import data
    from timesearch.cli.app import app

    assert data.download
    for split in ("train", "test"):
        row = sample(f"{split}.mp4", source).model_copy(update={"id": split})
        (tmp_path / f"{split}.jsonl").write_text(row.model_dump_json() + "\n")
    params = tmp_path / "params.yaml"
    paths = {"train_samples": "train.jsonl", "test_samples": "test.jsonl", "videos": "videos"}
    values = {
        "paths": {name: str(tmp_path / path) for name, path in paths.items()},
        "download": {"retries": 0},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
    }
    params.write_text(json.dumps(values))
    command = ["download", "--keep-going", "--params", str(params)]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert CliRunner(env={TRY_AGAIN: "1"}).invoke(app, command).exit_code == status


def test_what_is_there_is_not_fetched_again(host: Host, tmp_path: Path) -> None:
    host.files["a.mp4"] = BODY
    samples = [sample("a.mp4", f"{host.url}/a.mp4", digest(BODY)), sample("a.mp4", f"{host.url}/a.mp4")]
    assert download_videos(samples, tmp_path, Download()).done == ["a.mp4"]
    before = sum(host.requests.values())
    assert download_videos(samples, tmp_path, Download()).skipped == ["a.mp4"]
    assert sum(host.requests.values()) == before
    (tmp_path / "a.mp4").write_bytes(BODY[:-1] + b"?")
    result = download_videos(samples, tmp_path, Download())
    assert (result.done, result.again) == (["a.mp4"], {"of another SHA-256": 1})
    assert (tmp_path / "a.mp4").read_bytes() == BODY


@pytest.mark.parametrize("names", [["v.tar"], ["v.tar.part.aa", "v.tar.part.ab", "v.tar.part.ac"], ["v.tar.001"]])
def test_a_video_in_an_archive_in_parts(host: Host, tmp_path: Path, names: list[str]) -> None:
    packed = io.BytesIO()
    members = {f"videos/{number}.mp4": random.Random(number).randbytes(200_000 + number) for number in range(6)}
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, body in members.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    whole = packed.getvalue()
    share = -(-len(whole) // len(names))
    host.files = {name: whole[index * share : (index + 1) * share] for index, name in enumerate(names)}
    base = f"{host.url}/{names[0]}"
    samples = [
        sample(name, f"tar://{name}::{base}", digest(members[name])) for name in ("videos/1.mp4", "videos/3.mp4")
    ]
    assert len(download_videos(samples, tmp_path, Download()).done) == 2
    assert all((tmp_path / one.video).read_bytes() == members[one.video] for one in samples)
    assert host.sent < len(whole)
    (failure,) = download_videos([sample("7.mp4", f"tar://7.mp4::{base}")], tmp_path, Download()).failures
    assert failure.reason == "not_found"


def test_local_files_and_generated_ones(tmp_path: Path) -> None:
    (tmp_path / "in.mp4").write_bytes(BODY)
    samples = [
        sample("plain.mp4", str(tmp_path / "in.mp4"), digest(BODY)),
        sample("url.mp4", (tmp_path / "in.mp4").as_uri(), digest(BODY)),
        sample("memory.mp4", "memory://kept.mp4", digest(BODY)),
    ]
    import fsspec

    fsspec.filesystem("memory").pipe("/kept.mp4", BODY)
    assert len(download_videos(samples, tmp_path / "out", Download()).done) == 3
    assert all((tmp_path / "out" / one.video).read_bytes() == BODY for one in samples)


def test_one_video_however_it_is_spelled(host: Host, tmp_path: Path) -> None:
    host.files["a.mp4"] = BODY
    spellings = ("a.mp4", "./a.mp4", "x/../a.mp4", ".//a.mp4")
    samples = [sample(name, f"{host.url}/a.mp4", digest(BODY)) for name in spellings]
    assert download_videos(samples, tmp_path, Download(workers=4)).done == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == BODY


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_video(tmp_path_factory.mktemp("video") / "a.mp4").read_bytes()


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (b"<!DOCTYPE html><title>Virus scan warning</title>", "not_a_video"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "not_a_video"),
        (b'{"error": "quota"}', "not_a_video"),
        (b"", "empty_file"),
        (None, "truncated"),
    ],
)
def test_what_is_no_whole_video_is_none_and_fetched_again(
    host: Host, tmp_path: Path, video: bytes, page: bytes | None, reason: str
) -> None:
    host.files["a.mp4"] = video[: len(video) // 2] if page is None else page
    one = [sample("a.mp4", f"{host.url}/a.mp4")]
    (failure,) = download_videos(one, tmp_path, Download()).failures
    assert failure.reason == reason
    assert [path.name for path in tmp_path.iterdir()] == ["failures.jsonl"]
    (tmp_path / "a.mp4").write_bytes(host.files["a.mp4"])  # as an earlier version left it
    host.files["a.mp4"] = video
    assert download_videos(one, tmp_path, Download()).again == {"broken": 1}
    assert (tmp_path / "a.mp4").read_bytes() == video
    assert download_videos(one, tmp_path, Download()).skipped == ["a.mp4"]


def test_what_the_frames_find_broken_is_fetched_again(host: Host, tmp_path: Path, video: bytes) -> None:
    host.files["a.mp4"] = video
    one = [sample("a.mp4", f"{host.url}/a.mp4")]
    download_videos(one, tmp_path, Download())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames_module, "make_frame_cache", broken)
        assert frames_module.cache_frames({"a.mp4": tmp_path / "a.mp4"}, tmp_path / "frames", Frames()).failures
    assert download_videos(one, tmp_path, Download()).again == {"broken": 1}
    assert download_videos(one, tmp_path, Download()).skipped == ["a.mp4"]


def broken(*_: object, **__: object) -> int:
    raise ItemError("it ends after 3 frames", reason="truncated")


def test_a_signed_address_goes_out_as_it_was_given(host: Host, tmp_path: Path) -> None:
    signed = "a%27b.mp4?Credential=K%2F20250101&Signature=ab%2Bc%3D%3D"
    host.files |= {signed: BODY, "a%20%C3%A4.mp4": BODY}
    fetch(f"{host.url}/{signed}", tmp_path / "a.mp4", digest(BODY))
    fetch(f"{host.url}/a ä.mp4", tmp_path / "b.mp4", digest(BODY))
    host.moved["old.mp4"] = f"{host.url}/{signed}"
    fetch(f"{host.url}/old.mp4", tmp_path / "c.mp4", digest(BODY))


SRT = "1\n00:00:01,000 --> 00:00:02,000\nHello.\n"


def test_subtitles_come_with_their_videos(host: Host, tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mp4", seconds=1)
    local = tmp_path / "local"
    local.mkdir()
    for name in ("talk.mp4", "mute.mp4"):
        (local / name).write_bytes(clip.read_bytes())
    (local / "talk.en.srt").write_text(SRT)
    (local / "talk.info.json").write_text("{}")
    host.files = {
        "a.mp4": clip.read_bytes(),
        "a%20words.srt": SRT.encode(),
        "b.vtt?signed=1": b"WEBVTT\n\n00:01.000 --> 00:02.000\nHi\n",
        "page.srt": b"<html>not found</html>",
    }
    url = host.url

    def row(video: str, source: str, **meta: object) -> Sample:
        return Sample(id=video, video=video, source=source, question="?", meta=meta)

    samples = [
        row("x/talk.mp4", str(local / "talk.mp4")),
        row("far.mp4", (local / "talk.mp4").as_uri()),
        row("mute.mp4", str(local / "mute.mp4")),
        row("a.mp4", f"{url}/a.mp4", subtitle_source=f"{url}/a words.srt"),
        row("b.mp4", f"{url}/a.mp4", subtitle_source=f"{url}/b.vtt?signed=1", subtitle_path="subtitles/b_en.vtt"),
        row("c.mp4", f"{url}/a.mp4", subtitle_source=f"{url}/page.srt"),
        row("d.mp4", f"{url}/a.mp4", subtitle_source=f"{url}/none.srt"),
        row("e.mp4", f"{url}/a.mp4", subtitle_source=f"{url}/b.vtt", subtitle_path="../out.vtt"),
        row("f.mp4", f"{url}/a.mp4", subtitle_source=7, subtitle_path="given.json"),
    ]
    out = tmp_path / "videos"
    result = download_videos(samples, out, Download(retries=0))
    failed = {failure.item: failure.reason for failure in result.failures}
    assert failed == {"c.srt": "bad_subtitles", "d.srt": "not_found", "../out.vtt": "unsafe_path"}
    words = ["x/talk.en.srt", "far.en.srt", "a.srt", "subtitles/b_en.vtt"]
    videos = sorted(sample.video for sample in samples)
    assert sorted(result.done) == sorted([*words, *videos])
    assert sorted(
        str(path.relative_to(out)) for path in out.rglob("*") if path.suffix in (".srt", ".vtt", ".json")
    ) == (sorted(words))
    assert not (tmp_path / "out.vtt").exists()
    assert (out / "x" / "talk.en.srt").read_text() == SRT
    host.files["page.srt"] = SRT.encode()
    again = download_videos(samples, out, Download(retries=0))
    assert again.done == ["c.srt"]
    assert find_subtitles(out / "a.mp4") == out / "a.srt"
