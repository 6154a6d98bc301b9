"""The catalogue of a library: its folders of videos, what is known of each video, and where its rows lie.

A library is a folder of its own, apart from the videos, which are only ever read:

- ``library.json``: the catalogue; it is replaced whole, and what it does not name does not exist;
- ``frames/KEY.frames``, ``features/ENCODER/KEY.safetensors``, ``subtitles/KEY.subtitles``: the caches of a video;
- ``segments/NAME.safetensors``: the rows of many videos, one after another (`timesearch.library.rows`);
- ``failures.jsonl``: what the last run could not index.

A video's key is a digest of its path, links followed: two of the same name never share one, and what was indexed once
is found again when its folder is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import quote, unquote_to_bytes

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from timesearch.base.errors import ItemError, RequestError
from timesearch.base.files import inside, json_digest, write_text
from timesearch.base.untrusted import UntrustedError, mend_text, parse_json
from timesearch.video.probe import SUFFIXES

if TYPE_CHECKING:
    from timesearch.retrieval.encoder import Encoder

FILE = "library.json"
FORMAT = 1
_MOST_BYTES = 2**30
"""Of a catalogue: a video takes some 400 bytes."""
_KEY = "^[0-9a-f]{24}$"
_DIGEST = "^[0-9a-f]{64}$"


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class EncoderRecord(_Record):
    """The encoder whose rows a library holds, and what to load it from again: a folder, a URL, or a model's name."""

    name: str
    pretrained: str
    digest: str
    source: str
    tag: str | None = None

    @classmethod
    def of(cls, encoder: Encoder, source: str, tag: str | None) -> Self:
        """Of an encoder that was loaded from `source` with the pretrained `tag`; a folder is kept as a whole path."""
        place = str(Path(source).absolute()) if Path(source).is_dir() else source
        return cls(name=encoder.name, pretrained=encoder.pretrained, digest=encoder.digest, source=place, tag=tag)

    def require(self, encoder: Encoder, library: Path) -> None:
        """Refuse an encoder that did not make the rows.

        Raises:
            RequestError: naming both.
        """
        if encoder.digest != self.digest:
            raise RequestError(
                f"the library {library} was made by the encoder {self.name} ({self.pretrained}), and this one is "
                f"{encoder.name} ({encoder.pretrained}): load that one, or name another folder by --library"
            )


class Root(_Record):
    """A folder of videos: what it is called in the library, and its percent-encoded path."""

    label: str = Field(min_length=1)
    path: str = Field(min_length=1)

    @property
    def folder(self) -> Path:
        """Where it is."""
        return Path(_decoded(self.path))


class Entry(_Record):
    """A video of the library."""

    key: str = Field(pattern=_KEY)
    root: str = Field(description="label of its folder")
    path: str = Field(description="percent-encoded path below that")
    size: int = Field(ge=0, description="bytes, when it was read")
    modified_ns: int
    end: float = Field(ge=0, allow_inf_nan=False, description="seconds until when its last frame is shown")
    rows: int = Field(ge=1)
    features: str = Field(pattern=_DIGEST, description="of its feature cache")
    segment: str = Field("", pattern="^[0-9a-f]{0,16}$", description="holds its rows; empty where none does yet")
    first: int = Field(0, ge=0, description="its first row there")

    @property
    def name(self) -> str:
        """What people and agents call it: the label of its folder and its path below it."""
        return mend_text(f"{self.root}/{self.relative}")

    @property
    def relative(self) -> str:
        """Its path below its folder."""
        return _decoded(self.path)


class SegmentRecord(_Record):
    """A file of rows."""

    name: str = Field(pattern="^[0-9a-f]{16}$")
    rows: int = Field(ge=1)
    sha256: str = Field(pattern=_DIGEST)


