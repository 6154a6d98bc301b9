"""A question about a library: first which video, then when.

The question is searched for as it is, among frames and among what is said; the videos of both lists come by turns, for
their scores say nothing about each other. The policy then searches the videos that answer best, one after another,
until an answer follows from what it found alone (`Statement.holds`): completeness self-verification decides when to
stop. What it looked for first in a video whose answer does not hold, it wants to see: the library is searched for that
too, in its words, and what is found comes next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

from timesearch.base.errors import ItemError
from timesearch.base.stopping import NEVER, Stop
from timesearch.data.messages import exchanges
from timesearch.inference.ask import Answer, Asker, check_question
from timesearch.inference.statement import Statement
from timesearch.library.catalogue import Entry
from timesearch.library.library import Found
from timesearch.retrieval.encoder import Encoder
from timesearch.rewards import rule_judge
from timesearch.search.episode import Watch

VIDEOS = 3
"""Videos that are searched for one question at most."""
_UNKNOWN = ("unknown", "I don't know", "I do not know", "not shown", "none", "no answer")
"""Answers that say that there is none."""


@dataclass(frozen=True)
class LibraryAnswer:
    """What a library answers: `video` and `answer` are None where none of its videos does; the statement says why."""

    video: Entry | None
    answer: Answer | None
    statement: Statement
    found: Found


class Searched(Protocol):
    """What says which videos to ask: a `Library`, or what is searched as one."""

    def find(
        self, encoder: Encoder, query: str, count: int = 10, videos: Sequence[Entry] | None = None, stop: Stop = NEVER
    ) -> Found:
        """As `Library.find`."""


async def ask_library(
    library: Searched,
    asker: Asker,
    encoder: Encoder,
    question: str,
    options: Sequence[str] = (),
    videos: Sequence[Entry] | None = None,
    begin: Callable[[Entry], Watch | None] = lambda _: None,
) -> LibraryAnswer:
    """Ask a library.

    Args:
        library: the videos.
        asker: of the library's caches.
        encoder: that of the library.
        question: what to find out.
        options: choices, where the answer is one of several.
        videos: to ask; all if None.
        begin: is told of each video before it is searched, and may watch.

    Raises:
        RequestError: the question cannot be asked.
        ItemError: no video could be searched, and why the last could not.
    """
    check_question(question, options)
    found = await _find(library, encoder, question, videos)
    likely = _by_turns(found)
    waiting, searched = likely or found.nearest, {question}
    answers: list[tuple[Entry, Answer]] = []
    while waiting and len(answers) < VIDEOS:
        video = waiting[0]
        answer = await asker.ask(video.key, question, options, begin(video), shown_as=video.name)
        answers.append((video, answer))
        if _holds(answer):
            return _with_others(video, answer, answers[:-1], found)
        query = _first_query(answer)
        if query is not None and query not in searched and len(answers) < VIDEOS:
            searched.add(query)
            wanted = _by_turns(await _find(library, encoder, query, videos))
            likely, waiting = likely or wanted, [*wanted, *waiting]
        asked = {video.key for video, _ in answers}
        waiting = [video for video in waiting if video.key not in asked]
    failed = [answer.prediction.error for _, answer in answers if answer.prediction.error is not None]
    if failed and len(failed) == len(answers):
        raise ItemError(failed[-1].message, failed[-1].type)
    for video, answer in answers if likely else ():
        if answer.prediction.error is None and answer.prediction.predicted_answer is not None:
            return _with_others(video, answer, [pair for pair in answers if pair[0] is not video], found)
    others = [video.name for video, _ in answers]
    return LibraryAnswer(None, None, Statement(video="", in_vain=[question], others=others), found)


async def _find(library: Searched, encoder: Encoder, question: str, videos: Sequence[Entry] | None) -> Found:
    """Search, until nobody waits for it any more."""
    stop = Stop()
    try:
        return await asyncio.to_thread(library.find, encoder, question, 10, videos, stop)
    except asyncio.CancelledError:
        stop.ask()
        raise


def _by_turns(found: Found) -> list[Entry]:
    """The videos that a search found, each once: the best by its frames, the best by what is said, the second best."""
    shown, said = ([moment.video for moment in moments] for moments in (found.moments, found.heard.moments))
    by_turns = (video for pair in zip_longest(_once(shown), _once(said)) for video in pair if video is not None)
    return _once(by_turns)


def _once(videos: Iterable[Entry]) -> list[Entry]:
    return list({video.key: video for video in videos}.values())


def _first_query(answer: Answer) -> str | None:
    """What the policy looked for first, before anything that it found led it on."""
    for exchange in exchanges(answer.prediction.prediction):
        query = exchange.call.arguments.get("query") if exchange.call is not None else None
        if isinstance(query, str) and query.strip():
            return query
    return None


def _holds(answer: Answer) -> bool:
    """Whether to stop at an answer: it says something that what was found says again, and some search found it."""
    said = answer.prediction.predicted_answer or ""
    return answer.statement.holds and not any(rule_judge(unknown, said) for unknown in _UNKNOWN)


def _with_others(video: Entry, answer: Answer, others: Sequence[tuple[Entry, Answer]], found: Found) -> LibraryAnswer:
    statement = answer.statement.model_copy(update={"others": [other.name for other, _ in others]})
    return LibraryAnswer(video, Answer(answer.prediction, statement), statement, found)
