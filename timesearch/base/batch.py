"""Many items, several at once: the broken ones are set aside with a reason, and the others go on.

The same call runs in threads of this machine (the work itself is ffmpeg, torch or the network, none of which holds
the interpreter's lock) or as plain tasks on a Ray cluster.
"""

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

from timesearch.base.cluster import in_folder, joined
from timesearch.base.errors import CacheMismatchError, ItemError
from timesearch.base.files import write_jsonl
from timesearch.base.progress import progress_bar
from timesearch.base.redaction import redact

_RAY_RETRIES = 3
"""Further tries of an item whose worker process or machine died."""


@dataclass(frozen=True)
class Made:
    """What was made of one item: `units` frames (or MB), in place of a file that was there but was `stale`."""

    units: float
    stale: str = ""


Work = Callable[[str], "Made | None"]
"""Does one item; returns None where the item was up to date."""


@dataclass(frozen=True)
class Failure:
    """One item that could not be done; `reason` is a short stable word, `message` a sentence."""

    item: str
    reason: str
    message: str


@dataclass
class BatchResult:
    """What became of a batch; `again` counts by reason those of `done` whose earlier file could not stay."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    units: float = 0.0
    again: Counter[str] = field(default_factory=Counter)

    def exit_code(self, keep_going: bool = False) -> int:
        """1 if an item failed, unless the caller wants to go on with the others."""
        return 1 if self.failures and not keep_going else 0


def run_batch(
    title: str,
    items: Sequence[str],
    work: Work,
    *,
    failures: Path,
    workers: int,
    unit: str = "frames",
    ray_address: str | None = None,
    ray_gpus: int = 0,
    shared: Sequence[Path] = (),
    set_aside: Sequence[Failure] = (),
) -> BatchResult:
    """Do `work` for each item, `workers` at a time, and list what failed in the file `failures`.

    Args:
        title: shown before the progress bar.
        items: names, each given to `work` once.
        work: raises `ItemError` for an item to be set aside; any other error ends the batch.
        failures: a JSON lines file (`item`, `reason`, `message`); removed where nothing failed.
        workers: items in flight at the same time.
        unit: what `work` counts, for the rate beside the bar.
        ray_address: a Ray cluster to run on ('local' starts one), or None for threads here.
        ray_gpus: GPUs that an item takes on a cluster that has any; Ray hides them from items that take none.
        shared: what all machines of the cluster have to see as this one does (`timesearch.base.cluster.joined`).
        set_aside: what could not even become an item, such as rows of a sample file; it is listed with what fails.
    """
    result = BatchResult(failures=list(set_aside))
    attempt = _Attempt(work)
    if ray_address:
        stream = _on_ray(attempt, items, workers, ray_address, ray_gpus, shared)
    else:
        stream = _in_threads(attempt, items, workers)
    started = time.monotonic()
    with progress_bar(title, len(items)) as bar:
        for item, outcome in stream:
            if isinstance(outcome, Failure):
                result.failures.append(outcome)
            elif outcome is None:
                result.skipped.append(item)
            else:
                result.done.append(item)
                result.units += outcome.units
                result.again.update([outcome.stale] if outcome.stale else [])
            rate = result.units / max(time.monotonic() - started, 1e-9)
            bar.advance(note=f"{rate:.0f} {unit}/s" + (f", {len(result.failures)} failed" if result.failures else ""))
    write_failures(failures, result.failures)
    return result


def write_failures(path: Path, failures: Sequence[Failure]) -> None:
    """List failures as JSON lines in order of item; no file where there are none."""
    if failures:
        write_jsonl(path, [_printable(failure) for failure in sorted(failures, key=lambda failure: failure.item)])
    else:
        path.unlink(missing_ok=True)


def _printable(failure: Failure) -> dict[str, str]:
    """Names of files need not be Unicode: bytes that are not are shown as escapes."""
    return {
        key: redact(value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))
        for key, value in asdict(failure).items()
    }


@dataclass(frozen=True)
class _Attempt:
    """`work` with its expected errors turned into data, so that they cross threads and machines unchanged."""

    work: Work

    def __call__(self, item: str) -> Made | Failure | None:
        try:
            return self.work(item)
        except ItemError as error:
            return Failure(item, error.reason, str(error))
        except CacheMismatchError as error:
            return Failure(item, "cache_mismatch", str(error))
        except OSError as error:
            if error.errno not in _OF_ONE_FILE:
                raise
            return Failure(item, _OF_ONE_FILE[error.errno], f"{item}: {error.strerror} ({error.filename})")


_OF_ONE_FILE = {errno.ENAMETOOLONG: "name_too_long", errno.EIO: "unreadable"}
"""Errors of the system that say nothing of the other files."""


def _in_threads(attempt: _Attempt, items: Sequence[str], workers: int) -> Iterator[tuple[str, Made | Failure | None]]:
    pool = ThreadPoolExecutor(workers)
    try:
        pending: dict[Future[Made | Failure | None], str] = {pool.submit(attempt, item): item for item in items}
        while pending:
            finished, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                yield pending.pop(future), future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _on_ray(
    attempt: _Attempt, items: Sequence[str], workers: int, address: str, gpus: int, shared: Sequence[Path]
) -> Iterator[tuple[str, Made | Failure | None]]:
    with joined(address, shared=shared, cpus=workers) as nodes:
        import ray

        gpus = gpus if any(node.gpus for node in nodes) else 0
        # max_calls=0: a worker with a GPU keeps its loaded model for the next item.
        remotely = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=0, max_retries=_RAY_RETRIES)(
            in_folder(attempt, Path.cwd())
        )
        died = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
        waiting = list(reversed(items))
        pending: dict[ray.ObjectRef, str] = {}
        while waiting or pending:
            while waiting and len(pending) < workers:
                item = waiting.pop()
                pending[remotely.remote(item)] = item
            finished, _ = ray.wait(list(pending), num_returns=1)
            for reference in finished:
                item = pending.pop(reference)
                try:
                    yield item, ray.get(reference)
                except died as error:
                    message = f"{item}: its worker died {_RAY_RETRIES + 1} times: {str(error).splitlines()[0]}"
                    yield item, Failure(item, "worker_died", message)
