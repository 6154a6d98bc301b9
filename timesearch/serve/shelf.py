"""All the videos that the page offers: those of folders, those that were dropped, and those of a library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from timesearch.base.errors import ItemError, RequestError
from timesearch.base.stopping import NEVER, Stop
from timesearch.inference.ask import Asker
from timesearch.library.answer import Searched
from timesearch.library.catalogue import Entry
from timesearch.library.library import Found, Library, Rows, check_query, find_moments
from timesearch.library.loose import Loose, LooseEntry, LooseRows
from timesearch.retrieval.encoder import Encoder
from timesearch.serve.attached import Attached
from timesearch.serve.videos import Videos
from timesearch.video.frames import FrameCache, cache_path
from timesearch.video.subtitles import Subtitles

ALL = "all"
"""Stands for a video's identity where a question is about all that can be searched."""
_OF_LIBRARY = "library"
"""Stands for the number of a folder in the identities of a library's videos; its key follows."""


@dataclass(frozen=True)
class Held:
    """A video that is offered: its identity, its name, its file, and the name of its caches and who asks about them."""

    identity: str
    name: str
    path: Path
    cache: str
    asker: Asker
    of_library: bool

    def frames(self) -> FrameCache | None:
        """Its frame cache; None where it has not been prepared, or what is there is damaged."""
        try:
            return open_frames(cache_path(self.asker.frames, self.cache))
        except (OSError, ItemError):
            return None

    def is_prepared(self) -> bool:
        """Whether its caches are there."""
        return cache_path(self.asker.frames, self.cache).is_file() and self.asker.features_of(self.cache).is_file()


class Shelf:
    """The videos that are offered, and the search over those that can be searched: the library's and prepared ones.

    Args:
        videos: of folders, and dropped ones.
        asker: prepares and answers about those.
        library: a library made by the same encoder, if one is offered.
    """

    def __init__(self, videos: Videos, asker: Asker, library: Library | None) -> None:
        self.videos = videos
        self.asker, self._library = asker, library
        self.attached = Attached(videos, asker.forget)
        self.librarian = asker if library is None else asker.at(library.folder)
        """Who answers about the library's videos; without a library, about the prepared ones."""
        self._rows = LooseRows(asker.encoder)

    def all(self) -> list[dict[str, Any]]:
        """What a list of them says of each: `id`, `name`, `seconds` (None where not known) and `prepared`."""
        found = [self._listed(video) for video in self.videos.all()]
        return sorted([*self._of_library(), *found], key=lambda video: str(video["name"]))

    def _listed(self, video: dict[str, str]) -> dict[str, Any]:
        try:
            held = self.held(video["id"])
        except ItemError:  # it went meanwhile
            return {**video, "seconds": None, "prepared": False}
        prepared = held.is_prepared()
        frames = held.frames() if prepared else None
        return {**video, "seconds": None if frames is None else frames.end, "prepared": prepared}

    def _of_library(self) -> Iterator[dict[str, Any]]:
        for entry in () if self._library is None else self._library.videos():
            yield {"id": _identity(entry), "name": entry.name, "seconds": entry.end, "prepared": True}

    def names(self) -> list[tuple[str, str]]:
        """Name and identity of each, in order of name."""
        return sorted((video["name"], video["id"]) for video in (*self.videos.all(), *self._of_library()))

    def is_attached(self, identity: str) -> bool:
        """Whether a video came with a question, and goes some time after it."""
        try:
            return self.attached.holds(self.videos.path(identity))
        except ItemError:
            return False

    def held(self, identity: str) -> Held:
        """A video by its identity.

        Raises:
            ItemError: `missing_file` or `missing`: there is no such video.
        """
        number, _, rest = identity.partition("/")
        if number == _OF_LIBRARY and self._library is not None:
            entry = next((video for video in self._library.videos() if video.key == rest), None)
            if entry is None:
                raise ItemError("there is no such video in the library", reason="missing_file")
            path = self._library.path(entry)
            return Held(identity, entry.name, path.resolve(), entry.key, self.librarian, of_library=True)
        path = self.videos.path(identity)
        return Held(identity, self.videos.name(identity), path, self.asker.name_of(path), self.asker, False)

    def find(self, query: str, count: int, stop: Stop = NEVER) -> tuple[Found, dict[str, str]]:
        """The moments that show something, and those in which it is said, of all videos that can be searched.

        Returns:
            What was found, and the identity of each video by its key.

        Raises:
            RequestError: the query cannot be searched for.
        """
        check_query(query)
        rows, identities = self._searched()
        return find_moments(rows, self._words, self.asker.encoder, query, count, stop), identities

    def _words(self, entry: Entry) -> Subtitles | None:
        if isinstance(entry, LooseEntry) or self._library is None:
            return self.asker.words_of(entry.key)
        return self._library.words(entry)

    def _searched(self) -> tuple[Rows, dict[str, str]]:
        loose: dict[str, Loose] = {}
        identities: dict[str, str] = {}
        for video in self.videos.all():
            try:
                held = self.held(video["id"])
            except ItemError:
                continue
            if held.is_prepared():
                loose[held.cache] = Loose(held.cache, held.name, self.asker.features_of(held.cache))
                identities[held.cache] = held.identity
        rows = self._rows.of(loose.values())
        if self._library is not None:
            rows += self._library.rows()
            identities |= {entry.key: _identity(entry) for entry in self._library.videos()}
        return rows, identities

    def searched(self) -> tuple[Searched, Callable[[Entry], str]]:
        """What a question about all videos is asked of, the library, or the prepared ones where there is none; and what
        tells the identities of their videos.
        """
        if self._library is not None:
            return self._library, _identity
        rows, identities = self._searched()
        return _Prepared(rows, self._words), lambda entry: identities[entry.key]


@dataclass(frozen=True)
class _Prepared:
    """Videos that were prepared one by one, searched as a library is."""

    rows: Rows
    words: Callable[[Entry], Subtitles | None]

    def find(
        self, encoder: Encoder, query: str, count: int = 10, videos: Sequence[Entry] | None = None, stop: Stop = NEVER
    ) -> Found:
        """As `Library.find`, always in all of them.

        Raises:
            RequestError: there are none.
        """
        if not self.rows.videos:
            raise RequestError("no video has been prepared yet: ask about one first, or serve a library")
        return find_moments(self.rows, self.words, encoder, query, count, stop)


def _identity(entry: Entry) -> str:
    return f"{_OF_LIBRARY}/{entry.key}"


def open_frames(path: Path) -> FrameCache:
    """A frame cache; those that were used last stay open.

    Raises:
        OSError: it is not there.
        ItemError: it is damaged.
    """
    return _open_state(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _open_state(path: Path, modified_ns: int) -> FrameCache:
    return FrameCache.open(path)
