"""What the tests of inference share: a small library of cached videos, and policies that say what a test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scripted import OracleEncoder, _write_caches, make_settings

from timesearch.data.messages import Message, text_of
from timesearch.data.samples import Prediction, Sample
from timesearch.inference.playing import Job, play, search_maker
from timesearch.pocket.world import make_scene, question
from timesearch.search.policy import Policy, Reply
from timesearch.search.search import Search
from timesearch.settings import Settings

WORLD = "guess-proof"


def video_of(seed: int) -> str:
    return f"{WORLD}/{seed}.mp4"


def build_library(root: Path, videos: int, questions: int = 1) -> Settings:
    """Caches of `videos` pocket videos and `questions` test questions each under `root`; settings with its paths."""
    rows = []
    for seed in range(videos):
        scene = make_scene(WORLD, "train", seed)
        _write_caches(root, video_of(seed), scene)
        for number in range(questions):
            needle = scene.needles[number % len(scene.needles)]
            rows.append(
                Sample(
                    id=f"{seed}-{number}",
                    video=video_of(seed),
                    question=question(needle.shape),
                    answer=needle.colour,
                    gt_spans=[(needle.start, needle.end)],
                )
            )
    settings = make_settings()
    settings.infer.engine = "transformers"
    settings.infer.baselines = ["uniform", "one_shot", "coldstart"]
    paths = settings.paths
    paths.frames, paths.features = root / "cache" / "frames", root / "cache" / "features"
    paths.models, paths.coldstart, paths.train = root / "models", root / "runs" / "coldstart", root / "runs" / "train"
    paths.results, paths.test_samples = root / "results", root / "data" / "test.jsonl"
    settings.tracking.uri = f"sqlite:///{root / 'mlflow.db'}"
    paths.test_samples.parent.mkdir(parents=True, exist_ok=True)
    paths.test_samples.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    return settings


def play_all(
    jobs: Sequence[Job], policy: Policy, settings: Settings, record: Callable[[Job, Prediction], object]
) -> Coroutine[Any, Any, None]:
    """Play jobs over the caches of `settings` by `OracleEncoder`, `infer.concurrency` at a time."""
    return play(jobs, policy, search_maker(settings, OracleEncoder()), record, settings.infer.concurrency)


def new_search(settings: Settings, encoded: bool = False) -> Search:
    paths = settings.paths
    return Search(settings.search, OracleEncoder(), paths.frames, paths.features, encoded)


def search_turn(query: str = "star", thought: str = "Look.", tool: str = "seek_video_frames", **arguments: Any) -> str:
    call = json.dumps({"name": tool, "arguments": {"query": query, **arguments}})
    return f"<think>{thought}</think>\n<tool_call>\n{call}\n</tool_call>"


def answer_turn(answer: str = "red", thought: str = "Seen.") -> str:
    return f"<think>{thought}</think>\n<answer>{answer}</answer>"


class Puppet:
    """A policy that says what `speak(messages)` returns; `seen` keeps what it was asked."""

    name = "puppet"

    def __init__(
        self, speak: Callable[[Sequence[Message]], str], context: int | None = None, encoded: bool = False
    ) -> None:
        self.speak, self.context, self.encoded = speak, context, encoded
        self.seen: list[list[Message]] = []
        self.running = self.most_running = 0

    async def connect(self) -> None:
        pass

    async def close(self) -> None:
        pass

    @asynccontextmanager
    async def session(self, video: str, tools: Sequence[dict[str, Any]], max_new_tokens: int) -> AsyncIterator[Any]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            yield self
        finally:
            self.running -= 1

    async def reply(self, messages: Sequence[Message]) -> Reply:
        await asyncio.sleep(0)
        self.seen.append(list(messages))
        text = self.speak(messages)
        return Reply(text, prompt_tokens=token_count(messages), generated_tokens=len(text) // 4)


def script(*turns: str) -> Callable[[Sequence[Message]], str]:
    """Say the turns one after another, counted by the assistant turns so far; the last for ever and as re-answer."""

    def speak(messages: Sequence[Message]) -> str:
        done = sum(message["role"] == "assistant" for message in messages)
        return turns[-1] if messages[0]["role"] == "user" else turns[min(done, len(turns) - 1)]

    return speak


def token_count(messages: Sequence[Message]) -> int:
    """A plausible count: a token for four characters, sixteen for a frame."""
    images = sum(
        block["type"] == "image" for m in messages if not isinstance(m["content"], str) for block in m["content"]
    )
    return sum(len(text_of(message)) for message in messages) // 4 + 16 * images


class MeanColour:
    """A stand-in encoder: an image is its mean colour, a query the colour that it names."""

    name, pretrained, preprocessing, digest = "mean-colour", "", "", "mean-colour"

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        rows = [[word in text for word in ("red", "green", "blue")] for text in texts]
        return _unit(np.array(rows, np.float32))

    def prepare(self, images: Sequence[Any]) -> np.ndarray:
        return np.stack([np.asarray(image, np.float32).mean(axis=(0, 1)) for image in images])

    def encode_prepared(self, batch: np.ndarray) -> np.ndarray:
        return _unit(batch)


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows + 1e-3
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
