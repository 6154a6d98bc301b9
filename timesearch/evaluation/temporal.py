"""Temporal metrics of LV-Haystack (T*, arXiv 2504.02259, Section 3): how near in time the searched frames come to the
ground truth.

A searched frame is *right* if some ground-truth frame lies within a threshold of it, and a ground-truth frame is
*found* if some searched frame lies within the threshold of it. Precision is the share of searched frames that are
right, recall the share of ground-truth frames that are found. All times are seconds, never frame numbers.

Ground truth may also be spans: the distance of a time to a span is 0 inside it, and else that to its nearer end, so
that a point is a span of no length and both follow one rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PrecisionRecallF1(NamedTuple):
    """Three shares in [0, 1]."""

    precision: float
    recall: float
    f1: float


def harmonic_mean(precision: float, recall: float) -> float:
    """F1 of a precision and a recall; 0 where both are 0."""
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def distance_matrix(
    gt_seconds: Sequence[float] | Sequence[Sequence[float]] | np.ndarray, pred_seconds: Sequence[float] | np.ndarray
) -> np.ndarray:
    """Distances in seconds between each of n ground truths and each of m times, shape (n, m).

    Args:
        gt_seconds: n points, or n [start, end] spans.
        pred_seconds: m times.
    """
    truth = np.asarray(gt_seconds, dtype=np.float64)
    times = np.asarray(pred_seconds, dtype=np.float64)
    if truth.ndim < 2:
        return np.abs(truth.reshape(-1, 1) - times)
    return np.maximum(np.maximum(truth[:, :1] - times, times - truth[:, 1:]), 0.0)


def precision_recall_f1(
    gt_seconds: Sequence[float] | Sequence[Sequence[float]] | np.ndarray,
    pred_seconds: Sequence[float] | np.ndarray,
    threshold: float = 5.0,
) -> PrecisionRecallF1:
    """Temporal precision, recall and F1 of one episode.

    Args:
        gt_seconds: times of the ground-truth frames, or [start, end] spans, in seconds.
        pred_seconds: times of the searched frames in seconds. A time that occurs twice counts twice.
        threshold: seconds; a distance of exactly the threshold is within it.

    Returns:
        (precision, recall, f1). All three are 0 where either list is empty: T* leaves such episodes out of its
        averages, which rewards a policy that stops searching.
    """
    return _within(distance_matrix(gt_seconds, pred_seconds), threshold)


def _within(distances: np.ndarray, threshold: float) -> PrecisionRecallF1:
    if distances.size == 0:
        return PrecisionRecallF1(0.0, 0.0, 0.0)
    near = distances <= threshold
    precision = float(near.any(axis=0).mean())
    recall = float(near.any(axis=1).mean())
    return PrecisionRecallF1(precision, recall, harmonic_mean(precision, recall))


def nearest_neighbour_distances(
    gt_seconds: Sequence[float] | Sequence[Sequence[float]] | np.ndarray, pred_seconds: Sequence[float] | np.ndarray
) -> tuple[float, float] | None:
    """Average nearest-neighbour distances (ANND) of one episode, in seconds.

    Returns:
        (*precision*: mean distance of a searched frame to the nearest ground truth, *recall*: mean distance of a
        ground truth to the nearest searched frame); None where either list is empty, for then there is no distance.
    """
    return _nearest(distance_matrix(gt_seconds, pred_seconds))


def _nearest(distances: np.ndarray) -> tuple[float, float] | None:
    if distances.size == 0:
        return None
    return float(distances.min(axis=0).mean()), float(distances.min(axis=1).mean())


def span_coverage(gt_spans: Sequence[Sequence[float]], pred_seconds: Sequence[float]) -> float:
    """Share of the ground-truth spans ([start, end] in seconds) inside which at least one searched frame lies."""
    distances = distance_matrix(np.asarray(gt_spans, dtype=np.float64).reshape(-1, 2), pred_seconds)
    return float((distances <= 0).any(axis=1).mean()) if len(distances) else 0.0


def temporal_scores(
    gt_seconds: Sequence[float] | Sequence[Sequence[float]], pred_seconds: Sequence[float], thresholds: Sequence[float]
) -> dict[str, float]:
    """All temporal metrics of one episode by name; the first threshold gives the headline numbers.

    A name of another threshold ends in it: ``temporal_f1@2`` is F1 within 2 seconds.
    """
    distances = distance_matrix(gt_seconds, pred_seconds)
    scores: dict[str, float] = {}
    for number, threshold in enumerate(thresholds):
        ending = "" if number == 0 else f"@{threshold:g}"
        precision, recall, f1 = _within(distances, threshold)
        scores[f"temporal_precision{ending}"] = precision
        scores[f"temporal_recall{ending}"] = recall
        scores[f"temporal_f1{ending}"] = f1
    nearest = _nearest(distances)
    if nearest:
        scores["annd_precision"], scores["annd_recall"] = nearest
    return scores
