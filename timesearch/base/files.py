"""Files that are either whole or absent, and paths that stay inside their root."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timesearch.base.errors import ItemError

_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""Bytes of a file's name and of its path on Linux."""


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it is synced and renamed onto it, else removed.

    A reader, or a process killed at any moment, therefore never sees a partial file under `target`.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name[:50]}.{uuid.uuid4().hex[:8]}.partial")  # within 255 bytes of UTF-8
    try:
        yield partial
        with partial.open("rb+") as handle:
            os.fsync(handle.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_text(target: Path | str, text: str) -> None:
    """Write `text` (UTF-8) to `target` atomically."""
    with atomic_path(target) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(target: Path | str, value: Any) -> None:
    """Write `value` as indented JSON with a stable key order and no NaN, atomically."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(target: Path | str, rows: Iterable[dict[str, Any]]) -> None:
    """Write `rows` as JSON lines, atomically."""
    with atomic_path(target) as partial, partial.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def file_digest(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256, in hex, of a JSON value in canonical form."""
    return hashlib.sha256(_canonical(value)).hexdigest()


def sequence_digest(items: Iterable[Any]) -> tuple[int, str]:
    """How many items there are, and `json_digest` of the list of them, which need not be held at once."""
    digest = hashlib.sha256(b"[")
    count = 0
    for count, item in enumerate(items, start=1):
        digest.update(b"," * (count > 1) + _canonical(item))
    digest.update(b"]")
    return count, digest.hexdigest()


def _canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode(errors="surrogatepass")


def project_folder() -> Path:
    """The folder of the project that runs here.

    `dvc exp run --temp` and `--queue` run in a copy under ``.dvc/tmp/exps`` of the project, which is removed with all
    that DVC does not know of: what is to outlast it goes into the project itself.
    """
    here = Path.cwd()
    copies = [folder for folder in here.parents if folder.parts[-3:] == (".dvc", "tmp", "exps")]
    return copies[0].parents[2] if copies else here


def inside(root: Path | str, relative: str) -> Path:
    """Join `relative` to `root`.

    Raises:
        ItemError: `unsafe_path`, if the result would lie outside `root` (``..`` or an absolute path), or `relative` is
            no name that a file can have.
    """
    base = Path(root).absolute()
    joined = Path(os.path.normpath(base / relative))
    try:
        written = os.fsencode(joined)
    except UnicodeEncodeError:
        written = b"\0"
    if b"\0" in written or len(written) > _LONGEST_PATH or max(map(len, written.split(b"/"))) > _LONGEST_NAME:
        raise ItemError(f"{relative[:80]!r} is no name that a file can have: shorten it", reason="unsafe_path")
    if joined == base or not joined.is_relative_to(base):
        raise ItemError(f"{relative!r} leads out of {root}: name a path inside it", reason="unsafe_path")
    return joined
