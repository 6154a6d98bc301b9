"""The frame cache: a video's sampled frames in one ZIP of JPEGs, made by one ffmpeg pass, read by seeking.

`meta.json` holds `timestamps` (s from the first frame), `fps`, `source` (name, size, sha256), `width`, `height`
(pixels), `transform` (the parameters that shaped the frames), `frames_sha256` (over all JPEGs in order) and `version`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import subprocess
import tempfile
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from timesearch.errors import ItemError
from timesearch.files import atomic_path, file_digest, json_digest
from timesearch.settings import Frames
from timesearch.video.probe import CONTAINERS, PROTOCOLS, Fingerprint, VideoInfo, probe, smart_size

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 1
_TOLERANCE = 0.001
"""Seconds by which a frame may precede its slot: Matroska rounds times to milliseconds."""
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


class DecodedFrames:
    """Decoded frames that were used last, shared by all caches of the process and bounded in bytes."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._images: OrderedDict[tuple[str, int], Image] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[str, int]) -> Image | None:
        """The image under `key`, if it is still held."""
        with self._lock:
            if key not in self._images:
                return None
            self._images.move_to_end(key)
            return self._images[key]

    def put(self, key: tuple[str, int], image: Image) -> None:
        """Hold `image`, and let go of those that were not used for longest."""
        with self._lock:
            if key in self._images:
                return
            self._images[key] = image
            self._bytes += 3 * image.width * image.height
            while self._bytes > self._budget:
                _, oldest = self._images.popitem(last=False)
                self._bytes -= 3 * oldest.width * oldest.height


_decoded = DecodedFrames(budget=32 * 2**20)


class FrameCache:
    """Frames of one video, read one by one from its cache file; only the index is held in memory.

    One object may be shared by threads and by forked workers; pickling it stores the path alone.
    """

    def __init__(self, path: Path, meta: dict[str, Any], index: np.ndarray, descriptor: int) -> None:
        self.path = path
        self.meta = meta
        self.timestamps = np.asarray(meta["timestamps"], dtype=np.float64)
        self.size: tuple[int, int] = (meta["width"], meta["height"])
        self.digest = json_digest(meta)
        self._index = index
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path | str) -> FrameCache:
        """Open a cache by reading its index.

        Raises:
            ItemError: `missing_cache` or `damaged_cache`.
        """
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise ItemError(f"{path} is missing: run the stage 'frames' first", reason="missing_cache") from error
        try:
            with os.fdopen(os.dup(descriptor), "rb") as handle, zipfile.ZipFile(handle) as archive:
                meta = json.loads(archive.read("meta.json"))
                entries = [archive.getinfo(frame_name(number)) for number in range(len(meta["timestamps"]))]
                if meta["version"] != VERSION:
                    raise _damaged(path, f"its version is {meta['version']}, not {VERSION}")
            index = np.array([(entry.header_offset, entry.file_size, entry.CRC) for entry in entries], np.int64)
            return cls(path, meta, index.reshape(-1, 3), descriptor)
        except (zipfile.BadZipFile, KeyError, TypeError, ValueError, EOFError) as error:
            os.close(descriptor)
            raise _damaged(path, str(error)) from error
        except BaseException:
            os.close(descriptor)
            raise

    def __del__(self) -> None:
        descriptor, self._descriptor = getattr(self, "_descriptor", -1), -1
        if descriptor >= 0:
            os.close(descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return FrameCache.open, (self.path,)

    def __len__(self) -> int:
        return len(self.timestamps)

    def __getitem__(self, index: int) -> Image:
        """Frame `index` as an RGB image of its own; a negative index counts from the end."""
        from PIL import Image

        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} holds {len(self)} frames, there is no frame {index}")
        key = (self.digest, int(index) % len(self))
        image = _decoded.get(key)
        if image is None:
            with Image.open(io.BytesIO(self.jpeg(key[1]))) as opened:
                image = opened.convert("RGB")
            _decoded.put(key, image)
        return image.copy()

    def read(self, indices: Sequence[int]) -> list[Image]:
        """Frames at `indices`, in that order."""
        return [self[index] for index in indices]

    def nearest(self, seconds: float) -> int:
        """Index of the frame whose time is nearest to `seconds`; the earlier of two equally near."""
        return int(np.argmin(np.abs(self.timestamps - seconds)))

    def window(self, start: float, end: float) -> range:
        """Indices of the frames with start <= time <= end (s)."""
        first, last = np.searchsorted(self.timestamps, [start - 1e-6, end + 1e-6])
        return range(int(first), int(max(first, last)))

    def jpeg(self, index: int) -> bytes:
        """Stored bytes of frame `index`.

        Raises:
            ItemError: `damaged_cache`, if the bytes do not fit their checksum.
        """
        offset, size, crc = (int(value) for value in self._index[index])
        header = os.pread(self._descriptor, _LOCAL_HEADER.size, offset)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise _damaged(self.path, f"frame {index} is not where its index says")
        name_length, extra_length = _LOCAL_HEADER.unpack(header)[-2:]
        data = os.pread(self._descriptor, size, offset + _LOCAL_HEADER.size + name_length + extra_length)
        if len(data) != size or zlib.crc32(data) != crc:
            raise _damaged(self.path, f"frame {index} does not fit its checksum")
        return data

    def verify(self) -> None:
        """Read every frame's bytes and compare them with the digest.

        Raises:
            ItemError: `damaged_cache`.
        """
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self.jpeg(index))
        if digest.hexdigest() != self.meta["frames_sha256"]:
            raise _damaged(self.path, "its frames do not fit their digest")


