"""Prediction files to scores: a function of the files and the settings, the same numbers each time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from timesearch.base.batch import Failure
from timesearch.base.progress import progress_bar
from timesearch.evaluation.episodes import EpisodeScore, MethodScores, Scorer, Videos, read_predictions
from timesearch.evaluation.summary import summarise
from timesearch.evaluation.table import method_order
from timesearch.judge.agreement import who_judged
from timesearch.judge.client import JudgeClient, RuleJudge
from timesearch.rewards import completeness
from timesearch.settings import Evaluate

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
    judge = _judge(methods, make)
    if settings.visual and folder:
        _score_frames(methods, folder)
    for method in methods:
        method.metrics = summarise(method, settings, seed)
        by_id = sorted(method.episodes, key=attrgetter("id"))
        asked = ((episode.id, episode.asked) for episode in by_id)
        method.metrics["fingerprint"] = method.tally.account(method.path, asked, settings, judge, method.judged)
    return methods


def _score_file(name: str, path: Path, settings: Evaluate, videos: Videos) -> MethodScores:
    failures: list[Failure] = []
    scorer = Scorer(settings.thresholds, settings.groups, videos, failures.append, settings.qa == "published")
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
    return MethodScores(name, path, episodes, scorer.columns, failures, scorer.tally, tools=scorer.tools.metrics())


def _judge(methods: Sequence[MethodScores], make: MakeJudge) -> dict[str, Any] | None:
    """Ask the judge about all open-ended answers at once, then derive completeness; who judged, None if nobody."""
    waiting = [
        (method, episode, metric, triple)
        for method in methods
        for episode in method.episodes
        for metric, triple in episode.judged
    ]
    unjudged = set()
    judge = None
    if waiting:
        judge = make()
        verdicts = asyncio.run(judge.score_many([triple for *_, triple in waiting]))
        for method in methods:
            triples = [triple for asking, *_, triple in waiting if asking is method]
            if triples and isinstance(judge, JudgeClient):
                method.judged = judge.effort(triples)
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
    return None if judge is None else who_judged(judge)


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
