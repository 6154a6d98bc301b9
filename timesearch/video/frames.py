"""The frame cache: a video's sampled frames in one ZIP of JPEGs, made by one ffmpeg pass, read by seeking.

`meta.json` holds `timestamps` (s from the first frame), `fps`, `source` (name, size, sha256), `width`, `height`
(pixels), `transform` (the parameters that shaped the frames), `frames_sha256` (over all JPEGs in order) and `version`;
of a video whose last picture is held, also `end` (s), until when.

A timestamp is the time from which a frame is on the screen. Of a video at a steady rate every frame is there as long as
any other; of one at a variable rate (a screen recording, slides) a picture may be *held* for minutes, and whoever looks
at a time within them sees it: `shown_at`, `window`, `nearest` and `evenly` go by what is on the screen.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from timesearch.base.digests import remember, remembered
from timesearch.base.errors import ItemError, first_line
from timesearch.base.files import atomic_path, inside, json_digest
from timesearch.base.stopping import NEVER, Stop
from timesearch.base.untrusted import parse_json
from timesearch.video.holds import held
from timesearch.video.probe import Fingerprint, VideoInfo, check_readable, probe, smart_size
from timesearch.video.sampling import sample_jpegs, slot

if TYPE_CHECKING:
    from PIL.Image import Image

    from timesearch.base.batch import BatchResult, Failure, Made
    from timesearch.settings import Frames, Settings

VERSION = 2
WHOLE = "whole video"
"""Kind under which is remembered whether a video was found whole: yes, or the reason why not."""
BROKEN = frozenset({"damaged_video", "empty_file", "not_a_video", "truncated"})
"""Reasons of failures that fetching a video again may mend."""
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_ROUNDING = 1e-6
"""Seconds to which timestamps are rounded."""
_TENTHS = 0.05 + _ROUNDING
"""Seconds by which a time in tenths, as policies read it, may precede the frame that it stands for."""
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")

Look = tuple[int, float]
"""Index of a frame in its cache, and when it is looked at (s): while it is on the screen."""


_MOST_PIXELS = 2**25
_MOST_BYTES = 64 * 2**20
"""Of a frame, or of `meta.json`: a day at 20 frames a second has 20 MiB of times."""


class Source(BaseModel):
    """The video that a frame cache was made from."""

    model_config = ConfigDict(strict=True)

    name: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Meta(BaseModel):
    """`meta.json` of a frame cache."""

    model_config = ConfigDict(strict=True)

    source: Source
    fps: float = Field(gt=0, allow_inf_nan=False)
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    transform: dict[str, int | float]
    frames_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    timestamps: list[Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]] = Field(min_length=1)
    end: float | None = Field(None, le=1e9, allow_inf_nan=False)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width * self.height > _MOST_PIXELS:
            raise ValueError(f"frames of {self.width} x {self.height} pixels")
        if self.transform.get("fps") != self.fps:
            raise ValueError(f"{self.fps:g} frames a second, made with {self.transform.get('fps')}")
        if any(later <= earlier for earlier, later in pairwise(self.timestamps)):
            raise ValueError("times that do not ascend")
        if self.end is not None and self.end <= self.timestamps[-1]:
            raise ValueError("an end before the last time")
        return self


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
            self._bytes += 4 * image.width * image.height  # Pillow pads RGB to four bytes
            while self._bytes > self._budget:
                _, oldest = self._images.popitem(last=False)
                self._bytes -= 4 * oldest.width * oldest.height


_decoded = DecodedFrames(budget=16 * 2**20)


class FrameCache:
    """Frames of one video, read one by one from its cache file; only the index is held in memory.

    One object may be shared by threads and by forked workers; pickling it stores the path alone.
    """

    def __init__(self, path: Path, meta: dict[str, Any], index: np.ndarray, descriptor: int) -> None:
        self.path = path
        self.meta = meta
        self.timestamps = np.asarray(meta["timestamps"], dtype=np.float64)
        self.end = float(meta.get("end") or self.timestamps[-1])
        self.size: tuple[int, int] = (meta["width"], meta["height"])
        self.digest = json_digest(meta)
        self._index = index
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path | str) -> FrameCache:
        """Open a cache by reading its index.

        Raises:
            ItemError: `missing_cache`, `unreadable`, `damaged_cache` or, of another `VERSION`, `outdated_cache`.
        """
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise ItemError(f"{path} is missing: run the stage 'frames' first", reason="missing_cache") from error
        except PermissionError as error:
            raise ItemError(f"{path} may not be read: check its permissions", reason="unreadable") from error
        try:
            with os.fdopen(os.dup(descriptor), "rb") as handle, zipfile.ZipFile(handle) as archive:
                entries = _entries(archive, os.fstat(descriptor).st_size)
                meta = parse_json(archive.read("meta.json"))
            version = meta.get("version") if isinstance(meta, dict) else None
            if not isinstance(version, int):
                raise ValueError("meta.json names no version")
            if version != VERSION:
                raise ItemError(
                    f"{path} has format {version}, and format {VERSION} is needed: run the stage 'frames' again to "
                    "remake it",
                    reason="outdated_cache",
                )
            count = len(Meta.model_validate(meta).timestamps)
            if entries.keys() != {"meta.json", *map(frame_name, range(count))}:
                raise ValueError(f"{count} times, and {len(entries) - 1} other files")
            frames = [entries[frame_name(number)] for number in range(count)]
            index = np.array([(entry.header_offset, entry.file_size, entry.CRC) for entry in frames], np.int64)
            return cls(path, meta, index.reshape(-1, 3), descriptor)
        except ItemError:
            os.close(descriptor)
            raise
        except Exception as error:  # zipfile raises anything on a file that somebody made up
            os.close(descriptor)
            raise _damaged(path, _reason(error)) from error

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
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} holds {len(self)} frames, there is no frame {index}")
        key = (self.digest, int(index) % len(self))
        image = _decoded.get(key)
        if image is None:
            image = self.decode(key[1])
            _decoded.put(key, image)
        return image.copy()

    def decode(self, index: int) -> Image:
        """Frame `index` (RGB), past the store of decoded frames: for one pass over all frames.

        Raises:
            ItemError: `damaged_cache`, if it is no JPEG of the cache's size.
        """
        from PIL import Image

        data = self.jpeg(index)
        try:
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as opened:
                if opened.size == self.size:  # its header says so, before a pixel is decoded
                    return opened.convert("RGB")
        except Exception as error:  # Pillow raises anything on bytes that somebody made up
            raise _damaged(self.path, f"frame {index} cannot be decoded") from error
        raise _damaged(self.path, f"frame {index} has another size than {self.size[0]} x {self.size[1]}")

    def read(self, indices: Sequence[int]) -> list[Image]:
        """Frames at `indices`, in that order."""
        return [self[index] for index in indices]

    @functools.cached_property
    def steady(self) -> bool:
        """Whether the frames come at a steady rate: none is a step or more from where even steps would put it."""
        step = self.timestamps[-1] / max(1, len(self) - 1)
        return self.end == self.timestamps[-1] and bool(
            np.all(np.abs(self.timestamps - step * np.arange(len(self))) < max(step, _ROUNDING))
        )

    @functools.cached_property
    def places(self) -> np.ndarray:
        """Where in the video each frame begins, (N,) in steps of the usual distance: its number, at a steady rate."""
        return np.arange(len(self), dtype=np.float64) if self.steady else self.timestamps * self.meta["fps"]

    def shown_at(self, seconds: float) -> int:
        """Index of the frame that is on the screen at `seconds`."""
        return max(0, int(np.searchsorted(self.timestamps, seconds + _ROUNDING, side="right")) - 1)

    def nearest(self, seconds: float) -> int:
        """Index of the frame whose time is nearest to `seconds`, the earlier of two equally near; while a picture is
        held, that picture, unless `seconds` rounded to tenths may stand for the next one's time.
        """
        shown = self.shown_at(seconds)
        following = self.timestamps[shown + 1 : shown + 2] - seconds
        before = abs(seconds - self.timestamps[shown])
        return shown + int(np.any(following < (min(before, _TENTHS) if self._held(shown) else before)))

    def _held(self, index: int) -> bool:
        """Whether a frame is the only one for more than its slot of 1/fps."""
        following = self.timestamps[index + 1] if index + 1 < len(self) else self.end
        return slot(following, self.meta["fps"]) > slot(self.timestamps[index], self.meta["fps"]) + 1

    def window(self, start: float, end: float) -> range:
        """Indices of the frames with start <= time <= end (s), and of the picture that is held when the window starts.

        At a steady rate, which is then below the cache's, that one counts only where no other does.
        """
        first, last = (int(place) for place in np.searchsorted(self.timestamps, [start - _ROUNDING, end + _ROUNDING]))
        last = max(first, last)
        if first > 0 and start <= min(end, self.end) and (not self.steady or first == last):
            first -= int(self._held(first - 1))
        return range(first, last)

    def evenly(self, count: int) -> list[Look]:
        """Look at the middles of `count` equal shares of the video's time.

        Returns:
            Index of the frame that is on the screen then, and the time (s) at which it is looked at: that from which it
            is shown, or, of a picture held for longer than 1/fps, the middle itself. A held picture may so come several
            times. Where there are no more frames than `count`, each once.
        """
        if self.steady or count >= len(self):
            count = min(count, len(self))
            indices = [int((position + 0.5) * len(self) / count) for position in range(count)]
            return [(index, float(self.timestamps[index])) for index in indices]
        step = 1 / self.meta["fps"]
        share = max(float(self.timestamps[-1]) + step, self.end) / count
        middles = [(position + 0.5) * share for position in range(count)]
        shown = [self.shown_at(middle) for middle in middles]
        begun = [float(self.timestamps[index]) for index in shown]
        return [
            (index, time if middle - time < step else middle)
            for index, time, middle in zip(shown, begun, middles, strict=True)
        ]

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

    def verify(self) -> str:
        """Read every frame's bytes, compare them with their digest, and return that of the whole cache.

        Raises:
            ItemError: `damaged_cache`.
        """
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self.jpeg(index))
        if digest.hexdigest() != self.meta["frames_sha256"]:
            raise _damaged(self.path, "its frames do not fit their digest")
        return self.digest


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The files in a cache of `size` bytes, which are neither packed nor encrypted, by their names."""
    listed = archive.infolist()
    for entry in listed:
        stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        if not stored or entry.flag_bits & 1 or entry.file_size > _MOST_BYTES:
            raise ValueError(f"{entry.filename[:50]!r} is packed, encrypted or too large")
        if entry.header_offset < 0 or entry.header_offset + entry.file_size > size:
            raise ValueError(f"{entry.filename[:50]!r} lies outside the file")
    entries = {entry.filename: entry for entry in listed}
    if len(entries) < len(listed):
        raise ValueError("several files of one name")
    return entries


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'meta.json'}: {first['msg']}"[:200]
    return first_line(error)[:200]


