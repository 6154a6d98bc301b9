"""From episodes' scores to numbers: means, intervals, groups, paired comparisons, plots.

Headline names, as in `metrics.json` (a mean over the episodes that have such a value, null where none has):

- ``temporal_precision|recall|f1`` within the first threshold, others as ``temporal_f1@2``; ``temporal_f1`` is the mean
  of the episodes' F1, as T* reports it, and ``temporal_f1_of_means`` the F1 of mean precision and mean recall. An
  episode that searched nothing counts as 0. ``temporal_tstar_precision|recall|f1`` leave such episodes out, as T* does.
- ``annd_precision|recall``: mean distances to the nearest neighbour in seconds, over episodes that searched.
- ``span_coverage``: share of the ground-truth spans that a searched frame lies in.
- ``visual_precision|recall|f1`` by standard SSIM, ``visual_tstar_...`` as T* computes it.
- ``qa_strict`` and ``qa_published`` of multiple-choice answers: read by `parse_choice`, an answer that names no option
  being wrong, or as the benchmark's script reads them, where that one draws a letter by the chance that it is right;
  ``qa_differ``: answers that the two read as different letters. `evaluate.qa` says which of them is in
- ``qa_accuracy`` of multiple-choice and open-ended answers; ``qa_unparsed``: answers that name no option, or nothing,
  and so are wrong; ``grounding_iou`` of grounding answers.
- ``knowable``, of the pocket's hop world alone: what the accuracy can be at most for one who sees the episode's frames
  (`timesearch.pocket.ceiling`).
- ``reanswer_accuracy`` of the answers from the searched frames alone, and ``completeness``, right both times.
- ``frames_mean``: searched frames an episode, each counted once; ``tool_calls_mean``; ``search_rate``: share of the
  episodes that found a frame or words; ``tools``: the use of each (`timesearch.evaluation.tools`).
- ``episodes`` scored, and ``errors``: those of them that ended in an error.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from timesearch.base.batch import Failure
from timesearch.evaluation.episodes import EpisodeScore, MethodScores
from timesearch.evaluation.statistics import Rows, bootstrap_means, mcnemar, paired_bootstrap, percentile_interval
from timesearch.evaluation.temporal import harmonic_mean
from timesearch.settings import Evaluate

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
    "temporal_tstar_precision": "temporal_tstar_precision",
    "temporal_tstar_recall": "temporal_tstar_recall",
    "temporal_tstar_f1": "temporal_tstar_f1",
    "qa_accuracy": "qa_accuracy",
    "qa_strict": "qa_strict",
    "qa_published": "qa_published",
    "grounding_iou": "grounding_iou",
    "knowable": "knowable",
    "reanswer_accuracy": "reanswer_accuracy",
    "completeness": "completeness",
    "frames_mean": "frames",
    "preview_frames_mean": "preview_frames",
    "tool_calls_mean": "tool_calls",
    "turns_mean": "turns",
    "search_rate": "searched",
}
"""Headline name -> value of an episode that it is the mean of."""
_MOST_GROUPS = 500
"""Values of a group, of which each has its numbers and intervals."""
_OF_MEANS = ("temporal", "temporal_tstar", "visual", "visual_tstar")


def summarise(method: MethodScores, settings: Evaluate, seed: int) -> dict[str, Any]:
    """All numbers of a method: headline, intervals, counts of problems, and the same by group."""
    thresholds = [
        f"temporal_{part}@{threshold:g}"
        for threshold in settings.thresholds[1:]
        for part in ("precision", "recall", "f1")
    ]
    means = {**_MEANS, **{name: name for name in thresholds}}
    columns = {name: method.columns.numbers(name) for name in method.columns.by_name}
    columns["unparsed"] = np.array([episode.unparsed for episode in method.episodes], dtype=bool)
    metrics = _block(columns, slice(None), means, settings.bootstrap, seed)
    metrics["threshold"] = settings.thresholds[0]
    metrics["tools"] = method.tools
    by: dict[str, dict[str, Any]] = {}
    for name in ("type", *settings.groups):
        members: dict[str, array[int]] = {}
        for place, episode in enumerate(method.episodes):
            for value in episode.groups.get(name, []):
                members.setdefault(value, array("q")).append(place)
        if len(members) > _MOST_GROUPS:
            message = f"{name} has {len(members)} values, more than {_MOST_GROUPS}, and so makes no groups: left out"
            method.failures.append(Failure(name, "bad_group", message))
        elif members:
            by[name] = {
                value: _block(columns, np.array(members[value]), means, settings.bootstrap, seed)
                for value in sorted(members, key=_natural)
            }
    metrics["failures"] = dict(sorted(Counter(failure.reason for failure in method.failures).items()))
    return {**metrics, "by": by}


def _natural(value: str) -> tuple[int, float, str]:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    return (0, number, value) if math.isfinite(number) else (1, 0.0, value)


def _block(
    columns: Mapping[str, np.ndarray], rows: Rows, means: Mapping[str, str], resamples: int, seed: int
) -> dict[str, Any]:
    """Headline numbers of some episodes and their intervals.

    Args:
        columns: values of all episodes by name, each of shape (n,), NaN where an episode has none.
        rows: the places of the episodes in them.
        means: headline names, each with the column that it is the mean of.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    metrics: dict[str, Any] = dict.fromkeys(means)
    having: Counter[str] = Counter()
    for name, column in means.items():
        if column in columns:
            present = columns[column][rows]
            present = present[~np.isnan(present)]
            having[name] = len(present)
            metrics[name] = plain(float(present.mean())) if len(present) else None
    for kind in _OF_MEANS:
        precision, recall = metrics[f"{kind}_precision"], metrics[f"{kind}_recall"]
        metrics[f"{kind}_f1_of_means"] = None if precision is None else plain(harmonic_mean(precision, recall))
    unparsed = columns["unparsed"][rows]
    metrics["qa_episodes"] = having["qa_accuracy"]
    metrics["qa_unparsed"] = int(unparsed.sum())
    metrics["qa_differ"] = int(np.nansum(columns["qa_differ"][rows])) if "qa_differ" in columns else 0
    metrics["temporal_episodes"] = having["temporal_f1"]
    metrics["visual_episodes"] = having["visual_f1"]
    metrics["episodes"] = len(unparsed)
    metrics["errors"] = int(columns["error"][rows].sum()) if len(unparsed) else 0
    if resamples and len(unparsed):
        names = [name for name in means if having[name]]
        draws = bootstrap_means([columns[means[name]] for name in names], resamples, seed, rows)
        intervals = {name: percentile_interval(draws[:, column]) for column, name in enumerate(names)}
        metrics["intervals"] = {
            name: [round(low_high[0], 6), round(low_high[1], 6)] for name, low_high in intervals.items() if low_high
        }
    return metrics


