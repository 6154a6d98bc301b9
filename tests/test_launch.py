"""How a training of several processes ends: what may come back is told from what will not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from timesearch.base.errors import RequestError, TemporaryError, TimeSearchError
from timesearch.base.processes import start_guarded
from timesearch.settings import Settings
from timesearch.training import launch

ROOT = Path(__file__).parents[1]


def ends(*scripts: str) -> int | None:
    """The exit code of the process that `launch` takes for the one that failed."""
    processes = [start_guarded(["sh", "-c", script]) for script in scripts]
    failed = launch._wait(processes)
    return None if failed is None else processes[failed].returncode


def test_the_cause_is_told_from_what_follows_from_it() -> None:
    assert ends("true", "true") is None
    assert ends("sleep 60", "exit 75") == 75
    assert ends("sleep 60", "exit 2") == 2
    assert ends("exit 1", "sleep 0.5; kill -KILL $$") == 137
    assert ends("exit 1", "sleep 60") == 1


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (1, TimeSearchError, "exit code 1"),
        (2, TimeSearchError, "exit code 2"),
        (75, TemporaryError, "exit code 75"),
        (137, TemporaryError, "signal 9"),
        (-9, TemporaryError, "signal 9"),
    ],
)
def test_what_may_come_back_is_said_to(code: int, kind: type[Exception], says: str) -> None:
    failure = launch._failure("training process 1 of 2", code, "its messages are above")
    assert type(failure) is kind
    assert says in str(failure)


@pytest.mark.takes(8)
def test_accelerate_hands_on_how_a_rank_ended(tmp_path: Path) -> None:
    """Through torch's launcher, whose own exit code is always 1."""
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)\n"
    )
    config = ["--config_file", str(ROOT / "configs/ddp.yaml"), "--num_machines", "1", "--num_processes", "2"]
    command = [*launch._ACCELERATE, *config, "--machine_rank", "0", "--main_process_port", str(launch.free_port())]
    done = subprocess.run([*command, "--mixed_precision", "no", str(rank)], capture_output=True, text=True, check=False)
    assert done.returncode == 137, done.stderr[-2000:]
    assert "exitcode  : -9" in done.stderr


def test_settings_that_do_not_go_together_start_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launch, "load_training_samples", lambda settings: ([], []))
    monkeypatch.setattr(launch, "start_guarded", lambda *_, **__: pytest.fail("a process was started"))
    settings = Settings.model_validate({"train": {"launcher": "zero3", "gpus_per_node": 8, "lora_rank": 8}})
    with pytest.raises(RequestError, match="lora_rank"):
        launch.run(settings)
