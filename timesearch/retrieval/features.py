"""The feature cache: one unit vector a cached frame, in safetensors, with a header that says of what and by what."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from timesearch.base.digests import remembered
from timesearch.base.errors import CacheMismatchError, ItemError
from timesearch.base.files import atomic_path, inside
from timesearch.base.stopping import NEVER, Stop
from timesearch.video.frames import FrameCache, cache_path, sample_videos

if TYPE_CHECKING:
    from timesearch.base.batch import BatchResult, Failure, Made
    from timesearch.retrieval.encoder import Encoder
    from timesearch.settings import Features, Settings


@dataclass(frozen=True)
class FeatureCache:
    """Features of one video.

    `features` (N, D) float16 unit rows and `timestamps` (N,) float64 s belong to the frames of the frame cache whose
    digest is `frames`; `model`, `pretrained` and `preprocessing` name the encoder that made them.
    """

    path: Path
    features: np.ndarray
    timestamps: np.ndarray
    model: str
    pretrained: str
    preprocessing: str
    frames: str
    features_sha256: str

    @classmethod
    def open(cls, path: Path | str) -> FeatureCache:
        """Read a feature cache.

        Raises:
            ItemError: `missing_cache`, `unreadable` or `damaged_cache`.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise ItemError(f"{path} is missing: run the stage 'features' first", reason="missing_cache")
        try:
            with safe_open(path, framework="numpy") as file:
                header = file.metadata() or {}
                features, timestamps = file.get_tensor("features"), file.get_tensor("timestamps")
            fields = {name: header[name] for name in _HEADER}
        except PermissionError as error:
            raise ItemError(f"{path} may not be read: check its permissions", reason="unreadable") from error
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError, OverflowError) as error:
            raise _damaged(path, str(error)[:200]) from error
        if features.dtype != np.float16 or features.ndim != 2 or timestamps.shape != features.shape[:1]:
            raise _damaged(path, f"features {features.dtype} {features.shape}, timestamps {timestamps.shape}")
        if timestamps.dtype != np.float64 or not np.isfinite(timestamps).all() or (np.diff(timestamps) <= 0).any():
            raise _damaged(path, "its times are no ascending seconds")
        lengths = np.einsum("nd,nd->n", features, features, dtype=np.float32)
        if not (np.abs(lengths - 1) < _UNIT).all():  # also where one is NaN
            raise _damaged(path, "its features are no unit rows")
        return cls(path=path, features=features, timestamps=timestamps, **fields)

    def __len__(self) -> int:
        return len(self.timestamps)

    def require_encoder(self, encoder: Encoder) -> None:
        """Refuse the features of another encoder.

        Raises:
            CacheMismatchError: naming both.
        """
        mine = (self.model, self.pretrained, self.preprocessing)
        other = (encoder.name, encoder.pretrained, encoder.preprocessing)
        if mine != other:
            raise CacheMismatchError(
                f"{self.path} holds features of {_spell(*mine)}, but the encoder is {_spell(*other)}: "
                "run the stage 'features' again, or load the encoder that made them"
            )

    def require_frames(self, frames: FrameCache) -> None:
        """Refuse the features of other frames.

        Raises:
            CacheMismatchError: naming both.
        """
        if self.frames != frames.digest:
            raise CacheMismatchError(
                f"{self.path} holds features of the frame cache {self.frames[:12]}, but {frames.path} is "
                f"{frames.digest[:12]}: run the stage 'features' again"
            )
        if not np.array_equal(self.timestamps, frames.timestamps):
            raise CacheMismatchError(f"{self.path} has other times than {frames.path}: run the stage 'features' again")

    def verify(self) -> str:
        """Compare the features with their digest, and return it.

        Raises:
            ItemError: `damaged_cache`.
        """
        if _digest(self.features, self.timestamps) != self.features_sha256:
            raise _damaged(self.path, "its features do not fit their digest")
        return self.features_sha256


_UNIT = 0.02
"""How far the squared length of a row may be from 1: float16 has a relative error of 2^-11."""
_HEADER = ("model", "pretrained", "preprocessing", "frames", "features_sha256")


def _spell(model: str, pretrained: str, preprocessing: str) -> str:
    return f"{model} ({pretrained}, preprocessing {preprocessing})"


def _damaged(path: Path, why: str) -> ItemError:
    return ItemError(f"{path} is damaged ({why}): run the stage 'features' again to remake it", reason="damaged_cache")


def _digest(features: np.ndarray, timestamps: np.ndarray) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(features).data)
    digest.update(np.ascontiguousarray(timestamps).data)
    return digest.hexdigest()


