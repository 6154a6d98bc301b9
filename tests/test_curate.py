"""The paper's two filters, with predictions in place of an engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from players import Puppet, answer_turn, build_library, search_turn
from scripted import OracleEncoder

from timesearch.base.files import write_jsonl
from timesearch.data.messages import Block, Message
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
    """Plays the passes: name, number of frames, and the questions each got."""
    seen: list[tuple[str, int, list[str]]] = []

    def played(
        settings: Settings, policy: Path, folder: Path, samples: list[Sample], filter: curate.Filter
    ) -> list[Prediction]:
        if not samples:
            return []
        frames = filter.search.max_frames if filter.name == "hard" else filter.frames
        seen.append((filter.name, frames, [sample.id for sample in samples]))
        right = {EASY} if filter.name == "easy" else {GOOD}
        return [_prediction(sample, "red" if sample.id in right else "blue") for sample in samples]

    monkeypatch.setattr(curate, "_play", played)
    return seen


def _prediction(sample: Sample, answer: str) -> Prediction:
    said = {"role": "assistant", "content": f"<think>.</think><answer>{answer}</answer>"}
    error = {"type": "engine", "message": "gone"} if sample.id == BROKEN else None
    return Prediction(**sample.model_dump(), prediction=[said], error=error)


def test_easy_and_hopeless_samples_go_and_the_others_stay_as_they_are(
    settings: Settings, passes: list[tuple[str, int, list[str]]]
) -> None:
    curation = curate.run(settings, Path("policy"), Path("out"))
    assert passes == [("easy", 4, [EASY, HARD, GOOD, BROKEN]), ("hard", 64, [HARD, GOOD])]
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
    assert [name for name, _, _ in passes] == ["easy"]
    assert curation.samples.read_text() == ""
    assert curation.counts["too_easy"] == 3


def test_the_filters_play_episodes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real episodes of a scripted policy, which answers rightly after a search alone; a second run plays none anew."""
    settings = build_library(tmp_path, videos=3)
    settings.judge.kind = "rule"
    settings.paths.train_samples = settings.paths.test_samples
    samples = read_samples(settings.paths.test_samples)

    def speak(messages: Sequence[Message]) -> str:
        searched = any(message["role"] == "tool" for message in messages)
        if not searched and messages[0]["role"] == "system":
            return search_turn()
        return answer_turn(samples[0].answer if searched else "no idea")

    policies: list[Puppet] = []

    @contextmanager
    def open_puppet(*_: object) -> Iterator[Puppet]:
        policies.append(Puppet(speak))
        yield policies[-1]

    monkeypatch.setattr(curate, "open_policy", open_puppet)
    monkeypatch.setattr("timesearch.retrieval.features.default_encoder", lambda _: OracleEncoder())
    (tmp_path / "policy").mkdir()
    first = curate.run(settings, tmp_path / "policy", tmp_path / "out", easy_frames=2, hard_frames=4)
    alike = sum(sample.answer == samples[0].answer for sample in samples)
    assert (first.counts["kept"], first.counts["too_hard"], first.counts["too_easy"]) == (
        alike,
        len(samples) - alike,
        0,
    )
    assert len(policies) == 2
    assert all(len(images) == 2 for images in map(images_of, policies[0].seen))
    assert curate.run(settings, tmp_path / "policy", tmp_path / "out", easy_frames=2, hard_frames=4) == first
    assert len(policies) == 2
    curate.run(settings, tmp_path / "policy", tmp_path / "out", easy_frames=3, hard_frames=4)
    assert len(policies) == 3  # another number of frames is another question


def images_of(messages: Sequence[Message]) -> list[Block]:
    return [block for block in messages[0]["content"] if block["type"] == "image"]
