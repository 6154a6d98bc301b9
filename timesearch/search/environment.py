"""The search environment: what a policy sees of a video, and the tools by which it sees more (paper, Section 3.1).

One object serves training (it is what TRL's `environment_factory` makes: `reset` gets the dataset row, and every
public method is a tool) and inference. A further primitive is one more public method with its docstring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from timesearch.errors import CacheMismatchError, ItemError
from timesearch.files import inside
from timesearch.messages import Block, format_seconds
from timesearch.retrieval.features import FeatureCache
from timesearch.retrieval.selection import select_frames
from timesearch.search.prompts import Prompts
from timesearch.settings import Search
from timesearch.video.frames import FrameCache

if TYPE_CHECKING:
    from PIL.Image import Image


class QueryEncoder(Protocol):
    """What the environment needs of an encoder."""

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """Unit rows of shape (len(texts), D), float32."""
        ...


@dataclass(frozen=True)
class SearchedFrame:
    """A frame that a tool call returned."""

    call: int
    index: int
    seconds: float


class SearchEnvironment:
    """Preview and search over one video at a time.

    Args:
        settings: budgets and the selection method.
        encoder: embeds queries in the space of the feature caches.
        frames: folder of frame caches.
        features: folder of feature caches.
    """

    def __init__(self, settings: Search, encoder: QueryEncoder, frames: Path | str, features: Path | str) -> None:
        self._settings = settings
        self._encoder = encoder
        self._frames_root = Path(frames)
        self._features_root = Path(features)
        self._prompts = Prompts.load(settings.prompts)
        self._video: FrameCache | None = None
        self._features: FeatureCache | None = None
        self._name = ""
        self._question = ""
        self._searched: list[SearchedFrame] = []
        self._preview: list[int] = []
        self._calls = 0

    def reset(self, **row: Any) -> list[Block]:
        """Open the video of a sample and show it coarsely.

        Args:
            row: a sample's fields; `video`, `question` and `options` are used.

        Returns:
            Content blocks of the user message: a time and an image for each preview frame, then the question.

        Raises:
            ItemError: `missing_cache`, if the video has no frame or feature cache.
        """
        if row["video"] != self._name:
            self._open(row["video"])
        self._searched, self._calls = [], 0
        self._question = self._prompts.question(row["question"], row.get("options") or [])
        assert self._video is not None
        self._preview = preview_indices(len(self._video), self._video.size, self._settings)
        duration = format_seconds(float(self._video.timestamps[-1]))
        text = self._prompts.render("user", question=self._question, duration=duration)
        return [*self._show(self._preview), {"type": "text", "text": text}]

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
        assert self._video is not None and self._features is not None
        self._calls += 1
        try:
            window = self._window(query, start_time, end_time, num_frames)
        except ValueError as error:
            return [{"type": "text", "text": self._prompts.render("correction", problem=str(error))}]
        indices, wanted = window
        picked = select_frames(
            self._features.features[indices[0] : indices[1]],
            self._encoder.encode_text([query])[0],
            wanted,
            method=self._settings.method,
        )
        found = [int(index) + indices[0] for index in picked]
        self._searched += [SearchedFrame(self._calls, index, float(self._video.timestamps[index])) for index in found]
        return [*self._show(found), {"type": "text", "text": self._prompts.render("next", count=len(found))}]

    def _open(self, video: str) -> None:
        name = Path(video)
        frames = inside(self._frames_root, f"{name}.frames")
        features = inside(self._features_root, f"{name}.safetensors")
        for path, stage in ((frames, "frames"), (features, "features")):
            if not path.is_file():
                raise ItemError(f"{video}: {path} is missing: run the stage {stage!r} first", reason="missing_cache")
        self._video = FrameCache.open(frames)
        self._features = FeatureCache.open(features)
        if len(self._video) != len(self._features.timestamps):
            raise CacheMismatchError(
                f"{frames} holds {len(self._video)} frames and {features} {len(self._features.timestamps)}: "
                "run the stage 'features' again"
            )
        self._name = video

    def _show(self, indices: list[int]) -> list[Block]:
        assert self._video is not None
        blocks: list[Block] = []
        for index, image in zip(indices, self._video.read(indices), strict=True):
            blocks.append({"type": "text", "text": format_seconds(float(self._video.timestamps[index]))})
            blocks.append({"type": "image", "image": image})
        return blocks

    def _window(self, query: Any, start_time: Any, end_time: Any, num_frames: Any) -> tuple[tuple[int, int], int]:
        """Index range [first, last) and number of frames; ValueError tells the policy what to correct."""
        assert self._video is not None
        times = self._video.timestamps
        if not isinstance(query, str) or not query.strip():
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
        return (first, last), int(min(count, self._settings.max_frames_per_turn, last - first))

    def _searched_indices(self) -> list[int]:
        """Cache indices of all frames that were searched, each once, in order of time."""
        return sorted({frame.index for frame in self._searched})

    def _reanswer_content(self) -> list[Block] | None:
        """Blocks of the re-answer request: the searched frames alone, then the question; None without frames."""
        indices = self._searched_indices()
        if not indices:
            return None
        text = self._prompts.render("reanswer", question=self._question)
        return [*self._show(indices), {"type": "text", "text": text}]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(f"{name} must be a number")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number")
    return number


def preview_indices(total: int, size: tuple[int, int], settings: Search) -> list[int]:
    """Frames of the preview: evenly spread, as many as the token budget and `max_frames` allow.

    Args:
        total: frames of the video.
        size: width and height of a cached frame in pixels.
        settings: `total_video_tokens`, `max_frames` and `patch` are used.

    Returns:
        Increasing indices; each is the middle of an equal share of the video.
    """
    tokens = max(1, (size[0] // settings.patch) * (size[1] // settings.patch))
    count = max(1, min(total, settings.max_frames, settings.total_video_tokens // tokens))
    return [int((position + 0.5) * total / count) for position in range(count)]
