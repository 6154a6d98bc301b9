"""Engines on the machines of a Ray cluster, each an actor that holds what `open_policy` opens there.

Episodes are played here: a conversation goes to the engine that has least to do, one about a video rather to the engine
that knows it, as with several servers. An engine whose machine dies is started again on another one; what it was asked
goes to the others meanwhile, from the conversation's first message.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from timesearch.base.cluster import ClusterError, Node, passed_on, require
from timesearch.base.errors import RequestError, TemporaryError, TimeSearchError, last_line
from timesearch.base.servers import free_port
from timesearch.data.messages import Message
from timesearch.inference.policies import open_policy
from timesearch.search.policy import ContextOverflowError, EngineError, Policy, Reply, burden
from timesearch.settings import Settings

logger = logging.getLogger(__name__)

_ROOM_WITHIN = 120.0
"""Seconds within which the cluster has to have room for the engines."""
_RESTARTS = 10
_SAID_EVERY = 30.0
_PAUSE = 0.5


class Engine:
    """The actor: an engine, and the conversations that are open with it."""

    def __init__(
        self, settings: str, checkpoint: str, project: str, environment: Mapping[str, str], number: int
    ) -> None:
        os.chdir(project)
        os.environ.update(environment)
        own = Settings.model_validate_json(settings)
        own.infer.port = free_port()
        own.infer.log = own.infer.log.with_name(f"{own.infer.log.stem}-{number}{own.infer.log.suffix}")
        self._held = ExitStack()
        self._failure: TimeSearchError | None = None
        try:
            self._policy: Policy = self._held.enter_context(open_policy(own, Path(checkpoint)))
        except TimeSearchError as error:  # told by `connect`: an actor that fails to begin is started again
            self._failure = error
        self._open: dict[int, tuple[AsyncExitStack, Any, list[Message]]] = {}

    async def connect(self) -> dict[str, Any]:
        """What is to be known of the engine, or why there is none."""
        try:
            if self._failure:
                raise self._failure
            await self._policy.connect()
        except TimeSearchError as error:
            return {"error": str(error), "passes": isinstance(error, TemporaryError)}
        policy = self._policy
        return {
            "name": policy.name,
            "encoded": policy.encoded,
            "context": policy.context,
            "engine": getattr(policy, "engine", policy.name),
            "template": getattr(policy, "template", ""),
        }

    async def reply(
        self, key: int, asked: tuple[str, Any, int], place: int, messages: list[Message]
    ) -> Reply | tuple[str, str] | None:
        """The next turn of a conversation.

        Args:
            key: of the conversation; it is opened where it is new.
            asked: its video, tools and `max_new_tokens`.
            place: where in it `messages` begin.
            messages: those after what was sent before.

        Returns:
            The turn; or the reason and the text of an error; or None where what was sent before is not here.
        """
        if key not in self._open:
            if place:
                return None
            stack = AsyncExitStack()
            self._open[key] = stack, await stack.enter_async_context(self._policy.session(*asked)), []
        _, session, sent = self._open[key]
        if place > len(sent):
            return None
        sent[place:] = messages
        try:
            return await session.reply(sent)
        except (EngineError, ContextOverflowError) as error:
            return error.reason, str(error)

    async def end(self, key: int) -> None:
        """Close a conversation."""
        if key in self._open:
            await self._open.pop(key)[0].aclose()


@dataclass
class _Place:
    """An engine as it is seen from here: its actor, how many conversations it has, and whether it failed last."""

    actor: Any
    load: int = 0
    failed: float = -math.inf


def refuse_engines(settings: Settings, nodes: Sequence[Node]) -> None:
    """Refuse a cluster that is too small for the engines.

    Raises:
        RequestError: naming what is needed and what is there.
    """
    cluster = settings.cluster
    each = cluster.engine_gpus if any(node.gpus for node in nodes) else 0
    what = "infer (cluster.engines x cluster.engine_gpus)" if each else "infer (cluster.engines)"
    require(nodes, cluster.address, what, gpus=cluster.engines * each, cpus=cluster.engines, together=each)


@contextmanager
def engines(settings: Settings, checkpoint: Path, nodes: Sequence[Node]) -> Iterator[ClusterPolicy]:
    """Hold engines of a checkpoint on a cluster that this process is part of.

    Raises:
        ClusterError: the cluster has no room for them.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    cluster = settings.cluster
    gpus = cluster.engine_gpus if any(node.gpus for node in nodes) else 0
    one = {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}
    inside = settings.model_copy(update={"cluster": cluster.model_copy(update={"kind": "none"})})
    room = placement_group([one] * cluster.engines, strategy="SPREAD")
    try:
        if not room.wait(_ROOM_WITHIN):
            raise ClusterError(
                f"the Ray cluster at {cluster.address} has no room for {cluster.engines} engines of {gpus} GPUs within "
                f"{_ROOM_WITHIN:g} s: other work has it, or lower cluster.engines"
            )
        actor = ray.remote(
            num_cpus=1, num_gpus=gpus, max_restarts=_RESTARTS, max_concurrency=4 * settings.infer.concurrency
        )(Engine)
        arguments = (inside.model_dump_json(), str(checkpoint), str(Path.cwd()), passed_on())
        yield ClusterPolicy(
            [
                actor.options(scheduling_strategy=PlacementGroupSchedulingStrategy(room, number)).remote(
                    *arguments, number
                )
                for number in range(cluster.engines)
            ],
            settings.infer.retry_for,
        )
    finally:
        remove_placement_group(room)


