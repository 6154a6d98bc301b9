"""The paper's two filters, with predictions in place of an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from timesearch.base.files import write_jsonl
from timesearch.data.rows import read_samples
from timesearch.data.samples import Prediction, Sample
from timesearch.settings import Settings
from timesearch.training import curate

EASY, HARD, GOOD, BROKEN = "easy", "hard", "good", "broken"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "id": name,
            "video": f"{name}.mp4",
            "question": "What colour?",
            "answer": "red",
            "type": "open_ended",
            "meta": {"n": 1},
        }
        for name in (EASY, HARD, GOOD, BROKEN)
    ]
    write_jsonl(tmp_path / "data/train.jsonl", [*rows, {**rows[0], "id": "lost", "video": "lost.mp4"}])
    for name in (EASY, HARD, GOOD, BROKEN):
        for path in (f"cache/frames/{name}.mp4.frames", f"cache/features/{name}.mp4.safetensors"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
    (tmp_path / "policy").mkdir()
    settings = Settings()
    settings.judge.kind = "rule"
    return settings


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, list[str]]]:
    """Plays passes of `infer`: method, its number of frames, and the questions it got."""
    seen: list[tuple[str, int, list[str]]] = []

    def run(settings: Settings, methods: list[str]) -> None:
        (method,) = methods
        frames = settings.infer.uniform_frames if method == "uniform" else settings.search.max_frames
        samples = read_samples(settings.paths.test_samples)
        seen.append((method, frames, [sample.id for sample in samples]))
        right = {EASY} if method == "uniform" else {GOOD}
        rows = [_prediction(sample, "red" if sample.id in right else "blue") for sample in samples]
        write_jsonl(settings.paths.results / "predictions" / f"{method}.jsonl", rows)

    monkeypatch.setattr("timesearch.inference.infer.run", run)
    return seen


def _prediction(sample: Sample, answer: str) -> dict[str, Any]:
    said = {"role": "assistant", "content": f"<think>.</think><answer>{answer}</answer>"}
    error = {"type": "engine", "message": "gone"} if sample.id == BROKEN else None
    return Prediction(**sample.model_dump(), prediction=[said], error=error).model_dump(mode="json")


def test_easy_and_hopeless_samples_go_and_the_others_stay_as_they_are(
    settings: Settings, passes: list[tuple[str, int, list[str]]]
) -> None:
    curation = curate.run(settings, Path("policy"), Path("out"))
    assert passes == [("uniform", 4, [EASY, HARD, GOOD, BROKEN]), ("coldstart", 64, [HARD, GOOD])]
    kept = [json.loads(line) for line in curation.samples.read_text().splitlines()]
    original = [json.loads(line) for line in Path("data/train.jsonl").read_text().splitlines()]
    assert kept == [original[2]]
    verdicts = {
        row["id"]: row["verdict"] for row in map(json.loads, Path("out/curation.jsonl").read_text().splitlines())
    }
    assert verdicts == {EASY: "too_easy", HARD: "too_hard", GOOD: "kept", BROKEN: "failed", "lost": "missing_cache"}
    table = Path("out/curation.md").read_text()
    assert "| too_easy | 1 | 20.0% | solved from 4 uniform frames |" in table
    assert curation.table() in table


def test_where_all_is_easy_the_second_pass_plays_nothing(
    settings: Settings, passes: list[tuple[str, int, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curate, "accuracy", lambda *_, **__: 1.0)
    curation = curate.run(settings, Path("policy"), Path("out"))
    assert [method for method, _, _ in passes] == ["uniform"]
    assert curation.samples.read_text() == ""
    assert curation.counts["too_easy"] == 3
