"""The files that an evaluation reads and writes, and the numbers that MLflow gets of it."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timesearch.base.batch import BatchResult, Failure, write_failures
from timesearch.base.errors import RequestError
from timesearch.base.files import atomic_path, json_digest, write_json, write_jsonl, write_text
from timesearch.base.untrusted import UntrustedError, parse_json
from timesearch.evaluation.episodes import EpisodeScore, MethodScores
from timesearch.evaluation.summary import compare, headline, plain, plot_data
from timesearch.evaluation.table import markdown_table, method_order, side_notes
from timesearch.inference.methods import trained_method
from timesearch.settings import Evaluate, Settings

_TRACKED_BY_GROUP = ("temporal_precision", "temporal_recall", "temporal_f1", "visual_f1", "qa_accuracy", "episodes")
_TRACKED_OF_FINGERPRINT = ("seen", "errors", "missing_videos", "scored", "questions")
_TRACKABLE = re.compile(r"[\w-][\w\-. ]{,63}")
"""A method or a group's value that can be part of a metric's name in MLflow, which reads such names as paths."""
_UNTRACKABLE = re.compile(r"[^\w-]")
_OWN_FILES = {"comparisons", "plots"}
"""Names of files that are written beside those of the methods."""


def write_evaluation(
    methods: Sequence[MethodScores],
    out: Path,
    settings: Evaluate,
    seed: int,
    *,
    flat: bool = False,
    failures: Path | None = None,
) -> BatchResult:
    """Write what was found.

    `out` gets ``metrics.json`` (one block of headline numbers a method, also by hops where questions tell them; `flat`:
    all numbers of the only method), ``table.md`` and ``plots/``; ``out/evaluation`` gets each method's whole metrics,
    each episode's scores, the unparsed answers and the paired comparisons; the file `failures`
    (``out/failures.jsonl`` if None) what was wrong.
    """
    detail = out / "evaluation"
    if flat:
        write_json(out / "metrics.json", methods[0].metrics)
    else:
        write_json(out / "metrics.json", {method.name: _summary(method.metrics) for method in methods})
    for method in methods:
        write_json(detail / f"{method.name}.json", method.metrics)
        write_jsonl(detail / "episodes" / f"{method.name}.jsonl", map(episode_row, method.episodes))
    write_json(detail / "comparisons.json", compare(methods, settings, seed))
    unparsed = [
        {"method": method.name, "id": episode.id, "answer": episode.answer}
        for method in methods
        for episode in method.episodes
        if episode.unparsed
    ]
    write_jsonl(detail / "unparsed.jsonl", unparsed)
    named = [
        Failure(failure.item if len(methods) == 1 else f"{method.name}/{failure.item}", failure.reason, failure.message)
        for method in methods
        for failure in method.failures
    ]
    target = failures or out / "failures.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_failures(target, named)
    notes = "".join(f"\n{note}\n" for note in side_notes(methods))
    write_text(out / "table.md", markdown_table(methods) + notes)
    plots = plot_data(methods)
    write_json(detail / "plots.json", {plot.name: {"categories": plot.categories, "rows": plot.rows} for plot in plots})
    for plot in plots:
        _write_csv(out / "plots" / f"{plot.name}.csv", plot.columns, plot.rows)
    done = [episode.id for method in methods for episode in method.episodes]
    return BatchResult(done=done, failures=named)


def _summary(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The headline of a method, and the numbers that MLflow gets of a group by the hops that a question needs."""
    hops = {
        value: {name: block[name] for name in _TRACKED_BY_GROUP}
        for value, block in metrics["by"].get("hops", {}).items()
    }
    return {**headline(metrics), "fingerprint": metrics["fingerprint"]["digest"], **({"hops": hops} if hops else {})}


