"""A policy in this process, on a CPU or one GPU: the requests of many episodes are answered in one `generate` call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from timesearch.base.errors import RequestError, first_line
from timesearch.base.extras import require_modules
from timesearch.data.messages import Block, Message
from timesearch.search.checkpoint import load_processor, vision_token_ids
from timesearch.search.policy import (
    ContextOverflowError,
    EngineError,
    Reply,
    video_metadata,
    with_video_preview,
)
from timesearch.search.protocol import Template
from timesearch.search.rendering import rendered_by

_PAUSE = 0.03
"""Seconds without a new request after which a batch starts although it is not full."""


@dataclass(frozen=True)
class Request:
    """One conversation that waits for its next turn."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]]
    max_new_tokens: int


class TransformersPolicy:
    """A model of `transformers` and its processor.

    Args:
        model: a vision-language model with `generate`.
        processor: its processor; the chat template must know tools where an episode offers them.
        name: what the model is called in messages.
        batch_size: conversations in one `generate` call at most.
        temperature: 0 decodes greedily.
        seed: of sampling.
        video_preview: give the preview as one video block; the model's processor must know videos.
    """

    encoded = False

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        batch_size: int = 32,
        temperature: float = 0.0,
        seed: int = 0,
        video_preview: bool = False,
    ) -> None:
        self.name = name
        self._model = model.eval()
        self._processor = processor
        self._batch_size = batch_size
        self._temperature = temperature
        self._seed = seed
        self._video_preview = video_preview
        self._batches = 0
        self._pending: list[tuple[Request, asyncio.Future[Reply]]] = []
        self._sessions = 0
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")

    @classmethod
    def load(
        cls,
        checkpoint: Path | str,
        batch_size: int = 32,
        temperature: float = 0.0,
        seed: int = 0,
        video_preview: bool = False,
        template: Template = "tools",
    ) -> TransformersPolicy:
        """Load a checkpoint folder (or hub name); a folder that holds a LoRA adapter is put onto its base model.

        Raises:
            RequestError: it is no checkpoint of a vision-language model, or does not know videos and is to see one.
        """
        from timesearch.search.checkpoint import load_model

        require_modules("a policy in this process", "torch", "transformers")
        processor = load_processor(checkpoint, template)
        if video_preview and getattr(processor, "video_processor", None) is None:
            raise RequestError(f"{checkpoint} does not know videos: set infer.preview to images")
        model = load_model(checkpoint)
        return cls(model, processor, str(checkpoint), batch_size, temperature, seed, video_preview)

    @property
    def engine(self) -> str:
        """What computes: the libraries with their versions, device and type of numbers."""
        import torch
        import transformers

        kind = str(self._model.dtype).removeprefix("torch.")
        where = f"{self._model.device.type}, {kind}"
        return f"transformers {transformers.__version__}, torch {torch.__version__}, {where}"

    @cached_property
    def template(self) -> str:
        """What it renders, as `timesearch.search.rendering` tells."""
        return rendered_by(self._processor)

    @property
    def context(self) -> int | None:
        """Length of the context in tokens."""
        config = self._model.config
        return getattr(getattr(config, "text_config", config), "max_position_embeddings", None)

    async def connect(self) -> None:
        """Nothing to do: the model is loaded."""

    @asynccontextmanager
    async def session(
        self, video: str, tools: Sequence[dict[str, Any]], max_new_tokens: int
    ) -> AsyncIterator[_TransformersSession]:
        """Open a conversation; while it is open, batches wait a moment for its requests."""
        self._sessions += 1
        try:
            yield _TransformersSession(self, tools, max_new_tokens)
        finally:
            self._sessions -= 1

    async def close(self) -> None:
        """Wait for the last batch."""
        self._thread.shutdown(wait=True)

    async def _ask(self, request: Request) -> Reply:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._pending.append((request, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._pending:
            seen = 0
            while len(self._pending) < min(self._batch_size, self._sessions) and seen < len(self._pending):
                seen = len(self._pending)
                await asyncio.sleep(_PAUSE)
            batch = [pair for pair in self._pending[: self._batch_size] if not pair[1].done()]
            del self._pending[: self._batch_size]
            if not batch:
                continue
            loop = asyncio.get_running_loop()
            try:
                replies = await loop.run_in_executor(self._thread, self.generate, [request for request, _ in batch])
            except BaseException as error:
                replies = [error] * len(batch)
            for (_, future), reply in zip(batch, replies, strict=True):
                if future.done():
                    continue
                if isinstance(reply, BaseException):
                    future.set_exception(reply)
                else:
                    future.set_result(reply)

    def render(self, request: Request) -> str:
        """The prompt as text, image placeholders not yet expanded.

        Raises:
            EngineError: `refused`, where the checkpoint's chat template does not render this conversation.
        """
        try:
            return self._processor.apply_chat_template(
                list(request.messages), tools=list(request.tools) or None, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program, and fails as programs do
            reason = first_line(error)[:300]
            raise EngineError(f"{self.name}: the chat template does not render a turn: {reason}", "refused") from error

    def encode(self, requests: Sequence[Request], texts: Sequence[str] | None = None) -> Any:
        """Model inputs of a batch, padded on the left; `texts` are the prompts where they are rendered already."""
        images = [[block["image"] for block in _blocks(request.messages, "image")] for request in requests]
        videos = [block["frames"] for request in requests for block in _blocks(request.messages, "video")]
        shown: dict[str, Any] = {"images": images if any(images) else None}
        if videos:
            shown["videos"] = [np.stack([np.asarray(frame["image"]) for frame in frames]) for frames in videos]
            shown["videos_kwargs"] = {
                "video_metadata": [video_metadata(frames) for frames in videos],
                "do_sample_frames": False,
                "do_resize": False,
            }
        return self._processor(
            text=list(texts or map(self.render, requests)),
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **shown,
        )

    def generate(self, requests: Sequence[Request]) -> list[Reply | BaseException]:
        """Answer a batch; halved where it does not fit into the device's memory."""
        import torch

        texts: list[str] = []
        for position, request in enumerate(requests):
            try:
                texts.append(self.render(request))
            except EngineError as error:
                others = [*requests[:position], *requests[position + 1 :]]
                replies = self.generate(others) if others else []
                return [*replies[:position], error, *replies[position:]]
        inputs = self.encode(requests, texts)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        room = (self.context or max(lengths) + requests[0].max_new_tokens) - requests[0].max_new_tokens
        if max(lengths) > room:
            return self._without_overlong(requests, lengths, room)
        try:
            written = self._generate(inputs, requests[0].max_new_tokens)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if len(requests) == 1:
                text = f"{self.name}: a prompt of {lengths[0]} tokens does not fit into the GPU's memory"
                return [EngineError(text, "memory")]
            half = len(requests) // 2
            return [*self.generate(requests[:half]), *self.generate(requests[half:])]
        return [self._reply(row, length) for row, length in zip(written, lengths, strict=True)]

    def _without_overlong(
        self, requests: Sequence[Request], lengths: list[int], room: int
    ) -> list[Reply | BaseException]:
        fitting = [request for request, length in zip(requests, lengths, strict=True) if length <= room]
        replies = iter(self.generate(fitting) if fitting else [])
        return [
            next(replies)
            if length <= room
            else ContextOverflowError(
                f"{self.name}: a prompt of {length} tokens leaves no room in a context of {self.context}: "
                "lower search.total_video_tokens or search.max_turns"
            )
            for length in lengths
        ]

    def _generate(self, inputs: Any, max_new_tokens: int) -> list[list[int]]:
        import torch
        from transformers import GenerationConfig

        tokenizer = self._processor.tokenizer
        # What is left out here is taken from the checkpoint's generation_config.json, which training does not follow.
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=self._temperature > 0,
            repetition_penalty=1.0,
            **({"temperature": self._temperature, "top_k": 0, "top_p": 1.0} if self._temperature > 0 else {}),
            suppress_tokens=vision_token_ids(tokenizer),
            eos_token_id=self._ends(),
            pad_token_id=tokenizer.pad_token_id,
        )
        device = self._model.device
        # Seeds of its own: other models that load between two turns draw from the global random state.
        with torch.inference_mode(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(np.random.SeedSequence((self._seed, self._batches)).generate_state(1)[0]))
            self._batches += 1
            rows = self._model.generate(**inputs.to(device), generation_config=config)
        return rows[:, inputs["input_ids"].shape[1] :].tolist()

    def _ends(self) -> list[int]:
        """Ids of the tokens that end a turn."""
        tokenizer = self._processor.tokenizer
        own = self._model.generation_config.eos_token_id
        listed = own if isinstance(own, list) else [own]
        return sorted({token for token in (*listed, tokenizer.eos_token_id) if token is not None})

    def _reply(self, ids: list[int], prompt_tokens: int) -> Reply:
        ends = {*self._ends(), self._processor.tokenizer.pad_token_id}
        length = next((position for position, token in enumerate(ids) if token in ends), len(ids))
        text = self._processor.tokenizer.decode(ids[:length], skip_special_tokens=False)
        return Reply(text, prompt_tokens, 0, min(length + 1, len(ids)))


@dataclass(frozen=True)
class _TransformersSession:
    policy: TransformersPolicy
    tools: Sequence[dict[str, Any]]
    max_new_tokens: int

    async def reply(self, messages: Sequence[Message]) -> Reply:
        shown = list(messages)
        if self.policy._video_preview:
            shown = [with_video_preview(message, position) for position, message in enumerate(messages)]
        return await self.policy._ask(Request(shown, self.tools, self.max_new_tokens))


def _blocks(messages: Sequence[Message], kind: str) -> list[Block]:
    return [
        block
        for message in messages
        if not isinstance(message["content"], str)
        for block in message["content"]
        if block["type"] == kind
    ]
