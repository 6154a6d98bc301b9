"""The judge's server, for as long as a block runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from timesearch.base.servers import model_server, vllm_command
from timesearch.settings import Judge

logger = logging.getLogger(__name__)


@contextmanager
def judge_server(settings: Judge, say: Callable[[str], None] = logger.info) -> Iterator[str | None]:
    """Hold the judge that the settings ask for; with `kind: rule` there is none, and None is yielded.

    Raises:
        RequestError: something else is at its address.
        ServerError: it does not come up.
    """
    if settings.kind == "rule":
        yield None
        return
    with model_server(
        "judge",
        settings.url,
        settings.model,
        settings.command or vllm_command(),
        setting="judge.url",
        log=settings.log,
        start=settings.start,
        timeout=settings.start_timeout,
        say=say,
    ) as url:
        yield url
