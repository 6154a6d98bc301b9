"""Questions about videos, and the answers that episodes gave: the rows that every stage reads.

Both are JSON lines. Files in the form that benchmarks publish are turned into samples by `timesearch.formats`.

What is wrong with one row is an error of that row: ``not_json`` (it cannot be read at all), ``invalid_row`` (a field is
missing or its value cannot be), ``unknown_type`` (of question) or ``duplicate_id`` (the first row stands). Whoever
reads says what becomes of it. Numbers that are none (``NaN``, as pandas writes it) are no error: a length that is not
a number is unknown, and such a time counts as a time that the video does not have.
"""

from __future__ import annotations

import codecs
import io
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Annotated, Any, Literal, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from timesearch.batch import Failure
from timesearch.errors import RequestError
from timesearch.untrusted import MAX_BYTES, UntrustedError, is_plain, parse_json

QuestionType = Literal["multiple_choice", "open_ended", "grounding"]
T = TypeVar("T", bound="Sample")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WHOLE = 2**30
"""Bytes at most of a file that is one JSON value; JSON lines may be longer."""
_FORMS = "JSON lines, a JSON list of objects, LV-Haystack's object of columns and Parquet are read"
_HELD = 20_000
"""Samples that are held as objects; of a larger file each is made when it is asked for."""
FrameNumber = Annotated[int, Field(lt=2**63)]


class RowError(RequestError):
    """What is wrong with one row of a file; `reason` is a stable word, `item` the row's id if it has one."""

    def __init__(self, message: str, reason: str = "invalid_row", item: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.item = item


class UnreadableError(ValueError):
    """Why a published row cannot be read with certainty, in a few words."""


class Sample(BaseModel):
    """One question about one video."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(min_length=1)
    video: str = Field(
        min_length=1,
        pattern=r"^[^\x00]*$",
        description="path of the video under the videos folder, such as cache/videos",
    )
    source: str | None = Field(None, description="any fsspec URL that the video is downloaded from")
    sha256: str | None = Field(None, description="digest of the video file, in hex")
    question: str
    options: list[str] = Field(
        default_factory=list, max_length=len(LETTERS), description="choices, without their letters"
    )
    answer: str = Field("", description="letter, text, or JSON list of [start, end] seconds, by `type`")
    type: QuestionType = "open_ended"
    duration: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="length of the video in seconds; None where it is not known"
    )
    gt_seconds: list[float] = Field(default_factory=list)
    gt_frame_index: list[FrameNumber] = Field(default_factory=list, description="frame numbers of the source video")
    gt_spans: list[tuple[float, float]] = Field(default_factory=list, description="[start, end] in seconds")
    split: str = ""
    meta: dict[str, Any] = Field(default_factory=dict)


class Usage(BaseModel):
    """Tokens that an engine spent on an episode."""

    prefilled: int = 0
    cached: int = 0
    generated: int = 0


class EpisodeError(BaseModel):
    """Why an episode did not end in an answer."""

    type: str
    message: str


class Prediction(Sample):
    """A sample and the episode that answered it.

    `prediction` holds the episode's messages: `role`, and `content` as blocks of `text` and `image`. An image block
    carries no pixels but `seconds` (presentation time) and `frame` (index in the frame cache).
    """

    prediction: list[dict[str, Any]] = Field(default_factory=list)
    searched_seconds: list[float] = Field(default_factory=list)
    preview_seconds: list[float] = Field(default_factory=list)
    predicted_answer: str | None = Field(None, description="what the episode answered; None if it gave no answer")
    reanswer: str | None = Field(None, description="answer from the searched frames alone, where it was asked")
    rewards: dict[str, float] = Field(default_factory=dict)
    turns: int = 0
    tool_calls: int = 0
    usage: Usage = Field(default_factory=Usage)
    outcome: Literal["answered", "unanswered", "failed"] | None = None
    limit: Literal["turns", "context"] | None = Field(None, description="the budget that ended the search, if one did")
    error: EpisodeError | None = None

    @field_validator("prediction")
    @classmethod
    def _messages_are_readable(cls, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for number, message in enumerate(messages, start=1):
            content = message.get("content") or []
            blocks = content if isinstance(content, list) else []
            readable = isinstance(content, str | list) and all(
                isinstance(block, dict) and isinstance(block.get("text", ""), str) for block in blocks
            )
            if not isinstance(message.get("role"), str) or not readable:
                raise ValueError(f"message {number} has no role, or content of no known form")
        return messages


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
    """Read a sample file: the project's JSON lines, or a file in a form that `timesearch.formats` knows.

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
    """`timesearch.formats.to_rows`, or one sentence about a row that looks like a benchmark's and is none.

    Raises:
        RowError: it is none.
    """
    from timesearch.formats import to_rows

    try:
        return to_rows(row, number)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        detail = str(error) if isinstance(error, UnreadableError) else f"{type(error).__name__}: {error}"
        raise RowError(
            f"{where}: not a row of the benchmark that it looks like ({detail[:300]})", item=_item(row)
        ) from error


def validate(model: type[T], row: dict[str, Any], where: str) -> T:
    """Build a `Sample` or `Prediction` from a row, or say in one sentence which field of which line is wrong.

    A field that is null counts as not given, and a time that is null as one that is not a number.

    Raises:
        RowError: the sentence.
    """
    given = {name: _times(value) if name in _TIMES else value for name, value in row.items() if value is not None}
    if isinstance(rewards := given.get("rewards"), dict):
        given["rewards"] = {name: value for name, value in rewards.items() if value is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])[:200]
        reason = "unknown_type" if first["loc"][:1] == ("type",) else "invalid_row"
        said = first["msg"].removeprefix("Value error, ")
        raise RowError(f"{where}: field {field!r}: {said}", reason, _item(row)) from error


_TIMES = ("gt_seconds", "gt_spans", "searched_seconds", "preview_seconds")


def _times(value: Any) -> Any:
    if isinstance(value, list):
        return [_times(item) for item in value]
    return math.nan if value is None else value


def _item(row: dict[str, Any]) -> str:
    """The name of a row in a list of failures: its id, where it has one that can be one."""
    identity = row.get("id")
    return str(identity)[:200] if isinstance(identity, str | int) else ""


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
    marks = (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16")
    encoding = next((name for mark, name in (*marks, (codecs.BOM_UTF16_BE, "utf-16")) if start.startswith(mark)), None)
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
