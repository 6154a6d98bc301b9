"""The caches of one video, opened once for all episodes about it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from timesearch.base.errors import ItemError
from timesearch.base.files import inside
from timesearch.data.messages import Block, Box, format_exact, format_seconds
from timesearch.retrieval.features import FeatureCache
from timesearch.video.frames import FrameCache, Look
from timesearch.video.glimpses import Glimpse, Glimpses
from timesearch.video.subtitles import Subtitles, index_path

if TYPE_CHECKING:
    from PIL.Image import Image

    from timesearch.retrieval.encoder import Encoder


class Video:
    """A video's frames and their features. Reads are safe from several threads.

    Args:
        name: path of the video below the videos folder, as samples write it.
        frames: its frame cache.
        features: its feature cache.
        subtitles: the index of what is said in it, if there is one.
        source: the video file itself, for pictures of it; None where it is not known.
        encoded: image blocks carry the JPEG bytes of the frame cache under ``jpeg`` in place of a decoded ``image``.

    Raises:
        ItemError: `damaged_cache` or `damaged_subtitles`.
        CacheMismatchError: the features belong to other frames.
    """

    def __init__(
        self, name: str, frames: Path, features: Path, subtitles: Path | None, source: Path | None, encoded: bool
    ) -> None:
        self.name = name
        self.source = Glimpses(source) if source is not None else None
        self.frames = FrameCache.open(frames)
        self.features = FeatureCache.open(features)
        self.subtitles = Subtitles(subtitles) if subtitles is not None else None
        self._encoded = encoded
        self._previews: dict[tuple[tuple[Look, ...], tuple[int, int]], list[Block]] = {}
        self.features.verify()
        self.features.require_frames(self.frames)

    def show(self, looks: Sequence[tuple[int, float | None]], size: tuple[int, int]) -> list[Block]:
        """A time and an image for each frame, scaled to `size` (width, height, pixels) where that is another.

        Args:
            looks: index of each frame, and when it is looked at (s); None for the time from which it is shown.
            size: as above.
        """
        indices = [index for index, _ in looks]
        if size == self.frames.size and self._encoded:
            pixels: list[Block] = [{"type": "image", "jpeg": self.frames.jpeg(index)} for index in indices]
        else:
            images = self.frames.read(indices)
            if size != self.frames.size:
                images = [image.resize(size) for image in images]
            pixels = [
                {"type": "image", "jpeg": _jpeg(image)} if self._encoded else {"type": "image", "image": image}
                for image in images
            ]
        blocks: list[Block] = []
        for (index, seconds), pixel in zip(looks, pixels, strict=True):
            seconds = float(self.frames.timestamps[index]) if seconds is None else seconds
            blocks.append({"type": "text", "text": format_seconds(seconds)})
            blocks.append({**pixel, "frame": index, "seconds": seconds})
        return blocks

    def show_source(self, pictures: Sequence[Glimpse], box: Box) -> list[Block]:
        """A time and an image for each picture of the source, of which it shows the region `box`."""
        blocks: list[Block] = []
        for each in pictures:
            pixel: Block = {"type": "image"}
            pixel |= {"jpeg": _jpeg(each.image)} if self._encoded else {"image": each.image}
            blocks.append({"type": "text", "text": format_exact(each.seconds)})
            blocks.append({**pixel, "box": list(box), "seconds": each.seconds})
        return blocks

    def preview(self, looks: Sequence[Look], size: tuple[int, int]) -> list[Block]:
        """`show`, made once for all questions about the video."""
        key = (tuple(looks), size)
        if key not in self._previews:
            self._previews[key] = self.show(looks, size)
        return self._previews[key]


def open_video(
    name: str,
    frames: Path,
    features: Path,
    encoder: Encoder,
    encoded: bool = False,
    subtitles: Path | None = None,
    source: Path | None = None,
) -> Video:
    """Open the caches of the video `name` in these folders; the last few stay open. Only `subtitles` may lack it, and
    `source`, the video file itself, may be gone.

    Raises:
        ItemError: `unsafe_path`, `missing_cache` or `damaged_cache`.
        CacheMismatchError: the features belong to other frames, or were made by another encoder.
    """
    paths = (inside(frames, f"{name}.frames"), inside(features, f"{name}.safetensors"))
    for path, stage in zip(paths, ("frames", "features"), strict=True):
        if not path.is_file():
            raise ItemError(f"{name}: {path} is missing: run the stage {stage!r} first", reason="missing_cache")
    said = index_path(subtitles, name) if subtitles is not None else None
    if said is not None and not said.is_file():
        said = None
    times = tuple(path.stat().st_mtime_ns for path in (*paths, said) if path is not None)
    opened = _opened(name, *paths, said, source, times, encoded)
    opened.features.require_encoder(encoder)
    return opened


@lru_cache(maxsize=8)
def _opened(
    name: str,
    frames: Path,
    features: Path,
    subtitles: Path | None,
    source: Path | None,
    times: tuple[int, ...],
    encoded: bool,
) -> Video:
    """The files' `times` (ns) are part of the key, so that a rebuilt cache is opened anew."""
    return Video(name, frames, features, subtitles, source, encoded)


def _jpeg(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
