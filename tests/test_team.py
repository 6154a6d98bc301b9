"""Prefect and MLflow as a team runs them: on PostgreSQL and an S3-compatible store, with two runs at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect_service import Prefect, serving
from scratch_project import wait_for
from team_services import Team, missing, team_services

pytestmark = [
    pytest.mark.services,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(bool(missing()), reason=f"needs {missing()}: uv sync --group team, apt install postgresql"),
]


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with team_services(tmp_path_factory.mktemp("team")) as team:
        yield team


@pytest.fixture(scope="module")
def prefect(team: Team, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    env = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": team.prefect_database,
        "MLFLOW_TRACKING_URI": team.mlflow,
    }
    with serving(tmp_path_factory.mktemp("flows"), **env) as service:
        yield service


@pytest.mark.takes(120)
def test_two_runs_at_once_go_through_all_services_to_completed(team: Team, prefect: Prefect) -> None:
    from mlflow import MlflowClient

    rates = (1e-5, 3e-5)
    started = [
        prefect.start_run("pipeline/pocket", parameters={"overrides": {"train.learning_rate": rate}}) for rate in rates
    ]
    ended = {"COMPLETED", "FAILED", "CRASHED"}
    wait_for(lambda: all(prefect.state(flow_run) in ended for flow_run in started), 2400, "both runs")
    assert {prefect.state(flow_run) for flow_run in started} == {"COMPLETED"}

    client = MlflowClient(team.mlflow)
    experiment = client.get_experiment_by_name("timesearch")
    assert experiment is not None
    parents = client.search_runs([experiment.experiment_id])
    assert {parent.info.status for parent in parents} == {"FINISHED"}
    assert sorted(parent.data.metrics["qa_accuracy"] for parent in parents) == list(rates)
    versions = client.search_model_versions("name = 'timesearch-policy'")
    assert {version.run_id for version in versions} == {parent.info.run_id for parent in parents}
    stored = team.stored()
    for parent in parents:
        for name in ("params.yaml", "dvc.lock", "policy/README.md"):
            assert any(key.endswith(f"{parent.info.run_id}/artifacts/{name}") for key in stored), name

    said = prefect.log.read_text()
    assert "database is locked" not in said
    assert "Traceback" not in said
    assert "planted-key" not in said
