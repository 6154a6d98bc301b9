"""What a person sees of a training run: a progress bar, `metrics.jsonl`, MLflow curves, sampled episodes, warnings."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from timesearch.base.files import atomic_path, write_jsonl
from timesearch.base.progress import Bar, console
from timesearch.data.messages import final_answer
from timesearch.data.rows import read_rows
from timesearch.data.samples import Prediction
from timesearch.rewards import REWARDS, calls
from timesearch.search.environment import PREVIEW_FRAMES
from timesearch.search.episode import without_pixels

if TYPE_CHECKING:
    from timesearch.tracking import Run
    from timesearch.training.grpo_csv import GRPOCSVTrainer
    from timesearch.training.rollouts import Episode

NAMES = {
    "reward": "reward",
    **{f"rewards/{part.name}/mean": part.name for part in REWARDS},
    "reward_std": "reward_std",
    "frac_reward_zero_std": "zero_advantage",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "written_tokens",
    "completions/max_length": "written_tokens_max",
    "sampling/sampling_logp_difference/mean": "sampling_logp_difference",
}
"""Names that TRL logs under, and the names that people see."""

EPISODE_NAMES = (
    "answer_rate",
    "search_rate",
    "reanswer_accuracy",
    "tool_calls",
    "frames",
    "ill_formed",
    "truncated",
    "unjudged",
    "replaced",
)


class Watch(TrainerCallback):
    """Writes down every step.

    Args:
        folder: `metrics.jsonl` and `episodes/` are written here.
        run: the MLflow run.
        bar: the progress bar.
        frames: root of the frame caches, for the pictures of sampled episodes.
        episodes_every: steps between two samples of episodes.
    """

    def __init__(self, folder: Path, run: Run, bar: Bar, frames: Path, episodes_every: int) -> None:
        self.trainer: GRPOCSVTrainer | None = None
        self._folder = folder
        self._run = run
        self._bar = bar
        self._frames = frames
        self._episodes_every = episodes_every
        self._last = time.perf_counter()
        self._collapse = CollapseWarning()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget what an interrupted run wrote after its last checkpoint."""
        path = self._folder / "metrics.jsonl"
        if path.is_file():
            write_jsonl(path, [row for _, row in read_rows(path) if row["step"] <= state.global_step])
        self._bar.advance(state.global_step)
        self._last = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """One finished step."""
        if self.trainer is None or not logs or "reward" not in logs:
            return
        now = time.perf_counter()
        values = {new: logs[old] for old, new in NAMES.items() if logs.get(old) is not None}
        values |= {name: logs[name] for name in EPISODE_NAMES if logs.get(name) is not None}
        values |= time_shares(self.trainer.clock.seconds, now - self._last)
        values["memory_gib"] = memory_gib()
        self._last = now
        self.trainer.clock.seconds.clear()
        with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": state.global_step, **values}) + "\n")
        self._run.log_metrics(values, step=state.global_step)
        self._bar.advance(note=_note(values))
        for warning in self._collapse.check(values):
            console.print(f"[yellow]step {state.global_step}: {warning}[/yellow]")
        if state.global_step % self._episodes_every == 0:
            self._show_episodes(state.global_step, self.trainer.episodes)

    def _show_episodes(self, step: int, episodes: list[Episode]) -> None:
        """Keep the step's episodes of this process as a file, and one of each question as an MLflow trace."""
        path = self._folder / "episodes" / f"step-{step:05d}.jsonl"
        predictions = [to_prediction(episode) for episode in episodes]
        write_jsonl(path, [prediction.model_dump(mode="json") for prediction in predictions])
        self._run.log_artifact(path, "episodes")
        for prediction in {prediction.id: prediction for prediction in predictions}.values():
            self._run.log_episode(prediction, self._frames, name=f"step {step}")


def write_table(folder: Path) -> None:
    """Write `metrics.jsonl` again as `metrics.csv`, which `dvc plots` reads."""
    rows = [row for _, row in read_rows(folder / "metrics.jsonl")] if (folder / "metrics.jsonl").is_file() else []
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_path(folder / "metrics.csv") as partial, partial.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class CollapseWarning:
    """Says once when search or format collapses: the mean of `window` steps against the first `window` steps.

    Search that fades while rewards rise is how training without completeness fails (paper, Section 4.4).
    """

    def __init__(self, window: int = 5) -> None:
        self._window = window
        self._history: dict[str, list[float]] = {"search_rate": [], "format": []}
        self._said: set[str] = set()

    def check(self, values: dict[str, float]) -> Iterator[str]:
        """Yield a sentence for each collapse that shows at this step."""
        texts = {
            "search_rate": "searching collapses: {now:.0%} of episodes search, {first:.0%} did at first. "
            "Raise train.rewards.completeness, or strengthen the cold start",
            "format": "the format collapses: {now:.0%} of episodes keep it, {first:.0%} did at first. "
            "Lower train.learning_rate, or train the cold start longer",
        }
        for name, history in self._history.items():
            if name in values:
                history.append(values[name])
            if name in self._said or len(history) < 2 * self._window:
                continue
            first, now = (sum(part) / self._window for part in (history[: self._window], history[-self._window :]))
            if now < 0.5 * first or now < 0.2:
                self._said.add(name)
                yield texts[name].format(now=now, first=first)


def memory_gib() -> float:
    """Memory that this process holds: on its GPU at most so far, or in RAM now."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def time_shares(seconds: dict[str, float], total: float) -> dict[str, float]:
    """Seconds of a step, and the shares of it that went to each kind of work; what is not timed is `other`."""
    shares = {name: seconds.get(name, 0.0) / total for name in ("generate", "reanswer", "decode", "loss")}
    return {
        "seconds": total,
        **{f"time_{name}": share for name, share in shares.items()},
        "time_other": max(0.0, 1.0 - sum(shares.values())),
    }


def to_prediction(episode: Episode) -> Prediction:
    """A rollout in the form that evaluation, MLflow and the viewer read."""
    row = {name: value for name, value in episode.row.items() if name not in ("prompt", PREVIEW_FRAMES)}
    return Prediction(
        **row,
        prediction=[without_pixels(message) for message in episode.messages],
        searched_seconds=episode.searched,
        predicted_answer=final_answer(episode.messages),
        reanswer=episode.reanswer,
        rewards=episode.scores,
        turns=sum(message["role"] == "assistant" for message in episode.messages),
        tool_calls=calls(episode.messages),
    )


def _note(values: dict[str, float]) -> str:
    parts = {"R": "reward", **{part.label: part.name for part in REWARDS}, "calls": "tool_calls"}
    shown = [f"{label} {values[name]:.2f}" for label, name in parts.items() if name in values]
    return ", ".join([*shown, f"{values['seconds']:.1f} s/step"])
