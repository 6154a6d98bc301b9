"""Flows whose worker is killed."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prefect_service import Prefect, changed, serving
from scratch_project import free_port, ran, wait_for

from tasks.reproduce import STAGES

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    with serving(tmp_path_factory.mktemp("flows")) as service:
        yield service


@pytest.mark.takes(90)
def test_a_worker_killed_at_three_moments_costs_no_finished_stage(prefect: Prefect) -> None:
    """Twice the flow run and all that is Prefect's dies with the worker; the third time the worker alone."""
    project = prefect.project
    (project / "seconds.txt").write_text("1")
    judged = {
        "kind": "server",
        "url": f"http://127.0.0.1:{free_port()}/v1",
        "model": "stub",
        "command": [sys.executable, str(Path(__file__).with_name("judge_stub.py")), "{port}", "{model}", "--children"],
    }
    params = project / "params.yaml"
    values = yaml.safe_load(params.read_text())
    params.write_text(yaml.safe_dump({**values, "judge": {**values["judge"], **judged}}))
    draw = random.Random(21)
    finished: set[str] = set()
    seen = 0
    for kill in range(3):
        flow_run = prefect.start_run("pipeline/pocket")
        wait_for(lambda flow_run=flow_run: prefect.state(flow_run) == "RUNNING", 300, "the run to start")
        stages = draw.randint(0, 2)
        wait_for(lambda seen=seen, stages=stages: len(ran(project)) >= seen + stages, 300, "a stage to start")
        time.sleep(draw.uniform(0, 2.5))
        if kill < 2:
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
    assert set(ran(project)) == set(STAGES)
    assert len(ran(project)) <= len(STAGES) + 3
    assert not changed(project)
    wait_for(lambda: not prefect.left_over(), 60, "the runs' processes to end")
