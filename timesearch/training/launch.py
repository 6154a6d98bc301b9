"""One process or many: how a training run is started.

A GPU run of several processes goes through `accelerate launch` with a file of `configs/`. On a CPU the processes are
started here, one thread each, and average their gradients over gloo. Every process is `timesearch train` again, which
finds its rank in the environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from timesearch.base.errors import RequestError, TemporaryError, TimeSearchError
from timesearch.base.exclusive import exclusive
from timesearch.base.extras import require_modules
from timesearch.base.processes import start_guarded, stop
from timesearch.base.servers import free_port
from timesearch.judge.on_ray import is_kept_apart
from timesearch.settings import Settings, Train
from timesearch.training import on_ray, slurm
from timesearch.training.data import load_training_samples
from timesearch.training.placement import training_processes

CONFIGS = Path(__file__).parents[2] / "configs"
MAIN_PORT = 29500


def run(settings: Settings, node_rank: int = 0, main_address: str | None = None, main_port: int = MAIN_PORT) -> Path:
    """Train as `settings.train` and `settings.cluster` ask.

    Args:
        settings: a run.
        node_rank: number of this node, from 0.
        main_address: host name of node 0, needed where there are several nodes.
        main_port: where its processes meet.

    Returns:
        The folder of the trained checkpoint.

    Raises:
        RequestError: what cannot be started as it is.
        TemporaryError: a training process was killed, something that it needs did not answer, or another training
            works in the folder.
        TimeSearchError: a training process failed.
    """
    require_modules("training", "torch", "transformers", "trl", "accelerate", "datasets", "mlflow")
    if slurm.takes_a_job(settings):
        load_training_samples(settings)
        refuse_unfit(settings.train, settings.train.nodes * settings.train.gpus_per_node)
        return slurm.run(settings)
    # Of the processes of one training the first holds the folder: the one that starts the others, else rank 0.
    first = _HELD not in os.environ and int(os.environ.get("RANK", node_rank)) == 0
    with exclusive(settings.paths.train) if first else nullcontext() as lock:
        return _run(settings, node_rank, main_address, main_port, [] if lock is None else [lock])


_HELD = "TIMESEARCH_FOLDER_HELD"
"""Set in the environment of training processes whose folder is held by who started them."""


def _run(settings: Settings, node_rank: int, main_address: str | None, main_port: int, locks: Sequence[int]) -> Path:
    if "RANK" in os.environ:
        return train_here(settings)
    samples, _ = load_training_samples(settings)
    if settings.cluster.kind == "ray":
        _on_cluster(settings, judged=any(sample.type == "open_ended" for sample in samples))
        return settings.paths.train
    if settings.train.launcher == "single" and settings.train.processes == 1:
        return train_here(settings)
    train = settings.train
    refuse_unfit(train, training_processes(train))
    require_engine(train)
    with tempfile.TemporaryDirectory(prefix="timesearch-") as name:
        folder = Path(name)
        params = folder / "params.yaml"
        params.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
        if train.launcher == "single":
            run_processes(train.processes, ["-m", "timesearch", "train", "--params", str(params)], folder, locks)
        else:
            command = launch_command(train, node_rank, main_address, params, main_port)
            launcher = start_guarded(command, env=_environment(), pass_fds=locks)
            if _wait([launcher]) is not None:
                raise _failure("accelerate launch", launcher.returncode, "its messages are above")
    return settings.paths.train


def _on_cluster(settings: Settings, judged: bool) -> None:
    train, paths, judge = settings.train, settings.paths, settings.judge
    processes = training_processes(train)
    refuse_unfit(train, processes)
    local = urlsplit(judge.url).hostname in ("127.0.0.1", "localhost", "::1")
    if judged and judge.kind == "server" and local and processes > 1 and not is_kept_apart(settings.cluster, judge):
        raise RequestError(
            f"judge.url {judge.url} is another machine for each of {processes} processes on a cluster: name the "
            "judge's host in it, or set cluster.judge_gpus to let one be started there"
        )
    on_ray.fit(
        settings,
        "train",
        paths.train,
        train_here,
        processes=processes,
        gpus=0 if train.launcher == "single" and processes > 1 else 1,
        shared=[paths.train_samples, paths.frames, paths.features, paths.models],
        environment={"OMP_NUM_THREADS": "1", **process_environment(train)},
        judged=judged,
    )


def train_here(settings: Settings) -> Path:
    """What each process of a training does."""
    require_engine(settings.train)
    trained: Path = load_trainer(settings.train.generation).run(settings)
    return trained


def require_engine(train: Train) -> None:
    """See that what writes the episodes is there; TRL imports vLLM for a server of it, too.

    Raises:
        RequestError: it is not.
    """
    if train.generation != "transformers":
        instead = "set train.generation to transformers"
        require_modules(f"train.generation {train.generation}", "vllm", instead=instead)


def process_environment(train: Train) -> dict[str, str]:
    """What `accelerate launch` tells each process of its file of `configs/`, where something else starts them."""
    if train.launcher == "single":
        return {"ACCELERATE_USE_CPU": "true"} if train.processes > 1 else {}
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    # One machine, and the port 0: only what is said of precision and sharding is read of it.
    alone = train.model_copy(update={"nodes": 1, "gpus_per_node": train.nodes * train.gpus_per_node})
    command = launch_command(alone, 0, None, "params.yaml", main_port=0)
    arguments, config, _ = _validate_launch_command(launch_command_parser().parse_args(command[len(_ACCELERATE) :]))
    zero = train.launcher in ("zero2", "zero3")
    if zero:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    told = prepare_deepspeed_cmd_env(arguments)[1] if zero else prepare_multi_gpu_env(arguments)
    return {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def refuse_unfit(train: Train, processes: int) -> None:
    """Refuse settings that hang, mix up episodes or write a checkpoint that does not load.

    Raises:
        RequestError: naming the settings that do not go together.
    """
    if train.format_tokens == "marks" and train.scale_rewards != "none":
        raise RequestError(
            f"train.format_tokens is marks and train.scale_rewards {train.scale_rewards}: the format's share of an "
            "advantage is known where rewards are not scaled; use scale_rewards none, or format_tokens all"
        )
    several = f"over {processes} processes"
    if train.lora_rank and train.launcher in ("zero2", "zero3", "fsdp"):
        raise RequestError(
            f"train.lora_rank is {train.lora_rank} and train.launcher {train.launcher}: adapters cannot be merged into "
            "sharded weights; use launcher ddp (or single), or lora_rank 0"
        )
    if train.generation == "vllm_server" and processes > 1:
        raise RequestError(
            f"train.generation vllm_server {several}: each process plays its own number of turns, and TRL hands them "
            "one another's completions; use vllm_colocate, or one process"
        )
    if train.generation == "transformers" and train.launcher in ("zero3", "fsdp") and processes > 1:
        raise RequestError(
            f"train.generation transformers with train.launcher {train.launcher} {several}: each process plays its own "
            "number of turns, and the one that needs most waits for the others for ever; use vllm_colocate, or "
            "launcher zero2 or ddp"
        )


def launch_command(
    train: Train, node_rank: int, main_address: str | None, params: Path | str, main_port: int = MAIN_PORT
) -> list[str]:
    """The `accelerate launch` command of one node.

    Raises:
        RequestError: several nodes, and no address of the first.
    """
    if train.nodes > 1 and main_address is None:
        raise RequestError(
            f"train.nodes is {train.nodes}: give --main-address HOST and --node-rank on each node "
            "(`timesearch train --plan` prints the commands)"
        )
    command = [*_ACCELERATE, "--config_file", str(_config(train.launcher))]
    command += ["--num_machines", str(train.nodes), "--num_processes", str(train.nodes * train.gpus_per_node)]
    command += ["--machine_rank", str(node_rank), "--main_process_port", str(main_port)]
    if main_address:
        command += ["--main_process_ip", main_address]
    command += ["--mixed_precision", "bf16" if train.bf16 else "no"]
    return [*command, "-m", "timesearch", "train", "--params", str(params)]


_ACCELERATE = (sys.executable, "-m", "timesearch.training.launch")
"""`accelerate launch`, by way of `_accelerate`."""


def _config(launcher: str) -> Path:
    path = CONFIGS / f"{launcher}.yaml"
    if not path.is_file():
        raise RequestError(f"{path} is missing: run in a checkout of the project, which has the folder configs/")
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _environment() -> dict[str, str]:
    """An environment in which a process computes with one thread, unless it was told otherwise."""
    return {"OMP_NUM_THREADS": "1", **os.environ, _HELD: "1"}


def run_processes(count: int, arguments: Sequence[str], folder: Path, locks: Sequence[int] = ()) -> None:
    """Start `count` training processes on this CPU, wait for them, and stop all once one fails.

    Args:
        count: processes; each finds its rank and their number in the environment, as `torch.distributed` has them.
        arguments: of Python.
        folder: gets the output of all but the first, whose output is this process's.
        locks: descriptors that they hold.

    Raises:
        TemporaryError: one was killed, or something that it needs did not answer.
        TimeSearchError: one failed.
    """
    shared = {
        **_environment(),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, *arguments]
    logs = [folder / f"rank-{rank}.log" for rank in range(count)]
    processes = []
    with ExitStack() as stack:
        for rank, log in enumerate(logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            output = None if rank == 0 else stack.enter_context(log.open("wb"))
            processes.append(start_guarded(command, stdout=output, env={**shared, **own}, pass_fds=locks))
            stack.callback(stop, processes[-1])
        failed = _wait(processes)
    if failed is not None:
        said = "its messages are above" if failed == 0 else logs[failed].read_text(errors="replace")[-2000:]
        raise _failure(f"training process {failed} of {count}", processes[failed].returncode, said)


def _wait(processes: list[subprocess.Popen[str]]) -> int | None:
    """Wait until all have ended or one fails, and stop the others; the number of the one that failed, if one did."""
    try:
        while True:
            codes = [process.poll() for process in processes]
            if _CRASH in codes:  # of a process that lost another, perhaps, whose own end is seen a moment later
                time.sleep(1.0)
                codes = [process.poll() for process in processes]
            if any(codes):
                return codes.index(_cause([code for code in codes if code]))
            if None not in codes:
                return None
            time.sleep(0.2)
    finally:
        for process in processes:
            stop(process)


_CRASH = 1
"""Exit code of Python after an exception."""


def _cause(codes: Sequence[int]) -> int:
    """The exit code, of those of processes that failed, that says most: one that loses another only crashes."""
    return next((code for code in codes if code != _CRASH), _CRASH)


def _failure(name: str, code: int, said: str) -> TimeSearchError:
    """The error of a process that failed; what it waited for in vain, or who killed it, may be over later."""
    number = -code if code < 0 else code - 128
    if number > 0:
        return TemporaryError(f"{name} was ended by signal {number}: {said}")
    kind = TemporaryError if code == os.EX_TEMPFAIL else TimeSearchError
    return kind(f"{name} ended with exit code {code}: {said}")


def _accelerate() -> int:
    """`accelerate launch`, with the exit code of the process that failed in place of its own, which is always 1."""
    from accelerate.commands.launch import main
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        main()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        code = _cause([failure.exitcode for failure in error.failures.values()])
    except subprocess.CalledProcessError as error:
        code = error.returncode
    else:
        return 0
    return code if code >= 0 else 128 - code


@contextmanager
def hidden(*modules: str) -> Iterator[None]:
    """Make modules look absent while others are imported."""
    saved = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(dict.fromkeys(name for name, module in saved.items() if module is None))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in saved.items():
            if module is None:
                del sys.modules[name]


def load_trainer(generation: str) -> Any:
    """The module of the stage. TRL imports vLLM wherever it is installed, which costs 8 s: only where it is used."""
    import importlib

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # environments are experimental there, and pinned here
    with hidden(*(() if generation.startswith("vllm") else ("vllm",))):
        return importlib.import_module("timesearch.training.train")


if __name__ == "__main__":
    raise SystemExit(_accelerate())
