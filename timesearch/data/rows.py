"""Files of samples and predictions, read row by row.

They are JSON lines, or files in a form that benchmarks publish, whose rows `timesearch.data.formats` turns into ours.
"""

from __future__ import annotations

import codecs
import io
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TypeVar, overload

from pydantic import ValidationError

from timesearch.base.batch import Failure
from timesearch.base.errors import RequestError
from timesearch.base.untrusted import MAX_BYTES, UntrustedError, is_plain, marked_encoding, parse_json
from timesearch.data.formats import to_rows
from timesearch.data.samples import RowError, Sample, UnreadableError, item_of, validate

T = TypeVar("T", bound=Sample)
_WHOLE = 2**30
"""Bytes at most of a file that is one JSON value; JSON lines may be longer."""
_FORMS = "JSON lines, a JSON list of objects, LV-Haystack's object of columns and Parquet are read"
_HELD = 20_000
"""Samples that are held as objects; of a larger file each is made when it is asked for."""


def read_rows(
    path: Path | str, on_error: Callable[[int, RequestError], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line or item number from 1, row) of a file of JSON lines, a JSON list or a Parquet file.

    A JSON file may also be one object, an object of columns (LV-Haystack's form, and what pandas writes), or hold its
    list under ``data``; which of these it is is told by its text, not its name. JSON is UTF-8, or UTF-16 or UTF-32 with
    a byte-order mark. JSON lines and Parquet are streamed: memory does not grow with the file.

    Args:
        path: the file.
        on_error: called with the number and the error of a broken line, which is then skipped; None raises it.

    Raises:
        RequestError: the file is missing or in no form that is read, or a line is not a JSON object (named with file
            and line).
    """
    path = Path(path)
    for number, item in _items(path):
        row = _load(path, number, item)
        if not isinstance(row, RowError):
            yield number, row
        elif on_error is None:
            raise row
        else:
            on_error(number, row)


def read_models(path: Path | str, model: type[T], report: Callable[[Failure], None] | None = None) -> Iterator[T]:
    """Yield the samples or predictions of a file in the project's form or a published one, line by line.

    Args:
        path: as in `read_rows`.
        model: `Sample` or `Prediction`.
        report: is told of each row that cannot be used, which is then left out; None raises its error.

    Raises:
        RequestError: the file is missing or in no form that is read.
    """
    for row, _ in _read(Path(path), model, report):
        yield row


def read_samples(path: Path | str, report: Callable[[Failure], None] | None = None) -> Sequence[Sample]:
    """Read a sample file: the project's JSON lines, or a file in a form that `timesearch.data.formats` knows.

    Args:
        path: as in `read_rows`.
        report: is told of each row that cannot be used, which is then left out; None raises its error.

    Returns:
        The samples. More than 20,000 are held as compressed text, about 50 bytes each, and made anew whenever one is
        asked for.

    Raises:
        RequestError: the file is missing or in no form that is read, or has rows and none that can be used.
    """
    bad: list[Failure] = []

    def set_aside(failure: Failure) -> None:
        if report is None:
            raise RowError(failure.message, failure.reason, failure.item)
        bad.append(failure)
        report(failure)

    samples: list[Sample] = []
    packed = _Packed()
    for sample, line in _read(Path(path), Sample, set_aside):
        packed.append(line or sample.model_dump_json().encode())
        if len(packed) <= _HELD:
            samples.append(sample)
        elif samples:
            samples.clear()
    if bad and not len(packed):
        raise RequestError(f"{path} has no row that can be used ({len(bad)} left out). The first: {bad[0].message}")
    return samples if len(packed) <= _HELD else packed


def read_all_samples(paths: Sequence[Path], report: Callable[[Failure], None]) -> Iterator[Sample]:
    """The samples of several files, such as the train and the test split; each is read whole at once.

    Raises:
        RequestError: as `read_samples`.
    """
    return chain(*[read_samples(path, report) for path in paths])


class _Packed(Sequence[Sample]):
    """Samples as compressed JSON lines, which take a fiftieth of the memory that their objects do."""

    _BLOCK = 512

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._last: list[bytes] = []

    def append(self, line: bytes) -> None:
        """Add the JSON of a sample, in one line."""
        self._last.append(line.strip())
        if len(self._last) == self._BLOCK:
            self._blocks.append(zlib.compress(b"\n".join(self._last), 1))
            self._last = []

    def __len__(self) -> int:
        return len(self._blocks) * self._BLOCK + len(self._last)

    def __iter__(self) -> Iterator[Sample]:
        for block in range(len(self._blocks) + 1):
            yield from map(Sample.model_validate_json, self._lines(block))

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        block, place = divmod(range(len(self))[index], self._BLOCK)
        return Sample.model_validate_json(self._lines(block)[place])

    def _lines(self, block: int) -> list[bytes]:
        return zlib.decompress(self._blocks[block]).split(b"\n") if block < len(self._blocks) else self._last


def _read(path: Path, model: type[T], report: Callable[[Failure], None] | None) -> Iterator[tuple[T, bytes | None]]:
    """Rows as `model`, each with its line where that is its JSON as it stands."""
    seen: set[str] = set()
    accept = model.__pydantic_validator__.validate_json
    for number, item in _items(path):
        line: bytes | None = None
        rows: list[T | RowError]
        if isinstance(item, bytes) and is_plain(item):
            # One pass in compiled code serves nearly all lines. What it refuses, the long way below reads or names.
            try:
                rows, line = [accept(item)], item
            except ValidationError:
                rows = _convert(path, number, item, model)
        else:
            rows = _convert(path, number, item, model)
        for row in rows:
            if isinstance(row, model) and row.id in seen:
                row = RowError(
                    f"{path}, line {number}: id {row.id[:200]!r} occurs more than once: the first row counts, give "
                    "every row an id of its own",
                    "duplicate_id",
                    row.id,
                )
            if isinstance(row, RowError):
                if report is None:
                    raise row
                report(Failure(row.item or f"line {number}", row.reason, str(row)))
            else:
                seen.add(row.id)
                yield row, line


def _convert(path: Path, number: int, item: Any, model: type[T]) -> list[T | RowError]:
    """The models that a line or item holds, or what is wrong with each."""
    where = f"{path}, line {number}"
    row = _load(path, number, item)
    if isinstance(row, RowError):
        return [row]
    try:
        rows = _to_rows(row, number, where)
    except RowError as error:
        return [error]
    found: list[T | RowError] = []
    for each in rows:
        try:
            found.append(validate(model, each, where))
        except RowError as error:
            found.append(error)
    return found


def _to_rows(row: dict[str, Any], number: int, where: str) -> list[dict[str, Any]]:
    """`timesearch.data.formats.to_rows`, or one sentence about a row that looks like a benchmark's and is not.

    Raises:
        RowError: the sentence.
    """
    try:
        return to_rows(row, number)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        detail = str(error) if isinstance(error, UnreadableError) else f"{type(error).__name__}: {error}"
        raise RowError(
            f"{where}: not a row of the benchmark that it looks like ({detail[:300]})", item=item_of(row)
        ) from error


def _load(path: Path, number: int, item: Any) -> Any:
    """The object that a line or item is, or what is wrong with it."""
    if isinstance(item, bytes):
        try:
            item = parse_json(item)
        except UntrustedError as error:
            detail = str(error) if str(error).startswith(("not", "nested", "longer")) else f"not JSON ({error})"
            hint = f"; {_FORMS}" if number == 1 else ""
            return RowError(f"{path}, line {number}: {detail}{hint}", "not_json")
    if isinstance(item, dict | RowError):
        return item
    return RowError(f"{path}, line {number}: a JSON object is expected, not {type(item).__name__}", "not_json")


def _items(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, item) of each row: a line as bytes, a value that was read already, or the error of a line."""
    try:
        if not path.is_file():  # nor a pipe, which would wait for a writer
            raise RequestError(f"{path} does not exist: name a .jsonl, .json or .parquet file")
        handle = path.open("rb")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    with handle:
        start = handle.peek(4)[:4]
        if start == b"PAR1":
            yield from enumerate(_parquet_rows(path), start=1)
            return
        if path.suffix == ".parquet":
            raise RequestError(f"{path} is no Parquet file: fetch it again")
        text = _in_utf8(path, handle, start)
        opening = list(islice(_lines(path, text), 2))
        rows = _rows_of_one_value(path, text, opening)
        if rows is not None:
            yield from enumerate(rows, start=1)
            return
        yield from opening
        yield from _lines(path, text, after=opening[-1][0] if opening else 0)


def _in_utf8(path: Path, handle: IO[bytes], start: bytes) -> IO[bytes]:
    """The text of a file in UTF-8; UTF-16 and UTF-32 are told by their byte-order mark."""
    if start[:2] == b"\x1f\x8b":
        raise RequestError(f"{path} is compressed: unpack it first ({_FORMS})")
    encoding = marked_encoding(start)
    if encoding is None:
        return handle
    try:
        return io.BytesIO(handle.read(_WHOLE).decode(encoding).encode())
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not {encoding.upper()} text, as its first bytes say: write it in UTF-8"
        ) from error


def _lines(path: Path, text: IO[bytes], after: int = 0) -> Iterator[tuple[int, Any]]:
    """The lines that are not blank, with their numbers; `after` is the number of the last line that was read."""
    number = after
    while line := text.readline(MAX_BYTES + 1):
        number += 1
        if len(line) > MAX_BYTES:
            while line and not line.endswith(b"\n"):
                line = text.readline(MAX_BYTES + 1)
            longest = MAX_BYTES // 2**20
            yield number, RowError(f"{path}, line {number}: longer than {longest} MiB", "not_json")
        elif not line.removeprefix(codecs.BOM_UTF8).isspace():
            yield number, line


def _rows_of_one_value(path: Path, text: IO[bytes], opening: Sequence[tuple[int, Any]]) -> list[Any] | None:
    """The rows of a file that is one JSON value, over one line or many; None for JSON lines.

    Args:
        path: the file.
        text: its text, read up to the end of `opening`.
        opening: its first two lines.
    """
    loaded = [_load_any(line) for _, line in opening]
    if len(loaded) == 1 and not isinstance(loaded[0], UntrustedError):
        return _rows_of(loaded[0])
    # The first of many lines may be broken; but where the second is no object either, the lines may be one's.
    if not loaded or not isinstance(loaded[0], UntrustedError) or isinstance(loaded[-1], dict):
        return None
    place = text.tell()
    text.seek(0)
    if text.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] not in (b"[", b"{"):
        text.seek(place)
        return None
    text.seek(0)
    try:
        value = parse_json(text.read(_WHOLE + 1), max_bytes=_WHOLE)
    except UntrustedError as error:
        if path.suffix == ".json":
            raise RequestError(f"{path}: not JSON ({error}); {_FORMS}") from error
        text.seek(place)
        return None
    return _rows_of(value)


def _load_any(line: Any) -> Any:
    try:
        return parse_json(line) if isinstance(line, bytes) else UntrustedError()
    except UntrustedError as error:
        return error


def _rows_of(value: Any) -> list[Any]:
    """The rows of one JSON value: a list, an object that holds one under ``data``, columns, or one row."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    if "question" not in value and "qa" not in value and isinstance(value.get("data"), list | dict):
        names = value.get("columns")
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return [dict(zip(names, row, strict=False)) if isinstance(row, list) else row for row in value["data"]]
        return _rows_of(value["data"])
    # pandas writes a column as an object by row number, T* as a list
    columns = [list(column.values()) if isinstance(column, dict) else column for column in value.values()]
    whole = all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
    if not whole or not value.get("question"):
        return [value]
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256)
        for batch in batches:
            yield from map(_as_json, batch.to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise RequestError(
            f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}): fetch it again"
        ) from error


def _as_json(value: Any) -> Any:
    """A value of a table as `parse_json` would give it: numbers are finite, and what JSON has no type for is text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _as_json(item) for name, item in value.items()}
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(value)
