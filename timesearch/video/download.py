"""Stage `download`: videos from any fsspec URL, resumed after a break, checked, and renamed when whole."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from timesearch.batch import BatchResult, exclusive, run_batch
from timesearch.digests import remembered
from timesearch.errors import ItemError
from timesearch.files import file_digest, inside
from timesearch.samples import Sample, read_samples
from timesearch.settings import Download, Settings

_CHUNK = 4 * 2**20
"""Bytes a read: one HTTP range request."""


def run(settings: Settings) -> BatchResult:
    """Stage `download`: the videos of all samples, to `cache/videos`."""
    samples = [*read_samples(settings.paths.train_samples), *read_samples(settings.paths.test_samples)]
    return download_videos(samples, settings.paths.videos, settings.download)


def download_videos(samples: Iterable[Sample], out: Path, settings: Download) -> BatchResult:
    """Fetch each video that the samples name, once, into `out`; what failed is listed in its `failures.jsonl`."""
    wanted: dict[str, Sample] = {}
    for sample in samples:
        if sample.video not in wanted or (sample.sha256 and not wanted[sample.video].sha256):
            wanted[sample.video] = sample
    with exclusive(out):
        work = functools.partial(_fetch_one, wanted=wanted, out=out, settings=settings)
        return run_batch(
            "download", list(wanted), work, failures=out / "failures.jsonl", workers=settings.workers, unit="MB"
        )


def _fetch_one(video: str, *, wanted: dict[str, Sample], out: Path, settings: Download) -> float | None:
    sample, target = wanted[video], inside(out, video)
    if target.is_file() and (sample.sha256 is None or remembered(target) == sample.sha256.lower()):
        return None
    if not sample.source:
        raise ItemError(f"{video} is not in {out} and its sample names no source", reason="no_source")
    fetch(sample.source, target, sample.sha256, settings.retries)
    return target.stat().st_size / 1e6


def fetch(source: str, target: Path, sha256: str | None = None, retries: int = 4) -> None:
    """Copy `source` to `target`, going on where an earlier try broke off.

    Raises:
        ItemError: `not_found`, `forbidden`, `checksum_mismatch`, or `download_failed` after all tries.
    """
    import aiohttp
    from tenacity import RetryError, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

    try:
        for attempt in Retrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_attempt(retries + 1),
            wait=wait_random_exponential(multiplier=0.5, max=30),
        ):
            with attempt:
                _fetch_once(source, target, sha256)
    except RetryError as error:
        last = error.last_attempt.exception()
        raise ItemError(f"{source}: {last} (tried {retries + 1} times)", reason="download_failed") from last
    except FileNotFoundError as error:
        raise ItemError(f"{source} does not exist", reason="not_found") from error
    except (aiohttp.ClientError, ValueError, ImportError) as error:
        reason = "forbidden" if getattr(error, "status", None) in (401, 403) else "download_failed"
        raise ItemError(f"{source} cannot be fetched: {error}", reason=reason) from error


def _may_pass(error: BaseException) -> bool:
    """Whether another try may help: breaks and overload, not absence, refusal or a full disk."""
    import aiohttp

    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in (408, 425, 429) or error.status >= 500
    if isinstance(error, (FileNotFoundError, PermissionError, ItemError)):
        return isinstance(error, _ShortRead)
    return isinstance(error, (aiohttp.ClientError, TimeoutError, ConnectionError, _ShortRead))


class _ShortRead(ItemError):
    """The source ended before its stated size."""

    reason = "download_failed"


def _fetch_once(source: str, target: Path, sha256: str | None) -> None:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(source)
    info = filesystem.info(path)
    size = info.get("size")
    version = [source, size, info.get("ETag"), info.get("Last-Modified"), str(info.get("mtime"))]
    mark = hashlib.sha256(repr(version).encode()).hexdigest()[:16]
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name[:80]}.{mark}.download")
    with filesystem.open(path, "rb") as remote:
        _append(remote, unfinished)
    fetched = unfinished.stat().st_size
    if size is not None and fetched < size:
        raise _ShortRead(f"the source ended after {fetched} of {size} bytes")
    if size is not None and fetched > size:
        unfinished.unlink()
        raise ItemError(f"{source} has {fetched} bytes, not {size}", reason="size_mismatch")
    if sha256:
        found = file_digest(unfinished)
        if found != sha256.lower():
            unfinished.unlink()
            raise ItemError(
                f"{source} has SHA-256 {found}, the sample says {sha256}: check the sample or the source",
                reason="checksum_mismatch",
            )
    unfinished.replace(target)


def _append(remote: IO[bytes], unfinished: Path) -> None:
    """Write what is missing of `remote` behind what `unfinished` holds already."""
    with unfinished.open("ab") as local:
        if local.tell():
            try:
                remote.seek(local.tell())
            except ValueError:  # a plain stream: from the start, then
                local.truncate(0)
        while chunk := remote.read(_CHUNK):
            local.write(chunk)
        local.flush()
        os.fsync(local.fileno())
