"""Questions about videos, and the answers that episodes gave: what every stage reads and writes, as typed models.

Both are JSON lines (`timesearch.data.rows` reads the files). What is wrong with one row is an error of that row:
``not_json`` (it cannot be read at all), ``invalid_row`` (a field is missing or its value cannot be), ``unknown_type``
(of question) or ``duplicate_id`` (the first row stands). Whoever reads says what becomes of it. A number that is
``NaN`` (as pandas writes it) is no error: a length that is not a number is unknown, and such a time counts as a time
that the video does not have.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from timesearch.base.errors import RequestError

if TYPE_CHECKING:
    from timesearch.data.messages import Message

    Messages = list[Message]
else:  # others' traces hold more than ours do, and it is kept
    Messages = list[dict[str, Any]]

QuestionType = Literal["multiple_choice", "open_ended", "grounding"]
T = TypeVar("T", bound="Sample")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
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

    @property
    def moments(self) -> list[float]:
        """One time (s) of each piece of the ground truth: those that are given, else the middles of its spans."""
        return self.gt_seconds or [(start + end) / 2 for start, end in self.gt_spans]


class Usage(BaseModel):
    """Tokens that an engine spent on an episode."""

    prefilled: int = 0
    cached: int = 0
    generated: int = 0


class Seen(BaseModel):
    """What an engine was given in an episode, and what became of the requests."""

    engine: str = Field("", description="what computed, with its version")
    template: str = Field("", description="digest of what the engine makes of a short conversation, or 'unknown'")
    encoder: str = Field("", description="digest of the encoder that found the frames")
    subtitles: str = Field("", description="digest of the subtitles that could be searched; empty where none could")
    preview_sizes: list[tuple[int, int]] = Field(default_factory=list, description="width and height in pixels")
    searched_sizes: list[tuple[int, int]] = Field(default_factory=list, description="width and height in pixels")
    requests: int = 0
    retried: int = Field(0, description="tries after the first, of requests that were answered in the end")
    failed: int = Field(0, description="requests without an answer")
    empty: int = Field(0, description="answers without a word")


class EpisodeError(BaseModel):
    """Why an episode did not end in an answer."""

    type: str
    message: str


class Prediction(Sample):
    """A sample and the episode that answered it.

    `prediction` holds the episode's messages: `role`, and `content` as blocks of `text` and `image`. An image block
    carries no pixels but `seconds` (presentation time) and `frame` (index in the frame cache).
    """

    prediction: Messages = Field(default_factory=list)
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
    seen: Seen | None = Field(None, description="what the engine was given; None where nobody counted")
    fingerprint: str = Field("", description="digest of what the prediction is made of, shortened")

    @field_validator("prediction")
    @classmethod
    def _messages_are_readable(cls, messages: list[Any]) -> list[Any]:
        for number, message in enumerate(messages, start=1):
            content = message.get("content") or []
            blocks = content if isinstance(content, list) else []
            readable = isinstance(content, str | list) and all(
                isinstance(block, dict) and isinstance(block.get("text", ""), str) for block in blocks
            )
            if not isinstance(message.get("role"), str) or not readable:
                raise ValueError(f"message {number} has no role, or content of no known form")
        return messages


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
        if reason == "unknown_type":
            kinds = ", ".join(get_args(QuestionType))
            said = f"{str(row.get('type'))[:80]!r} questions are not scored here, only {kinds}"
            if row.get("type") == "sequence":
                said += ": nothing says how an order of events is to be read and how far a part of it counts"
        raise RowError(f"{where}: field {field!r}: {said}", reason, item_of(row)) from error


_TIMES = ("gt_seconds", "gt_spans", "searched_seconds", "preview_seconds")


def _times(value: Any) -> Any:
    if isinstance(value, list):
        return [_times(item) for item in value]
    return math.nan if value is None else value


def item_of(row: dict[str, Any]) -> str:
    """The name of a row in a list of failures: its id, where it has one that can be one."""
    identity = row.get("id")
    return str(identity)[:200] if isinstance(identity, str | int) else ""
