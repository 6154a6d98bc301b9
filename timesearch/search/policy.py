"""What an episode needs of an engine: messages and tools in, the text of an assistant turn out.

Two engines stand behind it: `engine_transformers` in process, `engine_openai` over HTTP. Both give the assistant's text
verbatim, ``<think>`` and ``<tool_call>`` included, so that the conversation renders to the same token ids wherever it
is rendered: in training, in process, and in a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from timesearch.base.errors import ItemError
from timesearch.data.messages import Block, Message, blocks_of, times_of

_AFFINITY = 4
"""An engine that knows a video is preferred while it has at most this many more conversations than the idlest one."""


@dataclass(frozen=True)
class Reply:
    """An assistant turn, and what it cost in tokens."""

    text: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    retries: int = 0
    """tries after the first that it took"""


class EngineError(ItemError):
    """The engine gave no answer to a request.

    The reason ``engine`` means that it was away for as long as it was asked, so that the same request may succeed
    later; ``refused`` and ``memory`` that it cannot take this one.
    """

    reason = "engine"


class ContextOverflowError(ItemError):
    """The conversation is longer than the engine's context."""

    reason = "context"


class Session(Protocol):
    """One conversation with a policy. The list of messages only grows, apart from a last message put anew."""

    async def reply(self, messages: Sequence[Message]) -> Reply:
        """The next assistant turn.

        Raises:
            EngineError: no answer after all retries, or a refusal.
            ContextOverflowError: the conversation does not fit.
        """
        ...


class Policy(Protocol):
    """An engine with a model in it. One that has an attribute `engine` says there what computes, with its version; and
    in `template` what it renders (`timesearch.search.rendering`)."""

    name: str
    encoded: bool
    """Whether image blocks are to carry JPEG bytes rather than decoded images."""

    @property
    def context(self) -> int | None:
        """Length of the context in tokens, where it is known."""
        ...

    async def connect(self) -> None:
        """Make ready: an engine behind HTTP checks that it serves the model, and asks for the context's length.

        Raises:
            TemporaryError: it does not answer.
            RequestError: it does not serve the model.
        """
        ...

    def session(
        self, video: str, tools: Sequence[dict[str, Any]], max_new_tokens: int
    ) -> AbstractAsyncContextManager[Session]:
        """Open a conversation about `video` (conversations about one video share their prefix) with these tools."""
        ...

    async def close(self) -> None:
        """Let go of connections and threads."""
        ...


def with_video_preview(message: Message, position: int) -> Message:
    """A message of an episode where the preview is to be one video block, ``{"type": "video", "frames": [images]}``.

    The preview is the user message after the system message; frames that a tool or a re-answer shows stay images. The
    frames are the same in both forms; Qwen's vision encoders read two frames of a video as one, at half the tokens.
    """
    if position != 1 or message["role"] != "user":
        return message
    *_, question = blocks = blocks_of(message)
    frames = [block for block in blocks if block["type"] == "image"]
    return {**message, "content": [{"type": "video", "frames": frames}, question]}


def video_metadata(frames: Sequence[Block]) -> dict[str, Any]:
    """When the frames of a video block were seen, as processors and vLLM take it: a video of ten frames a second, the
    resolution in which times are written, of which the frames are samples at even distances; or, where the frames say
    their rate, a video of these frames alone."""
    if rate := frames[0].get("fps"):
        return {"fps": rate, "frames_indices": list(range(len(frames))), "total_num_frames": len(frames)}
    indices = [round(10 * seconds) for seconds in times_of(frames)]
    share = (indices[-1] - indices[0]) / max(1, len(indices) - 1)
    total = max(indices[-1] + 1, round(share * len(indices)))
    return {"fps": 10.0, "frames_indices": indices, "total_num_frames": total}


def burden(conversations: int, knows_video: bool) -> int:
    """What a conversation goes by where several engines play: to the one that has the least of it.

    Args:
        conversations: that the engine has.
        knows_video: whether the last one about this video went there, so that its preview is in the engine's cache.
    """
    return conversations - (_AFFINITY if knows_video else 0)
