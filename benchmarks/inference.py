"""Measures inference against a real vLLM (CPU backend) that serves a tiny Qwen3-VL, on one machine in one run.

    uv run python benchmarks/inference.py [--quick] [--model pretrained/pocket] [--out results/benchmarks/inference]

Compared are this client with 1, 8, 16 and 32 episodes in flight, and the lock-step method: one episode at a time, the
whole prompt computed anew each turn. One server shows both: a request's `cache_salt` says which requests may share its
prefix cache. All requests of a run have one salt, so that each run starts cold; in lock-step each request has its own.
The server's cache of prepared images is filled before, for all runs alike.

Every run plays the same episodes: a preview of 96 frames, then 2 to 4 searches of 8 frames, then the answer; four
questions a video. The engine generates each turn token by token, held to its text by structured outputs: a policy that
searched now and then would give every run other work. Queries are embedded by random vectors, since which frames are
found does not matter here; the frames come from real frame caches.

**Computed** are the prompt tokens that the engine reports as its own work (`vllm:prompt_tokens_by_source_total` with
`source="local_compute"`). **Unique** is the least that any engine must compute: all prompts of a run are laid into one
tree of prefixes, in which two images are the same where their bytes are, and each position of the tree counts once,
however many turns and episodes go through it. What the policy wrote itself is left out of this count, because its keys
and values are there since it was generated; where the engine computes it again, as it does for the block of 32 tokens
that was not full when a turn ended, that counts as computed. Ratio 1 is thus the limit, not a typical value.

The client alone is measured against a server of the same protocol, in another process, that answers at once: processor
time of the client a turn, and its resident memory over 1,000 episodes with 32 in flight, after 300 that start its
threads and fill its caches.

At last the engine is killed (SIGKILL) in the middle of 32 episodes; the client's own keeper starts it again.
Writes `inference.md`, `inference.json` and `inference.png`. Takes about 10 minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import os
import re
import resource
import signal
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console

from timesearch.base.replies import Completion
from timesearch.base.servers import model_server, vllm_command
from timesearch.data.messages import Message, blocks_of
from timesearch.data.samples import Prediction, Sample
from timesearch.inference.playing import Job, play, search_maker
from timesearch.pocket.filesystem import encode
from timesearch.pocket.world import SHAPES, make_scene, question
from timesearch.retrieval.features import make_feature_cache
from timesearch.search.checkpoint import load_processor
from timesearch.search.engine_openai import OpenAIPolicy
from timesearch.search.episode import Step, run_episode
from timesearch.search.search import Search
from timesearch.settings import Settings
from timesearch.video.frames import FrameCache, cache_path, make_frame_cache

CONSOLE = Console(highlight=False, soft_wrap=True)
SERVER = vllm_command(
    *("--max-model-len", "4096", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32"),
    *("--block-size", "32", "--limit-mm-per-prompt", '{"image": 160}', "--skip-mm-profiling"),
    "--enable-prompt-tokens-details",
)
"""32 tokens are the smallest block that vLLM's attention on a CPU knows."""
ASSISTANT = b'"role": "assistant"'


