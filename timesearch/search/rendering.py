"""By which chat template an engine renders: told by the tokens that it makes of a short conversation.

A policy reads what its chat template makes of messages, and plays worse in another form than it was trained in, with
nothing to be seen from outside. In this process the template is the one that the protocol says; a server has its own.
vLLM and SGLang say at ``/tokenize`` what they make of messages, so that one digest stands for template and tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timesearch.base.errors import RequestError
from timesearch.base.files import json_digest
from timesearch.data.messages import Message
from timesearch.dialects.qwen import describe_tools
from timesearch.search.protocol import Template

UNKNOWN = "unknown"
"""In place of a digest, where an engine does not say what it renders."""

_TOOL = {
    "type": "function",
    "function": {"name": "seek", "description": "Seeks.", "parameters": {"type": "object", "properties": {}}},
}
CONVERSATION: tuple[Message, ...] = (
    {"role": "system", "content": f"Search.\n\n{describe_tools([_TOOL])}"},
    {"role": "user", "content": [{"type": "text", "text": "0.0s"}, {"type": "text", "text": "Where is it?"}]},
    {"role": "assistant", "content": '<think>\nLook.\n</think>\n\n<tool_call>\n{"name": "seek"}\n</tool_call>'},
    {"role": "tool", "content": [{"type": "text", "text": "1.0s"}, {"type": "text", "text": " Go on.\n"}]},
    {"role": "assistant", "content": "<think>Hm.</think> I see it."},
    {"role": "user", "content": "Answer now."},
)
"""All that templates differ in: tools in the system text, contents as lists, calls, what tools found, thoughts of turns
before a later question."""


def digest_of(tokens: Sequence[int]) -> str:
    """What stands for a rendering: the start of a digest of its token ids."""
    return json_digest(list(tokens))[:12]


def rendered_by(processor: Any) -> str:
    """The digest of `CONVERSATION` as a processor renders it."""
    try:
        text = processor.apply_chat_template(list(CONVERSATION), tokenize=False, add_generation_prompt=True)
        return digest_of(processor.tokenizer(text)["input_ids"])
    except Exception:  # a template is a program, and fails as programs do; episodes then say how
        return UNKNOWN


def rendered_of(checkpoint: Path, template: Template) -> str:
    """The digest of `CONVERSATION` as this process renders it for a checkpoint; `UNKNOWN` of a folder that is none."""
    from timesearch.search.checkpoint import load_processor

    try:
        return rendered_by(load_processor(checkpoint, template))
    except RequestError:
        return UNKNOWN
