"""The one ffmpeg pass that turns a video into JPEGs: decode, sample, then scale what was kept.

ffmpeg's MJPEG is read through a pipe in NUT, a container that carries each frame's exact presentation time, so that
neither pixels nor times touch the disk before they lie in the cache.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from timesearch.errors import ItemError
from timesearch.settings import Frames
from timesearch.video.probe import CONTAINERS, PROTOCOLS, VideoInfo

_TOLERANCE = 0.001
"""Seconds by which a frame may precede its slot: Matroska rounds times to milliseconds."""


def sample_jpegs(
    video: Path, info: VideoInfo, size: tuple[int, int], settings: Frames
) -> Iterator[tuple[float, bytes]]:
    """Yield (seconds from the first frame, JPEG) of the sampled frames as ffmpeg decodes them.

    Raises:
        ItemError: `no_frames`, `truncated` or `undecodable`.
    """
    import av

    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            _command(video, info, size, settings), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
        )
        assert process.stdout is not None
        last_slot, first = -1, None
        try:
            with av.open(process.stdout, mode="r", format="nut") as container:
                for packet in container.demux(container.streams.video[0]):
                    if not packet.size or packet.pts is None:
                        continue
                    time = float(packet.pts * packet.time_base)
                    first = time if first is None else first
                    slot = int((time - first + _TOLERANCE) * settings.fps)
                    if slot > last_slot:
                        last_slot = slot
                        yield time - first, bytes(packet)
        except av.FFmpegError:
            pass  # ffmpeg wrote no whole stream; its exit code and log, below, say why
        finally:
            process.stdout.close()
            if process.poll() is None and first is None:
                process.kill()
            process.wait()
        log.seek(0)
        _check(video, process.returncode, log.read()[-4000:].decode("utf-8", "replace"), first is not None)


def _check(video: Path, code: int, log: str, any_frame: bool) -> None:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any(mark in log for mark in ("partial file", "File ended prematurely", "Truncat")):
        raise ItemError(f"{video} is cut off before its end: fetch it again", reason="truncated")
    if code or not any_frame:
        why = lines[-1] if lines else f"ffmpeg ended with code {code}"
        raise ItemError(f"{video} cannot be decoded: {why}", reason="undecodable")


def _command(video: Path, info: VideoInfo, size: tuple[int, int], settings: Frames) -> list[str]:
    """The ffmpeg call: sample, then deinterlace, scale and map to 8 bits what was kept."""
    import ffmpeg
    import imageio_ffmpeg

    slot = "floor(({}-" + f"({info.start!r})+{_TOLERANCE})*{settings.fps!r})"
    kept = f"isnan(prev_selected_t)+gt({slot.format('t')},{slot.format('prev_selected_t')})"
    stream = ffmpeg.input(
        f"file:{video.absolute()}",
        copyts=None,
        threads=max(1, (os.cpu_count() or 1) // settings.workers),
        protocol_whitelist=PROTOCOLS,
        format_whitelist=CONTAINERS,
    )[str(info.stream)]
    stream = stream.filter("select", kept).filter("estdif", mode="frame", deint="interlaced")
    if info.hdr:
        stream = (
            stream.filter("scale", *size).filter("zscale", transfer="linear", npl=100).filter("format", "gbrpf32le")
        )
        stream = stream.filter("zscale", primaries="bt709").filter("tonemap", "hable", desat=0)
        stream = stream.filter("zscale", transfer="bt709", matrix="bt709", range="tv").filter("format", "yuv444p")
    stream = stream.filter("scale", *size, out_color_matrix="bt601", out_range="pc").filter("setsar", 1)
    stream = stream.filter("format", "yuvj420p")
    output = stream.output(
        "pipe:1",
        format="nut",
        vcodec="mjpeg",
        **{"q:v": settings.qscale, "fps_mode": "passthrough", "enc_time_base": "filter"},
    )
    return output.global_args("-hide_banner", "-nostdin", "-loglevel", "error").compile(imageio_ffmpeg.get_ffmpeg_exe())
