"""The judge's server on a machine of a Ray cluster, on GPUs that nothing else gets there.

It listens at that machine's own address, for the processes of a training are on other machines; so it wants a key, that
of `OPENAI_API_KEY` or one made up for it.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from timesearch.base.cluster import ClusterError, passed_on
from timesearch.base.errors import RequestError, TemporaryError, TimeSearchError, last_line
from timesearch.base.servers import free_port, vllm_command
from timesearch.judge.server import judge_server
from timesearch.settings import Cluster, Judge

logger = logging.getLogger(__name__)


class Holder:
    """The actor: it holds the server for as long as it lives."""

    def __init__(self, judge: str, gpus: int, project: str, environment: Mapping[str, str]) -> None:
        import ray

        os.chdir(project)
        os.environ.update(environment)
        os.environ["VLLM_API_KEY"] = environment["OPENAI_API_KEY"]
        own = Judge.model_validate_json(judge)
        host = ray.util.get_node_ip_address()
        own.url = f"http://{f'[{host}]' if ':' in host else host}:{free_port(host)}/v1"
        own.command = own.command or vllm_command("--tensor-parallel-size", str(gpus))
        self._judge = own
        self._held = ExitStack()

    def start(self) -> dict[str, Any]:
        """Start the server, and tell its address, or why there is none."""
        try:
            self._held.enter_context(judge_server(self._judge))
        except TimeSearchError as error:
            return {"error": str(error), "passes": isinstance(error, TemporaryError)}
        return {"url": self._judge.url}


def is_kept_apart(cluster: Cluster, judge: Judge) -> bool:
    """Whether the judge is a server that is started on GPUs of its own of a Ray cluster."""
    return cluster.kind == "ray" and cluster.judge_gpus > 0 and judge.kind == "server" and judge.start


@contextmanager
def judge_on_cluster(cluster: Cluster, judge: Judge, say: Callable[[str], None] = logger.info) -> Iterator[Judge]:
    """Hold the judge on a cluster that this process is part of; its key is in `OPENAI_API_KEY` meanwhile.

    Yields:
        The settings of the judge with its address, of a server that is up already.

    Raises:
        RequestError: its command cannot be started.
        TemporaryError: it does not come up.
    """
    import ray

    earlier = os.environ.get("OPENAI_API_KEY")
    os.environ["OPENAI_API_KEY"] = earlier or secrets.token_hex(16)
    holder = None
    try:
        say(f"judge: starting {judge.model} on {cluster.judge_gpus} GPUs of the Ray cluster")
        # No CPU of its own: a machine's CPUs are for the processes that train.
        holder = ray.remote(num_cpus=0, num_gpus=cluster.judge_gpus)(Holder).remote(
            judge.model_dump_json(), cluster.judge_gpus, str(Path.cwd()), passed_on()
        )
        try:
            told = ray.get(holder.start.remote(), timeout=judge.start_timeout + 60)
        except ray.exceptions.RayError as error:
            raise ClusterError(f"the judge does not come up on the Ray cluster: {last_line(error)[:300]}") from error
        if "error" in told:
            raise (TemporaryError if told["passes"] else RequestError)(told["error"])
        yield judge.model_copy(update={"url": told["url"], "start": False})
    finally:
        if holder is not None:
            ray.kill(holder)
        if earlier is None:
            del os.environ["OPENAI_API_KEY"]
