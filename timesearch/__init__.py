"""Adaptive temporal search in long video, learned by GRPO with completeness self-verification."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timesearch.data.messages import Evidence, exchanges
    from timesearch.data.rows import read_samples
    from timesearch.data.samples import Prediction, Sample
    from timesearch.retrieval.encoder import load_encoder
    from timesearch.retrieval.features import FeatureCache
    from timesearch.retrieval.selection import select_frames
    from timesearch.rewards import score_episode
    from timesearch.search.episode import run_episode
    from timesearch.search.search import Search
    from timesearch.settings import Settings, load_settings
    from timesearch.video.frames import FrameCache

__all__ = [
    "Evidence",
    "FeatureCache",
    "FrameCache",
    "Prediction",
    "Sample",
    "Search",
    "Settings",
    "exchanges",
    "load_encoder",
    "load_settings",
    "read_samples",
    "run_episode",
    "score_episode",
    "select_frames",
]

_HOMES = {
    "Evidence": "timesearch.data.messages",
    "FeatureCache": "timesearch.retrieval.features",
    "FrameCache": "timesearch.video.frames",
    "Prediction": "timesearch.data.samples",
    "Sample": "timesearch.data.samples",
    "Search": "timesearch.search.search",
    "Settings": "timesearch.settings",
    "exchanges": "timesearch.data.messages",
    "load_encoder": "timesearch.retrieval.encoder",
    "load_settings": "timesearch.settings",
    "read_samples": "timesearch.data.rows",
    "run_episode": "timesearch.search.episode",
    "score_episode": "timesearch.rewards",
    "select_frames": "timesearch.retrieval.selection",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import timesearch` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'timesearch' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
