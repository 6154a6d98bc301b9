"""The rows of a library, one half-precision unit vector a frame, in memory-mapped files; and the exact scan over them.

A segment is a safetensors file with `rows` (N, D) float16, `times` (N,) float64 s and `noise` (V, P) float32, the best
score that each prompt of `timesearch.retrieval.noise` gets in each of its V videos. Segments never change: an index run
writes new ones, and joins small ones (`plan`), so that adding a video costs little and there are never many.

The scan reads every row. NumKong multiplies half precision by half precision with sums in single precision or better,
at the speed at which memory can be read (`benchmarks/library.py`). What that rounds is bounded by `slack`: whatever may
reach a threshold within it is multiplied again, exactly.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from timesearch.base.digests import remember, remembered
from timesearch.base.errors import ItemError
from timesearch.base.files import atomic_path, file_digest, inside, json_digest
from timesearch.base.stopping import NEVER, Stop
from timesearch.base.untrusted import UntrustedError, parse_json
from timesearch.library.catalogue import Entry, SegmentRecord
from timesearch.retrieval.features import FeatureCache
from timesearch.retrieval.noise import measure
from timesearch.retrieval.selection import widen

BLOCK = 2**16
"""Rows that are multiplied by one call: 75 MB of 1,152 half floats."""
LARGEST = 2**20
"""Rows from which a segment is left alone when others are joined."""
_ALIGNED = 64
"""Bytes at a multiple of which the rows begin."""
_MOST_HEADER = 2**20
_SUM = 1e-5
"""Error of a sum of products in single precision, at most, for unit vectors."""

Span = tuple[int, int]
"""First row, and the one after the last."""


@dataclass(frozen=True)
class Segment:
    """An open segment; `rows` is mapped, the rest is in memory."""

    rows: np.ndarray
    times: np.ndarray
    noise: np.ndarray
    firsts: np.ndarray

    @classmethod
    def open(cls, folder: Path, record: SegmentRecord) -> Segment:
        """Open a segment of the folder of a library's segments.

        Raises:
            ItemError: `damaged_index`: it is not there, or not what was written.
        """
        path = segment_path(folder, record.name)
        try:
            if remembered(path, "segment", file_digest) != record.sha256:
                raise _damaged(path, "it does not fit its digest")
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = parse_json(file.read(min(length, _MOST_HEADER)))
            tensors = {name: _mapped(path, 8 + length, header[name], kind) for name, kind in _TENSORS.items()}
        except (OSError, UntrustedError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, str(error)[:200]) from error
        if len(tensors["rows"]) != record.rows or len(tensors["times"]) != record.rows:
            raise _damaged(path, f"it has {len(tensors['rows'])} rows, and {record.rows} are needed")
        kept = (np.array(tensors[name]) for name in ("times", "noise", "firsts"))
        return cls(tensors["rows"], *kept)


def segment_path(folder: Path, name: str) -> Path:
    """Where a segment is in the folder of a library's segments."""
    return inside(folder, f"{name}.safetensors")


def _damaged(path: Path, why: str) -> ItemError:
    return ItemError(f"the index {path} is damaged ({why}): `timesearch index` remakes it", reason="damaged_index")


