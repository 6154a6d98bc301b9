"""A library at size: the exact scan beside the plain NumPy way, and which video, then when, on pocket videos.

    uv run python benchmarks/library.py rows --count 1000000 --work FOLDER [--out results/benchmarks/library]
    uv run python benchmarks/library.py pocket --work FOLDER --encoder FOLDER [--videos 200] [--policy FOLDER]

`rows` writes synthetic rows of 1,152 half floats (clusters as of shots, with noise) once, and scans them with one
thread, each method in a process of its own: reading the file and nothing else, into one buffer; this scan; NumPy over
the mapped file in blocks; and, where they fit the memory, NumPy over all rows as float32, and framesieve 0.2 where it
can be imported (PYTHONPATH). Latency is the median of seven queries after two to warm up, and so is the processor time
in it; memory is the peak of what is not mapped (`RssAnon`); recall is of the ten best rows, against double precision.
What the system can keep of a file in memory is read from there; most of a file that is larger comes from the disk,
again for every query.

`pocket` renders held-out videos, indexes them, and counts for one needle of each video whether `search` for its shape
names a video that shows it first, with a moment inside the event: among all videos, and among those of which no other
has that shape. With a policy it asks each video's question, too.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import mmap
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from timesearch.library.library import Moment
    from timesearch.pocket.world import Event, Scene

WIDTH = 1152
QUERIES, WARM = 7, 2
BEST = 10
SHOT = 64
"""Rows of one cluster."""


def write_rows(path: Path, count: int) -> float:
    """Write synthetic rows; gives the seconds that took."""
    begun = time.perf_counter()
    rng = np.random.default_rng(0)
    partial = path.with_suffix(".partial")
    rows = np.lib.format.open_memmap(partial, "w+", np.float16, (count, WIDTH))
    for first in range(0, count, 16 * SHOT):
        size = min(16 * SHOT, count - first)
        shots = rng.standard_normal((-(-size // SHOT), WIDTH), dtype=np.float32)
        block = np.repeat(shots, SHOT, axis=0)[:size] + 0.3 * rng.standard_normal((size, WIDTH), dtype=np.float32)
        rows[first : first + size] = block / np.linalg.norm(block, axis=1, keepdims=True)
    rows.flush()
    partial.rename(path)
    return time.perf_counter() - begun


def this_scan(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The project's: scan in half precision, then what may be among the best again, exactly."""
    from timesearch.library.rows import exact, scan, slack

    scores = scan(rows, query)
    floor = np.partition(scores, -BEST)[-BEST] - 2 * slack(query)
    likely = np.flatnonzero(scores >= floor)
    return likely[np.argsort(-exact(rows, likely, query), kind="stable")[:BEST]]


def numpy_blocks(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Plain NumPy, a block at a time."""
    scores = np.concatenate(
        [rows[first : first + 8192].astype(np.float32) @ query for first in range(0, len(rows), 8192)]
    )
    return np.argsort(-scores, kind="stable")[:BEST]


def numpy_whole(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Plain NumPy, all rows at once."""
    return np.argsort(-(rows.astype(np.float32) @ query), kind="stable")[:BEST]


def framesieve(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """framesieve 0.2's own search over its index, which holds float32 in memory; times stand for rows."""
    from framesieve.index import FrameIndex
    from framesieve.search import select_candidates

    if "index" not in _framesieve:
        count = len(rows)
        _framesieve["index"] = FrameIndex(np.arange(count, dtype=np.float32), rows, np.zeros(count, np.int32), None)
    chosen = select_candidates(_framesieve["index"], query, BEST, strategy="topk")
    return np.asarray(chosen.ts, np.int64)


_framesieve: dict[str, Any] = {}


def reading(path: Path) -> tuple[float, float]:
    """Seconds, and seconds of a processor, to read a file and do nothing else; medians, as of the queries."""
    buffer, times = bytearray(2**26), []
    for _ in range(QUERIES):
        begun = now()
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        times.append(now() - begun)
    seconds, computing = np.median(times, axis=0)
    return float(seconds), float(computing)


def now() -> np.ndarray:
    """The time, and that for which this process has had a processor (s)."""
    return np.array([time.perf_counter(), time.process_time()])


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "this scan": this_scan,
    "NumPy, in blocks": numpy_blocks,
    "NumPy, all at once": numpy_whole,
    "framesieve, in memory": framesieve,
}


def queries_of(rows: np.ndarray) -> list[np.ndarray]:
    """Vectors near some rows, as queries that have an answer."""
    rng = np.random.default_rng(1)
    near = rows[rng.integers(len(rows), size=QUERIES + WARM)].astype(np.float32)
    near += 0.5 * rng.standard_normal(near.shape, dtype=np.float32) * np.linalg.norm(near, axis=1, keepdims=True) / 34
    return list(near / np.linalg.norm(near, axis=1, keepdims=True))


def measure(path: Path, method: str) -> dict[str, float]:
    """One method on the rows of a file, in this process."""
    import torch

    torch.set_num_threads(1)
    rows = np.load(path, mmap_mode="c")
    rows._mmap.madvise(mmap.MADV_SEQUENTIAL)  # as a library maps its own
    queries, best, idle = queries_of(rows), truth(path), anonymous_mb()
    times, hits, most, done = [], 0, [idle], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], anonymous_mb())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    for number, query in enumerate(queries):
        begun = now()
        found = METHODS[method](rows, query)
        if number >= WARM:
            times.append(now() - begun)
            hits += len(set(found.tolist()) & set(best[number]))
    done.set()
    watching.join()
    seconds, computing = np.median(times, axis=0)
    recall = hits / (BEST * QUERIES)
    return {"seconds": seconds, "computing": computing, "recall": recall, "mb": most[0], "idle_mb": idle}


