"""Measures inference against a real vLLM (CPU backend) that serves a tiny Qwen3-VL, on one machine in one run.

    uv run python benchmarks/inference.py [--quick] [--model pretrained/pocket] [--out results/benchmarks/inference]

Compared are this client with 1, 8, 16 and 32 episodes in flight, and the lock-step method: one episode at a time, and
nothing taken from the prefix cache (each request has a `cache_salt` of its own, which is how one server shows both).
Every run starts with a cold cache, by a salt of its own. *Unique tokens* are the distinct prefixes of all prompts of a
run, images told apart by their bytes: the least that any engine must compute. Queries are embedded by random vectors,
since which frames are found does not matter here; frames are read from real frame caches.

The client's own time a turn, and the memory of 1,000 episodes, are measured with a transport that answers at once.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from timesearch.inference.infer import Job, play
from timesearch.pocket.filesystem import encode
from timesearch.pocket.world import make_scene, question
from timesearch.retrieval.features import make_feature_cache
from timesearch.samples import Prediction, Sample
from timesearch.search.checkpoint import load_processor
from timesearch.search.engine_openai import OpenAIPolicy
from timesearch.search.environment import SearchEnvironment
from timesearch.search.episode import Step, run_episode
from timesearch.search.policy import tool_schemas
from timesearch.servers import model_server
from timesearch.settings import Settings
from timesearch.video.frames import FrameCache, cache_path, make_frame_cache

CONSOLE = Console()
SERVER = [
    *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}"),
    *("--host", "{host}", "--port", "{port}", "--max-model-len", "4096", "--dtype", "float32", "--enforce-eager"),
    *("--block-size", "32", "--max-num-seqs", "32", "--limit-mm-per-prompt", '{"image": 96}'),
    "--enable-prompt-tokens-details",
]


class RandomEncoder:
    """Unit vectors by the content of what is embedded."""

    name, pretrained, preprocessing, digest = "random", "", "", "random"

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Rows of shape (n, 32)."""
        return np.stack([_vector(text.encode()) for text in texts])

    def prepare(self, images: Sequence[Any]) -> np.ndarray:
        """Rows of shape (n, 32)."""
        return np.stack([_vector(image.tobytes()) for image in images])

    def encode_prepared(self, batch: np.ndarray) -> np.ndarray:
        """What `prepare` made."""
        return batch


def _vector(content: bytes) -> np.ndarray:
    row = np.random.default_rng(zlib.crc32(content)).standard_normal(32)
    return (row / np.linalg.norm(row)).astype(np.float32)


class Salted(OpenAIPolicy):
    """This client with the requests of a run salted, so that runs share nothing; lock-step: each request by itself."""

    def __init__(self, url: str, model: str, lock_step: bool = False) -> None:
        super().__init__([url], model)
        self._lock_step, self._salt = lock_step, uuid.uuid4().hex

    async def _send(self, method: str, url: str, path: str, body: bytes | None = None) -> httpx.Response:
        if body is not None:
            salt = uuid.uuid4().hex if self._lock_step else self._salt
            body = body[:-1] + f', "cache_salt": "{salt}"}}'.encode()
        return await super()._send(method, url, path, body)


def make_library(root: Path, videos: int, questions: int) -> tuple[Settings, list[Sample]]:
    """Pocket videos with real frame caches, and questions about them."""
    settings = Settings.model_validate(
        {
            "frames": {"factor": 32, "min_pixels": 4096, "max_pixels": 4096, "workers": 1},
            "search": {
                **{"prompts": "pocket", "patch": 32, "min_tokens": 4, "max_tokens": 4, "total_video_tokens": 128},
                **{"max_turns": 6, "max_frames_per_turn": 4, "max_new_tokens": 48},
            },
        }
    )
    settings.paths.frames, settings.paths.features = root / "frames", root / "features"
    samples = []
    for seed in range(videos):
        scene, video = make_scene("guess-proof", "heldout", seed), f"{seed}.mp4"
        (root / video).write_bytes(encode(scene))
        make_frame_cache(root / video, cache_path(settings.paths.frames, video), settings.frames)
        make_feature_cache(
            cache_path(settings.paths.frames, video),
            settings.paths.features / f"{video}.safetensors",
            RandomEncoder(),
            64,
        )
        for number in range(questions):
            needle = scene.needles[number % len(scene.needles)]
            row = {
                "id": f"{seed}-{number}",
                "video": video,
                "question": question(needle.shape),
                "answer": needle.colour,
            }
            samples.append(Sample.model_validate(row))
    return settings, samples