class ClusterPolicy:
    """A policy that several engines of a cluster play.

    Args:
        actors: the engines.
        retry_for: seconds for which a call is asked again while engines fail.
    """

    name = ""
    encoded = True
    engine = "engines on Ray"
    template = ""
    context: int | None = None

    def __init__(self, actors: Sequence[Any], retry_for: float) -> None:
        self._places = [_Place(actor) for actor in actors]
        self._retry_for = retry_for
        self._home: dict[str, _Place] = {}
        self._keys = count()

    async def connect(self) -> None:
        """Wait until every engine is there.

        Raises:
            TemporaryError: one does not come up.
            RequestError: one cannot be.
        """
        from ray.exceptions import RayError

        for place in self._places:
            try:
                told = await place.actor.connect.remote()
            except RayError as error:
                raise ClusterError(
                    f"an engine on the Ray cluster does not come up: {last_line(error)[:300]}"
                ) from error
            if "error" in told:
                raise (TemporaryError if told["passes"] else RequestError)(told["error"])
            for name, value in told.items():
                setattr(self, name, value)

    @asynccontextmanager
    async def session(
        self, video: str, tools: Sequence[dict[str, Any]], max_new_tokens: int
    ) -> AsyncIterator[_ClusterSession]:
        """Open a conversation with the engine that has least to do, or that knows the video already."""
        home = self._home.get(video)
        place = min(self._places, key=lambda one: burden(one.load, one is home))
        session = _ClusterSession(self, (video, list(tools), max_new_tokens), next(self._keys), place)
        self._home[video] = place
        place.load += 1
        try:
            yield session
        finally:
            session.place.load -= 1
            session.place.actor.end.remote(session.key)

    def move(self, session: _ClusterSession) -> None:
        """Let a conversation go on at the engine that failed longest ago, of those the least busy."""
        now = time.monotonic()
        if now - session.place.failed > _SAID_EVERY:
            logger.warning("infer: an engine on the cluster was lost: what it was asked goes to another one")
        session.place.failed = now
        session.place.load -= 1
        session.place = min(self._places, key=lambda one: (one.failed, one.load))
        session.place.load += 1

    async def close(self) -> None:
        """Nothing to do: the engines end with `engines`."""

    @property
    def retry_for(self) -> float:
        """Seconds for which a call is asked again."""
        return self._retry_for


@dataclass
class _ClusterSession:
    policy: ClusterPolicy
    asked: tuple[str, Any, int]
    key: int
    place: _Place
    sent: list[Message] = field(default_factory=list)

    async def reply(self, messages: Sequence[Message]) -> Reply:
        from ray.exceptions import RayError

        deadline = time.monotonic() + self.policy.retry_for
        tries = 0
        while True:
            place = next(
                (at for at, (ours, new) in enumerate(zip(self.sent, messages, strict=False)) if ours is not new),
                min(len(self.sent), len(messages)),
            )
            try:
                told = await self.place.actor.reply.remote(self.key, self.asked, place, list(messages[place:]))
            except RayError as error:
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"no engine on the Ray cluster answered for {self.policy.retry_for:g} s "
                        f"({last_line(error)[:200]})"
                    ) from error
                tries += 1
                self.sent = []
                self.policy.move(self)
                await asyncio.sleep(_PAUSE)
                continue
            if told is None:  # the engine was started again, and knows nothing of this conversation
                tries += 1
                self.sent = []
                continue
            self.sent = list(messages)
            if isinstance(told, Reply):
                return replace(told, retries=told.retries + tries)
            reason, text = told
            if reason == ContextOverflowError.reason:
                raise ContextOverflowError(text)
            raise EngineError(text, reason)
