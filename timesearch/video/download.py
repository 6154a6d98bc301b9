"""Stage `download`: videos from any fsspec URL, resumed after a break, checked, and renamed when whole.

`tar://MEMBER::URL` names a video in a tar archive, which is read by its headers and never fetched whole; where URL is
the first part of an archive that lies in parts (``videos.tar.part.aa``), the others are found beside it.

Subtitles come along: the file that a sample names by a URL (``meta.subtitle_source``), and those that lie beside a
video which is copied from a local folder.
"""

from __future__ import annotations

import glob
import io
import os
import re
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from timesearch.base.batch import BatchResult, Failure, Made, run_batch
from timesearch.base.digests import remembered
from timesearch.base.errors import ItemError
from timesearch.base.exclusive import exclusive
from timesearch.base.files import file_digest, inside, json_digest
from timesearch.base.http import may_pass, status_of, tries
from timesearch.data.rows import read_all_samples
from timesearch.data.samples import Sample
from timesearch.settings import Download, Settings
from timesearch.video.frames import BROKEN, WHOLE
from timesearch.video.probe import probe
from timesearch.video.subtitles import SUFFIXES, find_subtitles, read_subtitles

UNREACHABLE = "unreachable"
"""Why a video failed whose source was away or overloaded at every try."""
TRY_AGAIN = "TIMESEARCH_TRY_AGAIN"
"""Set in the environment by who starts the stage again where a source was unreachable: it then ends with status 75."""
_CHUNK = 4 * 2**20
"""Bytes a read: one HTTP range request."""
_HEADER_BLOCK = 2**12
"""Bytes a read while an archive's headers are gone through."""


def run(settings: Settings) -> BatchResult:
    """Stage `download`: the videos of all samples, to `cache/videos`."""
    broken: list[Failure] = []
    samples = read_all_samples((settings.paths.train_samples, settings.paths.test_samples), broken.append)
    return download_videos(samples, settings.paths.videos, settings.download, broken)


def download_videos(
    samples: Iterable[Sample], out: Path, settings: Download, set_aside: Sequence[Failure] = ()
) -> BatchResult:
    """Fetch each video that the samples name, once, into `out`.

    A video is one however its path is spelled (``./a.mp4``). Where no SHA-256 says what it is, it must be a video: an
    error page is none, and what is there but broken is fetched again. The same goes for subtitle files, each an item of
    its own. What failed is listed in `failures.jsonl` of `out`, with `set_aside`: rows that gave no sample.
    """
    wanted: dict[str, Sample] = {}
    subtitles: dict[str, str] = {}
    for sample in samples:
        video = os.path.normpath(sample.video)
        if video not in wanted or (sample.sha256 and not wanted[video].sha256):
            wanted[video] = sample
        if (words := subtitles_of(sample)) is not None:
            subtitles.setdefault(*words)

    def work(item: str) -> Made | None:
        if item in wanted:
            return _fetch_one(item, wanted=wanted, out=out, settings=settings)
        return _fetch_words(subtitles[item], inside(out, item), settings.retries)

    with exclusive(out):
        return run_batch(
            "download",
            [*wanted, *(path for path in subtitles if path not in wanted)],
            work,
            failures=out / "failures.jsonl",
            workers=settings.workers,
            unit="MB",
            set_aside=set_aside,
        )


def _fetch_one(video: str, *, wanted: dict[str, Sample], out: Path, settings: Download) -> Made | None:
    sample, target = wanted[video], inside(out, video)
    there = target.is_file()
    if there and sample.sha256 is None and (not sample.source or remembered(target, WHOLE, _wholeness) == "yes"):
        return None
    if there and sample.sha256 and remembered(target) == sample.sha256.lower():
        return None
    if not sample.source:
        what = f"{target} is not the file that its sample names by SHA-256" if there else f"{video} is not in {out}"
        raise ItemError(f"{what}, and the sample names no source", reason="no_source")
    fetch(sample.source, target, sample.sha256, settings.retries)
    if sample.sha256 is None and (fault := _wholeness(target)) != "yes":
        target.unlink()
        raise ItemError(f"{sample.source} gave no whole video: open it in a browser, or try again later", reason=fault)
    stale = "of another SHA-256" if sample.sha256 else "broken"
    return Made(target.stat().st_size / 1e6, stale if there else "")


def subtitles_of(sample: Sample) -> tuple[str, str] | None:
    """Where a sample's subtitle file belongs below the folder of videos, and its URL; None where there is none to have.

    It goes where the row says that it is (``meta.subtitle_path``), else beside the video.
    """
    video = PurePath(os.path.normpath(sample.video))
    named, place = sample.meta.get("subtitle_source"), sample.meta.get("subtitle_path")
    if isinstance(named, str) and named:
        suffix = PurePath(urlsplit(named).path).suffix.lower()
        beside = video.with_suffix(suffix if suffix in SUFFIXES else SUFFIXES[0])
        return os.path.normpath(place) if isinstance(place, str) and place else str(beside), named
    source = sample.source or ""
    local = Path(url2pathname(urlsplit(source).path) if source.startswith("file://") else source)
    if not source or ("://" in source and not source.startswith("file://")) or place:
        return None
    if (found := find_subtitles(local)) is None:
        return None
    return str(video.with_name(video.stem + found.name.removeprefix(local.stem))), str(found)


