"""What a video file is, found out before it is decoded, and why a broken one cannot be."""

from __future__ import annotations

import math
import stat
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timesearch.base.errors import ItemError
from timesearch.video.clock import Clock, Mender, Times, mended_packets

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,ogg,asf,nut,gif,ivf,obu,h264,hevc,"
    "av1,mxf,rm,dv,m4v,swf,wtv,vob"
)
"""Demuxers that may be used. Playlists are left out: a file that names other files or hosts must not be followed."""
PROTOCOLS = "file,pipe"
_SUFFIXES = (
    "264 265 26l 3g2 3gp 3gp2 3gpp asf av1 avc avi dif divx dv evo f4v flv gif h264 h265 h26l hevc ismv ivf m1v m2p "
    "m2t m2ts m2v m4v mj2 mjp2 mk3d mkv mod mov mp4 mp4v mpe mpeg mpg mpv mpv2 mp2v mts mxf nut obu ogg ogm ogv ogx ps "
    "psp qt rm rmvb swf tod tp trp ts vdr vob vro webm wm wmv wtv"
)
SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""What a video's name may end with, where a folder is searched for videos: all that the demuxers are known by."""
HDR_TRANSFERS = {16: "PQ (SMPTE 2084)", 18: "HLG (ARIB STD-B67)"}
"""`color_trc` codes (ITU-T H.273, table 3) of high dynamic range."""


_MOVES = 0.1
"""Share of the busiest stream's pictures from which another one is no row of stills beside it."""
_COUNTED = 256
"""Pictures of a stream after which it is known which ones move."""
_LEAD = 300
"""Packets without their key frame that a file may start with: the longest usual group of pictures."""


@dataclass(frozen=True)
class Fingerprint:
    """What changes when a file is written to."""

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        """Read it from the file system."""
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass(frozen=True)
class VideoInfo:
    """The video stream of a file.

    `width` and `height` are those of the picture as shown (rotated, square pixels); `start` (s) is the presentation
    time of its first frame on the container's clock, `lead` the packets before it that do not decode, as where a file
    starts in the middle of a group of pictures; `duration` (s) is None where the container states none.
    """

    stream: int
    codec: str
    width: int
    height: int
    clock: Clock
    start: float
    lead: int
    duration: float | None
    hdr: bool
    fingerprint: Fingerprint


def check_readable(path: Path) -> Fingerprint:
    """Return the fingerprint of a regular, non-empty, readable file.

    Raises:
        ItemError: `missing_file`, `symlink_loop`, `not_a_file`, `empty_file` or `unreadable`.
    """
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):  # a pipe would wait for a writer
            path.open("rb").close()
    except FileNotFoundError as error:
        raise ItemError(f"{path} does not exist", reason="missing_file") from error
    except PermissionError as error:
        raise ItemError(
            f"{path} may not be read: check its permissions and its folder's", reason="unreadable"
        ) from error
    except IsADirectoryError as error:
        raise ItemError(f"{path} is a folder", reason="not_a_file") from error
    except OSError as error:
        reason = "symlink_loop" if "symbolic" in (error.strerror or "") else "unreadable"
        raise ItemError(f"{path} cannot be opened: {error.strerror}", reason=reason) from error
    if not stat.S_ISREG(status.st_mode):
        raise ItemError(f"{path} is not a regular file", reason="not_a_file")
    if status.st_size == 0:
        raise ItemError(f"{path} is empty (0 bytes): fetch it again", reason="empty_file")
    return Fingerprint(status.st_size, status.st_mtime_ns, status.st_ino)


def open_video(path: Path) -> InputContainer:
    """Open a container with PyAV; only media demuxers and local files are allowed.

    That a file is cut off shows where its container says what should follow: MP4 and AVI here, MP4, Matroska and WebM
    in the sampling pass. MPEG-TS and PS, FLV, Ogg, ASF and raw streams may end anywhere, and what is left of them is
    a shorter video; that their files are whole is for the download to judge, by size and SHA-256.

    Raises:
        ItemError: `truncated` (an MP4 without its index, an AVI with fewer pictures than it says) or `not_a_video`.
    """
    import av

    with path.open("rb") as handle:
        head = handle.read(12)
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": PROTOCOLS}
    name = f"file:{path.absolute()}"
    try:
        if head[:4] == b"RIFF" and 8 + int.from_bytes(head[4:8], "little") > path.stat().st_size:
            with av.open(name, container_options=options) as container:
                _check_pictures(container, path)
        return av.open(name, container_options=options)
    except av.FFmpegError as error:
        if head[4:8] == b"ftyp":
            raise ItemError(
                f"{path} is cut off: its index (moov box) is missing; fetch it again", reason="truncated"
            ) from error
        raise ItemError(f"{path} is not a video file ({error.strerror})", reason="not_a_video") from error


