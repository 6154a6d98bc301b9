"""Flows on a real Prefect server and worker, DVC repository and MLflow store; only stage commands are stand-ins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from prefect_service import PLANTED, Prefect, serving
from scratch_project import ran, run, wait_for

STAGES = ["download", "models", "frames", "features", "subtitles", "coldstart", "train", "infer", "evaluate"]

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    with serving(tmp_path_factory.mktemp("flows")) as service:
        yield service


@pytest.mark.takes(90)
def test_a_deployment_run_completes_and_a_second_finds_all_up_to_date(prefect: Prefect) -> None:
    prefect.deployment_run("pipeline/pocket")
    first = prefect.last_run()
    assert first["state_type"] == "COMPLETED"
    assert ran(prefect.project) == STAGES
    assert [prefect.states(first["id"])[stage] for stage in STAGES] == ["Completed"] * len(STAGES)

    second = prefect.start_run("pipeline/pocket")
    wait_for(lambda: prefect.state(second) == "COMPLETED", 300, "the second run")
    assert [prefect.states(second)[stage] for stage in STAGES] == ["UpToDate"] * len(STAGES)
    assert ran(prefect.project) == STAGES
    assert "up to date" in run(prefect.project, "dvc", "status").stdout

    artifacts = {artifact["key"]: artifact for artifact in prefect.api("artifacts/filter")}
    assert float(artifacts["train-progress"]["data"]) == 100
    assert "| grpo_csv |" in artifacts["results"]["data"]
    logs = prefect.api("logs/filter", logs={"flow_run_id": {"any_": [first["id"]]}}, limit=200)
    assert any("frames: 5/5" in log["message"] for log in logs)


def test_the_form_of_a_deployment_is_typed_and_described(prefect: Prefect) -> None:
    deployments = {f"{d['entrypoint']}": d for d in prefect.api("deployments/filter")}
    schema = deployments["flows/pipeline.py:pipeline"]["parameter_openapi_schema"]["properties"]
    assert set(schema) == {"overrides", "revision", "stages"}
    assert all(field["description"] for field in schema.values())
    assert "train.learning_rate" in schema["overrides"]["description"]
    assert deployments["flows/prepare.py:prepare"]["schedules"][0]["schedule"]["cron"]


@pytest.mark.takes(15)
def test_schedules_make_runs_and_a_worker_runs_what_is_due(prefect: Prefect) -> None:
    """Some versions of Prefect's libraries keep a schedule and never make a run of it."""
    planned = {"state": {"type": {"any_": ["SCHEDULED"]}}}
    nightly = prefect.deployment("prepare/nightly")
    wait_for(lambda: prefect.runs_of(nightly, **planned), 120, "runs at the times of prefect.yaml")
    times = {flow_run["expected_start_time"][11:16] for flow_run in prefect.runs_of(nightly, **planned)}
    assert times == {"01:00"}

    file = prefect.project / "prefect.yaml"
    kept = file.read_text()
    assert kept.count('- cron: "0 4 * * *"') == 1
    # a run or two, not one every few seconds: they are in the way of each other and of everything else
    soon = (datetime.now(UTC) + timedelta(seconds=20)).isoformat()
    file.write_text(kept.replace('- cron: "0 4 * * *"', f"- interval: 90\n        anchor_date: '{soon}'"))
    prefect.command("deploy", "--name", "evaluate/nightly")
    file.write_text(kept)
    nightly = prefect.deployment("evaluate/nightly")
    done = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}
    wait_for(lambda: prefect.runs_of(nightly, **done), 300, "a run that is due")
    prefect.pause(nightly)
    flow_run = prefect.runs_of(nightly, **done)[0]
    assert (flow_run["state_type"], flow_run["auto_scheduled"]) == ("COMPLETED", True)