class Catalogue(_Record):
    """``library.json``."""

    format: int
    encoder: EncoderRecord
    transform: dict[str, int | float] = Field(description="what shaped the frames, for as long as the library lives")
    roots: list[Root] = Field(default_factory=list)
    videos: list[Entry] = Field(default_factory=list)
    segments: list[SegmentRecord] = Field(default_factory=list)

    @classmethod
    def read(cls, library: Path) -> Catalogue:
        """Read the catalogue in a library's folder.

        Raises:
            MissingError: there is none.
            RequestError: it is damaged, or of another format.
        """
        path = library / FILE
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingError(
                f"{library} is no library: make one by `timesearch index FOLDER --library {library}`"
            ) from error
        except OSError as error:
            raise RequestError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
        try:
            value = parse_json(data, max_bytes=_MOST_BYTES)
            form = value.get("format") if isinstance(value, dict) else None
            if form == FORMAT:
                return cls.model_validate(value)
            reason = f"its format is {form!r}, and {FORMAT} is needed"
        except (UntrustedError, ValidationError) as error:
            reason = str(error).splitlines()[0]
        raise DamagedError(f"{path} is damaged ({reason}): name its folders to `timesearch index` to remake it")

    def write(self, library: Path) -> None:
        """Replace the catalogue in a library's folder."""
        write_text(library / FILE, self.model_dump_json() + "\n")

    def root_of(self, path: Path) -> Root | None:
        """The folder of videos that a path, links followed, lies in, or is."""
        return next((root for root in self.roots if path.is_relative_to(root.folder)), None)

    def add_root(self, folder: Path) -> Root:
        """Make `folder`, links followed, part of the library.

        A folder inside one that is there already is part of it; one around others takes their place.
        """
        known = self.root_of(folder)
        if known is not None:
            return known
        self.roots = [root for root in self.roots if not root.folder.is_relative_to(folder)]
        wanted = mend_text(folder.name) or "videos"
        taken = {root.label for root in self.roots}
        numbers = (f"{wanted} ({number})" for number in range(2, len(taken) + 3))
        label = next(label for label in (wanted, *numbers) if label not in taken)
        root = Root(label=label, path=quote(os.fsencode(folder)))
        self.roots.append(root)
        return root


class MissingError(RequestError):
    """There is no library in the folder."""


class DamagedError(RequestError):
    """The catalogue cannot be used, and is made again from the folders and the caches."""


def _decoded(quoted: str) -> str:
    return os.fsdecode(unquote_to_bytes(quoted))


def key_of(path: Path) -> str:
    """The key of the video at a path, links followed."""
    return json_digest(["video", str(path)])[:24]


@dataclass
class Found:
    """The videos of some folders, and what stands in the way of others."""

    videos: dict[str, Path] = field(default_factory=dict)
    """key -> path, links followed"""
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    """path, reason and sentence of what looks like a video and cannot be one of the library's"""


def find_videos(folder: Path, root: Path) -> Found:
    """The files below a folder that are named like videos; hidden files and folders are meant to be.

    Links to folders are not followed, so that none leads round.

    Args:
        folder: where to look, links followed.
        root: the folder of the library that it is part of: a link that leads out of it is a problem.
    """
    found = Found()
    for path in _walk(folder, found):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        try:
            real = path.resolve(strict=True)
        except (
            OSError,
            RuntimeError,
        ) as error:  # a link to nothing; Python 3.11 and 3.12 raise RuntimeError for a loop
            loop = isinstance(error, RuntimeError) or "symbolic" in (error.strerror or "")
            reason, why = ("symlink_loop", "a link that leads round") if loop else ("missing_file", "a link to nothing")
            found.problems.append((str(path), reason, f"{path} is {why}: remove it"))
            continue
        if not real.is_relative_to(root):
            found.problems.append(
                (str(path), "outside", f"{path} leads out of {root}, to {real}: index that folder, or remove the link")
            )
            continue
        found.videos.setdefault(key_of(real), real)
    return found


def _walk(folder: Path, found: Found) -> Iterator[Path]:
    folders = [folder]
    while folders:
        place = folders.pop()
        try:
            with os.scandir(place) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            found.problems.append(
                (str(place), "unreadable", f"{place} cannot be looked into ({error.strerror}): check its permissions")
            )
            continue
        folders += [
            Path(entry.path)
            for entry in listed[::-1]
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        ]
        yield from (Path(entry.path) for entry in listed if not entry.is_dir(follow_symlinks=False))


def file_of(entry: Entry, root: Root) -> Path:
    """The file of a video, as it is now.

    Raises:
        ItemError: `missing_file`, it is gone; `unsafe_path`, it leads out of its folder.
    """
    folder = root.folder
    path = inside(folder, entry.relative)
    with suppress(OSError, RuntimeError):
        real = path.resolve(strict=True)
        if not real.is_relative_to(folder):
            raise ItemError(f"{entry.name} leads out of {folder}: run `timesearch index` again", reason="unsafe_path")
        if stat.S_ISREG(real.stat().st_mode):
            return real
    raise ItemError(f"{entry.name} is gone from {folder}: run `timesearch index` again", reason="missing_file")


def below(path: Path, root: Root) -> str:
    """The percent-encoded path of a video below its folder."""
    return quote(os.fsencode(path.relative_to(root.folder)))


def by_key(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Entries by their keys."""
    return {entry.key: entry for entry in entries}
