"""A Prefect server and worker that serve the deployments of a scratch project."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
from scratch_project import environment, free_port, make_project, run, wait_for

from tasks.reproduce import turn

PLANTED = "hf_planted_secret"


class Prefect:
    """A Prefect server and worker of a scratch project."""

    def __init__(self, project: Path, **env: str) -> None:
        self.project = project
        self.port = free_port()
        self.env = {
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            "HF_TOKEN": PLANTED,
            **env,
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

    def revive(self) -> None:
        """Start again what was stopped."""
        if self.server.poll() is not None:
            self.start_server()
        if self.worker is None or self.worker.poll() is not None:
            self.start_worker()

    def close(self) -> None:
        for process in (self.worker, self.server):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(60)

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(self.project, "prefect", "--no-prompt", *arguments, check=check, **self.env)

    def deployment_run(self, deployment: str) -> None:
        """Start a run as people do, and wait for its end."""
        assert self._start("prefect", "--no-prompt", "deployment", "run", deployment, "--watch").wait(600) == 0, (
            self.log.read_text()[-6000:]
        )

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        """Ask the API for what may be asked twice: SQLite that is busy with much else answers 503, or late."""
        while True:
            with suppress(httpx.ReadTimeout):
                answer = httpx.request(method, f"{self.env['PREFECT_API_URL']}/{path}", timeout=60, **options)
                if answer.status_code != 503:
                    return answer.raise_for_status().json() if answer.content else None
            time.sleep(1)

    @cached_property
    def headers(self) -> dict[str, str]:
        """What the API wants to see of a script that asks by POST."""
        token = self._ask("GET", "csrf-token", params={"client": "test"})["token"]
        return {"Prefect-Csrf-Client": "test", "Prefect-Csrf-Token": token}

    def api(self, path: str, **body: Any) -> Any:
        return self._ask("POST", path, json=body, headers=self.headers)

    def deployment(self, name: str) -> str:
        """A deployment's id."""
        return str(self._ask("GET", f"deployments/name/{name}")["id"])

    def start_run(self, deployment: str, **body: Any) -> str:
        """Start a run as scripts and agents do; its id."""
        once = {"idempotency_key": str(uuid4())}
        return str(self.api(f"deployments/{self.deployment(deployment)}/create_flow_run", **once, **body)["id"])

    def pause(self, deployment: str) -> None:
        """Let the schedules of a deployment (its id) make no further runs."""
        self._ask("POST", f"deployments/{deployment}/pause_deployment", headers=self.headers)

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

    def runs_of(self, deployment: str, **which: Any) -> list[dict[str, Any]]:
        """The runs of a deployment (its id) that the filter `which` lets through."""
        return list(self.api("flow_runs/filter", deployments={"id": {"any_": [deployment]}}, flow_runs=which))

    def last_run(self) -> dict[str, Any]:
        """The run that was started last; those that a schedule has planned do not count."""
        started = {"state": {"type": {"not_any_": ["SCHEDULED"]}}}
        found: list[dict[str, Any]] = self.api("flow_runs/filter", sort="START_TIME_DESC", limit=1, flow_runs=started)
        return found[0]

    def states(self, flow_run: str) -> dict[str, str]:
        runs = self.api("task_runs/filter", task_runs={"flow_run_id": {"any_": [flow_run]}})
        return {task["name"].rsplit("-", 1)[0]: task["state_name"] for task in runs}


@contextmanager
def serving(folder: Path, **env: str) -> Iterator[Prefect]:
    """From nothing to a worker that serves the deployments, by the commands of the README; `env` goes to all of it."""
    service = Prefect(make_project(folder), **env)
    try:
        service.command("work-pool", "create", "timesearch", "--type", "process")
        service.command("concurrency-limit", "create", "training", "1")
        service.command("deploy", "--all")
        service.start_worker()
        yield service
    finally:
        service.close()


def make_stale(project: Path, seed: int) -> None:
    """Change the data and the seed, so that every stage has to run."""
    (project / "data" / "train.jsonl").write_text(f'{{"id": "{seed}", "video": "a.mp4", "question": "?"}}\n')
    run(project, "dvc", "add", "-q", "data")
    params = project / "params.yaml"
    params.write_text(re.sub(r"(?m)^seed: \d+$", f"seed: {seed}", params.read_text()))


def changed(project: Path) -> set[str]:
    """Stages that DVC finds changed."""
    with turn(project, print):  # a kill may have cut DVC's record off
        return set(json.loads(run(project, "dvc", "status", "--json").stdout))
