"""Which video files browsers play as they are, and what is made of the others so that they do, too.

A file in a container that browsers do not read, or with sound that they do not know, is copied into an MP4, its
pictures untouched; other codecs are encoded anew, smaller than 720p where that is needed. Both are kept, the ones that
were not used for longest go first. What is too long to be encoded is shown frame by frame.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from timesearch.base.errors import ItemError
from timesearch.base.files import atomic_path, json_digest
from timesearch.base.stopping import Stop
from timesearch.inference.ask import Say
from timesearch.video.probe import CONTAINERS, PROTOCOLS, Fingerprint, choose_stream, open_video, probe
from timesearch.video.sampling import as_sdr

if TYPE_CHECKING:
    from av.container import InputContainer

Making = Literal["copy", "encode"]
MP4, WEBM = "video/mp4", "video/webm"
_SAMPLE_TYPES = {
    "h264": "avc1.640028",
    "hevc": "hvc1.1.6.L120.B0",
    "vp8": "vp8",
    "vp9": "vp09.00.40.08",
    "av1": "av01.0.08M.08",
}
"""A usual profile of each codec (RFC 6381): what a browser is asked whether it can play."""
_DEEP_TYPES = {"hevc": "hvc1.2.4.L120.B0", "vp9": "vp09.02.40.10", "av1": "av01.0.08M.10"}
"""The same with ten bits a colour, which no browser plays in H.264."""
_SOUND_TYPES = {"aac": "mp4a.40.2", "mp3": "mp3", "opus": "opus", "flac": "flac", "vorbis": "vorbis"}
_IN_MP4 = (frozenset({"h264", "hevc", "vp9", "av1"}), frozenset({"aac", "mp3", "opus", "flac"}))
_IN_WEBM = (frozenset({"vp8", "vp9", "av1"}), frozenset({"opus", "vorbis"}))
_COPIED = frozenset({"h264", "vp9", "av1"})
"""Codecs that every browser of today plays in an MP4; HEVC only some do."""
_FLAT = frozenset({"yuv420p", "yuvj420p"})
_FLAT_AND_DEEP = _FLAT | {"yuv420p10le"}
_LARGEST_SIDE = 1280
_LONGEST_ENCODED = 2 * 3600.0
"""Seconds of a video that is encoded at most: some twenty minutes' work for two cores."""
_LARGEST = 8 * 2**30
"""Bytes of a file that is made at most."""
_KEPT = 16 * 2**30
"""Bytes of all that are kept."""
_THREADS = 2


@dataclass(frozen=True)
class Playable:
    """How a browser gets to play a video.

    `type` is what it should be asked whether it can play, for the file as it is; None where no browser plays it.
    `making` is what can be done where it does not, None where nothing can, and `why` then says so. `start` (s) is where
    on the player's clock the first frame is; `seconds` is the length, 0 where the file does not say.
    """

    type: str | None
    making: Making | None
    why: str
    start: float
    seconds: float

    @property
    def media_type(self) -> str:
        """The container's."""
        return (self.type or MP4).partition(";")[0]


def playable(video: Path) -> Playable:
    """Look into a file.

    Raises:
        ItemError: it is no video that can be used.
    """
    return _looked_into(video, _fingerprint(video))


def _fingerprint(video: Path) -> Fingerprint:
    try:
        return Fingerprint.of(video)
    except OSError as error:
        raise ItemError(f"{video.name} cannot be read ({error.strerror})", reason="missing_file") from error


@lru_cache(maxsize=4096)
def _looked_into(video: Path, _: Fingerprint) -> Playable:
    info = probe(video)
    with open_video(video) as container:
        stream = choose_stream(container, video)
        sound = _sound(container)
        codec, pixels = stream.codec_context.codec.canonical_name, stream.codec_context.pix_fmt or ""
        seconds = info.duration or (container.duration or 0) / 1e6
        formats = container.format.name.split(",")
    named = _type(codec, pixels, sound, formats, video.suffix.lower())
    copied = codec in _COPIED and pixels in (_FLAT if codec == "h264" else _FLAT_AND_DEEP)
    if copied and not info.clock.ordered:
        return Playable(named, "copy", "", info.start, seconds)
    if seconds <= _LONGEST_ENCODED:
        return Playable(named, "encode", "", info.start, seconds)
    hours = f"{_LONGEST_ENCODED / 3600:.0f} hours"
    why = f"Browsers do not play this video ({codec}), and it is longer than the {hours} that are encoded anew."
    return Playable(named, None, why, info.start, seconds)


def _sound(container: InputContainer) -> tuple[int, str] | None:
    """Index and codec of the stream that is heard: the first."""
    for stream in container.streams.audio:
        return stream.index, stream.codec_context.codec.canonical_name
    return None


def _type(codec: str, pixels: str, sound: tuple[int, str] | None, formats: list[str], suffix: str) -> str | None:
    """What a browser is asked about a file as it is."""
    if "mp4" in formats:
        container, (codecs, sounds) = MP4, _IN_MP4
    elif "webm" in formats and suffix == ".webm":
        container, (codecs, sounds) = WEBM, _IN_WEBM
    else:
        return None
    kind = (_SAMPLE_TYPES if pixels in _FLAT else _DEEP_TYPES if pixels in _FLAT_AND_DEEP else {}).get(codec)
    if kind is None or codec not in codecs or (sound is not None and sound[1] not in sounds):
        return None
    return (
        f'{container}; codecs="{kind}"' if sound is None else f'{container}; codecs="{kind}, {_SOUND_TYPES[sound[1]]}"'
    )


