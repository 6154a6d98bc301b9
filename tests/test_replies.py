"""Every kind of reply (replies.py) is read or is a named failure: in `infer`, `ask`, the judge, encoders."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest
from players import MeanColour, build_library, play_all
from replies import FAILING, REPLIES, ReplyServer, _Handler, completion, http
from synthetic import make_video

import timesearch.cli.inference as commands
from timesearch.base.errors import RequestError, TemporaryError
from timesearch.base.http import may_pass, request
from timesearch.base.replies import Completion
from timesearch.cli import main
from timesearch.data.rows import read_samples
from timesearch.data.samples import Prediction
from timesearch.evaluation.scoring import evaluate_files
from timesearch.inference.ask import Asker
from timesearch.inference.playing import Job
from timesearch.judge import JudgeClient, JudgeError, JudgeRefusedError
from timesearch.judge.server import judge_server
from timesearch.retrieval.encoder import load_encoder
from timesearch.search.engine_openai import OpenAIPolicy
from timesearch.settings import Evaluate, Judge, Settings


@pytest.fixture(scope="module")
def server() -> Iterator[ReplyServer]:
    server = ReplyServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def one_sentence(text: str) -> bool:
    return len(text.strip().splitlines()) == 1 and text.isprintable() and "Traceback" not in text


def test_each_reply_is_of_one_episode(server: ReplyServer, tmp_path: Path) -> None:
    settings = build_library(tmp_path, videos=1)
    (sample,) = read_samples(settings.paths.test_samples)
    jobs = [Job(sample.model_copy(update={"id": kind, "question": f"What? reply-as {kind}."})) for kind in REPLIES]
    settings.infer.concurrency = 8
    policy = OpenAIPolicy([server.at("plain")], "tiny", retry_for=0.2)
    ended: dict[str, Prediction] = {}
    asyncio.run(play_all(jobs, policy, settings, lambda job, row: ended.update({job.sample.id: row})))
    assert {kind: row.error.type if row.error else row.outcome for kind, row in ended.items()} == {
        kind: expected for kind, (expected, _) in REPLIES.items()
    }
    assert all(one_sentence(row.error.message) for row in ended.values() if row.error)
    assert all(row.usage.cached <= 9 and row.usage.prefilled >= 0 for row in ended.values())


def test_ask_ends_in_one_sentence(
    server: ReplyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings.model_validate({"frames": {"factor": 32, "min_pixels": 4096, "max_pixels": 4096}})
    settings.search.patch = 32
    video = make_video(tmp_path / "video.mp4", seconds=2)
    codes = {"answered": 0, "unanswered": 0, "bad_reply": 1, "refused": 1, "engine": 75}
    for kind, (expected, _) in REPLIES.items():
        policy = OpenAIPolicy([server.at("plain")], "tiny", retry_for=0.1)
        asker = Asker(settings, policy, MeanColour(), tmp_path / "cache")
        monkeypatch.setattr(commands, "_open_asker", lambda *_, opened=(asker, policy): nullcontext(opened))
        with pytest.raises(SystemExit) as ended:
            main(["ask", str(video), f"What? reply-as {kind}."])
        said = capsys.readouterr().err
        assert (kind, int(ended.value.code or 0)) == (kind, codes[expected])
        assert said == "" or one_sentence(said.removesuffix("\n")), said


@pytest.mark.parametrize("kind", sorted(FAILING))
def test_what_lists_no_models_is_said(server: ReplyServer, kind: str) -> None:
    """By a policy's client, by the holder of a judge's server, and by an encoder."""
    url = server.at(f"models/{kind}")
    passes = FAILING[kind] == "engine"
    policy = OpenAIPolicy([url], "tiny", retry_for=0.0)

    async def connect() -> None:
        try:
            await policy.connect()
        finally:
            await policy.close()

    def hold() -> None:
        with judge_server(Judge(kind="server", url=url, model="tiny", start=False)):
            pass

    for use in (lambda: asyncio.run(connect()), hold):
        with pytest.raises(TemporaryError if passes else RequestError) as caught:
            use()
        assert one_sentence(str(caught.value))


def test_what_gives_no_embeddings_is_said(server: ReplyServer) -> None:
    for kind in sorted(REPLIES):
        encoder = load_encoder(server.at(kind), "tiny")
        if FAILING.get(kind) != "engine":
            with pytest.raises(RequestError) as caught:
                encoder.encode_text(["a cat"])
            assert one_sentence(str(caught.value))


def test_what_gives_no_verdict_is_said(server: ReplyServer, tmp_path: Path) -> None:
    for kind in sorted(REPLIES):
        judge = Judge(kind="server", url=server.at(kind), model="tiny", cache=tmp_path / "verdicts", retry_for=0.0)
        with pytest.raises(JudgeError if FAILING.get(kind) == "engine" else JudgeRefusedError) as caught:
            JudgeClient(judge).score("q", "a", "b")
        assert one_sentence(str(caught.value))


def test_an_answer_without_a_verdict_is_left_out_and_the_others_count(
    server: ReplyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the judge replies to one, once and again when the run is repeated."""
    monkeypatch.setitem(REPLIES, "yes", ("answered", http(completion({"content": "1"}))))
    judge = Judge(kind="server", url=server.at("yes"), model="tiny", cache=tmp_path / "verdicts", retry_for=0.0)
    unread = [kind for kind, reason in FAILING.items() if reason != "engine"]
    said = {f"plain-{number}": (f"cat {number}", "a cat") for number in range(len(unread) // 10 + 1)}
    said |= {kind: (f"reply-as {kind}.", "a cat") for kind in unread} | {"again": ("a cat", f"reply-as {unread[0]}.")}
    rows = [
        {"id": name, "video": "v.mp4", "question": "?", "answer": "a cat", "predicted_answer": first, "reanswer": again}
        for name, (first, again) in said.items()
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({**row, "type": "open_ended"}) + "\n" for row in rows))
    for _ in range(2):
        options = Evaluate(bootstrap=0, visual=False)
        (method,) = evaluate_files({"p": path}, options, None, lambda: JudgeClient(judge))
        for episode in method.episodes:
            absent = {
                name for name in ("qa_accuracy", "reanswer_accuracy", "completeness") if name not in episode.values
            }
            missing = (
                {"qa_accuracy"} if episode.id in unread else {"reanswer_accuracy"} if episode.id == "again" else {}
            )
            assert absent == ({*missing, "completeness"} if missing else set())
        assert {failure.item for failure in method.failures if failure.reason == "unjudged"} == {*unread, "again"}
        assert method.metrics["qa_accuracy"] == 1.0


def test_a_judge_that_stops_giving_verdicts_ends_the_command(
    server: ReplyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REPLIES, "yes", ("answered", http(completion({"content": "1"}))))
    judge = Judge(kind="server", url=server.at("yes"), model="tiny", cache=tmp_path / "verdicts")
    client = JudgeClient(judge)
    assert client.score("q", "a", "b") == 1.0
    unread = [("q", "a", f"{number} reply-as page.") for number in range(11)]
    assert asyncio.run(client.score_many(unread[:10])) == [None] * 10
    for judging, candidate in ((client, unread[10]), (JudgeClient(judge), unread[0])):
        with pytest.raises(JudgeRefusedError):
            judging.score(*candidate)


VERDICTS = {
    "bare": ({"content": "1"}, 1.0),
    "lines": ({"content": "\n0\n"}, 0.0),
    "quoted": ({"content": '"1"'}, 1.0),
    "bold": ({"content": "**1**."}, 1.0),
    "parts": ({"content": [{"type": "text", "text": "0"}]}, 0.0),
    "after-a-thought": ({"content": "<think>0 or 1?</think>\n\n1"}, 1.0),
    "taken-for-a-thought": ({"content": None, "reasoning_content": "1"}, 1.0),
    "beside-a-thought": ({"content": "0", "reasoning": "1"}, 0.0),
    "sentence": ({"content": "The answer is right: 1."}, "instead of 0 or 1: use a server with structured outputs"),
    "cut-thought": ({"content": "<think>They might"}, "it thinks aloud"),
    "thought-alone": ({"content": None, "reasoning_content": "They might"}, "it thinks aloud"),
    "nothing": ({"content": None}, "answered '' instead of 0 or 1"),
    "other-number": ({"content": "10"}, "answered '10' instead"),
    "both": ({"content": "0 1"}, "answered '0 1' instead"),
}


@pytest.mark.parametrize("kind", VERDICTS)
def test_a_verdict_is_read_or_its_absence_explained(
    server: ReplyServer, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, expected = VERDICTS[kind]
    monkeypatch.setitem(REPLIES, "verdict", ("answered", http(completion(message))))
    judge = JudgeClient(Judge(kind="server", url=server.at("verdict"), model="tiny", cache=tmp_path / "verdicts"))
    if isinstance(expected, float):
        assert judge.score("q", "a", "b") == expected
    else:
        with pytest.raises(JudgeRefusedError, match=expected):
            judge.score("q", "a", "b")


def test_a_judge_without_structured_outputs_is_asked_without_them(tmp_path: Path) -> None:
    asked: list[set[str]] = []

    class Plain(_Handler):
        def do_POST(self) -> None:
            asked.append(set(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            unknown = json.dumps({"error": {"message": "Unrecognized request argument supplied: structured_outputs"}})
            refused = "structured_outputs" in asked[-1]
            self.wfile.write(http(unknown, "400 Bad Request") if refused else http(completion({"content": "1"})))

    server = ReplyServer(("127.0.0.1", 0), Plain)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge = Judge(kind="server", url=server.at("plain"), model="tiny", cache=tmp_path / "verdicts", concurrency=1)
    try:
        assert asyncio.run(JudgeClient(judge).score_many([("q", "a", "b"), ("q", "a", "c")])) == [1.0, 1.0]
    finally:
        server.shutdown()
    assert ["structured_outputs" in fields for fields in asked] == [True, False, False]


def test_a_store_of_verdicts_that_is_none_is_named(tmp_path: Path) -> None:
    store = tmp_path / "verdicts"
    store.write_text("not a database" * 100)
    with pytest.raises(RequestError, match=r"verdicts does not keep verdicts .* judge\.cache"):
        JudgeClient(Judge(kind="server", cache=store)).score("q", "a", "b\ud83d")


def test_a_reply_that_drips_is_late() -> None:
    class Dripping(_Handler):
        def do_POST(self) -> None:
            self.wfile.write(http("", Content_Length="9999"))
            while not self.server.stopped.wait(0.02):
                self.wfile.write(b" ")

    server = ReplyServer(("127.0.0.1", 0), Dripping)
    server.stopped = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()

    async def ask() -> None:
        async with httpx.AsyncClient() as client:
            await request(client, "POST", server.at("x"), Completion, content=b"{}", timeout=0.3)

    try:
        with pytest.raises(httpx.ReadTimeout, match=r"no whole reply within 0\.3 s") as caught:
            asyncio.run(ask())
    finally:
        server.stopped.set()
        server.shutdown()
    assert may_pass(caught.value)
