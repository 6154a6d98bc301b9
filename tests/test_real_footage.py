"""Real clips and a sample file in LongVideoBench's published form, through the stages from frames to scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

ROWS = [
    {
        "video_id": "car-detection",
        "video_path": "car-detection.mp4",
        "question": "In the view over the parking lane, what drives past first?",
        "question_wo_referring_query": "What drives past first?",
        "candidates": ["a car", "a train", "a boat", "a plane"],
        "correct_choice": 0,
        "position": [25, 60],
        "topic_category": "NP-News-Programs",
        "question_category": "S2E",
        "level": "L1-Perception",
        "id": "car-detection_0",
        "duration": 30.0,
        "duration_group": 60,
    },
    {
        "video_id": "bottle-detection",
        "video_path": "bottle-detection.mp4",
        "question": "What is put on the table?",
        "question_wo_referring_query": "What is put on the table?",
        "candidates": ["a shoe", "a bottle", "a book", "a hat", "a clock"],
        "correct_choice": 1,
        "position": [120],
        "topic_category": "KH-Knowledge-Humanities",
        "question_category": "O2E",
        "level": "L1-Perception",
        "id": "bottle-detection_0",
        "duration": 40.0,
        "duration_group": 60,
    },
    {
        "video_id": "nasa_13013",
        "video_path": "nasa_13013.mp4",
        "question": "Where does the person speak?",
        "question_wo_referring_query": "Where does the person speak?",
        "candidates": ["in a studio", "in a forest"],
        "correct_choice": 0,
        "position": [30, 200],
        "topic_category": "KS-Knowledge-STEM",
        "question_category": "SSS",
        "level": "L2-Relation",
        "id": "nasa_13013_0",
        "duration": 13.0,
        "duration_group": 15,
    },
]


@pytest.mark.takes(15)
def test_real_clips_go_through_every_stage(footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from timesearch.base.files import write_jsonl
    from timesearch.evaluation.evaluate import run as evaluate
    from timesearch.inference.infer import run as infer
    from timesearch.pocket.encoder import train_encoder
    from timesearch.pocket.policy import make_policy, make_processor, make_tokenizer, save_policy
    from timesearch.retrieval.features import run as features
    from timesearch.settings import load_settings
    from timesearch.video.frames import run as frames

    settings = load_settings(Path(__file__).parents[1] / "params.yaml")
    monkeypatch.chdir(tmp_path)
    settings.paths.videos.mkdir(parents=True)
    for row in ROWS:
        shutil.copy(footage / row["video_path"], settings.paths.videos)
    for path in (settings.paths.train_samples, settings.paths.test_samples):
        path.parent.mkdir(exist_ok=True)
        write_jsonl(path, ROWS)
    settings.tracking.uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    settings.infer.baselines = ["uniform", "one_shot"]
    train_encoder(settings.paths.models / "encoder", steps=1)
    tokenizer = make_tokenizer()
    save_policy(make_policy(tokenizer), make_processor(tokenizer), settings.paths.train)

    for stage in (frames, features, infer, evaluate):
        result = stage(settings)
        assert result.failures == []
    metrics = json.loads((settings.paths.results / "metrics.json").read_text())
    assert set(metrics) == {"uniform", "one_shot", "grpo_csv"}
    assert all(block["episodes"] == 3 and block["errors"] == 0 for block in metrics.values())
    assert metrics["uniform"]["visual_f1"] > 0.3, "eight uniform frames of a still camera look like the asked ones"
