"""Measures what evaluation costs as files grow, and SSIM against the pair-by-pair method.

    uv run python benchmarks/evaluation.py [--predictions 200000] [--rows 1000000] [--size 640x360] [--frames 30]

Sample rows are read, and predictions scored and written as `timesearch evaluate` does, a tenth of the number first:
a cost that is linear is ten times as much for ten times the rows. Each runs in a process of its own, whose peak memory
is that of the whole process.

Pair by pair, mode ``standard`` is scikit-image's, and mode ``tstar`` T*'s own: five convolutions in PyTorch for each
pair. Neither side uses a second core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy is imported

import numpy as np
from rich.console import Console
from rich.table import Table

from timesearch.data.rows import read_samples
from timesearch.evaluation.results import write_evaluation
from timesearch.evaluation.scoring import evaluate_files
from timesearch.evaluation.visual import Mode, ssim_matrix
from timesearch.settings import Evaluate

GROUND_TRUTH, SEARCHED, TURNS = 5, 30, 4
OPTIONS = ["a red car", "a dog", "the man in blue", "two people", "rain"]


def write_predictions(path: Path, count: int, seed: int = 0) -> None:
    """Multiple-choice episodes of four searches: 5 ground-truth and 30 searched frames each, with their messages."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as handle:
        for number in range(count):
            times = np.sort(rng.uniform(0, 1800, SEARCHED).round(1)).tolist()
            messages: list[dict[str, Any]] = [{"role": "user", "content": "Question"}]
            for turn in range(TURNS):
                call = {"name": "seek_video_frames", "arguments": {"query": "a red car", "num_frames": 8}}
                blocks: list[dict] = []
                for seconds in times[turn::TURNS]:
                    blocks += [{"type": "text", "text": f"{seconds:.1f}s"}, {"type": "image", "seconds": seconds}]
                said = f"<think>Where is it?</think>\n<tool_call>\n{json.dumps(call)}\n</tool_call>"
                messages += [{"role": "assistant", "content": said}, {"role": "tool", "content": blocks}]
            answer = "ABCDE"[rng.integers(5)]
            messages.append({"role": "assistant", "content": f"<think>There.</think>\n<answer>{answer}</answer>"})
            row = {
                "id": str(number),
                "video": f"{number % 500}.mp4",
                "question": "What passes by?",
                "options": OPTIONS,
                "answer": "ABCDE"[rng.integers(5)],
                "type": "multiple_choice",
                "duration": 1800.0,
                "gt_seconds": np.sort(rng.uniform(0, 1800, GROUND_TRUTH)).tolist(),
                "meta": {"duration_group": int(rng.choice([15, 60, 600, 3600]))},
                "prediction": messages,
                "searched_seconds": times,
            }
            handle.write(json.dumps(row) + "\n")


def write_samples(path: Path, count: int) -> None:
    """Multiple-choice questions of about 300 bytes."""
    with path.open("w", encoding="utf-8") as handle:
        for number in range(count):
            row = {
                "id": str(number),
                "video": f"{number % 5000}.mp4",
                "question": f"What passes by at {number} seconds?",
                "options": OPTIONS,
                "answer": "B",
                "type": "multiple_choice",
                "duration": 1800.0,
                "gt_seconds": [number / 600, number / 600 + 5.0],
                "meta": {"duration_group": 600},
            }
            handle.write(json.dumps(row) + "\n")


def read_through(path: Path) -> None:
    """Read a sample file as a stage does, and go through it once."""
    for _ in read_samples(path):
        pass


def evaluate(path: Path) -> None:
    """Score a prediction file without videos, and write all results."""
    methods = evaluate_files({"searched": path}, Evaluate(), None)
    write_evaluation(methods, path.with_suffix(".results"), Evaluate(), seed=0, flat=True)


def cost(work: Callable[[Path], None], path: Path) -> tuple[float, float]:
    """Processor time (s) of `work` on a file, and peak memory (MB) of the process that did it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(work, path, sender))
    process.start()
    seconds, megabytes = receiver.recv()
    process.join()
    return seconds, megabytes


def _measured(work: Callable[[Path], None], path: Path, sender: Any) -> None:
    started = time.process_time()
    work(path)
    spent = time.process_time() - started
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sender.send((spent, int(status["VmHWM"].split()[0]) * 1024 / 1e6))


def by_scikit_image(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of one pair as scikit-image computes it."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(a, b, gaussian_weights=True, channel_axis=-1, data_range=255))


def by_convolution(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of one pair as T* computes it: five 11 x 11 convolutions in PyTorch, with the rows taken as channels."""
    import torch
    from torch.nn.functional import conv2d

    offsets = torch.arange(11) - 5.0
    kernel = torch.exp(-(offsets**2) / (2 * 1.5**2))
    kernel = (kernel / kernel.sum())[:, None]
    window = (kernel @ kernel.T).expand(len(a), 1, 11, 11)

    def smooth(image: torch.Tensor) -> torch.Tensor:
        return conv2d(image, window, padding=5, groups=len(a))

    x, y = (torch.tensor(frame, dtype=torch.float32)[None] / 255 for frame in (a, b))
    mean_x, mean_y = smooth(x), smooth(y)
    variance_x, variance_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
    contrast = (2 * covariance + 9e-4) / (variance_x + variance_y + 9e-4)
    return float((luminance * contrast).mean())


def main() -> None:
    """Run both measurements and print them as tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of a sample file")
    parser.add_argument("--size", default="640x360", help="width x height of the frames in pixels")
    parser.add_argument("--frames", type=int, default=8, help="searched frames that meet 5 of the ground truth")
    arguments = parser.parse_args()
    console = Console()

    costs = Table("file", "rows", "seconds", "times a tenth", "peak memory (MB)", title="Linear costs, one core")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        for title, most, write, work in (
            ("samples, read", arguments.rows, write_samples, read_through),
            ("predictions, evaluated", arguments.predictions, write_predictions, evaluate),
        ):
            before = 0.0
            for count in (most // 10, most):
                write(path, count)
                spent, peak = cost(work, path)
                costs.add_row(
                    title, f"{count:,}", f"{spent:.1f}", f"{spent / before:.1f}" if before else "", f"{peak:.0f}"
                )
                before = spent
    console.print(costs)

    width, height = map(int, arguments.size.split("x"))
    rng = np.random.default_rng(0)
    gt_frames = rng.integers(0, 256, (GROUND_TRUTH, height, width, 3), dtype=np.uint8)
    pred_frames = rng.integers(0, 256, (arguments.frames, height, width, 3), dtype=np.uint8)
    title = f"SSIM of {GROUND_TRUTH} x {arguments.frames} frames of {width} x {height}, seconds on one core"
    speeds = Table("mode", "pair by pair", "here", "times faster", "largest difference", title=title)
    baselines: dict[Mode, Callable[[np.ndarray, np.ndarray], float]] = {
        "standard": by_scikit_image,
        "tstar": by_convolution,
    }
    for mode, similarity in baselines.items():
        similarity(gt_frames[0], pred_frames[0])
        started = time.process_time()
        expected = [[similarity(a, b) for b in pred_frames] for a in gt_frames]
        slow = time.process_time() - started
        started = time.process_time()
        found = ssim_matrix(gt_frames, pred_frames, mode)
        fast = time.process_time() - started
        difference = np.abs(found - expected).max()
        speeds.add_row(mode, f"{slow:.2f}", f"{fast:.2f}", f"{slow / fast:.1f}", f"{difference:.0e}")
    console.print(speeds)


if __name__ == "__main__":
    main()
