import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scratch_project import free_port, wait_for

from timesearch import tracking
from timesearch.base.redaction import redact, redact_value
from timesearch.data.samples import EpisodeError, Prediction
from timesearch.judge import make_judge
from timesearch.settings import Judge, Settings, Tracking
from timesearch.tracking import PARENT_RUN, parent_run, stage_run

EPISODE = Prediction(
    id="sample-1",
    video="v.mp4",
    question="What colour is the ring?",
    answer="red",
    prediction=[
        {"role": "system", "content": "Search."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "0.5s"},
                {"type": "image", "seconds": 0.5, "frame": 0},
                {"type": "text", "text": "What colour is the ring?"},
            ],
        },
        {
            "role": "assistant",
            "content": '<think>Look.</think>\n<tool_call>{"name": "seek_video_frames", '
            '"arguments": {"query": "ring"}}</tool_call>',
        },
        {
            "role": "tool",
            "content": [{"type": "text", "text": "3.0s"}, {"type": "image", "seconds": 3.0, "frame": 6}],
        },
        {"role": "assistant", "content": "<think>Red.</think>\n<answer>red</answer>"},
    ],
    predicted_answer="red",
    searched_seconds=[3.0],
    turns=2,
)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv(PARENT_RUN, raising=False)
    return Settings(tracking=Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db"))


def test_runs_nest_and_a_resumed_stage_goes_on_in_its_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    (tmp_path / "dvc.lock").write_text("schema: '2.0'\n")
    (tmp_path / "plot.csv").write_text("a,b\n")
    with parent_run(settings, "pipeline") as parent:
        monkeypatch.setenv(PARENT_RUN, str(parent.id))
        with suppress(KeyboardInterrupt), stage_run(settings, "train", keep=tmp_path / "run") as run:
            run.log_metrics({"reward": 0.5}, step=1)
            raise KeyboardInterrupt
        with stage_run(settings, "train", keep=tmp_path / "run") as again:
            again.log_metrics({"reward": 0.7}, step=2)
            again.log_artifact(tmp_path / "plot.csv", "plots")
            again.log_episode(EPISODE, None)
    client = MlflowClient(settings.tracking.uri)
    stage = client.get_run(str(again.id))
    assert again.id == run.id
    assert stage.info.status == "FINISHED"
    assert stage.data.tags["mlflow.parentRunId"] == parent.id
    assert len(stage.data.tags["dvc_lock_sha256"]) == 64
    assert float(stage.data.params["train.learning_rate"]) == 1e-6
    assert "search.max_turns" in stage.data.params
    assert [(m.step, m.value) for m in client.get_metric_history(str(run.id), "reward")] == [(1, 0.5), (2, 0.7)]
    assert [item.path for item in client.list_artifacts(str(run.id), "plots")] == ["plots/plot.csv"]
    assert Path(stage.info.artifact_uri).is_relative_to(tmp_path), "artifacts lie beside the store, not where we are"

    traces = client.search_traces(locations=[stage.info.experiment_id])
    assert [trace.info.trace_metadata["mlflow.sourceRun"] for trace in traces] == [run.id]
    spans = [(span.name, span.span_type) for span in traces[0].data.spans]
    assert sorted(spans) == sorted(
        [
            ("episode", "AGENT"),
            ("turn 1: seek_video_frames: ring", "CHAT_MODEL"),
            ("seek_video_frames", "TOOL"),
            ("turn 2: answer", "CHAT_MODEL"),
        ]
    )
    shown = next(span for span in traces[0].data.spans if span.span_type == "TOOL").outputs
    assert shown == [{"type": "text", "text": "3.0s"}, {"type": "text", "text": "[frame 6]"}]


def test_a_failed_stage_is_recorded_as_failed(settings: Settings) -> None:
    from mlflow import MlflowClient

    with pytest.raises(ValueError, match="bad"), stage_run(settings, "frames") as run:
        raise ValueError("bad")
    assert MlflowClient(settings.tracking.uri).get_run(str(run.id)).info.status == "FAILED"


@pytest.mark.takes(20)
def test_a_store_that_is_away_costs_nothing_and_gets_all_when_it_is_back(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    with stage_run(settings, "models"):
        pass
    monkeypatch.setattr(tracking, "_RETRY_AFTER", 0.2)
    lock = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    with caplog.at_level(logging.WARNING, "timesearch.tracking"), stage_run(settings, "train") as run:
        began = time.monotonic()
        for step in range(100):
            run.log_metrics({"reward": float(step)}, step=step)
        assert time.monotonic() - began < 1.0
        assert run.id is None
        lock.execute("ROLLBACK")
        wait_for(lambda: run.id, 120, "the run")
    client = MlflowClient(settings.tracking.uri)
    history = client.get_metric_history(str(run.id), "reward")
    assert [(metric.step, metric.value) for metric in history] == [(step, float(step)) for step in range(100)]
    assert client.get_run(str(run.id)).info.status == "FINISHED"


def test_a_server_that_stays_away_is_said_without_its_password_and_the_work_is_done(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "_RETRY_AFTER", 0.2)
    monkeypatch.setattr(tracking, "_LAST_CHANCE", 0.5)
    away = settings.model_copy(update={"tracking": Tracking(uri="http://user:planted@127.0.0.1:9")})
    with caplog.at_level(logging.WARNING, "timesearch.tracking"), stage_run(away, "train") as run:
        run.log_metrics({"reward": 1.0}, step=1)
        wait_for(lambda: caplog.records, 120, "a warning")
    said = [record.getMessage() for record in caplog.records if record.name == "timesearch.tracking"]
    assert len(said) == 2
    assert "MLflow at http://***@127.0.0.1:9" in said[0]
    assert "work goes on" in said[0]
    assert "the last records of this run (train) are not in it" in said[1]
    assert "planted" not in caplog.text


def test_what_mlflow_never_takes_blocks_nothing_and_is_named_once(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A store of files that refuses; a metric's name that no MLflow takes; runs and experiments that were deleted."""
    from mlflow import MlflowClient

    monkeypatch.setattr(tracking, "_RETRY_AFTER", 600.0)
    caplog.set_level(logging.WARNING, "timesearch.tracking")

    def said() -> list[str]:
        lines = [record.getMessage() for record in caplog.records if record.name == "timesearch.tracking"]
        caplog.clear()
        return lines

    client = MlflowClient(settings.tracking.uri)
    experiment = client.create_experiment("timesearch", "/proc/no-place-for-files")
    (tmp_path / "plot.csv").write_text("a,b\n")
    keep = tmp_path / "run"
    with stage_run(settings, "train", keep=keep) as run:
        for step in range(6):
            run.log_metrics({"reward": float(step)}, step=step)
            run.log_artifact(tmp_path / "plot.csv", "plots")
        run.log_metrics({"no\nname": 1.0})
        run.set_tags({"said": "last"})
    done = client.get_run(str(run.id))
    assert [metric.step for metric in client.get_metric_history(str(run.id), "reward")] == list(range(6))
    assert (done.info.status, done.data.tags["said"]) == ("FINISHED", "last")
    (line,) = said()
    assert "did not take 7 records of this run (train), the first of them plots/plot.csv: " in line

    client.delete_run(str(run.id))
    with stage_run(settings, "train", keep=keep) as again:
        assert again.id not in (None, run.id)
        client.delete_experiment(experiment)
        again.log_metrics({"reward": 1.0})
        again.log_metrics({"reward": 2.0})
    (line,) = said()
    assert "the run was deleted, or its experiment" in line

    with stage_run(settings, "train") as third:
        assert third.id is None
    (line,) = said()
    assert f"was deleted: restore it (mlflow experiments restore --experiment-id {experiment})" in line


@pytest.mark.parametrize(
    "copy", [".dvc/tmp/exps/tmpabc", ".dvc/tmp/exps/standalone/tmpabc", ".dvc/tmp/exps/tmpabc/sub"]
)
def test_a_run_in_dvcs_copy_is_recorded_in_the_project(
    copy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dvc exp run --temp` and `--queue` remove the copy with all that is in it."""
    (tmp_path / copy).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / copy)
    settings = Settings()
    assert tracking.tracking_uri(settings) == f"sqlite:///{tmp_path}/mlflow.db"
    settings.tracking.uri = "http://127.0.0.1:5000"
    assert tracking.tracking_uri(settings) == "http://127.0.0.1:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////elsewhere/mlflow.db")
    assert tracking.tracking_uri(settings) == "sqlite:////elsewhere/mlflow.db"
    make_judge(Judge(kind="server"))._verdicts.put("key", 1.0)
    assert (tmp_path / "cache" / "judge.sqlite").is_file()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.tracking_uri(Settings()) == "sqlite:///mlflow.db"


@pytest.fixture
def serve_mlflow(tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen[bytes]]]:
    """Start MLflow's tracking server at a port, on one store; what still runs is killed at the end."""
    started: list[subprocess.Popen[bytes]] = []
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # jobs of its pages: slow to start

    def start(port: int) -> subprocess.Popen[bytes]:
        with (tmp_path / "server.log").open("ab") as log:
            server = subprocess.Popen(
                [*command, "--port", str(port)],
                env=environment,
                stdout=log,
                stderr=log,
                cwd=tmp_path,
                start_new_session=True,
            )
        started.append(server)
        wait_for(lambda: _answers(f"http://127.0.0.1:{port}/health"), 300, "the MLflow server")
        return server

    yield start
    for server in started:
        kill(server)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


def kill(server: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the server and its workers."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.takes(25)
def test_a_server_that_goes_away_amid_a_run_gets_all_when_it_is_back(
    settings: Settings,
    serve_mlflow: Callable[[int], subprocess.Popen[bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr(tracking, "_RETRY_AFTER", 0.2)
    (tmp_path / "plot.csv").write_text("a,b\n")
    port = free_port()
    remote = settings.model_copy(update={"tracking": Tracking(uri=f"http://127.0.0.1:{port}")})
    server = serve_mlflow(port)
    with caplog.at_level(logging.WARNING, "timesearch.tracking"), stage_run(remote, "train") as run:
        run.log_metrics({"reward": 0.0}, step=0)
        client = MlflowClient(remote.tracking.uri)
        wait_for(lambda: client.get_metric_history(str(run.id), "reward"), 60, "the first metric")
        kill(server)
        run.log_episode(EPISODE, None)
        for step in range(1, 50):
            run.log_metrics({"reward": float(step)}, step=step)
        run.log_artifact(tmp_path / "plot.csv", "plots")
        wait_for(lambda: "work goes on" in caplog.text, 60, "a warning")
        serve_mlflow(port)
    assert "MLflow is back" in caplog.text
    history = client.get_metric_history(str(run.id), "reward")
    assert [(metric.step, metric.value) for metric in history] == [(step, float(step)) for step in range(50)]
    assert [item.path for item in client.list_artifacts(str(run.id), "plots")] == ["plots/plot.csv"]
    done = client.get_run(str(run.id))
    assert done.info.status == "FINISHED"
    (trace,) = client.search_traces(locations=[done.info.experiment_id])
    assert len(trace.data.spans) == 4


def test_files_and_traces_are_recorded_without_secrets(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret")
    source = "https://user:planted@h/v.mp4?token=planted"
    folder = tmp_path / "results"
    (folder / "inner").mkdir(parents=True)
    (folder / "rows.jsonl").write_text(json.dumps({"source": source, "note": "é"}) + "\n")
    (folder / "inner" / "clean.txt").write_text("nothing to hide")
    (folder / "inner" / "image.jpg").write_bytes(b"\xff\xd8\xff")
    episode = EPISODE.model_copy(deep=True)
    episode.error = EpisodeError(type="engine", message=f"{source} with hf_planted_secret")
    episode.prediction[-1]["content"] += " hf_planted_secret"
    with stage_run(settings, "infer") as run:
        run.log_artifact(folder, "results")
        run.log_artifact(folder / "rows.jsonl")
        run.log_episode(episode)
    client = MlflowClient(settings.tracking.uri)
    assert {item.path for item in client.list_artifacts(str(run.id))} == {"results", "rows.jsonl"}
    got = Path(client.download_artifacts(str(run.id), "results", str(tmp_path)))
    assert (got / "inner" / "clean.txt").read_text() == "nothing to hide"
    assert (got / "inner" / "image.jpg").read_bytes() == b"\xff\xd8\xff"
    row = json.loads((got / "rows.jsonl").read_text())
    assert row == {"source": "https://***@h/v.mp4?token=***", "note": "é"}
    (trace,) = client.search_traces(locations=[client.get_run(str(run.id)).info.experiment_id])
    text = json.dumps(trace.to_dict())
    assert "https://***@h/v.mp4?token=***" in text
    assert "planted" not in text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://key:secret@bucket/v.mp4", "s3://***@bucket/v.mp4"),
        ("https://h/v.mp4?token=abc&t=1", "https://h/v.mp4?token=***&t=1"),
        ("https://h/v.mp4?X-Amz-Signature=abc&X-Amz-Date=1", "https://h/v.mp4?X-Amz-Signature=***&X-Amz-Date=1"),
        ("Authorization: Bearer abcdefgh", "Authorization: Bearer ***"),
        ("see https://h/page?key=value1#part", "see https://h/page?key=***#part"),
        ("nothing to hide: 3 tokens at http://h/v.mp4", "nothing to hide: 3 tokens at http://h/v.mp4"),
    ],
)
def test_secrets_in_texts_are_replaced(text: str, clean: str) -> None:
    assert redact(text) == clean


@given(st.text(max_size=60), st.text(max_size=60))
def test_values_of_secret_variables_never_come_through(before: str, after: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_API_TOKEN", "s3cr3t-value")
        row = redact_value({"a": [f"{before}s3cr3t-value{after}"], "b": 1})
    assert "s3cr3t-value" not in json.dumps(row)
    assert row["b"] == 1


def test_redaction_bears_an_environment_that_changes_meanwhile() -> None:
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            os.environ["TIMESEARCH_TEST_FLICKER"] = "1"
            os.environ.pop("TIMESEARCH_TEST_FLICKER", None)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        assert all(redact("plain") == "plain" for _ in range(2000))
    finally:
        done.set()
        thread.join()


@pytest.mark.takes(15)
def test_two_runs_may_create_the_store_at_once(tmp_path: Path) -> None:
    record = (
        "import sys; from timesearch.settings import Settings; from timesearch.tracking import stage_run\n"
        "settings = Settings.model_validate({'tracking': {'uri': sys.argv[1]}})\n"
        "with stage_run(settings, sys.argv[2]) as run: run.log_metrics({'value': 1.0})"
    )
    uri = f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    both = [
        subprocess.Popen([sys.executable, "-c", record, uri, name], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        for name in ("first", "second")
    ]
    said = "".join(process.communicate(timeout=240)[1] for process in both)
    assert "did not come back" not in said
    with sqlite3.connect(tmp_path / "store" / "mlflow.db") as store:
        assert sorted(store.execute("select name, status from runs")) == [("first", "FINISHED"), ("second", "FINISHED")]
