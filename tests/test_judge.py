import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scratch_project import free_port

from timesearch.base import servers
from timesearch.base.errors import RequestError
from timesearch.base.servers import ServerError
from timesearch.judge import JudgeClient, JudgeError, JudgeRefusedError, RuleJudge, make_judge
from timesearch.judge.agreement import LABELLED, cohen_kappa, measure, read_labelled
from timesearch.judge.server import judge_server
from timesearch.settings import Judge

STUB = Path(__file__).with_name("judge_stub.py")


def settings(folder: Path, *flags: str, **changes: object) -> Judge:
    values: dict[str, object] = {
        "kind": "server",
        "url": f"http://127.0.0.1:{free_port()}/v1",
        "model": "stub",
        "command": [sys.executable, str(STUB), "{port}", "{model}", *flags],
        "start_timeout": 30.0,
        "retry_for": 20.0,
        "cache": folder / "judge.sqlite",
        "log": folder / "judge.log",
    }
    return Judge.model_validate({**values, **changes})


def asked(judge: Judge) -> dict[str, int]:
    return dict(httpx.get(judge.url.removesuffix("/v1") + "/asked").json())


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()


def gone(pids: list[int], within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def children_of(log: Path) -> list[int]:
    return [int(pid) for pid in re.findall(r"child (\d+)", log.read_text())]


def test_scores_come_in_order_bounded_and_each_is_asked_once(tmp_path: Path) -> None:
    judge = settings(tmp_path, concurrency=3)
    triples = [("q", str(i), str(i if i % 2 else i + 1)) for i in range(12)] * 2
    with judge_server(judge):
        scores = asyncio.run(JudgeClient(judge).score_many(triples))
        seen = asked(judge)
    assert scores == [float(i % 2) for i in range(12)] * 2
    assert seen["asked"] == 12
    assert 2 <= seen["most"] <= 3


def test_verdicts_are_kept_on_disk_per_model(tmp_path: Path) -> None:
    judge = settings(tmp_path)
    with judge_server(judge):
        assert JudgeClient(judge).score("q", "a", "a") == 1.0
    assert JudgeClient(judge).score("q", "a", "a") == 1.0
    with pytest.raises(JudgeError, match=r"no judge at .* for 0 s"):
        JudgeClient(judge.model_copy(update={"model": "other", "retry_for": 0.0})).score("q", "a", "a")


def test_long_and_empty_candidates_score_zero_unasked(tmp_path: Path) -> None:
    judge = settings(tmp_path, retry_for=0.0)
    assert (
        asyncio.run(JudgeClient(judge).score_many([("q", "a", ""), ("q", "a", "  "), ("q", "a", "a" * 101)])) == [0] * 3
    )


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_refusals_are_retried(tmp_path: Path, status: int) -> None:
    judge = settings(tmp_path, "--refuse-first", "2", "--status", str(status))
    with judge_server(judge):
        assert JudgeClient(judge).score("q", "a", "a") == 1.0
        assert asked(judge)["asked"] == 3


def test_a_refused_request_is_an_error_at_once(tmp_path: Path) -> None:
    judge = settings(tmp_path, "--refuse-first", "9", "--status", "400")
    with judge_server(judge):
        with pytest.raises(JudgeRefusedError, match=r"refused \(400\)"):
            JudgeClient(judge).score("q", "a", "a")
        assert asked(judge)["asked"] == 1


def test_text_of_answers_is_not_taken_for_marks_of_the_prompt(tmp_path: Path) -> None:
    judge = settings(tmp_path)
    with judge_server(judge):
        client = JudgeClient(judge)
        assert client.score("what is {candidate}?", "{candidate}", "x") == 0.0
        assert client.score("q", "\\1 {question}", "\\1 {question}") == 1.0


def test_a_judge_that_dies_is_started_again_and_no_score_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "_LOOK_EVERY", 0.1)
    judge = settings(tmp_path, "--children")
    with judge_server(judge):
        client = JudgeClient(judge)
        assert client.score("q", "a", "a") == 1.0
        first = children_of(judge.log)
        os.killpg(os.getpgid(first[0]), signal.SIGKILL)
        scores = asyncio.run(client.score_many([("q", str(i), str(i)) for i in range(10)]))
    assert scores == [1.0] * 10
    assert len(children_of(judge.log)) == 2
    assert gone(children_of(judge.log))


