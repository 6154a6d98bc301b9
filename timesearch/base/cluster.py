"""A Ray cluster as the stages use it: joined for as long as a block runs, looked at, and refused in a sentence where it
cannot do the work.

Every machine has to see the project's folder under the same path, with the same code and versions: a probe file is
written here and read by a task on each machine before anything starts. Processes that a stage starts on the cluster
belong to this process, and end with it, however it ends.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timesearch.base.errors import RequestError, TemporaryError, first_line, last_line
from timesearch.base.extras import require_modules
from timesearch.base.machine import inspect_machine

COMPARED = ("ray", "torch", "transformers", "trl", "accelerate", "peft", "deepspeed", "vllm", "numpy", "pillow", "av")
"""Packages of which all machines have to have the same version."""
_PASSED_ON = (
    *("TIMESEARCH_", "MLFLOW_", "HF_", "HUGGING_FACE_", "TRL_", "VLLM_", "NCCL_", "TORCH_", "PYTORCH_", "TOKENIZERS_"),
    *("AWS_", "OPENAI_API_KEY", "OMP_NUM_THREADS"),
)
"""Beginnings of the environment variables that processes on other machines get from this one."""
_CODE = Path(__file__).resolve().parents[2]
"""Where this code is imported from, on every machine."""
_PATIENCE = 120.0
"""Seconds within which each machine of a cluster has to answer."""
_CONNECT = 5.0
_LOOK_EVERY = 5.0
_AWAY = 40.0
"""Seconds without the head after which this process ends; Ray would end it after 60."""
_GIB = 2**30


class ClusterError(TemporaryError):
    """The cluster went away, or does not come to have what a stage needs."""


@dataclass(frozen=True)
class Node:
    """One machine of a cluster."""

    identity: str
    """Ray's own name of it"""
    host: str
    cpus: int
    gpus: int
    memory: float
    """GiB of main memory"""
    gpu_memory: float | None = None
    """GiB of its smallest GPU"""
    versions: dict[str, str] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    """paths of this machine that it does not have, or with other contents"""


@contextmanager
def joined(address: str, *, shared: Sequence[Path] = (), cpus: int = 1) -> Iterator[list[Node]]:
    """Be part of a Ray cluster while the block runs; inside a block that is already, this joins none.

    Args:
        address: host:port, ``auto`` for the cluster that this machine is of, or ``local`` to start one.
        shared: folders that all machines have to write in with this one, and files that they have to see as they are.
            The current folder is always one of them.
        cpus: that a cluster started here has at least.

    Yields:
        Its machines.

    Raises:
        RequestError: Ray is not installed, nothing answers at the address, or the machines differ in what they see and
            have.
        ClusterError: a machine does not answer.
    """
    # Ray would start each worker by the driver's own `uv run` command line, which never becomes a worker.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    require_modules("cluster.kind: ray", "ray", instead="set cluster.kind to none")
    import ray

    here = not ray.is_initialized()
    over = threading.Event()
    if here:
        _join(ray, address, cpus)
        head = ray.get_runtime_context().gcs_address
        threading.Thread(target=_leave_without, args=(head, over), name="head of Ray", daemon=True).start()
    try:
        nodes = _look_at_all(ray, [Path(), *shared])
        _refuse_differences(address, nodes)
        yield nodes
    except (ray.exceptions.RaySystemError, ConnectionError) as error:
        raise ClusterError(
            f"the Ray cluster at {address} went away ({first_line(error)}): the same command goes on"
        ) from error
    finally:
        over.set()
        if here:
            ray.shutdown()


