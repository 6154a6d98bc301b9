"""Flows whose worker is killed, and flows whose Prefect server goes away: what they work on is done all the same."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prefect_service import Prefect, changed, make_stale, serving
from scratch_project import free_port, ran, run, wait_for

from tasks.reproduce import STAGES

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    with serving(tmp_path_factory.mktemp("flows")) as service:
        yield service


@pytest.fixture
def prefect(service: Prefect) -> Prefect:
    """Server and worker run, though the test before stopped them."""
    service.revive()
    return service


@pytest.fixture
def prepared(prefect: Prefect) -> Prefect:
    """What the stages of training depend on has been made."""
    if not (prefect.project / "cache" / "features").exists():
        run(prefect.project, "dvc", "repro", "-q", "features")
    return prefect


@pytest.mark.takes(300)
def test_a_worker_killed_at_any_of_six_moments_costs_no_finished_stage(prefect: Prefect) -> None:
    """The flow run and all that is Prefect's dies with the worker; the last time the worker alone."""
    project, kills = prefect.project, 6
    make_stale(project, 3 + kills)
    (project / "seconds.txt").write_text("1")
    judged = {
        "kind": "server",
        "url": f"http://127.0.0.1:{free_port()}/v1",
        "model": "stub",
        "command": [sys.executable, str(Path(__file__).with_name("judge_stub.py")), "{port}", "{model}", "--children"],
    }
    params = project / "params.yaml"
    plain = params.read_text()
    values = yaml.safe_load(plain)
    params.write_text(yaml.safe_dump({**values, "judge": {**values["judge"], **judged}}))
    draw = random.Random(kills)
    finished: set[str] = set()
    before = seen = len(ran(project))
    for kill in range(kills):
        flow_run = prefect.start_run("pipeline/pocket")
        wait_for(lambda flow_run=flow_run: prefect.state(flow_run) == "RUNNING", 300, "the run to start")
        stages = draw.randint(0, 2)
        wait_for(lambda seen=seen, stages=stages: len(ran(project)) >= seen + stages, 300, "a stage to start")
        time.sleep(draw.uniform(0, 2.5))
        if kill < kills - 1:
            prefect.kill_all_of_worker()
            wait_for(lambda: not prefect.left_over(), 60, "the killed run's processes to end")
            begun = ran(project)[seen:]
            seen += len(begun)
            assert not finished & set(begun)
            finished.update(begun[:-1])
            assert not finished & changed(project)
        else:
            prefect.kill_worker()
        prefect.start_worker()
    flow_run = prefect.start_run("pipeline/pocket")
    wait_for(lambda: prefect.state(flow_run) == "COMPLETED", 300, "the last run to complete")
    assert not finished & set(ran(project)[seen:])
    assert set(ran(project)[before:]) == set(STAGES)
    assert len(ran(project)[before:]) <= len(STAGES) + kills
    assert not changed(project)
    wait_for(lambda: not prefect.left_over(), 60, "the runs' processes to end")
    params.write_text(plain)


@pytest.mark.takes(25)
def test_a_server_that_restarts_amid_a_run_costs_nothing(prepared: Prefect) -> None:
    prefect, project = prepared, prepared.project
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
def test_a_server_that_stays_away_stops_no_work(prepared: Prefect) -> None:
    prefect, project = prepared, prepared.project
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
