"""The one ffmpeg pass that turns a video into JPEGs: decode, sample, then scale (and more) what was kept.

ffmpeg's MJPEG is read through a pipe in NUT, a container that carries each frame's exact presentation time, so that
neither pixels nor times touch the disk before they lie in the cache.
"""

from __future__ import annotations

import errno
import re
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from timesearch.base.errors import ItemError
from timesearch.base.stopping import NEVER, Stop
from timesearch.video.clock import STILL
from timesearch.video.probe import CONTAINERS, PROTOCOLS, VideoInfo

if TYPE_CHECKING:
    from timesearch.settings import Frames

_TOLERANCE = 0.001
"""Seconds by which a frame may precede its slot: Matroska rounds times to milliseconds."""
DAMAGE_ALLOWED = 0.01
"""Share of a video's frames that may be damaged: a broadcast recording has some, a broken file many."""
_ACCURATE = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
"""swscale's exact arithmetic: only the kept frames are scaled, so that it costs little."""
PIXELS = "yuvj444p"
"""Pixel format of the JPEGs. With half the chroma samples (4:2:0), SSIM of RGB falls to 0.92 on saturated edges."""
_SMALL = 256 * 256
"""Frames of fewer pixels take a finer quantiser: they need it for an SSIM of 0.98, and are few bytes anyway."""
_MATRIX = (
    (8, 16, 19, 22, 26, 27, 29, 34),
    (16, 16, 22, 24, 27, 29, 34, 37),
    (19, 22, 26, 27, 29, 34, 34, 38),
    (22, 22, 26, 27, 29, 34, 37, 40),
    (22, 26, 27, 29, 32, 35, 40, 48),
    (26, 27, 29, 32, 35, 40, 48, 58),
    (26, 27, 29, 34, 38, 46, 56, 69),
    (27, 29, 35, 38, 46, 56, 69, 83),
)
"""ISO/IEC 11172-2, Section 2.4.3.2: the matrix for intra blocks, which ffmpeg takes for luma and chroma alike."""
_COARSER = {"intra_matrix": 1.25, "chroma_intra_matrix": 2.8}
"""Factors of that matrix for luma and chroma: a quarter of the bytes for 0.006 of RGB SSIM (`benchmarks/caches.py`)."""
_CUT_OFF = re.compile(r"partial file|File ended prematurely|\[in#0/(mov|matroska|avi)[^][]*+] corrupt input packet")
_SUMMARY = re.compile(r"\(video\): (\d{1,15}) packets read \([^()]*+\)[^()]*? (\d{1,15}) decode errors")
_SOURCE = re.compile(r"\[[^][]*+] ")


def sample_jpegs(
    video: Path,
    info: VideoInfo,
    size: tuple[int, int],
    settings: Frames,
    threads: int = 0,
    stop: Stop = NEVER,
    also: Sequence[float] = (),
) -> Generator[tuple[float, bytes], None, None]:
    """Yield (seconds from the first frame, JPEG) of the sampled frames as ffmpeg decodes them.

    Args:
        video: the file.
        info: what `probe` says of it.
        size: width and height of the JPEGs in pixels.
        settings: rate and quality.
        threads: of the decoder; 0 for one a core.
        stop: kills ffmpeg.
        also: increasing times (s on the container's clock) of frames to keep besides the first ones of their slots.

    Raises:
        ItemError: `truncated`, `damaged_video`, `no_times`, `no_frames` or `undecodable`, after the frames that decode.
        StoppedError: it was asked to stop.
        OSError: there is no room for ffmpeg's log, by which these are told.
    """
    import av

    kept = 0
    asked = {round(time, 4) for time in also}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        command = ffmpeg_command(video, info, size, settings, threads, also)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        try:
            with stop.child(process), av.open(process.stdout, mode="r", format="nut") as container:
                first, last, last_slot = 0.0, -1.0, -1
                for packet in container.demux(container.streams.video[0]):
                    if not packet.size or packet.pts is None or packet.time_base is None:
                        continue
                    time = float(packet.pts * packet.time_base)
                    first = time if kept == 0 else first
                    current = slot(time - first, settings.fps)
                    held = round(time, 4) in asked and time - first > last
                    if current > last_slot or held:  # where the picture changes its size, ffmpeg begins to sample anew
                        last, last_slot, kept = time - first, current, kept + 1
                        yield time - first, bytes(packet)
        except av.FFmpegError:
            pass  # no whole stream came: the log, below, says why
        except GeneratorExit:
            process.kill()
            raise
        finally:
            process.stdout.close()
            code = process.wait()
        stop.check()
        log.seek(0)
        _Verdict.read(log, code, kept).check(video, info)


def slot(seconds: float, fps: float) -> int:
    """Which slot of 1/fps seconds a frame at `seconds` after the first one belongs to."""
    return int((seconds + _TOLERANCE) * fps)


def _quality(size: tuple[int, int], qscale: int) -> dict[str, Any]:
    """ffmpeg's options for the JPEGs' quantisers."""
    if size[0] * size[1] < _SMALL:
        return {"qmin": 1, "q:v": qscale - 1}
    coarser = {
        name: ",".join(str(min(255, round(factor * value))) for row in _MATRIX for value in row)
        for name, factor in _COARSER.items()
    }
    return {"q:v": qscale, **coarser}


