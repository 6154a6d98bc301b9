"""What a frame cache costs, against the limit and against the straightforward way.

    uv run python benchmarks/caches.py --out results/benchmarks/caches [--quick] [--clips FOLDER]

One run, one machine, one video that is made here (720p30 h264, looped by stream copy to each length):

- plain decode: ffmpeg decodes the video to nowhere, the limit of every method;
- this cache: `timesearch.video.frames.make_frame_cache`;
- straightforward: the sampled frames decoded at full size through PyAV, resized by torchvision, saved as one tensor.

Each measurement is a process of its own, repeated three times (once for the hour) for the median. Its time is taken
after its imports, its memory is the sum of the peak resident sizes of that process and of the ffmpeg it starts.
Writes `caches.md`, `caches.json` and `caches.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MB = 1e6
PREVIEW, SEARCHED = 64, 8
DIMENSION = 1152


def make_videos(folder: Path, minutes: list[float]) -> dict[float, Path]:
    """720p30 h264 of each length: half a minute of moving pattern and grain, encoded once and looped."""
    import imageio_ffmpeg

    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-y"]
    segment = folder / "segment.mp4"
    pattern = "testsrc2=size=1280x720:rate=30:duration=30,gblur=sigma=2,noise=alls=4:allf=t"
    encoder = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "26", "-pix_fmt", "yuv420p"]
    subprocess.run([*ffmpeg, "-f", "lavfi", "-i", pattern, *encoder, segment], check=True)
    videos = {}
    for length in minutes:
        playlist, videos[length] = folder / "list.txt", folder / f"{length:g}min.mp4"
        playlist.write_text(f"file '{segment.name}'\n" * round(length * 2))
        subprocess.run([*ffmpeg, "-f", "concat", "-i", playlist, "-c", "copy", videos[length]], check=True)
    return videos


def plain_decode(video: Path, _: Path) -> None:
    """The limit: every frame decoded, none looked at."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-i", video]
    subprocess.run([*command, "-map", "0:v:0", "-fps_mode", "passthrough", "-f", "null", "-"], check=True)


def this_cache(video: Path, target: Path) -> None:
    """The project's frame cache."""
    from timesearch.settings import Frames
    from timesearch.video.frames import make_frame_cache

    make_frame_cache(video, target, Frames(workers=1))