class RandomEncoder:
    """Unit vectors by the content of what is embedded."""

    name, pretrained, preprocessing, digest = "random", "", "", "random"

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Rows of shape (n, 32)."""
        return np.stack([_vector(text.encode()) for text in texts])

    def encode_images(self, images: Sequence[Any]) -> np.ndarray:
        """Rows of shape (n, 32)."""
        return np.stack([_vector(image.tobytes()) for image in images])

    prepare = encode_images

    def encode_prepared(self, batch: np.ndarray) -> np.ndarray:
        """What `prepare` made."""
        return batch


def _vector(content: bytes) -> np.ndarray:
    row = np.random.default_rng(zlib.crc32(content)).standard_normal(32)
    return (row / np.linalg.norm(row)).astype(np.float32)


def make_library(root: Path, videos: int) -> tuple[Settings, list[Sample]]:
    """Pocket videos with real frame caches, and four questions about each, ordered by video."""
    settings = Settings.model_validate(
        {
            "frames": {"factor": 32, "min_pixels": 16384, "max_pixels": 16384, "workers": 1},
            "search": {
                **{"prompts": "pocket", "patch": 32, "min_tokens": 16, "max_tokens": 16, "total_video_tokens": 1536},
                **{"max_turns": 6, "max_frames_per_turn": 8, "max_new_tokens": 64},
            },
        }
    )
    settings.paths.frames, settings.paths.features = root / "frames", root / "features"
    samples = []
    for seed in range(videos):
        video = f"{seed}.mp4"
        (root / video).write_bytes(encode(make_scene("guess-proof", "heldout", seed)))
        frames = cache_path(settings.paths.frames, video)
        make_frame_cache(root / video, frames, settings.frames)
        make_feature_cache(frames, settings.paths.features / f"{video}.safetensors", RandomEncoder(), 64)
        for number in range(4):
            shape = SHAPES[(seed + number) % len(SHAPES)]
            row = {"id": f"{seed}-{number}", "video": video, "question": question(shape), "answer": "red"}
            samples.append(Sample.model_validate(row))
    return settings, samples


def turn_text(shape: str, number: int) -> str:
    """What is written in the assistant turn `number` (from 0) of an episode that is about `shape`."""
    if number > 2 + SHAPES.index(shape) % 3:
        return f"<think>The {shape} red.</think>\n<answer>red</answer>"
    thought = f"I need to see the {shape}." if number == 0 else f"The {shape} nothing."
    start, length = 20 * number - 10, 2 + (SHAPES.index(shape) + number) % 2
    window = "" if number == 0 else f', "start_time": {start}, "end_time": {start + length}'
    call = f'{{"name": "seek_video_frames", "arguments": {{"query": "{shape}"{window}}}}}'
    return f"<think>{thought}</think>\n<tool_call>\n{call}\n</tool_call>"


def turn_asked(body: bytes) -> tuple[str, int]:
    """Shape and turn that a request asks for."""
    asked = re.search(rb"What colour is the (\w+)", body)
    assert asked is not None
    return asked[1].decode(), body.count(ASSISTANT)


class Scripted(OpenAIPolicy):
    """This client, whose engine is held to the script, and whose requests share the prefix cache within a run."""

    def __init__(self, url: str, model: str, tokenizer: Any, lock_step: bool = False) -> None:
        super().__init__([url], model)
        self._tokenizer, self._lock_step, self._salt = tokenizer, lock_step, uuid.uuid4().hex

    async def _complete(self, url: str, body: bytes) -> tuple[Completion, int]:
        text = turn_text(*turn_asked(body))
        more = {
            "cache_salt": uuid.uuid4().hex if self._lock_step else self._salt,
            "structured_outputs": {"choice": [text]},
            # The words, as a policy that was trained on them writes them, and not letter by letter.
            "allowed_token_ids": [*self._tokenizer(text)["input_ids"], self._tokenizer.eos_token_id],
        }
        return await super()._complete(url, body[:-1] + b", " + json.dumps(more).encode()[1:])


@dataclass
class Row:
    """One row of the table; tokens are sums over the run, the first turn is the mean of its seconds."""

    method: str
    in_flight: int
    episodes: int
    turns: int
    seconds: float
    first_turn: float
    computed: int
    cached: int
    generated: int
    unique: int

    @property
    def per_minute(self) -> float:
        """Episodes a minute."""
        return 60 * self.episodes / self.seconds

    @property
    def ratio(self) -> float:
        """Prompt tokens that the engine computed, over the unique ones."""
        return self.computed / self.unique


async def measure(
    policy: Scripted, method: str, in_flight: int, samples: Sequence[Sample], settings: Settings, unique: UniqueTokens
) -> Row:
    """Play one episode a sample, those of one video together, as the stage `infer` does."""
    ended: list[Prediction] = []
    first: list[float] = []
    waiting = iter(samples)

    async def player() -> None:
        search = Search(settings.search, RandomEncoder(), settings.paths.frames, settings.paths.features, encoded=True)
        for sample in waiting:
            began = time.perf_counter()

            def watch(step: Step, began: float = began) -> None:
                if step.kind == "turn" and step.number == 1:
                    first.append(time.perf_counter() - began)

            ended.append(await run_episode(search, policy, sample, watch, reanswer=False))

    await policy.connect()
    before = computed_by(policy._urls[0])
    began = time.perf_counter()
    await asyncio.gather(*(player() for _ in range(in_flight)))
    seconds = time.perf_counter() - began
    await policy.close()
    failed = [row.error for row in ended if row.error]
    if failed:
        raise SystemExit(f"{len(failed)} episodes failed, the first: {failed[0]}")
    usage = [row.usage for row in ended]
    positions, prompts = unique.count(ended)
    told = sum(each.prefilled + each.cached for each in usage)
    if prompts != told:
        raise SystemExit(f"the engine counted {told} prompt tokens where {prompts} were rendered: check UniqueTokens")
    return Row(
        method=method,
        in_flight=in_flight,
        episodes=len(ended),
        turns=sum(row.turns for row in ended),
        seconds=seconds,
        first_turn=sum(first) / len(first),
        computed=computed_by(policy._urls[0]) - before,
        cached=sum(each.cached for each in usage),
        generated=sum(each.generated for each in usage),
        unique=positions,
    )


def computed_by(url: str) -> int:
    """Prompt tokens that the engine has computed since its start, by its own count."""
    text = httpx.get(f"{url.removesuffix('/v1')}/metrics", timeout=60).text
    pattern = r'^vllm:prompt_tokens_by_source_total\{[^}]*source="local_compute"[^}]*\} (\S+)$'
    return round(sum(float(value) for value in re.findall(pattern, text, re.MULTILINE)))


class UniqueTokens:
    """Counts the tokens of rendered prompts."""

    def __init__(self, model: str, settings: Settings) -> None:
        self._processor = load_processor(model)
        self._settings = settings
        self._tools = Search(settings.search, RandomEncoder(), "", "").schemas
        self.tokenizer = tokenizer = self._processor.tokenizer
        self._pad, self._end = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|im_end|>"])
        self._opening = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]

    def count(self, predictions: Sequence[Prediction]) -> tuple[int, int]:
        """Positions of the tree of all prompts without what the policy wrote, and tokens of all prompts."""
        tree: set[bytes] = set()
        total = 0
        for row in predictions:
            cache = FrameCache.open(cache_path(self._settings.paths.frames, row.video))
            for end, message in enumerate(row.prediction):
                if message["role"] == "assistant":
                    total += self._add(tree, row.prediction[:end], cache)
        return len(tree), total

    def _add(self, tree: set[bytes], messages: list[Message], cache: FrameCache) -> int:
        text = self._processor.apply_chat_template(
            messages, tools=self._tools, tokenize=False, add_generation_prompt=True
        )
        blocks = [block for message in messages for block in blocks_of(message)]
        images = iter([cache.jpeg(block["frame"]) for block in blocks if block["type"] == "image"])
        width, height = cache.size
        image_tokens = (width // self._settings.search.patch) * (height // self._settings.search.patch)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        prefix, length, written = hashlib.sha256(), 0, False
        for position, token in enumerate(ids):
            written = written and token != self._end
            image = next(images) if token == self._pad else b""
            for part in range(image_tokens if token == self._pad else 1):
                prefix.update(f"{token}/{part}/".encode() + image)
                length += 1
                if not written:
                    tree.add(prefix.digest()[:12])
            written = written or ids[: position + 1][-len(self._opening) :] == self._opening
        return length


class Instant(BaseHTTPRequestHandler):
    """An engine that takes no time: it answers by the script."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        """The list of models."""
        self._send({"data": [{"id": "instant", "max_model_len": 1_000_000}]})

    def do_POST(self) -> None:
        """A turn."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        usage = {"prompt_tokens": 1000, "completion_tokens": 20}
        self._send({"choices": [{"message": {"content": turn_text(*turn_asked(body))}}], "usage": usage})

    def _send(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def instant_server() -> Iterator[str]:
    """The instant engine in a process of its own, so that neither its time nor its memory is the client's."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Instant)
    process = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
    process.start()
    server.socket.close()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        process.kill()
        process.join()


@dataclass
class Alone:
    """The client alone: milliseconds a turn, and resident memory (MiB) after each tenth of the episodes."""

    in_flight: int
    episodes: int
    turns: int
    processor_ms: float
    wall_ms: float
    memory: list[float]


def client_alone(url: str, settings: Settings, samples: Sequence[Sample], episodes: int, in_flight: int) -> Alone:
    """Play episodes by the stage's own loop against an engine that takes no time."""
    memory: list[float] = []
    turns = ended = 0

    def record(_: Job, prediction: Prediction) -> None:
        nonlocal turns, ended
        if prediction.outcome != "answered":
            raise SystemExit(f"an episode ended as {prediction.outcome}: {prediction.error}")
        turns += prediction.turns + 1  # the re-answer is a turn too
        ended += 1
        if ended % (episodes // 10) == 0:
            memory.append(resident())

    settings.infer.concurrency = in_flight
    jobs = [Job(samples[number % len(samples)].model_copy(update={"id": str(number)})) for number in range(episodes)]
    began, used = time.perf_counter(), time.process_time()
    asyncio.run(
        play(
            jobs,
            OpenAIPolicy([url], "instant"),
            search_maker(settings, RandomEncoder()),
            record,
            settings.infer.concurrency,
        )
    )
    used, took = time.process_time() - used, time.perf_counter() - began
    return Alone(in_flight, episodes, turns, 1000 * used / turns, 1000 * took / turns, memory)


def resident() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@dataclass
class Killed:
    """What came of the episodes in whose middle the engine was killed."""

    in_flight: int
    turns_before: int
    ended_before: int
    seconds_away: float
    complete: int
    failed: int
    twice: int


def survive(policy: Scripted, samples: Sequence[Sample], settings: Settings, port: int) -> Killed:
    """Kill the engine once the episodes in flight have had a turn and a half on average, and wait for their end."""
    ended: list[tuple[str, str]] = []
    answered: list[float] = []
    killed = 0.0
    before = (0, 0)
    complete = policy._complete

    async def counted(url: str, body: bytes) -> tuple[Completion, int]:
        nonlocal killed, before
        completion = await complete(url, body)
        answered.append(time.perf_counter())
        if not killed and len(answered) > 1.5 * len(samples):
            killed, before = answered[-1], (len(answered), len(ended))
            os.kill(engine_process(port), signal.SIGKILL)
        return completion

    policy._complete = counted  # type: ignore[method-assign]
    settings.infer.concurrency = len(samples)
    jobs = [Job(sample) for sample in samples]
    record: Callable[[Job, Prediction], None] = lambda job, row: ended.append((job.sample.id, str(row.outcome)))  # noqa: E731
    asyncio.run(play(jobs, policy, search_maker(settings, RandomEncoder()), record, settings.infer.concurrency))
    gap = max(later - earlier for earlier, later in pairwise(answered))
    identities = [identity for identity, _ in ended]
    return Killed(
        in_flight=len(samples),
        turns_before=before[0],
        ended_before=before[1],
        seconds_away=gap,
        complete=sum(outcome == "answered" for _, outcome in ended),
        failed=sum(outcome == "failed" for _, outcome in ended),
        twice=len(identities) - len(set(identities)),
    )


def engine_process(port: int) -> int:
    """The process of the vLLM that serves at `port`."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        arguments = path.read_bytes().decode(errors="replace").split("\0")
        if arguments[1:3] == SERVER[1:3] and str(port) in arguments:
            return int(path.parent.name)
    raise SystemExit(f"no vLLM runs for port {port}")


def report(rows: Sequence[Row], alone: Sequence[Alone], killed: Killed) -> str:
    """The results in Markdown."""
    head = (
        *("method", "in flight", "episodes", "turns", "episodes/min", "x lock-step", "first turn, s"),
        *("computed", "cached", "unique", "computed / unique"),
    )
    table = [
        (
            *(row.method, row.in_flight, row.episodes, row.turns, f"{row.per_minute:.1f}"),
            *(f"{row.per_minute / rows[0].per_minute:.2f}", f"{row.first_turn:.2f}"),
            *(row.computed, row.cached, row.unique, f"{row.ratio:.3f}"),
        )
        for row in rows
    ]
    lines = ["# Inference", "", *markdown(head, table), "", "## The client alone", ""]
    memory_head = [f"MiB after {alone[-1].episodes * tenth // 10}" for tenth in (1, 2, 5, 10)]
    lines += markdown(
        ("in flight", "episodes", "processor ms a turn", "wall ms a turn", *memory_head),
        [
            (
                *(each.in_flight, each.episodes, f"{each.processor_ms:.2f}", f"{each.wall_ms:.2f}"),
                *((f"{each.memory[tenth - 1]:.1f}" for tenth in (1, 2, 5, 10)) if each is alone[-1] else "----"),
            )
            for each in alone
        ],
    )
    lines += [
        "",
        f"Killed after {killed.turns_before} turns with {killed.in_flight} episodes in flight "
        f"({killed.ended_before} had ended), back after {killed.seconds_away:.0f} s: "
        f"{killed.complete} complete, {killed.failed} failed, {killed.twice} twice.",
    ]
    return "\n".join(lines) + "\n"


def markdown(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A table, a line each."""
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, row)) + " |" for row in cells]


