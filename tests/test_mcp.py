"""A library for agents: every tool by the official client, over both transports, many clients, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import mcp
import pytest
from PIL import Image
from players import Puppet, answer_turn, script, search_turn
from serving import running
from test_library import SETTINGS, Greys, index, make_coloured

from timesearch.base.stopping import Stop, StoppedError
from timesearch.data.messages import Message
from timesearch.inference.ask import Asker
from timesearch.library.library import Library
from timesearch.search.policy import Policy

MARKUP = "<img src=x onerror=alert(1)> $(touch owned).mp4"


class Slow(Puppet):
    """A policy that says how many questions it works on, and takes its time while `hold` is set."""

    hold = False
    started = 0

    @asynccontextmanager
    async def session(self, video: str, tools: Sequence[dict], max_new_tokens: int) -> AsyncIterator[Any]:
        self.started += 1
        async with super().session(video, tools, max_new_tokens) as session:
            yield session

    async def reply(self, messages: Sequence[Message]):
        while self.hold:
            await asyncio.sleep(0.01)
        return await super().reply(messages)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("agents")
    make_coloured(root / "films" / "red.mp4", ("gray", 5), ("red", 3), ("gray", 5))
    make_coloured(root / "films" / MARKUP, ("gray", 5), ("blue", 3), ("gray", 5))
    for number in range(52):  # more than a page of them
        (root / "films" / f"copy{number:02}.mp4").hardlink_to(root / "films" / "red.mp4")
    (root / "films" / "red.srt").write_text(
        "".join(
            f"{n}\n00:00:{n / 10:06.3f} --> 00:00:{n / 10 + 0.05:06.3f}\nline {n}\n\n".replace(".", ",")
            for n in range(1, 100)
        )
    )
    make_coloured(root / "secret.mp4", ("red", 3))
    done = index(root / "library", root / "films")
    assert (done.videos, done.batch.failures) == (54, [])
    return root / "library"


@pytest.fixture(scope="module")
def policy() -> Slow:
    return Slow(script(search_turn("red", num_frames=2), answer_turn("red")))


@pytest.fixture(scope="module")
def server(library: Path, policy: Slow):
    from timesearch.serve.mcp import make_server

    @contextmanager
    def asking() -> Iterator[tuple[Asker, Policy]]:
        yield Asker(SETTINGS, policy, Greys(), library), policy

    return make_server(Library(library), Greys(), asking)


@pytest.fixture(scope="module")
def site(server) -> Iterator[str]:
    """The server at a free port, in a thread."""
    with running(server.streamable_http_app(host="127.0.0.1")) as address:
        yield f"{address}/mcp"


async def every_call(client) -> None:
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(tools) == {"list_videos", "search", "get_frames", "get_subtitles", "ask"}
    assert all(tool.output_schema and tool.annotations.read_only_hint for tool in tools.values())
    page = (await client.call_tool("list_videos", {})).structured_content
    rest = (await client.call_tool("list_videos", {"skip": page["next"]})).structured_content
    names = [video["name"] for video in page["videos"] + rest["videos"]]
    assert (len(names), len(set(names)), page["total"], rest["next"]) == (54, 54, 54, None)
    assert f"films/{MARKUP}" in names

    found = (await client.call_tool("search", {"query": "blue"})).structured_content
    assert [moment["video"] for moment in found["moments"]] == [f"films/{MARKUP}"]
    nothing = (await client.call_tool("search", {"query": "green"})).structured_content
    assert nothing["moments"] == []
    assert nothing["said"].startswith("nothing in 54 videos answers this")
    spoken = (await client.call_tool("search", {"query": "line 7"})).structured_content
    assert [(said["video"], said["text"]) for said in spoken["spoken"]] == [("films/red.mp4", "line 7")]
    many = (await client.call_tool("search", {"query": "red"})).structured_content
    more = (await client.call_tool("search", {"query": "red", "skip": many["next"]})).structured_content
    assert len({moment["video"] for moment in many["moments"] + more["moments"]}) == 53

    told: list[tuple[float, float | None, str | None]] = []

    async def progress(*said) -> None:
        told.append(said)

    shown = await client.call_tool(
        "get_frames", {"video": "films/red.mp4", "seconds": [6, 1], "width": 32}, progress_callback=progress
    )
    pictures = [block for block in shown.content if block.type == "image"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(picture.data))).size for picture in pictures]
    assert sizes == [(32, 32), (32, 32)]
    red, grey = (Image.open(io.BytesIO(base64.b64decode(p.data))).convert("RGB").getpixel((5, 5)) for p in pictures)
    assert red[0] > 200 > 60 > red[1]
    assert max(grey) - min(grey) < 20
    assert [frame["seconds"] for frame in shown.structured_content["frames"]] == [6, 1]
    large = await client.call_tool("get_frames", {"video": "films/red.mp4", "seconds": [6], "width": 8000})
    assert large.structured_content["frames"][0]["width"] == 64

    said = (await client.call_tool("get_subtitles", {"video": "films/red.mp4"})).structured_content
    after = (
        await client.call_tool("get_subtitles", {"video": "films/red.mp4", "skip": said["next"]})
    ).structured_content
    assert [line["text"] for line in said["lines"] + after["lines"]] == [f"line {n}" for n in range(1, 100)]
    part = (
        await client.call_tool("get_subtitles", {"video": "films/red.mp4", "start": 5, "end": 5.2})
    ).structured_content
    assert [line["text"] for line in part["lines"]] == ["line 50", "line 51", "line 52"]

    answered = (
        await client.call_tool(
            "ask", {"question": "What is red?", "where": "films/red.mp4"}, progress_callback=progress
        )
    ).structured_content
    assert (answered["answer"], answered["video"], answered["evidence"]["agrees"]) == ("red", "films/red.mp4", True)
    assert answered["said"][0].endswith("from this alone: the same answer.")
    assert {said[2] for said in told if said[2]} >= {"preview", "found"}


def test_the_official_client_completes_every_call(site: str) -> None:
    async def session() -> None:
        async with mcp.Client(site) as client:
            await every_call(client)

    asyncio.run(session())


STDIO = """
import sys
from contextlib import contextmanager, nullcontext
sys.path.insert(0, {tests!r})
import timesearch.cli.opening as opening
from players import Puppet, answer_turn, script, search_turn
from test_library import RECORD, Greys
opening.encoder_for = lambda *_: (Greys(), RECORD)
import timesearch.inference.ask as asking
policy = Puppet(script(search_turn("red", num_frames=2), answer_turn("red")))
asking.answering_policy = lambda *_: nullcontext(policy)
from timesearch.cli import main
main(["mcp", "--library", sys.argv[1], "--params", sys.argv[2]])
"""


def test_the_command_talks_over_standard_input_and_output(library: Path, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(json.dumps({"search": SETTINGS.search.model_dump()}))
    program = STDIO.format(tests=str(Path(__file__).parent))
    command = mcp.StdioServerParameters(
        command=sys.executable,
        args=["-c", program, str(library), str(params)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )

    async def session() -> None:
        async with mcp.Client(command) as client:
            await every_call(client)

    asyncio.run(session())


def test_what_is_not_in_the_library_is_refused_in_a_sentence(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)  # above it is the checkout, which holds no library
    outside = [
        "../secret.mp4",
        "/etc/passwd",
        "films/../../secret.mp4",
        "",
        "films",
        "a\0b",
        "x" * 9000,
        "\ud800"[:0] + "$(id)",
    ]
    calls = [
        *(("get_frames", {"video": name, "seconds": [1]}) for name in outside),
        *(("get_subtitles", {"video": name}) for name in outside),
        *(("search", {"query": "red", "where": name}) for name in ("/etc", "..", "nothing")),
        *(("ask", {"question": "What?", "where": name}) for name in ("/etc", "..", "nothing")),
        ("search", {"query": " "}),
        ("search", {"query": "x" * 501}),
        ("ask", {"question": ""}),
        ("get_frames", {"video": "films/red.mp4", "seconds": [99999]}),
        ("get_frames", {"video": "films/red.mp4", "seconds": [-1]}),
        ("get_frames", {"video": "films/red.mp4", "seconds": [1] * 9}),
        ("get_frames", {"video": "films/red.mp4", "seconds": "soon"}),
        ("get_frames", {"video": "films/red.mp4"}),
        ("ask", {"question": "What is red?", "video": "films/red.mp4"}),
        ("search", {"query": "red", "where": None, "\n" * 500: 1}),
    ]

    async def session() -> None:
        async with mcp.Client(site) as client:
            for name, arguments in calls:
                result = await client.call_tool(name, arguments)
                said = result.content[0].text
                assert result.is_error, (name, arguments)
                assert "Traceback" not in said
                assert len(said.splitlines()) == 1
                assert said.startswith(f"Error executing tool {name}: "), said

    asyncio.run(session())
    assert not (Path.cwd() / "owned").exists()


def test_a_file_that_became_a_link_out_of_its_folder_stays_out_of_reach(library: Path, tmp_path: Path) -> None:
    root = tmp_path / "films"
    make_coloured(root / "film.mp4", ("gray", 3), ("red", 2))
    index(tmp_path / "library", root)
    opened = Library(tmp_path / "library")
    (root / "film.mp4").unlink()
    (root / "film.mp4").symlink_to(library.parent / "secret.mp4")
    with pytest.raises(Exception, match="leads out of"):
        opened.path(opened.videos()[0])


DYING = """
import asyncio, sys, mcp
async def ask():
    async with mcp.Client(sys.argv[1]) as client:
        await client.call_tool("ask", {"question": "What is red?", "where": "films/red.mp4"})
