"""Flows on a real Prefect server and worker, DVC repository and MLflow store; only stage commands are stand-ins."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from scratch_project import environment, free_port, make_project, ran, run, wait_for

STAGES = ["download", "models", "frames", "features", "coldstart", "train", "infer", "evaluate"]
PLANTED = "hf_planted_secret"

pytestmark = pytest.mark.timeout(1500)


class Prefect:
    """A Prefect server and worker of a scratch project."""

    def __init__(self, project: Path) -> None:
        self.project = project
        self.port = free_port()
        self.env = {
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "3",
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            "HF_TOKEN": PLANTED,
        }
        self.log = project.parent / "prefect.log"
        self.start_server()
        self.worker: subprocess.Popen[bytes] | None = None

    def _start(self, *command: str, **env: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, cwd=self.project, env=environment(self.project, **self.env, **env), stdout=log, stderr=log
            )

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/api/health", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def start_server(self) -> None:
        self.server = self._start("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        wait_for(self._healthy, 600, "the Prefect server")

    def kill_server(self) -> None:
        self.server.kill()
        self.server.wait()

    def start_worker(self, **env: str) -> None:
        self.worker = self._start("prefect", "worker", "start", "--pool", "timesearch", **env)

    def kill_worker(self) -> None:
        """SIGKILL to the worker alone."""
        assert self.worker is not None
        self.worker.kill()
        self.worker.wait()

    def kill_all_of_worker(self) -> None:
        """SIGKILL to the worker and the flow runs that it started, as when their machine's session is killed."""
        assert self.worker is not None
        family = [*psutil.Process(self.worker.pid).children(recursive=True), psutil.Process(self.worker.pid)]
        flow_runs = [p for p in family if "prefect" in " ".join(p.cmdline()) and "processes.py" not in p.cmdline()]
        for process in flow_runs:
            process.kill()
        self.worker.wait()

    def close(self) -> None:
        for process in (self.worker, self.server):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(60)

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(self.project, "prefect", "--no-prompt", *arguments, check=check, **self.env)

    def deployment_run(self, *arguments: str, wait: bool = True) -> subprocess.Popen[bytes]:
        command = ["prefect", "--no-prompt", "deployment", "run", *arguments, "--watch"]
        process = self._start(*command)
        if wait:
            assert process.wait(600) == 0, self.log.read_text()[-6000:]
        return process

    def api(self, path: str, **body: Any) -> Any:
        """Ask the API; 503 says that SQLite was busy, and to try again."""
        while True:
            answer = httpx.post(f"http://127.0.0.1:{self.port}/api/{path}", json=body, timeout=60)
            if answer.status_code != 503:
                answer.raise_for_status()
                return answer.json()
            time.sleep(1)

    def start_run(self, deployment: str, **body: Any) -> str:
        """Start a run as scripts and agents do; its id."""
        found = httpx.get(f"http://127.0.0.1:{self.port}/api/deployments/name/{deployment}", timeout=60)
        return str(self.api(f"deployments/{found.json()['id']}/create_flow_run", **body)["id"])

    def state(self, flow_run: str) -> str:
        """The type of a flow run's state; empty while the server does not answer."""
        with suppress(httpx.TransportError):
            answer = httpx.get(f"http://127.0.0.1:{self.port}/api/flow_runs/{flow_run}", timeout=60)
            if answer.is_success:
                return str(answer.json()["state_type"])
        return ""

    def left_over(self) -> list[psutil.Process]:
        """Processes that work in the project, besides the Prefect server and the worker."""
        ours = {process.pid for process in (self.server, self.worker) if process is not None}
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid not in ours and Path(process.cwd()).is_relative_to(self.project):
                    found.append(process)
        return found

    def last_runs(self, count: int) -> list[dict[str, Any]]:
        """The runs that were started last, the last first; those that a schedule has planned do not count."""
        started = {"state": {"type": {"not_any_": ["SCHEDULED"]}}}
        return list(self.api("flow_runs/filter", sort="START_TIME_DESC", limit=count, flow_runs=started))

    def last_run(self) -> dict[str, Any]:
        return self.last_runs(1)[0]

    def states(self, flow_run: str) -> dict[str, str]:
        runs = self.api("task_runs/filter", task_runs={"flow_run_id": {"any_": [flow_run]}})
        return {task["name"].rsplit("-", 1)[0]: task["state_name"] for task in runs}


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """From nothing to a worker that serves the deployments, by the commands of the README."""
    service = Prefect(make_project(tmp_path_factory.mktemp("flows")))
    try:
        service.command("work-pool", "create", "timesearch", "--type", "process")
        service.command("concurrency-limit", "create", "training", "1")
        service.command("deploy", "--all")
        service.start_worker()
        yield service
    finally:
        service.close()


