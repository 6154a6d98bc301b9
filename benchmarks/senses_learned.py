"""Which tool to take, learned: the world of senses by a policy that is trained, with all tools and without each.

    uv run python benchmarks/senses_learned.py [--out runs/senses] [--seeds 0 1 2] [--steps 40] [--workers 2]

From one base policy, for each seed a cold start that often takes the wrong tool, and GRPO-CSV. Both play held-out
questions that no choice of setting has seen (those about videos numbered below 2000 were for such choices), and the
trained policy plays them again without each tool. Every piece is kept in `--out`: a run that was stopped goes on. It
writes `table.md` and `metrics.json` there, and with `--docs FILE` the table between the marks ``<!-- senses -->`` and
``<!-- /senses -->`` of that file. The smallest try-out:

    uv run python benchmarks/senses_learned.py --out /tmp/senses --seeds 0 --steps 2 --train-videos 4 --heldout 4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning import carry_out, in_process, piece, play, write_between
from timesearch.base.files import write_json
from timesearch.data.messages import exchanges
from timesearch.data.rows import read_rows
from timesearch.data.samples import Prediction
from timesearch.pocket.dataset import write_samples
from timesearch.pocket.senses import TOOL_OF, WORLD
from timesearch.profiles import load_profile
from timesearch.settings import Settings

SEEK = "seek_video_frames"


@dataclass(frozen=True)
class Bench:
    """What is run."""

    out: Path
    seeds: tuple[int, ...]
    steps: int
    train_videos: int
    heldout: int
    first: int

    def settings(self, seed: int = 0, without: str | None = None) -> Settings:
        """The profile, with every path inside `out`."""
        settings = load_profile("senses")
        settings.seed = seed
        paths, run = settings.paths, self.out / f"seed-{seed}"
        paths.train_samples, paths.test_samples = self.out / "train.jsonl", self.out / "heldout.jsonl"
        paths.videos, paths.frames, paths.features = self.out / "videos", self.out / "frames", self.out / "features"
        paths.subtitles, paths.models = self.out / "subtitles", self.out / "models"
        paths.coldstart, paths.train = run / "coldstart", run / "train"
        paths.results = run / (f"results-without-{without}" if without else "results")
        settings.train.steps = self.steps
        settings.train.processes = 1
        settings.train.micro_batch = settings.train.prompts_per_step * settings.train.num_generations
        settings.tracking.uri = f"sqlite:///{(self.out / 'mlflow.db').absolute()}"
        if without:
            settings.infer.tools = [tool for tool in settings.search.tools if tool != without]
        return settings


def prepare(bench: Bench) -> None:
    """Encoder, base policy, questions, videos, subtitle indexes and caches."""
    from timesearch import models
    from timesearch.retrieval import features
    from timesearch.video import download, frames, subtitles

    settings = bench.settings()
    with piece(bench.out, "models") as todo:
        if todo:
            models.run(settings)
    with piece(bench.out, "caches") as todo:
        if not todo:
            return
        write_samples(settings.paths.train_samples, WORLD, "train", bench.train_videos)
        write_samples(settings.paths.test_samples, WORLD, "heldout", bench.heldout, bench.first)
        carry_out(settings, download, subtitles, frames, features)


def chain(bench: Bench, seed: int) -> None:
    """Cold start, training and all held-out episodes of one seed."""
    from timesearch.training import coldstart, launch

    here = f"seed-{seed}"
    with piece(bench.out, here, "coldstart") as todo:
        if todo:
            coldstart.run(bench.settings(seed))
    with piece(bench.out, here, "train") as todo:
        if todo:
            launch.run(bench.settings(seed))
    for method, without in plays():
        with piece(bench.out, here, f"episodes-{method}-{without or 'all'}") as todo:
            if todo:
                play(bench.settings(seed, without), method)


def plays() -> list[tuple[str, str | None]]:
    """What is played: a method, and the tool that it lacks."""
    return [("coldstart", None), ("grpo_csv", None), *(("grpo_csv", tool) for tool in TOOL_OF.values())]


def scores(bench: Bench, method: str, without: str | None, seed: int) -> dict[str, float]:
    """By kind of question the share of right answers, and over all the share of episodes whose first tool beside
    `seek_video_frames` is the right one, the share that is right again from the evidence alone, and calls."""
    file = bench.settings(seed, without).paths.results / "predictions" / f"{method}.jsonl"
    values: dict[str, list[float]] = {name: [] for name in (*TOOL_OF, "first", "again", "calls")}
    for _, row in read_rows(file):
        prediction = Prediction.model_validate(row)
        tools = [each.call.name for each in exchanges(prediction.prediction) if each.call is not None]
        special = [tool for tool in tools if tool != SEEK]
        values[str(prediction.meta["sense"])].append(float(prediction.predicted_answer == prediction.answer))
        values["first"].append(float(special[:1] == [prediction.meta["tool"]]))
        values["again"].append(float(prediction.reanswer == prediction.answer))
        values["calls"].append(float(len(tools)))
    return {name: float(np.mean(each)) for name, each in values.items()}


def table(bench: Bench, measured: dict[str, list[dict[str, float]]]) -> str:
    """Markdown."""

    def cell(rows: Sequence[dict[str, float]], name: str) -> str:
        scale, digits = (1, 1) if name == "calls" else (100, 0)
        each = [scale * row[name] for row in rows]
        return f"{np.mean(each):.{digits}f} ({min(each):.{digits}f} to {max(each):.{digits}f})"

    names: dict[str, str] = {**{sense: sense for sense in TOOL_OF}, "first": "right tool first", "again": "re-answer"}
    names["calls"] = "calls"
    lines = [
        f"{3 * bench.heldout} held-out questions about {bench.heldout} videos, {len(bench.seeds)} seeds, {bench.steps} "
        "steps. Right answers in per cent by what a question needs; mean over seeds (lowest to highest seed).",
        "",
        "| | " + " | ".join(names.values()) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for label, rows in measured.items():
        lines.append(f"| {label} | " + " | ".join(cell(rows, name) for name in names) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/senses"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40, help="of GRPO-CSV")
    parser.add_argument("--train-videos", type=int, default=60)
    parser.add_argument("--heldout", type=int, default=60, help="held-out videos, three questions each")
    parser.add_argument("--first", type=int, default=2000, help="first held-out video")
    parser.add_argument("--workers", type=int, default=2, help="seeds at the same time, a core each")
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the table")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    bench = Bench(given.out, tuple(given.seeds), given.steps, given.train_videos, given.heldout, given.first)
    if given.only is not None:
        chain(bench, given.only)
        return
    bench.out.mkdir(parents=True, exist_ok=True)
    prepare(bench)
    own = list(sys.argv[1:] if arguments is None else arguments)

    with ThreadPoolExecutor(given.workers) as pool:
        seeds = map(str, bench.seeds)
        list(pool.map(lambda seed: in_process(__file__, [*own, "--only", seed], bench.out, "senses", seed), seeds))
    labels = {"coldstart": "cold start", "grpo_csv": "GRPO-CSV"}
    measured: dict[str, Any] = {
        f"{labels[method]}, without {without}" if without else labels[method]: [
            scores(bench, method, without, seed) for seed in bench.seeds
        ]
        for method, without in plays()
    }
    text = table(bench, measured)
    write_json(bench.out / "metrics.json", measured)
    (bench.out / "table.md").write_text(text + "\n", encoding="utf-8")
    if given.docs:
        write_between(given.docs, "senses", text)
    print(text)


if __name__ == "__main__":
    main()
