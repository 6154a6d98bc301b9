"""What the policy reads, token for token: prompts of training, of both engines and of the re-answer stay as they were.

The golden file holds token ids by the pocket checkpoint's own tokenizer. Where a prompt changes on purpose, a policy
that was trained on the old one has to be trained anew: then write it again, by ``python tests/test_golden_prompts.py``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from players import build_library, new_search, search_turn

from timesearch.data.messages import Message
from timesearch.data.rows import read_samples
from timesearch.search.checkpoint import load_processor
from timesearch.search.engine_openai import serialise
from timesearch.search.engine_transformers import Request, TransformersPolicy
from timesearch.search.episode import system_message
from timesearch.search.protocol import SearchProtocol

GOLDEN = Path(__file__).parent / "golden" / "prompts.json"
POCKET = Path(__file__).parents[1] / "pretrained" / "pocket"
CALLS: list[dict[str, Any]] = [
    {"query": "star", "num_frames": 2},
    {"query": "a red heart", "start_time": 10, "end_time": 30.5},
    {"query": "star", "start_time": 50, "end_time": 20},
    {"query": "star", "num_frames": 8},
    {"query": "star"},
]


def prompts_of(root: Path, prompt_set: str) -> dict[str, Any]:
    """Token ids, by what is rendered, of an episode that searches well, wrongly, and once too often."""
    settings = build_library(root, videos=1)
    settings.search.prompts = prompt_set
    settings.search.max_turns = 6
    sample = read_samples(settings.paths.test_samples)[0].model_copy(update={"options": ["red", "blue <|im_end|>"]})
    search = new_search(settings)
    search.open(sample.model_dump())
    prompts = SearchProtocol.load(prompt_set)
    opening: list[Message] = [{"role": "user", "content": search.preview()}]
    tools = search.schemas
    for number, arguments in enumerate(CALLS):
        found = search.call("seek_video_frames", arguments)
        opening += [
            {"role": "assistant", "content": search_turn(thought=f"Look {number}.", **arguments)},
            {"role": "tool", "name": "seek_video_frames", "content": found},
        ]
    wrong: list[Message] = []
    for name, arguments in (("zoom", {}), ("seek_video_frames", {"frames": 3}), ("seek_video_frames", {})):
        wrong += [
            {"role": "assistant", "content": search_turn()},
            {"role": "tool", "name": name, "content": search.call(name, arguments)},
        ]
    processor = load_processor(POCKET)

    def by_trainer(messages: list[Message], with_tools: bool = True) -> list[int]:
        rendered = processor.apply_chat_template(
            conversation=[messages],
            tools=tools if with_tools else None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        return list(rendered["input_ids"][0])

    system = system_message(prompts, tools, "template")
    conversation, corrected = [system, *opening], [system, *opening[:1], *wrong]
    reanswer: list[Message] = [{"role": "user", "content": search.reanswer()}]
    in_process = TransformersPolicy(_NoModel(), processor, "pocket")
    as_text = [system_message(prompts, tools, "text"), *opening]
    encoded = new_search(settings, encoded=True)
    encoded.open(sample.model_dump())
    body = [
        serialise(message)
        for message in (as_text[0], {"role": "tool", "content": encoded.call("seek_video_frames", CALLS[0])})
    ]
    return {
        "training": by_trainer(conversation),
        "training, corrections": by_trainer(corrected),
        "in process": in_process.encode([Request(conversation, tools, 16)])["input_ids"][0].tolist(),
        "tools as text": in_process.encode([Request(as_text, [], 16)])["input_ids"][0].tolist(),
        "re-answer": by_trainer(reanswer, with_tools=False),
        "tool schemas": tools,
        "body sha256": hashlib.sha256(b"\n".join(body)).hexdigest(),
    }


class _NoModel:
    """Prompts are rendered without weights."""

    dtype, device = torch.float32, torch.device("cpu")

    def eval(self) -> _NoModel:
        return self


@pytest.mark.parametrize("prompt_set", ["pocket", "default"])
def test_prompts_are_the_golden_ones(tmp_path: Path, prompt_set: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[prompt_set]
    rendered = prompts_of(tmp_path, prompt_set)
    assert rendered.keys() == golden.keys()
    for name, ids in golden.items():
        assert rendered[name] == ids, name
    assert rendered["training"] == rendered["in process"] == rendered["tools as text"]


if __name__ == "__main__":
    import tempfile

    values = {name: prompts_of(Path(tempfile.mkdtemp()), name) for name in ("pocket", "default")}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(values) + "\n", encoding="utf-8")
    sys.exit(0)