@dataclass
class Measured:
    """One row of the table."""

    method: str
    in_flight: int
    seconds: float
    predictions: list[Prediction]
    first_turn: float
    unique: int

    @property
    def per_minute(self) -> float:
        """Episodes a minute."""
        return 60 * len(self.predictions) / self.seconds

    def tokens(self, name: str) -> int:
        """Sum of one field of the usage."""
        return sum(getattr(row.usage, name) for row in self.predictions)

    @property
    def ratio(self) -> float:
        """Prompt tokens that the engine computed, over the unique ones."""
        return self.tokens("prefilled") / self.unique


async def measure(
    policy: Salted, method: str, in_flight: int, samples: Sequence[Sample], settings: Settings, unique: UniqueTokens
) -> Measured:
    """Play one episode a sample."""
    ended: list[Prediction] = []
    first: list[float] = []
    slots, waiting = asyncio.Semaphore(in_flight), list(samples)
    await policy.connect()

    async def one(sample: Sample) -> None:
        async with slots:
            environment = SearchEnvironment(
                settings.search, RandomEncoder(), settings.paths.frames, settings.paths.features, encoded=True
            )
            began = time.perf_counter()

            def watch(step: Step) -> None:
                if step.kind == "turn" and step.number == 1:
                    first.append(time.perf_counter() - began)

            ended.append(await run_episode(environment, policy, sample, settings.search, watch, reanswer=False))

    began = time.perf_counter()
    await asyncio.gather(*map(one, waiting))
    seconds = time.perf_counter() - began
    await policy.close()
    failed = [row for row in ended if row.error]
    if failed:
        raise SystemExit(f"{len(failed)} episodes failed, the first: {failed[0].error}")
    return Measured(method, in_flight, seconds, ended, sum(first) / len(first), unique.count(ended))


class UniqueTokens:
    """Counts distinct prefixes of rendered prompts."""

    def __init__(self, model: str, settings: Settings) -> None:
        self._processor = load_processor(model)
        self._settings = settings
        environment = SearchEnvironment(settings.search, RandomEncoder(), "", "")
        self._tools = tool_schemas(environment)
        self._pad = self._processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def count(self, predictions: Sequence[Prediction]) -> int:
        """Distinct prefixes of all prompts of these episodes; an image is `4` tokens that its bytes tell apart."""
        seen: set[bytes] = set()
        for row in predictions:
            cache = FrameCache.open(cache_path(self._settings.paths.frames, row.video))
            for end, message in enumerate(row.prediction):
                if message["role"] == "assistant":
                    self._add(seen, row.prediction[:end], cache)
        return len(seen)

    def _add(self, seen: set[bytes], messages: list[dict[str, Any]], cache: FrameCache) -> None:
        text = self._processor.apply_chat_template(
            messages, tools=self._tools, tokenize=False, add_generation_prompt=True
        )
        blocks = [block for m in messages if not isinstance(m["content"], str) for block in m["content"]]
        images = iter([cache.jpeg(block["frame"]) for block in blocks if block["type"] == "image"])
        prefix = hashlib.sha256()
        for token in self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]:
            image = next(images) if token == self._pad else b""
            for part in range(4 if token == self._pad else 1):
                prefix.update(f"{token}/{part}/".encode() + image)
                seen.add(prefix.digest()[:12])


def instant(request: httpx.Request) -> httpx.Response:
    """An engine that takes no time: three searches and an answer."""
    if request.method == "GET":
        return httpx.Response(200, json={"data": [{"id": "instant", "max_model_len": 100_000}]})
    turns = request.content.count(b'"role": "assistant"')
    call = {"name": "seek_video_frames", "arguments": {"query": f"star {turns}"}}
    text = f"<think>x</think>\n<tool_call>\n{json.dumps(call)}\n</tool_call>" if turns < 3 else "<answer>red</answer>"
    usage = {"prompt_tokens": 1000, "completion_tokens": 20}
    return httpx.Response(200, json={"choices": [{"message": {"content": text}}], "usage": usage})


