"""Caches that somebody damaged or made up: each is one named failure, and the good neighbour is done."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from timesearch import FrameCache
from timesearch.base.errors import CacheMismatchError, ItemError
from timesearch.retrieval.features import FeatureCache
from timesearch.video.frames import VERSION

TIMES = [0.0, 0.5, 1.0]


def jpeg(width: int = 56, height: int = 28, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, form)
    return buffer.getvalue()


def oversized(width: int, height: int) -> bytes:
    """A JPEG whose header states other sides."""
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def meta(**changes: Any) -> dict[str, Any]:
    whole = {
        "version": VERSION,
        "source": {"name": "a.mp4", "size": 1, "sha256": "0" * 64},
        "fps": 2.0,
        "width": 56,
        "height": 28,
        "transform": {"fps": 2.0, "factor": 28, "min_pixels": 1, "max_pixels": 9999, "qscale": 2},
        "frames_sha256": "0" * 64,
        "timestamps": TIMES,
    }
    return {name: value for name, value in {**whole, **changes}.items() if value is not ...}


def write(
    path: Path,
    described: Any = None,
    frames: tuple[bytes, ...] = (jpeg(), jpeg(), jpeg()),
    extra: tuple[str, ...] = (),
    packing: int = zipfile.ZIP_STORED,
) -> None:
    with zipfile.ZipFile(path, "w", packing) as archive:
        for number, data in enumerate(frames):
            archive.writestr(f"{number:06d}.jpg", data)
        for name in extra:
            archive.writestr(name, b"x")
        text = described if isinstance(described, str | bytes) else json.dumps(described or meta())
        archive.writestr("meta.json", text)


def patched(find: bytes, offset: int, value: bytes) -> Callable[[Path], None]:
    """What writes a good cache, and then other bytes after each place where a signature stands."""

    def make(path: Path) -> None:
        write(path)
        data = bytearray(path.read_bytes())
        at = data.find(find)
        while at >= 0:
            data[at + offset : at + offset + len(value)] = value
            at = data.find(find, at + 4)
        path.write_bytes(data)

    return make


def of_meta(**changes: Any) -> Callable[[Path], None]:
    return lambda path: write(path, meta(**changes))


def cut(share: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return make


CENTRAL = b"PK\x01\x02"
FRAMES: dict[str, Callable[[Path], None]] = {
    **{f"times {value}"[:40]: of_meta(timestamps=value) for value in (..., None, [], 3, "abc", [[0.0], [1.0], [2.0]])},
    **{
        f"a time {value}": of_meta(timestamps=[0.0, value, 9.0]) for value in (None, float("nan"), "1", {}, True, 1e300)
    },
    "times descend": of_meta(timestamps=[2.0, 1.0, 0.0]),
    "times repeat": of_meta(timestamps=[0.0, 1.0, 1.0]),
    "a negative time": of_meta(timestamps=[-1.0, 0.0, 1.0]),
    **{f"width {value}": of_meta(width=value) for value in (..., None, "56", -1, 0, 56.5, 10**30, 2**31)},
    **{f"fps {value}": of_meta(fps=value) for value in (..., None, "2", 0, -1, 30.0, float("inf"))},
    **{
        f"source {value}": of_meta(source=value) for value in (..., None, [], {}, {"name": 1, "size": "1", "sha256": 2})
    },
    **{f"transform {value}": of_meta(transform=value) for value in (..., None, [], {})},
    "no digest": of_meta(frames_sha256=...),
    "a version in words": of_meta(version="two"),
    "no version": of_meta(version=...),
    "more times than frames": of_meta(timestamps=[*TIMES, 2.0]),
    "fewer times than frames": of_meta(timestamps=TIMES[:2]),
    "a list": lambda path: write(path, [1]),
    "no JSON": lambda path: write(path, "{"),
    "deep JSON": lambda path: write(path, "[" * 100_000),
    "long digits": lambda path: write(path, '{"version": ' + "9" * 5000 + "}"),
    "no text": lambda path: write(path, b"\xff\xfe\xfd"),
    "100 MB of meta.json": lambda path: write(path, b" " * 100_000_000, packing=zipfile.ZIP_DEFLATED),
    "packed": lambda path: write(path, packing=zipfile.ZIP_DEFLATED),
    "an absolute name": lambda path: write(path, extra=("/etc/passwd",)),
    "a name that climbs": lambda path: write(path, extra=("../x",)),
    "two of one name": lambda path: write(path, extra=("000000.jpg",)),
    "encrypted": patched(CENTRAL, 8, b"\x01\x00"),
    "packed in an unknown way": patched(CENTRAL, 10, b"\x63\x00"),
    "of a later ZIP": patched(CENTRAL, 6, b"\xff\x00"),
    "4 GB of a frame": patched(CENTRAL, 20, b"\xfe\xff\xff\xff" * 2),
    "outside the file": patched(CENTRAL, 42, b"\xfe\xff\xff\x7f"),
    "a third of it": cut(0.3),
    "without its end": cut(0.98),
    "empty": lambda path: path.write_bytes(b""),
    "a folder": Path.mkdir,
    "no ZIP": lambda path: path.write_bytes(jpeg()),
}
PIXELS: dict[str, bytes] = {
    "no JPEG": b"no picture",
    "a PNG": jpeg(form="PNG"),
    "other sides": jpeg(28, 56),
    "13,000 x 13,000": oversized(13_000, 13_000),
    "cut off": jpeg()[:300],
}


def test_a_good_cache_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.frames")
    cache = FrameCache.open(tmp_path / "a.frames")
    assert (len(cache), cache.size, cache[2].size) == (3, (56, 28), (56, 28))


@pytest.mark.parametrize("kind", FRAMES)
def test_a_frame_cache_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.frames"
    FRAMES[kind](path)
    with pytest.raises(ItemError, match="run the stage 'frames'") as caught:
        FrameCache.open(path)
    assert caught.value.reason == "damaged_cache"
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", PIXELS)
def test_a_frame_is_refused_before_its_pixels_are_decoded(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "a.frames", frames=(jpeg(), PIXELS[kind], jpeg()))
    cache = FrameCache.open(tmp_path / "a.frames")
    assert cache[0].size == (56, 28)
    with pytest.raises(ItemError, match=r"frame 1 .* run the stage 'frames'") as caught:
        cache[1]
    assert caught.value.reason == "damaged_cache"


ROWS = np.eye(3, 8, dtype=np.float16)
SECONDS = np.array(TIMES)
HEADER = dict.fromkeys(("model", "pretrained", "preprocessing", "frames", "features_sha256"), "0")


def tensors(header: dict[str, str] | None = HEADER, **changes: np.ndarray | None) -> bytes:
    held = {"features": ROWS, "timestamps": SECONDS, **changes}
    return save({name: value for name, value in held.items() if value is not None}, metadata=header)


def with_header(change: Callable[[dict[str, Any]], None]) -> bytes:
    whole = tensors()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


FEATURES: dict[str, bytes] = {
    "empty": b"",
    "a header of 10 GB": (10**10).to_bytes(8, "little") + b"{}",
    "a header without end": (2**63).to_bytes(8, "little"),
    "no JSON": (4).to_bytes(8, "little") + b"[[[[",
    "cut off": tensors()[:-8],
    "overlapping": with_header(lambda header: header["features"].update(data_offsets=[0, 48])),
    "of an unknown type": with_header(lambda header: header["features"].update(dtype="F77")),
    "of a huge shape": with_header(lambda header: header["features"].update(shape=[2**40, 2**40])),
    "no features": tensors(features=None),
    "no times": tensors(timestamps=None),
    "float32": tensors(features=ROWS.astype(np.float32)),
    "flat": tensors(features=ROWS.reshape(-1)),
    "fewer rows": tensors(features=ROWS[:2]),
    "NaN": tensors(features=np.where(ROWS > 0, np.nan, ROWS)),
    "zeros": tensors(features=0 * ROWS),
    "long rows": tensors(features=100 * ROWS),
    "times in float32": tensors(timestamps=SECONDS.astype(np.float32)),
    "times descend": tensors(timestamps=SECONDS[::-1].copy()),
    "NaN in times": tensors(timestamps=np.array([0, np.nan, 1])),
    "no header": tensors(header=None),
    "half a header": tensors(header={"model": "a"}),
}


@pytest.mark.parametrize("kind", FEATURES)
def test_a_feature_cache_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(FEATURES[kind])
    with pytest.raises(ItemError, match="run the stage 'features'") as caught:
        FeatureCache.open(path)
    assert caught.value.reason == "damaged_cache"


def test_features_of_other_times_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.frames")
    frames = FrameCache.open(tmp_path / "a.frames")
    (tmp_path / "good").write_bytes(tensors(header={**HEADER, "frames": frames.digest}))
    (tmp_path / "other").write_bytes(tensors(header={**HEADER, "frames": frames.digest}, timestamps=SECONDS + 1))
    FeatureCache.open(tmp_path / "good").require_frames(frames)
    with pytest.raises(CacheMismatchError, match="other times"):
        FeatureCache.open(tmp_path / "other").require_frames(frames)
