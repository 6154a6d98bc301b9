"""A training as a job of a real Slurm of two nodes: submitted, followed, lost with a node, cancelled, found again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scratch_project import wait_for
from slurm_cluster import NODES, PACKAGES, SlurmCluster, missing, slurm_cluster
from slurm_training import paper_training

from timesearch.base.errors import RequestError, TemporaryError
from timesearch.settings import Settings
from timesearch.training import launch, slurm

pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(bool(missing()), reason=f"needs {missing()}: apt install {PACKAGES}, and root"),
]

TRAINS = """
echo "$SLURMD_NODENAME $CUDA_VISIBLE_DEVICES $*" >> "started-$SLURM_NODEID"
echo "node $SLURM_NODEID trains"
while test -f hold; do sleep 0.2; done
exit $(cat status 2>/dev/null || echo 0)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def settings(cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Its Python notes how it was started."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    settings = paper_training(tmp_path, monkeypatch, TRAINS, look_every=0.5)
    settings.cluster.slurm.append("--time=10")
    settings.train.gpus_per_node = 2
    wait_for(lambda: cluster.run("sinfo", "-h", "-o", "%D %t").split() == ["2", "idle"], 60, "idle nodes")
    return settings


def states(cluster: SlurmCluster) -> list[str]:
    """States of all jobs, in the order in which they were submitted."""
    said = cluster.run("sacct", "-X", "-n", "-P", "-S", "2000-01-01", "--format", "JobID,State")
    jobs = {int(job): state.split()[0] for job, _, state in (line.partition("|") for line in said.splitlines())}
    return [jobs[job] for job in sorted(jobs)]


def become(cluster: SlurmCluster, before: int, wanted: list[str]) -> bool:
    """Whether the jobs after `before` are as wanted: a job of this very second is not listed yet."""
    wait_for(lambda: states(cluster)[before:] == wanted, 30, f"jobs that are {wanted}")
    return True


def started() -> list[str]:
    return [line for path in sorted(Path().glob("started-*")) for line in path.read_text().splitlines()]


def meanwhile(act: Callable[[], None]) -> threading.Thread:
    """Act beside the command, once the training has begun on both nodes."""

    def work() -> None:
        wait_for(lambda: len(started()) >= 2, 60, "the training to begin")
        act()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_job_runs_the_launcher_on_each_node(
    cluster: SlurmCluster, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    before = len(states(cluster))
    assert launch.run(settings) == settings.paths.train
    for number, (line, name) in enumerate(zip(started(), NODES, strict=True)):
        job = int(line.rpartition(" ")[2]) - 20000
        assert line == (
            f"{name} 0,1 -m timesearch train --params runs/train.slurm/train.yaml --node-rank {number} "
            f"--main-address n1 --main-port {20000 + job}"
        )
    assert become(cluster, before, ["COMPLETED"])
    assert "node 1 trains" in capfd.readouterr().err
    assert not Path("runs/train.slurm/job.json").exists()


@pytest.mark.parametrize(("status", "kind"), [("2", slurm.JobError), ("75", TemporaryError)])
def test_how_a_training_ended_is_handed_on(
    cluster: SlurmCluster, settings: Settings, status: str, kind: type[Exception]
) -> None:
    Path("status").write_text(status)
    before = len(states(cluster))
    with pytest.raises(kind, match=f"exit code {status}"):
        launch.run(settings)
    assert become(cluster, before, ["FAILED"])


def test_a_node_that_dies_costs_a_restart(
    cluster: SlurmCluster, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("hold").touch()
    before = len(states(cluster))

    def die() -> None:
        try:
            cluster.silence_node("n2")
            wait_for(lambda: "NODE_FAIL" in states(cluster)[before:], 120, "Slurm to give the node up")
        finally:
            Path("hold").unlink()
            cluster.kill_node("n2")
            cluster.start_node("n2")

    dying = meanwhile(die)
    launch.run(settings)
    dying.join()
    assert become(cluster, before, ["NODE_FAIL", "COMPLETED"])
    assert "(NODE_FAIL), restarts left: 3" in capfd.readouterr().err


def test_a_job_that_somebody_cancels_is_not_submitted_again(cluster: SlurmCluster, settings: Settings) -> None:
    Path("hold").touch()
    before = len(states(cluster))
    cancelling = meanwhile(lambda: print(cluster.run("scancel", "--name=timesearch-train")))
    with pytest.raises(slurm.JobError, match="was cancelled"):
        launch.run(settings)
    cancelling.join()
    assert become(cluster, before, ["CANCELLED"])


def test_a_controller_that_is_away_for_a_while_costs_nothing(cluster: SlurmCluster, settings: Settings) -> None:
    Path("hold").touch()
    before = len(states(cluster))

    def away() -> None:
        cluster.kill("slurmctld", signal.SIGTERM)
        time.sleep(3)
        cluster.start_controller()
        Path("hold").unlink()

    leaving = meanwhile(away)
    launch.run(settings)
    leaving.join()
    assert become(cluster, before, ["COMPLETED"])


def test_a_killed_command_finds_its_job_and_ctrl_c_cancels_it(cluster: SlurmCluster, settings: Settings) -> None:
    Path("hold").touch()
    before = len(states(cluster))
    program = (
        "import sys\nfrom pathlib import Path\nfrom timesearch.settings import load_settings\n"
        "from timesearch.training import slurm\nslurm._LOOK_EVERY = 0.5\nsys.executable = sys.argv[2]\n"
        "slurm.run(load_settings(sys.argv[1]))\n"
    )
    params = Path("params.yaml")
    params.write_text(settings.model_dump_json())

    def follow() -> subprocess.Popen[str]:
        command = [sys._base_executable, "-c", program, str(params), sys.executable]  # type: ignore[attr-defined]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    first = follow()
    wait_for(lambda: len(started()) == 2, 60, "the training to begin")
    first.kill()
    first.communicate()
    second = follow()
    assert second.stderr is not None
    said = ""
    while "goes on with Slurm job" not in said:
        line = second.stderr.readline()
        assert line, said
        said += line
    time.sleep(1)
    second.send_signal(signal.SIGINT)
    second.communicate()
    assert become(cluster, before, ["CANCELLED"])
    assert len(started()) == 2


def test_what_slurm_refuses_is_a_sentence(settings: Settings) -> None:
    settings.cluster.slurm = ["--partition=nowhere"]
    with pytest.raises(RequestError, match=r"sbatch refused \(exit status 1\): .*partition"):
        launch.run(settings)
    settings.cluster.slurm = []
    settings.train.gpus_per_node = 64
    with pytest.raises(RequestError, match=r"sbatch refused"):
        launch.run(settings)
