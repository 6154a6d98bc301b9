"""Subtitles of a talk of eight hours: reading and indexing them once, and a query.

    uv run python benchmarks/subtitles.py [--lines 20000 80000] [--words 12] [--queries 200]

A file of so many lines of words, drawn as language has them (few are common), is read and indexed by the code of the
stage, in a process of its own whose peak of memory is told; then queries of two words are asked, half of them within a
tenth of the time. Processor seconds of one core.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from timesearch.video.subtitles import Subtitles, read_subtitles, write_index

HOURS = 8
VOCABULARY = 8000


def write_srt(path: Path, lines: int, words: int) -> None:
    """Lines spread over `HOURS`, each shown for two seconds."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, VOCABULARY + 1)
    drawn = rng.choice(VOCABULARY, size=(lines, words), p=weights / weights.sum())
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(drawn):
            start = number * HOURS * 3600 / lines
            file.write(
                f"{number + 1}\n{_clock(start)} --> {_clock(start + 2)}\n{' '.join(f'word{w}' for w in row)}\n\n"
            )


def _clock(seconds: float) -> str:
    whole, rest = int(seconds), int(1000 * (seconds % 1))
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02},{rest:03}"


def measure(path: Path, queries: int) -> dict[str, float]:
    """Seconds of indexing, milliseconds of a query and MB at the peak, of this process."""
    begun = time.process_time()
    transcript = read_subtitles(path)
    write_index(transcript, path.with_suffix(".sqlite"), "benchmark")
    indexed = time.process_time() - begun
    rng = np.random.default_rng(1)
    index = Subtitles(path.with_suffix(".sqlite"))
    end, spent = index.end, []
    for number in range(queries):
        common = 1 + 40 * (number % 3)  # two of three queries are of commoner words
        query = " ".join(f"word{word}" for word in rng.integers(VOCABULARY // common, size=2))
        start = float(rng.uniform(0, 0.9)) * end if number % 2 else 0.0
        begun = time.process_time()
        index.search(query, start, start + end / 10 if number % 2 else end, 8)
        spent.append(1000 * (time.process_time() - begun))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"index, s": indexed, "query, ms": float(np.median(spent)), "worst, ms": max(spent), "peak MB": peak}


def main() -> None:
    """Measure in processes of their own, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[20_000, 80_000])
    parser.add_argument("--words", type=int, default=12, help="a line")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(*measure(given.only, given.queries).items(), sep="\n")
        return
    table = Table("lines", "MB", "index, s", "query, ms", "worst, ms", "peak MB", title=f"a talk of {HOURS} hours")
    with tempfile.TemporaryDirectory() as scratch:
        for lines in given.lines:
            path = Path(scratch) / f"{lines}.srt"
            write_srt(path, lines, given.words)
            command = [sys.executable, __file__, "--only", str(path), "--queries", str(given.queries)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            values = [float(line.rpartition(", ")[2].rstrip(")")) for line in said.splitlines()]
            table.add_row(f"{lines:,}", f"{path.stat().st_size / 1e6:.1f}", *(f"{value:.2f}" for value in values))
    Console().print(table)


if __name__ == "__main__":
    main()
