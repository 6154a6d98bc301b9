"""Source frames at given times, at full size: what the visual metrics compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from timesearch.errors import ItemError
from timesearch.video.probe import open_video, probe

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

_SEEK_GAP = 10.0
"""Seconds ahead beyond which seeking to a key frame is cheaper than decoding on."""
_ROUNDING = 0.05 + 1e-6
"""Seconds by which a recorded time may precede its frame: traces hold tenths of seconds."""


def read_frames(video: Path | str, seconds: Sequence[float], size: tuple[int, int] | None = None) -> list[np.ndarray]:
    """Decode the frames that are on the screen at `seconds`, or that come within a rounding of tenths and are nearer.

    The video is walked through once, forwards, with a seek over each long gap; nothing but the frames asked for is
    kept. Frames that are asked for twice are one array.

    Args:
        video: a video file.
        seconds: times from the start of the video, in any order.
        size: width and height in pixels to scale to; as decoded if None.

    Returns:
        RGB arrays (H, W, 3) uint8, in the order of `seconds`.

    Raises:
        ItemError: the video cannot be used; the reason says why.
    """
    import av

    video = Path(video)
    info = probe(video)
    found: dict[float, np.ndarray] = {}
    before: VideoFrame | None = None
    with open_video(video) as container:
        stream = next(stream for stream in container.streams.video if stream.index == info.stream)
        stream.thread_type = "AUTO"
        walk = _Walk(container, stream, info.start)
        try:
            for wanted in sorted(set(seconds)):
                frame = walk.nearest(wanted)
                if before is not frame or before is None:
                    array = _upright(frame, size)
                found[wanted], before = array, frame
        except av.FFmpegError as error:
            raise ItemError(f"{video} cannot be decoded: {error.strerror}", reason="undecodable") from error
    return [found[wanted] for wanted in seconds]


def _upright(frame: VideoFrame, size: tuple[int, int] | None) -> np.ndarray:
    """Pixels as shown: turned as the file's display matrix says, and scaled to `size` if given."""
    turns = frame.rotation // 90 % 4
    scale: dict[str, Any] = {}
    if size is not None:
        width, height = size[::-1] if turns % 2 else size
        scale = {"width": width, "height": height, "interpolation": "BICUBIC"}
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24", **scale), turns))


class _Walk:
    """A forward walk through the frames of a stream."""

    def __init__(self, container: InputContainer, stream: Any, start: float) -> None:
        self._container, self._stream, self._start = container, stream, start
        self._frames: Iterator[VideoFrame] = container.decode(stream)
        self._earlier: VideoFrame | None = None
        self._current: VideoFrame = next(self._frames)

    def _time(self, frame: VideoFrame) -> float:
        return float(frame.time or 0.0) - self._start

    def nearest(self, wanted: float) -> VideoFrame:
        """The frame shown at `wanted` (s), or the next where that is nearer and all but there; calls come in order."""
        if wanted - self._time(self._current) > _SEEK_GAP:
            self._seek(wanted)
        while self._time(self._current) < wanted:
            following = next(self._frames, None)
            if following is None:
                return self._current
            self._earlier, self._current = self._current, following
        if self._earlier is None:
            return self._current
        ahead, behind = self._time(self._current) - wanted, wanted - self._time(self._earlier)
        return self._earlier if behind <= ahead or ahead > _ROUNDING else self._current

    def _seek(self, wanted: float) -> None:
        """Go to the key frame before `wanted`; stay where the container leads elsewhere."""
        reached = self._time(self._current)
        self._container.seek(round((wanted + self._start) / self._stream.time_base), stream=self._stream)
        frame = next(self._frames_from_here(), None)
        if frame is None or not reached <= self._time(frame) <= wanted:
            self._container.seek(round(self._start / self._stream.time_base), stream=self._stream)
            frame = next(self._frames_from_here())
        self._earlier, self._current = None, frame

    def _frames_from_here(self) -> Iterator[VideoFrame]:
        self._frames = self._container.decode(self._stream)
        return self._frames