def test_the_whole_process_group_ends_with_the_block(tmp_path: Path) -> None:
    judge = settings(tmp_path, "--children")
    with pytest.raises(KeyError), judge_server(judge):
        raise KeyError(children_of(judge.log)[0])
    assert gone(children_of(judge.log), within=1)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(judge.url.split(":")[2].split("/")[0]))) != 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_server_outlives_a_killed_parent(tmp_path: Path, how: signal.Signals) -> None:
    judge = settings(tmp_path, "--children")
    params = tmp_path / "params.yaml"
    params.write_text(json.dumps({"judge": judge.model_dump(mode="json")}))
    parent = subprocess.Popen(
        [sys.executable, "-m", "timesearch", "judge", "serve", "--params", str(params)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert any("Ctrl-C stops it" in line for line in parent.stdout)
    children = children_of(judge.log)
    assert children
    parent.send_signal(how)
    assert gone(children)
    parent.wait(20)


def test_a_running_judge_is_used_and_left_running(tmp_path: Path) -> None:
    judge = settings(tmp_path)
    with judge_server(judge):
        said: list[str] = []
        with judge_server(judge.model_copy(update={"log": tmp_path / "second.log"}), say=said.append):
            assert JudgeClient(judge).score("q", "a", "a") == 1.0
        assert said == [f"judge: using the server of stub that is already at {judge.url}"]
        assert JudgeClient(judge).score("q", "b", "b") == 1.0


def test_a_borrowed_judge_that_goes_away_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_LOOK_EVERY", 0.1)
    judge = settings(tmp_path)
    owner = judge_server(judge)
    owner.__enter__()
    with judge_server(judge.model_copy(update={"log": tmp_path / "second.log"})):
        owner.__exit__(None, None, None)
        assert JudgeClient(judge).score("q", "a", "a") == 1.0


def test_another_model_at_the_address_is_refused(tmp_path: Path) -> None:
    judge = settings(tmp_path)
    other = judge.model_copy(update={"model": "wanted"})
    with judge_server(judge), pytest.raises(RequestError, match="serves stub, not wanted"), judge_server(other):
        pass


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    judge = settings(tmp_path, "--plain")
    port = judge.url.split(":")[2].split("/")[0]
    other = subprocess.Popen([sys.executable, str(STUB), port, "x", "--plain"], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(RequestError, match=f"port {port} on 127.0.0.1 is taken"), judge_server(judge):
            pass
    finally:
        other.kill()
        other.wait()


def test_a_server_that_fails_shows_the_end_of_its_log_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret")
    judge = settings(tmp_path, "--say", "CUDA out of memory, token hf_planted_secret", "--exit", "3")
    with pytest.raises(ServerError) as caught, judge_server(judge):
        pass
    text = str(caught.value)
    assert "exit status 3" in text
    assert "too little memory" in text
    assert "CUDA out of memory, token ***" in text
    assert "planted" not in text


def test_a_server_that_never_answers_is_given_up_and_stopped(tmp_path: Path) -> None:
    judge = settings(
        tmp_path, command=[sys.executable, "-c", "import time; print('loading'); time.sleep(99)"], start_timeout=1.0
    )
    with pytest.raises(ServerError, match="did not answer within 1 s"), judge_server(judge):
        pass


def test_an_absent_judge_that_is_not_to_be_started_is_an_error(tmp_path: Path) -> None:
    judge = settings(tmp_path, start=False)
    with pytest.raises(ServerError, match="no judge answers"), judge_server(judge):
        pass


def test_the_rule_needs_no_server() -> None:
    judge = make_judge(Judge(kind="rule"))
    assert isinstance(judge, RuleJudge)
    with judge_server(Judge(kind="rule")) as url:
        assert url is None
    assert judge.score("q", "the red car", "Red car.") == 1.0


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_kappa_is_symmetric_and_one_only_where_all_agree(pairs: list[tuple[int, int]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    kappa = cohen_kappa(first, second)
    assert -1.0 <= kappa <= 1.0
    assert kappa == pytest.approx(cohen_kappa(second, first))
    assert (kappa == pytest.approx(1.0)) == (first == second)


def test_kappa_of_a_published_table() -> None:
    """Cohen's own kind of table: 20 both yes, 15 both no, 5 and 10 apart gives 0.4."""
    first = [1] * 25 + [0] * 25
    second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)


def test_the_labelled_set_is_whole_and_measures() -> None:
    rows = read_labelled(LABELLED)
    assert len(rows) >= 50
    assert len({(row.question, row.reference, row.candidate) for row in rows}) == len(rows)
    result = measure(RuleJudge(), rows)
    assert 0.5 < result.accuracy < 1.0
    assert len(result.disputed) == round((1 - result.accuracy) * len(rows))


def test_a_wrong_labelled_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"question": "q", "reference": "a", "candidate": "b", "label": 2}\n')
    with pytest.raises(RequestError, match=r"labels\.jsonl, line 1: field 'label'"):
        read_labelled(path)
