"""Pictures of the source at given times, at full size: what the frame cache is too small or too sparse to show.

A picture is decoded when it is asked for, and the last ones are kept. What one request costs is bounded: pictures of
the source are refused above `MAX_SOURCE_PIXELS`, and how many are asked for at once is the caller's to bound.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from timesearch.base.errors import ItemError
from timesearch.data.messages import Box
from timesearch.video.exact import read_timed_frames
from timesearch.video.probe import Fingerprint, probe

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
MAX_SOURCE_PIXELS = 64 * 2**20
"""Of a picture of the source: twice those of 8K. Its RGB takes three bytes each while it is cut."""
_KEPT = 64
"""Pictures of a video that are kept, each in the size in which the policy sees it."""


@dataclass(frozen=True)
class Glimpse:
    """A picture of the source, and the time (s) from which it is shown."""

    seconds: float
    image: Image


class Glimpses:
    """Pictures of one video file. Reads are safe from several threads."""

    def __init__(self, video: Path) -> None:
        self._video = video
        self._kept: OrderedDict[tuple[object, ...], Glimpse] = OrderedDict()
        self._lock = threading.Lock()
        self._state: Fingerprint | None = None
        self._size: tuple[int, int] | None = None

    def _look(self) -> None:
        """Forget what was read of another file at this path; what is kept of a file that is gone can still be seen."""
        with suppress(OSError):
            state = Fingerprint.of(self._video)
            if state != self._state:
                self._state, self._size = state, None
                self._kept.clear()

    def size(self) -> tuple[int, int]:
        """Width and height (pixels) of the pictures as shown.

        Raises:
            ItemError: the video is gone, cannot be read, or its pictures are larger than is read.
        """
        with self._lock:
            self._look()
            if self._size is not None:
                return self._size
            info = probe(self._video)
        if info.width * info.height > MAX_SOURCE_PIXELS:
            raise ItemError(
                f"{self._video} has pictures of {info.width} x {info.height} pixels: {MAX_SOURCE_PIXELS} at most are "
                "cut",
                reason="too_large",
            )
        self._size = info.width, info.height
        return self._size

    def at(self, seconds: Sequence[float], size: tuple[int, int], box: Box = WHOLE) -> list[Glimpse]:
        """The pictures on the screen at `seconds`, each once and in order of time, cut to `box` and scaled to `size`.

        Args:
            seconds: times from the first frame.
            size: width and height in pixels.
            box: the region, which holds a pixel at least.

        Raises:
            ItemError: the video cannot be decoded, or as `size`.
        """
        about = (size, box)
        with self._lock:
            self._look()
            found = {wanted: self._kept[wanted, *about] for wanted in seconds if (wanted, *about) in self._kept}
        missing = [wanted for wanted in seconds if wanted not in found]
        if missing:
            pictures = read_timed_frames(self._video, missing, size if box == WHOLE else None)
            for wanted, (shown, pixels) in zip(missing, pictures, strict=True):
                found[wanted] = Glimpse(shown, _cut(pixels, size, box))
        with self._lock:
            for wanted, each in found.items():
                self._kept[wanted, *about] = self._kept[each.seconds, *about] = each
                self._kept.move_to_end((wanted, *about))
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        once = {each.seconds: each for each in found.values()}
        return [once[time] for time in sorted(once)]


def _cut(pixels: np.ndarray, size: tuple[int, int], box: Box) -> Image:
    from PIL import Image

    image = Image.fromarray(pixels)
    if box == WHOLE:
        return image
    left, top, right, bottom = box
    edges = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    return image.resize(size, Image.Resampling.BICUBIC, box=edges)