def _mapped(path: Path, start: int, described: dict[str, Any], kind: type[np.generic]) -> np.ndarray:
    """A tensor of a safetensors file, mapped."""
    first, last = (int(offset) for offset in described["data_offsets"])
    shape = tuple(int(length) for length in described["shape"])
    if described["dtype"] != _NAMES[kind] or last - first != int(np.prod(shape)) * np.dtype(kind).itemsize:
        raise ValueError(f"a tensor of {described['dtype']} {shape}")
    with path.open("rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # A scan comes by each page once. Not told so, the system holds on to pages that were read, and where the library is
    # larger than the memory it takes several times as long (`benchmarks/library.py`).
    held.madvise(mmap.MADV_SEQUENTIAL)
    return np.frombuffer(held, kind, int(np.prod(shape)), start + first).reshape(shape)


_TENSORS: dict[str, type[np.generic]] = {
    "rows": np.float16,
    "times": np.float64,
    "firsts": np.int64,
    "noise": np.float32,
}
"""What a segment holds, in this order."""
_NAMES: dict[type[np.generic], str] = {np.float16: "F16", np.float32: "F32", np.float64: "F64", np.int64: "I64"}


def write_segment(
    folder: Path, videos: Sequence[Entry], cache_of: Callable[[Entry], Path], prompts: np.ndarray
) -> tuple[SegmentRecord, list[Entry]]:
    """Write the rows of some videos into one segment, video by video.

    Args:
        folder: of the library's segments.
        videos: whose `rows` and `features` fit their feature caches.
        cache_of: where the feature cache of a video is.
        prompts: (P, D) float32 unit rows of the unrelated prompts.

    Returns:
        The segment, and the videos as they lie in it.

    Raises:
        ItemError: a feature cache is damaged, or another than the catalogue says.
    """
    count, width = sum(video.rows for video in videos), prompts.shape[1]
    name = json_digest([[video.key, video.features] for video in videos])[:16]
    path = segment_path(folder, name)
    shapes = {
        "rows": [count, width],
        "times": [count],
        "firsts": [len(videos)],
        "noise": [len(videos), 2, len(prompts)],
    }
    header, last = {}, 0
    for tensor, kind in _TENSORS.items():
        start, last = last, last + int(np.prod(shapes[tensor])) * np.dtype(kind).itemsize
        header[tensor] = {"dtype": _NAMES[kind], "shape": shapes[tensor], "data_offsets": [start, last]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    placed, times, noise = [], [], []
    with atomic_path(path) as partial, partial.open("wb") as file:
        digest = hashlib.sha256()
        _put(file, digest, len(text).to_bytes(8, "little") + text)
        first = 0
        for video in videos:
            cache = FeatureCache.open(cache_of(video))
            if cache.verify() != video.features or cache.features.shape != (video.rows, width):
                raise ItemError(f"{video.name} was changed: run `timesearch index` again", reason="cache_mismatch")
            _put(file, digest, np.ascontiguousarray(cache.features).data)
            times.append(cache.timestamps)
            noise.append(measure(cache.features, prompts))
            placed.append(video.model_copy(update={"segment": name, "first": first}))
            first += video.rows
        _put(file, digest, np.concatenate(times).data)
        _put(file, digest, np.array([video.first for video in placed], np.int64).data)
        _put(file, digest, np.stack(noise).astype(np.float32).data)
    remember(path, "segment", digest.hexdigest())
    return SegmentRecord(name=name, rows=count, sha256=digest.hexdigest()), placed


def _put(file: IO[bytes], digest: hashlib._Hash, data: bytes | memoryview) -> None:
    file.write(data)
    digest.update(data)


def plan(segments: Sequence[SegmentRecord], videos: Sequence[Entry]) -> tuple[list[SegmentRecord], list[list[Entry]]]:
    """Which segments stay, and which videos to write anew, a list for each new segment.

    A segment stays while at least half of its rows are of videos as they are, and while it holds as many rows as all
    that come after it, or `LARGEST`: so that a row is written again only when its segment doubles.
    """
    alive: dict[str, list[Entry]] = {segment.name: [] for segment in segments}
    fresh: list[Entry] = []
    for video in videos:
        alive.get(video.segment, fresh).append(video)
    rows = {name: sum(video.rows for video in held) for name, held in alive.items()}
    stays: list[SegmentRecord] = []
    after = sum(video.rows for video in fresh)
    for segment in sorted(segments, key=lambda segment: rows[segment.name]):
        held = rows[segment.name]
        enough = held >= LARGEST or held >= after
        if not held or 2 * held < segment.rows or (after and not enough):
            fresh += alive[segment.name]
            after += held
        else:
            stays.append(segment)
    return stays, list(_parcels(fresh))


def _parcels(videos: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Videos in lists of some `LARGEST` rows each."""
    parcel: list[Entry] = []
    rows = 0
    for video in videos:
        parcel.append(video)
        rows += video.rows
        if rows >= LARGEST:
            yield parcel
            parcel, rows = [], 0
    if parcel:
        yield parcel


def scan(rows: np.ndarray, query: np.ndarray, spans: Sequence[Span] | None = None, stop: Stop = NEVER) -> np.ndarray:
    """Scores of rows with a query, within `slack` of their cosines; every row of the spans is read once.

    Args:
        rows: (N, D) float16 unit rows, mapped or in memory.
        query: (D,) float32 unit vector.
        spans: which rows; all if None.
        stop: ends the scan between two blocks.

    Returns:
        (n,) float32 scores, span after span.

    Raises:
        StoppedError: it was asked to stop.
    """
    import numkong

    spans = [(0, len(rows))] if spans is None else spans
    half = np.asarray(query, np.float16)[None]
    scores = np.empty(sum(last - first for first, last in spans), np.float32)
    done = 0
    for first, last in spans:
        for start in range(first, last, BLOCK):
            stop.check()
            block = rows[start : min(start + BLOCK, last)]
            scores[done : done + len(block)] = np.asarray(numkong.cdist(half, block, metric="dot"))[0]
            done += len(block)
    return scores


def slack(query: np.ndarray) -> float:
    """How far a score of `scan` may be from the cosine: by the query's rounding, and the sum's."""
    wide = np.asarray(query, np.float64)
    rounded = float(np.linalg.norm(wide - np.asarray(query, np.float16)))
    return 1.02 * rounded + _SUM


def exact(rows: np.ndarray, indices: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Cosines of the rows at increasing `indices`, (n,) float32."""
    return np.concatenate(
        [widen(rows[part]) @ query for part in np.array_split(indices, max(1, len(indices) // 1024))]
        or [np.empty(0, np.float32)]
    ).astype(np.float32)