def client_alone(settings: Settings, samples: Sequence[Sample], episodes: int) -> tuple[float, list[int]]:
    """Milliseconds a turn of everything but the engine, one episode at a time; resident memory (MiB) at ten points."""
    settings.infer.concurrency = 1
    memory, turns = [], 0

    def record(_: Job, prediction: Prediction) -> None:
        nonlocal turns
        turns += prediction.turns
        assert prediction.outcome == "answered"
        if len(ended) % max(1, episodes // 10) == 0:
            memory.append(resident())
        ended.append(None)

    ended: list[None] = []
    policy = OpenAIPolicy(["http://instant/v1"], "instant")
    policy._client = httpx.AsyncClient(transport=httpx.MockTransport(instant))
    jobs = [
        Job("grpo_csv", samples[number % len(samples)].model_copy(update={"id": str(number)}))
        for number in range(episodes)
    ]
    began = time.process_time()
    asyncio.run(play(jobs, policy, RandomEncoder(), settings, record))
    return 1000 * (time.process_time() - began) / turns, memory


def resident() -> int:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


def table_of(rows: Sequence[Measured]) -> Table:
    """The comparison."""
    table = Table(title="inference against one vLLM (CPU backend)")
    columns = ("method", "in flight", "episodes/min", "x lock-step", "turns", "prefilled", "cached", "unique", "ratio")
    for column in (*columns, "first turn s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        turns = sum(prediction.turns for prediction in row.predictions) / len(row.predictions)
        table.add_row(
            *(row.method, str(row.in_flight), f"{row.per_minute:.1f}", f"{row.per_minute / rows[0].per_minute:.2f}"),
            *(f"{turns:.1f}", str(row.tokens("prefilled")), str(row.tokens("cached")), str(row.unique)),
            *(f"{row.ratio:.2f}", f"{row.first_turn:.2f}"),
        )
    return table


def plot(rows: Sequence[Measured], target: Path) -> None:
    """Episodes a minute, and prompt tokens computed over unique ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"{row.method}\n{row.in_flight} in flight" for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.bar(names, [row.per_minute for row in rows], color=["#888888"] + ["#0b62c4"] * (len(rows) - 1))
    left.set_title("episodes a minute")
    right.bar(names, [row.ratio for row in rows], color=["#888888"] + ["#0b62c4"] * (len(rows) - 1))
    right.axhline(1.15, color="#c2571a", linestyle="--", linewidth=1)
    right.set_title("prompt tokens computed / unique")
    figure.savefig(target, dpi=120)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few episodes, lock-step and 16 in flight only")
    parser.add_argument("--model", default="pretrained/pocket", help="checkpoint folder to serve")
    parser.add_argument("--port", type=int, default=8790)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/inference"))
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    videos, questions, flights = (4, 4, [16]) if given.quick else (12, 4, [1, 8, 16, 32])
    root = Path(tempfile.mkdtemp())
    try:
        settings, samples = make_library(root, videos, questions)
        client_alone(settings, samples, 10)
        overhead, memory = client_alone(settings, samples, 100 if given.quick else 1000)
        unique = UniqueTokens(given.model, settings)
        rows = []
        with model_server(
            "policy", f"http://127.0.0.1:{given.port}/v1", given.model, SERVER, log=root / "log", say=CONSOLE.print
        ) as url:
            asyncio.run(measure(Salted(url, given.model), "warm-up", 4, samples[:4], settings, unique))
            few = samples[: 8 if given.quick else 16]
            lock_step = Salted(url, given.model, lock_step=True)
            rows.append(asyncio.run(measure(lock_step, "lock-step", 1, few, settings, unique)))
            for count in flights:
                rows.append(
                    asyncio.run(measure(Salted(url, given.model), "this client", count, samples, settings, unique))
                )
    finally:
        shutil.rmtree(root)
    CONSOLE.print(table_of(rows))
    CONSOLE.print(f"client alone: {overhead:.2f} ms of processor time a turn; resident memory {memory} MiB")
    given.out.mkdir(parents=True, exist_ok=True)
    plot(rows, given.out / "inference.png")
    figures = {
        "rows": [
            {
                **{"method": row.method, "in_flight": row.in_flight, "episodes_per_minute": row.per_minute},
                **{name: row.tokens(name) for name in ("prefilled", "cached", "generated")},
                **{"unique": row.unique, "computed_over_unique": row.ratio, "first_turn_s": row.first_turn},
            }
            for row in rows
        ],
        "client_ms_a_turn": overhead,
        "memory_mib": memory,
    }
    (given.out / "inference.json").write_text(json.dumps(figures, indent=2) + "\n")
    CONSOLE.print(f"written: {given.out}/inference.json and inference.png")


if __name__ == "__main__":
    main()
