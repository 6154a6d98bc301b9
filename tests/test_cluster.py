"""The stages on a Ray cluster of three local "machines", which die in the middle of the work."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from clustered import SlowColours
from players import build_library
from safetensors.torch import load_file
from scratch_project import free_port, wait_for
from scripted import ANSWER, CALL, build_project, make_settings
from synthetic import make_video

from timesearch import FeatureCache
from timesearch.base import cluster as cluster_module
from timesearch.base.cluster import COMPARED, Node, joined
from timesearch.base.errors import RequestError, TemporaryError
from timesearch.judge.client import make_judge
from timesearch.judge.on_ray import judge_on_cluster
from timesearch.pocket.world import SHAPES
from timesearch.retrieval.features import cache_features
from timesearch.settings import Cluster, ColdStart, Features, Frames, Infer, Judge, Settings
from timesearch.training import launch
from timesearch.video.frames import make_frame_cache

os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # read when Ray is imported
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
"""Ray's processes are not to wait for whatever else runs on this machine."""
ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")

TESTS = Path(__file__).parent


class Machines:
    """A head without processors, where commands are run, and two machines with one each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self._nodes = [self._cluster.add_node(num_cpus=1) for _ in range(2)]
        self.address: str = self._cluster.address

    def lose_one(self) -> None:
        """Kill the older of the two machines."""
        self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)

    def replace_one(self) -> None:
        """Kill the older of the two machines, and start another."""
        self.lose_one()
        self.add_one()

    def add_one(self) -> None:
        """Start a machine; not to be called in another thread than the main one."""
        self._nodes.append(self._cluster.add_node(num_cpus=1))

    @contextmanager
    def with_gpu(self) -> Iterator[None]:
        """Have a machine more, that says it has a GPU."""
        node = self._cluster.add_node(num_cpus=0, num_gpus=1)
        try:
            yield
        finally:
            self._cluster.remove_node(node)

    def stop(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    machines = Machines()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{TESTS.parent}")  # for what these tests send there
        yield machines
    machines.stop()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    build_project(root, videos=6)
    return root


def start(stage: str, project: Path, settings: Settings, log: Path) -> subprocess.Popen[bytes]:
    """Start a command on the cluster."""
    params = log.with_suffix(".json")
    params.write_text(settings.model_dump_json())
    env = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}
    command = [sys.executable, str(TESTS / "clustered.py"), stage, str(project), str(params)]
    with log.open("ab") as output:
        return subprocess.Popen(command, env=env, stdout=output, stderr=output)


def steps(folder: Path) -> list[int]:
    file = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def processes_of(project: Path) -> list[str]:
    """Command lines of the processes that work in a folder, or were started with a file in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd").startswith(str(project)):  # noqa: PTH115
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.mark.long
@pytest.mark.takes(200)
@pytest.mark.timeout(1500)
def test_a_training_whose_machines_and_command_die_ends_as_one_process_does(
    machines: Machines, project: Path, tmp_path: Path
) -> None:
    """Two processes on two machines; the command that started them is killed after a step, then two machines."""
    command_dies, machine_dies, last, save_steps = 3, (5, 7), 8, 2
    settings = make_settings(processes=2, micro_batch=4, learning_rate=1e-4, steps=last, save_steps=save_steps)
    settings.cluster.kind, settings.cluster.address = "ray", machines.address  # type: ignore[assignment]
    folder, log = project / "runs/train", tmp_path / "train.log"

    def reaches(step: int) -> Callable[[], bool]:
        return lambda: step in steps(folder) or command.poll() is not None

    command = start("train", project, settings, log)
    wait_for(reaches(command_dies), 400, f"step {command_dies}")
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    wait_for(lambda: not processes_of(project), 60, "the end of what the killed command had started")
    command = start("train", project, settings, log)
    for step in machine_dies:
        wait_for(reaches(step), 400, f"step {step}")
        machines.replace_one()
    assert command.wait(400) == 0, log.read_text()
    for left in range(2, 2 - len(machine_dies), -1):
        told = f"died, or its machine: going on from the last checkpoint, restarts left: {left}"
        assert log.read_text().count(told) == 1
    assert steps(folder) == [*range(1, last + 1)]
    assert not list(project.glob("runs/train.*"))

    alone = settings.model_copy(deep=True)
    alone.cluster.kind, alone.train.processes, alone.train.micro_batch = "none", 1, 8
    alone.paths.train = Path("runs/alone")
    assert start("train", project, alone, tmp_path / "alone.log").wait(400) == 0
    two, one = (load_file(project / f"runs/{name}/model.safetensors") for name in ("train", "alone"))
    before = load_file(project / "runs/coldstart/model.safetensors")
    apart = max(float((two[name] - one[name]).abs().max()) for name in one)
    assert max(float((one[name] - before[name]).abs().max()) for name in one) > 5e-5
    print("largest difference", apart)
    assert apart < 1e-5  # as of two processes here: a tenth of one step's update


