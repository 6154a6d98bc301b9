"""The paper's ablation at pocket size: what completeness self-verification changes, over seeds and three worlds.

    uv run python benchmarks/learning.py [--out runs/learning] [--seeds 0 1 2] [--steps 20] [--workers 2]

In the *hops* world a question takes one to three searches, each of which says what to look for next; its trainings
take twice the steps. In the
*guess-proof* world one search answers, and every answer is equally likely, so that only search pays. In the *guessable*
world the commonest answer is nearly always right, so that guessing pays, and with plain GRPO searching is unlearned.
From one cold start a seed, the policy is trained by GRPO (format and accuracy) and by GRPO-CSV (and completeness), and
in the guessable world by GRPO with what others propose against tool use that dies, with equal steps and settings; where
that is to call the tool twice in one turn, the cold start is another one, which shows how. All are scored on held-out
videos that no choice of setting has seen; those numbered below 4000 were for such choices.

Every piece (caches, cold start, training, episodes) is kept in `--out`: a run that was stopped goes on, and more seeds
or methods cost only themselves. It writes `table.md`, `curves.png` and `metrics.json` there, and with `--docs FILE` the
table between the marks ``<!-- learning -->`` and ``<!-- /learning -->`` of that file. The smallest try-out:

    uv run python benchmarks/learning.py --out /tmp/learning --seeds 0 --steps 2 --coldstart-steps 2 \
        --train-videos 4 --heldout 6
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.console import Console

from timesearch.base.files import write_json, write_jsonl
from timesearch.pocket.filesystem import scene_of
from timesearch.profiles import load_profile
from timesearch.settings import Settings

HOPS, GUESSABLE = "hops", "guessable"
WORLDS = (HOPS, "guess-proof", GUESSABLE)
METHODS = {"base": "search prompt, untrained", "coldstart": "cold start", "grpo": "GRPO", "grpo_csv": "GRPO-CSV"}
CHOSEN = {"uniform": "uniform sampling", "one_shot": "one-shot retrieval", "oracle": "oracle frames"}
"""Methods without search, of the hop world alone: they say what planning a search is worth."""
CURES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo_bonus": ("GRPO, +0.1 a call", {"rewards": {"calls": 0.1}}),
    "grpo_cost": ("GRPO, -0.05 a call", {"rewards": {"calls": -0.05}}),
    "grpo_marks": ("GRPO, format at the marks", {"format_tokens": "marks"}),
    "grpo_preview": ("GRPO, preview of chance", {"random_preview": True}),
    "grpo_parallel": ("GRPO, two calls a turn", {}),
}
"""What others propose where tool use dies in training, each a switch of the trainer, or another cold start
(`coldstart_of`): of the guessable world, where it does."""
COLUMNS = {
    "qa_accuracy": "accuracy",
    "temporal_f1": "temporal F1 (2 s)",
    "completeness": "completeness",
    "searched": "episodes with search",
    "tool_calls": "calls",
    "frames": "frames",
}
HOP_COLUMNS = {
    "qa_accuracy": "accuracy",
    **{f"qa_accuracy/{hops}": f"{hops} hop{'s' * (hops > 1)}" for hops in (1, 2, 3)},
    "several": "2 and 3 hops",
    "several_knowable": "at most",
    "verified": "re-answer where found",
    "temporal_f1": "temporal F1 (2 s)",
    "completeness": "completeness",
    "tool_calls": "calls",
    "frames": "frames",
}
"""*at most*: the ceiling of the accuracy on 2 and 3 hops of one who sees the same frames; *re-answer where found*: how
often the answer from the frames alone is right of the episodes whose frames show every hop."""
SHARES = ("qa_accuracy", "temporal_f1", "completeness", "searched")
COUNTS = ("tool_calls", "frames")
COLOURS = {
    "grpo": "tab:orange",
    "grpo_csv": "tab:blue",
    "grpo_bonus": "tab:green",
    "grpo_cost": "tab:red",
    "grpo_marks": "tab:purple",
    "grpo_preview": "tab:brown",
    "grpo_parallel": "tab:pink",
}
"""Of the curves of trainings."""
RESAMPLES = 2000
console = Console(stderr=True)


@dataclass(frozen=True)
class Bench:
    """What is run."""

    out: Path
    worlds: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    coldstart_steps: int
    train_videos: int
    heldout: int
    first: int
    temperature: float
    chosen: tuple[str, ...] = (*METHODS, *CURES)
    """methods that search"""

    @staticmethod
    def profile(world: str) -> str:
        """The profile of a world."""
        return "hops" if world == HOPS else "pocket"

    def methods(self, world: str) -> dict[str, str]:
        """What is compared in a world, with its words."""
        cures = {name: label for name, (label, _) in CURES.items()} if world == GUESSABLE else {}
        searching = {name: label for name, label in {**METHODS, **cures}.items() if name in self.chosen}
        return {**CHOSEN, **searching} if world == HOPS else searching

    def steps_of(self, world: str) -> int:
        """Steps of a training."""
        return self.steps * (2 if world == HOPS else 1)

    def settings(self, world: str, seed: int = 0, method: str = "grpo_csv") -> Settings:
        """The world's profile, with every path inside `out`."""
        settings = load_profile(self.profile(world))
        root, run = self.out / world, self.out / world / f"seed-{seed}"
        settings.seed = seed
        paths = settings.paths
        paths.train_samples, paths.test_samples = root / "train.jsonl", root / "heldout.jsonl"
        paths.videos, paths.frames, paths.features = root / "videos", root / "frames", root / "features"
        paths.models = self.out / f"models-{self.profile(world)}"
        paths.coldstart, paths.train = run / coldstart_of(method), run / method
        paths.results = run / (f"results-{method}" if method in CURES else "results")
        if world != HOPS:
            settings.coldstart.steps = self.coldstart_steps
        settings.train.steps = self.steps_of(world)
        settings.train.processes = 1
        settings.train.micro_batch = settings.train.prompts_per_step * settings.train.num_generations
        if method != "grpo_csv":
            settings.train.rewards["completeness"] = 0.0
        if method in CURES:
            changes = CURES[method][1]
            rewards = settings.train.rewards | changes.get("rewards", {})
            settings.train = settings.train.model_copy(update=changes | {"rewards": rewards})
        settings.infer.temperature = self.temperature
        settings.tracking.uri = f"sqlite:///{(self.out / 'mlflow.db').absolute()}"
        settings.tracking.traced_episodes = 2
        return settings


