"""Questions about videos, and the answers that episodes gave: the rows that every stage reads.

Both are JSON lines. Files in the form that benchmarks publish are turned into samples by `timesearch.formats`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from timesearch.errors import RequestError

QuestionType = Literal["multiple_choice", "open_ended", "grounding"]
T = TypeVar("T", bound="Sample")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Sample(BaseModel):
    """One question about one video."""

    model_config = ConfigDict(extra="forbid")

    id: str
    video: str = Field(description="path of the video under the videos folder, such as cache/videos")
    source: str | None = Field(None, description="any fsspec URL that the video is downloaded from")
    sha256: str | None = Field(None, description="digest of the video file, in hex")
    question: str
    options: list[str] = Field(default_factory=list, description="choices, without their letters")
    answer: str = Field("", description="letter, text, or JSON list of [start, end] seconds, by `type`")
    type: QuestionType = "open_ended"
    duration: float | None = Field(None, description="length of the video in seconds")
    gt_seconds: list[float] = Field(default_factory=list)
    gt_frame_index: list[int] = Field(default_factory=list, description="frame numbers of the source video")
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


def read_rows(
    path: Path | str, on_error: Callable[[int, RequestError], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line or item number from 1, row) of a JSON lines file, a JSON file that holds one list, or a Parquet file.

    JSON lines and Parquet are streamed: memory does not grow with the file.

    Args:
        path: the file.
        on_error: called with the number and the error of a broken line, which is then skipped; None raises it.

    Raises:
        RequestError: the file is missing, or a line is not a JSON object (named with file and line).
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path} does not exist: name a .jsonl, .json or .parquet file")
    for number, row in _parse_rows(path):
        error = row if isinstance(row, RequestError) else None
        if error is None and not isinstance(row, dict):
            error = RequestError(f"{path}, line {number}: a JSON object is expected, not {type(row).__name__}")
        if error is None:
            yield number, row
        elif on_error is None:
            raise error
        else:
            on_error(number, error)


def _parse_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of each line or item; the value is an error where a line cannot be read."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
        return
    with path.open("rb") as handle:
        if path.suffix == ".json" and handle.read(64).lstrip().startswith(b"["):
            handle.seek(0)
            try:
                yield from enumerate(json.load(handle), start=1)
            except json.JSONDecodeError as error:
                raise RequestError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
            return
        handle.seek(0)
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, RequestError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})")
            except UnicodeDecodeError:
                yield number, RequestError(f"{path}, line {number}: not UTF-8 text")
            except RecursionError:
                yield number, RequestError(f"{path}, line {number}: nested too deeply")


def convert(row: dict[str, Any], number: int, where: str) -> list[dict[str, Any]]:
    """`timesearch.formats.to_rows`, or one sentence about a row that looks like a benchmark's and is none."""
    from timesearch.formats import to_rows

    try:
        return to_rows(row, number)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise RequestError(f"{where}: not a row of the benchmark that it looks like ({detail})") from error


def validate(model: type[T], row: dict[str, Any], where: str) -> T:
    """Build a `Sample` or `Prediction` from a row, or say in one sentence which field of which line is wrong."""
    try:
        return model.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise RequestError(f"{where}: field {field!r}: {first['msg']}") from error


def read_samples(path: Path | str) -> list[Sample]:
    """Read a sample file: the project's JSON lines, or a file in a form that `timesearch.formats` knows.

    Raises:
        RequestError: a missing file, a broken line, a wrong field, or an id that occurs twice.
    """
    samples = [
        validate(Sample, sample, f"{path}, line {number}")
        for number, row in read_rows(path)
        for sample in convert(row, number, f"{path}, line {number}")
    ]
    repeated = [key for key, count in Counter(sample.id for sample in samples).items() if count > 1]
    if repeated:
        raise RequestError(f"{path}: id {repeated[0]!r} occurs more than once: give every sample an id of its own")
    return samples
