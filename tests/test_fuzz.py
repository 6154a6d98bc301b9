"""Episodes of a policy that writes anything: played, evaluated, reported and trained on, each accounted for."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import hostile
import pytest
from players import Puppet, build_library
from scripted import OracleEncoder

from timesearch.data.messages import Message
from timesearch.data.rows import read_samples
from timesearch.evaluation import evaluate
from timesearch.inference import infer
from timesearch.search.engine_transformers import TransformersPolicy

EPISODES = 1_000
PIECES = (
    *(
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<tool_call>",
        "</tool_call>",
        "red",
        "B",
        "(C) ",
        " ",
        "[[1, 2]]",
    ),
    *('{"name": "seek_video_frames", "arguments": ', '{"query": "star"}', '"num_frames": 2', "{", "}", "<|im_end|>"),
    '<tool_call>{"name": "seek_video_frames", "arguments": {"query": "star", "num_frames": 1}}</tool_call>',
    '<think>t</think><tool_call>{"name": "seek_video_frames", "arguments": {"query": "\\ud83d"}}</tool_call>',
)
TEXTS = [value for value in hostile.VALUES if isinstance(value, str) and len(value) <= 20_000]


def anything(draw: random.Random) -> str:
    """Random bytes, markup in any order, or a value of the table, alone or where an answer or a query stands."""
    kind = draw.randrange(4)
    if kind == 0:
        return draw.randbytes(draw.randrange(200)).decode("utf-8", draw.choice(["replace", "surrogateescape"]))
    if kind == 1:
        return "".join(draw.choices(PIECES, k=draw.randrange(9)))
    value = draw.choice(TEXTS)
    if kind == 2:
        return draw.choice(["{}", "<think>t</think><answer>{}</answer>", "<tool_call>{}</tool_call>"]).replace(
            "{}", value
        )
    call = {"name": "seek_video_frames", "arguments": {"query": value, "num_frames": draw.choice([1, value])}}
    return f"<think>t</think><tool_call>{json.dumps(call)}</tool_call>"


def test_a_policy_that_writes_anything_ends_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = build_library(tmp_path, videos=1, questions=EPISODES)
    rows = read_samples(settings.paths.test_samples)
    kinds = {
        "open_ended": {},
        "multiple_choice": {"type": "multiple_choice", "options": ["red", "green", "blue"], "answer": "B"},
        "grounding": {"type": "grounding", "answer": "[[1, 2]]"},
    }
    rows = [row.model_copy(update=list(kinds.values())[number % 3]) for number, row in enumerate(rows)]
    settings.paths.test_samples.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    draw = random.Random(12)

    def speak(_: Sequence[Message]) -> str:
        return anything(draw)

    monkeypatch.setattr("timesearch.retrieval.encoder.load_encoder", lambda *_, **__: OracleEncoder())
    monkeypatch.setattr(TransformersPolicy, "load", classmethod(lambda *_: Puppet(speak)))
    monkeypatch.setattr("timesearch.search.checkpoint.check_fit", lambda *_: None)
    settings.paths.train.mkdir(parents=True)
    settings.infer.baselines = []
    settings.tracking.traced_episodes = 5
    settings.evaluate.visual = False
    settings.evaluate.bootstrap = 20
    played = infer.run(settings)
    assert played.exit_code() in (0, 1)
    assert len(played.done) + len(played.failures) == EPISODES
    path = settings.paths.results / "predictions" / "grpo_csv.jsonl"
    assert [json.loads(line)["id"] for line in path.open()] == [row.id for row in rows]
    scored = evaluate.run(settings)
    assert scored.exit_code() in (0, 1)
    assert len(scored.done) == EPISODES
    metrics = json.loads((settings.paths.results / "evaluation" / "grpo_csv.json").read_text())
    assert metrics["episodes"] == EPISODES
    assert (settings.paths.results / "report.html").stat().st_size > 100_000