def plot(rows: Sequence[Row], alone: Alone, target: Path) -> None:
    """Episodes a minute, prompt tokens computed over unique ones, and memory over episodes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ["lock-step", *(f"{row.in_flight}\nin flight" for row in rows[1:])]
    colours = ["#888888"] + ["#0b62c4"] * (len(rows) - 1)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    left.bar_label(left.bar(names, [row.per_minute for row in rows], color=colours), fmt="%.0f")
    for bars in (left, middle):
        bars.margins(y=0.1)  # room for the numbers
    left.set_title("episodes a minute")
    middle.bar_label(middle.bar(names, [row.ratio for row in rows], color=colours), fmt="%.2f")
    middle.axhline(1.15, color="#c2571a", linestyle="--", linewidth=1)
    middle.set_title("prompt tokens computed / unique")
    right.plot([alone.episodes * (tenth + 1) // 10 for tenth in range(10)], alone.memory, "o-", color="#0b62c4")
    right.set_ylim(0, 1.3 * max(alone.memory))
    right.set_title("the client's resident memory, MiB, over episodes")
    figure.savefig(target, dpi=120)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 videos and 100 episodes of the client alone")
    parser.add_argument("--model", default="pretrained/pocket", help="checkpoint folder to serve")
    parser.add_argument("--port", type=int, default=8790)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/inference"))
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    videos, flights, episodes = (8, [16], 100) if given.quick else (16, [1, 8, 16, 32], 1000)
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, instant_server() as instant:
        root = Path(temporary)
        settings, samples = make_library(root, videos)
        client_alone(instant, settings, samples, 300, 32)
        alone = [
            client_alone(instant, settings, samples, 100, 1),
            client_alone(instant, settings, samples, episodes, 32),
        ]
        unique = UniqueTokens(given.model, settings)
        with model_server(
            "policy",
            f"http://127.0.0.1:{given.port}/v1",
            given.model,
            SERVER,
            setting="--port",
            log=given.out / "server.log",
            say=CONSOLE.print,
        ) as url:

            def run(method: str, in_flight: int) -> Row:
                policy = Scripted(url, given.model, unique.tokenizer, lock_step=method == "lock-step")
                row = asyncio.run(measure(policy, method, in_flight, samples, settings, unique))
                CONSOLE.print(
                    f"{method}, {in_flight} in flight: {row.per_minute:.1f} episodes a minute, ratio {row.ratio:.3f}"
                )
                return row

            run("warm-up", 16)
            rows = [run("lock-step", 1), *(run("this client", count) for count in flights)]
            killed = survive(Scripted(url, given.model, unique.tokenizer), samples[:32], settings, given.port)
    text = report(rows, alone, killed)
    CONSOLE.print(text, markup=False)
    plot(rows, alone[-1], given.out / "inference.png")
    figures = {
        "rows": [{**asdict(row), "per_minute": row.per_minute, "computed_over_unique": row.ratio} for row in rows],
        "client_alone": [asdict(each) for each in alone],
        "killed": asdict(killed),
    }
    (given.out / "inference.json").write_text(json.dumps(figures, indent=2) + "\n")
    (given.out / "inference.md").write_text(text)


if __name__ == "__main__":
    main()