def frame_name(index: int) -> str:
    """Name of a frame inside the ZIP."""
    return f"{index:06d}.jpg"


def cache_path(root: Path | str, video: str) -> Path:
    """Where the frame cache of `video` (its path below the videos folder) lies below `root`."""
    return inside(root, f"{video}.frames")


def _damaged(path: Path, why: str) -> ItemError:
    return ItemError(f"{path} is damaged ({why}): run the stage 'frames' again to remake it", reason="damaged_cache")


def transform_of(settings: Frames) -> dict[str, Any]:
    """The parameters that shape the frames; a cache made with others is stale."""
    return settings.model_dump(include={"fps", "factor", "min_pixels", "max_pixels", "qscale"})


def make_frame_cache(
    video: Path | str, target: Path | str, settings: Frames, threads: int = 0, stop: Stop = NEVER
) -> int:
    """Decode `video` once, or twice where pictures are held, and write its frame cache.

    Memory does not grow with the length of the video.

    Args:
        video: a video file.
        target: the cache file; it is replaced when the new one is whole.
        settings: rate, size and quality.
        threads: of the decoder; 0 for one a core.
        stop: ends the work; nothing is written then.

    Returns:
        Number of frames kept: of each slot of 1/fps seconds, counted from the first frame, its first frame; and where
        no frame follows in the next slot, its last, which stays on the screen.

    Raises:
        ItemError: the video cannot be used; the reason says why. Whatever went wrong with a video that changed
            meanwhile, it is `changed_while_reading`.
        StoppedError: it was asked to stop.
    """
    video = Path(video)
    info = probe(video)
    try:
        return _write_cache(video, info, Path(target), settings, threads, stop)
    except (ItemError, FileNotFoundError) as error:
        if _changed(video, info.fingerprint):
            raise ItemError(
                f"{video} was changed while it was read: try again", reason="changed_while_reading"
            ) from error
        raise


