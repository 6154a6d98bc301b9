"""The agent by OpenAI's API, asked by the official client; what it refuses; and the key that a server may ask for."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from http.client import HTTPConnection
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion
from players import MeanColour, Puppet, answer_turn, script, search_turn
from serving import running, until

from timesearch.base.errors import RequestError
from timesearch.base.redaction import redact
from timesearch.data.messages import Message, text_of
from timesearch.inference.ask import Asker
from timesearch.serve.api import make_app
from timesearch.serve.attached import KEPT_FOR
from timesearch.serve.keys import VARIABLE, read_key
from timesearch.settings import Settings

CHROMIUM = Path("/usr/bin/chromium")
KEY = "a-key-of-the-tests-0123456789"
ASKED = "What colour is the car in car.mp4?"
SETTINGS = Settings.model_validate(
    {"frames": {"factor": 32, "min_pixels": 4096, "max_pixels": 4096}, "search": {"patch": 32, "max_turns": 4}}
)


class Slow(Puppet):
    """A policy that waits while `hold` is set."""

    hold = False

    async def reply(self, messages: Sequence[Message]):
        while self.hold:
            await asyncio.sleep(0.01)
        return await super().reply(messages)


@pytest.fixture(scope="module")
def policy() -> Slow:
    turns = script(search_turn("red car", "Look <b>.", start_time=5, end_time=15, num_frames=3), answer_turn("red"))

    def speak(messages: Sequence[Message]) -> str:
        if any("FAIL" in text_of(message) for message in messages):
            raise ValueError("no such reply was foreseen")
        return turns(messages)

    return Slow(speak, encoded=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def servers(footage: Path, policy: Slow, root: Path) -> Iterator[tuple[str, str]]:
    """The server without a key and with one, over the same videos and caches."""
    (root / "videos" / "b").mkdir(parents=True)
    for name in ("car.mp4", "b/car.mp4", "b/my bottle.mp4"):
        clip = "car-detection.mp4" if "car" in name else "bottle-detection.mp4"
        (root / "videos" / name).write_bytes((footage / clip).read_bytes())
    (root / "videos" / "notes.mp4").write_text("no video")
    (root / "secret.mp4").write_bytes((footage / "car-detection.mp4").read_bytes())
    asker = Asker(SETTINGS, policy, MeanColour(), root / "cache")
    apps = [make_app(asker, policy, [root / "videos"], root / "uploads", key=key) for key in (None, KEY)]
    with running(apps[0]) as open_, running(apps[1]) as keyed:
        yield open_, keyed


@pytest.fixture(scope="module")
def site(servers: tuple[str, str]) -> str:
    return servers[0]


@pytest.fixture(scope="module")
def keyed(servers: tuple[str, str]) -> str:
    return servers[1]


def client(site: str, key: str = "none needed") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{site}/v1", api_key=key, max_retries=0, timeout=120)


def ask(site: str, content: object, **more: object) -> ChatCompletion:
    return client(site).chat.completions.create(model="timesearch", messages=user(content), extra_body=more)


def user(content: object) -> list[dict]:
    return [{"role": "user", "content": content}]


def video_part(url: str) -> dict:
    return {"type": "video_url", "video_url": {"url": url}}


def test_the_model_is_listed(site: str) -> None:
    models = client(site).models.list().data
    assert [model.id for model in models] == ["timesearch"]
    assert client(site).models.retrieve("timesearch").object == "model"
    with pytest.raises(openai.NotFoundError, match="there is no model 'a/b' here"):
        client(site).models.retrieve("a/b")


def test_a_question_is_answered_with_times_and_evidence(site: str) -> None:
    given = client(site).chat.completions.create(
        model="timesearch", messages=user(ASKED), extra_body={"video": "car.mp4"}
    )
    (choice,) = given.choices
    assert choice.finish_reason == "stop"
    answer, said = choice.message.content.split("\n\n")
    evidence = given.model_extra["evidence"]
    times = [each["seconds"] for each in evidence["support"]]
    assert answer == "red"
    assert len(times) == 3
    assert all(5 <= seconds <= 15 and f"{seconds:.1f}s" in said for seconds in times)
    assert "from this alone: the same answer" in said
    assert (evidence["agrees"], evidence["video"]) == (True, "car.mp4")
    assert given.usage.total_tokens == given.usage.prompt_tokens + given.usage.completion_tokens > 0
    assert "Look <b>.\nseek_video_frames: red car" in choice.message.reasoning_content


def test_an_answer_streams(site: str) -> None:
    stream = client(site).chat.completions.create(
        model="timesearch", messages=user(ASKED), extra_body={"video": "car.mp4"}, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas).startswith("red\n\nSeen at ")
    thoughts = [delta.reasoning_content for delta in deltas if "reasoning_content" in (delta.model_extra or {})]
    assert [thought.split(":")[0] for thought in thoughts[-3:]] == ["Look <b>.\nseek_video_frames", "found", "Seen.\n"]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-2].model_extra["evidence"]["agrees"] is True
    assert chunks[-1].usage.total_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_video_is_the_one_that_is_named_last(site: str) -> None:
    def asked_about(messages: list[dict], **more: object) -> str:
        given = client(site).chat.completions.create(model="timesearch", messages=messages, extra_body=more)
        return given.model_extra["evidence"]["video"]

    bottle = "b/my bottle.mp4"
    assert asked_about(user(f"What is in {bottle}?")) == bottle
    assert asked_about(user("What is in my bottle.mp4?")) == bottle
    assert asked_about(user("car.mp4: what colour is it?")) == "car.mp4"
    assert asked_about(user([{"type": "text", "text": "What?"}, video_part("0/b/my%20bottle.mp4")])) == bottle
    assert asked_about(user([{"type": "text", "text": "What?"}, video_part(bottle)])) == bottle
    assert asked_about(user("What?"), video=bottle) == bottle
    assert asked_about(user("What?"), video="my bottle.mp4") == bottle
    talk = [*user("What is in car.mp4?"), {"role": "assistant", "content": "A car."}, *user("What colour is it?")]
    assert asked_about(talk) == "car.mp4"
    assert asked_about([{"role": "system", "content": "Answer."}, *talk[:2], *user(f"And in {bottle}?")]) == bottle


def test_choices_are_answered_by_letter_and_words(site: str, policy: Slow) -> None:
    before, policy.speak = policy.speak, script(search_turn("red", num_frames=1), answer_turn("B"))
    try:
        given = ask(site, ASKED, video="car.mp4", options=["blue", "red"])
    finally:
        policy.speak = before
    assert given.choices[0].message.content.startswith("B. red\n\n")


def attached(clip: Path, question: str = "What is it?", more: bytes = b"") -> list[dict]:
    """A question with a video; `more` bytes after its end make it another one."""
    data = base64.b64encode(clip.read_bytes() + more).decode()
    return [{"type": "text", "text": question}, video_part(f"data:video/mp4;base64,{data}")]


def test_an_attached_video_is_kept_once(site: str, footage: Path) -> None:
    content = attached(footage / "bottle-detection.mp4")
    names = []
    for _ in range(2):
        given = ask(site, content)
        names.append(given.model_extra["evidence"]["video"])
    assert names[0] == names[1]
    assert names[0].startswith("attached-")
    assert [video["name"] for video in httpx.get(f"{site}/api/videos").json()].count(names[0]) == 1


def test_a_server_of_no_folder_and_no_library_answers_about_what_is_attached(
    footage: Path, policy: Slow, tmp_path: Path
) -> None:
    asker = Asker(SETTINGS, policy, MeanColour(), tmp_path / "cache")
    with running(make_app(asker, policy, [], tmp_path / "uploads")) as site:
        assert [model.id for model in client(site).models.list().data] == ["timesearch"]
        with pytest.raises(openai.BadRequestError, match=r"which video is meant.*there is none here yet"):
            ask(site, ASKED)
        with pytest.raises(openai.NotFoundError, match=r"no video 'car\.mp4': there is none here yet"):
            ask(site, ASKED, video="car.mp4")
        first = user(attached(footage / "car-detection.mp4"))
        answer = ask(site, first[0]["content"])
        (name,) = attached_in(tmp_path / "uploads")
        assert answer.choices[0].message.content.startswith("red")
        assert answer.model_extra["evidence"]["video"] == name
        talk = [*first, {"role": "assistant", "content": "red"}, *user("And when?")]
        again = client(site).chat.completions.create(model="timesearch", messages=talk)
        assert again.model_extra["evidence"]["video"] == name
        assert ask(site, f"What is in {name}?").model_extra["evidence"]["video"] == name
        with pytest.raises(openai.BadRequestError, match="which video is meant"):
            ask(site, "What is in the video?")  # nobody gets another's video without naming it


def test_two_videos_of_one_name_are_told_apart_by_their_ids(footage: Path, policy: Slow, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "car.mp4").write_bytes((footage / "car-detection.mp4").read_bytes())
    asker = Asker(SETTINGS, policy, MeanColour(), tmp_path / "cache")
    folders = [tmp_path / "one", tmp_path / "two"]
    with running(make_app(asker, policy, folders, tmp_path / "uploads")) as site:
        said = "2 videos are called 'car.mp4': name one by its id .0/car.mp4, 1/car.mp4."
        for more in ({}, {"video": "car.mp4"}):
            with pytest.raises(openai.BadRequestError, match=said):
                ask(site, ASKED, **more)
        assert ask(site, ASKED, video="1/car.mp4").choices[0].message.content.startswith("red")


def attached_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("attached-*"))


def not_used_for(path: Path, seconds: float) -> None:
    os.utime(path, ns=(time.time_ns() - int(1e9 * seconds), path.stat().st_mtime_ns))


def test_an_attached_video_goes_with_its_caches_when_it_was_not_used_for_long(
    footage: Path, policy: Slow, tmp_path: Path
) -> None:
    uploads, caches = tmp_path / "uploads", tmp_path / "cache"
    app = partial(make_app, Asker(SETTINGS, policy, MeanColour(), caches), policy, [], uploads)
    with running(app()) as site:
        for more in (b"1", b"2"):
            ask(site, attached(footage / "car-detection.mp4", more=more))
        httpx.put(f"{site}/api/videos/mine.mp4", content=b"a dropped one").raise_for_status()
        made = {path for path in caches.rglob("*") if path.is_file()}
        used, unused = (uploads / name for name in attached_in(uploads))
        for path in (unused, used, uploads / "mine.mp4"):
            not_used_for(path, KEPT_FOR + 60)
        ask(site, "What is it?", video=used.name)
    (uploads / ".cut.partial").write_bytes(b"an upload whose server was killed")
    os.utime(uploads / ".cut.partial", (0, 0))
    (uploads / ".new.partial").write_bytes(b"one that comes in")
    with running(app()) as site:
        assert sorted(path.name for path in uploads.iterdir()) == sorted([".new.partial", used.name, "mine.mp4"])
        left = {path for path in caches.rglob("*") if path.is_file()}
        assert left < made
        assert len(left) == len(made) / 2
        assert ask(site, "What is it?", video=used.name).choices[0].message.content.startswith("red")


def test_attached_videos_beyond_the_bound_go_but_none_that_is_asked_about(
    site: str, keyed: str, footage: Path, policy: Slow, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, uploads = footage / "car-detection.mp4", root / "uploads"
    monkeypatch.setattr("timesearch.serve.attached.KEPT", 2.5 * clip.stat().st_size)

    def begin(more: bytes, at: str, key: str) -> tuple[str, openai.Stream]:
        """Attach a video, and leave the question about it open."""
        before = set(attached_in(uploads))
        stream = client(at, key).chat.completions.create(
            model="timesearch", messages=user(attached(clip, more=more)), stream=True
        )
        (name,) = set(attached_in(uploads)) - before
        return name, stream

    policy.hold = True
    try:
        first, asking = begin(b"1", site, "none")
        second, leaving = begin(b"22", keyed, KEY)
        assert until(lambda: policy.running == 2)
        leaving.close()
        assert until(lambda: policy.running == 1)
        third, leaving = begin(b"333", keyed, KEY)
        assert set(attached_in(uploads)) == {first, third}, second
        leaving.close()
    finally:
        policy.hold = False
    said = "".join(chunk.choices[0].delta.content or "" for chunk in asking if chunk.choices)
    assert said.startswith("red")
    fourth, leaving = begin(b"4444", site, "none")
    leaving.close()
    assert set(attached_in(uploads)) == {third, fourth}


def body(**fields: object) -> bytes:
    return json.dumps({"model": "timesearch", "messages": user("What?"), "video": "car.mp4", **fields}).encode()


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [
        (b"", 400, "no JSON"),
        (b"\xff\xfe\xfd", 400, "no JSON"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b"[]", 400, "cannot be read"),
        (b"{}", 400, "model cannot be read"),
        (b'{"model": "timesearch", "messages": ' + b"9" * 100_000 + b"}", 400, "messages cannot be read"),
        (body(model="gpt-9"), 404, "there is no model 'gpt-9' here"),
        (body(model="\ud800"), 404, "there is no model"),
        (body(messages=[]), 400, "messages"),
        (body(messages=[{"role": "assistant", "content": "a"}]), 400, "no message of the user"),
        (body(messages=[{"role": "root", "content": "a"}]), 400, "messages.0.role"),
        (body(messages=user("")), 400, "the question is empty"),
        (body(messages=user(None)), 400, "the question is empty"),
        (body(messages=user("a\0b")), 400, "control characters"),
        (body(messages=user("\udc80")), 400, "cut in two"),
        (body(messages=user("a" * 5000)), 400, "5000 characters long"),
        (body(messages=user([{"type": "image_url", "image_url": {"url": "x"}}])), 400, "a part of type 'image_url'"),
        (body(messages=user([video_part("car.mp4")] * 2), video=None), 400, "2 videos are attached"),
        (body(messages=user([video_part("http://127.0.0.1:1/a.mp4")]), video=None), 400, "no address is fetched"),
        (body(messages=user([video_part("file:///etc/passwd")]), video=None), 400, "no address is fetched"),
        (body(messages=user([video_part("data:video/mp4,a")]), video=None), 400, "data URL is none"),
        (body(messages=user([video_part("data:video/mp4;base64,!!")]), video=None), 400, "not base64"),
        (body(messages=user([video_part("data:video/mp4;base64,aGk=")]), video=None), 400, "no video that can be read"),
        (body(messages=user([video_part("data:" + "a" * 10**6)]), video=None), 400, "data URL is none"),
        (body(video="../secret.mp4"), 404, "there is no video '../secret.mp4': there are"),
        (body(video="0/../secret.mp4"), 404, "there is no video"),
        (body(video="0/%2e%2e/secret.mp4"), 404, "there is no video"),
        (body(video="/etc/passwd"), 404, "there is no video"),
        (body(video="\0"), 404, "there is no video"),
        (body(video=None), 400, "which video is meant? Name it in the question, or attach one; there are"),
        (body(video=None, messages=user("car.mp4 or notes.mp4?")), 400, "several videos are named"),
        (body(video="notes.mp4"), 400, "not a video file"),
        (body(options=["a"] * 27), 400, "27 options"),
        (body(n=2), 400, "n is not taken"),
        (body(tools=[{}]), 400, "tools is not taken"),
        (body(logprobs=True), 400, "logprobs is not taken"),
        (body(response_format={"type": "json_object"}), 400, "response_format is not taken"),
        (body(stream="perhaps"), 400, "stream cannot be read"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_met_is_refused_in_openais_form(
    site: str, sent: bytes, status: int, says: str
) -> None:
    answer = httpx.post(f"{site}/v1/chat/completions", content=sent, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], set(error)) == (
        status, "invalid_request_error", {"message", "type", "param", "code"},
    )  # fmt: skip
    assert says in error["message"]
    assert len(error["message"]) <= 500


def test_other_addresses_and_long_bodies_are_refused_in_openais_form(site: str) -> None:
    for method, path, status in (("GET", "/v1", 404), ("GET", "/v1/none", 404), ("GET", "/v1/chat/completions", 405)):
        answer = httpx.request(method, site + path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
    connection = HTTPConnection(site.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v1/chat/completions", headers={"Content-Length": str(10**9)})  # and not a byte of it
    answered = connection.getresponse()
    said = json.loads(answered.read())["error"]["message"]
    connection.close()
    assert (answered.status, said) == (413, "the request is larger than 49152 KiB")


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(10**30), 10**30) | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(st.fixed_dictionaries({}, optional={
    "model": st.just("timesearch") | anything,
    "messages": anything | st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": anything}), max_size=3),
    "video": st.none() | st.text(max_size=9), "options": anything, "stream": anything, "n": anything,
}))  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_any_json_gets_an_answer_or_a_sentence(site: str, asked: dict) -> None:
    answer = httpx.post(f"{site}/v1/chat/completions", content=json.dumps(asked), timeout=60)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["message"]


def test_what_fails_on_the_way_is_said_in_the_stream_too(site: str) -> None:
    asked = {"model": "timesearch", "messages": user("FAIL?"), "extra_body": {"video": "car.mp4"}}
    with pytest.raises(openai.InternalServerError, match="could not be answered"):
        client(site).chat.completions.create(**asked)
    with pytest.raises(openai.APIError, match="could not be answered"):
        list(client(site).chat.completions.create(**asked, stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_work(site: str, policy: Slow, stream: bool) -> None:
    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{site}/v1", api_key="x", max_retries=0) as asking:
            asked = asking.chat.completions.create(
                model="timesearch", messages=user(ASKED), stream=stream, extra_body={"video": "car.mp4"}
            )
            task = asyncio.ensure_future(asked)
            while not policy.running:
                await asyncio.sleep(0.01)
            if stream:
                await (await task).close()
            else:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        for _ in range(1000):
            if not policy.running:
                break
            await asyncio.sleep(0.01)
        assert policy.running == 0

    policy.hold = True
    try:
        asyncio.run(leave())
    finally:
        policy.hold = False
    given = client(site).chat.completions.create(
        model="timesearch", messages=user(ASKED), extra_body={"video": "car.mp4"}
    )
    assert given.choices[0].message.content.startswith("red")


def test_without_the_key_nothing_is_served(keyed: str) -> None:
    for path in ("/", "/page.js", "/api/videos", "/api/frames/x/1", "/none", "//evil.example/"):
        for headers in (
            {}, {"Authorization": "Bearer"}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Basic {KEY}"},
            {"Authorization": b"Bearer \xff"}, {"Cookie": f"timesearch={KEY}"},
        ):  # fmt: skip
            answer = httpx.get(keyed + path, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert "asks for its key" in answer.json()["detail"]
    for method, path in (("PUT", "/api/videos/a.mp4"), ("POST", "/api/ask")):
        assert httpx.request(method, keyed + path, content=b"key=" + KEY.encode()).status_code == 401
    assert httpx.get(f"{keyed}/api/videos", headers={"Authorization": f"bearer {KEY}"}).status_code == 200
    with pytest.raises(openai.AuthenticationError, match="asks for its key") as refused:
        client(keyed, "a wrong one").models.list()
    assert refused.value.code == "invalid_api_key"
    assert client(keyed, KEY).models.list().data


def test_the_form_takes_the_key_and_gives_a_cookie_that_is_not_it(keyed: str) -> None:
    with httpx.Client(base_url=keyed) as browser:
        asked = browser.get("/?v=1", headers={"Accept": "text/html,*/*"})
        assert (asked.status_code, 'type="password"' in asked.text) == (401, True)
        assert browser.get("/entrance.css").status_code == 200
        for wrong in ({"key": "wrong"}, {"other": KEY}, {"key": KEY + "\0"}, {"key": "x" * 9000}):
            answer = browser.post("/", data=wrong, headers={"Accept": "text/html"})
            assert (answer.status_code, "not the key" in answer.text) == (401, True)
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        assert browser.post("/", content=b"\xff", headers=kind).status_code == 401
        answer = browser.post("/?v=1", data={"key": KEY})
        assert (answer.status_code, answer.headers["location"]) == (303, "/?v=1")
        assert KEY not in answer.headers["set-cookie"]
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert browser.get("/api/videos").status_code == 200
        assert browser.get("/api/videos", headers={"Origin": "http://evil.example"}).status_code == 403
        away = httpx.post(f"{keyed}//evil.example", data={"key": KEY})
        assert away.headers["location"] == "/evil.example"


@pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium here")
def test_the_key_is_given_in_a_real_browser(keyed: str, tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        page = browser.new_page(viewport={"width": 500, "height": 400})
        page.goto(f"{keyed}/?a=1#t=5")
        page.get_by_label("Key").fill("wrong")
        page.get_by_role("button").click()
        expect(page.get_by_role("status")).to_have_text("That is not the key.")
        page.screenshot(path=str(tmp_path / "entrance.png"))
        page.get_by_label("Key").fill(KEY)
        page.get_by_role("button").click()
        expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
        assert page.url.startswith(f"{keyed}/?a=1")
        browser.close()


def test_a_key_comes_from_a_file_or_the_environment_and_is_never_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_key(None) is None
    monkeypatch.setenv(VARIABLE, KEY)
    assert read_key(None) == KEY
    assert KEY not in redact(f"a log line with {KEY} in it")
    file = tmp_path / "key"
    file.write_text("another-key-of-the-tests\n")
    assert read_key(file) == "another-key-of-the-tests"
    for bad in ("", "secret", "secret secret secret secret", "sécret-of-some-length", "secret\x07" * 5, "s" * 600):
        file.write_text(bad)
        with pytest.raises(RequestError, match="holds no key") as refused:
            read_key(file)
        assert not bad or bad not in str(refused.value)
        if bad:
            monkeypatch.setenv(VARIABLE, bad)
            with pytest.raises(RequestError, match="TIMESEARCH_API_KEY holds no key"):
                read_key(None)
    with pytest.raises(RequestError, match="cannot be read"):
        read_key(tmp_path / "absent")