@pytest.mark.takes(30)
def test_overridden_runs_live_side_by_side_and_leave_the_checkout(prefect: Prefect) -> None:
    project = prefect.project
    before = (run(project, "git", "status", "--porcelain").stdout, (project / "params.yaml").read_text())
    rates = (1e-5, 3e-5)
    stages = ["train", "infer", "evaluate"]
    started = [
        prefect.start_run("pipeline/pocket", parameters={"stages": stages, "overrides": {"train.learning_rate": rate}})
        for rate in rates
    ]
    ended = {"COMPLETED", "FAILED", "CRASHED"}
    wait_for(lambda: all(prefect.state(flow_run) in ended for flow_run in started), 600, "both runs")
    found = prefect.api("flow_runs/filter", flow_runs={"id": {"any_": started}})
    assert {flow_run["state_type"] for flow_run in found} == {"COMPLETED"}
    assert {flow_run["name"] for flow_run in found} == {f"pipeline train.learning_rate={rate}" for rate in rates}
    tables = [a["data"] for a in prefect.api("artifacts/filter") if a["key"] == "results"]
    for rate in rates:
        assert sum(f"| {rate} |" in table for table in tables) == 1
    assert before == (run(project, "git", "status", "--porcelain").stdout, (project / "params.yaml").read_text())
    assert [path.name for path in (project / ".workspaces").iterdir()] == ["done"]
    kept = [yaml.safe_load(path.read_text()) for path in (project / ".workspaces" / "done").glob("*/params.yaml")]
    assert sorted(values["train"]["learning_rate"] for values in kept) == list(rates)
    assert "up to date" in run(project, "dvc", "status").stdout


def test_mlflow_nests_stages_in_their_flow_run(prefect: Prefect) -> None:
    from mlflow import MlflowClient

    project = prefect.project
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiment = client.get_experiment_by_name("timesearch")
    assert experiment is not None
    parents = client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])
    assert len(parents) == 3
    assert {parent.info.status for parent in parents} == {"FINISHED"}
    commit = run(project, "git", "rev-parse", "HEAD").stdout.strip()
    assert {parent.data.tags["mlflow.source.git.commit"] for parent in parents} == {commit}
    assert len({parent.data.tags["dvc_lock_sha256"] for parent in parents}) == 3
    kept = {item.path for item in client.list_artifacts(parents[0].info.run_id)}
    assert kept == {"params.yaml", "dvc.lock", "table.md", "report.html", "policy"}


def test_a_flow_run_holds_its_figures_and_a_pointer_to_its_weights(prefect: Prefect) -> None:
    from mlflow import MlflowClient

    project = prefect.project
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    versions = sorted(client.search_model_versions("name = 'timesearch-policy'"), key=lambda each: int(each.version))
    assert len(versions) == 3
    for version in versions:
        data = client.get_run(str(version.run_id)).data
        rate = float(data.params["train.learning_rate"])
        assert data.metrics == {"qa_accuracy": rate, "temporal_f1": 0.5, "uniform/qa_accuracy": 0.25}
        assert float(version.tags["qa_accuracy"]) == rate

    shutil.copy(Path(str(versions[0].source)) / "weights.dvc", project / "weights.dvc")
    run(project, "dvc", "checkout", "weights.dvc")
    assert (project / "train" / "model.safetensors").read_text().startswith("train")
    shutil.rmtree(project / "train")
    (project / "weights.dvc").unlink()


def test_no_planted_secret_is_anywhere(prefect: Prefect) -> None:
    project = prefect.project
    texts = [prefect.log.read_text()]
    texts += [json.dumps(prefect.api(f"{kind}/filter", limit=200)) for kind in ("logs", "artifacts", "flow_runs")]
    assert any("https://***@example.org/a?token=***" in text for text in texts)
    for text in texts:
        assert PLANTED not in text
        assert "user:planted" not in text
        assert "token=planted" not in text
    for path in [project / "mlflow.db", *(project / "mlruns").rglob("*")]:
        assert path.is_dir() or PLANTED.encode() not in path.read_bytes()