def _changed(video: Path, fingerprint: Fingerprint) -> bool:
    try:
        return Fingerprint.of(video) != fingerprint
    except FileNotFoundError:
        return True


def _write_cache(video: Path, info: VideoInfo, target: Path, settings: Frames, threads: int, stop: Stop) -> int:
    size = smart_size(info.width, info.height, settings.factor, settings.min_pixels, settings.max_pixels)
    with atomic_path(target) as partial:
        times, digest = _write_frames(partial, sample_jpegs(video, info, size, settings, threads, stop))
        also, end = held(video, info, times, settings.fps)
        if also:
            sampled = sample_jpegs(video, info, size, settings, threads, stop, also)
            times, digest = _write_frames(partial, sampled)
        source = {"name": video.name, "size": info.fingerprint.size, "sha256": remembered(video)}
        if _changed(video, info.fingerprint):
            raise ItemError(f"{video} was changed", reason="changed_while_reading")
        meta = {
            "version": VERSION,
            "source": source,
            "fps": settings.fps,
            "width": size[0],
            "height": size[1],
            "transform": transform_of(settings),
            "frames_sha256": digest,
            "timestamps": [round(seconds, 6) for seconds in times],
            **({} if end is None else {"end": round(end, 6)}),
        }
        with zipfile.ZipFile(partial, "a", zipfile.ZIP_STORED) as archive:
            archive.writestr(zipfile.ZipInfo("meta.json", _ZIP_TIME), json.dumps(meta))
    return len(times)