class Made:
    """The files that were made for browsers.

    Args:
        folder: where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def name(self, video: Path, making: Making) -> str:
        """What is made of a video as it is now is called this.

        Raises:
            ItemError: there is no such file.
        """
        now = _fingerprint(video)
        return json_digest([str(video.absolute()), now.size, now.modified_ns, making])[:24]

    def find(self, name: str) -> Path | None:
        """Where it is, if it has been made; it stays longer for being asked for."""
        path = self._folder / f"{name}.mp4"
        with suppress(OSError):
            os.utime(path)
            return path
        return None

    def make(self, video: Path, making: Making, say: Say, stop: Stop) -> None:
        """Make it.

        Args:
            video: a file that `playable` says can be made into one.
            making: copied or encoded.
            say: told how far it is.
            stop: gives it up.

        Raises:
            ItemError: it cannot be made.
            StoppedError: it was given up.
        """
        target = self._folder / f"{self.name(video, making)}.mp4"
        found = playable(video)
        what = "copying" if making == "copy" else "encoding"
        say(f"{what} {video.name} for the browser")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(video.stat().st_size)
            with atomic_path(target) as partial, tempfile.TemporaryFile("w+") as log:
                command = _command(video, partial, making)
                with (
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
                    ) as process,
                    stop.child(process),
                ):
                    assert process.stdout is not None
                    for line in process.stdout:
                        done = _share(line, found.seconds)
                        if done is not None:
                            say(f"{what} {video.name} for the browser: {done}%")
                stop.check()
                if process.returncode or partial.stat().st_size >= _LARGEST:
                    log.seek(0)
                    last = (log.read().strip().splitlines() or ["it would be too large"])[-1]
                    raise ItemError(f"{video.name} cannot be made fit for browsers ({last[-200:]})", "undecodable")
        except OSError as error:
            stop.check()
            raise ItemError(
                f"{video.name} cannot be made fit for browsers ({error.strerror}): make room", "no_room"
            ) from error

    def _make_room(self, coming: int) -> None:
        """Remove what was not used for longest, so that `coming` bytes more are within bounds."""
        held = sorted((path.stat().st_mtime, path) for path in self._folder.glob("*.mp4"))
        size = coming + sum(path.stat().st_size for _, path in held)
        for _, path in held:
            if size <= _KEPT:
                return
            size -= path.stat().st_size
            path.unlink(missing_ok=True)


def _share(line: str, seconds: float) -> int | None:
    """How much is done, in per cent, where a line of ffmpeg's progress tells."""
    key, _, value = line.strip().partition("=")
    if key != "out_time_us" or not value.isdecimal() or not seconds:
        return None
    return min(99, int(int(value) / 1e4 / seconds))


def _command(video: Path, target: Path, making: Making) -> list[str]:
    """The arguments of ffmpeg: an MP4 that can be played from its beginning, its progress on standard output."""
    import ffmpeg
    import imageio_ffmpeg

    info = probe(video)
    with open_video(video) as container:
        sound = _sound(container)
    source = ffmpeg.input(
        f"file:{video.absolute()}", threads=_THREADS, protocol_whitelist=PROTOCOLS, format_whitelist=CONTAINERS
    )
    pictures = source[str(info.stream)]
    options: dict[str, object] = {"c:v": "copy"}
    if making == "encode":
        size = _fitting(info.width, info.height)
        pictures = pictures.filter("yadif", deint="interlaced")
        pictures = as_sdr(pictures, size) if info.hdr else pictures.filter("scale", *size)
        pictures = pictures.filter("setsar", 1).filter("format", "yuv420p")
        options = {"c:v": "libx264", "preset": "veryfast", "crf": 23, "threads": _THREADS}
    streams = [pictures]
    if sound is not None:
        streams.append(source[str(sound[0])])
        kept = sound[1] in ("aac", "mp3", "opus") and making == "copy"
        options |= {"c:a": "copy"} if kept else {"c:a": "aac", "b:a": "128k", "ac": 2}
    output = ffmpeg.output(
        *streams,
        f"file:{target.absolute()}",
        format="mp4",
        movflags="+faststart",
        map_metadata=-1,
        fs=_LARGEST,
        **options,
    )
    arguments = output.global_args(
        "-hide_banner", "-nostdin", "-nostats", "-loglevel", "error", "-progress", "pipe:1", "-y"
    )
    command: list[str] = arguments.compile(imageio_ffmpeg.get_ffmpeg_exe())
    return command


def _fitting(width: int, height: int) -> tuple[int, int]:
    """Even sides, the longer one at most `_LARGEST_SIDE`."""
    shrink = min(1.0, _LARGEST_SIDE / max(width, height))
    return max(2, round(width * shrink / 2) * 2), max(2, round(height * shrink / 2) * 2)
