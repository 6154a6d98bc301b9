"""Visual metrics of many episodes: frames of the source video at exact times, each decoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from timesearch.batch import Failure
from timesearch.errors import ItemError
from timesearch.evaluation.episodes import EpisodeScore, MethodScores, Videos
from timesearch.evaluation.temporal import harmonic_mean
from timesearch.evaluation.visual import Mode, Ssim
from timesearch.progress import progress_bar

_MODES: tuple[tuple[str, Mode], ...] = (("visual", "standard"), ("visual_tstar", "tstar"))
_CHUNK = 16  # searched frames held at once; a frame of 1280 x 720 is 2.8 MB, its statistics 44 MB a mode


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

    path = videos.path(video)
    needed: dict[float, set[float]] = {}
    for episode in episodes:
        for time in episode.times:
            needed.setdefault(time, set()).update(episode.truth)
    truth_times = sorted({time for episode in episodes for time in episode.truth})
    truth_frames = [np.asarray(frame) for frame in read_frames(path, truth_times)]
    engines = {metric: Ssim(mode) for metric, mode in _MODES}
    truth = {
        (metric, time): engine.statistics(frame)
        for metric, engine in engines.items()
        for time, frame in zip(truth_times, truth_frames, strict=True)
    }
    found: dict[tuple[str, float, float], float] = {}
    searched: dict[str, Any] = dict.fromkeys(engines)
    times = sorted(needed)
    for start in range(0, len(times), _CHUNK):
        chunk = times[start : start + _CHUNK]
        for time, frame in zip(chunk, read_frames(path, chunk), strict=True):
            for metric, engine in engines.items():
                searched[metric] = engine.statistics(frame, reuse=searched[metric])
                for other in needed[time]:
                    found[metric, other, time] = engine.similarity(truth[metric, other], searched[metric])
    return found


def _add(episode: EpisodeScore, similar: Mapping[tuple[str, float, float], float]) -> None:
    for metric, _ in _MODES:
        scores = np.array([[similar[metric, other, time] for time in episode.times] for other in episode.truth])
        precision, recall = float(scores.max(axis=0).mean()), float(scores.max(axis=1).mean())
        episode.values[f"{metric}_precision"] = precision
        episode.values[f"{metric}_recall"] = recall
        episode.values[f"{metric}_f1"] = harmonic_mean(precision, recall)