@pytest.mark.long
@pytest.mark.takes(60)
def test_no_episode_is_lost_or_played_twice_where_a_machine_with_an_engine_dies(
    machines: Machines, project: Path, tmp_path: Path
) -> None:
    """Two engines, each with a server of its own; one of them dies with its machine."""
    settings = build_library(tmp_path, videos=4, questions=2)
    settings.cluster.kind, settings.cluster.address = "ray", machines.address  # type: ignore[assignment]
    settings.cluster.engines = 2
    for folder in (settings.paths.coldstart, settings.paths.train):
        shutil.copytree(project / "runs/coldstart", folder)
    settings.paths.models.mkdir()
    settings.infer = Infer(
        engine="openai",
        command=[sys.executable, str(TESTS / "policy_server.py"), "{port}", "2", "{model}"],
        baselines=["coldstart"],
        concurrency=4,
        log=tmp_path / "policy.log",
    )
    log = tmp_path / "infer.log"
    command = start("infer", tmp_path, settings, log)
    predictions = settings.paths.results / "predictions"

    def played() -> int:
        return sum(len(path.read_text().splitlines()) for path in predictions.glob("*.jsonl*"))

    wait_for(lambda: played() >= 2 or command.poll() is not None, 300, "the first episodes")
    machines.replace_one()
    assert command.wait(300) == 0, log.read_text()
    assert "an engine on the cluster was lost: what it was asked goes to another one" in log.read_text()
    samples = [json.loads(line)["id"] for line in settings.paths.test_samples.read_text().splitlines()]
    for method in ("coldstart", "grpo_csv"):
        rows = [json.loads(line) for line in (predictions / f"{method}.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == samples
        assert {row["predicted_answer"] for row in rows} == {"red"}
        assert not any(row["error"] for row in rows)
    assert not (predictions / "failures.jsonl").exists()
    assert {path.name for path in tmp_path.glob("policy-*.log")} == {"policy-0.log", "policy-1.log"}


@pytest.mark.takes(30)
def test_a_machine_that_dies_costs_features_nothing(machines: Machines, tmp_path: Path) -> None:
    make_frame_cache(make_video(tmp_path / "a.mp4", seconds=2), tmp_path / "a.frames", Frames())
    names = [f"{number}.mp4" for number in range(12)]
    killer = threading.Timer(6, machines.lose_one)
    killer.start()
    result = cache_features(
        dict.fromkeys(names, tmp_path / "a.frames"),
        tmp_path / "out",
        SlowColours(),  # type: ignore[arg-type]
        Features(workers=2),
        ray_address=machines.address,
    )
    killer.join()
    machines.add_one()
    assert sorted(result.done) == sorted(names)
    assert not result.failures
    assert all(len(FeatureCache.open(tmp_path / f"out/{name}.safetensors")) == 4 for name in names)


@pytest.mark.takes(20)
def test_a_judge_is_kept_on_gpus_of_its_own_and_wants_a_key(machines: Machines, tmp_path: Path) -> None:
    stub = [sys.executable, str(TESTS / "judge_stub.py"), "{port}", "{model}", "--host", "{host}"]
    judge = Judge(kind="server", model="tiny", command=stub, log=tmp_path / "judge.log", cache=tmp_path / "v.sqlite")
    cluster = Cluster(kind="ray", address=machines.address, judge_gpus=1)
    with machines.with_gpu(), joined(machines.address):
        with judge_on_cluster(cluster, judge) as up:
            assert not up.start
            assert len(os.environ["OPENAI_API_KEY"]) == 32
            assert ray.available_resources().get("GPU", 0) == 0
            assert make_judge(up).score("What is it?", "a lamp", "a lamp") == 1.0
        assert "OPENAI_API_KEY" not in os.environ
        broken = judge.model_copy(update={"command": ["false"]})
        with (
            pytest.raises(TemporaryError, match="the judge stopped with exit status 1"),
            judge_on_cluster(cluster, broken),
        ):
            pass


def test_what_a_cluster_cannot_do_is_a_sentence_before_anything_starts(machines: Machines, project: Path) -> None:
    def refused(says: str, **train: Any) -> None:
        settings = make_settings(**train)
        settings.cluster.kind, settings.cluster.address = "ray", address  # type: ignore[assignment]
        with pytest.raises(RequestError, match=says):
            launch.run(settings)
        assert not Path("runs/train").exists()

    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(project)
        shutil.rmtree("runs/train", ignore_errors=True)
        address = machines.address
        refused(r"train \(train.processes\) takes 3 CPUs, and the Ray cluster at .* has 2 on 3", processes=3)
        refused(
            r"takes 4 GPUs, and the Ray cluster at .* has 0 on 3 machines",
            launcher="ddp",
            nodes=2,
            gpus_per_node=2,
            micro_batch=2,
        )
        address = "127.0.0.1:1"
        refused("no Ray cluster answers at 127.0.0.1:1 .*: start it")
        for wrong in ("nowhere", "host:port", "host:99999"):
            address = wrong
            refused("it has to be HOST:PORT, auto or local")
        address = "ray://127.0.0.1:10001"
        refused("cannot be started through Ray's client")


@pytest.mark.long
@pytest.mark.takes(30)
def test_a_cluster_of_another_token_is_refused() -> None:
    port = free_port()
    home = Path(tempfile.mkdtemp())  # a short name, for the sockets in it
    guarded = {**os.environ, "HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    places = [f"--port={port}", f"--temp-dir={home}", "--include-dashboard=false", "--num-cpus=1"]
    head = subprocess.Popen(
        [Path(sys.executable).with_name("ray"), "start", "--head", "--block", *places],
        env=guarded,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    program = (
        "import sys\nfrom timesearch.base.cluster import joined\nwith joined(sys.argv[1]) as nodes: print(nodes)\n"
    )
    command = [sys.executable, "-c", program, f"127.0.0.1:{port}"]

    def join(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env={**guarded, **environment}, capture_output=True, text=True, timeout=120)

    try:
        wait_for(lambda: join().returncode == 0, 120, "the head")
        for other in ({"RAY_AUTH_TOKEN": "b" * 64}, {"RAY_AUTH_MODE": "disabled"}):
            said = join(**other).stderr
            assert "RequestError: the Ray cluster at" in said, said
            assert "wants another token" in said
    finally:
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"HOME={home}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
        head.wait(60)
        shutil.rmtree(home, ignore_errors=True)


def test_machines_that_see_or_have_something_else_are_refused() -> None:
    own = {package: version for package in COMPARED if (version := cluster_module._own_version(package))}
    own |= {"python": platform.python_version(), "code": str(cluster_module._CODE)}

    def refuse(unseen: list[str] | None = None, **versions: str) -> None:
        node = Node("b", "beta", 8, 8, 64.0, 80.0, own | versions, unseen or [])
        cluster_module._refuse_differences("head:6379", [Node("a", "alpha", 8, 8, 64.0, 80.0, own), node])

    refuse()
    with pytest.raises(RequestError, match=r"beta of the Ray cluster at head:6379 has torch 2\.0, and this machine"):
        refuse(torch="2.0")
    with pytest.raises(RequestError, match=r"has python 3\.12\.0, and this machine"):
        refuse(python="3.12.0")
    with pytest.raises(RequestError, match="takes this project's code from /elsewhere"):
        refuse(code="/elsewhere")
    with pytest.raises(RequestError, match=r"beta .* does not see /work as this machine does: .* share"):
        refuse(["/work"])


def test_a_probe_is_seen_where_the_folder_is_the_same(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    file.write_bytes(b"12345")
    with cluster_module._probe(tmp_path / "not/there/yet") as folder, cluster_module._probe(file) as size:
        assert cluster_module._look({str(tmp_path): folder, str(file): size})["unseen"] == []
        file.write_bytes(b"1")
        other = folder.replace(str(tmp_path), str(tmp_path / "other"))
        assert cluster_module._look({"folder": other, str(file): size})["unseen"] == ["folder", str(file)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.takes(30)
def test_a_cold_start_runs_on_the_cluster(machines: Machines, project: Path, tmp_path: Path) -> None:
    settings = make_settings()
    settings.cluster.kind, settings.cluster.address = "ray", machines.address  # type: ignore[assignment]
    traces = tmp_path / "traces.jsonl"
    rows = [json.loads(line) for line in (project / "data/train.jsonl").read_text().splitlines()]
    with traces.open("w") as handle:
        for row in rows:
            shape = next(shape for shape in SHAPES if f"the {shape}?" in row["question"])
            said = [CALL.format(shape=shape), ANSWER.format(shape=shape, colour=row["answer"])]
            messages = [{"role": "assistant", "content": text} for text in said]
            handle.write(json.dumps({"id": row["id"], "messages": messages}) + "\n")
    shutil.copytree(project / "runs/coldstart", project / "models/policy")
    settings.paths.coldstart = Path("runs/cold")
    settings.coldstart = ColdStart(traces=str(traces), steps=2, batch_size=2, micro_batch=1, bf16=False)
    log = tmp_path / "coldstart.log"
    assert start("coldstart", project, settings, log).wait(300) == 0, log.read_text()
    assert steps(project / "runs/cold") == [1, 2]
    assert load_file(project / "runs/cold/model.safetensors")
    assert not list(project.glob("runs/cold.*"))
