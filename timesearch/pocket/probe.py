"""A quick look at a pocket policy: batched episodes on cached videos, scored by what the generator knows.

`timesearch infer` and `timesearch evaluate` measure for the record; this is for watching a checkpoint while it is
trained, at about 30 episodes a second of one core's time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from timesearch.messages import Message, parse_turn
from timesearch.pocket.world import generator
from timesearch.rewards import rule_judge, score_episode
from timesearch.search.checkpoint import vision_token_ids
from timesearch.training.supervised import UNKNOWN, images_of

if TYPE_CHECKING:
    from timesearch.pocket.lessons import Asked, Corpus
    from timesearch.search.environment import SearchEnvironment

BATCH = 64
"""Episodes that are generated together."""


def probe(
    model: Any, processor: Any, corpus: Corpus, count: int, temperature: float, seed: int = 0
) -> dict[str, float]:
    """Play `count` episodes on a corpus.

    Args:
        model: the policy.
        processor: of the policy.
        corpus: cached videos; their needles are asked about, in an order drawn by `seed`.
        count: episodes.
        temperature: 0 is greedy.
        seed: of questions and samples.

    Returns:
        Means in [0, 1]: `format`, `accuracy`, `completeness`, `search` (episodes that search), `right_query` (the first
        query names the asked shape), `seen` (the shape was among the searched frames), `accuracy_if_seen`,
        `reanswer_if_seen`, `unknown_if_unseen`, `temporal_f1` (T*, threshold 2 s, against the middle of the event);
        and `frames` and `calls`, counts an episode. Left out is what no episode tells, such as `accuracy_if_seen` where
        none saw the shape.
    """
    import torch

    torch.manual_seed(seed)
    order = generator("probe", seed).permutation(len(corpus.asked))[:count]
    rows: list[dict[str, float]] = []
    for start in range(0, len(order), BATCH):
        rows += _play([corpus.asked[i] for i in order[start : start + BATCH]], model, processor, corpus, temperature)
    known = {key: [row[key] for row in rows if not np.isnan(row[key])] for key in rows[0]}
    return {key: round(float(np.mean(values)), 3) for key, values in known.items() if values}


def _play(group: list[Asked], model: Any, processor: Any, corpus: Corpus, temperature: float) -> list[dict[str, float]]:
    """Play episodes side by side, ask each again, and score them."""
    environments = [corpus.new_environment() for _ in group]
    episodes: list[list[Message]] = [
        [corpus.system, {"role": "user", "content": environment.reset(**asked.row)}]
        for environment, asked in zip(environments, group, strict=True)
    ]
    running = list(range(len(group)))
    for _ in range(corpus.settings.max_turns):
        turns = generate(model, processor, [episodes[i] for i in running], corpus.tools, temperature)
        for i, turn in zip(list(running), turns, strict=True):
            episodes[i].append({"role": "assistant", "content": turn})
            calls = [call for call in parse_turn(turn).calls if not call.error]
            if calls:
                found = environments[i]._call(calls[0].name, calls[0].arguments)
                episodes[i].append({"role": "tool", "name": calls[0].name, "content": found})
            else:
                running.remove(i)
        if not running:
            break
    contents = [environment._reanswer_content() for environment in environments]
    searched = [i for i, content in enumerate(contents) if content]
    again: list[str | None] = [None] * len(group)
    if searched:
        asking: list[list[Message]] = [[{"role": "user", "content": contents[i]}] for i in searched]
        for i, turn in zip(searched, generate(model, processor, asking, None, temperature), strict=True):
            again[i] = parse_turn(turn).answer
    return [_score(*episode) for episode in zip(group, environments, episodes, again, strict=True)]


def _score(
    asked: Asked, environment: SearchEnvironment, messages: list[Message], again: str | None
) -> dict[str, float]:
    event = asked.event
    times = sorted({frame.seconds for frame in environment._searched})
    seen = any(asked.scene.visible(seconds) == event for seconds in times)
    near = [abs(seconds - (event.start + event.end) / 2) <= 2 for seconds in times]
    precision, recall = (float(np.mean(near)), float(any(near))) if times else (0.0, 0.0)
    first = parse_turn(messages[2]["content"]).calls
    scores = score_episode(messages, event.colour, "open_ended", again)
    return {
        **scores,
        "search": float(bool(times)),
        "right_query": float(bool(first) and event.shape in str(first[0].arguments.get("query"))),
        "seen": float(seen),
        "accuracy_if_seen": scores["accuracy"] if seen else np.nan,
        "reanswer_if_seen": rule_judge(event.colour, again or "") if seen else np.nan,
        "unknown_if_unseen": rule_judge(UNKNOWN, again or "") if times and not seen else np.nan,
        "temporal_f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "frames": float(len(times)),
        "calls": float(environment._calls),
    }


def generate(
    model: Any,
    processor: Any,
    conversations: list[list[Message]],
    tools: Any,
    temperature: float,
    max_new_tokens: int = 64,
) -> list[str]:
    """The next assistant turn of each conversation, in one batch."""
    import torch

    texts = [
        processor.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        for messages in conversations
    ]
    images = [image for messages in conversations for image in images_of(messages)]
    batch = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    )
    model.eval()
    with torch.no_grad():
        out = model.generate(
            **batch,
            **sampling,
            max_new_tokens=max_new_tokens,
            suppress_tokens=vision_token_ids(processor.tokenizer),
        )
    written = processor.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in written]
