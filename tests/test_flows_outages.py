"""Flows whose Prefect server goes away: what they work on is done all the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect_service import Prefect, changed, make_stale, serving
from scratch_project import ran, run, wait_for

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """What the stages of training depend on has been made."""
    with serving(tmp_path_factory.mktemp("flows")) as service:
        run(service.project, "dvc", "repro", "-q", "features")
        yield service


@pytest.mark.takes(65)
def test_a_server_that_restarts_amid_a_run_costs_nothing(prefect: Prefect) -> None:
    project = prefect.project
    make_stale(project, 1)
    (project / "seconds.txt").write_text("3")
    before, said = len(ran(project)), prefect.log.read_text().count("train: 5/5")
    flow_run = prefect.start_run("pipeline/pocket", parameters={"stages": ["models", "coldstart", "train"]})
    wait_for(lambda: "coldstart" in ran(project)[before:], 300, "the cold start")
    prefect.kill_server()
    made = project / "runs" / "coldstart" / "m"
    wait_for(
        lambda: made.exists() and made.read_text().endswith(" 1"), 300, "the cold start to be done without a server"
    )
    prefect.start_server()
    wait_for(lambda: prefect.state(flow_run) == "COMPLETED", 300, "the run to complete")
    assert ran(project)[before:] == ["models", "coldstart", "train"]
    assert prefect.states(flow_run)["train"] == "Completed"
    assert prefect.log.read_text().count("train: 5/5") > said


@pytest.mark.takes(65)
def test_a_server_that_stays_away_stops_no_work(prefect: Prefect) -> None:
    project = prefect.project
    make_stale(project, 2)
    (project / "seconds.txt").write_text("1")
    before = len(ran(project))
    prefect.kill_worker()
    prefect.start_worker(PREFECT_CLIENT_MAX_RETRIES="1")
    prefect.start_run("pipeline/pocket", parameters={"stages": ["models", "coldstart", "train"]})
    wait_for(lambda: "models" in ran(project)[before:], 300, "the first stage")
    prefect.kill_server()
    wait_for(lambda: not prefect.left_over(), 300, "the run to end")
    assert ran(project)[before:] == ["models", "coldstart", "train"]
    assert not {"models", "coldstart", "train"} & changed(project)
    assert "Prefect stays away: train goes on without it" in prefect.log.read_text()
    prefect.kill_worker()
    prefect.start_server()
    prefect.start_worker()