def make_feature_cache(
    frames: Path | str, target: Path | str, encoder: Encoder, batch_size: int, stop: Stop = NEVER
) -> int:
    """Embed every frame of a frame cache; the next batch is decoded while the current one is embedded.

    Args:
        frames: the frame cache.
        target: the feature cache; it is replaced when the new one is whole.
        encoder: embeds the frames.
        batch_size: frames that are embedded at a time.
        stop: ends the work between two batches; nothing is written then.

    Returns:
        Number of frames.

    Raises:
        ItemError: the frame cache is missing or damaged.
        StoppedError: it was asked to stop.
    """
    from safetensors.numpy import save

    cache = FrameCache.open(frames)
    batches = [range(first, min(first + batch_size, len(cache))) for first in range(0, len(cache), batch_size)]
    rows = []
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(_prepare, cache, encoder, batches[0])
        for batch in [*batches[1:], None]:
            stop.check()
            prepared = following.result()
            if batch is not None:
                following = reader.submit(_prepare, cache, encoder, batch)
            rows.append(encoder.encode_prepared(prepared).astype(np.float16))
    features = np.concatenate(rows)
    header = {
        "model": encoder.name,
        "pretrained": encoder.pretrained,
        "preprocessing": encoder.preprocessing,
        "frames": cache.digest,
        "features_sha256": _digest(features, cache.timestamps),
    }
    with atomic_path(target) as partial:
        partial.write_bytes(_ordered(save({"features": features, "timestamps": cache.timestamps}, metadata=header)))
    return len(cache)


def _ordered(file: bytes) -> bytes:
    """The same safetensors file with its header in a fixed order, so that equal features are equal files."""
    length = int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header + file[8 + length :]


def _prepare(cache: FrameCache, encoder: Encoder, batch: range) -> object:
    return encoder.prepare([cache.decode(index) for index in batch])


def why_stale(target: Path, frames: FrameCache, encoder: Encoder) -> str | None:
    """What is wrong with a feature cache, in a word or two: nothing (None) if it is whole and holds the features of
    these frames by this encoder; an empty text where there is none.
    """
    if not target.exists():
        return ""
    try:
        features = FeatureCache.open(target)
        remembered(target, "feature cache", lambda path: FeatureCache.open(path).verify())
    except ItemError:
        return "damaged"
    try:
        features.require_encoder(encoder)
    except CacheMismatchError:
        return "of another encoder"
    same = features.frames == frames.digest and np.array_equal(features.timestamps, frames.timestamps)
    return None if same else "of other frames"


def cache_features(
    frames: dict[str, Path],
    out: Path,
    encoder: Encoder,
    settings: Features,
    title: str = "features",
    set_aside: Sequence[Failure] = (),
    ray_address: str | None = None,
) -> BatchResult:
    """Make or renew the feature caches of many videos.

    Args:
        frames: name of each video (its feature cache is `<out>/<name>.safetensors`) and its frame cache.
        out: folder of the feature caches; what failed is listed in its `failures.jsonl`.
        encoder: embeds the frames.
        settings: batch size and workers.
        title: shown before the progress bar.
        set_aside: rows of sample files that name no video; they are listed with what fails.
        ray_address: a Ray cluster to work on; None for this machine.
    """
    from timesearch.base.batch import run_batch
    from timesearch.base.exclusive import exclusive

    with exclusive(out):
        work = functools.partial(_cache_one, frames=frames, out=out, encoder=encoder, batch_size=settings.batch_size)
        return run_batch(
            title,
            list(frames),
            work,
            failures=out / "failures.jsonl",
            workers=settings.workers,
            ray_address=ray_address,
            ray_gpus=1,
            shared=[out, *list(frames.values())[:1]],
            set_aside=set_aside,
        )


def _cache_one(name: str, *, frames: dict[str, Path], out: Path, encoder: Encoder, batch_size: int) -> Made | None:
    from timesearch.base.batch import Made

    target = inside(out, f"{name}.safetensors")
    stale = why_stale(target, FrameCache.open(frames[name]), encoder)
    if stale is None:
        return None
    return Made(make_feature_cache(frames[name], target, encoder, batch_size), stale)


def default_encoder(settings: Settings) -> Encoder:
    """The encoder that stages use: the server of the parameters, else the one in `models/encoder`."""
    from timesearch.retrieval.encoder import load_encoder

    return load_encoder(settings.features.url or str(settings.paths.models / "encoder"))


def run(settings: Settings, encoder: Encoder | None = None) -> BatchResult:
    """Stage `features`: the frame caches of all videos that the samples ask about, to `cache/features`.

    Args:
        settings: paths, and how.
        encoder: another than the settings'.
    """
    names, broken = sample_videos(settings)
    frames = {video: cache_path(settings.paths.frames, video) for video in names}
    encoder = encoder or default_encoder(settings)
    return cache_features(
        frames,
        settings.paths.features,
        encoder,
        settings.features,
        set_aside=broken,
        ray_address=settings.cluster.ray_address,
    )