@contextmanager
def piece(out: Path, *name: str) -> Iterator[bool]:
    """Yield whether the piece is still to do; its seconds are written down once it is done."""
    mark = out.joinpath(*name[:-1], f"{name[-1]}.done.json")
    if mark.is_file():
        yield False
        return
    started = time.monotonic()
    yield True
    write_json(mark, {"seconds": round(time.monotonic() - started, 1)})
    console.print(f"{'/'.join(name)}: {time.monotonic() - started:.0f} s")


def carry_out(settings: Settings, *stages: Any) -> None:
    """Run stages over a batch of items, all of which have to succeed."""
    for stage in stages:
        result = stage.run(settings)
        if result.failures:
            raise SystemExit(f"{stage.__name__}: {result.failures[0].message}")


def play(settings: Settings, method: str) -> None:
    """Play the held-out episodes of a method, all of which have to succeed."""
    from timesearch.inference import infer

    result = infer.run(settings, [method])
    if result.failures:
        raise SystemExit(f"{method}: {result.failures[0].message}")


def prepare(bench: Bench) -> None:
    """Encoder and base policy, and for each world the questions, videos and caches."""
    from timesearch.models import run
    from timesearch.pocket.dataset import samples_of

    for world in bench.worlds:
        settings = bench.settings(world)
        with piece(bench.out, settings.paths.models.name) as todo:
            if todo:
                run(settings)
        with piece(bench.out, world, "caches") as todo:
            if not todo:
                continue
            train = [
                sample
                for number in range(bench.train_videos)
                for sample in samples_of(scene_of(world, "train", number))
            ]
            asked = [samples_of(scene_of(world, "heldout", bench.first + number)) for number in range(bench.heldout)]
            heldout = [samples[number % len(samples)] for number, samples in enumerate(asked)]
            for path, samples in ((settings.paths.train_samples, train), (settings.paths.test_samples, heldout)):
                write_jsonl(path, [sample.model_dump(mode="json", exclude_defaults=True) for sample in samples])
            from timesearch.retrieval import features
            from timesearch.video import download, frames

            carry_out(settings, download, frames, features)