def test_a_deployment_run_completes_and_a_second_finds_all_up_to_date(prefect: Prefect) -> None:
    prefect.deployment_run("pipeline/pocket")
    first = prefect.last_run()
    assert first["state_type"] == "COMPLETED"
    assert ran(prefect.project) == STAGES
    assert [prefect.states(first["id"])[stage] for stage in STAGES] == ["Completed"] * 8

    prefect.deployment_run("pipeline/pocket")
    second = prefect.last_run()
    assert second["id"] != first["id"]
    assert [prefect.states(second["id"])[stage] for stage in STAGES] == ["UpToDate"] * 8
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


def test_overridden_runs_live_side_by_side_and_leave_the_checkout(prefect: Prefect) -> None:
    project = prefect.project
    before = (run(project, "git", "status", "--porcelain").stdout, (project / "params.yaml").read_text())
    rates = (1e-5, 3e-5)
    stages = json.dumps(["train", "infer", "evaluate"])
    started = [
        prefect.deployment_run(
            "pipeline/pocket", "--param", f"stages={stages}", "--param",
            f"overrides={json.dumps({'train.learning_rate': rate})}", wait=False,
        )
        for rate in rates
    ]  # fmt: skip
    assert [process.wait(900) for process in started] == [0, 0], prefect.log.read_text()[-8000:]
    found = prefect.last_runs(2)
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
    assert {item.path for item in client.list_artifacts(parents[0].info.run_id)} == {"params.yaml", "dvc.lock"}


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


def make_stale(project: Path, seed: int) -> None:
    """Change the data and the seed, so that every stage has to run."""
    (project / "data" / "train.jsonl").write_text(f'{{"id": "{seed}", "video": "a.mp4", "question": "?"}}\n')
    run(project, "dvc", "add", "-q", "data")
    params = project / "params.yaml"
    params.write_text(re.sub(r"(?m)^seed: \d+$", f"seed: {seed}", params.read_text()))


def changed(project: Path) -> set[str]:
    """Stages that DVC finds changed."""
    return set(json.loads(run(project, "dvc", "status", "--json").stdout))


def test_a_server_that_restarts_amid_a_run_costs_nothing(prefect: Prefect) -> None:
    project = prefect.project
    make_stale(project, 1)
    (project / "seconds.txt").write_text("3")
    before, said = len(ran(project)), prefect.log.read_text().count("train: 5/5")
    flow_run = prefect.start_run("pipeline/pocket", parameters={"stages": ["models", "coldstart", "train"]})
    wait_for(lambda: "coldstart" in ran(project)[before:], 300, "the cold start")
    prefect.kill_server()
    made = project / "runs" / "coldstart" / "m"
    wait_for(lambda: made.read_text().endswith(" 1"), 300, "the cold start to be done without a server")
    prefect.start_server()
    wait_for(lambda: prefect.state(flow_run) == "COMPLETED", 300, "the run to complete")
    assert ran(project)[before:] == ["models", "coldstart", "train"]
    assert prefect.states(flow_run)["train"] == "Completed"
    assert prefect.log.read_text().count("train: 5/5") > said


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


def test_a_worker_killed_at_five_moments_costs_no_finished_stage(prefect: Prefect) -> None:
    """Four times the flow run and all that is Prefect's dies with the worker; the fifth time the worker alone."""
    project = prefect.project
    make_stale(project, 3)
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
    first = seen = len(ran(project))
    for kill in range(5):
        flow_run = prefect.start_run("pipeline/pocket")
        wait_for(lambda flow_run=flow_run: prefect.state(flow_run) == "RUNNING", 300, "the run to start")
        stages = draw.randint(0, 2)
        wait_for(lambda seen=seen, stages=stages: len(ran(project)) >= seen + stages, 300, "a stage to start")
        time.sleep(draw.uniform(0, 2.5))
        if kill < 4:
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
    assert set(ran(project)[first:]) == set(STAGES)
    assert len(ran(project)[first:]) <= len(STAGES) + 5
    assert not changed(project)
    wait_for(lambda: not prefect.left_over(), 60, "the runs' processes to end")
