"""GRPO-CSV on a tiny policy with scripted turns: what is learned from, what is scored, what stops a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import ANSWER, CALL, OracleEncoder, Script, build_project, make_settings

from timesearch.settings import Settings
from timesearch.training import grpo_csv
from timesearch.training.grpo_csv import GRPOCSVTrainer

BLUE = ANSWER.replace("{colour}", "blue")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    build_project(root, videos=6)
    return root


@pytest.fixture
def at_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    monkeypatch.setattr("timesearch.retrieval.encoder.load_encoder", lambda *_, **__: OracleEncoder())
    return project


def scripted(monkeypatch: pytest.MonkeyPatch, turns: list[list[str]], reanswer: str = ANSWER) -> list[GRPOCSVTrainer]:
    """Let trainers play `turns`; returns the list that they will be found in."""
    made: list[GRPOCSVTrainer] = []
    original = GRPOCSVTrainer.__init__

    def init(self: Any, *arguments: Any, **keywords: Any) -> None:
        original(self, *arguments, **keywords)
        generate = self.model.generate
        self.model.generate = lambda *inputs, **options: generate(
            *inputs, logits_processor=[Script(self._tokenizer, turns, reanswer)], **options
        )
        made.append(self)

    monkeypatch.setattr(GRPOCSVTrainer, "__init__", init)
    return made


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def batch_of(monkeypatch: pytest.MonkeyPatch, settings: Settings, turns: list[list[str]], **options: Any) -> Any:
    """A trainer, and the batch that its first step learns from."""
    kept: list[dict[str, Any]] = []
    made = scripted(monkeypatch, turns, **options)
    original = GRPOCSVTrainer._compute_loss

    def keep(self: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        kept.append(inputs)
        return original(self, model, inputs)

    monkeypatch.setattr(GRPOCSVTrainer, "_compute_loss", keep)
    grpo_csv.run(settings)
    return made[0], kept[0]


def test_rewards_metrics_and_checkpoint_of_a_run(at_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(steps=1, prompts_per_step=2, micro_batch=8, log_episodes_every=1)
    turns = [[CALL, ANSWER], [ANSWER, BLUE]]
    trainer = scripted(monkeypatch, turns)
    folder = grpo_csv.run(settings)

    (row,) = metrics(folder)
    assert row["step"] == 1
    assert row["format"] == 1.0
    assert row["search_rate"] == 0.5
    assert row["tool_calls"] == 0.5
    assert row["frames"] == pytest.approx(1.0, abs=0.5)
    assert row["answer_rate"] == 1.0
    assert row["reward"] == pytest.approx(1.0 + 0.5 * row["accuracy"] + 0.5 * row["completeness"])
    for episode in trainer[0].episodes:
        right = episode.row["answer"] == "red"
        assert episode.scores["completeness"] <= (right and bool(episode.searched))
        assert (episode.reanswer is not None) == bool(episode.searched)
    files = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json", "metrics.jsonl"} <= files
    assert not files & {"training_args.bin", "checkpoints"}
    (episodes,) = (folder / "episodes").iterdir()
    first = json.loads(episodes.read_text().splitlines()[0])
    assert first["prediction"][0]["role"] == "system"
    assert first["rewards"]["format"] == 1.0