def chain(bench: Bench, world: str, seed: int) -> None:
    """Cold start, both trainings and all held-out episodes of one world and seed."""
    from timesearch.training import coldstart, launch

    here = (world, f"seed-{seed}")
    trained = [method for method in bench.methods(world) if method.startswith("grpo")]
    for method in ("coldstart", *trained):
        name = coldstart_of(method)
        with piece(bench.out, *here, name) as todo:
            if todo:
                with manners(world, name):
                    coldstart.run(bench.settings(world, seed, method))
    for method in trained:
        with piece(bench.out, *here, method) as todo:
            if todo:
                launch.run(bench.settings(world, seed, method))
    for method in bench.methods(world):
        with piece(bench.out, *here, f"episodes-{method}") as todo:
            if todo:
                settings = bench.settings(world, seed, method if method in trained else "grpo_csv")
                play(settings, played_as(method))


def coldstart_of(method: str) -> str:
    """The name of the cold start that a method begins with."""
    return "coldstart-halves" if method == "grpo_parallel" else "coldstart"


@contextmanager
def manners(world: str, name: str) -> Iterator[None]:
    """The manners of a world's cold start; where it is to, it searches both halves of a video in one turn."""
    from timesearch.pocket.traces import COLD_STARTS

    if name == "coldstart":
        yield
        return
    both = {shape: replace(habits, halves=True) for shape, habits in COLD_STARTS[world].items()}
    with patch.dict(COLD_STARTS, {world: both}):
        yield


def played_as(method: str) -> str:
    """The name by which `infer` plays a method, and writes its predictions."""
    return "grpo" if method in CURES else method


def score(bench: Bench, world: str) -> dict[str, np.ndarray]:
    """Values of each method's episodes: shape (seeds, questions, columns); NaN where an episode has no such value."""
    from timesearch.evaluation.scoring import evaluate_files
    from timesearch.settings import Evaluate

    scores: dict[str, np.ndarray] = {}
    settings = Evaluate(thresholds=[2.0], visual=False, bootstrap=0, groups=["hops"])
    for method in bench.methods(world):
        by_seed = []
        for seed in bench.seeds:
            results = bench.settings(world, seed, method).paths.results
            file = results / "predictions" / f"{played_as(method)}.jsonl"
            (scored,) = evaluate_files({method: file}, settings, None)
            by_seed.append([values_of(episode, columns(world)) for episode in scored.episodes])
        scores[method] = np.array(by_seed)
    return scores


def columns(world: str) -> dict[str, str]:
    """What is told of a world's episodes, with its words."""
    return HOP_COLUMNS if world == HOPS else COLUMNS


def values_of(episode: Any, names: Iterable[str]) -> list[float]:
    """The numbers of one episode."""
    values = {name: episode.values.get(name, 0.0) for name in COLUMNS}
    right, knowable = values["qa_accuracy"], episode.values.get("knowable", 0.0)
    for hops in episode.groups.get("hops", []):
        values[f"qa_accuracy/{hops}"] = right
        if hops != "1":
            values |= {"several": right, "several_knowable": knowable}
    if knowable > 0.99 and "reanswer_accuracy" in episode.values:
        values["verified"] = episode.values["reanswer_accuracy"]
    return [values.get(name, math.nan) for name in names]


