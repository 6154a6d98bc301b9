"""A training over several machines as a job of Slurm: its batch script, and a command that submits it, follows it to
its end, and submits it again where a machine was lost under it.

The commands `sbatch`, `sacct` and `scancel` are Slurm's own. A job outlives the command that submitted it; the same
command finds it by the note beside its script, and follows it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from timesearch.base.errors import RequestError, TemporaryError, TimeSearchError
from timesearch.base.exclusive import exclusive
from timesearch.base.files import json_digest, write_json, write_text
from timesearch.base.progress import console
from timesearch.base.redaction import redact, show_log
from timesearch.settings import Settings

_GOES_ON = frozenset({"TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "REVOKED"})
"""States in which Slurm ends a job that did nothing wrong: it goes on from its last checkpoint."""
_ENDED = _GOES_ON | {"COMPLETED", "FAILED", "CANCELLED", "OUT_OF_MEMORY", "DEADLINE"}
_LATER = ("unable to contact", "socket timed out", "connection refused", "temporarily", "try again", "slurmdbd")
"""What Slurm's commands say where it is away."""
_LOOK_EVERY = 10.0
_PATIENCE = 600.0
"""Seconds for which a Slurm that does not answer is asked again."""


class JobError(TimeSearchError):
    """A job of Slurm ended without its result."""


def takes_a_job(settings: Settings) -> bool:
    """Whether the training is for a job: over several machines, with `cluster.kind` slurm."""
    train = settings.train
    return settings.cluster.kind == "slurm" and train.nodes > 1 and train.launcher != "single"


def job_folder(settings: Settings) -> Path:
    """Where the batch script, its parameters, its note and its output lie: beside the run's own folder."""
    return settings.paths.train.with_name(f"{settings.paths.train.name}.slurm")


def write_script(settings: Settings) -> Path:
    """Write the batch script of the training, and the parameters that its job reads, and return the script.

    Raises:
        RequestError: an option in `cluster.slurm` is none, or there are no GPUs.
    """
    folder = job_folder(settings)
    inside = settings.model_copy(update={"cluster": settings.cluster.model_copy(update={"kind": "none"})})
    params = folder / "train.yaml"
    write_text(params, yaml.safe_dump(inside.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    script = folder / "train.sbatch"
    write_text(script, batch_script(settings, Path.cwd(), sys.executable))
    return script


def batch_script(settings: Settings, project: Path, python: str) -> str:
    """The text of the batch script.

    Args:
        settings: the run.
        project: folder that all machines share, in which the job runs.
        python: of the environment, on all machines.

    Raises:
        RequestError: an option in `cluster.slurm` is none, or there are no GPUs.
    """
    train, folder = settings.train, job_folder(settings)
    if not train.gpus_per_node:
        raise RequestError("train.gpus_per_node is 0: a training over several machines takes GPUs of each")
    for option in settings.cluster.slurm:
        if not option.startswith("-") or not option.isprintable():
            raise RequestError(f"cluster.slurm holds {option[:80]!r}: an option of sbatch begins with --")
    options = [
        "--job-name=timesearch-train",
        f"--nodes={train.nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={train.gpus_per_node}",
        f"--output={folder}/train-%j.log",
        "--open-mode=append",
        "--no-requeue",
        *settings.cluster.slurm,
    ]
    params = f"{folder}/train.yaml"
    whole = shlex.quote(f"{project}/{params}")
    check = (
        f'test -f {shlex.quote(params)} || {{ echo "timesearch: $(hostname) does not see "{whole}": the project has to '
        'be in a folder that all machines share under one path" >&2; exit 2; }'
    )
    start = f"exec {shlex.join([python, '-m', 'timesearch', 'train', '--params', params])}"
    rank = ' --node-rank "$SLURM_NODEID" --main-address "$MAIN_ADDRESS" --main-port "$MAIN_PORT"'
    head = f"cd {shlex.quote(str(project))} && "
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options),
            f"# It goes on from the last checkpoint in {settings.paths.train}: to resume it, submit it again,",
            f"#   sbatch {folder}/train.sbatch",
            "set -euo pipefail",
            f"cd {shlex.quote(str(project))}",
            "export PYTHONUNBUFFERED=1",
            'read -r MAIN_ADDRESS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            "# Of this job alone, in case that another one trains on the same machine.",
            "MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000))",
            "export MAIN_ADDRESS MAIN_PORT",
            "export PYTHONPATH=" + '"$PWD${PYTHONPATH:+:$PYTHONPATH}"',
            f"srun bash -c {shlex.quote(head + check)}",
            f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(head + start + rank)}",
            "",
        ]
    )


