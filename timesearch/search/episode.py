"""The episode loop: a policy searches a video until it answers or a budget is spent (paper, Section 3.1).

The same loop serves every engine and every command. It keeps the rules of training: all calls of a turn are carried
out, the last call that `max_turns` allows is followed by the request to answer, and assistant turns stay verbatim. It
is kinder than training in two ways: a damaged call is repaired, or answered by what to correct, and a turn that neither
searches nor answers is asked once for the answer. In training TRL decides both: its `parse_response` takes a turn whose
call is no JSON for plain text, and its tool loop ends an episode at the first turn without a call, from inside methods
that offer no place to step in. A policy in training so gets no reward for a damaged call, which is what it should learn
from; wrong arguments in a readable call are answered by the search, here and there alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from timesearch.base.errors import CacheMismatchError, ItemError
from timesearch.data.messages import (
    Block,
    Message,
    blocks_of,
    exchanges,
    neutralise,
    parse_turn,
    searched_seconds,
    times_of,
)
from timesearch.data.samples import EpisodeError, Prediction, Sample, Usage
from timesearch.dialects import DIALECTS, Dialect, ToolCall, Turn, read_as
from timesearch.search.budget import TIME_TOKENS, searched_size
from timesearch.search.policy import ContextOverflowError, Policy, Reply, Session
from timesearch.search.protocol import SearchProtocol
from timesearch.search.search import Search
from timesearch.video.frames import Look

MESSAGE_TOKENS = 96
"""Allowance for the words around searched frames, in tokens."""


@dataclass(frozen=True)
class Step:
    """Something that happened in an episode, for who watches it live.

    `kind` is ``preview`` (blocks), ``turn`` (text and what it says), ``found`` (blocks, and the call that they answer)
    or ``reanswer`` (text).
    """

    kind: Literal["preview", "turn", "found", "reanswer"]
    number: int = 0
    blocks: tuple[Block, ...] = ()
    text: str = ""
    turn: Turn | None = None
    call: ToolCall | None = None


Watch = Callable[[Step], None]


def system_message(
    protocol: SearchProtocol,
    tools: Sequence[dict[str, Any] | str],
    where: str,
    dialect: Dialect = DIALECTS[0],
) -> Message:
    """The system message: with the tools in it where that is ``text``, else the chat template adds them."""
    text = protocol.texts["system"]
    return {"role": "system", "content": dialect.system_text(text, tools) if where == "text" else text}


async def run_episode(
    search: Search,
    policy: Policy,
    sample: Sample,
    watch: Watch | None = None,
    reanswer: bool = True,
) -> Prediction:
    """Let a policy search a sample's video and answer.

    Args:
        search: used by this episode alone while it runs.
        policy: the engine.
        sample: the question.
        watch: is told of each step as it happens, in the event loop's thread.
        reanswer: ask again from the searched frames alone, for the completeness reward.

    Returns:
        The prediction. What belongs to this episode alone (a missing cache, an engine gone, a context too short) is
        recorded in its `error`, beside the messages so far.
    """
    episode = _Episode(search, policy, sample, watch or (lambda step: None))
    error: EpisodeError | None = None
    try:
        await episode.search()
        always = search.protocol.rules.unsearched == "one_frame"
        if reanswer and (always or any(exchange.evidence for exchange in exchanges(episode.messages))):
            await episode.answer_again()
    except (ItemError, CacheMismatchError) as raised:
        error = _as_data(raised)
    return episode.prediction(error)


async def answer_from_frames(
    search: Search,
    policy: Policy,
    sample: Sample,
    choose: Callable[[Search], Sequence[int | Look]],
) -> Prediction:
    """The baselines without search: frames chosen at once, and the re-answer's prompt.

    `choose` gives the frames, as `Search.frames` takes them, after the search has opened the video. They are recorded
    as the frames of one tool message, so that search metrics apply to them, followed by the answer.
    """
    episode = _Episode(search, policy, sample, lambda step: None)
    error: EpisodeError | None = None
    try:
        await episode.answer_chosen(choose)
    except (ItemError, CacheMismatchError) as raised:
        error = _as_data(raised)
    return episode.prediction(error)


def _as_data(error: ItemError | CacheMismatchError) -> EpisodeError:
    return EpisodeError(type=getattr(error, "reason", "cache_mismatch"), message=str(error))


class _Episode:
    """The state of one episode."""

    def __init__(self, search: Search, policy: Policy, sample: Sample, watch: Watch) -> None:
        self.messages: list[Message] = []
        self._search, self._policy, self._sample = search, policy, sample
        self._settings, self._rules, self._watch = search.settings, search.protocol.rules, watch
        self._usage = Usage()
        self._preview: list[float] = []
        self._turns = self._tool_calls = 0
        self._limit: Literal["turns", "context"] | None = None
        self._answer: str | None = None
        self._reanswer: str | None = None

    async def search(self) -> None:
        blocks = await asyncio.to_thread(self._open)
        self._preview = times_of(blocks)
        self._watch(Step("preview", blocks=tuple(blocks)))
        search, rules = self._search, self._rules
        where = rules.tools or self._settings.protocol
        self.messages = [
            system_message(search.protocol, search.descriptions, where, search.dialect),
            {"role": "user", "content": blocks},
        ]
        offered = search.schemas if where == "template" else []
        async with self._policy.session(self._sample.video, offered, self._settings.max_new_tokens) as session:
            asked = False
            for number in range(1, self._settings.max_turns + 1):
                reply = await self._reply(session)
                turn = read_as(search.dialect, reply.text)
                self.messages.append({"role": "assistant", "content": search.dialect.cut(reply.text)})
                self._turns = number
                self._watch(Step("turn", number, text=reply.text, turn=turn))
                self._answer = turn.answer
                last = number == self._settings.max_turns
                if turn.answer is not None or (last and rules.last_turn == "answers"):
                    return
                if rules.unreadable == "ends" and any(call.error and not call.name for call in turn.calls):
                    return
                if turn.calls:
                    await self._carry_out(turn, reply, number)
                elif asked or last or rules.silent == "ends":
                    return
                else:
                    asked = True
                    self.messages.append({"role": "user", "content": search.protocol.render("overflow")})

    def _open(self) -> list[Block]:
        self._search.open(self._sample.model_dump())
        return self._search.preview()

    async def _reply(self, session: Session) -> Reply:
        """The next turn; where the context overflows, the newest frames give way to the request to answer."""
        try:
            reply = await session.reply(self.messages)
        except ContextOverflowError:
            if self.messages[-1]["role"] != "tool" or self._rules.context == "fails":
                raise
            while self.messages[-1]["role"] == "tool":
                self.messages.pop()
            self.messages.append({"role": "tool", "content": self._search.protocol.render("overflow")})
            self._limit = "context"
            reply = await session.reply(self.messages)
        self._usage.prefilled += reply.prompt_tokens - reply.cached_tokens
        self._usage.cached += reply.cached_tokens
        self._usage.generated += reply.generated_tokens
        return Reply(neutralise(reply.text), reply.prompt_tokens, reply.cached_tokens, reply.generated_tokens)

    async def _carry_out(self, turn: Turn, reply: Reply, number: int) -> None:
        search = self._search
        room = self._room(reply)
        for call in turn.calls[: self._rules.calls_per_turn]:
            search.room = room
            if call.error:
                blocks = search.correct(call.error)
            else:
                blocks = await asyncio.to_thread(search.call, call.name, call.arguments)
            self._tool_calls += 1
            if room is not None:
                room = max(0, room - sum(block["type"] == "image" for block in blocks))
            if search.spent:
                self._limit = "turns"
            elif search.room == 0:
                self._limit = "context"
            self.messages.append({"role": "tool", "name": call.name, "content": blocks})
            self._watch(Step("found", number, tuple(blocks), call=call))

    def _room(self, reply: Reply) -> int | None:
        """Frames that still fit into the context, beside the words around them and one more turn."""
        if self._policy.context is None or not reply.prompt_tokens or self._rules.context == "fails":
            return None
        width, height = searched_size(self._search.video.frames.size, self._settings, self._rules)
        frame = (width // self._settings.patch) * (height // self._settings.patch) + TIME_TOKENS
        used = reply.prompt_tokens + reply.generated_tokens + MESSAGE_TOKENS + self._settings.max_new_tokens
        return max(0, (self._policy.context - used) // frame)

    async def answer_again(self) -> None:
        content = await asyncio.to_thread(self._search.reanswer)
        if content is None:
            return
        async with self._policy.session(self._sample.video, [], self._settings.max_new_tokens) as session:
            reply = await session.reply(self._search.asking(content))
        text = neutralise(reply.text)
        self._reanswer = text if self._rules.reanswer_reply == "raw" else parse_turn(text).answer
        self._watch(Step("reanswer", text=text))

    async def answer_chosen(self, choose: Callable[[Search], Sequence[int | Look]]) -> None:
        def look() -> list[Block]:
            self._search.open(self._sample.model_dump())
            return self._search.ask_from(self._search.frames(choose(self._search)))

        blocks = await asyncio.to_thread(look)
        asking = self._search.asking(blocks)
        async with self._policy.session(self._sample.video, [], self._settings.max_new_tokens) as session:
            self.messages = asking
            reply = await self._reply(session)
        self.messages = [
            {"role": "tool", "content": blocks},
            {"role": "assistant", "content": reply.text},
        ]
        self._turns = 1
        self._answer = parse_turn(reply.text).answer
        self._reanswer = reply.text if self._rules.reanswer_reply == "raw" else self._answer

    def prediction(self, error: EpisodeError | None) -> Prediction:
        answer = None if error else self._answer
        return Prediction(
            **self._sample.model_dump(),
            prediction=[without_pixels(message) for message in self.messages],
            searched_seconds=searched_seconds(self.messages),
            preview_seconds=self._preview,
            predicted_answer=answer,
            reanswer=self._reanswer,
            turns=self._turns,
            tool_calls=self._tool_calls,
            usage=self._usage,
            outcome="failed" if error else "unanswered" if answer is None else "answered",
            limit=self._limit,
            error=error,
        )


def without_pixels(message: Message) -> Message:
    """A message as predictions keep it: image blocks hold `frame` and `seconds`, no pixels."""
    if isinstance(message.get("content"), str):
        return message
    kept = [block.copy() for block in blocks_of(message)]
    for block in kept:
        block.pop("image", None)
        block.pop("jpeg", None)
    return {**message, "content": kept}