def _write_frames(target: Path, sampled: Generator[tuple[float, bytes], None, None]) -> tuple[list[float], str]:
    """Write sampled frames into a new ZIP; return their times (s) and the SHA-256 over all of them."""
    times: list[float] = []
    digest = hashlib.sha256()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive, closing(sampled):
        for seconds, jpeg in sampled:
            archive.writestr(zipfile.ZipInfo(frame_name(len(times)), _ZIP_TIME), jpeg)
            digest.update(jpeg)
            times.append(seconds)
    return times, digest.hexdigest()


def why_stale(cache: Path, video: Path, settings: Frames) -> str | None:
    """What is wrong with a cache, in a word or two: nothing (None) if it is whole and was made of this very file with
    these parameters; an empty text where there is none.
    """
    if not cache.exists():
        return ""
    try:
        meta = FrameCache.open(cache).meta
        if meta["transform"] != transform_of(settings):
            return "of other parameters"
        remembered(cache, "frame cache", lambda path: FrameCache.open(path).verify())
    except ItemError as error:
        return "of another format" if error.reason == "outdated_cache" else "damaged"
    same = meta["source"]["size"] == video.stat().st_size and meta["source"]["sha256"] == remembered(video)
    return None if same else "of another video"


def cache_frames(
    videos: dict[str, Path],
    out: Path,
    settings: Frames,
    title: str = "frames",
    set_aside: Sequence[Failure] = (),
    ray_address: str | None = None,
) -> BatchResult:
    """Make or renew the frame caches of many videos.

    Args:
        videos: name of each video (its cache is `<out>/<name>.frames`) and its file.
        out: folder of the caches; what failed is listed in its `failures.jsonl`.
        settings: sampling, size, quality and workers.
        title: shown before the progress bar.
        set_aside: rows of sample files that name no video; they are listed with what fails.
        ray_address: a Ray cluster to work on; None for this machine.
    """
    from timesearch.base.batch import run_batch
    from timesearch.base.exclusive import exclusive

    with exclusive(out):
        at_once = max(1, min(settings.workers, len(videos)))
        threads = 1 if ray_address else -(-(os.cpu_count() or 1) // at_once)
        work = functools.partial(_cache_one, videos=videos, out=out, settings=settings, threads=threads)
        return run_batch(
            title,
            list(videos),
            work,
            failures=out / "failures.jsonl",
            workers=settings.workers,
            ray_address=ray_address,
            shared=[out, *list(videos.values())[:1]],
            set_aside=set_aside,
        )


def _cache_one(name: str, *, videos: dict[str, Path], out: Path, settings: Frames, threads: int) -> Made | None:
    from timesearch.base.batch import Made

    target = cache_path(out, name)
    check_readable(videos[name])
    stale = why_stale(target, videos[name], settings)
    if stale is None:
        return None
    try:
        return Made(make_frame_cache(videos[name], target, settings, threads), stale)
    except ItemError as error:
        if error.reason in BROKEN:  # the next download then fetches it again
            remember(videos[name], WHOLE, error.reason)
        raise


def sample_videos(settings: Settings) -> tuple[list[str], list[Failure]]:
    """Names of all videos that the train and test samples ask about, each once however it is spelled; and the rows
    that give no sample.
    """
    from timesearch.data.rows import read_all_samples

    broken: list[Failure] = []
    samples = read_all_samples((settings.paths.train_samples, settings.paths.test_samples), broken.append)
    return list(dict.fromkeys(os.path.normpath(sample.video) for sample in samples)), broken


def run(settings: Settings) -> BatchResult:
    """Stage `frames`: the videos of all samples, from `cache/videos` to `cache/frames`."""
    names, broken = sample_videos(settings)
    videos = {video: settings.paths.videos / video for video in names}
    return cache_frames(
        videos,
        settings.paths.frames,
        settings.frames,
        set_aside=broken,
        ray_address=settings.cluster.ray_address,
    )
