"""Which pictures of a video are held, told by the times in its container, without decoding.

A cache keeps the first frame of each slot. At a variable rate the slots after one may be empty, and then the *last*
frame of that slot is what stays on the screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from timesearch.video.clock import Mender
from timesearch.video.probe import open_video
from timesearch.video.sampling import slot

if TYPE_CHECKING:
    from timesearch.video.probe import VideoInfo

MOST = 1000
"""Pictures that are asked for besides the first ones of their slots, at most: the command line of ffmpeg names each."""
MOMENT = 2.0
"""Seconds by which the sound of a film may be longer."""


def held(video: Path, info: VideoInfo, kept: Sequence[float], fps: float) -> tuple[list[float], float | None]:
    """What the first frames of the slots do not tell of a video.

    The last picture is held for as long as its stream says or the sound goes on; but the sound of a film at a steady
    rate may outlast its pictures by a `MOMENT`.

    Args:
        video: the file.
        info: what `probe` says of it.
        kept: increasing times (s from the first frame) of the frames that were kept.
        fps: slots a second.

    Returns:
        Times (s on the container's clock) of pictures that are held and are not the first of their slots, those held
        for longest where there are more than `MOST`; and when the last picture ends (s from the first frame), None if
        that is within its slot or the next.
    """
    import av

    slots = [slot(seconds, fps) for seconds in kept]
    steady = bool(np.all(np.diff(slots) <= 1))
    times: list[float] = []
    end = sound = 0.0
    mender = Mender(info.clock)
    with open_video(video) as container:
        stated = (container.duration or 0) / av.time_base + (container.start_time or 0) / av.time_base - info.start
        if steady and slot(stated, fps) <= slots[-1] + 1:
            return [], None
        try:
            for packet in container.demux([*container.streams.video, *container.streams.audio]):
                if packet.stream.index == info.stream:
                    mender.mend(packet)
                if packet.pts is None or packet.time_base is None or packet.is_discard:
                    continue
                seconds, length = float(packet.pts * packet.time_base), float((packet.duration or 0) * packet.time_base)
                if packet.stream.index == info.stream:
                    times.append(seconds)
                    end = max(end, seconds + length)
                elif packet.stream.type == "audio":
                    sound = max(sound, seconds + length)
        except av.FFmpegError:
            return [], None  # what can be decoded has been: a damaged end tells nothing of holds
    if mender.offset:
        sound = 0.0  # it goes by clocks that start anew
    own = np.unique([seconds for seconds in times if seconds >= info.start])
    last_of_slot = {slot(seconds - info.start, fps): seconds for seconds in own.tolist()}
    first_of_slot = {slot(seconds - info.start, fps): seconds for seconds in own[::-1].tolist()}
    filled = sorted(last_of_slot)
    end = (sound if sound > end + MOMENT or (not steady and sound > end) else end) - info.start
    lengths = {
        this: following - this
        for this, following in zip(filled, [*filled[1:], slot(end, fps)], strict=True)
        if following > this + 1 and last_of_slot[this] > first_of_slot[this]
    }
    longest = sorted(lengths, key=lambda place: -lengths[place])[:MOST]
    return sorted(last_of_slot[place] for place in longest), end if slot(end, fps) > slots[-1] + 1 else None
