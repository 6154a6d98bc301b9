"""No secret that is planted in the environment, in a URL or in the samples leaves a stage with its records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from players import build_library
from scratch_project import free_port, wait_for
from scripted import OracleEncoder

from timesearch.data.rows import read_samples
from timesearch.evaluation import evaluate
from timesearch.inference import infer
from timesearch.settings import Settings

TESTS = Path(__file__).parent
TOKEN = "hf_planted_secret"
SOURCE = "http://user:planted@127.0.0.1:9/v.mp4?token=planted"


def files_with_secrets(folder: Path, *inputs: str) -> list[str]:
    """Files under `folder` that hold what was planted, besides the inputs that it was planted in."""
    paths = [path for path in folder.rglob("*") if path.is_file() and b"planted" in path.read_bytes()]
    return sorted(str(path.relative_to(folder)) for path in paths if path.name not in inputs)


@pytest.mark.takes(9)
def test_a_failed_download_tells_no_secret(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        row = {"id": split, "video": f"{split}.mp4", "source": SOURCE, "question": "?", "answer": "a"}
        (data / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "params.yaml").write_text("download: {retries: 0}\n")
    done = subprocess.run(
        [sys.executable, "-m", "timesearch", "download"],
        cwd=tmp_path,
        env={**os.environ, "HF_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "http://***@127.0.0.1:9/v.mp4?token=***" in done.stderr
    assert "planted" not in done.stdout + done.stderr
    assert (tmp_path / "mlflow.db").is_file()
    assert files_with_secrets(tmp_path, "train.jsonl", "test.jsonl") == []


def test_inference_and_evaluation_record_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("timesearch.retrieval.encoder.load_encoder", lambda *_, **__: OracleEncoder())
    settings = build_library(tmp_path / "project", videos=2)
    plant(settings)
    settings.paths.train.mkdir(parents=True)
    port = free_port()
    settings.infer.engine, settings.infer.model, settings.infer.baselines = "openai", "tiny", []
    settings.infer.urls = [f"http://user:planted@127.0.0.1:{port}/v1"]
    settings.tracking.uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings.evaluate.visual = False
    server = subprocess.Popen([sys.executable, str(TESTS / "policy_server.py"), str(port), "0"])
    try:
        wait_for(lambda: infer.run(settings).done or None, 60, "the policy server")
    finally:
        server.kill()
        server.wait()
    evaluate.run(settings)
    client = MlflowClient(settings.tracking.uri)
    experiment = client.get_experiment_by_name("timesearch")
    assert experiment is not None
    assert len(client.search_traces(locations=[experiment.experiment_id])) == 2
    stages = {run.data.tags["stage"]: run for run in client.search_runs([experiment.experiment_id])}
    assert stages["infer"].data.params["infer.urls"] == f"['http://***@127.0.0.1:{port}/v1']"
    assert {item.path for item in client.list_artifacts(stages["evaluate"].info.run_id)} >= {"report.html", "table.md"}
    told = capfd.readouterr()
    assert "planted" not in told.out + told.err
    assert files_with_secrets(tmp_path, "test.jsonl", "grpo_csv.jsonl") == []


def plant(settings: Settings) -> None:
    """Put secrets into the addresses that the samples' videos come from."""
    path = settings.paths.test_samples
    rows = [row.model_copy(update={"source": SOURCE}) for row in read_samples(path)]
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows))
