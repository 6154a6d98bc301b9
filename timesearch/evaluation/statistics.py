"""How sure a number is, and whether two methods differ: percentile bootstrap intervals, McNemar's exact test, Holm's
correction where several numbers are tested.

Everything is a function of its inputs and a seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Rows = slice | np.ndarray
"""Which episodes of a column are meant."""
CONFIDENCE = 0.95
_MOST_AT_ONCE = 32
"""Resamples that are computed by one product of matrices; more are no faster."""
_WEIGHTS = 2_000_000
"""Weights of episodes in resamples that are held at once: 16 MB."""


def bootstrap_means(columns: Sequence[np.ndarray], resamples: int, seed: int, rows: Rows = slice(None)) -> np.ndarray:
    """Means of columns over episodes drawn with replacement, as many as there are.

    Args:
        columns: m metrics, each of shape (episodes,); NaN where an episode has no such value.
        resamples: number of draws.
        seed: of the draws; the same draws serve all columns, so that columns stay paired.
        rows: the n episodes that are drawn from.

    Returns:
        Shape (resamples, m); NaN where a draw holds no value of a column.
    """
    count = len(columns[0][rows])
    rng = np.random.default_rng(seed)
    means = np.full((resamples, len(columns)), np.nan)
    missing = [np.isnan(column[rows]) for column in columns]
    known = [place for place, gaps in enumerate(missing) if not gaps.all()]  # of no values there is nothing to draw
    filled = np.empty((count, len(known)))
    for place, column in enumerate(known):
        filled[:, place] = np.nan_to_num(columns[column][rows])
    partly = [place for place, column in enumerate(known) if missing[column].any()]
    present = np.empty((count, len(partly)))
    for place, column in enumerate(partly):
        present[:, place] = ~missing[known[column]]
    at_once = min(_MOST_AT_ONCE, max(1, _WEIGHTS // max(count, 1)))
    for start in range(0, resamples, at_once):
        weights = np.empty((min(at_once, resamples - start), count))
        for row in weights:
            row[:] = np.bincount(rng.integers(0, count, count), minlength=count)
        counts = np.full((len(weights), len(known)), float(count))
        counts[:, partly] = weights @ present
        with np.errstate(invalid="ignore"):
            means[start : start + len(weights), known] = (weights @ filled) / counts
    return means


def percentile_interval(samples: np.ndarray) -> tuple[float, float] | None:
    """The central 95% of a bootstrap distribution, NaN left out; None if nothing is left."""
    kept = samples[~np.isnan(samples)]
    if kept.size == 0:
        return None
    low, high = np.quantile(kept, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mcnemar(a_right: Sequence[bool], b_right: Sequence[bool]) -> dict[str, float]:
    """McNemar's exact test on the same questions answered by two methods.

    Returns:
        `only_a` and `only_b` (questions that only one of them got right) and the two-sided `p_value` of so uneven a
        split, or a more uneven one, if both were equally good.
    """
    from scipy.special import bdtr

    only_a = sum(bool(a and not b) for a, b in zip(a_right, b_right, strict=True))
    only_b = sum(bool(b and not a) for a, b in zip(a_right, b_right, strict=True))
    split = only_a + only_b
    p_value = min(1.0, 2 * float(bdtr(min(only_a, only_b), split, 0.5))) if split else 1.0
    return {"only_a": only_a, "only_b": only_b, "p_value": p_value}


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests at once, each raised to the chance that any of them is so low where nothing differs.

    Of twenty tests without a difference one is below 0.05; of corrected ones, in one of twenty families any is.
    S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    corrected, reached = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = reached
    return corrected


def paired_bootstrap(a: np.ndarray, b: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    """Difference of two methods' means over the same episodes.

    Args:
        a: shape (n,), values of the first method.
        b: shape (n,), values of the second on the same episodes.
        resamples: number of draws of episodes.
        seed: of the draws.

    Returns:
        `difference` (mean of b minus mean of a), its 95% interval `low` and `high`, and the two-sided `p_value`: twice
        the smaller share of draws on either side of no difference.
    """
    differences = b - a
    draws = bootstrap_means([differences], resamples, seed)[:, 0]
    interval = percentile_interval(draws) or (float("nan"), float("nan"))
    below, above = float(np.mean(draws <= 0)), float(np.mean(draws >= 0))
    return {
        "difference": float(differences.mean()),
        "low": interval[0],
        "high": interval[1],
        "p_value": min(1.0, 2 * min(below, above)),
    }
