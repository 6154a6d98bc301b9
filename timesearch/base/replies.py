"""What servers of the OpenAI protocol reply, as typed models that `timesearch.base.http` reads replies into."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, FiniteFloat

Count = Annotated[int, Field(ge=0, le=10**9), BeforeValidator(lambda value: 0 if value is None else value)]
"""A number of tokens; null is 0."""


class _Part(BaseModel):
    type: Literal["text", "output_text"]
    text: str


class _Function(BaseModel):
    name: str
    arguments: str | dict[str, Any] | None = None

    def written(self) -> str:
        """The call as a policy writes it; arguments that come as text stay as they are."""
        arguments = self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments or {})
        return f'{{"name": {json.dumps(self.name)}, "arguments": {arguments.strip() or "{}"}}}'


class _Call(BaseModel):
    function: _Function


class _Message(BaseModel):
    content: str | list[_Part] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None

    def said(self) -> str:
        """What is said, beside thoughts and calls that the server has parsed out of it."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)

    def thought(self) -> str:
        """What the server has parsed out as the thought."""
        return self.reasoning or self.reasoning_content or ""


class _Choice(BaseModel):
    message: _Message


class _Details(BaseModel):
    cached_tokens: Count = 0


class _Usage(BaseModel):
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    prompt_tokens_details: _Details | None = None


class Completion(BaseModel):
    """Reply of ``/chat/completions``."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None

    @property
    def message(self) -> _Message:
        """What the model said."""
        return self.choices[0].message

    def text(self) -> str:
        """The assistant's turn, with thoughts and calls that the server has parsed out of it put back."""
        message = self.message
        thought, said = message.thought(), message.said()
        parts = [*([f"<think>{thought}</think>"] if thought else []), *([said] if said else [])]
        parts += [f"<tool_call>\n{call.function.written()}\n</tool_call>" for call in message.tool_calls or []]
        return "\n".join(parts)


class _Model(BaseModel):
    id: str
    owned_by: str | None = None
    max_model_len: int | None = Field(None, gt=0, le=10**9)
    even_odds: FiniteFloat | None = None
    """of an encoder that `timesearch encoder serve` serves"""


class ModelList(BaseModel):
    """Reply of ``/models``."""

    data: list[_Model]


class Version(BaseModel):
    """Reply of vLLM's ``/version``."""

    version: str


class Tokens(BaseModel):
    """Reply of ``/tokenize``."""

    tokens: list[int] = Field(min_length=1)


class _Embedding(BaseModel):
    index: int
    embedding: list[FiniteFloat] = Field(min_length=1)


class Embeddings(BaseModel):
    """Reply of ``/embeddings``."""

    data: list[_Embedding] = Field(min_length=1)

    def rows(self) -> list[list[float]]:
        """The embeddings in the order of what was sent."""
        return [row.embedding for row in sorted(self.data, key=lambda row: row.index)]
