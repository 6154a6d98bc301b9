"""Source frames at given times, at full size: what the visual metrics compare.

What the frame cache takes is read here too, at the same times: by the same stream and clock, and past packets that are
damaged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from timesearch.base.errors import ItemError
from timesearch.video.clock import Mender, Times, mended_packets
from timesearch.video.probe import VideoInfo, open_video, probe
from timesearch.video.sampling import DAMAGE_ALLOWED

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame

_GAP = 10.0
"""Seconds ahead beyond which going to a key frame is cheaper than decoding on."""
_RUN_UP = 2.0
"""Seconds before a wanted frame at which decoding begins, for decoders that recover over some frames."""
_SEEKABLE = ("mov", "matroska", "avi")
"""Containers with an index of times. In others a seek finds what has such a time on some clock, or fails."""
_ROUNDING = 0.05 + 1e-6
"""Seconds by which a recorded time may precede its frame: traces hold tenths of seconds."""
_HELD = 64 * 2**20
"""Bytes of packets that are held while a key frame is looked for."""


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
    return [pixels for _, pixels in read_timed_frames(video, seconds, size)]


def read_timed_frames(
    video: Path | str, seconds: Sequence[float], size: tuple[int, int] | None = None
) -> list[tuple[float, np.ndarray]]:
    """As `read_frames`, each with the time (s) from which it is on the screen."""
    import av

    video = Path(video)
    info = probe(video)
    try:
        found = _read(video, info, seconds, size, careful=False)
    except av.FFmpegError:
        try:
            found = _read(video, info, seconds, size, careful=True)
        except av.FFmpegError as error:
            raise ItemError(f"{video} cannot be decoded: {error.strerror}", reason="undecodable") from error
    return [found[wanted] for wanted in seconds]


def _read(
    video: Path, info: VideoInfo, seconds: Sequence[float], size: tuple[int, int] | None, careful: bool
) -> dict[float, tuple[float, np.ndarray]]:
    """The frame of each time, after the time from which it is shown.

    Args:
        video: the file.
        info: what `probe` says of it.
        seconds: as `read_frames`.
        size: as `read_frames`.
        careful: pass over damaged packets, one after the other, without a seek.

    Raises:
        av.FFmpegError: a packet is damaged, or a seek failed.
        ItemError: `damaged_video`.
    """
    found: dict[float, tuple[float, np.ndarray]] = {}
    before: VideoFrame | None = None
    with open_video(video) as container:
        stream = next(stream for stream in container.streams.video if stream.index == info.stream)
        stream.thread_type = "NONE" if careful else "AUTO"
        walk = _Walk(container, stream, info, careful)
        for wanted in sorted(set(seconds)):
            shown, frame = walk.nearest(wanted)
            if before is not frame or before is None:
                array = _upright(frame, size)
            found[wanted], before = (shown, array), frame
        if walk.damaged - info.lead > DAMAGE_ALLOWED * max(walk.packets, _stated_packets(container, stream)):
            raise ItemError(
                f"{video} is damaged: {walk.damaged} of its frames do not decode; fetch it again",
                reason="damaged_video",
            )
    return found


def _stated_packets(container: InputContainer, stream: Any) -> float:
    """How many packets a stream has by what its container states; 0 if nothing."""
    rate = float(stream.average_rate or 0)
    return float(stream.frames or _stated_seconds(container, stream) * rate)


def _stated_seconds(container: InputContainer, stream: Any) -> float:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1_000_000


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

    def __init__(self, container: InputContainer, stream: Any, info: VideoInfo, careful: bool) -> None:
        self._container, self._stream, self._info, self._careful = container, stream, info, careful
        self.packets = self.damaged = 0
        self._earlier: tuple[float, VideoFrame] | None = None
        self._begin()
        first = next(self._frames, None)
        if first is None:
            raise ItemError(f"{container.name}: its video stream holds no frame", reason="no_frames")
        self._current = first

    def _begin(self) -> None:
        """Read on from where the container stands."""
        self._mender = Mender(self._info.clock)
        self._times = Times(self._info.clock, self._stream.time_base)
        self._packets = mended_packets(self._container, self._stream, self._mender)
        self._held: deque[Packet] = deque()
        self._frames = self._decode()

    def _decode(self) -> Iterator[tuple[float, VideoFrame]]:
        import av

        while True:
            packet = self._held.popleft() if self._held else next(self._packets, None)
            if packet is None:
                return
            self.packets += 1
            try:
                frames = packet.decode()
            except av.FFmpegError:
                if not self._careful:
                    raise
                self.damaged += 1
                continue
            for frame in frames:
                yield self._times.of(frame) - self._info.start, frame

    def nearest(self, wanted: float) -> tuple[float, VideoFrame]:
        """The frame shown at `wanted` (s), or the next where that is nearer and all but there, after its own time.

        Calls come in order.
        """
        if wanted - self._current[0] > _GAP:
            self._go_on(wanted)
        while self._current[0] < wanted:
            following = next(self._frames, None)
            if following is None:
                return self._current
            self._earlier, self._current = self._current, following
        if self._earlier is None:
            return self._current
        ahead, behind = self._current[0] - wanted, wanted - self._earlier[0]
        return self._earlier if behind <= ahead or ahead > _ROUNDING else self._current

    def _go_on(self, wanted: float) -> None:
        """Go to a key frame before `wanted`: by a seek where the times are those of the file's index."""
        indexed = self._container.format.name.startswith(_SEEKABLE) and not self._mender.offset
        if indexed and not self._careful and wanted <= _stated_seconds(self._container, self._stream):
            self._seek(wanted)
        elif not self._info.clock.ordered:
            self._skip(wanted)

    def _seek(self, wanted: float) -> None:
        """Stay where the container leads elsewhere."""
        reached, start = self._current[0], self._info.start
        self._container.seek(round((wanted + start) / self._stream.time_base), stream=self._stream)
        self._begin()
        found = next(self._frames, None)
        if found is None or not reached <= found[0] <= wanted:
            self._container.seek(round(start / self._stream.time_base), stream=self._stream)
            self._begin()
            found = next(self._frames)
        self._earlier, self._current = None, found

    def _skip(self, wanted: float) -> None:
        """Leave the packets before a key frame undecoded."""
        held: list[Packet] = []
        weight, skipped = 0, False
        for packet in self._packets:
            stamp = packet.pts if packet.dts is None else packet.dts
            time = None if stamp is None else float(stamp * self._stream.time_base) - self._info.start
            if packet.is_keyframe and time is not None and time <= wanted - _RUN_UP:
                self.packets += len(held)
                held, weight, skipped = [], 0, True
            held.append(packet)
            weight += packet.size
            if weight > _HELD or (time is not None and time > wanted):
                break
        self._held.extend(held)
        if skipped:
            self._stream.codec_context.flush_buffers()
            self._frames = self._decode()
            self._earlier, self._current = None, next(self._frames, self._current)
