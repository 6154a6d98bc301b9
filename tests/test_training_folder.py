"""The folder of a training run: what is gone on from, what is moved aside."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from timesearch.search import protocol
from timesearch.settings import Settings
from timesearch.training.folder import latest_checkpoint, prepare_run_folder


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a training that was stopped in `runs/train` under the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/model.safetensors").write_bytes(b"weights")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("{}\n")
    shutil.copytree(Path(protocol.__file__).parent / "prompt_sets/default", tmp_path / "words")
    settings = Settings()
    settings.search.prompts = "words"
    prepare(settings)
    write_checkpoint("checkpoint-600")
    return settings


def prepare(settings: Settings) -> None:
    prepare_run_folder(Path("runs/train"), settings, "train", Path("policy"))


def write_checkpoint(name: str) -> None:
    Path("runs/train/checkpoints", name).mkdir(parents=True)


@pytest.mark.parametrize(
    "changed",
    [
        {"log_episodes_every": 3},
        {"gpu_memory": 141.0},
        {"vllm_url": "http://host:8000"},
        {"micro_batch": 2},
        {"save_steps": 7},
        {"gradient_checkpointing": True},
    ],
)
def test_a_run_goes_on_where_only_its_pace_changes(stopped: Settings, changed: dict[str, Any]) -> None:
    stopped.train = stopped.train.model_copy(update=changed)
    prepare(stopped)
    assert Path("runs/train/checkpoints/checkpoint-600").is_dir()
    assert [path.name for path in Path("runs").iterdir()] == ["train"]


def test_an_unfinished_run_of_another_kind_is_moved_aside_and_that_is_said(
    stopped: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped.train.learning_rate *= 2
    prepare(stopped)
    assert Path("runs/train.unfinished-1/checkpoints/checkpoint-600").is_dir()
    assert [path.name for path in Path("runs/train").iterdir()] == ["run.json"]
    assert "it is now runs/train.unfinished-1" in capsys.readouterr().err

    write_checkpoint("checkpoint-5")
    Path("words/system.txt").write_text("Other words.")
    prepare(stopped)
    assert Path("runs/train.unfinished-2/checkpoints/checkpoint-5").is_dir()
    prepare(stopped)
    assert "unfinished-2" in capsys.readouterr().err
    assert not Path("runs/train.unfinished-3").exists()


def test_what_a_finished_run_left_makes_room(stopped: Settings) -> None:
    shutil.rmtree("runs/train/checkpoints")
    Path("runs/train/model.safetensors").touch()
    prepare(stopped)
    assert [str(path) for path in Path("runs").rglob("*")] == ["runs/train", "runs/train/run.json"]


def test_the_newest_whole_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    def write(name: str, *files: str) -> None:
        (tmp_path / name).mkdir()
        for file in files:
            if file.endswith(".pth"):
                torch.save({"state": torch.zeros(3)}, tmp_path / name / file)
            else:
                (tmp_path / name / file).write_text('{"global_step": 1}')

    assert latest_checkpoint(tmp_path / "absent") is latest_checkpoint(tmp_path) is None
    write("checkpoint-9", "model.safetensors", "rng_state.pth", "trainer_state.json")
    write("checkpoint-10", "model.safetensors", "rng_state.pth", "trainer_state.json")
    write("checkpoint-11", "model.safetensors", "rng_state.pth")
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert latest_checkpoint(tmp_path, processes=2) is None
    write("checkpoint-12", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json")
    write("checkpoint-13", "rng_state_0.pth", "trainer_state.json")
    assert latest_checkpoint(tmp_path, processes=2) == str(tmp_path / "checkpoint-12")


@pytest.mark.parametrize("name", ["trainer_state.json", "rng_state.pth"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_checkpoint_in_whose_writing_a_kill_fell_is_not_gone_on_from(tmp_path: Path, name: str, share: float) -> None:
    for number in (2, 4):
        checkpoint = tmp_path / f"checkpoint-{number}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text('{"global_step": 4, "log_history": [{"loss": 1.0}]}')
        torch.save({"python": [1, 2], "cpu": torch.zeros(3)}, checkpoint / "rng_state.pth")
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    cut = tmp_path / "checkpoint-4" / name
    cut.write_bytes(cut.read_bytes()[: int(share * cut.stat().st_size)])
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