def summarise(values: np.ndarray, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Mean over seeds and questions, range of the seeds' means, and a 95% interval from resampled questions.

    Columns in which no episode has a value are left out.
    """
    rng = np.random.default_rng(0)
    summary = {}
    for column, name in enumerate(names):
        told = values[:, :, column]
        told = told[:, ~np.isnan(told).all(axis=0)]
        if told.size:
            questions = np.nanmean(told, axis=0)
            draws = rng.integers(len(questions), size=(RESAMPLES, len(questions)))
            low, high = np.quantile(questions[draws].mean(axis=1), [0.025, 0.975])
            seeds = [float(value) for value in np.nanmean(told, axis=1)]
            interval = [float(low), float(high)]
            summary[name] = {"mean": float(questions.mean()), "seeds": seeds, "interval": interval}
    return summary


def table(bench: Bench, summary: dict[str, Any], hours: float) -> str:
    """Markdown: a table for each world, and the comparisons that the ablation is about."""
    steps = " or ".join(str(each) for each in sorted({bench.steps_of(world) for world in bench.worlds}))
    lines = [
        f"{bench.heldout} held-out videos, {len(bench.seeds)} seeds, {steps} steps of "
        f"{load_profile('pocket').train.prompts_per_step} questions x {load_profile('pocket').train.num_generations} "
        f"episodes, temperature {bench.temperature:g} in evaluation, {hours:.1f} hours of computing. Mean over seeds "
        "(lowest to highest seed)."
    ]
    for world in bench.worlds:
        lines += ["", f"**{world}**", "", "| method | " + " | ".join(columns(world).values()) + " |"]
        lines.append("| --- |" + " ---: |" * len(columns(world)))
        for method, label in bench.methods(world).items():
            cells = []
            for name in columns(world):
                value = summary[world][method].get(name)
                if value is None:
                    cells.append("–")
                    continue
                scale, digits = (1, 1) if name in COUNTS else (100, 0)
                mean, *ends = (
                    f"{scale * x:.{digits}f}" for x in (value["mean"], min(value["seeds"]), max(value["seeds"]))
                )
                cells.append(f"{mean} ({ends[0]} to {ends[1]})")
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *comparisons(summary)])


def comparisons(summary: dict[str, Any]) -> Iterator[str]:
    """Differences in points, with 95% intervals of both sides."""

    def line(world: str, name: str, a: str, b: str) -> str:
        first, second = summary[world][a][name], summary[world][b][name]
        apart = first["interval"][0] > second["interval"][1] or second["interval"][0] > first["interval"][1]
        words = {**CHOSEN, **METHODS, **{cure: label for cure, (label, _) in CURES.items()}}
        ends = [f"{100 * low:.0f} to {100 * high:.0f}" for low, high in (first["interval"], second["interval"])]
        return (
            f"- {world}, {columns(world)[name]}: {words[a]} {100 * (first['mean'] - second['mean']):+.0f} points "
            f"against {words[b]} (95% intervals {ends[0]} and {ends[1]}, {'apart' if apart else 'overlapping'})"
        )

    pairs = [(HOPS, "grpo_csv", other) for other in ("coldstart", "one_shot", "grpo")]
    pairs += [("guess-proof", "grpo_csv", "coldstart"), (GUESSABLE, "grpo_csv", "grpo")]
    pairs += [(GUESSABLE, cure, "grpo") for cure in CURES]
    for world, a, b in pairs:
        if world in summary and {a, b} <= summary[world].keys():
            names = ("several", "completeness") if world == HOPS else SHARES
            yield from (line(world, name, a, b) for name in names if name in summary[world][b])


def draw_curves(bench: Bench, path: Path) -> None:
    """Training curves: mean over seeds, and the range of the seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"search_rate": "episodes with search", "accuracy": "accuracy", "completeness": "completeness"}
    figure, axes = plt.subplots(len(bench.worlds), len(panels), figsize=(11, 3 * len(bench.worlds)), squeeze=False)
    for row, world in enumerate(bench.worlds):
        for column, (name, label) in enumerate(panels.items()):
            axis = axes[row][column]
            for method, words in bench.methods(world).items():
                folders = [bench.settings(world, seed, method).paths.train for seed in bench.seeds]
                runs = [_curve(folder, name) for folder in folders] if method in COLOURS else []
                if not runs or not all(runs):
                    continue
                colour = COLOURS[method]
                values = _smooth(np.array(runs))
                steps = np.arange(1, values.shape[1] + 1)
                axis.plot(steps, values.mean(axis=0), color=colour, label=words)
                axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
            axis.set(title=f"{world}: {label}", xlabel="step", ylim=(-0.02, 1.02))
            axis.grid(alpha=0.3)
        axes[row][1].legend(fontsize=8, loc="lower right")  # where no curve of accuracy goes
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curve(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row[name] for row in rows] if name in rows[0] else []


