"""Measures how long a question about a video that is ready takes, alone and while the server has much else to do.

    uv run python benchmarks/serve.py [--pause 0.2] [--minutes 60] [--out results/benchmarks/serve]

The server runs in a process of its own, with a policy that gives each turn after `--pause` seconds (an answer takes
three: a search, the answer, the answer again) and an encoder that knows colours alone, so that what is measured is the
server. Meanwhile, in three steps,

- **preparing**: 50 questions wait for a full HD video of `--minutes` minutes that nobody has asked about before, and
  two uploads send as fast as the server takes them;
- **answering**: 50 more questions about the ready video are in flight at any time;
- **left**: all of those clients have gone; measured is the time until the last ffmpeg has, too.

Writes `serve.md` and `serve.json`. Takes about two minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import httpx
import imageio_ffmpeg
import numpy as np

from timesearch.data.messages import Message
from timesearch.inference.ask import Asker
from timesearch.search.policy import Reply
from timesearch.serve.api import listen, make_app
from timesearch.settings import Settings

ASKERS, UPLOADS, QUESTIONS = 50, 2, 20
SEARCH = '<think>Look.</think>\n<tool_call>\n{"name": "seek_video_frames", "arguments": {"query": "red"}}\n</tool_call>'
ANSWER = "<think>Seen.</think>\n<answer>red</answer>"


class Steady:
    """A policy that searches once and then answers, each turn after the same time."""

    name, context, encoded = "steady", None, True

    def __init__(self, pause: float) -> None:
        self._pause = pause

    async def connect(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""

    @asynccontextmanager
    async def session(self, video: str, tools: Sequence[dict[str, Any]], max_new_tokens: int) -> AsyncIterator[Steady]:
        """A conversation."""
        yield self

    async def reply(self, messages: Sequence[Message]) -> Reply:
        """The next turn."""
        await asyncio.sleep(self._pause)
        fresh = messages[0]["role"] == "system" and not any(message["role"] == "assistant" for message in messages)
        return Reply(SEARCH if fresh else ANSWER)


class Colours:
    """An encoder for which an image is its mean colour."""

    name, pretrained, preprocessing, digest = "colours", "", "", "colours"

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Unit rows."""
        return self.encode_prepared(np.array([[word in text for word in ("red", "green", "blue")] for text in texts]))

    def encode_images(self, images: Sequence[Any]) -> np.ndarray:
        """Unit rows."""
        return self.encode_prepared(self.prepare(images))

    def prepare(self, images: Sequence[Any]) -> np.ndarray:
        """Mean colours."""
        return np.stack([np.asarray(image, np.float32).mean(axis=(0, 1)) for image in images])

    def encode_prepared(self, batch: np.ndarray) -> np.ndarray:
        """Unit rows."""
        rows = batch + 1e-3
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def serve(root: Path, pause: float, ports: Queue[int]) -> None:
    """Answer at a free port until the process is ended."""
    import uvicorn

    policy = Steady(pause)
    settings = Settings.model_validate({"search": {"max_turns": 4}})
    app = make_app(Asker(settings, policy, Colours(), root / "cache"), policy, [root / "videos"], root / "uploads")
    listener = listen("127.0.0.1", 0)
    ports.put(listener.getsockname()[1])
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])


def make_videos(folder: Path, minutes: int) -> None:
    """`ready.mp4`, a minute of a small picture, and `huge.mp4`, ten seconds of full HD over and over."""
    folder.mkdir()
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error"]
    encoder = ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p"]
    for name, seconds, size in (("ready.mp4", 60, "640x360"), ("clip.mp4", 10, "1920x1080")):
        source = ["-f", "lavfi", "-i", f"testsrc2=size={size}:rate=25:duration={seconds}"]
        subprocess.run([*ffmpeg, *source, *encoder, str(folder / name)], check=True)
    loop = ["-stream_loop", str(6 * minutes - 1), "-i", str(folder / "clip.mp4"), "-c", "copy"]
    subprocess.run([*ffmpeg, *loop, str(folder / "huge.mp4")], check=True)


async def answered(client: httpx.AsyncClient, video: str) -> float:
    """Seconds until a question has its answer."""
    began = time.perf_counter()
    async with client.stream("POST", "/api/ask", json={"video": video, "question": "What is red?"}) as response:
        async for line in response.aiter_lines():
            if line.startswith("event: answer"):
                return time.perf_counter() - began
    raise RuntimeError(f"no answer about {video}")


async def ask_again(client: httpx.AsyncClient, video: str) -> None:
    """Questions about a video, one after the other, until cancelled."""
    while True:
        await answered(client, video)


async def upload_again(client: httpx.AsyncClient, name: str) -> None:
    """Send a video of 256 MiB over and over, until cancelled."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(256):
            yield bytes(2**20)

    while True:
        (await client.put(f"/api/videos/{name}", content=pieces())).raise_for_status()


def is_read(video: str) -> bool:
    """Whether any process has a file of this name on its command line."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (process / "cmdline").read_bytes()
            if b"ffmpeg" in line and video.encode() in line:
                return True
    return False


async def until(condition: Callable[[], bool], patience: float = 60.0) -> float:
    """Seconds until a condition holds."""
    began = time.perf_counter()
    while not condition():
        if time.perf_counter() - began > patience:
            raise TimeoutError
        await asyncio.sleep(0.01)
    return time.perf_counter() - began


async def measure(url: str) -> dict[str, Any]:
    """The figures of one run."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def several() -> list[float]:
            return [await answered(client, "0/ready.mp4") for _ in range(QUESTIONS)]

        await answered(client, "0/ready.mp4")
        figures: dict[str, Any] = {"idle": await several()}
        loads: list[asyncio.Task[Any]] = [asyncio.create_task(answered(client, "0/huge.mp4")) for _ in range(ASKERS)]
        loads += [asyncio.create_task(upload_again(client, f"{number}.mp4")) for number in range(UPLOADS)]
        await until(lambda: is_read("huge.mp4"))
        figures["preparing"] = await several()
        loads += [asyncio.create_task(ask_again(client, "0/ready.mp4")) for _ in range(ASKERS)]
        figures["answering"] = await several()
        for load in loads:
            load.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
        figures["left"] = await until(lambda: not is_read("huge.mp4"))
        return figures


def table(figures: dict[str, Any]) -> str:
    """The figures in Markdown."""
    idle = statistics.median(figures["idle"])
    rows = ["| while | median s | worst s | median to idle |", "| --- | ---: | ---: | ---: |"]
    for name in ("idle", "preparing", "answering"):
        times = figures[name]
        median = statistics.median(times)
        rows.append(f"| {name} | {median:.3f} | {max(times):.3f} | {median / idle:.2f} |")
    return "\n".join([*rows, "", f"ffmpeg ended {figures['left']:.2f} s after the last client had left."])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pause", type=float, default=0.2, help="seconds a turn of the policy takes")
    parser.add_argument("--minutes", type=int, default=60, help="length of the video that is not prepared")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/serve"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_videos(root / "videos", options.minutes)
        context = multiprocessing.get_context("spawn")
        ports = context.Queue()
        server = context.Process(target=serve, args=(root, options.pause, ports))
        server.start()
        try:
            figures = asyncio.run(measure(f"http://127.0.0.1:{ports.get()}"))
        finally:
            server.terminate()
            server.join()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "serve.json").write_text(json.dumps({"pause": options.pause, **figures}, indent=1))
    (options.out / "serve.md").write_text(table(figures) + "\n")
    print(table(figures))


if __name__ == "__main__":
    main()
