"""A training as a job of Slurm, whose commands a stand-in answers: what is submitted, followed, and said."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from slurm_stand_in import install
from slurm_training import paper_training

from timesearch.base.errors import RequestError, TemporaryError, TimeSearchError
from timesearch.settings import Settings, load_settings
from timesearch.training import launch, slurm

ROOT = Path(__file__).parents[1]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Its Python notes how it was started."""
    script = (
        'printf "%s\\n" "$*" >> "started-$SLURM_NODEID"\necho "node $SLURM_NODEID trains"\n'
        "exit $(cat status 2>/dev/null || echo 0)\n"
    )
    return paper_training(tmp_path, monkeypatch, script, look_every=0.05)


@pytest.fixture
def fates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "bin"


def test_a_job_starts_the_launcher_on_each_node(settings: Settings, fates: Path, capfd: pytest.CaptureFixture[str]):
    slurm_of = real_python(fates, ["RUN"])
    assert launch.run(settings) == settings.paths.train
    for node in range(2):
        (line,) = Path(f"started-{node}").read_text().splitlines()
        assert line == (
            f"-m timesearch train --params runs/train.slurm/train.yaml --node-rank {node} --main-address n0 "
            "--main-port 20042"
        )
    said = capfd.readouterr().err
    assert "Slurm job 42, its output in runs/train.slurm/train-42.log" in said
    assert "node 0 trains" in said
    inside = load_settings("runs/train.slurm/train.yaml")
    assert inside.cluster.kind == "none"  # the job does not submit another
    assert inside.train == settings.train
    assert not Path("runs/train.slurm/job.json").exists()
    assert jobs(slurm_of) == {"42": "COMPLETED"}


def test_a_lost_machine_costs_a_restart_and_they_are_bounded(
    settings: Settings, fates: Path, capfd: pytest.CaptureFixture[str]
):
    slurm_of = real_python(fates, ["NODE_FAIL 1:0", "PREEMPTED 0:15", "TIMEOUT 0:0", "RUN"])
    launch.run(settings)
    assert jobs(slurm_of) == {"42": "NODE_FAIL", "43": "PREEMPTED", "44": "TIMEOUT", "45": "COMPLETED"}
    assert "Slurm ended job 42 (NODE_FAIL), restarts left: 3" in capfd.readouterr().err
    settings.cluster.restarts = 1
    (fates / "fates").write_text("NODE_FAIL 1:0\n" * 3)
    with pytest.raises(TemporaryError, match=r"ended the training 2 times \(NODE_FAIL\)"):
        launch.run(settings)
    assert (fates / "fates").read_text() == "NODE_FAIL 1:0\n"


@pytest.mark.parametrize(
    ("fate", "status", "kind", "says"),
    [
        ("RUN", "2", TimeSearchError, "exit code 2"),
        ("RUN", "75", TemporaryError, "exit code 75"),
        ("FAILED 0:9", "", TemporaryError, "signal 9"),
        ("CANCELLED by 1000 0:0", "", TimeSearchError, "was cancelled"),
        ("OUT_OF_MEMORY 0:125", "", TimeSearchError, "--mem in cluster.slurm"),
    ],
)
def test_how_a_job_ended_is_handed_on(
    settings: Settings, fates: Path, fate: str, status: str, kind: type[Exception], says: str
):
    slurm_of = real_python(fates, [fate])
    Path("status").write_text(status or "0")
    with pytest.raises(kind, match=says) as caught:
        launch.run(settings)
    assert isinstance(caught.value, TemporaryError) == (kind is TemporaryError)
    assert len(jobs(slurm_of)) == 1


def test_the_same_command_follows_the_job_that_an_earlier_one_submitted(settings: Settings, fates: Path):
    slurm_of = real_python(fates, ["RUN"])
    script = slurm.write_script(settings)
    job = slurm._submit(script)
    shape = slurm.json_digest(settings.model_dump(mode="json", exclude={"cluster"}))
    note = script.with_name("job.json")
    note.write_text(json.dumps({"job": job, "settings": shape}))
    launch.run(settings)
    assert jobs(slurm_of) == {"42": "COMPLETED"}

    (slurm_of / "jobs/43.json").write_text(json.dumps({"state": "RUNNING", "code": "0:0"}))
    note.write_text(json.dumps({"job": "43", "settings": shape}))
    settings.train.steps += 1
    with pytest.raises(TemporaryError, match="Slurm job 43 trains here by other parameters"):
        launch.run(settings)


def test_what_slurm_refuses_and_what_is_not_there_is_a_sentence(
    settings: Settings, fates: Path, monkeypatch: pytest.MonkeyPatch
):
    real_python(fates, ["AWAY", "RUN"])
    launch.run(settings)  # it was asked again
    with pytest.raises(RequestError, match=r"sbatch refused \(exit status 1\): .*Invalid partition"):
        launch.run(settings)
    settings.cluster.slurm = ["rm -rf"]
    with pytest.raises(RequestError, match=r"an option of sbatch begins with --"):
        launch.run(settings)
    settings.cluster.slurm = []
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RequestError, match="sbatch is not on this machine"):
        launch.run(settings)


def test_a_node_without_the_shared_folder_is_refused_before_anything_starts(settings: Settings, fates: Path):
    real_python(fates, ["RUN"])
    script = slurm.write_script(settings)
    text = script.read_text()
    Path("runs/train.slurm/train.yaml").unlink()
    script.write_text(text)
    job = slurm._submit(script)
    assert slurm._follow(job, script.with_name(f"train-{job}.log")) == ("FAILED", "2:0")
    said = script.with_name(f"train-{job}.log").read_text()
    assert f"does not see {Path.cwd()}/runs/train.slurm/train.yaml: the project has to be in a folder" in said
    assert not Path("started-0").exists()


def real_python(folder: Path, fates: list[str]) -> Path:
    """Install the stand-ins, which run by this Python and not by the one that takes part in the test."""
    own, sys.executable = sys.executable, sys._base_executable  # type: ignore[attr-defined]
    try:
        install(folder, fates)
    finally:
        sys.executable = own
    return folder


def jobs(folder: Path) -> dict[str, str]:
    return {path.stem: json.loads(path.read_text())["state"] for path in sorted((folder / "jobs").glob("*.json"))}
