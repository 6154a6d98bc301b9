"""What an engine is really given and what becomes of the requests, counted beside an episode: `Seen`."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from timesearch.data.messages import Block, Message, blocks_of
from timesearch.data.samples import Seen
from timesearch.search.policy import EngineError, Policy, Reply, Session

_SIZES = 8
"""Sizes that an episode lists at most."""


class Witness:
    """A policy that counts what passes through it; one for each episode.

    Args:
        policy: plays.
        encoder: digest of the encoder that finds the frames.

    Attributes:
        seen: the counts so far.
    """

    def __init__(self, policy: Policy, encoder: str = "") -> None:
        engine, template = getattr(policy, "engine", policy.name), getattr(policy, "template", "")
        self.seen = Seen(engine=engine, template=template, encoder=encoder)
        self.name, self.encoded = policy.name, policy.encoded
        self._policy = policy

    @property
    def context(self) -> int | None:
        """Length of the context in tokens, where it is known."""
        return self._policy.context

    async def connect(self) -> None:
        """Make ready."""
        await self._policy.connect()

    async def close(self) -> None:
        """Let go of connections and threads."""
        await self._policy.close()

    @asynccontextmanager
    async def session(
        self, video: str, tools: Sequence[dict[str, Any]], max_new_tokens: int
    ) -> AsyncIterator[_WatchedSession]:
        """Open a conversation."""
        async with self._policy.session(video, tools, max_new_tokens) as session:
            yield _WatchedSession(session, self.seen)


class _WatchedSession:
    def __init__(self, session: Session, seen: Seen) -> None:
        self._session, self._seen = session, seen
        self._looked_at: Message | None = None

    async def reply(self, messages: Sequence[Message]) -> Reply:
        seen = self._seen
        for message in messages[self._place(messages) :]:
            previews = message["role"] == "user" and messages[0]["role"] == "system"
            _note(message, seen.preview_sizes if previews else seen.searched_sizes)
        self._looked_at = messages[-1]
        seen.requests += 1
        try:
            reply = await self._session.reply(messages)
        except EngineError:
            seen.failed += 1
            raise
        seen.retried += reply.retries
        seen.empty += not reply.text.strip()
        return reply

    def _place(self, messages: Sequence[Message]) -> int:
        """Where the messages begin that no earlier request held."""
        for place in range(len(messages), 0, -1):
            if messages[place - 1] is self._looked_at:
                return place
        return 0


def _note(message: Message, sizes: list[tuple[int, int]]) -> None:
    """Add the sizes of a message's images; the JPEGs of one message are of one size, and one of them is read."""
    images = [block for block in blocks_of(message) if block["type"] == "image"]
    shown = [block for block in images if "image" in block] or images[:1]
    for size in dict.fromkeys(map(_size, shown)):
        if size not in sizes and len(sizes) < _SIZES:
            sizes.append(size)
            sizes.sort()


def _size(block: Block) -> tuple[int, int]:
    from PIL import Image

    if "image" in block:
        return tuple(block["image"].size)
    with Image.open(io.BytesIO(block["jpeg"])) as image:
        return image.size
