"""Stage `infer`: search episodes of the trained checkpoints on the test samples, and the baselines beside them.

Which methods there are says `timesearch.inference.methods`. Each prediction is written as soon as it is there; a run
that was interrupted goes on, and one that had failures tries only these again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from timesearch.base.batch import BatchResult, Failure, write_failures
from timesearch.base.cluster import Node, joined
from timesearch.base.errors import RequestError
from timesearch.base.exclusive import exclusive
from timesearch.base.progress import Bar, progress_bar
from timesearch.data.rows import read_samples
from timesearch.data.samples import Prediction
from timesearch.inference.fingerprint import Fingerprint, fingerprint_of
from timesearch.inference.journal import Journal
from timesearch.inference.methods import checkpoint_of, episode_of, searches, trained_method
from timesearch.inference.on_ray import engines, refuse_engines
from timesearch.inference.playing import Job, play, search_maker
from timesearch.inference.policies import open_policy, require_fit, served
from timesearch.rewards import answer_letter, rule_judge, score_episode
from timesearch.search.policy import Policy
from timesearch.settings import Settings
from timesearch.tracking import stage_run

if TYPE_CHECKING:
    from timesearch.tracking import Run


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
    settings = settings.for_inference()
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
    frames = settings.infer.uniform_frames
    folder = settings.paths.results / "predictions"
    with exclusive(folder), stage_run(settings, "infer") as tracked, ExitStack() as files:
        journals = {
            method: files.enter_context(
                Journal(folder, method, samples, _fingerprint(settings, checkpoint, method), settings.paths.subtitles)
            )
            for method, checkpoint in checkpoints.items()
        }
        todo = [
            Job(sample, episode_of(method, frames), method)
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

            played = list(dict.fromkeys(checkpoints[job.method] for job in todo))
            for checkpoint in played:
                require_fit(settings, checkpoint)
            make_search = search_maker(settings, default_encoder(settings))
            nodes = files.enter_context(_machines(settings)) if settings.cluster.kind == "ray" else []
            with progress_bar("episodes", len(todo)) as bar:
                record = partial(_record, settings, journals, result, bar)
                for checkpoint in played:
                    jobs = [job for job in todo if checkpoints[job.method] == checkpoint]
                    with _engine(settings, checkpoint, nodes) as policy:
                        asyncio.run(play(jobs, policy, make_search, record, settings.infer.concurrency))
        for method, journal in journals.items():
            _report(tracked, settings, method, journal.finish())
            tracked.set_tags({f"fingerprint.{method}": journal.fingerprint.digest})
        write_failures(folder / "failures.jsonl", result.failures)
    return result


@contextmanager
def _machines(settings: Settings) -> Iterator[list[Node]]:
    """The machines of the Ray cluster, enough for the engines.

    Raises:
        RequestError: it is not there, or too small.
    """
    with joined(settings.cluster.address, shared=[settings.paths.models], cpus=settings.cluster.engines) as nodes:
        refuse_engines(settings, nodes)
        yield nodes


def _engine(settings: Settings, checkpoint: Path, nodes: Sequence[Node]) -> AbstractContextManager[Policy]:
    at = served(settings, checkpoint)
    if nodes and at is None:
        return engines(settings, checkpoint, nodes)
    return open_policy(settings, checkpoint, at)


def _fingerprint(settings: Settings, checkpoint: Path, method: str) -> Fingerprint:
    frames = None if searches(method) else settings.infer.uniform_frames
    return fingerprint_of(settings, checkpoint, method, frames, settings.search)


def _record(
    settings: Settings,
    journals: dict[str, Journal],
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
