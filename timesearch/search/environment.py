"""The search environment: what a policy sees of a video, and the tools by which it sees more (paper, Section 3.1).

One object serves training (it is what TRL's `environment_factory` makes: `reset` gets the dataset row, and every
public method is a tool) and inference. A further primitive is one more public method with its docstring.
"""

from __future__ import annotations

import inspect
import io
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from timesearch.errors import ItemError
from timesearch.files import inside
from timesearch.messages import Block, format_seconds, neutralise
from timesearch.retrieval.features import FeatureCache
from timesearch.retrieval.selection import select_frames
from timesearch.search.budget import preview_plan, searched_size
from timesearch.search.prompts import Prompts
from timesearch.settings import Search
from timesearch.video.frames import FrameCache

if TYPE_CHECKING:
    from PIL.Image import Image

    from timesearch.retrieval.encoder import Encoder

QUERY_CHARS = 500
"""A longer query is no description of a frame, and no text encoder reads that far."""


@dataclass(frozen=True)
class SearchedFrame:
    """A frame that a tool call returned."""

    call: int
    index: int
    seconds: float


class SearchEnvironment:
    """Preview and search over one video at a time.

    An image block is ``{"type": "image", "image": PIL, "frame": index in the frame cache, "seconds": time}``.

    Args:
        settings: budgets and the selection method.
        encoder: embeds queries in the space of the feature caches.
        frames: folder of frame caches.
        features: folder of feature caches.
        encoded: image blocks carry the JPEG bytes of the frame cache under ``jpeg`` in place of a decoded ``image``:
            for engines behind HTTP, which decode for themselves.
    """

    def __init__(
        self,
        settings: Search,
        encoder: Encoder,
        frames: Path | str,
        features: Path | str,
        encoded: bool = False,
    ) -> None:
        self._settings = settings
        self._encoder = encoder
        self._frames_root = Path(frames)
        self._features_root = Path(features)
        self._encoded = encoded
        self._prompts = Prompts.load(settings.prompts)
        self._video: _Video | None = None
        self._question = ""
        self._searched: list[SearchedFrame] = []
        self._preview: list[int] = []
        self._calls = 0
        self._room: int | None = None

    def reset(self, **row: Any) -> list[Block]:
        """Open the video of a sample and show it coarsely.

        Args:
            row: a sample's fields; `video`, `question` and `options` are used.

        Returns:
            Content blocks of the user message: a time and an image for each preview frame, then the question.

        Raises:
            ItemError: `missing_cache` or `damaged_cache`.
            CacheMismatchError: the features belong to other frames, or were made by another encoder.
        """
        self._enter(row)
        video = self._opened
        self._preview, size = preview_plan(len(video.frames), video.frames.size, self._settings)
        duration = format_seconds(float(video.frames.timestamps[-1]))
        return [
            *video.preview(self._preview, size),
            *self._say("user", question=self._question, duration=duration),
        ]

    def seek_video_frames(
        self, query: str, start_time: float = 0.0, end_time: float = -1.0, num_frames: int = 8
    ) -> list[Block]:
        """Find the frames of the video that match a description, within a window of time.

        Args:
            query: What the frames should show, in a few words.
            start_time: Start of the window in seconds.
            end_time: End of the window in seconds; -1 stands for the end of the video.
            num_frames: How many frames to return at most.

        Returns:
            The frames, each after its time in seconds.
        """
        self._calls += 1
        if self._calls >= self._settings.max_turns or self._room == 0:
            return self._say("overflow")
        spent = self._calls == self._settings.max_turns - 1
        try:
            (first, last), wanted = self._window(query, start_time, end_time, num_frames)
        except ValueError as error:
            return [*self._say("correction", problem=error), *(self._say("overflow") if spent else [])]
        picked = select_frames(
            self._opened.features.features[first:last],
            self._encoder.encode_text([query])[0],
            wanted,
            method=self._settings.method,
        )
        found = [int(index) + first for index in picked]
        times = self._opened.frames.timestamps
        self._searched += [SearchedFrame(self._calls, index, float(times[index])) for index in found]
        return [*self._show(found), *self._say("overflow" if spent else "next", count=len(found))]

    def _tools(self) -> dict[str, Any]:
        """The tools by name: the public methods, found by the rule that TRL follows."""
        members = inspect.getmembers(type(self), predicate=inspect.isfunction)
        return {name: getattr(self, name) for name, _ in members if name != "reset" and not name.startswith("_")}

    def _call(self, name: str, arguments: dict[str, Any]) -> list[Block]:
        """Carry out a tool call that a policy wrote; a wrong one is answered by what to correct."""
        tools = self._tools()
        if name not in tools:
            known = " or ".join(tools)
            return self._say("correction", problem=f"there is no tool {neutralise(name)[:50]!r}, only {known}")
        try:
            inspect.signature(tools[name]).bind(**arguments)
        except TypeError as error:
            return self._say("correction", problem=neutralise(str(error))[:100])
        return tools[name](**arguments)

    def _enter(self, row: dict[str, Any]) -> None:
        """Open a sample's video and forget the episode before."""
        self._video = self._open(row["video"])
        self._searched, self._preview, self._calls, self._room = [], [], 0, None
        self._question = neutralise(self._prompts.question(row["question"], row.get("options") or []))

    @property
    def _opened(self) -> _Video:
        assert self._video is not None, "reset comes before a tool call"
        return self._video

    def _open(self, video: str) -> _Video:
        frames = inside(self._frames_root, f"{video}.frames")
        features = inside(self._features_root, f"{video}.safetensors")
        for path, stage in ((frames, "frames"), (features, "features")):
            if not path.is_file():
                raise ItemError(f"{video}: {path} is missing: run the stage {stage!r} first", reason="missing_cache")
        times = (frames.stat().st_mtime_ns, features.stat().st_mtime_ns)
        opened = _open_video(frames, features, times, self._encoded)
        opened.features.require_encoder(self._encoder)
        return opened

    def _say(self, part: str, **values: object) -> list[Block]:
        return [{"type": "text", "text": self._prompts.render(part, **values)}]

    def _window(self, query: Any, start_time: Any, end_time: Any, num_frames: Any) -> tuple[tuple[int, int], int]:
        """Index range [first, last) and number of frames; ValueError tells the policy what to correct."""
        times = self._opened.frames.timestamps
        if not isinstance(query, str) or not query.strip() or len(query) > QUERY_CHARS:
            raise ValueError("query must be a few words of text")
        start, end = _number("start_time", start_time), _number("end_time", end_time)
        count = _number("num_frames", num_frames)
        if end < 0:
            end = float(times[-1])
        if start > end:
            raise ValueError(f"start_time {start:g} lies after end_time {end:g}")
        if count < 1:
            raise ValueError("num_frames must be 1 or more")
        first = int(np.searchsorted(times, start - 1e-6, side="left"))
        last = int(np.searchsorted(times, end + 1e-6, side="right"))
        if first >= last:
            raise ValueError(
                f"no frame lies between {start:g} and {end:g} seconds: the video ends at {times[-1]:.1f} seconds"
            )
        room = self._settings.max_frames_per_turn if self._room is None else self._room
        return (first, last), int(min(count, self._settings.max_frames_per_turn, room, last - first))

    def _searched_indices(self) -> list[int]:
        """Cache indices of all frames that were searched, each once, in order of time."""
        return sorted({frame.index for frame in self._searched})

    def _reanswer_content(self) -> list[Block] | None:
        """Blocks of the re-answer request: the searched frames alone, then the question; None without frames."""
        indices = self._searched_indices()
        return self._answer_content(indices) if indices else None

    def _answer_content(self, indices: list[int]) -> list[Block]:
        """Blocks that ask for the answer from the frames `indices` alone."""
        return [*self._show(indices), *self._say("reanswer", question=self._question)]

    def _show(self, indices: list[int]) -> list[Block]:
        """A time and an image for each of the frames `indices`, as search shows them."""
        return self._opened.show(indices, searched_size(self._opened.frames.size, self._settings))


