"""The judge's server as a task of its own, which runs for as long as a flow needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from threading import Event

from prefect import task
from prefect.logging import get_run_logger

from timesearch.judge.server import judge_server
from timesearch.settings import Judge


@task(name="judge", task_run_name="judge server", tags=["judge"])
def _serve(settings: Judge, started: Queue[BaseException | None], done: Event) -> None:
    """Hold the judge's server until the flow is done with it."""
    try:
        with judge_server(settings, say=get_run_logger().info):
            started.put(None)
            done.wait()
    except BaseException as error:
        started.put(error)
        raise


@contextmanager
def judge(settings: Judge) -> Iterator[None]:
    """Run the block with the judge up; nothing is started where answers are judged by rule.

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
    try:
        error = started.get()
        if error is not None:
            raise error
        yield
    finally:
        done.set()
        future.wait()