def _smooth(runs: np.ndarray, width: int = 3) -> np.ndarray:
    """Running mean over `width` steps; shape is kept."""
    padded = np.pad(runs, ((0, 0), (width // 2, width // 2)), mode="edge")
    return np.stack([padded[:, i : i + runs.shape[1]] for i in range(width)]).mean(axis=0)


def write_between(docs: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of a name in a Markdown file: ``<!-- name -->`` and ``<!-- /name -->``."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = docs.read_text(encoding="utf-8")
    if first not in old or last not in old:
        raise SystemExit(f"{docs} has no marks {first} and {last}")
    head, tail = old.split(first, 1)[0], old.split(last, 1)[1]
    docs.write_text(f"{head}{first}\n{text}\n{last}{tail}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then score and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    searching = (*METHODS, *CURES)
    parser.add_argument("--methods", nargs="+", choices=searching, default=searching, help="of those that search")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20, help="of a training; twice as many in the hop world")
    parser.add_argument("--coldstart-steps", type=int, default=100, help="where one search answers")
    parser.add_argument("--train-videos", type=int, default=100)
    parser.add_argument("--heldout", type=int, default=300, help="held-out videos, one question each")
    parser.add_argument("--first", type=int, default=4000, help="first held-out video")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the held-out episodes")
    parser.add_argument("--workers", type=int, default=2, help="worlds and seeds at the same time, a core each")
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the table, and learning.png beside it")
    parser.add_argument("--only", nargs=2, metavar=("WORLD", "SEED"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    bench = Bench(
        given.out,
        tuple(given.worlds),
        tuple(given.seeds),
        given.steps,
        given.coldstart_steps,
        given.train_videos,
        given.heldout,
        given.first,
        given.temperature,
        tuple(given.methods),
    )
    if given.only:
        chain(bench, given.only[0], int(given.only[1]))
        return
    bench.out.mkdir(parents=True, exist_ok=True)
    prepare(bench)
    own = list(sys.argv[1:] if arguments is None else arguments)
    todo = [(world, str(seed)) for seed in bench.seeds for world in bench.worlds]
    with ThreadPoolExecutor(given.workers) as pool:
        list(pool.map(lambda pair: in_process(__file__, [*own, "--only", *pair], bench.out, *pair), todo))
    summary = {
        world: {method: summarise(values, columns(world)) for method, values in score(bench, world).items()}
        for world in bench.worlds
    }
    seconds = sum(json.loads(mark.read_text())["seconds"] for mark in bench.out.rglob("*.done.json"))
    text = table(bench, summary, seconds / 3600)
    write_json(bench.out / "metrics.json", summary)
    (bench.out / "table.md").write_text(text + "\n", encoding="utf-8")
    draw_curves(bench, bench.out / "curves.png")
    if given.docs:
        write_between(given.docs, "learning", text)
        draw_curves(bench, given.docs.with_name("learning.png"))
    print(text)


def in_process(script: str, arguments: Sequence[str], out: Path, *name: str) -> None:
    """One chain in a process of its own, its output in a log."""
    log = out / f"{'-'.join(name)}.log"
    with log.open("ab") as handle:
        code = subprocess.run(
            [sys.executable, script, *arguments], stdout=handle, stderr=handle, check=False
        ).returncode
    if code:
        raise SystemExit(f"{' seed '.join(name)} ended with exit code {code}: see {log}; the same command goes on")
    console.print(f"{' seed '.join(name)}: done")


if __name__ == "__main__":
    main()
