"""MLflow's run of a whole pipeline: what it holds, so that two of them are compared in the list of runs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import yaml
from evaluated import evaluate, trained_project
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run as Recorded

from tasks.record import record_data, record_results
from timesearch.base.files import file_digest
from timesearch.inference.fingerprint import SHORT, checkpoint_digest
from timesearch.settings import Settings, load_settings
from timesearch.tracking import parent_run

LOCKED = {"md5": "0f" * 16 + ".dir", "size": 9, "nfiles": 7, "hash": "md5", "path": "runs/train"}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    trained_project(tmp_path)
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": {"train": {"outs": [LOCKED]}}}))
    loaded = load_settings("params.yaml")
    loaded.tracking.uri = f"sqlite:///{tmp_path}/mlflow.db"
    return loaded


def recorded(settings: Settings, name: str) -> Recorded:
    """The run of a pipeline whose stages have run, in a folder other than this one; nothing is left out of it."""
    said: list[str] = []
    tree = Path.cwd()
    elsewhere = tree / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    with contextlib.chdir(elsewhere), parent_run(settings, name, tree) as record:
        record_data(record, settings, tree, said.append)
        record_results(record, settings, tree, said.append)
    assert said == []
    return MlflowClient(settings.tracking.uri).get_run(str(record.id))


@pytest.mark.takes(15)
def test_two_pipelines_are_compared_without_opening_their_stages(settings: Settings, tmp_path: Path) -> None:
    first = recorded(settings, "first")
    settings.train.learning_rate = 0.5
    config = Path("runs/train/config.json")
    config.write_text(config.read_text() + " ")  # other weights, for all that the record knows
    evaluate(tmp_path, checkpoint_digest(Path("runs/train")), right=2)
    second = recorded(settings, "second")
    figures = [run.data.metrics for run in (first, second)]
    assert figures[0]["qa_accuracy"] > figures[1]["qa_accuracy"] > 0
    assert figures[0].keys() >= {"temporal_f1", "temporal_precision", "frames_mean", "tool_calls_mean"}
    assert [float(run.data.params["train.learning_rate"]) for run in (first, second)] == [0.0002, 0.5]
    assert first.data.params["fingerprint"] == "0123456789ab"
    made = [run.data.params["fingerprint.checkpoint"] for run in (first, second)]
    assert made[0] != made[1]
    assert "| GRPO-CSV |" in first.data.tags["mlflow.note.content"]
    taken = {each.tags[0].value: each.dataset for each in first.inputs.dataset_inputs}
    for context, name in (("training", "train.jsonl"), ("evaluation", "test.jsonl")):
        assert taken[context].name == name
        assert file_digest(Path("data") / name).startswith(taken[context].digest)

    client = MlflowClient(settings.tracking.uri)
    view = client.get_experiment(first.info.experiment_id).tags["mlflow.sharedViewState.figures"]
    assert "metrics.`qa_accuracy`" in json.loads(view)["selectedColumns"]
    versions = sorted(client.search_model_versions("name = 'timesearch-policy'"), key=lambda each: int(each.version))
    assert [version.run_id for version in versions] == [first.info.run_id, second.info.run_id]
    assert [version.tags["checkpoint"] for version in versions] == made
    assert versions[0].tags["dvc"] == LOCKED["md5"]
    assert "| QA accuracy | 66.7 |" in versions[0].description
    source = f"models:/timesearch-policy/{versions[0].version}"
    files = Path(download_artifacts(source, dst_path=str(tmp_path / "got"), tracking_uri=settings.tracking.uri))
    assert {path.name for path in files.iterdir()} >= {"README.md", "config.json", "tokenizer.json", "weights.dvc"}
    assert not list(files.glob("*.safetensors"))
    assert yaml.safe_load((files / "weights.dvc").read_text()) == {"outs": [{**LOCKED, "path": "train"}]}

    evaluate(tmp_path, made[1], right=5)
    third = recorded(settings, "the same policy, evaluated again")
    assert third.data.metrics["qa_accuracy"] == pytest.approx(0.8)
    versions = client.search_model_versions("name = 'timesearch-policy'")
    assert len(versions) == 2
    again = next(version for version in versions if version.tags["checkpoint"] == made[1])
    assert (again.run_id, again.tags["qa_accuracy"]) == (second.info.run_id, "0.8")


def test_what_cannot_be_recorded_is_said_and_stops_nothing(settings: Settings, tmp_path: Path) -> None:
    said: list[str] = []
    Path("data/train.jsonl").write_text("no row")
    Path("results/metrics.json").write_text("{")
    with parent_run(settings, "broken") as record:
        record_data(record, settings, tmp_path, said.append)
        record_results(record, settings, tmp_path, said.append)
    evaluate(tmp_path, "another")
    with parent_run(settings, "of other weights") as record:
        record_results(record, settings, tmp_path, said.append)
    assert [text.partition(":")[0] for text in said] == [
        "MLflow does not get the samples of this run",
        *["MLflow does not get the results of this run"] * 2,
    ]
    assert "of other weights" in said[-1]
    assert len(said[-1]) > SHORT
