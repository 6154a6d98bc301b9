"""Indexing: the frames, features and words of folders of videos, brought into a library and kept up with them.

What is up to date is not made again, so that a run that was stopped, or killed, goes on where it was: each cache is
whole or absent, and the catalogue is replaced whole, now and then on the way and at the end.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from timesearch.base.batch import BatchResult, Failure, Made, run_batch
from timesearch.base.errors import ItemError, RequestError
from timesearch.base.exclusive import exclusive
from timesearch.library.catalogue import (
    FORMAT,
    Catalogue,
    DamagedError,
    EncoderRecord,
    Entry,
    Found,
    MissingError,
    below,
    by_key,
    find_videos,
)
from timesearch.library.rows import Segment, plan, segment_path, write_segment
from timesearch.retrieval.features import FeatureCache, make_feature_cache
from timesearch.retrieval.features import why_stale as why_features_stale
from timesearch.retrieval.noise import encode_prompts
from timesearch.video.frames import FrameCache, cache_path, make_frame_cache, transform_of, why_stale
from timesearch.video.probe import check_readable
from timesearch.video.subtitles import find_subtitles, index_path, make_index, speech_of

if TYPE_CHECKING:
    from timesearch.retrieval.encoder import Encoder
    from timesearch.settings import Frames, Settings

Say = Callable[[str], None]
_COMMIT_ROWS = 2**17
"""Rows after which those that are there can be searched while the others are made."""
_COMMIT_SECONDS = 300.0


def frames_folder(library: Path) -> Path:
    """Where the frame caches of a library are."""
    return library / "frames"


def features_folder(library: Path, encoder: EncoderRecord | Encoder) -> Path:
    """Where the feature caches of a library are."""
    return library / "features" / encoder.digest[:16]


def subtitles_folder(library: Path) -> Path:
    """Where the subtitle indexes of a library are."""
    return library / "subtitles"


def segments_folder(library: Path) -> Path:
    """Where the segments of a library are."""
    return library / "segments"


@dataclass
class Indexed:
    """What an index run came to."""

    batch: BatchResult
    videos: int = 0
    """in the library now"""
    rows: int = 0
    """frames that can be searched now"""
    vanished: list[str] = field(default_factory=list)
    """names of videos that are no longer there"""


def index_folders(
    library: Path,
    folders: Sequence[Path],
    settings: Settings,
    encoder: Encoder,
    record: EncoderRecord,
    say: Say = lambda _: None,
) -> Indexed:
    """Bring a library up to date with folders of videos, which become part of it.

    Args:
        library: its folder; made where it is not there.
        folders: of videos; none for all that are part of it already.
        settings: of frames, features and speech. A library keeps the rate and size of frames that it was made with.
        encoder: embeds the frames.
        record: what that encoder is, and where it comes from.
        say: told what a person should know besides.

    Raises:
        RequestError: a folder cannot be read or holds no video, or the library was made by another encoder.
    """
    with exclusive(library):
        run = _Run(library, settings, encoder, record, say)
        failures = run.look(folders)
        run.check_segments()
        items = {run.name_of(key): key for key in run.found.videos}
        at_once = max(1, min(settings.frames.workers, len(items)))
        run.threads = -(-(os.cpu_count() or 1) // at_once)
        batch = run_batch(
            "index",
            list(items),
            lambda name: run.bring(items[name]),
            failures=library / "failures.jsonl",
            workers=at_once,
            set_aside=[*failures, *run.failures],
        )
        run.failed = {items[failure.item] for failure in batch.failures if failure.item in items}
        run.commit(last=True)
        run.clear()
        videos = run.catalogue.videos
        return Indexed(batch, len(videos), sum(video.rows for video in videos), sorted(run.vanished.values()))


class _Run:
    """One run: what was known, what was found, and what has been made so far."""

    def __init__(self, library: Path, settings: Settings, encoder: Encoder, record: EncoderRecord, say: Say) -> None:
        self._library, self._encoder, self._say = library, encoder, say
        self._batch_size = settings.features.batch_size
        self._speech = speech_of(settings.subtitles.speech)
        self._lock = threading.Lock()
        self.threads = 0
        self.found = Found()
        self.failures: list[Failure] = []
        self.failed: set[str] = set()
        self.vanished: dict[str, str] = {}
        self._away: set[str] = set()
        self._ready: dict[str, Entry] = {}
        self._fresh = 0
        self._committed = time.monotonic()
        new = Catalogue(format=FORMAT, encoder=record, transform=transform_of(settings.frames))
        try:
            self.catalogue = Catalogue.read(library)
        except MissingError:
            self.catalogue = new
        except DamagedError:
            say(f"the catalogue of {library} was damaged, and is made again")
            self.catalogue = new
        self.catalogue.encoder.require(encoder, library)
        self.catalogue.encoder = record
        self._frames: Frames = settings.frames.model_copy(update=self.catalogue.transform)
        if transform_of(settings.frames) != self.catalogue.transform:
            say(f"{library} keeps the rate and size of frames that it was made with, not those of the parameters")
        self._known = by_key(self.catalogue.videos)

    def look(self, folders: Sequence[Path]) -> list[Failure]:
        """Find the videos of the folders, and what of the library is no longer there.

        Raises:
            RequestError: a folder cannot be read, or none holds a video.
        """
        places = {root.label: root.folder for root in self.catalogue.roots}
        known = {entry.key: (entry, places[entry.root]) for entry in self.catalogue.videos if entry.root in places}
        gone: list[Failure] = []
        scopes: list[Path] = []
        if not folders and not places:
            raise RequestError(f"{self._library} knows no folder of videos yet: name one")
        for folder in folders or places.values():
            try:
                real = folder.resolve(strict=True)
                os.scandir(real).close()
            except (OSError, RuntimeError) as error:
                why = getattr(error, "strerror", None) or "it leads round"
                said = f"{folder} is no folder of videos that can be read ({why}): name one that is there"
                if folders:
                    raise RequestError(said) from error
                gone.append(Failure(str(folder), "missing_folder", f"{said}, and what it held is not searched"))
                scopes.append(folder)
                continue
            scopes.append(real)
        for scope in scopes:
            root = self.catalogue.add_root(scope)
            if scope.is_dir():
                found = find_videos(scope, root.folder)
                self.found.videos |= found.videos
                self.failures += [Failure(*problem) for problem in found.problems]
            else:
                found = Found()
            mine = {
                key: entry.name
                for key, (entry, folder) in known.items()
                if folder.is_relative_to(scope) or (folder / entry.relative).is_relative_to(scope)
            }
            lost = {key: name for key, name in mine.items() if key not in found.videos}
            if lost and not found.videos:
                self._away |= lost.keys()
                if scope.is_dir():
                    self._say(f"{scope} holds none of its {len(lost)} videos any more: what was made of them is kept")
            self.vanished |= lost
            if not mine and not found.videos and not found.problems:
                raise RequestError(f"there is no video in {scope}: name a folder that holds some")
        return gone

    def name_of(self, key: str) -> str:
        """What a video that was found is called."""
        path = self.found.videos[key]
        root = self.catalogue.root_of(path)
        assert root is not None, "videos are looked for in the library's folders"
        return f"{root.label}/{path.relative_to(root.folder)}"

    def check_segments(self) -> None:
        """Set aside the segments that are not what was written; their rows are taken from the caches again."""
        whole = []
        for segment in self.catalogue.segments:
            try:
                Segment.open(segments_folder(self._library), segment)
                whole.append(segment)
            except ItemError:
                self._say(f"{segment.rows} rows of {self._library} were damaged, and are made again")
        names = {segment.name for segment in whole}
        self.catalogue.segments = whole
        for key, entry in list(self._known.items()):
            if entry.segment in names:
                continue
            if key in self.found.videos or self._is_whole(entry):
                self._known[key] = entry.model_copy(update={"segment": "", "first": 0})
            else:
                del self._known[key]
                self.failures.append(
                    Failure(entry.name, "missing_cache", f"{entry.name} has to be read again: index its folder, too")
                )

    def _is_whole(self, entry: Entry) -> bool:
        with suppress(ItemError):
            return FeatureCache.open(self._features(entry)).verify() == entry.features
        return False

    def _features(self, entry: Entry) -> Path:
        return features_folder(self._library, self._encoder) / f"{entry.key}.safetensors"

    def bring(self, key: str) -> Made | None:
        """Make what is missing of a video; None where nothing is."""
        video = self.found.videos[key]
        try:
            return self._bring(key, video)
        except FileNotFoundError as error:
            raise ItemError(f"{video} vanished while it was read", reason="missing_file") from error

    def _bring(self, key: str, video: Path) -> Made | None:
        fingerprint = check_readable(video)
        frames = cache_path(frames_folder(self._library), key)
        features = features_folder(self._library, self._encoder) / f"{key}.safetensors"
        stale = why_stale(frames, video, self._frames)
        made = stale is not None
        if made:
            make_frame_cache(video, frames, self._frames, self.threads)
        cache = FrameCache.open(frames)
        outdated = why_features_stale(features, cache, self._encoder)
        if outdated is not None:
            make_feature_cache(frames, features, self._encoder, self._batch_size)
            stale, made = stale or outdated, True
        known = self._known.get(key)
        same = not made and known is not None and known.modified_ns == fingerprint.modified_ns
        self._index_words(key, video, same)
        root = self.catalogue.root_of(video)
        assert root is not None
        entry = Entry(
            key=key,
            root=root.label,
            path=below(video, root),
            size=fingerprint.size,
            modified_ns=fingerprint.modified_ns,
            end=cache.end,
            rows=len(cache),
            features=FeatureCache.open(features).features_sha256,
        )
        self._note(entry)
        return Made(len(cache), stale or "") if made else None

    def _index_words(self, key: str, video: Path, same: bool) -> None:
        """Make the words of a video searchable; it stays in the library where its subtitles are bad.

        `same` says that it was looked into before: where that gave no words, it is not opened again.
        """
        target = index_path(subtitles_folder(self._library), key)
        if same and not target.exists() and find_subtitles(video) is None and self._speech is None:
            return
        try:
            make_index(video, target, say=self._say, speech=self._speech)
        except ItemError as error:
            self._say(str(error))

    def _note(self, entry: Entry) -> None:
        with self._lock:
            known = self._known.get(entry.key)
            if known is not None and known.features == entry.features and known.rows == entry.rows:
                entry = entry.model_copy(update={"segment": known.segment, "first": known.first})
            self._ready[entry.key] = entry
            self._fresh += 0 if entry.segment else entry.rows
            late = time.monotonic() - self._committed > _COMMIT_SECONDS
            if self._fresh and (self._fresh >= _COMMIT_ROWS or late):
                self._commit()

    def commit(self, last: bool = False) -> None:
        """Let what has been made be searched; at the end, without what failed."""
        with self._lock:
            for key in self.failed if last else ():
                self._known.pop(key, None)
                self._ready.pop(key, None)
            self._commit()

    def _commit(self) -> None:
        videos = {key: entry for key, entry in {**self._known, **self._ready}.items() if key not in self.vanished}
        segments, parcels = plan(self.catalogue.segments, sorted(videos.values(), key=lambda entry: entry.name))
        # A video that is still to come may be changing: it is left out until then, if its rows have to move.
        coming = self.found.videos.keys() - self._ready.keys()
        for entry in [entry for parcel in parcels for entry in parcel if entry.key in coming]:
            del videos[entry.key]
        parcels = [kept for parcel in parcels if (kept := [entry for entry in parcel if entry.key not in coming])]
        if parcels:
            prompts = encode_prompts(self._encoder)
            for parcel in parcels:
                record, placed = write_segment(segments_folder(self._library), parcel, self._features, prompts)
                segments.append(record)
                videos |= by_key(placed)
        self._known |= by_key(entry for key, entry in videos.items() if key in self._known)
        self._ready |= by_key(entry for key, entry in videos.items() if key in self._ready)
        self.catalogue.segments = segments
        self.catalogue.videos = sorted(videos.values(), key=lambda entry: entry.name)
        self.catalogue.write(self._library)
        self._fresh, self._committed = 0, time.monotonic()

    def clear(self) -> None:
        """Remove what the catalogue does not name any more: segments that were joined, caches of vanished videos."""
        folder = segments_folder(self._library)
        named = {segment_path(folder, segment.name).name for segment in self.catalogue.segments}
        for path in folder.glob("*.safetensors"):
            if path.name not in named:
                path.unlink(missing_ok=True)
        for key in self.vanished.keys() - self._away:
            cache_path(frames_folder(self._library), key).unlink(missing_ok=True)
            index_path(subtitles_folder(self._library), key).unlink(missing_ok=True)
            for features in (self._library / "features").glob(f"*/{key}.safetensors"):
                features.unlink(missing_ok=True)
