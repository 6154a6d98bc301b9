"""Stage `evaluate`: prediction files to numbers.

Headline names, as in `metrics.json` (a mean over the episodes that have such a value, null where none has):

- ``temporal_precision|recall|f1`` within the first threshold, others as ``temporal_f1@2``; ``temporal_f1`` is the mean
  of the episodes' F1, as T* reports it, and ``temporal_f1_of_means`` the F1 of mean precision and mean recall.
- ``annd_precision|recall``: mean distances to the nearest neighbour in seconds, over episodes that searched.
- ``span_coverage``: share of the ground-truth spans that a searched frame lies in.
- ``visual_precision|recall|f1`` by standard SSIM, ``visual_tstar_...`` as T* computes it.
- ``qa_accuracy`` of multiple-choice and open-ended answers; ``qa_unparsed``: answers that name no option, or nothing,
  and so are wrong; ``grounding_iou`` of grounding answers.
- ``reanswer_accuracy`` of the answers from the searched frames alone, and ``completeness``, right both times.
- ``frames_mean``: searched frames an episode, each counted once; ``tool_calls_mean``; ``search_rate``: share of the
  episodes that searched.
- ``episodes`` scored, and ``errors``: those of them that ended in an error.

Results are a function of the files and the settings: the same bytes each time.
"""

from __future__ import annotations

import asyncio
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from timesearch.batch import BatchResult, Failure, write_failures
from timesearch.errors import RequestError
from timesearch.evaluation.episodes import EpisodeScore, Scorer, Videos, read_predictions
from timesearch.evaluation.statistics import bootstrap_means, mcnemar, paired_bootstrap, percentile_interval
from timesearch.evaluation.temporal import harmonic_mean
from timesearch.files import atomic_path, write_json, write_jsonl, write_text
from timesearch.judge.client import JudgeClient, RuleJudge, make_judge
from timesearch.progress import progress_bar
from timesearch.settings import Evaluate, Settings

MakeJudge = Callable[[], "JudgeClient | RuleJudge"]

METHODS = {
    "uniform": "uniform sampling",
    "one_shot": "one-shot retrieval",
    "base": "untrained policy",
    "coldstart": "cold start",
    "grpo": "GRPO",
    "grpo_csv": "GRPO-CSV",
}
"""Methods by file name, in the order of the table; other files follow under their own names."""

_MEANS = {
    "temporal_precision": "temporal_precision",
    "temporal_recall": "temporal_recall",
    "temporal_f1": "temporal_f1",
    "visual_precision": "visual_precision",
    "visual_recall": "visual_recall",
    "visual_f1": "visual_f1",
    "visual_tstar_precision": "visual_tstar_precision",
    "visual_tstar_recall": "visual_tstar_recall",
    "visual_tstar_f1": "visual_tstar_f1",
    "annd_precision": "annd_precision",
    "annd_recall": "annd_recall",
    "span_coverage": "span_coverage",
    "qa_accuracy": "qa_accuracy",
    "grounding_iou": "grounding_iou",
    "reanswer_accuracy": "reanswer_accuracy",
    "completeness": "completeness",
    "frames_mean": "frames",
    "preview_frames_mean": "preview_frames",
    "tool_calls_mean": "tool_calls",
    "turns_mean": "turns",
    "search_rate": "searched",
}
"""Headline name -> value of an episode that it is the mean of."""
_OF_MEANS = ("temporal", "visual", "visual_tstar")