def plain(number: float) -> float | None:
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
                "difference": plain(float((right[:, 1] - right[:, 0]).mean())),
                "only_a": test["only_a"],
                "only_b": test["only_b"],
                "p_value": plain(test["p_value"]),
            }
        for name in ("temporal_f1", "visual_f1"):
            values = _paired(pairs, name)
            if len(values) and settings.bootstrap:
                test = paired_bootstrap(values[:, 0], values[:, 1], settings.bootstrap, seed)
                entry[name] = {key: plain(round(value, 9)) for key, value in test.items()}
        comparisons.append(entry)
    return comparisons


def _paired(pairs: Sequence[tuple[EpisodeScore, EpisodeScore]], name: str) -> np.ndarray:
    both = [(a.values[name], b.values[name]) for a, b in pairs if name in a.values and name in b.values]
    return np.array(both, dtype=np.float64).reshape(-1, 2)


def headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a method without its groups and intervals, for a table or `dvc metrics show`."""
    return {name: value for name, value in metrics.items() if not isinstance(value, (dict, list))}


LENGTH_BINS = ((60, "up to 1 min"), (600, "1 to 10 min"), (1800, "10 to 30 min"), (float("inf"), "over 30 min"))
FRAME_BINS = ((0, "0"), (4, "1–4"), (8, "5–8"), (16, "9–16"), (32, "17–32"), (float("inf"), "over 32"))

TURNS_SHOWN = 64
"""Turns that have a place in the plot of tool calls: a policy that never stops must not fill it."""


class Plot(NamedTuple):
    """A plot's data: rows of (method, place on the x axis, value, episodes)."""

    name: str
    columns: list[str]
    categories: list[str]
    rows: list[list[Any]]


def plot_data(methods: Sequence[MethodScores]) -> list[Plot]:
    """F1 by frames used, accuracy by video length, tool calls by turn."""
    frames: list[list[Any]] = []
    lengths: list[list[Any]] = []
    turns: list[list[Any]] = []
    for method in methods:
        for label, members in _binned(method.episodes, FRAME_BINS, lambda episode: episode.values["frames"]):
            frames += _mean_row(method, label, members, "temporal_f1")
        for label, members in _binned(method.episodes, LENGTH_BINS, lambda episode: episode.duration):
            lengths += _mean_row(method, label, members, "qa_accuracy")
        calls: list[list[int]] = [[0, 0] for _ in range(TURNS_SHOWN)]  # calls and episodes, by turn
        for episode in method.episodes:
            for total, count in zip(calls, episode.calls_by_turn, strict=False):
                total[0] += count
                total[1] += 1
        for turn, (made, episodes) in enumerate(calls, start=1):
            if episodes:
                turns.append([method.name, str(turn), plain(made / len(method.episodes)), episodes])
    last = max((int(row[1]) for row in turns), default=0)
    return [
        Plot("f1_by_frames", ["method", "frames", "temporal_f1", "episodes"], [name for _, name in FRAME_BINS], frames),
        Plot(
            "accuracy_by_length",
            ["method", "length", "qa_accuracy", "episodes"],
            [name for _, name in LENGTH_BINS],
            lengths,
        ),
        Plot(
            "tool_calls_by_turn",
            ["method", "turn", "tool_calls", "episodes"],
            [str(turn) for turn in range(1, last + 1)],
            turns,
        ),
    ]


def _mean_row(method: MethodScores, label: str, members: Sequence[EpisodeScore], name: str) -> list[list[Any]]:
    values = [episode.values[name] for episode in members if name in episode.values]
    return [[method.name, label, plain(sum(values) / len(values)), len(values)]] if values else []


def _binned(
    episodes: Sequence[EpisodeScore],
    bins: Sequence[tuple[float, str]],
    value: Callable[[EpisodeScore], float | None],
) -> list[tuple[str, list[EpisodeScore]]]:
    members: dict[str, list[EpisodeScore]] = {label: [] for _, label in bins}
    for episode in episodes:
        number = value(episode)
        if number is not None and not math.isnan(number):
            members[next(label for top, label in bins if number <= top)].append(episode)
    return [(label, found) for label, found in members.items() if found]
