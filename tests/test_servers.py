"""The policy server of inference, held by the same rules as the judge's (test_judge.py), and servers that meet."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from players import build_library
from scratch_project import free_port, wait_for
from scripted import OracleEncoder
from test_judge import children_of, gone

from timesearch.base.errors import RequestError
from timesearch.base.servers import ServerError, _is_here
from timesearch.data.samples import Prediction
from timesearch.inference.infer import run
from timesearch.judge import JudgeClient
from timesearch.judge.server import judge_server
from timesearch.settings import Judge, Settings

TESTS = Path(__file__).parent
STUB = [sys.executable, str(TESTS / "policy_server.py")]
INFER = "import scripted; scripted.use_oracle(); from timesearch.cli import main; main()"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Two questions, an empty checkpoint, and a policy server to be started for it."""
    settings = build_library(tmp_path, videos=2)
    settings.paths.train.mkdir(parents=True)
    settings.infer.engine = "openai"
    settings.infer.baselines = []
    settings.infer.port = free_port()
    settings.infer.command = [*STUB, "{port}", "0", "{model}"]
    settings.infer.start_timeout = 30.0
    settings.infer.log = tmp_path / "policy.log"
    settings.tracking.traced_episodes = 0
    monkeypatch.setattr("timesearch.retrieval.encoder.load_encoder", lambda *_, **__: OracleEncoder())
    return settings


@contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A server of somebody else."""
    process = subprocess.Popen([*map(str, arguments)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()


def served(settings: Settings) -> list[str]:
    """Models that are served at the port of inference."""
    url = f"http://127.0.0.1:{settings.infer.port}/v1/models"
    try:
        return [entry["id"] for entry in httpx.get(url, timeout=5).json()["data"]]
    except httpx.HTTPError:
        return []


def text_of(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def outcomes(settings: Settings) -> list[str | None]:
    path = settings.paths.results / "predictions" / "grpo_csv.jsonl"
    return [Prediction.model_validate_json(line).outcome for line in path.read_text().splitlines()]


def test_inference_starts_a_policy_server_and_stops_it_whole(settings: Settings) -> None:
    run(settings)
    assert outcomes(settings) == ["answered"] * 2
    (child,) = children_of(settings.infer.log)
    assert gone([child], within=1)
    assert served(settings) == []


@pytest.mark.takes(9)
def test_a_policy_server_that_dies_is_started_again_and_no_episode_is_lost(settings: Settings) -> None:
    settings.infer.command[-2] = "1"
    working = threading.Thread(target=run, args=(settings,))
    working.start()
    wait_for(lambda: "asked" in text_of(settings.infer.log), 60, "the first episode")
    (child,) = children_of(settings.infer.log)
    os.killpg(os.getpgid(child), signal.SIGKILL)
    working.join()
    assert outcomes(settings) == ["answered"] * 2
    assert len(children_of(settings.infer.log)) == 2
    assert gone(children_of(settings.infer.log))


@pytest.mark.takes(8)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_policy_server_outlives_killed_inference(settings: Settings, tmp_path: Path, how: signal.Signals) -> None:
    settings.infer.command[-2] = "600"
    params = tmp_path / "params.yaml"
    params.write_text(settings.model_dump_json())
    inference = subprocess.Popen(
        [sys.executable, "-c", INFER, "infer", "--params", str(params)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )
    wait_for(lambda: served(settings), 120, "the policy server")
    children = children_of(settings.infer.log)
    assert children
    inference.send_signal(how)
    assert gone(children)
    assert served(settings) == []
    inference.wait(60)


def test_a_running_policy_server_is_used_and_left_running(settings: Settings) -> None:
    model = str(settings.paths.train)
    with running(*STUB, settings.infer.port, "0", model):
        wait_for(lambda: served(settings), 30, "the policy server")
        run(settings)
        assert outcomes(settings) == ["answered"] * 2
        assert served(settings) == [model]
    assert not settings.infer.log.exists()


def test_another_policy_at_the_port_is_refused(settings: Settings) -> None:
    with running(*STUB, settings.infer.port, "0", "other"):
        wait_for(lambda: served(settings), 30, "the policy server")
        with pytest.raises(RequestError, match=r"serves other, not .* in infer\.port"):
            run(settings)


def test_a_taken_port_of_the_policy_is_refused(settings: Settings) -> None:
    plain = [sys.executable, TESTS / "judge_stub.py", settings.infer.port, "x", "--plain"]
    with running(*plain), pytest.raises(RequestError, match=f"port {settings.infer.port} on 127.0.0.1 is taken"):
        run(settings)


def test_a_policy_server_that_fails_shows_the_end_of_its_log_without_secrets(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret")
    failing = "import sys; print('CUDA out of memory, token hf_planted_secret'); sys.exit(3)"
    settings.infer.command = [sys.executable, "-c", failing]
    with pytest.raises(ServerError, match=r"exit status 3 before it answered: too little memory") as caught:
        run(settings)
    assert "CUDA out of memory, token ***" in str(caught.value)
    assert "planted" not in str(caught.value)


def test_a_policy_server_that_never_answers_is_given_up_and_stopped(settings: Settings) -> None:
    settings.infer.command = [
        sys.executable,
        "-c",
        "import os, time; print('child', os.getpid(), flush=True); time.sleep(99)",
    ]
    settings.infer.start_timeout = 2.0
    with pytest.raises(ServerError, match=r"did not answer within 2 s: give infer\.start_timeout more"):
        run(settings)
    assert gone(children_of(settings.infer.log), within=1)


@pytest.mark.takes(10)
def test_two_that_need_a_server_at_one_address_start_it_once(tmp_path: Path) -> None:
    """Also when it has died: a second copy of a large model would find its memory taken."""
    stub = [sys.executable, str(TESTS / "judge_stub.py"), "{port}", "{model}", "--children", "--load", "3"]
    judge = Judge(kind="server", url=f"http://127.0.0.1:{free_port()}/v1", model="stub", command=stub, start_timeout=30)
    logs = [tmp_path / "one.log", tmp_path / "two.log"]

    def started() -> list[int]:
        return [pid for log in logs if log.exists() for pid in children_of(log)]

    with ExitStack() as holders:
        holding = [
            threading.Thread(target=holders.enter_context, args=(hold,))
            for hold in (judge_server(judge.model_copy(update={"log": log})) for log in logs)
        ]
        for thread in holding:
            thread.start()
        for thread in holding:
            thread.join()
        (first,) = started()
        os.killpg(os.getpgid(first), signal.SIGKILL)
        wait_for(lambda: len(started()) > 1, 30, "a second server")
        wait_for(lambda: _healthy(judge), 30, "its answer")
        assert len(started()) == 2
    assert gone(started())


def test_a_key_is_sent_with_every_request_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    port, key, said = free_port(), "sk-planted-key-0123456789", []
    judge = Judge(
        kind="server", url=f"http://127.0.0.1:{port}/v1", model="stub", cache=tmp_path / "judge.sqlite", retry_for=5
    )
    with running(sys.executable, TESTS / "judge_stub.py", port, "stub", "--key", key):
        monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-wrong-key")
        with pytest.raises(RequestError, match=r"refuses \(401\): set OPENAI_API_KEY") as caught, judge_server(judge):
            pass
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with judge_server(judge, say=said.append):
            assert JudgeClient(judge).score("q", "a", "a") == 1.0
    assert said == [f"judge: using the server of stub that is already at {judge.url}"]
    assert "planted" not in str(caught.value) + "".join(capfd.readouterr())


def test_another_machines_server_is_waited_for_and_never_started_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No address of another machine can be served from here, so this machine's own is taken for one."""
    monkeypatch.setattr("timesearch.base.servers._is_here", lambda host: False)
    port, said = free_port(), []
    stub = [sys.executable, str(TESTS / "judge_stub.py"), str(port), "stub"]
    judge = Judge(kind="server", url=f"http://127.0.0.1:{port}/v1", model="stub", command=stub, log=tmp_path / "log")
    absent = judge.model_copy(update={"start_timeout": 0.5})
    with (
        pytest.raises(ServerError, match=r"no judge answered at .* within 0\.5 s: start it there"),
        judge_server(absent),
    ):
        pass
    other = threading.Timer(1.0, lambda: held.enter_context(running(*stub)))
    with ExitStack() as held:
        other.start()
        with judge_server(judge, say=said.append):
            assert threading.enumerate() == [thread for thread in threading.enumerate() if "keeper" not in thread.name]
        other.join()
    assert "which is another machine: waiting for it" in said[0]
    assert not judge.log.exists()


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        (socket.gethostname(), True),
        ("192.0.2.1", False),
        ("no.invalid", False),
    ],
)
def test_which_addresses_are_this_machines(host: str, here: bool) -> None:
    assert _is_here(host) == here


def _healthy(judge: Judge) -> bool:
    try:
        return bool(json.loads(httpx.get(f"{judge.url}/models", timeout=5).text)["data"])
    except httpx.HTTPError:
        return False