@dataclass
class MethodScores:
    """All episodes of one prediction file, scored."""

    name: str
    path: Path
    episodes: list[EpisodeScore]
    failures: list[Failure]
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What the table calls the method."""
        return method_label(self.name)


def method_label(name: str) -> str:
    """The words for a method: `one_shot_topk` is one-shot retrieval (topk)."""
    if name in METHODS:
        return METHODS[name]
    for known in sorted(METHODS, key=len, reverse=True):
        if name.startswith(f"{known}_"):
            return f"{METHODS[known]} ({name.removeprefix(known)[1:].replace('_', ' ')})"
    return name


def method_order(name: str) -> tuple[int, str]:
    """Sort key: methods in the order of the table, variants beside theirs, then others by name."""
    known = [known for known in METHODS if name == known or name.startswith(f"{known}_")]
    return (list(METHODS).index(max(known, key=len)) if known else len(METHODS), name)


def evaluate_files(
    files: Mapping[str, Path],
    settings: Evaluate,
    videos: Path | str | None,
    make: MakeJudge = RuleJudge,
    seed: int = 0,
) -> list[MethodScores]:
    """Score prediction files.

    Args:
        files: prediction files by name of method.
        settings: thresholds, groups, and whether visual metrics are wanted.
        videos: folder of source videos, for visual metrics and frame rates; None does without.
        make: makes the judge of open-ended answers; called only if there are any.
        seed: of the bootstrap.

    Raises:
        RequestError: a file is missing.
    """
    folder = Videos(videos)
    methods = [_score_file(name, files[name], settings, folder) for name in sorted(files, key=method_order)]
    _judge(methods, make)
    if settings.visual and folder:
        _score_frames(methods, folder)
    for method in methods:
        method.metrics = _summary(method, settings, seed)
    return methods


def _score_file(name: str, path: Path, settings: Evaluate, videos: Videos) -> MethodScores:
    failures: list[Failure] = []
    scorer = Scorer(settings.thresholds, settings.groups, videos, failures.append)
    episodes = []
    with progress_bar(f"scoring {name}", None) as bar:
        for prediction in read_predictions(path, failures.append):
            episodes.append(scorer.score(prediction))
            bar.advance()
    if len(scorer.without_truth) < len(episodes):
        failures += [
            Failure(identity, "no_ground_truth", f"{identity}: no ground-truth time")
            for identity in scorer.without_truth
        ]
    return MethodScores(name, path, episodes, failures)


def _judge(methods: Sequence[MethodScores], make: MakeJudge) -> None:
    """Ask the judge about all open-ended answers at once, then derive completeness."""
    waiting = [
        (episode, metric, triple)
        for method in methods
        for episode in method.episodes
        for metric, triple in episode.judged.items()
    ]
    if waiting:
        verdicts = asyncio.run(make().score_many([triple for _, _, triple in waiting]))
        for (episode, metric, _), verdict in zip(waiting, verdicts, strict=True):
            episode.values[metric] = verdict
            episode.judged.clear()
    for method in methods:
        if not any("reanswer_accuracy" in episode.values for episode in method.episodes):
            continue
        for episode in method.episodes:
            if "qa_accuracy" in episode.values:
                again = episode.values.get("reanswer_accuracy", 0.0)
                episode.values["completeness"] = episode.values["qa_accuracy"] * again


def _score_frames(methods: Sequence[MethodScores], videos: Videos) -> None:
    """Visual metrics, video by video: each frame that any method needs is decoded once, each pair compared once."""
    from timesearch.evaluation.frames import score_videos

    jobs: dict[str, list[tuple[MethodScores, EpisodeScore]]] = {}
    for method in methods:
        for episode in method.episodes:
            if episode.truth and episode.times:
                jobs.setdefault(episode.video, []).append((method, episode))
            elif episode.truth:
                for mode in ("visual", "visual_tstar"):
                    episode.values |= dict.fromkeys((f"{mode}_precision", f"{mode}_recall", f"{mode}_f1"), 0.0)
    score_videos(jobs, videos)


def _matrix(episodes: Sequence[EpisodeScore], names: Iterable[str]) -> np.ndarray:
    return np.array([[episode.values.get(name, np.nan) for name in names] for episode in episodes], dtype=np.float64)


def _summary(method: MethodScores, settings: Evaluate, seed: int) -> dict[str, Any]:
    thresholds = [
        f"temporal_{part}@{threshold:g}"
        for threshold in settings.thresholds[1:]
        for part in ("precision", "recall", "f1")
    ]
    means = {**_MEANS, **{name: name for name in thresholds}}
    metrics = _block(method.episodes, means, settings.bootstrap, seed)
    metrics["failures"] = dict(sorted(Counter(failure.reason for failure in method.failures).items()))
    by: dict[str, dict[str, Any]] = {}
    for name in ("type", *settings.groups):
        members: dict[str, list[EpisodeScore]] = {}
        for episode in method.episodes:
            for value in episode.groups.get(name, []):
                members.setdefault(value, []).append(episode)
        if members:
            by[name] = {
                value: _block(members[value], means, settings.bootstrap, seed)
                for value in sorted(members, key=_natural)
            }
    return {**metrics, "by": by}


def _natural(value: str) -> tuple[int, float, str]:
    try:
        return (0, float(value), value)
    except ValueError:
        return (1, 0.0, value)


def _block(episodes: Sequence[EpisodeScore], means: Mapping[str, str], resamples: int, seed: int) -> dict[str, Any]:
    """Headline numbers of some episodes and their intervals."""
    values = _matrix(episodes, means.values()) if episodes else np.empty((0, len(means)))
    numbers = dict(zip(means, _column_means(values), strict=True))
    metrics: dict[str, Any] = {name: _plain(number) for name, number in numbers.items()}
    for kind in _OF_MEANS:
        precision, recall = metrics[f"{kind}_precision"], metrics[f"{kind}_recall"]
        metrics[f"{kind}_f1_of_means"] = None if precision is None else _plain(harmonic_mean(precision, recall))
    metrics["qa_episodes"] = sum("qa_accuracy" in episode.values for episode in episodes)
    metrics["qa_unparsed"] = sum(episode.unparsed for episode in episodes)
    metrics["temporal_episodes"] = sum("temporal_f1" in episode.values for episode in episodes)
    metrics["visual_episodes"] = sum("visual_f1" in episode.values for episode in episodes)
    metrics["episodes"] = len(episodes)
    metrics["errors"] = int(sum(episode.values.get("error", 0.0) for episode in episodes))
    if resamples and episodes:
        draws = bootstrap_means(values, resamples, seed)
        intervals = {name: percentile_interval(draws[:, column]) for column, name in enumerate(means)}
        metrics["intervals"] = {
            name: [round(low_high[0], 6), round(low_high[1], 6)] for name, low_high in intervals.items() if low_high
        }
    return metrics


def _column_means(values: np.ndarray) -> list[float]:
    present = ~np.isnan(values)
    counts = present.sum(axis=0)
    sums = np.where(present, values, 0.0).sum(axis=0)
    return [float(total / count) if count else float("nan") for total, count in zip(sums, counts, strict=True)]


def _plain(number: float) -> float | None:
    """A number for JSON: 12 digits are more than any computer differs in."""
    return None if np.isnan(number) else float(f"{number:.12g}")


def compare(methods: Sequence[MethodScores], settings: Evaluate, seed: int) -> list[dict[str, Any]]:
    """Each pair of methods on the episodes that both have: McNemar for accuracy, paired bootstrap for temporal F1."""
    comparisons = []
    for a, b in combinations(methods, 2):
        others = {episode.id: episode for episode in b.episodes}
        pairs = [(episode, others[episode.id]) for episode in a.episodes if episode.id in others]
        entry: dict[str, Any] = {"a": a.name, "b": b.name, "episodes": len(pairs)}
        right = _paired(pairs, "qa_accuracy")
        if len(right):
            test = mcnemar(list(right[:, 0] > 0.5), list(right[:, 1] > 0.5))
            entry["qa_accuracy"] = {
                "difference": _plain(float((right[:, 1] - right[:, 0]).mean())),
                "only_a": test["only_a"],
                "only_b": test["only_b"],
                "p_value": _plain(test["p_value"]),
            }
        for name in ("temporal_f1", "visual_f1"):
            values = _paired(pairs, name)
            if len(values) and settings.bootstrap:
                test = paired_bootstrap(values[:, 0], values[:, 1], settings.bootstrap, seed)
                entry[name] = {key: _plain(round(value, 9)) for key, value in test.items()}
        comparisons.append(entry)
    return comparisons


def _paired(pairs: Sequence[tuple[EpisodeScore, EpisodeScore]], name: str) -> np.ndarray:
    both = [(a.values[name], b.values[name]) for a, b in pairs if name in a.values and name in b.values]
    return np.array(both, dtype=np.float64).reshape(-1, 2)


def headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a method without its groups and intervals, for a table or `dvc metrics show`."""
    return {name: value for name, value in metrics.items() if not isinstance(value, (dict, list))}