def _fetch_words(source: str, target: Path, retries: int) -> Made | None:
    """Fetch a subtitle file, unless it is there; what no line can be read from is not kept."""
    if target.is_file():
        return None
    fetch(source, target, retries=retries)
    try:
        read_subtitles(target)
    except ItemError as error:
        target.unlink()
        raise ItemError(
            f"{source} gave no subtitles: open it in a browser, or try again later", error.reason
        ) from error
    return Made(target.stat().st_size / 1e6)


def _wholeness(video: Path) -> str:
    """``yes``, or why a video must be fetched again; what else may be wrong with it, the stage `frames` finds."""
    try:
        probe(video)
    except ItemError as error:
        return error.reason if error.reason in BROKEN else "yes"
    return "yes"


def fetch(source: str, target: Path, sha256: str | None = None, retries: int = 4) -> None:
    """Copy `source` to `target`, going on where an earlier try broke off.

    The part that a break leaves lies beside `target` as ``.NAME.DIGEST.MARK.download`` until the next try; one that
    turns out to be damaged is removed.

    Raises:
        ItemError: `not_found`, `forbidden`, `size_mismatch`, `checksum_mismatch`, `unreachable` (no try came through, a
            later one may), or `download_failed`.
    """
    import aiohttp
    from huggingface_hub.errors import HTTPError
    from tenacity import RetryError, Retrying

    try:
        for attempt in Retrying(**tries(count=retries + 1, longest=30.0, passes=_may_pass)):
            with attempt:
                _fetch_once(source, target, sha256)
    except RetryError as error:
        last = _cause(error.last_attempt.exception() or error)
        raise ItemError(f"{source}: {last} (tried {retries + 1} times)", reason=UNREACHABLE) from last
    except (FileNotFoundError, PermissionError, aiohttp.ClientError, HTTPError, ValueError, ImportError) as error:
        cause = _cause(error)
        status = status_of(cause)
        if status in (401, 403) or isinstance(cause, PermissionError):
            raise ItemError(f"{source} may not be read: check your credentials", reason="forbidden") from error
        if status == 404 or isinstance(cause, FileNotFoundError):
            raise ItemError(f"{source} does not exist", reason="not_found") from error
        raise ItemError(f"{source} cannot be fetched: {cause}", reason="download_failed") from error


def _cause(error: BaseException) -> BaseException:
    """The server's answer behind the FileNotFoundError that fsspec makes of every failed request."""
    import aiohttp

    passing = isinstance(error, FileNotFoundError) and isinstance(error.__cause__, (aiohttp.ClientError, TimeoutError))
    return error.__cause__ if passing and error.__cause__ else error


def _may_pass(error: BaseException) -> bool:
    """Whether another try may help: breaks and overload, not absence, refusal or a full disk."""
    return may_pass(_cause(error)) or isinstance(error, _ShortRead)


class _ShortRead(Exception):
    """The source ended before its stated size."""


def _fetch_once(source: str, target: Path, sha256: str | None) -> None:
    remote, size, version = _open(source)
    mark = json_digest([source, size, version])[:16]
    target.parent.mkdir(parents=True, exist_ok=True)
    name = f".{target.name[:40]}.{json_digest(target.name)[:8]}"
    unfinished = target.with_name(f"{name}.{mark}.download")
    resumed = unfinished.exists()
    with remote:
        _append(remote, unfinished)
    try:
        _check(unfinished, source, size, sha256)
    except ItemError:
        unfinished.unlink()
        if not resumed:
            raise
        _fetch_once(source, target, sha256)  # the fault may lie in the part from before: from the start, then
        return
    unfinished.replace(target)
    for stale in target.parent.glob(f"{glob.escape(name)}.*.download"):
        stale.unlink()  # of another version of the source


def _check(file: Path, source: str, size: int | None, sha256: str | None) -> None:
    fetched = file.stat().st_size
    if size is not None and fetched < size:
        raise _ShortRead(f"the source ended after {fetched} of {size} bytes")
    if size is not None and fetched > size:
        raise ItemError(f"{source} has {fetched} bytes, not {size}", reason="size_mismatch")
    if sha256:
        found = file_digest(file)
        if found != sha256.lower():
            raise ItemError(
                f"{source} has SHA-256 {found}, the sample says {sha256}: check the sample or the source",
                reason="checksum_mismatch",
            )


