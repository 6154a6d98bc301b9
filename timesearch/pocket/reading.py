"""Yardsticks for the hop world: what a frame shows, read from its pixels, and a search that goes by nothing else.

They show, without any model that was taught, that a question can be answered from its frames, and that the tools and
the encoder lead to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from timesearch.data.messages import times_of
from timesearch.pocket.hops import HOP_SHAPES, PLATE, WINDOW, Link, window_after
from timesearch.pocket.world import COLOURS, SIZE, shape_mask

if TYPE_CHECKING:
    from timesearch.search.search import Search

T = TypeVar("T")
_GRID = 32
"""Cells along the side of a silhouette, by which shapes are compared."""


@dataclass(frozen=True)
class Read:
    """What a frame of an event shows."""

    shape: str
    colour: str
    mark: str


def read_event(picture: Image.Image) -> Read | None:
    """The event in a picture of the hop world, of any size, read from its pixels; None where none is seen."""
    pixels = np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.int32)
    corner = SIZE - PLATE
    plate = pixels[corner + 1 :, corner + 1 :].mean(axis=2)
    if np.mean(plate < 45) < 0.3 or np.mean(plate > 190) < 0.05:
        return None
    rest = pixels.copy()
    rest[corner - 1 :, corner - 1 :] = 0
    palette = np.array(list(COLOURS.values()), dtype=np.int32)
    close = np.abs(rest[:, :, None] - palette).max(axis=3) < 60
    best = int(close.sum(axis=(0, 1)).argmax())
    shape, mark = _name(close[:, :, best]), _name(plate > 128)
    return Read(shape, list(COLOURS)[best], mark) if shape and mark else None


class Notes:
    """What was read so far, by the times (s) of the frames, and what follows from it."""

    def __init__(self) -> None:
        self._read: dict[float, Read] = {}

    def add(self, pictures: Iterable[tuple[float, Image.Image]]) -> None:
        """Read pictures and note those that show an event."""
        found = ((seconds, read_event(picture)) for seconds, picture in pictures)
        self._read |= {seconds: read for seconds, read in found if read is not None}

    def of(self, shape: str) -> Read | None:
        """What was read of a shape."""
        return next((read for read in self._read.values() if read.shape == shape), None)

    def first_seen(self, shape: str) -> float:
        """The earliest time (s) at which a shape was seen."""
        return min(seconds for seconds, read in self._read.items() if read.shape == shape)

    def next_after(self, shape: str) -> str | None:
        """The shape that was seen next, within `WINDOW`, after one that was seen; None where none was."""
        start = self.first_seen(shape)
        later = sorted(seconds for seconds in self._read if start < seconds <= start + WINDOW)
        return next((self._read[seconds].shape for seconds in later if self._read[seconds].shape != shape), None)

    def answer(self, shape: str, links: Sequence[Link]) -> str | None:
        """The colour at the end of links from a shape; None where a hop is missing."""
        at: str | None = shape
        for link in links:
            read = self.of(at) if at else None
            if read is None:
                return None
            at = read.mark if link == "points" else self.next_after(read.shape)
        read = self.of(at) if at else None
        return read.colour if read else None


def search_by_reading(search: Search, row: dict[str, Any], shape: str, links: Sequence[Link]) -> str | None:
    """Answer a question by searching for what the frames that were found name, and reading nothing else.

    Args:
        search: over the caches of the video; it is opened anew.
        row: the sample's fields.
        shape: that the question names.
        links: from it to the answer.

    Returns:
        The colour that was read; None where the turns did not do.
    """
    search.open(row)
    notes = Notes()
    end = search.video.frames.end

    def seek(known: Callable[[], T | None], query: str, windows: list[dict[str, float]]) -> T | None:
        """What is known, after as many of the searches as it takes."""
        while (value := known()) is None and windows and not search.spent:
            found = search.call("seek_video_frames", {"query": query, **windows.pop(0)})
            notes.add(zip(times_of(found), (block["image"] for block in found if "image" in block), strict=True))
        return value

    at: str | None = shape
    for link in (*links, None):
        if at is None:
            return None
        read = seek(partial(notes.of, at), at, [{}, {"end_time": end / 2}, {"start_time": end / 2}])
        if read is None:
            return None
        at = read.mark
        if link == "after":
            start, stop = window_after(notes.first_seen(read.shape))
            window: dict[str, float] = {"start_time": start, "end_time": stop}
            at = seek(partial(notes.next_after, read.shape), "shape", [window])
    return notes.answer(shape, links)


def _name(cells: np.ndarray) -> str | None:
    """The shape whose silhouette is nearest to the cells that are set, whatever their place and size."""
    seen = _silhouette(cells)
    if seen is None:
        return None
    return min(HOP_SHAPES, key=lambda shape: float(np.abs(_templates()[shape] - seen).mean()))


@cache
def _templates() -> dict[str, np.ndarray]:
    found = {shape: _silhouette(np.asarray(shape_mask(shape, 64)) > 127) for shape in HOP_SHAPES}
    return {shape: cells for shape, cells in found.items() if cells is not None}


def _silhouette(cells: np.ndarray) -> np.ndarray | None:
    """The box around the cells that are set, (_GRID, _GRID) in [0, 1]; None where hardly any is."""
    if cells.sum() < 40:
        return None
    rows, columns = np.flatnonzero(cells.sum(axis=1) > 1), np.flatnonzero(cells.sum(axis=0) > 1)
    if not len(rows) or not len(columns):
        return None
    box = Image.fromarray((cells[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] * 255).astype(np.uint8))
    return np.asarray(box.resize((_GRID, _GRID), Image.Resampling.BOX), dtype=np.float32) / 255