def write_evaluation(
    methods: Sequence[MethodScores], out: Path, settings: Evaluate, seed: int, *, single: bool = False
) -> BatchResult:
    """Write what was found.

    `out` gets ``metrics.json`` (of a `single` file everything; else one block of headline numbers a method),
    ``table.md`` and ``plots/``; ``out/evaluation`` gets each method's whole metrics, each episode's scores, the
    unparsed answers, the paired comparisons and ``failures.jsonl`` (for a `single` file, all that lies in `out`).
    """
    detail = out if single else out / "evaluation"
    if single:
        write_json(out / "metrics.json", methods[0].metrics)
    else:
        write_json(out / "metrics.json", {method.name: headline(method.metrics) for method in methods})
        for method in methods:
            write_json(detail / f"{method.name}.json", method.metrics)
        write_json(detail / "comparisons.json", compare(methods, settings, seed))
    for method in methods:
        write_jsonl(detail / "episodes" / f"{method.name}.jsonl", map(episode_row, method.episodes))
    unparsed = [
        {"method": method.name, "id": episode.id, "answer": episode.answer}
        for method in methods
        for episode in method.episodes
        if episode.unparsed
    ]
    write_jsonl(detail / "unparsed.jsonl", unparsed)
    failures = [
        failure if single else Failure(f"{method.name}/{failure.item}", failure.reason, failure.message)
        for method in methods
        for failure in method.failures
    ]
    write_failures(detail / "failures.jsonl", failures)
    write_text(out / "table.md", markdown_table(methods))
    for name, (columns, rows) in plot_data(methods).items():
        _write_csv(out / "plots" / f"{name}.csv", columns, rows)
    done = [episode.id for method in methods for episode in method.episodes]
    return BatchResult(done=done, failures=failures)


