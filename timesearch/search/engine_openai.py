"""A policy behind the OpenAI protocol (vLLM, `transformers serve`): a thin client that keeps the server's cache warm.

What lets a server take a conversation's past from its prefix cache: each message is serialised once, from the frame
cache's own JPEG bytes, and sent again byte for byte; assistant turns are the server's own text, not re-rendered from
parsed calls; a conversation stays on one server, and conversations about one video prefer the same server.

Tools are described in the system message, in the words of the chat template: a server that is given them as `tools`
describes them in words of its own (vLLM drops what a tool returns), which are not those that the policy was trained on.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timesearch.base.errors import RequestError, TemporaryError
from timesearch.base.http import BadReplyError, M, RefusedError, check_address, printable, request, tries
from timesearch.base.redaction import redact
from timesearch.base.replies import Completion, ModelList, Tokens, Version
from timesearch.base.servers import authorisation
from timesearch.data.messages import Block, Message, blocks_of
from timesearch.dialects.qwen import describe_tools
from timesearch.search.policy import (
    ContextOverflowError,
    EngineError,
    Reply,
    burden,
    video_metadata,
    with_video_preview,
)
from timesearch.search.protocol import Template
from timesearch.search.rendering import CONVERSATION, UNKNOWN, digest_of, rendered_of

if TYPE_CHECKING:
    import httpx

_TOO_LONG = ("maximum context length", "maximum model length", "max_model_len", "context window", "context_length")
VIDEO_OPTIONS = ("--trust-request-mm-kwargs",)
"""Options of a vLLM that is shown previews as videos: it must let a request say when the frames were seen."""
SAMPLING = {"top_p": 1.0, "frequency_penalty": 0.0}
"""Sampling as in training, which no `generation_config.json` of a checkpoint changes, as far as the protocol goes;
`transformers serve` makes its repetition penalty of the frequency penalty."""
VLLM_SAMPLING = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""The rest of it. Servers other than vLLM may refuse these fields, for they are not of the protocol."""
_RENDERING = ("vllm", "sglang")
"""Servers that have ``/tokenize``, by the owner of models that they list; others are not asked what they render."""

logger = logging.getLogger(__name__)


