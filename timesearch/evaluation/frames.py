"""Visual metrics of many episodes: frames of the source video at exact times, each decoded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from timesearch.base.batch import Failure
from timesearch.base.errors import ItemError
from timesearch.base.progress import progress_bar
from timesearch.evaluation.episodes import EpisodeScore, MethodScores, Videos
from timesearch.evaluation.temporal import harmonic_mean
from timesearch.evaluation.visual import Mode, Ssim

_MODES: tuple[tuple[str, Mode], ...] = (("visual", "standard"), ("visual_tstar", "tstar"))
_CHUNK = 16
"""Searched frames decoded at once."""
_TRUTH_BUDGET = 1_200_000_000
"""Bytes of statistics of ground-truth frames held at once: those of 6 frames of 1920 x 1080, or of 54 of 640 x 360."""
_STATISTICS = len(_MODES) * 4 * 3 * 4
"""Bytes of statistics a pixel: four float32 arrays of three colours a mode."""


def score_videos(jobs: Mapping[str, Sequence[tuple[MethodScores, EpisodeScore]]], videos: Videos) -> None:
    """Add the visual metrics to episodes that have ground truth and searched frames.

    Args:
        jobs: episodes by video, each with its method, whose failures get those of its video.
        videos: where the videos lie.
    """
    with progress_bar("comparing frames", len(jobs)) as bar:
        for video, entries in sorted(jobs.items()):
            try:
                similar = _similarities(video, [episode for _, episode in entries], videos)
            except ItemError as error:
                for method, episode in entries:
                    method.failures.append(Failure(episode.id, error.reason, f"{episode.id}: {error}"))
            else:
                for _, episode in entries:
                    _add(episode, similar)
            bar.advance()


def _similarities(
    video: str, episodes: Sequence[EpisodeScore], videos: Videos
) -> dict[tuple[str, float, float], float]:
    """SSIM by (metric, ground-truth time, searched time), of all pairs that some episode needs."""
    from timesearch.video.exact import read_frames
    from timesearch.video.probe import probe

    path = videos.path(video)
    needed: dict[float, set[float]] = {}
    for episode in episodes:
        for time in episode.truth:
            needed.setdefault(time, set()).update(episode.times)
    info = probe(path)
    at_once = max(1, _TRUTH_BUDGET // (_STATISTICS * info.width * info.height))
    engines = {metric: Ssim(mode) for metric, mode in _MODES}
    truth: dict[tuple[str, int], Any] = {}
    searched: dict[str, Any] = dict.fromkeys(engines)
    found: dict[tuple[str, float, float], float] = {}
    for truths in _chunks(list(needed), at_once):  # question by question, so that few chunks need one searched frame
        for place, frame in enumerate(read_frames(path, truths)):
            for metric, engine in engines.items():
                truth[metric, place] = engine.statistics(frame, reuse=truth.get((metric, place)))
        for times in _chunks(sorted({time for other in truths for time in needed[other]}), _CHUNK):
            for time, frame in zip(times, read_frames(path, times), strict=True):
                for metric, engine in engines.items():
                    searched[metric] = engine.statistics(frame, reuse=searched[metric])
                    for place, other in enumerate(truths):
                        if time in needed[other]:
                            found[metric, other, time] = engine.similarity(truth[metric, place], searched[metric])
    return found


def _chunks(items: list[float], size: int) -> Iterator[list[float]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _add(episode: EpisodeScore, similar: Mapping[tuple[str, float, float], float]) -> None:
    for metric, _ in _MODES:
        scores = np.array([[similar[metric, other, time] for time in episode.times] for other in episode.truth])
        precision, recall = float(scores.max(axis=0).mean()), float(scores.max(axis=1).mean())
        episode.values[f"{metric}_precision"] = precision
        episode.values[f"{metric}_recall"] = recall
        episode.values[f"{metric}_f1"] = harmonic_mean(precision, recall)