def _leave_without(head: str, over: threading.Event) -> None:
    """End this process as one that may be tried again, where the head of the cluster stays away.

    Ray ends it itself a little later, wherever it is, with exit code 1, which says that trying again is of no use.
    """
    away: float | None = None
    while not over.wait(_LOOK_EVERY):
        try:
            with socket.create_connection(_host_and_port(head), timeout=_CONNECT):
                away = None
        except OSError:
            away = away or time.monotonic()
        if away is not None and time.monotonic() - away > _AWAY:
            print(
                f"timesearch: the head of the Ray cluster at {head} is away: start it, and the same command goes on",
                file=sys.stderr,
                flush=True,
            )
            os._exit(os.EX_TEMPFAIL)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _join(ray: Any, address: str, cpus: int) -> None:
    options: dict[str, Any] = {}
    if address == "local":
        options = {"num_cpus": max(cpus, os.cpu_count() or 1), "include_dashboard": False}
    elif address.startswith("ray://"):
        raise RequestError(
            f"cluster.address is {address}: a training cannot be started through Ray's client; run this on a machine "
            "of the cluster (ray start --address HOST:PORT), with cluster.address HOST:PORT or auto"
        )
    elif address != "auto":
        _refuse_silent(address)
    paths = [str(_CODE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    variables = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": variables},
            **options,
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        said = " ".join(str(error).split())[:300]
        if "InvalidAuthToken" in str(error.__cause__ or error.__context__):
            raise RequestError(
                f"the Ray cluster at {address} wants another token: set RAY_AUTH_MODE=token on its machines and here, "
                "and give them the same ~/.ray/auth_token (ray get-auth-token --generate)"
            ) from error
        if "ersion mismatch" in said:
            raise RequestError(
                f"the Ray cluster at {address} has another version of Ray or Python than this environment: {said}"
            ) from error
        raise RequestError(
            f"no Ray cluster is to be had at {address} from this machine, which has to be one of its own "
            f"(ray start --address HOST:PORT): {said}"
        ) from error


def _refuse_silent(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 65536):
        raise RequestError(f"cluster.address is {address!r}: it has to be HOST:PORT, auto or local")
    try:
        with socket.create_connection(_host_and_port(address), timeout=_CONNECT):
            pass
    except OSError as error:
        raise RequestError(
            f"no Ray cluster answers at {address} ({error.strerror or error}): start it (ray start --head), or set "
            "cluster.address"
        ) from error


def _look_at_all(ray: Any, shared: Sequence[Path]) -> list[Node]:
    """What each machine has, and sees of `shared`."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    listed = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    with ExitStack() as probes:
        seen = {str(path.resolve()): probes.enter_context(_probe(path.resolve())) for path in shared}
        # A task for each machine, for which no processor needs to be free.
        ask = ray.remote(num_cpus=0, max_retries=1)(_look)
        asked = {
            identity: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(identity, soft=False)).remote(seen)
            for identity in listed
        }
        told = {identity: _answer(ray, listed[identity], reference) for identity, reference in asked.items()}
    nodes = [_node(identity, listed[identity], facts) for identity, facts in told.items() if facts is not None]
    if not nodes:
        raise ClusterError("no machine of the Ray cluster answers: try again")
    return nodes


def _answer(ray: Any, listed: dict[str, Any], reference: Any) -> dict[str, Any] | None:
    """What a machine says of itself; None of one that has just left the cluster.

    Raises:
        RequestError: it cannot run this code.
        ClusterError: it does not answer.
    """
    host = f"{listed['NodeManagerHostname']} ({listed['NodeManagerAddress']})"
    try:
        return dict(ray.get(reference, timeout=_PATIENCE))
    except ray.exceptions.GetTimeoutError as error:
        raise ClusterError(f"{host} of the Ray cluster does not answer within {_PATIENCE:g} s: look at it") from error
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.NodeDiedError | ray.exceptions.TaskUnschedulableError):
            return None
        raise RequestError(
            f"{host} of the Ray cluster cannot run this project's code from {_CODE} ({last_line(error)[:200]}): "
            "every machine needs that folder and the same environment"
        ) from error


def _node(identity: str, listed: dict[str, Any], facts: dict[str, Any]) -> Node:
    has = listed["Resources"]
    return Node(
        identity=identity,
        host=listed["NodeManagerHostname"],
        cpus=int(has.get("CPU", 0)),
        gpus=int(has.get("GPU", 0)),
        memory=has.get("memory", 0) / _GIB,
        **facts,
    )


@contextmanager
def _probe(path: Path) -> Iterator[str]:
    """What another machine has to find at `path`: in a folder a file of random contents, else the file's own size."""
    if path.is_file():
        yield str(path.stat().st_size)
        return
    while not path.is_dir():
        path = path.parent
    token = uuid.uuid4().hex
    file = path / f".timesearch-probe-{token}"
    try:
        file.write_text(token, encoding="ascii")
        yield f"{file}={token}"
    finally:
        file.unlink(missing_ok=True)


def _look(shared: dict[str, str]) -> dict[str, Any]:
    """On each machine: the facts of a `Node` that Ray does not know."""
    gpus = inspect_machine("/").gpus
    versions = {"python": platform.python_version(), "code": str(_CODE)}
    for package in COMPARED:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "gpu_memory": min(gpu.memory * 1e9 / _GIB for gpu in gpus) if gpus else None,
        "versions": versions,
        "unseen": [path for path, expected in shared.items() if not _sees(Path(path), expected)],
    }


def _sees(path: Path, expected: str) -> bool:
    file, mark, token = expected.rpartition("=")
    with suppress(OSError):
        return Path(file).read_text(encoding="ascii") == token if mark else path.stat().st_size == int(expected)
    return False


def _refuse_differences(address: str, nodes: Sequence[Node]) -> None:
    """Refuse machines that see other files or have other versions.

    Raises:
        RequestError: naming the machine and what differs.
    """
    own = {package: _own_version(package) for package in COMPARED} | {"python": platform.python_version()}
    for node in nodes:
        if node.unseen:
            raise RequestError(
                f"{node.host} of the Ray cluster at {address} does not see {node.unseen[0]} as this machine does: the "
                "project and its caches have to be in a folder that all machines share under one path"
            )
        if node.versions["code"] != str(_CODE):
            raise RequestError(
                f"{node.host} of the Ray cluster at {address} takes this project's code from {node.versions['code']}, "
                f"and not from {_CODE}: every machine needs that folder"
            )
        for package, version in own.items():
            if (other := node.versions.get(package)) != version:
                raise RequestError(
                    f"{node.host} of the Ray cluster at {address} has {package} {other or '(none)'}, and this machine "
                    f"{version or '(none)'}: install the same locked environment on every machine (uv sync --frozen)"
                )


def _own_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require(nodes: Sequence[Node], address: str, what: str, *, gpus: int = 0, cpus: int = 0, together: int = 0) -> None:
    """Refuse a cluster that is too small.

    Args:
        nodes: its machines.
        address: of the cluster, for the message.
        what: needs it, such as ``train``.
        gpus: that are needed in all.
        cpus: the same.
        together: GPUs that have to be on one machine.

    Raises:
        RequestError: naming what is there and what is needed.
    """
    has, cores = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    named = f"the Ray cluster at {address} has"
    machines = f"{len(nodes)} machine{'s' if len(nodes) > 1 else ''}"
    if has < gpus:
        raise RequestError(f"{what} takes {gpus} GPUs, and {named} {has} on {machines}: take fewer, or add machines")
    if cores < cpus:
        raise RequestError(f"{what} takes {cpus} CPUs, and {named} {cores} on {machines}: take fewer, or add machines")
    if (largest := max(node.gpus for node in nodes)) < together:
        raise RequestError(
            f"{what} takes {together} GPUs of one machine, and no machine of the Ray cluster at {address} has more "
            f"than {largest}"
        )


def passed_on() -> dict[str, str]:
    """Variables of this process's environment for those on other machines; keys among them, so not for Ray's logs."""
    return {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}


def in_folder(work: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """`work` as a task that runs in a folder of its own choice: a worker of Ray starts somewhere else."""

    def there(*arguments: Any, **keywords: Any) -> Any:
        os.chdir(folder)
        return work(*arguments, **keywords)

    return there