def episode_row(episode: EpisodeScore) -> dict[str, Any]:
    """An episode's scores as one JSON line."""
    return {
        "id": episode.id,
        "video": episode.video,
        "type": episode.type,
        "groups": episode.groups,
        "answer": episode.answer,
        "choice": episode.choice,
        "unparsed": episode.unparsed,
        **{name: _plain(value) for name, value in episode.values.items()},
    }


_COLUMNS = (
    ("temporal P", "temporal_precision", 100),
    ("temporal R", "temporal_recall", 100),
    ("temporal F1", "temporal_f1", 100),
    ("visual F1", "visual_f1", 100),
    ("QA accuracy", "qa_accuracy", 100),
    ("frames seen", "frames_mean", 1),
    ("tool calls", "tool_calls_mean", 1),
)


def table_rows(methods: Sequence[MethodScores], intervals: bool = True) -> list[list[str]]:
    """The comparison table as text: shares in per cent, with half the width of their 95% interval."""
    rows = []
    for method in methods:
        cells = [method.label]
        for _, name, scale in _COLUMNS:
            value = method.metrics[name]
            low_high = method.metrics.get("intervals", {}).get(name) if intervals else None
            text = "–" if value is None else f"{value * scale:.1f}"
            if value is not None and low_high:
                text += f" ± {(low_high[1] - low_high[0]) * scale / 2:.1f}"
            cells.append(text)
        rows.append(cells)
    return rows


