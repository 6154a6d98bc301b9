"""Feature caches that belong to no library, searched as if they did: those of videos that were asked about alone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from timesearch.base.errors import ItemError
from timesearch.base.untrusted import mend_text
from timesearch.library.catalogue import Entry
from timesearch.library.library import Rows
from timesearch.library.rows import Segment
from timesearch.retrieval.features import FeatureCache
from timesearch.retrieval.noise import encode_prompts, measure
from timesearch.video.probe import Fingerprint

if TYPE_CHECKING:
    from timesearch.retrieval.encoder import Encoder

_HELD = 256
"""Videos whose rows stay in memory: an hour at one frame a second is 8 MB."""


class LooseEntry(Entry):
    """A video that is called by its path alone."""

    @property
    def name(self) -> str:
        """Its path below its folder."""
        return mend_text(self.relative)


@dataclass(frozen=True)
class Loose:
    """A video, by the key of its caches, with its name and the path of its feature cache."""

    key: str
    name: str
    features: Path


class LooseRows:
    """Opens feature caches of one encoder; those that were used last stay open."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._prompts: np.ndarray | None = None
        self._open = lru_cache(maxsize=_HELD)(self._read)

    def of(self, videos: Iterable[Loose]) -> Rows:
        """The rows of some videos; those whose caches are damaged or of another encoder are left out."""
        entries: list[Entry] = []
        segments: dict[str, Segment] = {}
        for video in videos:
            try:
                cache, segment = self._open(video.features, Fingerprint.of(video.features))
            except (OSError, ItemError):
                continue
            name = video.key[:16]
            segments[name] = segment
            entries.append(
                LooseEntry(
                    key=video.key,
                    root="",
                    path=quote(os.fsencode(video.name)),
                    size=0,
                    modified_ns=0,
                    end=float(segment.times[-1]),
                    rows=len(segment.rows),
                    features=cache,
                    segment=name,
                )
            )
        return Rows(entries, segments, {entry.key: 0 for entry in entries})

    def _read(self, path: Path, _: Fingerprint) -> tuple[str, Segment]:
        cache = FeatureCache.open(path)
        if self._prompts is None:
            self._prompts = encode_prompts(self._encoder)
        if not len(cache) or cache.features.shape[1] != self._prompts.shape[1]:
            raise ItemError(f"{path} is of another encoder", reason="cache_mismatch")
        noise = measure(cache.features, self._prompts)[None]
        return cache.features_sha256, Segment(cache.features, cache.timestamps, noise, np.zeros(1, np.int64))
