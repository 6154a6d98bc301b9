"""Stage `infer`: search episodes of the trained checkpoints on the test samples, and the baselines beside them.

| method | policy | frames |
| --- | --- | --- |
| `uniform` | trained | `uniform_frames` evenly spread, no search |
| `one_shot`, `one_shot_<selection>` | trained | as many, selected by the question itself, no search |
| `base` | before any training | searched |
| `coldstart` | after the cold start | searched |
| `grpo_csv` (`grpo` without completeness) | trained | searched |

The baselines without search ask for the answer by the re-answer's prompt, so all methods differ in their frames alone.
Each prediction is written as soon as it is there; a run that was interrupted goes on, and one that had failures tries
only these again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, get_args

from timesearch.base.batch import BatchResult, Failure, write_failures
from timesearch.base.errors import RequestError
from timesearch.base.exclusive import exclusive
from timesearch.base.files import file_digest, json_digest, write_json, write_jsonl
from timesearch.base.progress import Bar, console, progress_bar
from timesearch.data.rows import read_samples
from timesearch.data.samples import Prediction, Sample
from timesearch.inference.methods import checkpoint_of, trained_method
from timesearch.retrieval.selection import Method, select_frames
from timesearch.rewards import answer_letter, rule_judge, score_episode
from timesearch.search.episode import answer_from_frames, run_episode
from timesearch.search.policy import Policy
from timesearch.search.prompts import Prompts
from timesearch.search.search import Search
from timesearch.settings import Settings
from timesearch.tracking import stage_run
from timesearch.video.frames import VERSION as FRAMES_FORMAT
from timesearch.video.frames import Look

if TYPE_CHECKING:
    from timesearch.retrieval.encoder import Encoder
    from timesearch.tracking import Run

CACHING = ("--enable-prefix-caching", "--enable-prompt-tokens-details")
"""Options of a checkpoint's vLLM, where the settings name no command."""


@dataclass(frozen=True)
class Job:
    """One episode to play."""

    method: str
    sample: Sample


def run(settings: Settings, methods: Sequence[str] | None = None) -> BatchResult:
    """Write `results/predictions/<method>.jsonl` for the methods of the settings, or for `methods`.

    Returns:
        Items are named ``method/sample id``; those that failed have a row with their error in the predictions. Rows of
        the sample file that cannot be used have a failure by their own name, and no prediction.

    Raises:
        RequestError: an unknown method, a checkpoint, encoder or sample file that is missing, a checkpoint that cannot
            play search episodes, or one served model that would have to play for several checkpoints.
        TemporaryError: the policy's server does not answer, or another process works in `results/predictions`.
    """
    methods = list(methods or [*settings.infer.baselines, trained_method(settings)])
    checkpoints = {method: checkpoint_of(method, settings) for method in methods}
    if settings.infer.model is not None and len(set(checkpoints.values())) > 1:
        raise RequestError(
            f"infer.model is {settings.infer.model}, one model, but {', '.join(methods)} are played by the checkpoints "
            f"{', '.join(map(str, dict.fromkeys(checkpoints.values())))}: set infer.model to null, or name methods of "
            "one checkpoint (infer.baselines, --method)"
        )
    result = BatchResult()
    samples = read_samples(settings.paths.test_samples, result.failures.append)
    folder = settings.paths.results / "predictions"
    with exclusive(folder), stage_run(settings, "infer") as tracked, ExitStack() as files:
        journals = {
            method: files.enter_context(_Journal(folder, method, samples, _fingerprint(method, checkpoint, settings)))
            for method, checkpoint in checkpoints.items()
        }
        todo = [
            Job(method, sample)
            for method, journal in journals.items()
            for sample in samples
            if sample.id not in journal.done
        ]
        result.skipped = [
            f"{method}/{sample.id}"
            for method, journal in journals.items()
            for sample in samples
            if sample.id in journal.done
        ]
        if todo:
            from timesearch.retrieval.features import default_encoder
            from timesearch.search.checkpoint import check_fit

            for checkpoint in dict.fromkeys(checkpoints[job.method] for job in todo):
                # A model of another name is the server's own; a folder without a configuration its engine refuses.
                if settings.infer.model is None and any(checkpoint.glob("*config.json")):
                    check_fit(checkpoint, settings.search)
            encoder = default_encoder(settings)
            with progress_bar("episodes", len(todo)) as bar:
                for checkpoint in dict.fromkeys(checkpoints[job.method] for job in todo):
                    jobs = [job for job in todo if checkpoints[job.method] == checkpoint]
                    with _policy(settings, checkpoint) as policy:
                        record = partial(_record, settings, journals, result, bar)
                        asyncio.run(play(jobs, policy, encoder, settings, record))
        for method, journal in journals.items():
            _report(tracked, settings, method, journal.finish())
        write_failures(folder / "failures.jsonl", result.failures)
    return result