def anonymous_mb() -> float:
    """What this process holds in memory that is no file's."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024


def truth(path: Path) -> list[list[int]]:
    """The ten best rows of each query in double precision, computed once for a file."""
    kept = path.with_suffix(".truth.json")
    if not kept.exists():
        rows = np.load(path, mmap_mode="r")
        wide = np.array(queries_of(rows), np.float64).T
        scores = np.concatenate(
            [rows[first : first + 8192].astype(np.float64) @ wide for first in range(0, len(rows), 8192)]
        )
        kept.write_text(json.dumps([np.argsort(-column, kind="stable")[:BEST].tolist() for column in scores.T]))
    best: list[list[int]] = json.loads(kept.read_text())
    return best


def rows_table(count: int, work: Path) -> list[str]:
    """The table of the scan."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"rows{count}.npy"
    written = write_rows(path, count) if not path.exists() else None
    size = path.stat().st_size / 1e9
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    lines = [
        f"{count:,} rows of {WIDTH:,} half floats ({size:.1f} GB; {memory:.1f} GB of memory), one thread"
        + (f"; written in {written:.0f} s" if written else ""),
        "",
        "| method | seconds a query | of a processor | GB/s | recall of the 10 best | MB beside the file | before |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    truth(path)
    seconds, computing = reading(path)
    lines.append(f"| reading the file | {seconds:.3f} | {computing:.3f} | {size / seconds:.1f} | | | |")
    for method in METHODS:
        if method in ("NumPy, all at once", "framesieve, in memory") and 4 * count * WIDTH > 8e9:
            lines.append(f"| {method} | | | | | needs {4 * count * WIDTH / 1e6:,.0f} | |")
            continue
        if method.startswith("framesieve") and importlib.util.find_spec("framesieve") is None:
            continue
        command = [sys.executable, __file__, "one", "--path", str(path), "--method", method]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        lines.append(
            f"| {method} | {told['seconds']:.3f} | {told['computing']:.3f} | {size / told['seconds']:.1f} "
            f"| {told['recall']:.3f} | {told['mb']:.0f} | {told['idle_mb']:.0f} |"
        )
    return lines


def scene_of_video(relative: str) -> Scene:
    """What a rendered video shows."""
    from timesearch.pocket.filesystem import scene_of

    return scene_of("demo", "heldout", int(Path(relative).parent.name))


def render(folder: Path, count: int) -> None:
    """Held-out videos, all of one name in folders of their own."""
    from timesearch.base.files import atomic_path
    from timesearch.pocket.filesystem import encode

    for seed in range(count):
        target = folder / f"{seed:03}" / "video.mp4"
        if not target.exists():
            with atomic_path(target) as partial:
                partial.write_bytes(encode(scene_of_video(f"{seed:03}/video.mp4")))


def inside(moment: Moment, events: list[Event]) -> bool:
    """Whether a moment lies in one of some events."""
    return any(event.start <= moment.start and moment.end <= event.end for event in events)


def pocket_table(work: Path, encoder_folder: Path, count: int, policy: Path | None) -> list[str]:
    """Which video, then when."""
    from timesearch.library.catalogue import EncoderRecord
    from timesearch.library.index import index_folders
    from timesearch.library.library import Library
    from timesearch.profiles import load_profile
    from timesearch.retrieval.encoder import load_encoder

    render(work / "videos", count)
    encoder = load_encoder(str(encoder_folder))
    settings = load_profile("pocket")
    begun = time.perf_counter()
    record = EncoderRecord.of(encoder, str(encoder_folder), None)
    done = index_folders(work / "library", [work / "videos"], settings, encoder, record, print)
    indexed = time.perf_counter() - begun
    library = Library(work / "library")
    scenes = {video.key: scene_of_video(video.relative) for video in library.videos()}
    counts = {"video, all": 0, "moment, all": 0, "video, one has it": 0, "moment, one has it": 0}
    took: list[float] = []
    asked: list[tuple[Any, Event]] = []
    for number, video in enumerate(library.videos()):
        event = scenes[video.key].needles[number % 3]
        asked.append((video, event))
        alone = [video, *(other for other in library.videos() if event.shape not in _shapes(scenes[other.key]))]
        for name, videos in (("all", None), ("one has it", alone)):
            begun = time.perf_counter()
            moments = library.find(encoder, f"a {event.shape}", 10, videos).moments
            took.append(time.perf_counter() - begun)
            if moments:
                shown = [each for each in scenes[moments[0].video.key].events if each.shape == event.shape]
                counts[f"video, {name}"] += bool(shown)
                counts[f"moment, {name}"] += inside(moments[0], shown)
    lines = [
        f"{done.videos} videos, {done.rows} frames; indexed in {indexed:.0f} s ({len(done.batch.done)} made); "
        f"median search {1000 * statistics.median(took):.0f} ms",
        "",
        "| right first | of all videos | where one has the shape |",
        "| --- | ---: | ---: |",
    ]
    for what in ("video", "moment"):
        shares = [f"{100 * counts[f'{what}, {name}'] / count:.1f}%" for name in ("all", "one has it")]
        lines.append(f"| {what} | {' | '.join(shares)} |")
    if policy is not None:
        right = asyncio.run(ask_all(library, encoder, policy, asked, scenes))
        lines += ["", *(f"`ask --library`, {name}: {100 * share:.1f}%" for name, share in right.items())]
    return lines


def _shapes(scene: Scene) -> set[str]:
    return {event.shape for event in scene.events}


async def ask_all(
    library: Any, encoder: Any, policy_folder: Path, asked: list[tuple[Any, Event]], scenes: dict[str, Scene]
) -> dict[str, float]:
    """Share of questions whose answer is the colour of that shape in the video that it names."""
    from timesearch.inference.ask import Asker, answering_policy
    from timesearch.library.answer import ask_library
    from timesearch.pocket.world import question
    from timesearch.profiles import load_profile

    settings = load_profile("pocket").for_inference()
    settings.infer.temperature = 0.0
    right = {"one video has the shape": 0, "in the video that is named": 0}
    with answering_policy(settings, str(policy_folder), None) as policy:
        await policy.connect()
        asker = Asker(settings, policy, encoder, library.folder)
        for video, event in asked:
            others = [other for other in library.videos() if event.shape not in _shapes(scenes[other.key])]
            for name, videos in (
                ("one video has the shape", [video, *others]),
                ("in the video that is named", [video]),
            ):
                given = await ask_library(library, asker, encoder, question(event.shape), (), videos)
                answer = given.answer.prediction.predicted_answer if given.answer else None
                right[name] += given.video is not None and given.video.key == video.key and answer == event.colour
        await policy.close()
    return {name: count / len(asked) for name, count in right.items()}


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("rows")
    rows.add_argument("--count", type=int, default=1_000_000)
    pocket = commands.add_parser("pocket")
    pocket.add_argument("--encoder", type=Path, required=True)
    pocket.add_argument("--videos", type=int, default=200)
    pocket.add_argument("--policy", type=Path)
    for command in (rows, pocket):
        command.add_argument("--work", type=Path, required=True)
        command.add_argument("--out", type=Path, default=Path("results/benchmarks/library"))
    one = commands.add_parser("one")
    one.add_argument("--path", type=Path, required=True)
    one.add_argument("--method", choices=METHODS, required=True)
    given = parser.parse_args()
    if given.command == "one":
        print(json.dumps(measure(given.path, given.method)))
        return
    if given.command == "rows":
        lines = rows_table(given.count, given.work)
    else:
        lines = pocket_table(given.work, given.encoder, given.videos, given.policy)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"{given.command}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
