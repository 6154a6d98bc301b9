"""The page in a real browser, and what stands behind it: files in parts, what is made for browsers, search, moments."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from players import Puppet, answer_turn, script, search_turn
from serving import Log, readers_of, running, until
from synthetic import ffmpeg, make_video
from test_library import SETTINGS, Greys, index, make_coloured

from timesearch.base.errors import ItemError
from timesearch.base.stopping import Stop
from timesearch.inference.ask import Asker
from timesearch.library.library import Library
from timesearch.serve import playable
from timesearch.serve.api import make_app
from timesearch.serve.playable import Made
from timesearch.serve.ranges import Part

CHROMIUM = Path("/usr/bin/chromium")
MARKUP = "<img src=x onerror=document.title=1>"
HOSTILE = f"'\"&lt;javascript:alert(1){MARKUP}#t=1%20.mp4"


pytestmark = pytest.mark.usefixtures("no_traceback")


@pytest.fixture(scope="module")
def root(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of videos of all kinds, and a library of three, one of which is a link by now."""
    root = tmp_path_factory.mktemp("page")
    folder = root / "videos"
    folder.mkdir()
    for name in ("car-detection.mp4", "h265_video.mp4"):
        shutil.copy(footage / name, folder / name)
    (folder / "notes.mp4").write_text("no video")
    make_video(folder / "matroska.mkv", seconds=6)
    make_coloured(folder / HOSTILE, ("gray", 5), ("blue", 3), ("gray", 5))
    (folder / HOSTILE).with_suffix(".srt").write_text(f"1\n00:00:02,000 --> 00:00:03,500\nthe kettle {MARKUP} sings\n")
    (folder.parent / "films").mkdir()
    (root / "films" / "red.srt").write_text("1\n00:00:06,000 --> 00:00:07,000\nput the kettle on\n")
    make_coloured(root / "films" / "red.mp4", ("gray", 5), ("red", 3), ("gray", 5))
    make_coloured(root / "films" / MARKUP / "green.mp4", ("gray", 5), ("lime", 3), ("gray", 5))
    make_coloured(root / "films" / "swapped.mp4", ("gray", 5), ("blue", 3))
    assert index(root / "library", root / "films").batch.failures == []
    (root / "secret.mp4").write_bytes((root / "films" / "swapped.mp4").read_bytes())
    (root / "films" / "swapped.mp4").unlink()
    (root / "films" / "swapped.mp4").symlink_to(root / "secret.mp4")
    return root


def app_over(root: Path, library: bool) -> Any:
    turns = script(
        search_turn("red", f"Look {MARKUP} at 6.0s", start_time=2, end_time=12, num_frames=3), answer_turn(MARKUP)
    )
    policy = Puppet(turns, encoded=True)
    asker = Asker(SETTINGS, policy, Greys(), root / "cache")
    offered = Library(root / "library") if library else None
    return make_app(asker, policy, [root / "videos"], root / "uploads", library=offered)


@pytest.fixture(scope="module")
def site(root: Path, server_log: Log) -> Iterator[str]:
    with running(app_over(root, library=True)) as address:
        yield address


def listed(site: str) -> dict[str, str]:
    return {video["name"]: video["id"] for video in httpx.get(f"{site}/api/videos").json()}


def events_of(site: str, route: str, **asked: object) -> list[tuple[str, dict]]:
    response = httpx.post(f"{site}/api/{route}", json=asked, timeout=120)
    assert response.headers["content-type"].startswith("text/event-stream")
    pairs = [event.split("\n") for event in response.text.strip().split("\n\n")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in pairs]


@pytest.fixture(scope="module")
def car(site: str, footage: Path) -> tuple[str, bytes]:
    """The address of a file, and what it holds."""
    whole = (footage / "car-detection.mp4").read_bytes()
    return f"{site}/api/media?video=0/car-detection.mp4", whole