def run(settings: Settings) -> Path:
    """Train in a job of Slurm: submit it, or follow the one that an earlier call submitted, to its end.

    Raises:
        RequestError: Slurm is not here, or refuses the job.
        TemporaryError: Slurm stays away, or the job was lost more often than `cluster.restarts` allows, or what it
            needs did not answer.
        JobError: the job failed, or was cancelled.
    """
    folder = job_folder(settings)
    with exclusive(folder):
        script = write_script(settings)
        note = folder / "job.json"
        shape = json_digest(settings.model_dump(mode="json", exclude={"cluster"}))
        for restart in range(settings.cluster.restarts + 1):
            job = _known(note, shape) if restart == 0 else None
            if job is None:
                job = _submit(script)
                write_json(note, {"job": job, "settings": shape})
                _say(f"train: Slurm job {job}, its output in {folder}/train-{job}.log")
            else:
                _say(f"train: goes on with Slurm job {job}, which was submitted before")
            with _cancelled_with(job):
                state, code = _follow(job, folder / f"train-{job}.log")
            note.unlink(missing_ok=True)
            if state == "COMPLETED":
                return settings.paths.train
            if state not in _GOES_ON:
                raise _failure(job, state, code)
            _say(f"train: Slurm ended job {job} ({state}), restarts left: {settings.cluster.restarts - restart}")
        raise TemporaryError(
            f"Slurm ended the training {settings.cluster.restarts + 1} times ({state}): the same command goes on from "
            "its last checkpoint (cluster.restarts says how often it does so by itself)"
        )


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _known(note: Path, shape: str) -> str | None:
    """The job that an earlier call submitted and that has not ended, or ended unseen.

    Raises:
        TemporaryError: it trains by other parameters.
    """
    if not note.is_file():
        return None
    noted = json.loads(note.read_text(encoding="utf-8"))
    job = str(noted["job"])
    if noted["settings"] == shape:
        return job
    if _state(job)[0] in _ENDED:
        return None
    raise TemporaryError(f"Slurm job {job} trains here by other parameters: wait for its end, or scancel {job}")


@contextmanager
def _cancelled_with(job: str) -> Iterator[None]:
    """Cancel the job where a person stops the command that follows it."""
    try:
        yield
    except KeyboardInterrupt:
        subprocess.run(["scancel", job], check=False)
        raise


def _submit(script: Path) -> str:
    done = _slurm("sbatch", "--parsable", str(script))
    job = done.strip().partition(";")[0]
    if not job.isdigit():
        raise RequestError(f"sbatch answered {done.strip()[:200]!r}, which names no job")
    return job


def _follow(job: str, log: Path) -> tuple[str, str]:
    """Show a job's output until it has ended; its state, and its exit code as Slurm writes it (`status:signal`)."""
    shown, told = 0, ""
    deadline = time.monotonic() + _PATIENCE
    while True:
        state, code = _state(job)
        shown = show_log(log, shown)
        if not state and time.monotonic() > deadline:
            raise TemporaryError(
                f"Slurm's accounts do not know job {job} (sacct): look at it with squeue, and try again"
            )
        if state in _ENDED:
            return state, code
        if state and state != told:
            _say(f"train: Slurm job {job} is {state.lower().replace('_', ' ')}")
            told = state
        time.sleep(_LOOK_EVERY)


def _state(job: str) -> tuple[str, str]:
    """State and exit code of a job; an empty state where the accounts do not know it yet."""
    said = _slurm("sacct", "--jobs", job, "--allocations", "--noheader", "--parsable2", "--format", "State,ExitCode")
    last = said.strip().rpartition("\n")[2]
    state, _, code = last.partition("|")
    return (state.split() or [""])[0].rstrip("+"), code


def _slurm(*command: str) -> str:
    """What one of Slurm's commands says; asked again while Slurm is away.

    Raises:
        RequestError: it is not here, or refuses.
        TemporaryError: Slurm stays away.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise RequestError(
                f"{command[0]} is not on this machine: run this where jobs of Slurm are submitted, or set cluster.kind "
                "to none"
            ) from error
        if done.returncode == 0:
            return done.stdout
        said = " ".join(redact(done.stderr or done.stdout).split())[-300:]
        if not any(mark in said.lower() for mark in _LATER):
            raise RequestError(f"{command[0]} refused (exit status {done.returncode}): {said}")
        if time.monotonic() > deadline:
            raise TemporaryError(f"Slurm does not answer ({said}): a job that was submitted goes on, try again later")
        time.sleep(_LOOK_EVERY)


def _failure(job: str, state: str, code: str) -> TimeSearchError:
    """The error of a job that ended otherwise than by its result or by Slurm's own doing."""
    status, _, signal = code.partition(":")
    if state == "CANCELLED":
        return JobError(f"Slurm job {job} was cancelled: the same command goes on from its last checkpoint")
    if state == "OUT_OF_MEMORY":
        return JobError(f"Slurm job {job} took more main memory than it may: give it more (--mem in cluster.slurm)")
    if signal not in ("", "0"):
        return TemporaryError(f"Slurm job {job} was ended by signal {signal}: its messages are above")
    if status == "75":
        return TemporaryError(f"Slurm job {job} ended with exit code 75: its messages are above")
    return JobError(f"Slurm job {job} ended as {state} with exit code {status}: its messages are above")