asyncio.run(ask())
"""


def test_twenty_clients_of_whom_one_dies_starve_nobody(site: str, policy: Slow) -> None:
    """The one that dies is a process, killed while its question is worked on."""

    async def ask() -> str:
        async with mcp.Client(site) as client:
            found = await client.call_tool("search", {"query": "blue"})
            answer = await client.call_tool("ask", {"question": "What is red?", "where": "films/red.mp4"})
            return f"{len(found.structured_content['moments'])} {answer.structured_content['answer']}"

    async def all_of_them() -> list[str]:
        dying = await asyncio.create_subprocess_exec(sys.executable, "-c", DYING, site)
        policy.hold, policy.started = True, 0
        while not policy.running:
            await asyncio.sleep(0.01)
        others = [asyncio.ensure_future(ask()) for _ in range(19)]
        while policy.running < 4:  # as many as are worked on at once, the dying one's among them
            await asyncio.sleep(0.01)
        dying.kill()
        await dying.wait()
        while policy.started < 5:  # its place goes to another while all the rest is held up
            await asyncio.sleep(0.01)
        policy.hold = False
        return await asyncio.wait_for(asyncio.gather(*others), 120)

    try:
        assert asyncio.run(all_of_them()) == ["1 red"] * 19
    finally:
        policy.hold = False
    assert policy.running == 0


def test_a_client_that_cancels_stops_the_work(site: str, policy: Slow) -> None:
    async def session() -> None:
        policy.hold = True
        try:
            async with mcp.Client(site) as client:
                task = asyncio.ensure_future(
                    client.call_tool("ask", {"question": "What is red?", "where": "films/red.mp4"})
                )
                while not policy.running:
                    await asyncio.sleep(0.01)
                task.cancel()
                for _ in range(500):
                    if not policy.running:
                        break
                    await asyncio.sleep(0.01)
                assert policy.running == 0
                policy.hold = False
                assert not (await client.call_tool("ask", {"question": "What?", "where": "films/red.mp4"})).is_error
        finally:
            policy.hold = False

    asyncio.run(session())


def test_a_client_that_cancels_a_search_stops_the_scan(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scanning, stopped = threading.Event(), threading.Event()

    def endless(*given) -> None:
        stop = given[-1]
        scanning.set()
        try:
            while True:
                stop.check()
                time.sleep(0.01)
        finally:
            stopped.set()

    monkeypatch.setattr(Library, "find", endless)

    async def session() -> None:
        async with mcp.Client(site) as client:
            for tool, asked in (("search", {"query": "red"}), ("ask", {"question": "What?"})):
                scanning.clear()
                stopped.clear()
                task = asyncio.ensure_future(client.call_tool(tool, asked))
                assert await asyncio.to_thread(scanning.wait, 30)
                task.cancel()
                assert await asyncio.to_thread(stopped.wait, 30)

    asyncio.run(session())


def test_with_a_key_only_who_has_it_is_served(server) -> None:
    from starlette.testclient import TestClient

    from timesearch.serve.keys import Keyed

    app = Keyed(server.streamable_http_app(host="127.0.0.1"), "a-key-of-the-tests")
    ask = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    with TestClient(app, base_url="http://127.0.0.1:8781") as web:
        for given, refused in (("Bearer nothing", True), ("Bearer a-key-of-the-tests", False)):
            headers = {"Authorization": given, "Accept": "application/json, text/event-stream"}
            assert (web.post("/mcp", json=ask, headers=headers).status_code == 401) == refused


def test_a_search_ends_between_two_blocks(library: Path) -> None:
    stop = Stop()
    stop.ask()
    with pytest.raises(StoppedError):
        Library(library).search(Greys().encode_text(["red"])[0], stop=stop)


def test_only_this_machine_is_served(site: str) -> None:
    import httpx

    refused = httpx.post(site, headers={"Host": "evil.example"}, json={})
    assert refused.status_code == 421
    foreign = httpx.post(site, headers={"Origin": "http://evil.example"}, json={})
    assert foreign.status_code == 403