class OpenAIPolicy:
    """A model that one or several OpenAI-compatible servers serve.

    Args:
        urls: base URLs with ``/v1``; conversations go to the least busy.
        model: name under which the servers list it; empty for the only one that they serve.
        temperature: 0 decodes greedily.
        timeout: seconds that one call may take.
        retry_for: seconds for which a call is tried again while servers refuse, fail (5xx, 429) or time out.
        context: length of the context in tokens; asked from the server (`connect`) where None.
        seed: of sampling.
        video_preview: send the preview as one video block, in the form of vLLM, which must run with `VIDEO_OPTIONS`;
            vLLM 0.32 gives Qwen2.5-VL and Qwen3-VL the times of the frames, older ones give Qwen2.5-VL none.
        template: the chat template by which a server should render, of a model whose name is a folder here.

    Raises:
        RequestError: one of `urls` is not a URL.
    """

    encoded = True

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        temperature: float = 0.0,
        timeout: float = 600.0,
        retry_for: float = 600.0,
        context: int | None = None,
        seed: int = 0,
        video_preview: bool = False,
        template: Template = "tools",
    ) -> None:
        self.name = model
        self.engine = "a server"
        self.template = UNKNOWN
        self._should_render = template
        self._video_preview = video_preview
        self._urls = [url.rstrip("/") for url in urls]
        for url in self._urls:
            check_address(url)
        self._sampling: dict[str, float] = SAMPLING
        self._temperature, self._timeout, self._retry_for, self._seed = temperature, timeout, retry_for, seed
        self._context = context
        self._load = dict.fromkeys(self._urls, 0)
        self._home: dict[str, str] = {}
        self._client: httpx.AsyncClient | None = None

    @property
    def context(self) -> int | None:
        """Length of the context in tokens, once `connect` has asked for it."""
        return self._context

    async def connect(self) -> None:
        """Check that every server answers and serves the model, and learn the length of its context.

        Raises:
            TemporaryError: a server does not answer.
            RequestError: a server does not serve the model, or is not a model server.
        """
        by_vllm = True
        owners = {}
        for url in self._urls:
            try:
                listing, _ = await self._send("GET", url, "/models", ModelList)
            except EngineError as error:
                if isinstance(error.__cause__, BadReplyError):
                    raise RequestError(
                        f"what answers at {redact(url)} is no model server: it gave {error.__cause__}; "
                        "a server's address usually ends with /v1"
                    ) from error
                raise (RequestError if error.reason == "refused" else TemporaryError)(str(error)) from error
            entries = {entry.id: entry for entry in listing.data}
            if not self.name and len(entries) == 1:
                self.name = next(iter(entries))
            # `transformers serve` lists what lies in the hub's cache, and loads whatever it is asked for.
            if self.name not in entries and (entries or not self.name):
                listed = printable(", ".join(entries)) or "nothing"
                raise RequestError(
                    f"the server at {redact(url)} serves {listed}: name one of these (infer.model, --model)"
                )
            served = entries.get(self.name)
            self._context = self._context or (served.max_model_len if served else None)
            by_vllm = by_vllm and served is not None and served.owned_by == "vllm"
            owners[url] = served.owned_by if served else None
            self.engine = await self._engine_at(url, owners[url])
        self._sampling = SAMPLING | (VLLM_SAMPLING if by_vllm else {})
        self.template = await self._rendering(owners)

    async def _engine_at(self, url: str, owner: str | None) -> str:
        """Who serves, and of a vLLM its version, which it says at ``/version`` beside ``/v1``."""
        import httpx

        if owner != "vllm":
            return f"a server of {printable(owner)}" if owner else "a server"
        try:
            said = await request(self._http(), "GET", f"{url.removesuffix('/v1')}/version", Version, timeout=5.0)
        except (RefusedError, BadReplyError, httpx.TransportError):
            return owner
        return f"{owner} {printable(said.version)}"

    async def _rendering(self, owners: Mapping[str, str | None]) -> str:
        """What the servers render. Where it is known what they should, a difference is warned of."""
        told = {url: await self._rendered_at(url) for url, owner in owners.items() if owner in _RENDERING}
        known = {url: digest for url, digest in told.items() if digest != UNKNOWN}
        if known and Path(self.name).is_dir():
            ours = await asyncio.to_thread(rendered_of, Path(self.name), self._should_render)
            for url, digest in known.items():
                if UNKNOWN != ours != digest:
                    logger.warning(
                        "the server at %s renders conversations by another chat template than %s plays by, so that the "
                        "policy reads another form than it was trained in: start it with this one (--chat-template)",
                        redact(url),
                        self.name,
                    )
        return "+".join(sorted(set(known.values()))) if known.keys() == owners.keys() else UNKNOWN

    async def _rendered_at(self, url: str) -> str:
        """What a server makes of a short conversation, as it says at ``/tokenize`` beside ``/v1``."""
        import httpx

        head = json.dumps({"model": self.name, "add_generation_prompt": True}).encode()[:-1]
        body = head + b', "messages": [' + b", ".join(map(serialise, CONVERSATION)) + b"]}"
        where = f"{url.removesuffix('/v1')}/tokenize"
        try:
            made = await request(self._http(), "POST", where, Tokens, content=body, timeout=5.0)
        except (RefusedError, BadReplyError, httpx.TransportError):
            return UNKNOWN
        return digest_of(made.tokens)

    @asynccontextmanager
    async def session(
        self, video: str, tools: Sequence[dict[str, Any]], max_new_tokens: int
    ) -> AsyncIterator[_OpenAISession]:
        """Open a conversation on the server that has least to do, or that knows the video already."""
        home = self._home.get(video)
        url = min(self._urls, key=lambda one: burden(self._load[one], one == home))
        self._home[video] = url
        self._load[url] += 1
        try:
            yield _OpenAISession(self, url, tools, max_new_tokens)
        finally:
            self._load[url] -= 1

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _http(self) -> httpx.AsyncClient:
        import httpx

        if self._client is None:
            self._client = httpx.AsyncClient(
                timeout=httpx.Timeout(self._timeout, connect=10.0),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
                headers=authorisation(),
            )
        return self._client

    async def _complete(self, url: str, body: bytes) -> tuple[Completion, int]:
        """The reply to a request for a turn, and how often it was sent again."""
        return await self._send("POST", url, "/chat/completions", Completion, body)

    async def _send(self, method: str, url: str, path: str, kind: type[M], body: bytes | None = None) -> tuple[M, int]:
        """Send a request until a server answers it, and count the tries after the first; other servers are tried in
        turn."""
        from tenacity import AsyncRetrying, RetryError

        others = [other for other in self._urls if other != url] if body else []
        order = [url, *others]
        target, tried = url, 0
        try:
            async for attempt in AsyncRetrying(**tries(seconds=self._retry_for)):
                with attempt:
                    tried = attempt.retry_state.attempt_number
                    target = order[(tried - 1) % len(order)]
                    reply = await request(
                        self._http(), method, target + path, kind, content=body, timeout=self._timeout
                    )
        except RetryError as error:
            cause = error.last_attempt.exception()
            raise EngineError(
                f"no policy server at {redact(', '.join(order))} for {self._retry_for:g} s "
                f"({redact(str(cause) or repr(cause))}): see its log"
            ) from cause
        except RefusedError as error:
            status = error.status
            if status in (400, 413, 422) and any(mark in error.body.decode(errors="replace") for mark in _TOO_LONG):
                raise ContextOverflowError(f"{self.name}: {error}") from error
            # 401 or 404 in the middle of a run tells of the server, not of the request.
            reason = "engine" if body is not None and status in (401, 403, 404) else "refused"
            raise EngineError(f"the policy server at {redact(target)} refused ({status}): {error}", reason) from error
        except BadReplyError as error:
            raise EngineError(
                f"the policy server at {redact(target)} gave {error}, instead of what the OpenAI protocol says",
                "bad_reply",
            ) from error
        return reply, tried - 1


