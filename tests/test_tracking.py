import json
import logging
import os
import sqlite3
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scratch_project import wait_for

from timesearch import tracking
from timesearch.redaction import redact, redact_value
from timesearch.samples import Prediction
from timesearch.settings import Settings, Tracking
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

    traces = client.search_traces(locations=[stage.info.experiment_id])
    assert [trace.info.trace_metadata["mlflow.sourceRun"] for trace in traces] == [run.id]
    spans = [(span.name, span.span_type) for span in traces[0].data.spans]
    assert sorted(spans) == sorted(
        [
            ("episode", "AGENT"),
            ("turn 1: search 'ring'", "CHAT_MODEL"),
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
