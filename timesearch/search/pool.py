"""The frames of a video that are searched, and the times that are told of them, by the rules of a protocol."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from timesearch.search.protocol import Rules
from timesearch.video.frames import FrameCache


@dataclass(frozen=True)
class Pool:
    """Frames by their place among those that are searched.

    Attributes:
        frames: the cache that they are in.
        indices: (N,) increasing indices in the cache.
        times: (N,) seconds that are told of them.
        rate: frames a second.
        covering: whether a window takes in the frames around its ends.
    """

    frames: FrameCache
    indices: np.ndarray
    times: np.ndarray
    rate: float
    covering: bool

    @classmethod
    def of(cls, frames: FrameCache, rules: Rules) -> Pool:
        """The frames of a cache that are searched: all, or `searched_frames` from the first to the last."""
        total, rate = len(frames), float(frames.meta["fps"])
        indices = np.arange(total)
        if rules.searched_frames is not None and total > rules.searched_frames:
            indices = from_end_to_end(total, rules.searched_frames)
            rate = len(indices) / total * rate
        times = np.arange(len(indices)) / rate if rules.times == "index" else frames.timestamps[indices]
        return cls(frames, indices, times, rate, rules.window == "covering")

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def places(self) -> np.ndarray:
        """Where in the video each frame begins, (N,) in steps of the usual distance."""
        return self.frames.places[self.indices]

    def window(self, start: float, end: float) -> range:
        """Places of the frames of a window (s).

        A covering window goes from floor(start x rate) to ceil(end x rate), both included: at two frames a second, 10.3
        to 20.3 is 10.0 to 20.5.
        """
        if not self.covering:
            within = self.frames.window(start, end)
            first, last = np.searchsorted(self.indices, [within.start, within.stop])
            return range(int(first), int(last))
        total = len(self)
        first = math.floor(min(max(0.0, start * self.rate), total))
        last = math.ceil(min(max(-1.0, end * self.rate), total))
        return range(first, max(first, min(last + 1, total)))


def from_end_to_end(total: int, count: int) -> np.ndarray:
    """`count` of `total` indices, evenly from the first to the last, both included."""
    return np.round(np.linspace(0, total - 1, count)).astype(int)