@dataclass
class _Verdict:
    """What ffmpeg's log says of a pass."""

    code: int
    kept: int
    packets: int = 0
    damaged: int = 0
    cut_off: bool = False
    last_error: str = ""

    @classmethod
    def read(cls, log: IO[str], code: int, kept: int) -> _Verdict:
        verdict = cls(code, kept)
        for line in log:
            verdict.cut_off |= bool(_CUT_OFF.search(line))
            verdict.damaged += "corrupt decoded frame" in line
            if summary := _SUMMARY.search(line):
                verdict.packets = int(summary[1])
                verdict.damaged += int(summary[2])
            elif "rror" in line:
                verdict.last_error = _SOURCE.sub("", line).strip()
        return verdict

    def check(self, video: Path, info: VideoInfo) -> None:
        """Raise the `ItemError` that fits, if any does."""
        if self.cut_off:
            raise ItemError(
                f"{video} is cut off: its file ends after {self.packets} frames; fetch it again", reason="truncated"
            )
        if self.damaged - info.lead > DAMAGE_ALLOWED * max(self.packets, 1):
            raise ItemError(
                f"{video} is damaged: {self.damaged} of {self.packets} frames do not decode whole; fetch it again",
                reason="damaged_video",
            )
        if self.code:
            raise ItemError(
                f"{video} cannot be decoded: {self.last_error or f'ffmpeg ended with {self.code}'}",
                reason="undecodable",
            )
        if self.kept and not self.packets:
            raise OSError(errno.ENOSPC, "No space left for ffmpeg's log", tempfile.gettempdir())
        if self.kept == 1 and self.packets > STILL and not info.clock.step:
            raise ItemError(
                f"{video}: its {self.packets} frames have one and the same time, and no rate is stated; write it anew "
                "at its rate (ffmpeg -r)",
                reason="no_times",
            )
        if not self.kept:
            raise ItemError(f"{video}: its video stream holds no frame", reason="no_frames")


def _among(times: Sequence[float]) -> str:
    """ffmpeg's expression for `t` being one of increasing `times`, by bisection."""
    if len(times) == 1:
        return f"lt(abs(t-{times[0]!r}),0.00005)"
    half = len(times) // 2
    return f"if(lt(t,{(times[half - 1] + times[half]) / 2!r}),{_among(times[:half])},{_among(times[half:])})"


def as_sdr(stream: Any, size: tuple[int, int]) -> Any:
    """A stream of ffmpeg's in PQ or HLG as BT.709 at 100 cd/m2, by Hable's curve, scaled to `size`.

    ITU-R BT.2100 fixes primaries and matrix to BT.2020.
    """
    stream = stream.filter("scale", *size, flags=_ACCURATE)
    stream = stream.filter("zscale", transfer="linear", npl=100, primariesin="bt2020", matrixin="bt2020nc")
    stream = stream.filter("format", "gbrpf32le").filter("zscale", primaries="bt709")
    stream = stream.filter("tonemap", "hable", desat=0)
    return stream.filter("zscale", transfer="bt709", matrix="bt709", range="tv").filter("format", "yuv444p")


def ffmpeg_command(
    video: Path,
    info: VideoInfo,
    size: tuple[int, int],
    settings: Frames,
    threads: int = 0,
    also: Sequence[float] = (),
) -> list[str]:
    """The arguments of the pass: NUT with MJPEG on standard output, a verbose log on standard error."""
    import ffmpeg
    import imageio_ffmpeg

    number = "floor(({}-" + f"({info.start!r})+{_TOLERANCE})*{settings.fps!r})"
    first_of_slot = f"isnan(prev_selected_t)+gt({number.format('t')},{number.format('prev_selected_t')})"
    stream = ffmpeg.input(
        f"file:{video.absolute()}",
        copyts=None,
        threads=threads,
        protocol_whitelist=PROTOCOLS,
        format_whitelist=CONTAINERS,
        **({} if info.clock.ordered else {f"bsf:{info.stream}": info.clock.setts()}),
    )[str(info.stream)]
    stream = stream.filter("select", f"{first_of_slot}+{_among(also)}" if also else first_of_slot)
    stream = stream.filter("estdif", mode="frame", deint="interlaced")  # needs no neighbours, which are gone by now
    if info.hdr:
        stream = as_sdr(stream, size)
    stream = stream.filter("scale", *size, flags=_ACCURATE, out_color_matrix="bt601", out_range="pc")
    stream = stream.filter("setsar", 1).filter("format", PIXELS)
    output = stream.output(
        "pipe:1",
        format="nut",
        vcodec="mjpeg",
        **_quality(size, settings.qscale),
        **{"fps_mode": "passthrough", "enc_time_base": "filter"},
    )
    arguments = output.global_args("-hide_banner", "-nostdin", "-nostats", "-loglevel", "verbose")
    command: list[str] = arguments.compile(imageio_ffmpeg.get_ffmpeg_exe())
    return command
