"""The folder of a training run: what is gone on from, what is moved aside."""

from __future__ import annotations

from pathlib import Path

from timesearch.training.folder import latest_checkpoint


def test_the_newest_whole_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    def write(name: str, *files: str) -> None:
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()

    assert latest_checkpoint(tmp_path / "absent") is latest_checkpoint(tmp_path) is None
    write("checkpoint-9", "model.safetensors", "rng_state.pth", "trainer_state.json")
    write("checkpoint-10", "model.safetensors", "rng_state.pth", "trainer_state.json")
    write("checkpoint-11", "model.safetensors", "rng_state.pth")
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert latest_checkpoint(tmp_path, processes=2) is None
    write("checkpoint-12", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json")
    write("checkpoint-13", "rng_state_0.pth", "trainer_state.json")
    assert latest_checkpoint(tmp_path, processes=2) == str(tmp_path / "checkpoint-12")