def _fingerprint(method: str, checkpoint: Path, settings: Settings) -> str:
    """Digest of all that predictions depend on besides the sample; others are not taken up."""
    infer = settings.infer
    weights = {
        str(path.relative_to(checkpoint)): file_digest(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.suffix in (".safetensors", ".json", ".jinja") and ".partial" not in path.parts
    }
    return json_digest(
        {
            "method": method,
            "model": [infer.model, weights] if infer.model else weights,
            "search": settings.search.shaping(),
            "prompts": Prompts.load(settings.search.prompts).texts,
            "frames": settings.frames.shaping() | {"format": FRAMES_FORMAT},
            "features": settings.features.shaping(),
            "encoder": settings.models.model_dump(include={"encoder", "pretrained", "encoder_steps"}),
            "sampling": [infer.temperature, settings.seed],
            "preview": infer.preview,
            "uniform_frames": infer.uniform_frames if method.startswith(("uniform", "one_shot")) else None,
        }
    )


class _Journal:
    """The predictions of one method: rows are appended as they come, and put into order at the end."""

    def __init__(self, folder: Path, method: str, samples: Sequence[Sample], fingerprint: str) -> None:
        self.done: set[str] = set()
        self._final = folder / f"{method}.jsonl"
        self._partial = folder / f"{method}.jsonl.partial"
        self._mark = folder / f"{method}.json"
        self._samples = {sample.id: sample for sample in samples}
        self._fingerprint = fingerprint
        self._handle: IO[str] | None = None

    def __enter__(self) -> _Journal:
        mark = {"fingerprint": self._fingerprint}
        rows: dict[str, dict[str, Any]] = {}
        if self._mark.is_file() and json.loads(self._mark.read_text(encoding="utf-8")) == mark:
            rows = {row["id"]: row for path in (self._final, self._partial) for row in _rows(path) if self._fits(row)}
        write_jsonl(self._partial, rows.values())
        write_json(self._mark, mark)
        self.done = set(rows)
        self._handle = self._partial.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._handle is not None
        self._handle.close()

    def _fits(self, row: dict[str, Any]) -> bool:
        """Whether a row is the prediction of a sample as it is now, and no failure."""
        sample = self._samples.get(row["id"])
        fields = {name: row[name] for name in Sample.model_fields if name in row}
        return sample is not None and row["error"] is None and Sample.model_validate(fields) == sample

    def add(self, prediction: Prediction) -> None:
        """Write one row, so that it outlives this process."""
        assert self._handle is not None
        self._handle.write(prediction.model_dump_json() + "\n")
        self._handle.flush()

    def finish(self) -> list[Prediction]:
        """Put the rows into the order of the samples."""
        rows = {row["id"]: row for row in _rows(self._partial)}
        ordered = [rows[identity] for identity in self._samples if identity in rows]
        write_jsonl(self._final, ordered)
        self._partial.unlink()
        return [Prediction.model_validate(row) for row in ordered]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file of predictions; a last line that a kill cut off is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as handle:
        for line in handle:
            if line.endswith("\n"):
                yield json.loads(line)


@contextmanager
def _policy(settings: Settings, checkpoint: Path) -> Iterator[Policy]:
    """The engine for a checkpoint: in process, at the settings' URLs, or in a server started for it."""
    from timesearch.search.engine_openai import VIDEO_OPTIONS, OpenAIPolicy

    infer = settings.infer
    if infer.engine == "transformers":
        from timesearch.search.engine_transformers import TransformersPolicy

        yield TransformersPolicy.load(
            checkpoint, infer.concurrency, infer.temperature, settings.seed, infer.preview == "video"
        )
        return

    def client(urls: Sequence[str], model: str) -> OpenAIPolicy:
        return OpenAIPolicy(
            urls,
            model,
            infer.temperature,
            infer.timeout,
            infer.retry_for,
            seed=settings.seed,
            video_preview=infer.preview == "video",
        )

    if infer.urls:
        yield client(infer.urls, infer.model or str(checkpoint))
        return
    from timesearch.base.servers import VLLM, model_server

    with model_server(
        "policy",
        f"http://127.0.0.1:{infer.port}/v1",
        str(checkpoint),
        infer.command or (*VLLM, *CACHING, *(VIDEO_OPTIONS if infer.preview == "video" else ())),
        setting="infer.port",
        log=infer.log,
        timeout=infer.start_timeout,
        say=console.print,
    ) as url:
        yield client([url], str(checkpoint))


async def play(
    jobs: Sequence[Job],
    policy: Policy,
    encoder: Encoder,
    settings: Settings,
    record: Callable[[Job, Prediction], None],
) -> None:
    """Play all jobs, `infer.concurrency` at a time and those of one video together; `record` gets each as it ends."""
    waiting = iter(sorted(jobs, key=lambda job: job.sample.video))

    async def player() -> None:
        search = Search(
            settings.search, encoder, settings.paths.frames, settings.paths.features, encoded=policy.encoded
        )
        for job in waiting:
            record(job, await _one(job, search, policy, settings))

    try:
        await policy.connect()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(settings.infer.concurrency, len(jobs))):
                group.create_task(player())
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    finally:
        await policy.close()