class _Video:
    """A video's two caches, opened once for all episodes on it. Reads are safe from several threads."""

    def __init__(self, frames: Path, features: Path, encoded: bool) -> None:
        self.frames = FrameCache.open(frames)
        self.features = FeatureCache.open(features)
        self._encoded = encoded
        self._previews: dict[tuple[int, tuple[int, int]], list[Block]] = {}
        self.features.verify()
        self.features.require_frames(self.frames)

    def show(self, indices: list[int], size: tuple[int, int]) -> list[Block]:
        """A time and an image for each frame, scaled down to `size` (width, height) where that is another."""
        if size == self.frames.size and self._encoded:
            pixels: list[dict[str, Any]] = [{"jpeg": self.frames.jpeg(index)} for index in indices]
        else:
            images = self.frames.read(indices)
            if size != self.frames.size:
                images = [image.resize(size) for image in images]
            pixels = [{"jpeg": _jpeg(image)} if self._encoded else {"image": image} for image in images]
        blocks: list[Block] = []
        for index, pixel in zip(indices, pixels, strict=True):
            seconds = float(self.frames.timestamps[index])
            blocks.append({"type": "text", "text": format_seconds(seconds)})
            blocks.append({"type": "image", **pixel, "frame": index, "seconds": seconds})
        return blocks

    def preview(self, indices: list[int], size: tuple[int, int]) -> list[Block]:
        """`show`, made once for all questions about the video."""
        key = (len(indices), size)
        if key not in self._previews:
            self._previews[key] = self.show(indices, size)
        return self._previews[key]


@lru_cache(maxsize=8)
def _open_video(frames: Path, features: Path, times: tuple[int, int], encoded: bool) -> _Video:
    """Open a video's caches; the files' `times` (ns) are part of the key, so that a rebuilt cache is opened anew."""
    return _Video(frames, features, encoded)


def _jpeg(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(f"{name} must be a number")
    try:
        number = float(value.strip().removesuffix("s") if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number")
    return number
