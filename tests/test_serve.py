"""The API behind the page, and what it refuses."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from players import MeanColour, Puppet, answer_turn, script, search_turn
from serving import Log, readers_of, running, until
from synthetic import ffmpeg, make_video

import timesearch.cli.inference as commands
from timesearch.cli import main
from timesearch.data.messages import Message, text_of
from timesearch.inference.ask import Asker
from timesearch.search.engine_openai import OpenAIPolicy
from timesearch.serve.api import address, listen, make_app
from timesearch.serve.guard import is_named
from timesearch.serve.videos import Videos
from timesearch.settings import Settings

MARKUP = "<img src=x onerror=document.title=1>"


pytestmark = pytest.mark.usefixtures("no_traceback")


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An hour of full HD, from ten seconds of it that are repeated: quickly made, and minutes of decoding."""
    folder = tmp_path_factory.mktemp("huge")
    clip = make_video(folder / "clip.mp4", "-crf", 40, seconds=10, size="1920x1080")
    ffmpeg("-stream_loop", 359, "-i", clip, "-c", "copy", folder / "huge.mp4")
    return folder / "huge.mp4"


@pytest.fixture(scope="module")
def site(footage: Path, huge: Path, server_log: Log, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server with a scripted policy, at a free port; its one folder holds a link to a video and a stranger."""
    root = tmp_path_factory.mktemp("serve")
    folder = root / "videos"
    folder.mkdir()
    (folder / "car.mp4").write_bytes((footage / "car-detection.mp4").read_bytes())
    (folder / "notes.mp4").write_text("no video")
    (folder / "huge.mp4").hardlink_to(huge)
    (root / "secret.mp4").write_text("secret")
    (folder / "link.mp4").symlink_to(root / "secret.mp4")
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    (folder / "key.txt").write_text("secret")
    settings = Settings.model_validate(
        {"frames": {"factor": 32, "min_pixels": 4096, "max_pixels": 4096}, "search": {"patch": 32, "max_turns": 4}}
    )
    turns = script(
        search_turn("red car", f"Look {MARKUP}", start_time=5, end_time=15, num_frames=3), answer_turn(MARKUP)
    )
    chosen = script(search_turn("red car", num_frames=1), answer_turn("B"))

    def speak(messages: Sequence[Message]) -> str:
        if any("FAIL" in text_of(message) for message in messages):
            raise ValueError("no such reply was foreseen")
        offered = any(f"B. {MARKUP}" in text_of(message) for message in messages)
        return (chosen if offered else turns)(messages)

    policy = Puppet(speak, encoded=True)
    app = make_app(Asker(settings, policy, MeanColour(), root / "cache"), policy, [folder], root / "uploads")
    with running(app) as address_of_it:
        yield address_of_it


def events_of(site: str, **asked: object) -> list[tuple[str, dict]]:
    response = httpx.post(f"{site}/api/ask", json=asked, timeout=120)
    assert response.headers["content-type"].startswith("text/event-stream")
    pairs = [event.split("\n") for event in response.text.strip().split("\n\n")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in pairs]


def test_a_question_streams_its_steps(site: str) -> None:
    listed = httpx.get(f"{site}/api/videos").json()
    assert [video["name"] for video in listed] == ["car.mp4", "huge.mp4", "notes.mp4"]
    events = dict(events_of(site, video=listed[0]["id"], question="What colour is the car?"))
    assert list(events)[-6:] == ["video", "preview", "turn", "found", "reanswer", "answer"]
    assert len(events["found"]["frames"]) == 3
    found = events["found"]["frames"][0]
    assert 5 <= found["seconds"] <= 15
    picture = httpx.get(f"{site}/api/frames/{events['video']['cache']}/{found['frame']}")
    assert picture.content[:2] == b"\xff\xd8"
    assert events["answer"]["predicted_answer"] == MARKUP


def test_what_is_no_video_ends_in_a_sentence(site: str) -> None:
    ((kind, said),) = events_of(site, video="0/notes.mp4", question="What?")[-1:]
    assert kind == "error"
    assert "is not a video file" in said["text"]


@pytest.mark.parametrize(
    "video",
    [
        *("0/../secret.mp4", "0/link.mp4", "0/key.txt", "0//etc/passwd", "9/car.mp4", "-2/car.mp4", "car.mp4", ""),
        *("0/", "0/%2e%2e/secret.mp4", "0/..%2Fsecret.mp4", "0/loop.mp4", "0/a\0b.mp4", "0/%00.mp4", "0/\ud83d.mp4"),
        *(f"0/{'a' * 300}.mp4", f"0/{'a/' * 5000}b.mp4", "9" * 5000 + "/car.mp4"),
    ],
)
def test_files_outside_the_folders_are_not_there(site: str, video: str) -> None:
    asked = json.dumps({"video": video, "question": "What?"})
    sent = {"content": asked, "headers": {"Content-Type": "application/json"}}
    assert httpx.post(f"{site}/api/ask", **sent).status_code == 404
    assert httpx.post(f"{site}/api/playable", **sent).status_code == 404
    named = quote(video.encode(errors="surrogatepass"))[:12_000]
    for route in ("video", "media", "picture"):
        assert raw(site, request_of(site, "GET", f"/api/{route}?video={named}".encode()))[0] == 404


def test_other_sites_and_other_names_are_refused(site: str) -> None:
    assert httpx.get(f"{site}/api/videos", headers={"Host": "evil.example"}).status_code == 400
    assert httpx.get(f"{site}/api/videos", headers={"Origin": "http://evil.example"}).status_code == 403
    foreign = {"Sec-Fetch-Site": "cross-site"}
    for mode, status in (("no-cors", 403), ("cors", 403), ("navigate", 200)):
        assert httpx.get(f"{site}/api/videos", headers={**foreign, "Sec-Fetch-Mode": mode}).status_code == status
    assert httpx.get(f"{site}/").headers["cross-origin-resource-policy"] == "same-origin"
    for path in ("..%2F..%2Fsecret", "x/99999999", "x/-1", "%2e%2e/0"):
        assert httpx.get(f"{site}/api/frames/{path}").status_code in (404, 422)


HERE = socket.gethostname().lower()


@pytest.mark.parametrize(
    ("bound", "named", "strange"),
    [
        (
            "127.0.0.1",
            ["127.0.0.1:8780", "localhost", "LOCALHOST:1", "[::1]:8780"],
            [
                "evil.example",
                "10.0.0.7:8780",
                "localhost.evil.example",
                f"x.{HERE}",
                "x@localhost",
                "",
                "[::1",
                "[1:2]",
            ],
        ),
        (
            "0.0.0.0",
            ["10.0.0.7:8780", "[fe80::1]:8780", "0.0.0.0:8780", HERE, f"{HERE}:8780", "localhost"],
            ["evil.example", f"{HERE}.evil.example", "10.0.0.7.evil.example", "10.0.0.7@evil.example", ""],
        ),
        ("box.example", ["box.example:8780", "Box.Example"], ["evil.example", "10.0.0.7", "a.box.example"]),
    ],
)
def test_a_request_must_name_this_machine(bound: str, named: list[str], strange: list[str]) -> None:
    assert [header for header in named if not is_named(header, bound)] == []
    assert [header for header in strange if is_named(header, bound)] == []


def test_a_server_at_every_address_answers_there_and_to_no_foreign_name(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    policy = Puppet(script(answer_turn()))
    app = make_app(Asker(Settings(), policy, MeanColour(), tmp_path), policy, [], tmp_path / "uploads", "0.0.0.0")
    for base, status in (("http://10.0.0.7:8780", 200), (address("0.0.0.0", 8780), 200), ("http://evil.example", 400)):
        client = TestClient(app, base_url=base)
        assert client.get("/api/videos").status_code == status
        assert client.get("/api/videos", headers={"Origin": "http://evil.example"}).status_code in (400, 403)


def test_what_keeps_it_from_serving_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = OpenAIPolicy(["http://127.0.0.1:1/v1"], "tiny", retry_for=0.1)
    asker = Asker(Settings(), policy, MeanColour(), tmp_path)
    monkeypatch.setattr(commands, "_open_asker", lambda *_: nullcontext((asker, policy)))
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        for options, code, says in (
            (["--port", "0"], 75, "no policy server at http://127.0.0.1:1/v1"),
            (["--port", port], 2, f"cannot listen at 127.0.0.1, port {port} (address already in use)"),
            ([str(tmp_path / "absent")], 2, "absent is no folder of videos that can be read"),
            ([str(tmp_path / ("a" * 300))], 2, "File name too long"),
            ([__file__], 2, "Not a directory"),
            (["--host", "203.0.113.1"], 2, "cannot listen at 203.0.113.1"),
            (["--host", "nowhere.invalid"], 2, "cannot listen at nowhere.invalid"),
        ):
            with pytest.raises(SystemExit) as ended:
                main(["serve", "--cache", str(tmp_path), *options])
            said = capsys.readouterr()
            assert (ended.value.code, said.out) == (code, "")
            assert len(said.err.strip().splitlines()) == 1
            assert says in said.err


def test_a_dropped_video_can_be_asked_about(site: str, footage: Path) -> None:
    body = (footage / "bottle-detection.mp4").read_bytes()
    dropped = httpx.put(f"{site}/api/videos/..%5C my bottle.mp4", content=body).json()
    assert dropped["name"] == "my bottle.mp4"
    assert httpx.put(f"{site}/api/videos/page.html", content=b"<script>").status_code == 415
    kinds = [kind for kind, _ in events_of(site, video=dropped["id"], question="What is it?")]
    assert kinds[-1] == "answer"


def test_a_dropped_video_never_takes_the_place_of_another(site: str) -> None:
    def drop(name: str, content: bytes) -> str:
        return httpx.put(f"{site}/api/videos/{name}", content=content).raise_for_status().json()["name"]

    long = "ä" * 125 + ".mp4"  # 254 bytes
    names = [drop("a b.mp4", b"1"), drop("a_b.mp4", b"2"), drop("a b.mp4", b"3"), drop(long, b"4"), drop(long, b"5")]
    assert names == ["a b.mp4", "a_b.mp4", "a b (2).mp4", long, "ä" * 123 + " (2).mp4"]
    assert [drop("a b.mp4", b"3"), drop("a_b.mp4", b"2")] == ["a b (2).mp4", "a_b.mp4"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(lambda number: drop("x.mp4", b"%d" % (number % 4)), range(16)))
    assert set(at_once) == {"x.mp4", "x (2).mp4", "x (3).mp4", "x (4).mp4"}
    listed = {video["name"]: video["id"] for video in httpx.get(f"{site}/api/videos").json()}
    assert set(names) | set(at_once) <= set(listed)


def test_files_of_any_name_are_offered_and_found(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    (folder / "deep" / "er").mkdir(parents=True)
    for name in (b"caf\xe9.mp4", b"100%25.mp4", b"new\nline.webm", b"deep/er/UP.MP4", b"?#&.mkv", b"tape.vob"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(name)
    (folder / "folder.mp4").mkdir()
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    os.mkfifo(folder / "pipe.mp4")
    videos = Videos([folder, tmp_path / "absent"], tmp_path / "uploads")
    offered = json.loads(json.dumps(videos.all(), ensure_ascii=False).encode())
    assert [video["name"] for video in offered] == sorted(
        ["caf\ufffd.mp4", "100%25.mp4", "new\nline.webm", "deep/er/UP.MP4", "?#&.mkv", "tape.vob"]
    )
    for video in offered:
        relative = os.fsencode(videos.path(video["id"]).relative_to(folder.resolve()))
        assert videos.path(video["id"]).read_bytes() == relative


def raw(site: str, request: bytes, wait: bool = True) -> tuple[int, bytes]:
    """Send bytes as they are; status and body of what comes back until the server closes (or all is there)."""
    host, _, port = site.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        with contextlib.suppress(ConnectionError):  # it may have heard enough
            connection.sendall(request)
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(2**16):
                received += piece
                head, _, body = received.partition(b"\r\n\r\n")
                announced = re.search(rb"content-length: (\d+)", head.lower())
                if not wait and announced and len(body) >= int(announced[1]):
                    break
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


def request_of(site: str, method: str, target: bytes, body: bytes = b"", *headers: bytes) -> bytes:
    named = b"Host: " + site.removeprefix("http://").encode()
    length = b"Content-Length: %d" % len(body)
    return b"\r\n".join(
        [method.encode() + b" " + target + b" HTTP/1.1", named, b"Connection: close", length, *headers, b"", body]
    )


JSON = b"Content-Type: application/json"


@pytest.mark.parametrize(
    ("method", "target", "body", "status"),
    [
        ("GET", b"/nothing", b"", 404),
        ("GET", b"/api/videos/", b"", 404),
        ("GET", b"/%2e%2e/%2e%2e/etc/passwd", b"", 404),
        ("GET", b"/../../etc/passwd", b"", 404),
        ("GET", b"/page/%00", b"", 404),
        ("GET", b"/page/page.js%2f..", b"", 404),
        ("GET", b"/page/index.html", b"", 404),
        ("GET", b"/api/video", b"", 422),
        ("GET", b"/api/media?video=" + b"a" * 21_000, b"", 422),
        ("GET", b"/api/media?video=0/notes.mp4", b"", 404),
        ("GET", b"/api/picture?video=0/car.mp4&seconds=NaN", b"", 422),
        ("GET", b"/api/picture?video=0/car.mp4&seconds=-1", b"", 422),
        ("GET", b"/api/picture?video=0/car.mp4&seconds=1e300", b"", 422),
        ("GET", b"/api/picture?video=0/car.mp4&width=100000", b"", 422),
        ("GET", b"/api/picture?video=0/notes.mp4", b"", 404),
        ("GET", b"/api/played/..%2fcar", b"", 404),
        ("GET", b"/api/played/" + b"0" * 24, b"", 404),
        ("GET", b"/api/search?query=", b"", 422),
        ("GET", b"/api/search?query=a%00", b"", 422),
        ("GET", b"/api/search?query=" + b"a" * 600, b"", 422),
        ("POST", b"/api/playable", b"[]", 422),
        ("POST", b"/api/playable", b'{"video": "9/car.mp4"}', 404),
        ("GET", b"/" + b"a" * 15_000, b"", 404),
        ("GET", b"/api/frames/" + b"a" * 10_000 + b"/1", b"", 404),
        ("GET", b"/api/frames/%00/1", b"", 404),
        ("GET", b"/api/frames/%ED%A0%80/1", b"", 404),
        ("GET", b"/api/frames/" + b"0" * 24 + b"/1", b"", 404),
        ("GET", b"/api/frames/x/" + b"9" * 5000, b"", 422),
        ("GET", b"/api/frames/x/1e5", b"", 422),
        ("GET", b"/api/frames/x/NaN", b"", 422),
        ("GET", b"/api/frames/x/-1", b"", 404),
        ("POST", b"/api/videos", b"", 405),
        ("DELETE", b"/api/videos/a.mp4", b"", 405),
        ("OPTIONS", b"/api/ask", b"", 405),
        ("TRACE", b"/", b"", 405),
        ("GET", b"/api/ask", b"", 405),
        ("PUT", b"/api/videos/%00.mp4", b"x", 422),
        ("PUT", b"/api/videos/a%0ab.mp4", b"x", 422),
        ("PUT", b"/api/videos/%FF.mp4", b"x", 422),
        ("PUT", b"/api/videos/" + b"a" * 252 + b".mp4", b"x", 422),
        ("PUT", b"/api/videos/empty.mp4", b"", 422),
        ("PUT", b"/api/videos/.mp4", b"x", 415),
        ("PUT", b"/api/videos/..", b"x", 415),
        ("PUT", b"/api/videos/a.mp4%00.txt", b"x", 422),
        ("POST", b"/api/ask", b"", 422),
        ("POST", b"/api/ask", b"question", 422),
        ("POST", b"/api/ask", b"\xff\xfe\xfd", 422),
        ("POST", b"/api/ask", b"[" * 100_000, 422),
        ("POST", b"/api/ask", b'{"video": ' + b"9" * 100_000 + b"}", 422),
        ("POST", b"/api/ask", b"[]", 422),
        ("POST", b"/api/ask", b'{"video": "0/car.mp4"}', 422),
        ("POST", b"/api/ask", b'{"video": "0/car.mp4", "question": NaN}', 422),
        ("POST", b"/api/ask", b'{"video": "0/car.mp4", "question": "\\ud83d"}', 422),
        ("POST", b"/api/ask", b'{"video": "0/car.mp4", "question": "a\\u0000b"}', 422),
        ("POST", b"/api/ask", b'{"video": "0/car.mp4", "question": " "}', 422),
        ("POST", b"/api/ask", b'{"video": "0/car.mp4", "question": "%s"}' % (b"a" * 5000), 422),
        ("POST", b"/api/ask", b'{"video": "0/car.mp4", "question": "a", "options": [NaN, Infinity]}', 422),
        ("POST", b"/api/ask", b'{"video": "0/car.mp4", "question": "a", "options": ["\\udc80"]}', 422),
        ("POST", b"/api/ask", b'{"video": "0/car.mp4", "question": "a", "options": [%s"a"]}' % (b'"a",' * 26), 422),
        ("POST", b"/api/ask", b'{"video": "0/car.mp4", "question": "a", "options": ["%s"]}' % (b"a" * 2000), 422),
        ("POST", b"/api/ask", b'{"video": NaN, "question": "a"}', 422),
        ("POST", b"/api/ask", b'{"video": "\\u0000", "question": "a"}', 404),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_in_a_sentence(
    site: str, method: str, target: bytes, body: bytes, status: int
) -> None:
    answered, said = raw(site, request_of(site, method, target, body, JSON))
    assert answered == status
    assert 10 < len(json.loads(said)["detail"]) <= 500


def test_a_body_is_json_by_its_type_and_refused_unread_where_it_is_too_long(site: str) -> None:
    asked = b'{"video": "0/none.mp4", "question": "a"}'
    for kind, status in (
        (b"application/json; charset=utf-8", 404),
        (b"application/problem+json", 404),
        (b"text/plain", 415),
        (b"application/x-www-form-urlencoded", 415),
        (b"application/json" + b"x" * 5000, 415),
        (b"", 415),
    ):
        assert raw(site, request_of(site, "POST", b"/api/ask", asked, b"Content-Type: " + kind))[0] == status
    for method, target, announced in (
        ("POST", b"/api/ask", b"20000000"),
        ("POST", b"/api/ask", b"9" * 18),
        ("PUT", b"/api/videos/a.mp4", b"99999999999"),
    ):
        head = request_of(site, method, target, b"", JSON).replace(
            b"Content-Length: 0", b"Content-Length: " + announced
        )
        status, said = raw(site, head, wait=False)  # no byte of the body is sent
        assert (status, b"larger than" in said) == (413, True)
    pieces = b"%x\r\n%s\r\n" % (2**16, b"a" * 2**16) * 9 + b"0\r\n\r\n"
    head = request_of(site, "POST", b"/api/ask", b"", JSON).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    assert raw(site, head + pieces)[0] == 413
    choices = json.dumps({"video": "0/car.mp4", "question": "a", "options": ["a"] * 4_000_000})
    answer = httpx.post(f"{site}/api/ask", content=choices, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_an_upload_that_is_cut_off_leaves_nothing(site: str) -> None:
    head = request_of(site, "PUT", b"/api/videos/cut.mp4", b"").replace(b"Content-Length: 0", b"Content-Length: 99999")
    host, _, port = site.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + b"a" * 5000)
    assert "cut.mp4" not in [video["name"] for video in httpx.get(f"{site}/api/videos").json()]


REFUSED = (400, 403, 404, 405, 411, 413, 415, 422, 431, 501)
values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(10**30), 10**30) | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
segments = st.sampled_from(
    [
        b"api",
        b"videos",
        b"ask",
        b"frames",
        b"media",
        b"picture",
        b"page",
        b"page.js",
        b"..",
        b"%2e%2e",
        b"%00",
        b"a.mp4",
    ]
)


@given(question=values, video=values | st.sampled_from(["0/car.mp4", "0/notes.mp4"]), options=values, more=values)
@settings(max_examples=60, deadline=None)
def test_any_json_gets_an_answer_or_a_sentence(
    site: str, question: object, video: object, options: object, more: object
) -> None:
    for asked in (more, {"video": video, "question": question, "options": options}):
        body = json.dumps(asked).encode()
        status, said = raw(site, request_of(site, "POST", b"/api/ask", body, JSON))
        assert status in (200, 404, 422)
        assert status == 200 or json.loads(said)["detail"]


@given(
    method=st.sampled_from(["GET", "PUT", "POST", "DELETE", "OPTIONS", "PATCH", "TRACE", "FOO", "get"]),
    path=st.lists(
        segments | st.binary(max_size=12).map(lambda data: quote(data).encode()) | st.binary(max_size=6), max_size=5
    ),
    body=st.binary(max_size=300),
    header=st.binary(max_size=40) | st.sampled_from([JSON, b"Expect: 100-continue"]),
)
@settings(max_examples=150, deadline=None)
def test_any_request_gets_an_answer(site: str, method: str, path: list[bytes], body: bytes, header: bytes) -> None:
    status, _ = raw(site, request_of(site, method, b"/" + b"/".join(path), body, header))
    assert status in (200, 100, *REFUSED)


def test_an_episode_that_fails_unforeseen_ends_in_a_sentence(site: str, server_log: Log) -> None:
    before = len(server_log.records)
    ((kind, said),) = events_of(site, video="0/car.mp4", question="FAIL?")[-1:]
    assert (kind, "ValueError" in said["text"]) == ("error", True)
    (record,) = server_log.records[before:]
    assert "no such reply was foreseen" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_long_video_is_prepared_once_and_holds_up_nobody_else(site: str) -> None:
    def answered() -> float:
        began = time.perf_counter()
        assert events_of(site, video="0/car.mp4", question="What colour is the car?")[-1][0] == "answer"
        return time.perf_counter() - began

    answered()
    idle = statistics.median(answered() for _ in range(5))
    with contextlib.ExitStack() as leaving:
        client = leaving.enter_context(httpx.Client(timeout=60, limits=httpx.Limits(max_connections=None)))
        asked = {"video": "0/huge.mp4", "question": "What?"}
        streams = [leaving.enter_context(client.stream("POST", f"{site}/api/ask", json=asked)) for _ in range(12)]
        heard = [stream.iter_lines() for stream in streams]  # kept, for a stream ends with what reads it
        for lines in heard:
            assert any("reading huge.mp4" in line for line in lines)
        assert until(lambda: len(readers_of("huge.mp4")) == 1)
        assert httpx.put(f"{site}/api/videos/meanwhile.mp4", content=b"x" * 2**22, timeout=20).status_code == 200
        busy = statistics.median(answered() for _ in range(5))
        assert busy < 10 * idle  # it was 44 seconds to a tenth of one
        for stream in streams[1:]:
            stream.close()
        assert len(readers_of("huge.mp4")) == 1
    assert until(lambda: not readers_of("huge.mp4"))