async def _one(job: Job, search: Search, policy: Policy, settings: Settings) -> Prediction:
    if job.method.startswith(("uniform", "one_shot")):
        choose = partial(_choose, method=job.method, sample=job.sample, count=settings.infer.uniform_frames)
        return await answer_from_frames(search, policy, job.sample, choose)
    return await run_episode(search, policy, job.sample)


def _choose(search: Search, method: str, sample: Sample, count: int) -> Sequence[int | Look]:
    """The frames of a baseline without search."""
    frames, features = search.video.frames, search.video.features.features
    if method == "uniform":
        return frames.evenly(count)
    selection = {f"one_shot_{name}": name for name in get_args(Method)}.get(method, search.settings.method)
    query = search.encoder.encode_text([sample.question])[0]
    return select_frames(features, query, count, method=selection, places=frames.places)


def _record(
    settings: Settings,
    journals: dict[str, _Journal],
    result: BatchResult,
    bar: Bar,
    job: Job,
    prediction: Prediction,
) -> None:
    if prediction.error is None:
        prediction.rewards = _rewards(prediction, settings)
        result.done.append(f"{job.method}/{job.sample.id}")
    else:
        error = prediction.error
        result.failures.append(Failure(f"{job.method}/{job.sample.id}", error.type, error.message))
    journals[job.method].add(prediction)
    bar.advance(note=f"{len(result.failures)} failed" if result.failures else "")


def _rewards(prediction: Prediction, settings: Settings) -> dict[str, float]:
    """The training's rewards; what needs a judge's server is left to the stage `evaluate`."""
    answer = prediction.answer
    if prediction.type == "multiple_choice":
        answer = answer_letter(answer, prediction.options) or ""
    scores = score_episode(prediction.prediction, answer, prediction.type, prediction.reanswer, judge=rule_judge)
    if prediction.type == "open_ended" and settings.judge.kind == "server":
        return {"format": scores["format"]}
    return scores


def _report(tracked: Run, settings: Settings, method: str, predictions: Sequence[Prediction]) -> None:
    """What MLflow gets of a method: totals, and its first episodes as traces."""
    if not predictions:
        return
    count = len(predictions)
    figures = {
        "episodes": count,
        "failed": sum(row.outcome == "failed" for row in predictions),
        "answered": sum(row.outcome == "answered" for row in predictions),
        "ended_by_turns": sum(row.limit == "turns" for row in predictions),
        "ended_by_context": sum(row.limit == "context" for row in predictions),
        "turns_mean": sum(row.turns for row in predictions) / count,
        "tool_calls_mean": sum(row.tool_calls for row in predictions) / count,
        "frames_mean": sum(len(row.searched_seconds) for row in predictions) / count,
        **{
            f"tokens_{name}": sum(getattr(row.usage, name) for row in predictions)
            for name in ("prefilled", "cached", "generated")
        },
    }
    tracked.log_metrics({f"{method}/{name}": value for name, value in figures.items()})
    for prediction in predictions[: settings.tracking.traced_episodes]:
        tracked.log_episode(prediction, settings.paths.frames, name=method)
