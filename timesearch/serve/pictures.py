"""Single pictures of videos for the page: from the frame cache, or decoded from the file where there is none yet."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict

from timesearch.base.files import json_digest
from timesearch.serve.shelf import Held
from timesearch.video.exact import read_frames
from timesearch.video.probe import probe, smart_size

WIDTHS = (320, 960)
"""Pixels: of a card, and of a view."""
_QUALITY = 80
_HELD = 64 * 2**20
"""Bytes of pictures that stay in memory."""


class Pictures:
    """Makes JPEGs, and keeps those that were used last; may be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._size = 0

    def tag(self, held: Held, seconds: float, width: int) -> str:
        """What changes when the picture does: the file's state, its caches', the time and the size."""
        return f'"{json_digest([held.cache, held.is_prepared(), round(seconds, 2), width])[:24]}"'

    def at(self, held: Held, seconds: float, width: int) -> bytes:
        """The picture on the screen at a time (s), or the last one, `width` pixels wide or as wide as it is.

        Raises:
            ItemError: the video cannot be used.
        """
        tag = self.tag(held, seconds, width)
        with self._lock:
            if tag in self._kept:
                self._kept.move_to_end(tag)
                return self._kept[tag]
        made = _make(held, seconds, width)
        with self._lock:
            self._size += len(made) - len(self._kept.pop(tag, b""))
            self._kept[tag] = made
            while self._size > _HELD:
                self._size -= len(self._kept.popitem(last=False)[1])
        return made


def _make(held: Held, seconds: float, width: int) -> bytes:
    from PIL import Image

    frames = held.frames()
    if frames is not None and (frames.size[0] >= width or width == min(WIDTHS)):
        index = frames.nearest(seconds)
        if frames.size[0] <= width:
            return frames.jpeg(index)
        image = frames[index]
    else:
        info = probe(held.path)
        pixels = width * max(1, round(width * info.height / info.width))
        size = smart_size(info.width, info.height, 2, 16, min(pixels, info.width * info.height))
        image = Image.fromarray(read_frames(held.path, [seconds], size)[0])
    if image.width > width:
        image = image.resize((width, max(1, round(width * image.height / image.width))))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