def _open(source: str) -> tuple[IO[bytes], int | None, str]:
    """A source opened for reading, its size in bytes if known, and what tells its versions apart."""
    member = _TAR.fullmatch(source)
    if member:
        archive = _archive(member["base"])
        return archive.open(member["name"]), archive.size_of(member["name"]), archive.version
    filesystem, path = _filesystem(source)
    info = filesystem.info(path)
    return filesystem.open(path, "rb", block_size=_CHUNK), info.get("size"), _version(info)


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem and path of a URL; an address of the web goes out as it was given, in redirects too, for it
    may be signed. One that is not encoded (it has a space, say) is encoded."""
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        as_given = url.isascii() and url.isprintable() and " " not in url
        options = {"encoded": as_given, "client_kwargs": {"requote_redirect_url": False}}
    return fsspec.core.url_to_fs(url, **options)


def _version(info: dict[str, Any]) -> str:
    return " ".join(str(info[key]) for key in ("ETag", "Last-Modified", "mtime", "etag", "size") if info.get(key))


def _append(remote: IO[bytes], unfinished: Path) -> None:
    """Write what is missing of `remote` behind what `unfinished` holds already."""
    with unfinished.open("ab") as local:
        if local.tell():
            try:
                remote.seek(local.tell())
            except (ValueError, io.UnsupportedOperation):  # a plain stream: from the start, then
                local.truncate(0)
        while chunk := remote.read(_CHUNK):
            local.write(chunk)
        local.flush()
        os.fsync(local.fileno())


_TAR = re.compile(r"tar://(?P<name>[^:]+)::(?P<base>.+(?<!gz)(?<!bz2)(?<!xz)(?<!zst))")
"""A member of a tar archive that is not compressed, and so can be read in the middle."""
_FIRST_PART = re.compile(r"(?P<stem>.*\.tar\.(?:part[._-]?)?)(?P<number>a{2,}|0+[01]?)")
"""The first of an archive's parts as `split` names them: `.tar.part.aa`, `.tar.aa`, `.tar.000`, `.tar.001`."""


class _Archive:
    """A tar archive, whole or in parts, of which only the headers and the members asked for are read."""

    def __init__(self, base: str) -> None:
        self._parts = list(_parts(base))
        self.version = " ".join(_version(info) for _, _, info in self._parts)
        size = sum(int(info["size"]) for _, _, info in self._parts)
        headers = io.BufferedReader(_Joined(self._parts, 0, size, block_size=_HEADER_BLOCK), _HEADER_BLOCK)
        try:
            with tarfile.open(fileobj=headers, mode="r:") as archive:
                files = [entry for entry in archive if entry.isfile()]
        except tarfile.TarError as error:
            raise ItemError(f"{base} is no whole tar archive ({error})", reason="not_an_archive") from error
        self._members = {entry.name.removeprefix("./"): (entry.offset_data, entry.size) for entry in files}

    def size_of(self, name: str) -> int:
        """Size of a member in bytes."""
        if name.removeprefix("./") not in self._members:
            raise FileNotFoundError(name)
        return self._members[name.removeprefix("./")][1]

    def open(self, name: str) -> IO[bytes]:
        """A member, opened for reading."""
        size = self.size_of(name)
        raw = _Joined(self._parts, self._members[name.removeprefix("./")][0], size, block_size=_CHUNK)
        return io.BufferedReader(raw, _CHUNK)


def _parts(base: str) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Filesystem, path and description of an archive's file, or of all its parts from the first one on."""
    import aiohttp

    first = _FIRST_PART.fullmatch(base)
    number = first["number"] if first else ""
    url = base
    while True:
        filesystem, path = _filesystem(url)
        try:
            info = filesystem.info(path)
        except FileNotFoundError as error:
            cause = _cause(error)
            absent = cause is error or (isinstance(cause, aiohttp.ClientResponseError) and cause.status == 404)
            if url == base or not absent:
                raise
            return
        yield filesystem, path, info
        if first is None:
            return
        number = _following(number)
        url = first["stem"] + number


def _following(number: str) -> str:
    """The suffix after this one: 00 01, aa ab, az ba."""
    if number.isdigit():
        return str(int(number) + 1).zfill(len(number))
    last = number.rstrip("z")
    return (last[:-1] + chr(ord(last[-1]) + 1) if last else "a") + "a" * (len(number) - len(last))


class _Joined(io.RawIOBase):
    """Bytes [start, start + size) of several remote files read as one."""

    def __init__(self, parts: list[tuple[Any, str, dict[str, Any]]], start: int, size: int, block_size: int) -> None:
        super().__init__()
        self._parts, self._start, self._size, self._block_size = parts, start, size, block_size
        self._position = 0
        self._opened: dict[int, Any] = {}

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte; nothing is fetched."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read at most to the end of a part."""
        wanted = min(len(buffer), self._size - self._position)
        offset = self._start + self._position
        for number, (filesystem, path, info) in enumerate(self._parts):
            if offset < info["size"] and wanted > 0:
                if number not in self._opened:
                    self._opened[number] = filesystem.open(path, "rb", block_size=self._block_size)
                self._opened[number].seek(offset)
                data = self._opened[number].read(min(wanted, info["size"] - offset))
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)
            offset -= info["size"]
        return 0

    def close(self) -> None:
        """Close the parts that were opened."""
        for opened in self._opened.values():
            opened.close()
        super().close()


_archives: dict[str, _Archive] = {}
_archives_lock = threading.Lock()


def _archive(base: str) -> _Archive:
    """The archive at `base`; its headers are read once a process."""
    with _archives_lock:
        if base not in _archives:
            _archives[base] = _Archive(base)
        return _archives[base]