class _OpenAISession:
    """One conversation: its messages are serialised once each."""

    def __init__(self, policy: OpenAIPolicy, url: str, tools: Sequence[dict[str, Any]], max_new_tokens: int) -> None:
        self._policy, self._url = policy, url
        settings: dict[str, Any] = {
            "model": policy.name,
            "temperature": policy._temperature,
            "max_tokens": max_new_tokens,
            "seed": policy._seed,
            **policy._sampling,
        }
        self._tools = f"\n\n{describe_tools(tools)}" if tools else ""
        self._head = json.dumps(settings).encode()[:-1] + b', "messages": ['
        self._tail = b"]}"
        self._sent: list[tuple[Message, bytes]] = []

    async def reply(self, messages: Sequence[Message]) -> Reply:
        for position, message in enumerate(messages):
            if position < len(self._sent) and self._sent[position][0] is message:
                continue
            del self._sent[position:]
            self._sent.append((message, self._serialise(message, position)))
        del self._sent[len(messages) :]
        body = self._head + b", ".join(part for _, part in self._sent) + self._tail
        completion, retries = await self._policy._complete(self._url, body)
        usage = completion.usage
        if usage is None:
            return Reply(completion.text(), retries=retries)
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
        prompt, generated = usage.prompt_tokens, usage.completion_tokens
        return Reply(completion.text(), prompt, min(cached, prompt), generated, retries)

    def _serialise(self, message: Message, position: int) -> bytes:
        if message["role"] == "system":
            return serialise(message, self._tools)
        shown = with_video_preview(message, position) if self._policy._video_preview else message
        if shown is not message:
            options = {
                "media_io_kwargs": {"video": {"num_frames": -1, **video_metadata(blocks_of(shown)[0]["frames"])}},
                "mm_processor_kwargs": {"videos_kwargs": {"do_resize": False}},
            }
            self._tail = b"], " + json.dumps(options).encode()[1:]
        return serialise(shown)


def serialise(message: Message, suffix: str = "") -> bytes:
    """A message as the protocol has it, its text followed by `suffix`; images become data URLs of their JPEG bytes."""
    content = message["content"]
    if message["role"] == "tool" and not isinstance(content, str) and all(each["type"] == "text" for each in content):
        # vLLM puts a newline between the texts of a tool that found no image; a chat template puts nothing.
        content = [{"type": "text", "text": "".join(each["text"] for each in content)}]
    said = content + suffix if isinstance(content, str) else [_block(block) for block in content]
    value = {"role": message["role"], "content": said}
    if message["role"] == "tool":
        value["tool_call_id"] = "call"
    return json.dumps(value).encode()


def _block(block: Block) -> dict[str, Any]:
    """A block in the form of the protocol."""
    if block["type"] == "text":
        return {"type": "text", "text": block["text"]}
    frames = block["frames"] if block["type"] == "video" else [block]
    kind = "video" if block["type"] == "video" else "image"
    data = ",".join(base64.b64encode(frame["jpeg"]).decode("ascii") for frame in frames)
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{kind}/jpeg;base64,{data}"}}
