"""The methods that are compared: the checkpoint that plays each of them, and how an episode goes.

| method | policy | frames |
| --- | --- | --- |
| `uniform` | trained | `uniform_frames` evenly spread, no search |
| `one_shot`, `one_shot_<selection>` | trained | as many, selected by the question itself, no search |
| `oracle` | trained | those of the ground truth, no search: what reading alone can reach |
| `base` | before any training | searched |
| `coldstart` | after the cold start | searched |
| `grpo_csv` (`grpo` without completeness) | trained | searched |

The baselines without search ask for the answer by the re-answer's prompt, so all methods differ in their frames alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from timesearch.base.errors import ItemError, RequestError
from timesearch.data.samples import Prediction, Sample
from timesearch.inference.playing import Episode
from timesearch.retrieval.selection import Method, select_frames
from timesearch.search.episode import answer_from_frames, run_episode
from timesearch.search.policy import Policy
from timesearch.search.search import Search
from timesearch.settings import Settings
from timesearch.video.frames import Look

_SELECTIONS: dict[str, Method] = {f"one_shot_{name}": name for name in get_args(Method)}
_CHOOSING = ("uniform", "one_shot", *_SELECTIONS, "oracle")
"""Methods that answer from frames chosen at once."""


def trained_method(settings: Settings) -> str:
    """The name under which the trained policy's predictions are filed."""
    return "grpo_csv" if settings.train.verifies else "grpo"


def searches(method: str) -> bool:
    """Whether a method searches, rather than answers from frames that are chosen at once."""
    return method not in _CHOOSING


def checkpoint_of(method: str, settings: Settings) -> Path:
    """The checkpoint that plays a method.

    Raises:
        RequestError: the method is unknown, or its checkpoint is missing.
    """
    known = {
        "base": (settings.paths.models / "policy", "models"),
        "coldstart": (settings.paths.coldstart, "coldstart"),
        **dict.fromkeys((*_CHOOSING, "grpo_csv", "grpo"), (settings.paths.train, "train")),
    }
    if method not in known:
        raise RequestError(f"unknown method {method!r} in infer.baselines: choose from {', '.join(known)}")
    path, stage = known[method]
    if not path.is_dir() and settings.infer.model is None:
        raise RequestError(f"{path} is missing, which {method!r} needs: run the stage {stage!r} first")
    return path


def episode_of(method: str, frames: int) -> Episode:
    """How an episode of a method goes; a method without search sees `frames` frames."""
    return run_episode if searches(method) else from_chosen_frames(method, frames)


def from_chosen_frames(method: str, count: int) -> Episode:
    """Episodes that answer from `count` frames: evenly spread (`uniform`), or selected by the question (`one_shot`);
    or from those of the ground truth, as many as there are (`oracle`).
    """

    async def episode(search: Search, policy: Policy, sample: Sample) -> Prediction:
        return await answer_from_frames(
            search, policy, sample, lambda opened: chosen_frames(opened, method, sample, count)
        )

    return episode


def chosen_frames(search: Search, method: str, sample: Sample, count: int) -> Sequence[int | Look]:
    """The frames of a method without search, of the sample's video, which `search` has opened.

    Raises:
        ItemError: `no_ground_truth`, for `oracle`.
    """
    frames, features = search.video.frames, search.video.features.features
    if method == "oracle":
        sound = [seconds for seconds in sample.moments if math.isfinite(seconds) and seconds >= 0]
        if not sound:
            raise ItemError(f"{sample.id} has no ground-truth time, which 'oracle' shows", reason="no_ground_truth")
        return sorted({frames.nearest(seconds) for seconds in sound})
    if method == "uniform":
        return frames.evenly(count)
    selection = _SELECTIONS.get(method, search.settings.method)
    query = search.encoder.encode_text([sample.question])[0]
    return select_frames(features, query, count, method=selection, places=frames.places)