def _check_pictures(avi: InputContainer, path: Path) -> None:
    """Refuse an AVI that lacks pictures: many are shorter than their RIFF header says, and whole.

    Recorders write a size that is off by some bytes, or never come to write one. How many pictures there should be
    stands in the stream's header.

    Raises:
        ItemError: `truncated`.
    """
    for stream in avi.streams.video[:1]:
        last = max((packet.dts for packet in avi.demux(stream) if packet.dts is not None), default=-1)
        if last + 1 < stream.frames:
            raise ItemError(
                f"{path} is cut off: {last + 1} of {stream.frames} pictures are there; fetch it again",
                reason="truncated",
            )


def choose_stream(container: InputContainer, path: Path) -> Any:
    """Of the streams that move, the one that the container marks as default, else the first; covers are no videos.

    Raises:
        ItemError: `no_video_stream`.
    """
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise ItemError(f"{path} holds no video stream (audio only?)", reason="no_video_stream")
    if len(streams) > 1:
        pictures = _pictures(path, [stream.index for stream in streams])
        most = max(pictures.values())
        streams = [stream for stream in streams if pictures[stream.index] >= _MOVES * most]
    return next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])


def _pictures(path: Path, indices: list[int]) -> dict[int, int]:
    """Pictures of each stream: as the container states them, else counted until one has had enough."""
    with open_video(path) as container:
        streams = [stream for stream in container.streams.video if stream.index in indices]
        if all(stream.frames for stream in streams):
            return {stream.index: stream.frames for stream in streams}
        found = dict.fromkeys(indices, 0)
        for packet in container.demux(streams):
            found[packet.stream_index] += bool(packet.size)
            if found[packet.stream_index] >= _COUNTED:
                break
        return found


def probe(path: Path | str) -> VideoInfo:
    """Read a video's properties by decoding its first frame.

    Raises:
        ItemError: with the reason why the file is no usable video.
    """
    path = Path(path)
    fingerprint = check_readable(path)
    with open_video(path) as container:
        stream = choose_stream(container, path)
        clock = Clock.of(container, stream)
        first, lead = _first_frame(container, stream, clock, path)
        aspect = stream.sample_aspect_ratio or Fraction(1)
        width, height = shown_size(first.width, first.height, aspect, first.rotation)
        return VideoInfo(
            stream=stream.index,
            codec=stream.codec_context.name,
            width=width,
            height=height,
            clock=clock,
            start=Times(clock, stream.time_base).of(first),
            lead=min(lead, _LEAD),
            duration=float(stream.duration * stream.time_base) if stream.duration else None,
            hdr=int(first.color_trc) in HDR_TRANSFERS,
            fingerprint=fingerprint,
        )


def _first_frame(container: InputContainer, stream: Any, clock: Clock, path: Path) -> tuple[VideoFrame, int]:
    """The first frame that decodes, and how many packets before it do not."""
    import av

    failed: list[str] = []
    try:
        for packet in mended_packets(container, stream, Mender(clock)):
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                failed.append(str(error.strerror))
                continue
            if frames:
                return frames[0], len(failed)
    except av.FFmpegError as error:
        failed.append(str(error.strerror))
    if failed:
        raise ItemError(f"{path}: its video cannot be decoded ({failed[0]})", reason="undecodable")
    raise ItemError(f"{path}: its video stream holds no frame", reason="no_frames")


def shown_size(width: int, height: int, aspect: Fraction, rotation: int) -> tuple[int, int]:
    """Width and height in square pixels as shown, for a coded size, a sample aspect ratio and a rotation (degrees)."""
    if aspect > 1:
        width = round(width * aspect)
    elif 0 < aspect < 1:
        height = round(height / aspect)
    return (height, width) if rotation % 180 else (width, height)


def smart_size(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen-VL's size rule: multiples of `factor`, between `min_pixels` and `max_pixels`, the shape nearly kept.

    Returns:
        Width and height in pixels.
    """
    shown = width * height
    new_width, new_height = (max(factor, round(side / factor) * factor) for side in (width, height))
    if new_width * new_height > max_pixels:
        shrink = math.sqrt(shown / max_pixels)
        new_width, new_height = (max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height))
    elif new_width * new_height < min_pixels:
        grow = math.sqrt(min_pixels / shown)
        new_width, new_height = (math.ceil(side * grow / factor) * factor for side in (width, height))
    return new_width, new_height
