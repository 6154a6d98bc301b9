"""The one way to play samples: many episodes at once, those of one video together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from timesearch.base.errors import RequestError
from timesearch.base.files import inside
from timesearch.data.samples import Prediction, Sample
from timesearch.inference.witness import Witness
from timesearch.search.episode import run_episode
from timesearch.search.policy import Policy
from timesearch.search.search import Search
from timesearch.settings import SearchSettings, Settings

if TYPE_CHECKING:
    from timesearch.retrieval.encoder import Encoder

Episode = Callable[[Search, Policy, Sample], Awaitable[Prediction]]
"""Plays one sample: `run_episode`, or a baseline without search."""


class MakeSearch(Protocol):
    """Makes the search of one episode after another; `encoded` as `Search` takes it."""

    def __call__(self, *, encoded: bool = False) -> Search:
        """A new search."""
        ...


def search_maker(settings: Settings, encoder: Encoder, search: SearchSettings | None = None) -> MakeSearch:
    """Makes searches over the caches of the settings, by `search` in place of `settings.search`.

    Raises:
        RequestError: subtitles are to be searched, and their indexes were never made.
    """
    paths, search = settings.paths, search or settings.search
    if "search_subtitles" in search.tools and not paths.subtitles.is_dir():
        raise RequestError(
            f"{paths.subtitles} is missing, which search_subtitles needs: run the stage 'subtitles' first"
        )
    return partial(
        Search,
        search,
        encoder,
        paths.frames,
        paths.features,
        subtitles=paths.subtitles,
        source_of=partial(inside, paths.videos),
    )


@dataclass(frozen=True)
class Job:
    """One episode to play; `method` is the name under which its prediction is filed."""

    sample: Sample
    episode: Episode = run_episode
    method: str = ""


async def play(
    jobs: Sequence[Job],
    policy: Policy,
    make_search: MakeSearch,
    record: Callable[[Job, Prediction], None],
    concurrency: int,
) -> None:
    """Play all jobs, and close the policy.

    Args:
        jobs: the episodes; those of one video are played side by side.
        policy: the engine.
        make_search: makes a search for each of the episodes in flight.
        record: gets each prediction as its episode ends.
        concurrency: episodes in flight.

    Raises:
        TemporaryError: the policy's server does not answer.
        RequestError: the server does not serve the model.
    """
    waiting = iter(sorted(jobs, key=lambda job: job.sample.video))

    async def player() -> None:
        search = make_search(encoded=policy.encoded)
        for job in waiting:
            witness = Witness(policy, getattr(search.encoder, "digest", ""))
            prediction = await job.episode(search, witness, job.sample)
            witness.seen.subtitles = search.words
            record(job, prediction.model_copy(update={"seen": witness.seen}))

    try:
        await policy.connect()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(jobs))):
                group.create_task(player())
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    finally:
        await policy.close()
