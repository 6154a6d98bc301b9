"""A judge that goes away in training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scratch_project import ROOT, free_port, wait_for
from scripted import ANSWER, CALL, build_project, make_settings

from timesearch.profiles import load_profile, profile_names
from timesearch.settings import Judge

TESTS = Path(__file__).parent
PLANTED = "hf_planted_secret"
OUTAGE = 3.0
"""Seconds that the judge is away."""


def start_judge(port: int) -> subprocess.Popen[str]:
    """A judge of somebody else, which this project's processes neither start nor stop."""
    command = [sys.executable, str(TESTS / "judge_stub.py"), str(port), "stub"]
    judge = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert judge.stdout is not None
    assert judge.stdout.readline() == "ready\n"
    return judge


def rows(path: Path) -> list[dict]:
    """Rows of a file that is being written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.takes(30)
def test_a_judge_that_goes_away_in_training_costs_no_step(tmp_path: Path) -> None:
    build_project(tmp_path, videos=6)
    samples = tmp_path / "data" / "train.jsonl"
    asked = [
        {
            **row,
            "question": f"Video {row['id']}: {row['question']}",
            "answer": ("red", row["answer"])[int(row["id"]) % 2],
        }
        for row in rows(samples)
    ]
    samples.write_text("".join(json.dumps(row) + "\n" for row in asked))
    port = free_port()
    settings = make_settings(steps=3, log_episodes_every=1)
    settings.judge = Judge(
        kind="server", url=f"http://user:planted@127.0.0.1:{port}/v1", model="stub", start=False, retry_for=OUTAGE + 60
    )
    (tmp_path / "params.json").write_text(settings.model_dump_json())
    (tmp_path / "turns.json").write_text(json.dumps([[CALL, ANSWER], [ANSWER, ANSWER.replace("{colour}", "blue")]]))
    metrics = tmp_path / "runs" / "train" / "metrics.jsonl"
    judge = start_judge(port)
    training = subprocess.Popen(
        [sys.executable, str(TESTS / "scripted.py"), str(tmp_path), "params.json", "turns.json"],
        cwd=tmp_path,
        env={**os.environ, "HF_TOKEN": PLANTED},
        stdout=(tmp_path / "train.log").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for(lambda: rows(metrics), 300, "the first step")
        judge.kill()
        judge.wait()
        time.sleep(OUTAGE)
        assert len(rows(metrics)) < 3
        assert training.poll() is None
        judge = start_judge(port)
        assert training.wait(300) == 0, (tmp_path / "train.log").read_text()[-3000:]
    finally:
        training.kill()
        judge.kill()
    assert [row["step"] for row in rows(metrics)] == [1, 2, 3]
    right = {row["id"]: row["answer"] for row in asked}
    for step in (1, 2, 3):
        episodes = rows(tmp_path / "runs" / "train" / "episodes" / f"step-{step:05d}.jsonl")
        assert len(episodes) == 8
        for episode in episodes:
            assert episode["rewards"]["accuracy"] == float(episode["predicted_answer"] == right[episode["id"]])
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "params.json":
            assert b"planted" not in path.read_bytes(), path


@pytest.mark.parametrize("name", profile_names(ROOT / "profiles"))
def test_every_profile_bears_a_judge_that_is_away_for_a_minute(name: str) -> None:
    """`retry_for`, and the longest pause between two tries."""
    assert load_profile(name, ROOT / "profiles").judge.retry_for > 60 + 10
