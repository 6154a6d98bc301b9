"""A training stage on a Ray cluster, by Ray Train: its processes on other machines, restarted where one is lost.

What a process does is the stage's own function, the same that it runs here. Checkpoints are the stage's own too, in its
folder on the shared storage: Ray starts the processes again, and they go on from there. Beside that folder lies
`<folder>.ray` while the training lasts, with the output of each process; that of the first is shown here.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from timesearch.base.cluster import ClusterError, joined, passed_on
from timesearch.base.errors import ItemError, TemporaryError, TimeSearchError, last_line
from timesearch.base.exclusive import BusyError, exclusive
from timesearch.base.files import write_json
from timesearch.base.progress import console
from timesearch.base.redaction import redact, show_log
from timesearch.judge.on_ray import is_kept_apart, judge_on_cluster
from timesearch.settings import Settings
from timesearch.training.placement import refuse_small

_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
_START_WITHIN = 60
"""Seconds within which the processes have to find a place on the cluster, before they are asked for again."""
_WAITS = 10
"""How often they are asked for again, while a machine is away."""
_LOOK_EVERY = 0.5
_LAST_OF_OLD = 120.0
"""Seconds for which a process waits for the end of one that a killed command left."""


def fit(
    settings: Settings,
    stage: str,
    folder: Path,
    work: Callable[[Settings], object],
    *,
    processes: int,
    gpus: int,
    shared: Sequence[Path],
    environment: Mapping[str, str],
    judged: bool = False,
) -> None:
    """Run `work` in each of several processes on the cluster, until all have ended well.

    Args:
        settings: of the run.
        stage: its name.
        folder: of the run, which holds its checkpoints.
        work: what each process does; it finds its rank in the environment where there are several.
        processes: their number.
        gpus: 1 for a GPU each, 0 for none.
        shared: what all machines have to see as this one does.
        environment: added to that of each process.
        judged: whether they ask a judge, which is started before them where it gets GPUs of its own.

    Raises:
        RequestError: the cluster is not there, or too small.
        TemporaryError: processes were lost more often than `cluster.restarts`, or what they need did not answer.
        TimeSearchError: what a process raised.
    """
    cluster = settings.cluster
    with joined(cluster.address, shared=[folder, *shared], cpus=processes) as nodes, ExitStack() as beside:
        refuse_small(settings, nodes, stage)
        gpus = gpus if any(node.gpus for node in nodes) else 0
        scratch = folder.with_name(f"{folder.name}.ray")
        inside = settings.model_copy(update={"cluster": cluster.model_copy(update={"kind": "none"})})
        if judged and is_kept_apart(cluster, settings.judge):
            inside.judge = beside.enter_context(judge_on_cluster(cluster, settings.judge, say=console.print))
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        process = _Process(
            work, inside.model_dump_json(), Path.cwd(), scratch.resolve(), {**passed_on(), **environment}, processes
        )
        error = _train(process, cluster.restarts, gpus, scratch)
        _raise_what_ended_it(error, scratch, stage, cluster.restarts)
        for made in (scratch, _held(scratch)):
            shutil.rmtree(made, ignore_errors=True)


def _held(scratch: Path) -> Path:
    """The folder that the first process of a training holds, for others to wait for its end."""
    return scratch.with_name(f"{scratch.name}.held")


def _train(process: _Process, restarts: int, gpus: int, scratch: Path) -> Exception | None:
    """Train, and show the output of the first process meanwhile; returns what Ray raised."""
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # one actor less; a machine that goes is seen without it
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(_START_WITHIN)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        process,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=process.processes,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1},
            placement_strategy="PACK" if gpus else "SPREAD",
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(scratch.resolve() / "ray"),
            failure_config=FailureConfig(max_failures=restarts, controller_failure_limit=_WAITS),
            callbacks=[_teller(scratch.resolve(), restarts)],
        ),
    )
    ended: list[Exception | None] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            ended.append(error)
        else:
            ended.append(None)

    # In a thread of its own: in the main one Ray would take Ctrl-C for itself.
    thread = threading.Thread(target=fit, name="ray train", daemon=True)
    thread.start()
    shown = 0
    while thread.is_alive():
        thread.join(_LOOK_EVERY)
        shown = show_log(scratch / "output.log", shown)
    return ended[0]


def _raise_what_ended_it(error: Exception | None, scratch: Path, stage: str, restarts: int) -> None:
    outcome = scratch / "outcome.json"
    if outcome.is_file():
        told = json.loads(outcome.read_text(encoding="utf-8"))
        kinds = {kind.__name__: kind for kind in (TemporaryError, ItemError, TimeSearchError)}
        raise kinds[told["kind"]](told["message"], told["end"])
    if error is None:
        return
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    first = redact(" ".join(str(error).split())[-300:])
    if isinstance(error, ControllerError):
        raise ClusterError(
            f"{stage}: the cluster had no room for its processes for {_START_WITHIN * _WAITS // 60} minutes: add "
            f"machines, or take fewer processes ({first})"
        ) from error
    if not isinstance(error, WorkerGroupError):
        raise ClusterError(
            f"{stage}: the Ray cluster went away: the same command goes on from the last checkpoint ({first})"
        ) from error
    raise TemporaryError(
        f"{stage} lost its processes {restarts + 1} times, which is all that cluster.restarts allows: the same command "
        f"goes on from its last checkpoint; the output of each process is in {scratch} ({first})"
    ) from error


def _teller(scratch: Path, restarts: int) -> Any:
    """Writes into the output that is shown here which processes were lost."""
    from ray.train import UserCallback

    class Teller(UserCallback):
        lost = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if (scratch / "outcome.json").is_file():
                return
            self.lost += 1
            ends = {f"process {rank}": _end_of(error) for rank, error in sorted(worker_exceptions.items())}
            # Those that lost another one only fail with it.
            died = {name: end for name, end in ends.items() if end == _DIED} or ends
            lost = "; ".join(f"{name} {end}" for name, end in died.items())
            left = restarts - self.lost
            then = f"going on from the last checkpoint, restarts left: {left}" if left >= 0 else "no restart is left"
            with (scratch / "output.log").open("a", encoding="utf-8") as log:
                log.write(f"{lost}: {then}\n")

    return Teller()


_DIED = "died, or its machine"


def _end_of(error: Exception) -> str:
    if "health check failed" in str(error):
        return _DIED
    return f"failed ({' '.join(last_line(error).split())[:200]})"


class _Process:
    """One process of the training, on whatever machine; it is sent there."""

    def __init__(
        self,
        work: Callable[[Settings], object],
        settings: str,
        project: Path,
        scratch: Path,
        environment: Mapping[str, str],
        processes: int,
    ) -> None:
        self._work, self._settings, self._project, self._scratch = work, settings, project, scratch
        self._environment = dict(environment)
        self.processes = processes

    def __call__(self) -> None:
        """Do the stage's work, unless an earlier try met an error that comes again."""
        outcome = self._scratch / "outcome.json"
        if outcome.is_file():
            return
        os.chdir(self._project)
        os.environ.update(self._environment)
        rank = int(os.environ["RANK"])
        _write_to(self._scratch / ("output.log" if rank == 0 else f"rank-{rank}.log"))
        if self.processes == 1:
            _be_alone()
        try:
            with _after_old(self._scratch) if rank == 0 else nullcontext():
                self._work(Settings.model_validate_json(self._settings))
        except TimeSearchError as error:
            message, _, end = str(error).partition("\n")
            kind = next(kind for kind in (TemporaryError, ItemError, TimeSearchError) if isinstance(error, kind))
            if not outcome.is_file():
                write_json(outcome, {"kind": kind.__name__, "message": message, "end": end})
            raise


def _write_to(log: Path) -> None:
    """Let this process and its children write to a file, and no more to Ray's own logs."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(handle, number)
    os.close(handle)


def _be_alone() -> None:
    """Train as a single process does here, without the group that Ray made of it."""
    import torch

    torch.distributed.destroy_process_group()
    for name in (*_RANKS, "ACCELERATE_TORCH_DEVICE"):
        os.environ.pop(name, None)


@contextmanager
def _after_old(scratch: Path) -> Iterator[None]:
    """Work once what a killed command left of this training on the cluster has ended."""
    deadline = time.monotonic() + _LAST_OF_OLD
    while True:
        try:
            with exclusive(_held(scratch)):
                yield
            return
        except BusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)
