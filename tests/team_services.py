"""The services of `deploy/compose.yaml` from packages: PostgreSQL, an S3-compatible store, and MLflow's server on both.

They need PostgreSQL's programs (Debian's package `postgresql`) and the dependency group `team`.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from scratch_project import free_port, wait_for

KEYS = {"AWS_ACCESS_KEY_ID": "team", "AWS_SECRET_ACCESS_KEY": "planted-key", "AWS_DEFAULT_REGION": "us-east-1"}


def missing() -> str:
    """What these services lack here; empty where all is there."""
    packages = [name for name in ("psycopg2", "moto", "boto3") if importlib.util.find_spec(name) is None]
    programs = [] if _program("initdb") else ["initdb"]
    return ", ".join([*packages, *programs])


def _program(name: str) -> str | None:
    """A program of PostgreSQL, which Debian keeps out of the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name) or next((str(folder / name) for folder in folders if (folder / name).is_file()), None)


@dataclass(frozen=True)
class Team:
    """Addresses of the services."""

    prefect_database: str
    mlflow: str
    store: str

    def stored(self) -> set[str]:
        """Keys of the objects in MLflow's bucket."""
        listed = self._client().list_objects_v2(Bucket="mlflow")
        return {each["Key"] for each in listed.get("Contents", ())}

    def make_bucket(self) -> None:
        self._client().create_bucket(Bucket="mlflow")

    def _client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.store,
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            region_name=KEYS["AWS_DEFAULT_REGION"],
        )


@contextmanager
def team_services(folder: Path) -> Iterator[Team]:
    """Start all of them in `folder`, and stop them at the end."""
    with ExitStack() as held:
        reachable = Path(held.enter_context(TemporaryDirectory(prefix="postgres-")))
        database = held.enter_context(_postgres(reachable, folder / "postgres.log"))
        store, mlflow = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        team = Team(f"postgresql+asyncpg://{database}/prefect", mlflow, store)
        held.enter_context(_started(folder / "store.log", "moto.server", "-H", "127.0.0.1", "-p", _port(store)))
        wait_for(lambda: _answers(store), 120, "the store")
        team.make_bucket()
        options = [
            *("--host", "127.0.0.1", "--port", _port(mlflow), "--workers", "1"),
            *("--backend-store-uri", f"postgresql+psycopg2://{database}/mlflow"),
            *("--artifacts-destination", "s3://mlflow"),
        ]
        env = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        held.enter_context(_started(folder / "mlflow.log", "mlflow", "server", *options, **env))
        wait_for(lambda: _answers(f"{mlflow}/health"), 600, "MLflow's server")
        yield team


def _port(url: str) -> str:
    return url.rpartition(":")[2]


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code < 500
    except httpx.HTTPError:
        return False


@contextmanager
def _started(log: Path, *module: str, **env: str) -> Iterator[None]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_"))}
    with log.open("wb") as handle:
        process = subprocess.Popen(
            [sys.executable, "-m", *module], env={**ours, **env}, cwd=log.parent, stdout=handle, stderr=handle
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def _postgres(folder: Path, log: Path) -> Iterator[str]:
    """A server of PostgreSQL with the databases `prefect` and `mlflow`: user, address and port.

    It refuses root, and so gets a folder that its own user can reach.
    """
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        account = pwd.getpwnam("postgres")
        os.chown(folder, account.pw_uid, account.pw_gid)
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    port = free_port()
    made = ["--pgdata", str(folder / "data"), "--auth=trust", "--username=postgres", "--no-sync"]
    subprocess.run([str(_program("initdb")), *made], check=True, capture_output=True, cwd=folder, **user)
    options = ["-D", str(folder / "data"), "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    options += ["-c", "unix_socket_directories=", "-c", "fsync=off"]
    with log.open("wb") as handle:
        command = [str(_program("postgres")), *options]
        server = subprocess.Popen(command, cwd=folder, stdout=handle, stderr=handle, **user)
    try:
        wait_for(lambda: _makes_databases(port), 120, "PostgreSQL")
        yield f"postgres@127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)  # which ends it without waiting for its clients
        server.wait(60)


def _makes_databases(port: int) -> bool:
    import psycopg2

    try:
        connection = psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres")
    except psycopg2.OperationalError:
        return False
    connection.autocommit = True
    with connection.cursor() as cursor:
        for name in ("prefect", "mlflow"):
            cursor.execute(f"CREATE DATABASE {name}")
    connection.close()
    return True
