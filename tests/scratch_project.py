"""A project of its own in a temporary folder: this one's flows, tasks, parameters and DVC pipeline in a git repository.

Its stage graph is the real `dvc.yaml`; only the stages' commands are stand-ins (`stage_stub.py`).
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def environment(project: Path, **more: str) -> dict[str, str]:
    """For commands in the project: its own code is imported, and nothing of the caller's Prefect or MLflow is used."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return {
        **ours,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(project),
        "PREFECT_HOME": str(project.parent / "prefect-home"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "600",
        "STAGE_STUB_LOG": str(project.parent / "ran.log"),
        "GIT_AUTHOR_NAME": "test",
        "GIT_AUTHOR_EMAIL": "test@localhost",
        "GIT_COMMITTER_NAME": "test",
        "GIT_COMMITTER_EMAIL": "test@localhost",
        **more,
    }


def run(project: Path, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the project; programs of this environment come first."""
    done = subprocess.run(command, cwd=project, env=environment(project, **env), capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def make_project(folder: Path) -> Path:
    """Make the project in `folder/project`, commit it, and put its data under DVC."""
    project = folder / "project"
    project.mkdir(parents=True)
    for name in ("flows", "tasks", "timesearch"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "prefect.yaml", "prefect.toml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, project / name)
    pipeline = (ROOT / "dvc.yaml").read_text().replace("cmd: timesearch ", "cmd: python tests/stage_stub.py ")
    (project / "dvc.yaml").write_text(pipeline)
    (project / "tests").mkdir()
    shutil.copy(Path(__file__).with_name("stage_stub.py"), project / "tests" / "stage_stub.py")
    (project / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", project / ".dvc" / "config")
    shutil.copy(ROOT / ".dvc" / ".gitignore", project / ".dvc" / ".gitignore")
    (project / "data").mkdir()
    for split in ("train", "test"):
        (project / "data" / f"{split}.jsonl").write_text('{"id": "1", "video": "a.mp4", "question": "?"}\n')
    for name in ("pocket", "hops", "senses"):
        (project / "pretrained" / name).mkdir(parents=True)
        (project / "pretrained" / name / "config.json").write_text("{}")
    run(project, "git", "init", "-q", "-b", "main")
    run(project, "dvc", "add", "-q", "data", *(f"pretrained/{name}" for name in ("pocket", "hops", "senses")))
    run(project, "dvc", "push", "-q")
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-q", "-m", "project")
    return project


def ran(project: Path) -> list[str]:
    """Stages whose command was started so far, in order."""
    log = project.parent / "ran.log"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def free_port() -> int:
    """A port of the loopback interface that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(done: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until `done` is true."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.2)
