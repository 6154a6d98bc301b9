"""Index runs that are killed: ``python tests/killed_index.py FOLDER FILMS MOMENTS``.

One process imports everything; each run is a child of it that is killed before it touches a file of its library for the
nth time, for as many n as there are moments, spread over a whole run. Says what the library came to, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from test_library import COLOURS, find, index

from timesearch.library.catalogue import Catalogue
from timesearch.library.library import Library
from timesearch.video.frames import FrameCache

TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "sqlite3.connect")
"""What CPython's audit hooks tell of files."""


def run(library: Path, films: Path, kill_at: int = 0) -> tuple[int, int]:
    """Index, up to the moment; how the process ended, and, where it lived, how often it touched a file."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        touched = 0

        def count(event: str, given: tuple[Any, ...]) -> None:
            nonlocal touched
            if event in TOUCHES and str(library) in str(given[0]):
                touched += 1
                if touched == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        done = index(library, films, say=lambda _: None)
        os.write(writing, str(touched).encode())
        os._exit(len(done.batch.failures))
    os.close(writing)
    said = os.read(reading, 99)
    os.close(reading)
    return os.waitpid(child, 0)[1], int(said or 0)


def state(library: Path) -> dict[str, Any]:
    """All that somebody who searches can see of a library, and what should not be there."""
    opened, catalogue = Library(library), Catalogue.read(library)
    words = [words.within(0, 99, 99) for video in opened.videos() if (words := opened.words(video)) is not None]
    return {
        "videos": [entry.model_dump(exclude={"segment", "first"}) for entry in catalogue.videos],
        "rows": sum(segment.rows for segment in catalogue.segments),
        "words": list(map(len, words)),
        "strangers": len(list((library / "segments").iterdir())) - len(catalogue.segments),
        "partial": len(list(library.rglob("*.partial"))),
        "found": [find(library, colour) for colour in COLOURS],
    }


def main(root: Path, films: Path, moments: int) -> None:
    status, touches = run(root / "whole", films)
    assert status == 0
    right = state(root / "whole")
    for number in range(moments):
        library = root / str(number)
        status, _ = run(library, films, 1 + number * (touches - 1) // moments)
        assert status == signal.SIGKILL, (number, status)
        if (library / "library.json").exists():
            Library(library)
        whole = {path: path.stat().st_mtime_ns for path in library.rglob("*.frames") if FrameCache.open(path).verify()}
        assert run(library, films)[0] == 0
        assert {path: path.stat().st_mtime_ns for path in whole} == whole, f"{number}: what was done was done again"
        assert state(library) == right, number
    print(json.dumps({**right, "touches": touches}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