def episode_row(episode: EpisodeScore) -> dict[str, Any]:
    """An episode's scores as one JSON line."""
    return {
        "id": episode.id,
        "video": episode.video,
        "type": episode.type,
        "duration": episode.duration,
        "truth": list(episode.truth),
        "groups": episode.groups,
        "asked": episode.asked,
        "shown": list(episode.shown),
        "answer": episode.answer,
        "choice": episode.choice,
        "unparsed": episode.unparsed,
        **{name: plain(value) for name, value in episode.values.items()},
    }


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def prediction_files(settings: Settings) -> dict[str, Path]:
    """The files in `results/predictions` of the methods that the settings ask for, by method.

    Raises:
        RequestError: there is none.
    """
    folder = settings.paths.results / "predictions"
    asked = dict.fromkeys([*settings.infer.baselines, trained_method(settings)])
    files = {method: folder / f"{method}.jsonl" for method in asked if (folder / f"{method}.jsonl").is_file()}
    if not files:
        raise RequestError(f"{folder} holds no predictions of {', '.join(asked)}: run `timesearch infer` first")
    return files


def files_by_name(paths: Sequence[Path]) -> dict[str, Path]:
    """Prediction files by the name of their method, which is the file's; bytes that are no text become escapes.

    Raises:
        RequestError: two have one name, or one has the name of a file of the results.
    """
    files = {os.fsencode(path.stem).decode("utf-8", "backslashreplace"): path for path in paths}
    if len(files) < len(paths):
        raise RequestError("two prediction files have the same name: rename one, methods are told apart by it")
    if taken := sorted(files.keys() & _OWN_FILES):
        raise RequestError(f"{files[taken[0]]} has the name of a file of the results: rename it")
    return files


def tracked_metrics(method: MethodScores) -> dict[str, float]:
    """Numbers by the names that MLflow gets: ``grpo_csv/temporal_f1``, ``grpo_csv/duration_group/60/qa_accuracy``."""
    whose = trackable(method.name)
    named = {f"{whose}/{name}": value for name, value in headline(method.metrics).items()}
    for group, values in method.metrics["by"].items():
        for value, block in values.items():
            place = f"{whose}/{trackable(group)}/{trackable(value)}"
            named |= {f"{place}/{name}": block[name] for name in _TRACKED_BY_GROUP}
    for tool, use in method.tools.items():
        named |= {f"{whose}/tool/{trackable(tool)}/{name}": number for name, number in use.items()}
    return {name.replace("@", "_"): number for name, number in named.items() if number is not None}


def tracked_fingerprint(method: MethodScores) -> dict[str, str]:
    """What a method's numbers are made of, by the names of MLflow's parameters, such as ``fingerprint.grpo_csv.seed``.

    Ingredients stand each by itself, so that MLflow compares them; what was seen and how it was scored as JSON.
    """
    made, whose = method.metrics["fingerprint"], f"fingerprint.{trackable(method.name)}"
    named = {f"{whose}.{trackable(name)}": str(value) for name, value in (made["made_of"] or {}).items()}
    parts = {f"{whose}.{name}": json.dumps(made[name]) for name in _TRACKED_OF_FINGERPRINT}
    return {whose: made["digest"] or "none", **named, **parts}


def trackable(name: str) -> str:
    """A name as MLflow takes it; one that has to be changed gets a mark of its own, so that no two become one."""
    if _TRACKABLE.fullmatch(name):
        return name
    return f"{_UNTRACKABLE.sub('_', name[:50])}-{json_digest(name)[:8]}"


@dataclass(frozen=True)
class WrittenScores:
    """A method as `write_evaluation` left it."""

    name: str
    metrics: dict[str, Any]


def written_scores(out: Path) -> list[WrittenScores]:
    """The methods of an evaluation in a folder of results, in the order of the table.

    Raises:
        RequestError: a file is none that an evaluation writes.
    """
    names = sorted(json.loads((out / "metrics.json").read_text(encoding="utf-8")), key=method_order)
    return [WrittenScores(name, load_metrics(out / "evaluation" / f"{name}.json")) for name in names]


def load_metrics(path: Path) -> dict[str, Any]:
    """Metrics that an evaluation wrote.

    Raises:
        RequestError: there are none, or the file holds something else.
    """
    if not path.is_file():
        raise RequestError(f"{path} does not exist: run `timesearch evaluate` first")
    with suppress(UntrustedError):
        loaded = parse_json(path.read_bytes())
        if isinstance(loaded, dict) and loaded.keys() >= {"by", "failures", "threshold", *_TRACKED_BY_GROUP}:
            return loaded
    raise RequestError(f"{path} is not what an evaluation writes: run `timesearch evaluate` again")
