"""The videos that may be asked about: those of the given folders, and those that were dropped onto the page."""

from __future__ import annotations

import filecmp
import itertools
import os
import re
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from urllib.parse import quote, unquote_to_bytes

from timesearch.base.errors import ItemError, RequestError
from timesearch.base.files import inside
from timesearch.base.untrusted import mend_text
from timesearch.video.probe import SUFFIXES

_NAME_BYTES = 255
"""Bytes of a file's name at most, on every file system that is common."""


def is_named_like_a_video(name: str) -> bool:
    """Whether a file's name ends as a video's does."""
    return PurePath(name).suffix.lower() in SUFFIXES


def file_name(said: str) -> str:
    """The name that a dropped file is kept under: what was said, without folders and without dots before it.

    Raises:
        RequestError: no file can bear it.
    """
    name = re.split(r"[/\\]", said)[-1].strip().lstrip(".")
    if not name.isprintable() or "\ufffd" in name:
        raise RequestError("the file's name holds characters that cannot be shown: rename it")
    if len(os.fsencode(name)) > _NAME_BYTES:
        raise RequestError(f"the file's name is longer than {_NAME_BYTES} bytes: rename it")
    return name


def check_folder(folder: Path) -> None:
    """Refuse what is no folder that can be read.

    Raises:
        ItemError: `unreadable`, with the reason.
    """
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise ItemError(
            f"{folder} is no folder of videos that can be read ({error.strerror})", reason="unreadable"
        ) from error


class Videos:
    """The videos that may be asked about.

    A video's identity is the number of its folder and its percent-encoded path below it: also a name that is no UTF-8
    goes to the page and comes back.

    Args:
        folders: the only folders that videos are read from.
        uploads: folder for dropped videos.
    """

    def __init__(self, folders: Sequence[Path], uploads: Path) -> None:
        self.uploads = uploads
        self._dropped = str(len(folders))
        self._roots = {str(number): folder.resolve() for number, folder in enumerate((*folders, uploads))}

    def all(self) -> list[dict[str, str]]:
        """Identity and name of each, in order of name."""
        found = []
        for number, root in self._roots.items():
            for path in _files(root):
                if _is_file_below(root, path):
                    relative = path.relative_to(root).as_posix()
                    found.append({"id": _identity(number, relative), "name": mend_text(relative)})
        return sorted(found, key=lambda video: video["name"])

    def path(self, identity: str) -> Path:
        """The file of a video.

        Raises:
            ItemError: `missing_file`, for anything that is no video below a folder that was given.
        """
        number, _, relative = identity.partition("/")
        with suppress(KeyError, ValueError, ItemError):
            root = self._roots[number]
            path = inside(root, os.fsdecode(unquote_to_bytes(relative)))
            if is_named_like_a_video(path.name) and _is_file_below(root, path):
                return path.resolve()
        raise ItemError("there is no such video", reason="missing_file")

    def name(self, identity: str) -> str:
        """What the video of an identity is called: its path below its folder."""
        return mend_text(os.fsdecode(unquote_to_bytes(identity.partition("/")[2])))

    def new_partial(self) -> Path:
        """A path for an upload while it comes in, in the folder of uploads; who asks for it removes it."""
        self.uploads.mkdir(parents=True, exist_ok=True)
        return self.uploads / f".{uuid.uuid4().hex}.partial"

    def keep(self, partial: Path, name: str) -> dict[str, str]:
        """Give a whole upload its name, with a number after it where another video bears that name already.

        Returns:
            Its identity and name: those of the video that is there, where it holds the same bytes.

        Raises:
            OSError: the folder takes no more.
        """
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        for candidate in _numbered(name):
            target = self.uploads / candidate
            try:
                os.link(partial, target)
            except FileExistsError:
                if not filecmp.cmp(partial, target, shallow=False):
                    continue
            return {"id": _identity(self._dropped, candidate), "name": candidate}
        raise AssertionError("numbers do not end")


def _identity(number: str, relative: str) -> str:
    return f"{number}/{quote(os.fsencode(relative))}"


def _files(root: Path) -> Iterator[Path]:
    """The files below a folder that are named like videos; folders that cannot be read are passed over."""
    folders = [root]
    while folders:
        with suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif is_named_like_a_video(entry.name):
                    yield Path(entry.path)


def _is_file_below(root: Path, path: Path) -> bool:
    """Whether a path, links followed, is a regular file inside `root`."""
    try:
        real = path.resolve(strict=True)
        return real.is_relative_to(root) and stat.S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a NUL
        return False


def _numbered(name: str) -> Iterator[str]:
    """The name, and then `name (2).mp4`, `name (3).mp4`, cut to what a file system takes."""
    yield name
    stem, suffix = PurePath(name).stem, PurePath(name).suffix
    for number in itertools.count(2):
        ending = f" ({number}){suffix}"
        while len(os.fsencode(stem + ending)) > _NAME_BYTES:
            stem = stem[:-1]
        yield stem + ending