def straightforward(video: Path, target: Path) -> None:
    """Sampled frames at full size in memory, resized at once, one tensor of 8-bit RGB on disk."""
    import av
    import torch
    from safetensors.torch import save_file
    from torchvision.transforms.v2 import functional

    frames, slot = [], -1
    with av.open(str(video)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            if int(float(frame.time or 0) * 2 + 1e-3) > slot:
                slot += 1
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
    resized = functional.resize(torch.stack(frames), [336, 588], interpolation=3, antialias=True)
    save_file({"frames": resized}, target)


def open_episode(cache: Path, features: Path) -> None:
    """What an episode reads: the preview, a selection among all features, and the frames it found."""
    import numpy as np

    from timesearch import FeatureCache, FrameCache, select_frames

    frames = FrameCache.open(cache)
    preview = frames.read(np.linspace(0, len(frames) - 1, PREVIEW).astype(int).tolist())
    table = FeatureCache.open(features)
    found = frames.read(select_frames(table.features, table.features[5].astype(np.float32), SEARCHED))
    assert len(preview) + len(found) == PREVIEW + SEARCHED


def open_tensor(cache: Path, _: Path) -> None:
    """The straightforward way: all frames as float32, then those that are looked at."""
    import torch
    from safetensors.torch import load_file

    frames = load_file(cache)["frames"].float()
    assert len(frames[torch.linspace(0, len(frames) - 1, PREVIEW + SEARCHED).long()]) == PREVIEW + SEARCHED


MEASURED: dict[str, Callable[[Path, Path], None]] = {
    "plain decode": plain_decode,
    "this cache": this_cache,
    "straightforward": straightforward,
    "open this cache": open_episode,
    "open tensor": open_tensor,
}
IMPORTS = {
    "this cache": "timesearch.video.frames, av, ffmpeg, imageio_ffmpeg",
    "straightforward": "av, torch, torchvision.transforms.v2, safetensors.torch",
    "open this cache": "timesearch.video.frames, timesearch.retrieval.features, safetensors, PIL.Image",
    "open tensor": "torch, safetensors.torch",
    "plain decode": "imageio_ffmpeg",
}


def child(name: str, first: Path, second: Path) -> None:
    """Run one measurement in this process and print its time."""
    bare = peak_mb()
    for module in IMPORTS[name].split(", "):
        __import__(module)
    if name.startswith("open"):  # cold: out of the page cache
        for path in (first, second):
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)
    started = time.perf_counter()
    MEASURED[name](first, second)
    print(json.dumps({"seconds": time.perf_counter() - started, "bare_mb": bare, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """Peak resident size of this process and of the largest one it started, MB.

    The first from /proc: `getrusage` would count what the parent held when it started this process.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8").split()
    own = int(status[status.index("VmHWM:") + 1])
    return (own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024 / MB


def measure(name: str, first: Path, second: Path, repeats: int = 3) -> dict[str, float]:
    """The medians of a measurement repeated: seconds, and MB resident at the peak."""
    runs = [measure_once(name, first, second) for _ in range(repeats)]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def measure_once(name: str, first: Path, second: Path) -> dict[str, float]:
    """Run a measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", name, str(first), str(second)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:  # out of memory, say
        return dict.fromkeys(("seconds", "bare_mb", "peak_mb"), float("nan"))
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def write_features(path: Path, count: int) -> None:
    """Random features of a cache of `count` frames."""
    import numpy as np
    from safetensors.numpy import save_file

    rows = np.random.default_rng(0).standard_normal((count, DIMENSION)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    names = ("model", "pretrained", "preprocessing", "frames", "features_sha256")
    save_file(
        {"features": rows.astype(np.float16), "timestamps": np.arange(count) / 2},
        path,
        metadata=dict.fromkeys(names, ""),
    )


def dense_dpp(features: np.ndarray, query: np.ndarray, k: int) -> list[int]:
    """The straightforward selection: the whole N x N kernel, then greedy picks."""
    import numpy as np

    features = features.astype(np.float32)
    relevance = features @ query
    relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    kernel = relevance[:, None] * (features @ features.T) * relevance
    gains, rows, picked = kernel.diagonal().copy(), np.zeros((k, len(features)), np.float32), []
    for number in range(k):
        best = int(np.argmax(gains))
        picked.append(best)
        rows[number] = (kernel[best] - rows[:number, best] @ rows[:number]) / np.sqrt(gains[best])
        gains -= rows[number] ** 2
        gains[picked] = -np.inf
    return sorted(picked)


def drifting(count: int, generator: np.random.Generator) -> np.ndarray:
    """Rows that drift, as one long shot does: the hardest for a selection, since all frames are much alike."""
    import numpy as np

    rows = np.cumsum(generator.standard_normal((count, DIMENSION)) * 0.05, axis=0)
    return rows + generator.standard_normal(DIMENSION)


def cut(count: int, generator: np.random.Generator) -> np.ndarray:
    """Rows of shots of 10 s each, alike within a shot."""
    import numpy as np

    shots = np.repeat(generator.standard_normal((count // 20 + 1, DIMENSION)), 20, axis=0)[:count]
    return shots + 0.3 * generator.standard_normal((count, DIMENSION))


def selection(counts: list[int]) -> list[dict[str, Any]]:
    """Milliseconds of each selection on one core, the median, on half-precision features of two kinds of video."""
    import numpy as np

    from timesearch import select_frames

    generator, rows = np.random.default_rng(0), []
    for kind in (cut, drifting):
        for count in counts:
            features = kind(count, generator)
            features /= np.linalg.norm(features, axis=1, keepdims=True)
            query = (features[count // 3] + 0.02 * generator.standard_normal(DIMENSION)).astype(np.float32)
            query /= np.linalg.norm(query)
            half = features.astype(np.float16)
            times: dict[str, float] = {}
            for name, function in (("this", select_frames), ("dense", dense_dpp)):
                taken = []
                for _ in range(9 if name == "this" else 3):
                    started = time.perf_counter()
                    function(half, query, SEARCHED)
                    taken.append(time.perf_counter() - started)
                times[name] = statistics.median(taken) * 1e3
            rows.append({"video": kind.__name__, "frames": count, "this_ms": times["this"], "dense_ms": times["dense"]})
    return rows


def quality(clips: Path) -> list[dict[str, Any]]:
    """SSIM of cached frames to the raw output of the same filter graph, and bytes a frame, for real clips."""
    import io

    import numpy as np
    from PIL import Image
    from skimage.metrics import structural_similarity

    from timesearch.base.errors import ItemError
    from timesearch.settings import Frames
    from timesearch.video.probe import probe, smart_size
    from timesearch.video.sampling import PIXELS, ffmpeg_command, sample_jpegs

    rows = []
    for clip in sorted(clips.iterdir()):
        try:
            info = probe(clip)
        except ItemError:
            continue
        for qscale in (2, 4):
            settings = Frames(qscale=qscale)
            size = smart_size(info.width, info.height, settings.factor, settings.min_pixels, settings.max_pixels)
            jpegs = [jpeg for _, jpeg in sample_jpegs(clip, info, size, settings)]
            command = ffmpeg_command(clip, info, size, settings)
            command[command.index("-f") + 1], command[command.index("-vcodec") + 1] = "rawvideo", "rawvideo"
            command = [part.replace(PIXELS, "rgb24") for part in command]
            raw = subprocess.run(command, capture_output=True, check=True).stdout
            frames = np.frombuffer(raw, np.uint8).reshape(len(jpegs), size[1], size[0], 3)
            luma, colour = [], []
            for index in range(0, len(jpegs), max(1, len(jpegs) // 8)):
                after = Image.open(io.BytesIO(jpegs[index])).convert("RGB")
                grey = [np.asarray(image.convert("L")) for image in (Image.fromarray(frames[index]), after)]
                luma.append(structural_similarity(*grey, data_range=255))
                colour.append(structural_similarity(frames[index], np.asarray(after), channel_axis=2, data_range=255))
            rows.append(
                {
                    "clip": clip.name,
                    "size": f"{size[0]} x {size[1]}",
                    "qscale": qscale,
                    "luma": float(np.mean(luma)),
                    "luma_lowest": min(luma),
                    "rgb": float(np.mean(colour)),
                    "kb": sum(map(len, jpegs)) / len(jpegs) / 1e3,
                    "ratio": size[0] * size[1] * 3 * len(jpegs) / sum(map(len, jpegs)),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(rows[0]) + " |", "| " + " | ".join("---" for _ in rows[0]) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(map(cell, row.values())) + " |" for row in rows)])


def draw(path: Path, made: list[dict[str, Any]], selected: list[dict[str, Any]]) -> None:
    """Time and memory against length; selection time against the number of frames."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in made):
        rows = [row for row in made if row["method"] == method]
        minutes = [row["minutes"] for row in rows]
        axes[0].plot(minutes, [row["seconds"] for row in rows], "o-", label=method)
        axes[1].plot(minutes, [row["peak MB"] for row in rows], "o-", label=method)
    for video in dict.fromkeys(row["video"] for row in selected):
        rows = [row for row in selected if row["video"] == video]
        for name, label in (("this_ms", "this selection"), ("dense_ms", "whole kernel")):
            counts = [row["frames"] for row in rows]
            axes[2].plot(counts, [row[name] for row in rows], "o-", label=f"{label}, {video}")
    labels = (("minutes of video", "seconds"), ("minutes of video", "peak memory, MB"), ("frames", "DPP of 8, ms"))
    for axis, (below, beside) in zip(axes, labels, strict=True):
        axis.set(xlabel=below, ylabel=beside, xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/caches"))
    parser.add_argument("--quick", action="store_true", help="half a minute and one minute instead of 1, 10 and 60")
    parser.add_argument("--clips", type=Path, help="a folder of real clips, for the quality of the JPEGs")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]), Path(options.child[2]))
        return
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is imported: selection is measured on one core
    options.out.mkdir(parents=True, exist_ok=True)
    lengths = [0.5, 1.0] if options.quick else [1.0, 10.0, 60.0]
    counts = [600, 1200] if options.quick else [600, 1200, 2048, 7200]
    made: list[dict[str, Any]] = []
    opened: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for minutes, video in make_videos(folder, lengths).items():
            limit = 0.0
            for method in ("plain decode", "this cache", "straightforward"):
                if method == "straightforward" and minutes > 10:
                    continue  # 20 GB of frames
                target = folder / f"{minutes}.{method.split()[0]}"
                cost = measure(method, video, target, 3 if minutes <= 10 else 1)
                limit = limit or cost["seconds"]
                size = target.stat().st_size / MB if target.exists() else 0.0
                raw = round(minutes * 120) * 588 * 336 * 3 / MB
                made.append(
                    {
                        "minutes": minutes,
                        "method": method,
                        "seconds": cost["seconds"],
                        "times plain decode": cost["seconds"] / limit,
                        "peak MB": cost["peak_mb"],
                        "MB on disk": size,
                        "raw / disk": raw / size if size else float("nan"),
                    }
                )
                print(made[-1], flush=True)
            write_features(folder / "features.safetensors", round(minutes * 120))
            for name, file in (("open this cache", f"{minutes}.this"), ("open tensor", f"{minutes}.straightforward")):
                if (folder / file).exists():
                    cost = measure(name, folder / file, folder / "features.safetensors")
                    opened.append(
                        {
                            "minutes": minutes,
                            "method": name,
                            "seconds, cold": cost["seconds"],
                            "MB over the interpreter": cost["peak_mb"] - cost["bare_mb"],
                        }
                    )
                    print(opened[-1], flush=True)
    selected = selection(counts)
    parts = {"Making": made, "Opening an episode (64 + 8 frames)": opened, "Selecting 8 by DPP, D = 1152": selected}
    if options.clips:
        parts["JPEG quality on real clips (SSIM to the raw scaled frame)"] = quality(options.clips)
    text = "\n\n".join(f"## {title}\n\n{table(rows)}" for title, rows in parts.items())
    (options.out / "caches.md").write_text(f"# Frame and feature caches\n\n{text}\n", encoding="utf-8")
    (options.out / "caches.json").write_text(json.dumps(parts, indent=2), encoding="utf-8")
    draw(options.out / "caches.png", made, selected)
    print(f"\n{text}\n\nwritten to {options.out}")


if __name__ == "__main__":
    main()