def frame_name(index: int) -> str:
    """Name of a frame inside the ZIP."""
    return f"{index:06d}.jpg"


def cache_path(root: Path | str, video: str) -> Path:
    """Where the frame cache of `video` (its path below the videos folder) lies below `root`."""
    from timesearch.files import inside

    return inside(root, f"{video}.frames")


def _damaged(path: Path, why: str) -> ItemError:
    return ItemError(f"{path} is damaged ({why}): run the stage 'frames' again to remake it", reason="damaged_cache")


def transform_of(settings: Frames) -> dict[str, Any]:
    """The parameters that shape the frames; a cache made with others is stale."""
    return settings.model_dump(include={"fps", "factor", "min_pixels", "max_pixels", "qscale"})


def make_frame_cache(video: Path | str, target: Path | str, settings: Frames) -> int:
    """Decode `video` once and write its frame cache; memory does not grow with the length of the video.

    Returns:
        Number of frames kept: of each slot of 1/fps seconds, counted from the first frame, its first frame.

    Raises:
        ItemError: the video cannot be used; the reason says why.
    """
    video = Path(video)
    info = probe(video)
    width, height = smart_size(info.width, info.height, settings.factor, settings.min_pixels, settings.max_pixels)
    with atomic_path(target) as partial:
        times, digest = [], hashlib.sha256()
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for seconds, jpeg in sample_jpegs(video, info, (width, height), settings):
                archive.writestr(zipfile.ZipInfo(frame_name(len(times)), _ZIP_TIME), jpeg)
                digest.update(jpeg)
                times.append(seconds)
            source = {"name": video.name, "size": info.fingerprint.size, "sha256": file_digest(video)}
            if Fingerprint.of(video) != info.fingerprint:
                raise ItemError(f"{video} was changed while it was read: try again", reason="changed_while_reading")
            meta = {
                "version": VERSION,
                "source": source,
                "fps": settings.fps,
                "width": width,
                "height": height,
                "transform": transform_of(settings),
                "frames_sha256": digest.hexdigest(),
                "timestamps": [round(seconds, 6) for seconds in times],
            }
            archive.writestr(zipfile.ZipInfo("meta.json", _ZIP_TIME), json.dumps(meta))
    return len(times)


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
            with av.open(process.stdout, format="nut") as container:
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
        stream = stream.filter("scale", *size).filter("zscale", transfer="linear", npl=100).filter("format", "gbrpf32le")
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


def up_to_date(cache: Path, video: Path, settings: Frames) -> bool:
    """Whether `cache` is whole and was made of this very file with these parameters."""
    if not cache.exists():
        return False
    try:
        opened = FrameCache.open(cache)
        if opened.meta["transform"] != transform_of(settings):
            return False
        source = opened.meta["source"]
        if video.stat().st_size != source["size"] or file_digest(video) != source["sha256"]:
            return False
        opened.verify()
    except (ItemError, KeyError):
        return False
    return True
