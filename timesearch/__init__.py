"""Adaptive temporal search in long video, learned by GRPO with completeness self-verification."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timesearch.retrieval.features import FeatureCache
    from timesearch.retrieval.selection import select_frames
    from timesearch.samples import Sample
    from timesearch.video.frames import FrameCache

__all__ = ["FeatureCache", "FrameCache", "Sample", "select_frames"]

_HOMES = {
    "FeatureCache": "timesearch.retrieval.features",
    "FrameCache": "timesearch.video.frames",
    "Sample": "timesearch.samples",
    "select_frames": "timesearch.retrieval.selection",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import timesearch` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'timesearch' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
