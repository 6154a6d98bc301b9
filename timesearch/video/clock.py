"""A video's times as they are meant: where its clock starts anew, wraps or stands still, frames still follow another.

Recordings that are joined byte by byte (MPEG-TS and PS, Ogg, Matroska) bring each its own clock. Times go on by one
frame where the clock falls back, and, as ffmpeg has it for formats that are joined so, where it leaps ahead by more
than ten seconds. One rule is applied to the packets in three places: by ffmpeg when frames are sampled (`Clock.setts`),
and by `Mender` where exact frames are read and where ground truth by frame number gets its times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame

_LEAP = 10
"""Seconds ahead beyond which a clock was set anew, in formats that are joined: ffmpeg's `dts_delta_threshold`."""
_NEAR = 1
"""Seconds within which an earlier clock goes on again: one packet alone was astray."""
_BACK = Fraction(1, 10)
"""Seconds back beyond which a clock was set anew, as in ffmpeg."""
_REORDERED = 8
"""Frames by which times may step back where Matroska states no decoding order."""
_FASTEST = 300
"""Frames a second beyond which a rate is what a demuxer makes of frames without distance."""
STILL = 8
"""Packets of one and the same time in a row from which a clock is taken to stand still."""


@dataclass(frozen=True)
class Clock:
    """The rule for one stream, in ticks of its time base.

    `step` is a frame at the stated rate, 0 where none is stated; falling back by more than `back` is a new clock;
    `leap` is how far ahead one is, and `joined` says whether to close such a gap. Of an `ordered` stream (raw H.264 and
    the like, without times) frames follow each other at `rate` (frames a second).
    """

    step: int
    back: int
    leap: int
    near: int
    joined: bool
    ordered: bool
    rate: Fraction | None

    @classmethod
    def of(cls, container: InputContainer, stream: Any) -> Clock:
        """The rule for a stream of a container."""
        from av.format import Flags

        flags = Flags(container.format.flags)
        joined, ordered = Flags.ts_discont in flags, Flags.no_timestamps in flags
        rate, tick = frame_rate(stream, ordered), stream.time_base
        step = round(1 / (rate * tick)) if rate and rate <= _FASTEST else 0
        back = round(_BACK / tick)
        return cls(
            step=step,
            back=back if joined else max(back, _REORDERED * step),
            leap=round(_LEAP / tick),
            near=round(_NEAR / tick),
            joined=joined,
            ordered=ordered,
            rate=rate,
        )

    def setts(self) -> str:
        """The rule as a bitstream filter of ffmpeg: what `Mender` does, in registers.

        0 is the offset, 1 the last time as meant, 2 the packets at that time, 3 the offset before, 4 the packet's own
        time, 5 how far it is ahead, 6 its time of showing, 7 whether there was a packet, 8 the latest time of showing
        as meant, 9 a spare place.
        """
        anew = f"st(3,ld(0));st(0,ld(8)+{self.step}-ld(6))"
        astray = f"lte(abs(ld(4)+ld(3)-ld(1)-{self.step}),{self.near})"
        other_clock = (
            f"st(2,0);if({astray},st(9,ld(0));st(0,ld(3));st(3,ld(9)),"
            f"if(lt(ld(5),-{self.back})+{int(self.joined)},{anew}))"
        )
        still = f"if(eq(ld(5),0),st(2,ld(2)+1);if(gte(ld(2),{STILL}),st(0,ld(0)+{self.step})),st(2,0))"
        follow = f"st(5,ld(4)+ld(0)-ld(1));if(lt(ld(5),-{self.back})+gt(ld(5),{self.leap}),{other_clock},{still})"
        latest = "st(8,if(ld(7),max(ld(8),ld(6)+ld(0)),ld(6)+ld(0)))"
        update = f"st(6,if(eq(PTS,NOPTS),DTS,PTS));if(ld(7),{follow});st(1,ld(4)+ld(0));{latest};st(7,1)"
        rule = f"st(4,if(eq(DTS,NOPTS),PTS,DTS));if(eq(ld(4),NOPTS),0,{update})"
        return "setts=" + ":".join(
            f"{name.lower()}='{rule};if(eq({name},NOPTS),NOPTS,{name}+ld(0))'" for name in ("PTS", "DTS")
        )


class Mender:
    """Gives the packets of a stream, which come in the file's order, the times that are meant."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.offset = self._before = self._still = 0
        self._last = self._latest = -math.inf

    def mend(self, packet: Packet) -> None:
        """Move a packet's times."""
        own = packet.pts if packet.dts is None else packet.dts
        if own is None:
            return
        shown = own if packet.pts is None else packet.pts
        if self._last > -math.inf:
            self._follow(own, shown)
        self._last = own + self.offset
        self._latest = max(self._latest, shown + self.offset)
        if self.offset:
            packet.pts = None if packet.pts is None else packet.pts + self.offset
            packet.dts = None if packet.dts is None else packet.dts + self.offset

    def _follow(self, own: int, shown: int) -> None:
        clock = self._clock
        ahead = own + self.offset - self._last
        if ahead < -clock.back or ahead > clock.leap:
            self._still = 0
            if abs(own + self._before - self._last - clock.step) <= clock.near:
                self.offset, self._before = self._before, self.offset
            elif ahead < -clock.back or clock.joined:
                self.offset, self._before = int(self._latest) + clock.step - shown, self.offset
        elif ahead == 0:
            self._still += 1
            self.offset += clock.step if self._still >= STILL else 0
        else:
            self._still = 0


class Times:
    """Presentation times (s) of a stream's frames, which come in the order in which the decoder gives them.

    A frame's time is its own or its packet's, whichever of the two fell back less often so far, as in ffmpeg: an AVI
    file states no times of showing. Where there is neither, a frame comes one step after the last.
    """

    def __init__(self, clock: Clock, tick: Fraction) -> None:
        self._clock, self._tick = clock, tick
        self._step = float(1 / clock.rate) if clock.rate else 0.0
        self._last: float | None = None
        self._shown = self._sent = -math.inf
        self._faults = {"shown": 0, "sent": 0}

    def of(self, frame: VideoFrame) -> float:
        """Time of the next frame."""
        stamp = None if self._clock.ordered else self._likelier(frame.pts, frame.dts)
        if stamp is not None:
            self._last = float(stamp * self._tick)
        else:
            self._last = 0.0 if self._last is None else self._last + self._step
        return self._last

    def _likelier(self, shown: int | None, sent: int | None) -> int | None:
        """`guess_correct_pts` of libavcodec's decode.c."""
        if sent is not None:
            self._faults["sent"] += sent <= self._sent
            self._sent = sent
        elif shown is not None:
            self._sent = shown
        if shown is not None:
            self._faults["shown"] += shown <= self._shown
            self._shown = shown
        elif sent is not None:
            self._shown = sent
        trusted = sent is None or self._faults["shown"] <= self._faults["sent"]
        return shown if shown is not None and trusted else sent


def mended_packets(container: InputContainer, stream: Any, mender: Mender) -> Iterator[Packet]:
    """The packets of a stream, with the times that are meant; the last one is empty."""
    for packet in container.demux(stream):
        mender.mend(packet)
        yield packet


def frame_rate(stream: Any, ordered: bool = False) -> Fraction | None:
    """Frames a second: as the container states them on average, or, of a stream without times, as its codec does."""
    said = (stream.codec_context.framerate, stream.average_rate) if ordered else (stream.average_rate,)
    return next((Fraction(rate) for rate in (*said, stream.guessed_rate) if rate), None)
