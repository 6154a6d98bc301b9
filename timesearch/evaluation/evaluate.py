"""Stage `evaluate`: prediction files to numbers.

Results are a function of the files and the settings: the same bytes each time.
"""

from __future__ import annotations

import asyncio
import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from timesearch.batch import BatchResult, Failure, write_failures
from timesearch.errors import RequestError
from timesearch.evaluation.episodes import EpisodeScore, MethodScores, Scorer, Videos, read_predictions
from timesearch.evaluation.summary import compare, headline, plain, plot_data, summarise
from timesearch.evaluation.table import markdown_table, method_order, print_table
from timesearch.exclusive import exclusive
from timesearch.files import atomic_path, json_digest, write_json, write_jsonl, write_text
from timesearch.judge.client import JudgeClient, RuleJudge, make_judge
from timesearch.progress import console, progress_bar
from timesearch.rewards import completeness
from timesearch.settings import Evaluate, Judge, Settings
from timesearch.untrusted import UntrustedError, parse_json

_TRACKED_BY_GROUP = ("temporal_precision", "temporal_recall", "temporal_f1", "visual_f1", "qa_accuracy", "episodes")
_TRACKABLE = re.compile(r"[\w-][\w\-. ]{,63}")
"""A method or a group's value that can be part of a metric's name in MLflow, which reads such names as paths."""
_UNTRACKABLE = re.compile(r"[^\w-]")
_OWN_FILES = {"comparisons", "plots"}
"""Names of files that are written beside those of the methods."""
MakeJudge = Callable[[], "JudgeClient | RuleJudge"]


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
        method.metrics = summarise(method, settings, seed)
    return methods


def _score_file(name: str, path: Path, settings: Evaluate, videos: Videos) -> MethodScores:
    failures: list[Failure] = []
    scorer = Scorer(settings.thresholds, settings.groups, videos, failures.append)
    episodes = []
    compare_frames = settings.visual and bool(videos)
    with progress_bar(f"scoring {name}", None) as bar:
        for prediction in read_predictions(path, failures.append):
            episode = scorer.score(prediction)
            if not compare_frames:
                episode.times = ()
            episodes.append(episode)
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
        (method, episode, metric, triple)
        for method in methods
        for episode in method.episodes
        for metric, triple in episode.judged
    ]
    unjudged = set()
    if waiting:
        verdicts = asyncio.run(make().score_many([triple for *_, triple in waiting]))
        for (method, episode, metric, (*_, answer)), verdict in zip(waiting, verdicts, strict=True):
            episode.judged = ()
            if verdict is not None:
                episode.values[metric] = verdict
                continue
            del episode.values[metric]
            unjudged.add((method.name, episode.id))
            message = f"{episode.id}: the judge gave no verdict on the answer {answer[:80]!r}"
            method.failures.append(Failure(episode.id, "unjudged", message))
    for method in methods:
        if not any("reanswer_accuracy" in episode.values for episode in method.episodes):
            continue
        for episode in method.episodes:
            right = episode.values.get("qa_accuracy", episode.values.get("grounding_iou"))
            if right is not None and (method.name, episode.id) not in unjudged:
                again = episode.values.get("reanswer_accuracy", 0.0)
                episode.values["completeness"] = completeness(right, again)


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
                    episode.values.update(dict.fromkeys((f"{mode}_precision", f"{mode}_recall", f"{mode}_f1"), 0.0))
    score_videos(jobs, videos)


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

    `out` gets ``metrics.json`` (one block of headline numbers a method; `flat`: all numbers of the only method),
    ``table.md`` and ``plots/``; ``out/evaluation`` gets each method's whole metrics, each episode's scores, the
    unparsed answers and the paired comparisons; the file `failures` (``out/failures.jsonl`` if None) what was wrong.
    """
    detail = out / "evaluation"
    if flat:
        write_json(out / "metrics.json", methods[0].metrics)
    else:
        write_json(out / "metrics.json", {method.name: headline(method.metrics) for method in methods})
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
    write_text(out / "table.md", markdown_table(methods))
    plots = plot_data(methods)
    write_json(detail / "plots.json", {plot.name: {"categories": plot.categories, "rows": plot.rows} for plot in plots})
    for plot in plots:
        _write_csv(out / "plots" / f"{plot.name}.csv", plot.columns, plot.rows)
    done = [episode.id for method in methods for episode in method.episodes]
    return BatchResult(done=done, failures=named)


def episode_row(episode: EpisodeScore) -> dict[str, Any]:
    """An episode's scores as one JSON line."""
    return {
        "id": episode.id,
        "video": episode.video,
        "type": episode.type,
        "duration": episode.duration,
        "truth": list(episode.truth),
        "groups": episode.groups,
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
    from timesearch.inference.infer import trained_method

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


@contextmanager
def held_judge(settings: Judge) -> Iterator[MakeJudge]:
    """Yield what makes the judge; its server is started when the judge is first asked for, and stopped at the end."""
    from timesearch.judge.server import judge_server

    with ExitStack() as held:

        def make() -> JudgeClient | RuleJudge:
            held.enter_context(judge_server(settings, say=console.print))
            return make_judge(settings)

        yield make


def tracked_metrics(method: MethodScores) -> dict[str, float]:
    """Numbers by the names that MLflow gets: ``grpo_csv/temporal_f1``, ``grpo_csv/duration_group/60/qa_accuracy``."""
    whose = trackable(method.name)
    named = {f"{whose}/{name}": value for name, value in headline(method.metrics).items()}
    for group, values in method.metrics["by"].items():
        for value, block in values.items():
            place = f"{whose}/{trackable(group)}/{trackable(value)}"
            named |= {f"{place}/{name}": block[name] for name in _TRACKED_BY_GROUP}
    return {name.replace("@", "_"): number for name, number in named.items() if number is not None}


def trackable(name: str) -> str:
    """A name as MLflow takes it; one that has to be changed gets a mark of its own, so that no two become one."""
    if _TRACKABLE.fullmatch(name):
        return name
    return f"{_UNTRACKABLE.sub('_', name[:50])}-{json_digest(name)[:8]}"


def run(settings: Settings) -> BatchResult:
    """Stage `evaluate`: score the predictions of the settings' methods, write results and the report, print the table.

    Raises:
        RequestError: there are no predictions.
        TemporaryError: another process works in `results`.
    """
    from timesearch.report.build import write_results_report
    from timesearch.tracking import stage_run

    results = settings.paths.results
    files = prediction_files(settings)
    others = {path.stem for path in (results / "predictions").glob("*.jsonl")} - files.keys() - {"failures"}
    if others:
        console.print(f"not scored, as infer.baselines does not name them: predictions of {', '.join(sorted(others))}")
    with exclusive(results), stage_run(settings, "evaluate") as record, held_judge(settings.judge) as judge:
        methods = evaluate_files(files, settings.evaluate, settings.paths.videos, judge, settings.seed)
        failures = results / "evaluation" / "failures.jsonl"
        outcome = write_evaluation(methods, results, settings.evaluate, settings.seed, failures=failures)
        for method in methods:
            record.log_metrics(tracked_metrics(method))
        report = write_results_report(settings)
        for path in (report, results / "metrics.json", results / "table.md", results / "evaluation", results / "plots"):
            record.log_artifact(path, path.name if path.is_dir() else None)
    print_table(methods)
    return outcome


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