@pytest.mark.parametrize(
    ("asked", "status", "first", "last"),
    [
        (None, 200, 0, None),
        ("bytes=0-", 206, 0, None),
        ("bytes=0-0", 206, 0, 1),
        ("bytes=100-199", 206, 100, 200),
        ("Bytes = 5-9", 206, 5, 10),
        ("bytes=2811552-", 206, 2811552, None),
        ("bytes=2811550-99999999999", 206, 2811550, None),
        ("bytes=-1", 206, -1, None),
        ("bytes=-99999999999", 206, 0, None),
        ("bytes=2811553-", 416, 0, 0),
        ("bytes=99999999999-", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
        ("bytes=9-5", 200, 0, None),
        ("bytes=0-1,5-6", 200, 0, None),
        ("bytes=" + "0-1," * 1000, 200, 0, None),
        ("seconds=0-1", 200, 0, None),
        ("bytes=", 200, 0, None),
        ("bytes=-", 200, 0, None),
        ("bytes=a-b", 200, 0, None),
        ("bytes=" + "9" * 5000 + "-", 200, 0, None),
        ("bytes=\u00b2-", 200, 0, None),
    ],
)
def test_a_file_comes_in_the_part_that_is_asked_for(
    car: tuple[str, bytes], asked: str | None, status: int, first: int, last: int | None
) -> None:
    address, whole = car
    headers = {} if asked is None else {"Range": asked.encode("latin-1")}
    answer = httpx.get(address, headers=headers)
    assert (answer.status_code, len(whole)) == (status, 2811553)
    assert answer.headers["accept-ranges"] == "bytes"
    if status == 416:
        assert answer.headers["content-range"] == "bytes */2811553"
        return
    assert answer.content == whole[first:last]
    assert answer.headers["content-type"] == "video/mp4"
    if status == 206:
        start = len(whole) - len(answer.content) if last is None else first
        assert answer.headers["content-range"] == f"bytes {start}-{start + len(answer.content) - 1}/2811553"
    head = httpx.head(address, headers=headers)
    assert (head.status_code, head.content) == (status, b"")
    assert head.headers["content-length"] == str(len(answer.content))


def test_a_part_is_of_the_file_that_was_asked_for(car: tuple[str, bytes]) -> None:
    address, whole = car
    told = httpx.head(address).headers
    part = {"Range": "bytes=5-9"}
    for condition, status in (
        (told["etag"], 206),
        (told["last-modified"], 206),
        ('"other"', 200),
        (f"W/{told['etag']}", 200),
        ("Mon, 01 Jan 2001 00:00:00 GMT", 200),
    ):
        answer = httpx.get(address, headers={**part, "If-Range": condition})
        assert (answer.status_code, answer.content) == (status, whole[5:10] if status == 206 else whole)
    for known, status in ((told["etag"], 304), (f'"a", {told["etag"]}', 304), ("*", 304), ('"a"', 200)):
        assert httpx.get(address, headers={"If-None-Match": known}).status_code == status


@given(first=st.none() | st.integers(0, 400), last=st.none() | st.integers(0, 400))
@settings(max_examples=40, deadline=None)
def test_any_range_is_a_slice_or_refused(small: Path, first: int | None, last: int | None) -> None:
    whole = small.read_bytes()
    said = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    status, body = sent(small, said)
    if first is None:
        wanted = whole if last is None else whole[max(0, len(whole) - last) :]
        assert (status, body) == ((200, whole) if last is None else (206 if last else 416, wanted))
    elif last is not None and last < first:
        assert (status, body) == (200, whole)
    else:
        wanted = whole[first : None if last is None else last + 1]
        assert (status, body) == (206 if wanted else 416, wanted)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.mp4"
    path.write_bytes(bytes(range(200)))
    return path


def sent(path: Path, asked: str, leaves: bool = False) -> tuple[int, bytes]:
    """Status and body that a `Part` sends to a client, who may leave after the first piece.

    In a thread of its own: an open browser keeps an event loop in the one of the tests.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, _sent(path, asked, leaves)).result()


async def _sent(path: Path, asked: str, leaves: bool) -> tuple[int, bytes]:
    messages: list[Any] = []

    async def receive() -> dict[str, str]:
        while not (leaves and len(messages) > 1):
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)
        await asyncio.sleep(0.002)

    scope = {"type": "http", "method": "GET", "headers": [(b"range", asked.encode())]}
    await Part(path, "video/mp4")(scope, receive, send)
    return messages[0]["status"], b"".join(message.get("body", b"") for message in messages[1:])


def test_nothing_more_is_read_for_a_client_that_left(tmp_path: Path) -> None:
    large = tmp_path / "large.mp4"
    with large.open("wb") as file:
        os.truncate(file.fileno(), 2**40)
    status, body = sent(large, "bytes=0-", leaves=True)
    assert (status, len(body) < 2**24) == (206, True)


def test_a_part_is_of_a_regular_file_and_of_no_link(tmp_path: Path, small: Path) -> None:
    (tmp_path / "link.mp4").symlink_to(small)
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "link.mp4", tmp_path / "pipe.mp4", tmp_path, tmp_path / "absent"):
        with pytest.raises(OSError, match=r".+"):
            Part(path, "video/mp4")


def test_a_library_offers_its_own_videos_and_what_took_their_place_stays_out_of_reach(site: str) -> None:
    names = listed(site)
    assert {"films/red.mp4", f"films/{MARKUP}/green.mp4", HOSTILE, "notes.mp4"} <= set(names)
    assert httpx.get(f"{site}/api/media", params={"video": names["films/red.mp4"]}).content[4:8] == b"ftyp"
    key = names["films/red.mp4"].partition("/")[2]
    for identity in (names["films/swapped.mp4"], "library/", "library/../red.mp4", f"0/{key}", f"library/{key}/.."):
        for route in ("video", "media", "picture"):
            assert httpx.get(f"{site}/api/{route}", params={"video": identity}).status_code == 404
        assert httpx.post(f"{site}/api/ask", json={"video": identity, "question": "a"}).status_code == 404


def test_what_browsers_cannot_play_is_made_once_and_kept(site: str, root: Path) -> None:
    said = httpx.get(f"{site}/api/video", params={"video": "0/matroska.mkv"}).json()
    assert (said["type"], said["making"], said["prepared"]) == (None, "copy", False)
    *_, (kind, ready) = events_of(site, "playable", video="0/matroska.mkv")
    assert kind == "ready"
    made = httpx.get(f"{site}/{ready['address']}", headers={"Range": "bytes=4-7"})
    assert (made.status_code, made.content) == (206, b"ftyp")
    assert events_of(site, "playable", video="0/matroska.mkv") == [("ready", ready)]
    *_, (kind, encoded) = events_of(site, "playable", video="0/h265_video.mp4")
    assert kind == "ready", encoded
    assert encoded["address"] != ready["address"]
    (kind, error), *_ = reversed(events_of(site, "playable", video="0/notes.mp4"))
    assert (kind, "is not a video file" in error["text"]) == ("error", True)
    assert sorted(path.suffix for path in (root / "playable").iterdir()) == [".mp4", ".mp4"]


def test_making_ends_when_the_last_one_leaves(site: str, root: Path) -> None:
    clip = make_video(root / "clip.mp4", "-crf", 40, seconds=10, size="1920x1080")
    ffmpeg("-stream_loop", 200, "-i", clip, "-c", "copy", root / "videos" / "huge.mp4")
    before = set((root / "playable").glob("*"))
    asked = {"video": "0/huge.mp4", "encode": True}
    with (
        httpx.stream("POST", f"{site}/api/playable", json=asked, timeout=60) as one,
        httpx.stream("POST", f"{site}/api/playable", json=asked, timeout=60) as two,
    ):
        heard = [stream.iter_lines() for stream in (one, two)]  # kept, for a stream ends with what reads it
        assert all(any("encoding huge.mp4" in line for line in lines) for lines in heard)
        assert until(lambda: len(readers_of("huge.mp4")) == 1)
    assert until(lambda: not readers_of("huge.mp4"))
    assert until(lambda: set((root / "playable").glob("*")) == before)
    (root / "videos" / "huge.mp4").unlink()


def test_what_is_made_stays_within_bounds(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, video = Made(tmp_path / "made"), root / "videos" / "matroska.mkv"
    made.make(video, "copy", lambda _: None, Stop())
    assert made.find(made.name(video, "copy"))
    monkeypatch.setattr(playable, "_KEPT", video.stat().st_size + 10)
    made.make(video, "encode", lambda _: None, Stop())
    assert made.find(made.name(video, "copy")) is None
    assert made.find(made.name(video, "encode"))
    monkeypatch.setattr(playable, "_LARGEST", 10_000)
    os.utime(video)
    with pytest.raises(ItemError, match="cannot be made fit for browsers"):
        made.make(video, "encode", lambda _: None, Stop())
    assert made.find(made.name(video, "encode")) is None


def test_pictures_are_there_before_and_after_preparation(site: str) -> None:
    video = {"video": "0/car-detection.mp4"}
    for width in (320, 960):
        answer = httpx.get(f"{site}/api/picture", params={**video, "seconds": 9, "width": width})
        assert answer.content[:2] == b"\xff\xd8"
        same = {"If-None-Match": answer.headers["etag"]}
        again = httpx.get(f"{site}/api/picture", params={**video, "seconds": 9, "width": width}, headers=same)
        assert (again.status_code, again.content) == (304, b"")
    late = httpx.get(f"{site}/api/picture", params={**video, "seconds": 10**6})
    assert late.content[:2] == b"\xff\xd8"


def test_moments_are_found_in_the_library_and_in_what_was_prepared(site: str) -> None:
    def found(query: str) -> dict[str, Any]:
        answer = httpx.get(f"{site}/api/search", params={"query": query}, timeout=60)
        assert answer.status_code == 200
        return answer.json()

    (green,) = found("green")["moments"]
    assert (green["name"], green["video"]) == (f"films/{MARKUP}/green.mp4", listed(site)[green["name"]])
    assert 4 <= green["start"] <= green["seconds"] <= green["end"] <= 9
    assert HOSTILE not in [moment["name"] for moment in found("blue")["moments"]]
    assert events_of(site, "ask", video=listed(site)[HOSTILE], question="What?")[-1][0] == "answer"
    (blue,) = [moment for moment in found("blue")["moments"] if moment["name"] == HOSTILE]
    assert blue["video"] == listed(site)[HOSTILE]
    said = {heard["name"]: heard for heard in found("kettle")["heard"]}
    assert said.keys() == {"films/red.mp4", HOSTILE}
    assert said["films/red.mp4"]["text"] == "put the kettle on"
    assert {said[name]["video"] for name in said} == {listed(site)[name] for name in said}
    assert (said[HOSTILE]["start"], said[HOSTILE]["end"]) == (2.0, 3.5)


def test_openais_clients_ask_about_the_librarys_videos_too(site: str) -> None:
    def asked(question: str, **more: str) -> httpx.Response:
        messages = [{"role": "user", "content": question}]
        body = {"model": "timesearch", "messages": messages, **more}
        return httpx.post(f"{site}/v1/chat/completions", json=body, timeout=60)

    red = listed(site)["films/red.mp4"]
    for answer in (asked("When is red.mp4 red?"), asked("When?", video="films/red.mp4"), asked("When?", video=red)):
        evidence = answer.raise_for_status().json()["evidence"]
        assert (evidence["video"], evidence["agrees"]) == ("films/red.mp4", True)
    swapped = asked("What is in swapped.mp4?")
    assert (swapped.status_code, "leads out of" in swapped.json()["error"]["message"]) == (404, True)


def test_a_question_about_all_says_which_video_and_what_the_answer_rests_on(site: str, root: Path) -> None:
    events = events_of(site, "ask", video="all", question="When is it red?")
    opened = [data for kind, data in events if kind == "video"]
    assert opened[0]["id"] == listed(site)["films/red.mp4"]
    evidence = events[-1][1]["evidence"]
    assert evidence["video"] == "films/red.mp4"
    assert evidence["sentences"][0].startswith("Seen at ")
    assert "of the video was looked at" in evidence["sentences"][1]
    with running(app_over(root, library=False)) as alone:
        assert {video.partition("/")[0] for video in listed(alone).values()} == {"0"}
        events = events_of(alone, "ask", video="all", question="When is it blue?")
        assert next(data["name"] for kind, data in events if kind == "video") == HOSTILE
    shutil.rmtree(root / "cache" / "features")
    with running(app_over(root, library=False)) as empty:
        ((kind, said),) = events_of(empty, "ask", video="all", question="When is it blue?")[-1:]
        assert (kind, "no video has been prepared yet" in said["text"]) == ("error", True)
        assert httpx.get(f"{empty}/api/search", params={"query": "red"}).json()["videos"] == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, site: str) -> Iterator[Any]:
    """An empty browser's page; nothing but pictures of what is no video may fail in it, and no dialog may open."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    troubles: list[str] = []
    opened.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("dialog", lambda dialog: troubles.append(dialog.message))
    opened.goto(site)
    yield opened
    assert [trouble for trouble in troubles if "status of 404" not in trouble] == []
    assert "1" not in opened.title().removesuffix("timesearch").replace("alert(1)", "").replace("=1", "")
    context.close()


def now(page: Any) -> float:
    return page.evaluate("player.currentTime")


def wait(page: Any, condition: str) -> None:
    """Until something holds in the page; its policy forbids what Playwright would poll with."""
    assert until(lambda: page.evaluate(condition), 30), condition


def moment_of(site: str, video: str, seconds: float) -> str:
    return f"{site}/#{urlencode({'v': video, 't': seconds})}"


@pytest.mark.takes(20)
def test_a_search_a_question_and_its_evidence_in_a_browser(page: Any, site: str, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    expect(page.locator("#videos a.card")).to_have_count(len(listed(site)))
    expect(page.locator(f'a.card[title="films/{MARKUP}/green.mp4"] .name')).to_have_text("green.mp4")
    page.keyboard.press("/")
    page.keyboard.type("green")
    page.keyboard.press("Enter")
    page.locator("#moments a.card").first.click()
    expect(page.locator("#title")).to_have_text(f"films/{MARKUP}/green.mp4")
    wait(page, "player.videoWidth > 0 && !player.seeking && player.currentTime > 4")
    assert now(page) < 9

    page.keyboard.press("Escape")
    page.locator("#query").fill("car")
    expect(page.locator("#videos a.card")).to_have_count(1)
    page.locator("#videos a.card").click()
    page.locator("#question").fill(f"What is this? {MARKUP}")
    page.locator("#go").click()
    expect(page.locator("#answer")).to_have_text(MARKUP, timeout=120_000)
    expect(page.locator("#verdict")).to_have_text("The same answer from this evidence alone")
    expect(page.locator("#evidence li").first).to_contain_text("Seen at")
    expect(page.locator("#evidence")).to_contain_text("of the video was looked at")
    expect(page.locator("#line .found")).to_have_count(3)
    expect(page.locator("#line .window")).to_have_count(1)
    expect(page.locator("#support img")).to_have_count(3)
    page.locator("#search summary").click()
    expect(page.locator("#steps .thought").first).to_contain_text(f"Look {MARKUP}")
    wait(page, "[...document.images].every((image) => !image.currentSrc || image.naturalWidth > 0)")

    page.locator("#evidence .time").first.click()
    wait(page, "!player.seeking && player.currentTime > 1")
    first = now(page)
    page.keyboard.press("]")
    wait(page, f"player.currentTime > {first} + 0.1")
    page.keyboard.press("[")
    wait(page, f"Math.abs(player.currentTime - {first}) < 0.1")
    page.keyboard.press("ArrowRight")
    wait(page, f"Math.abs(player.currentTime - {first} - 5) < 0.1")
    moment = page.url
    assert "&t=" in moment

    page.reload()  # the address is of the moment, and the question was kept
    wait(page, "player.currentTime > 1")
    assert abs(now(page) - first - 5) < 0.2
    expect(page.locator("#kept-here .asked")).to_have_text(f"What is this? {MARKUP}")
    page.locator("#kept-here a").click()
    expect(page.locator("#answer")).to_have_text(MARKUP)
    expect(page.locator("#line .found")).to_have_count(3)
    for scheme, width in (("light", 1280), ("dark", 1280), ("dark", 360)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.screenshot(path=str(tmp_path / f"{scheme}-{width}.png"), full_page=True)
    page.locator("#support button").last.click()
    wait(page, "player.getBoundingClientRect().top > 0")  # on a phone, the player comes back into view
    page.locator("#home").click()
    expect(page.locator("#kept li")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("#kept .remove").click()
    expect(page.locator("#kept li")).to_have_count(0)
    page.reload()
    expect(page.locator("#videos a.card")).to_have_count(len(listed(site)))
    expect(page.locator("#kept li")).to_have_count(0)


@pytest.mark.takes(10)
def test_all_videos_are_asked_in_a_browser(page: Any) -> None:
    from playwright.sync_api import expect

    page.locator("#query").fill("When is it red?")
    page.locator("#askall").click()
    expect(page.locator("#answer")).to_have_text(MARKUP, timeout=60_000)
    expect(page.locator("#title")).to_have_text("films/red.mp4")
    page.locator("#support button").first.click()
    wait(page, "player.currentTime > 1")
    expect(page.locator("#kept-here li")).to_have_count(1)


@pytest.mark.takes(10)
def test_what_a_browser_cannot_play_is_remuxed_encoded_or_shown_as_frames(
    page: Any, site: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from playwright.sync_api import expect

    request.addfinalizer(playable._looked_into.cache_clear)  # what is looked into here is by a limit of this test
    for name in ("matroska.mkv", "h265_video.mp4", HOSTILE):
        page.goto(moment_of(site, listed(site)[name], 0.5))
        wait(page, "player.videoWidth > 0")
        expect(page.locator("#title")).to_have_text(name)
        expect(page.locator("#frames")).to_be_hidden()
        wait(page, "Math.abs(player.currentTime - 0.5) < 0.1")
    monkeypatch.setattr(playable, "_LONGEST_ENCODED", 0.1)
    playable._looked_into.cache_clear()
    page.goto(moment_of(site, "0/h265_video.mp4", 0.2))
    expect(page.locator("#note")).to_contain_text("Its frames are shown instead.")
    wait(page, "still.naturalWidth > 0")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#clock")).to_have_text("0:01.0")
    page.goto(moment_of(site, "0/notes.mp4", 0))
    expect(page.locator("#note")).to_contain_text("is not a video file")
