"""A small evaluated project: real videos, real frame caches, and episodes written as the stages write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np

from timesearch.base.files import write_json, write_jsonl
from timesearch.evaluation.results import write_evaluation
from timesearch.evaluation.scoring import evaluate_files
from timesearch.inference.fingerprint import beside, checkpoint_digest
from timesearch.settings import Frames, Settings

ROOT = Path(__file__).parents[1]
SECONDS, RATE = 20, 5
OPTIONS = ["a red square", "a blue square", "nothing"]
HOSTILE = "<script>document.title = 'owned'</script></script><img src=x onerror=\"document.title='owned'\">"


def trained_project(folder: Path) -> None:
    """A project in `folder` with the pocket policy as the one that was trained, and its episodes evaluated."""
    policy = folder / "runs" / "train"
    shutil.copytree(ROOT / "pretrained" / "pocket", policy)
    write_json(policy / "run.json", {"of": "this project"})
    (policy / "metrics.jsonl").write_text("{}\n")
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    for split in ("train", "test"):
        write_jsonl(folder / "data" / f"{split}.jsonl", [{"id": "1", "video": "a.mp4", "question": "?"}])
    evaluate(folder, checkpoint_digest(policy))


def evaluate(folder: Path, checkpoint: str, right: int = 3) -> None:
    """Leave predictions of a checkpoint, wrong on one of `right` questions, and their scores, as the stages do."""
    path = folder / "results" / "predictions" / "grpo_csv.jsonl"
    digest = "0123456789ab"
    rows = [searching(n, "a.mp4", [[9.0], [15.0]], "A" if n % right else "B") for n in range(30)]
    write_jsonl(path, [row | {"fingerprint": digest} for row in rows])
    write_json(beside(path), {"fingerprint": digest, "made_of": {"checkpoint": checkpoint, "seed": 0}})
    settings = Settings.model_validate({"evaluate": {"visual": False, "bootstrap": 100}})
    methods = evaluate_files({"grpo_csv": path}, settings.evaluate, None)
    write_evaluation(methods, folder / "results", settings.evaluate, 0)


def write_video(path: Path, hue: int) -> None:
    """20 s of a grey field at 5 frames a second, in which a square moves and, from 8 to 12 s, turns red."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for number in range(SECONDS * RATE):
            image = np.full((96, 160, 3), 70 + hue, dtype=np.uint8)
            left = (number * 2) % 120
            image[30:66, left : left + 36] = (220, 40, 40) if 8 <= number / RATE < 12 else (40, 60, 220)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def shown(times: list[float]) -> list[dict[str, Any]]:
    """Blocks of frames, each after its time."""
    blocks: list[dict[str, Any]] = []
    for time in times:
        blocks += [{"type": "text", "text": f"{time:.1f}s"}, {"type": "image", "seconds": time, "frame": int(time * 2)}]
    return blocks


def sample_row(number: int, video: str) -> dict[str, Any]:
    return {
        "id": f"q{number}",
        "video": video,
        "question": f"Question {number}: what turns up?",
        "options": OPTIONS,
        "answer": "A",
        "type": "multiple_choice",
        "duration": float(SECONDS),
        "gt_seconds": [9.0, 11.0],
        "gt_spans": [[8.0, 12.0]],
        "meta": {"duration_group": 15 if number % 2 else 60},
    }


def searching(number: int, video: str, windows: list[list[float]], answer: str, thought: str = "Look closer.") -> dict:
    """An episode of one search a list of times, and then the answer."""
    preview = [2.5, 7.5, 12.5, 17.5]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Search the video."},
        {"role": "user", "content": [*shown(preview), {"type": "text", "text": "What turns up?"}]},
    ]
    for times in windows:
        arguments = {"query": "a red square", "start_time": 4.0, "end_time": 16.0, "num_frames": len(times)}
        call = json.dumps({"name": "seek_video_frames", "arguments": arguments})
        said = f"<think>{thought}</think>\n<tool_call>\n{call}\n</tool_call>"
        messages.append({"role": "assistant", "content": said})
        messages.append({"role": "tool", "name": "seek_video_frames", "content": shown(times)})
    messages.append({"role": "assistant", "content": f"<think>It is there.</think>\n<answer>{answer}</answer>"})
    times = sorted({time for window in windows for time in window})
    row = sample_row(number, video)
    return row | {
        "prediction": messages,
        "searched_seconds": times,
        "preview_seconds": preview,
        "predicted_answer": answer,
        "reanswer": answer if times else None,
        "turns": len(windows) + 1,
        "tool_calls": len(windows),
    }


def given(number: int, video: str, times: list[float], answer: str) -> dict[str, Any]:
    """An episode of a baseline: frames at once, no search."""
    messages = [
        {"role": "tool", "content": shown(times)},
        {"role": "assistant", "content": f"<answer>{answer}</answer>"},
    ]
    row = sample_row(number, video)
    return row | {"prediction": messages, "searched_seconds": times, "predicted_answer": answer, "turns": 1}


def make_project(folder: Path, episodes: int = 6) -> Settings:
    """Two videos with caches, and predictions of two methods; episode 1's texts try to break out of the page."""
    from timesearch.video.frames import make_frame_cache

    settings = Settings.model_validate(
        {
            "paths": {
                "videos": folder / "videos",
                "frames": folder / "frames",
                "results": folder / "results",
                "train": folder / "runs" / "train",
            },
            "evaluate": {"thresholds": [2.0, 5.0], "bootstrap": 50},
            "judge": {"kind": "rule"},
            "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
        }
    )
    small = Frames(fps=2, factor=16, min_pixels=16 * 16, max_pixels=96 * 64)
    for hue, name in enumerate(("one.mp4", "deep/two.mp4")):
        write_video(folder / "videos" / name, hue * 40)
        make_frame_cache(folder / "videos" / name, folder / "frames" / f"{name}.frames", small)
    videos = ["one.mp4", "deep/two.mp4"]
    rows = [searching(i, videos[i % 2], [[4.5, 9.0], [9.5, 11.0]], "A" if i % 3 else "B") for i in range(episodes)]
    rows[1] = searching(1, videos[1], [[9.0]], HOSTILE, thought=HOSTILE)
    rows[2] = searching(2, videos[0], [], "A")
    write_jsonl(folder / "results" / "predictions" / "grpo_csv.jsonl", rows)
    uniform = [given(i, videos[i % 2], [2.5, 7.5, 12.5, 17.5], "A" if i % 2 else "C") for i in range(episodes)]
    write_jsonl(folder / "results" / "predictions" / "uniform.jsonl", uniform)
    curve = [{"step": step, "reward": step / 10, "search_rate": 1 - step / 20} for step in range(1, 9)]
    write_jsonl(folder / "runs" / "train" / "metrics.jsonl", curve)
    return settings
