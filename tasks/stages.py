"""The stages as tasks, one each, all of one shape: reproduce the stage in a tree, and show how it goes.

What is worth another try (a server or the network away, a process killed by the system) is tried again with growing
pauses; a wrong request is not. Tags carry concurrency limits: `prefect concurrency-limit create training 1`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import task
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.runtime import task_run
from prefect.states import Completed
from prefect.tasks import Task, exponential_backoff

from tasks.artifacts import Progress
from tasks.live import TABLE
from tasks.reproduce import StageFailedError, reproduce
from timesearch.video.download import TRY_AGAIN

MINUTE = 60
HOUR = 60 * MINUTE
DAY = 24 * HOUR


def _worth_another_try(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageFailedError) and error.passes


_again: dict[str, Any] = {
    "retry_delay_seconds": exponential_backoff(10),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": _worth_another_try,
}


def _stage(name: str, tree: Path, fresh: bool, env: Mapping[str, str]) -> State[bool]:
    """Reproduce a stage; the state's data tells whether it ran. `fresh`: it is known to be up to date."""
    logger = get_run_logger()
    began = time.monotonic()
    ran = False
    if not fresh:
        TABLE.begin(name)

        def show(percent: float) -> None:
            TABLE.move(name, percent)
            progress.show(percent)

        try:
            with Progress(name) as progress:
                ran = reproduce(name, tree, line=logger.info, progress=show, env=env)
        except BaseException:
            TABLE.end(name, "failed")
            raise
    TABLE.end(name, "done" if ran else "up to date")
    if not ran:
        logger.info("%s is up to date", name)
        return Completed(name="UpToDate", message="DVC found nothing changed", data=False)
    return Completed(message=f"done in {time.monotonic() - began:.0f} s", data=True)


@task(retries=4, timeout_seconds=1 * DAY, tags=["network"], **_again)
def download(tree: Path, fresh: bool, env: Mapping[str, str]) -> State[bool]:
    """Fetch the videos that the sample files name; the last try leaves out those whose source stays away."""
    again = {TRY_AGAIN: "1"} if task_run.run_count <= download.retries else {}
    return _stage("download", tree, fresh, {**env, **again})


@task(retries=4, timeout_seconds=12 * HOUR, tags=["network"], **_again)
def models(tree: Path, fresh: bool, env: Mapping[str, str]) -> State[bool]:
    """Bring the encoder and the base policy."""
    return _stage("models", tree, fresh, env)


@task(retries=1, timeout_seconds=2 * DAY, tags=["decoding"], **_again)
def frames(tree: Path, fresh: bool, env: Mapping[str, str]) -> State[bool]:
    """Cache the frames of each video."""
    return _stage("frames", tree, fresh, env)


@task(retries=1, timeout_seconds=2 * DAY, tags=["accelerator"], **_again)
def features(tree: Path, fresh: bool, env: Mapping[str, str]) -> State[bool]:
    """Embed each cached frame."""
    return _stage("features", tree, fresh, env)


@task(retries=1, timeout_seconds=12 * HOUR, tags=["decoding"], **_again)
def subtitles(tree: Path, fresh: bool, env: Mapping[str, str]) -> State[bool]:
    """Index what is said in videos that have subtitles."""
    return _stage("subtitles", tree, fresh, env)


@task(retries=2, timeout_seconds=3 * DAY, tags=["training"], **_again)
def coldstart(tree: Path, fresh: bool, env: Mapping[str, str]) -> State[bool]:
    """Fine-tune on search episodes."""
    return _stage("coldstart", tree, fresh, env)


@task(retries=2, timeout_seconds=14 * DAY, tags=["training"], **_again)
def train(tree: Path, fresh: bool, env: Mapping[str, str]) -> State[bool]:
    """GRPO with completeness self-verification; a further try resumes from the last checkpoint."""
    return _stage("train", tree, fresh, env)


@task(retries=3, timeout_seconds=2 * DAY, tags=["accelerator"], **_again)
def infer(tree: Path, fresh: bool, env: Mapping[str, str]) -> State[bool]:
    """Play episodes of each method on the test samples; a further try resumes by sample."""
    return _stage("infer", tree, fresh, env)


@task(retries=3, timeout_seconds=12 * HOUR, tags=["accelerator"], **_again)
def evaluate(tree: Path, fresh: bool, env: Mapping[str, str]) -> State[bool]:
    """Score searches and answers, and write the report."""
    return _stage("evaluate", tree, fresh, env)


TASKS: dict[str, Task[..., Any]] = {
    task.name: task for task in (download, models, frames, features, subtitles, coldstart, train, infer, evaluate)
}
"""The tasks by their stage's name, in order."""
