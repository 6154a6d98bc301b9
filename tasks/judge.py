"""The judge's server as a task of its own, which runs for as long as a flow needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Queue
from threading import Event

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks.outage import AWAY
from timesearch.data.rows import read_samples
from timesearch.judge.on_ray import is_kept_apart
from timesearch.judge.server import judge_server
from timesearch.settings import Judge, Settings


@task(name="judge", task_run_name="judge server", tags=["judge"], cache_policy=NO_CACHE)
def _serve(settings: Judge, started: Queue[BaseException | None], done: Event) -> None:
    """Hold the judge's server until the flow is done with it."""
    try:
        with judge_server(settings, say=get_run_logger().info):
            started.put(None)
            done.wait()
    except BaseException as error:
        started.put(error)
        raise


def asks_judge(stage: str, settings: Settings, tree: Path) -> bool:
    """Whether a stage in `tree` asks a judge's server: it scores answers, and a sample of its file is open-ended.

    One that is kept apart on a cluster the stages start themselves.

    Raises:
        RequestError: the sample file is missing, or no row of it can be used.
    """
    paths = settings.paths
    files = {"train": paths.train_samples, "evaluate": paths.test_samples}
    if settings.coldstart.traces in ("teacher", "policy"):
        files["coldstart"] = paths.train_samples
    if settings.judge.kind == "rule" or stage not in files or is_kept_apart(settings.cluster, settings.judge):
        return False
    samples = read_samples(tree / files[stage], report=lambda _: None)  # the stage lists the rows that it leaves out
    return any(sample.type == "open_ended" for sample in samples)


@contextmanager
def judge(settings: Judge) -> Iterator[None]:
    """Run the block with the judge up; nothing is started where answers are judged by rule.

    Where Prefect is away and its task does not start, the stages that need the judge start it themselves.

    Raises:
        RequestError: something else is at the judge's address.
        ServerError: the judge does not come up.
    """
    if settings.kind == "rule":
        yield
        return
    started: Queue[BaseException | None] = Queue()
    done = Event()
    future = _serve.submit(settings, started, done)
    future.add_done_callback(lambda _: started.put(_NotStartedError()))
    try:
        error = started.get()
        if isinstance(error, _NotStartedError):
            get_run_logger().warning("the judge's task did not start: the stages start the judge themselves")
        elif error is not None:
            raise error
        yield
    finally:
        done.set()
        with suppress(*AWAY):
            future.wait()


class _NotStartedError(Exception):
    """The task ended before it came to the judge."""