def markdown_table(methods: Sequence[MethodScores]) -> str:
    """The comparison table in Markdown."""
    heads = ["method", *(column for column, _, _ in _COLUMNS)]
    lines = [heads, ["---", *["---:"] * len(_COLUMNS)], *table_rows(methods)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def print_table(methods: Sequence[MethodScores]) -> None:
    """Show the comparison table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Shares in per cent, ± half a 95% interval")
    table.add_column("method")
    for column, _, _ in _COLUMNS:
        table.add_column(column, justify="right")
    for row in table_rows(methods):
        table.add_row(*row)
    Console().print(table)


LENGTH_BINS = ((60, "up to 1 min"), (600, "1 to 10 min"), (1800, "10 to 30 min"), (float("inf"), "over 30 min"))
FRAME_BINS = ((0, "0"), (4, "1–4"), (8, "5–8"), (16, "9–16"), (32, "17–32"), (float("inf"), "over 32"))


def plot_data(methods: Sequence[MethodScores]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Columns and rows of each plot: F1 by frames used, accuracy by video length, tool calls by turn."""
    frames: list[list[Any]] = []
    lengths: list[list[Any]] = []
    turns: list[list[Any]] = []
    for method in methods:
        for label, members in _binned(method.episodes, FRAME_BINS, lambda episode: episode.values["frames"]):
            values = [e.values["temporal_f1"] for e in members if "temporal_f1" in e.values]
            if values:
                frames.append([method.name, label, _plain(sum(values) / len(values)), len(values)])
        for label, members in _binned(method.episodes, LENGTH_BINS, lambda episode: episode.duration):
            values = [e.values["qa_accuracy"] for e in members if "qa_accuracy" in e.values]
            if values:
                lengths.append([method.name, label, _plain(sum(values) / len(values)), len(values)])
        longest = max((len(episode.calls_by_turn) for episode in method.episodes), default=0)
        for turn in range(longest):
            calls = [episode.calls_by_turn[turn] for episode in method.episodes if turn < len(episode.calls_by_turn)]
            turns.append([method.name, turn + 1, _plain(sum(calls) / len(method.episodes)), len(calls)])
    return {
        "f1_by_frames": (["method", "frames", "temporal_f1", "episodes"], frames),
        "accuracy_by_length": (["method", "length", "qa_accuracy", "episodes"], lengths),
        "tool_calls_by_turn": (["method", "turn", "tool_calls", "episodes"], turns),
    }


def _binned(
    episodes: Sequence[EpisodeScore],
    bins: Sequence[tuple[float, str]],
    value: Callable[[EpisodeScore], float | None],
) -> list[tuple[str, list[EpisodeScore]]]:
    members: dict[str, list[EpisodeScore]] = {label: [] for _, label in bins}
    for episode in episodes:
        number = value(episode)
        if number is not None:
            members[next(label for top, label in bins if number <= top)].append(episode)
    return [(label, found) for label, found in members.items() if found]


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def prediction_files(folder: Path) -> dict[str, Path]:
    """Prediction files of a folder by method.

    Raises:
        RequestError: there is none.
    """
    files = {path.stem: path for path in sorted(folder.glob("*.jsonl")) if path.stem != "failures"}
    if not files:
        raise RequestError(f"{folder} holds no prediction files: run `timesearch infer` first, or name one")
    return files


def run(settings: Settings) -> BatchResult:
    """Stage `evaluate`: score `results/predictions/*.jsonl`, write results and the report, and print the table.

    Raises:
        RequestError: there are no predictions.
    """
    from timesearch.tracking import stage_run

    results = settings.paths.results
    files = prediction_files(results / "predictions")
    with stage_run(settings, "evaluate") as record:
        methods = evaluate_files(
            files, settings.evaluate, settings.paths.videos, lambda: make_judge(settings.judge), settings.seed
        )
        outcome = write_evaluation(methods, results, settings.evaluate, settings.seed)
        for method in methods:
            numbers = {name: value for name, value in headline(method.metrics).items() if value is not None}
            record.log_metrics({f"{method.name}/{name}".replace("@", "_at_"): value for name, value in numbers.items()})
        for path in (results / "metrics.json", results / "table.md", results / "evaluation", results / "plots"):
            record.log_artifact(path, path.name if path.is_dir() else None)
    print_table(methods)
    return outcome


def load_metrics(path: Path) -> dict[str, Any]:
    """Metrics that an evaluation wrote.

    Raises:
        RequestError: there are none.
    """
    if not path.is_file():
        raise RequestError(f"{path} does not exist: run `timesearch evaluate` first")
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded
