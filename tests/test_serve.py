"""The local page: its API, what it refuses, and a search watched in a real browser."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from players import MeanColour, Puppet, answer_turn, script, search_turn

import timesearch.cli.inference as commands
from timesearch.cli import main
from timesearch.inference.ask import Asker
from timesearch.messages import Message, text_of
from timesearch.search.engine_openai import OpenAIPolicy
from timesearch.serve.api import address, is_named, listen, make_app
from timesearch.settings import Settings

CHROMIUM = Path("/usr/bin/chromium")
MARKUP = "<img src=x onerror=document.title=1>"


@pytest.fixture(scope="module")
def site(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server with a scripted policy, at a free port; its one folder holds a link to a video and a stranger."""
    import uvicorn

    root = tmp_path_factory.mktemp("serve")
    folder = root / "videos"
    folder.mkdir()
    (folder / "car.mp4").write_bytes((footage / "car-detection.mp4").read_bytes())
    (folder / "notes.mp4").write_text("no video")
    (root / "secret.mp4").write_text("secret")
    (folder / "link.mp4").symlink_to(root / "secret.mp4")
    (folder / "key.txt").write_text("secret")
    settings = Settings.model_validate(
        {"frames": {"factor": 32, "min_pixels": 4096, "max_pixels": 4096}, "search": {"patch": 32, "max_turns": 4}}
    )
    turns = script(
        search_turn("red car", f"Look {MARKUP}", start_time=5, end_time=15, num_frames=3), answer_turn(MARKUP)
    )
    chosen = script(search_turn("red car", num_frames=1), answer_turn("B"))

    def speak(messages: Sequence[Message]) -> str:
        offered = any(f"B. {MARKUP}" in text_of(message) for message in messages)
        return (chosen if offered else turns)(messages)

    policy = Puppet(speak, encoded=True)
    app = make_app(Asker(settings, policy, MeanColour(), root / "cache"), policy, [folder], root / "uploads")
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def events_of(site: str, **asked: object) -> list[tuple[str, dict]]:
    response = httpx.post(f"{site}/api/ask", json=asked, timeout=120)
    assert response.headers["content-type"].startswith("text/event-stream")
    pairs = [event.split("\n") for event in response.text.strip().split("\n\n")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in pairs]


def test_a_question_streams_its_steps(site: str) -> None:
    listed = httpx.get(f"{site}/api/videos").json()
    assert [video["name"] for video in listed] == ["car.mp4", "notes.mp4"]
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
    ["0/../secret.mp4", "0/link.mp4", "0/key.txt", "0//etc/passwd", "9/car.mp4", "-2/car.mp4", "car.mp4", "", "0/"],
)
def test_files_outside_the_folders_are_not_there(site: str, video: str) -> None:
    assert httpx.post(f"{site}/api/ask", json={"video": video, "question": "What?"}).status_code == 404


def test_other_sites_and_other_names_are_refused(site: str) -> None:
    assert httpx.get(f"{site}/api/videos", headers={"Host": "evil.example"}).status_code == 400
    assert httpx.get(f"{site}/api/videos", headers={"Origin": "http://evil.example"}).status_code == 403
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
    monkeypatch.setattr(commands, "_open_asker", lambda *_: (asker, policy))
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        for options, code, says in (
            (["--port", "0"], 75, "no policy server at http://127.0.0.1:1/v1"),
            (["--port", port], 2, f"cannot listen at 127.0.0.1, port {port} (address already in use)"),
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
    assert "/" not in dropped["name"]
    assert httpx.put(f"{site}/api/videos/page.html", content=b"<script>").status_code == 415
    kinds = [kind for kind, _ in events_of(site, video=dropped["id"], question="What is it?")]
    assert kinds[-1] == "answer"


@pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium here")
def test_the_page_in_a_real_browser(site: str, tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        page = browser.new_page(viewport={"width": 1000, "height": 1100})
        troubles: list[str] = []
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(site)
        page.locator("#video").select_option(label="car.mp4")
        page.get_by_label("Question").fill(f"What is this? {MARKUP}")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator("#answer")).to_have_text(MARKUP, timeout=120_000)
        expect(page.locator("#line .found")).to_have_count(3)
        expect(page.locator("#line .window")).to_have_count(1)
        expect(page.locator("#steps .thought").first).to_have_text(f"Look {MARKUP}")
        expect(page.locator("#support")).to_contain_text("the same answer")
        page.locator("#line").click(position={"x": 480, "y": 10})
        expect(page.locator("#strip img.here")).to_have_count(1)
        page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
        assert page.title() == "timesearch"
        page.screenshot(path=str(tmp_path / "page.png"))
        page.set_viewport_size({"width": 360, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.screenshot(path=str(tmp_path / "narrow.png"))
        page.get_by_text("Choices").click()
        page.get_by_label("Choices").fill(f"blue\n\n {MARKUP} \ngreen")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator("#answer")).to_have_text(f"B. {MARKUP}", timeout=60_000)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.locator("#video").select_option(label="notes.mp4")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator("#status")).to_contain_text("is not a video file", timeout=60_000)
        assert troubles == []
        browser.close()
