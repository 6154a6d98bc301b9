"""Stage `evaluate`: scores, tables, plots and the report of the predictions, beside each other and into MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from timesearch.base.batch import BatchResult
from timesearch.base.cluster import joined, require
from timesearch.base.exclusive import exclusive
from timesearch.base.progress import console
from timesearch.evaluation.results import prediction_files, tracked_fingerprint, tracked_metrics, write_evaluation
from timesearch.evaluation.scoring import MakeJudge, evaluate_files
from timesearch.evaluation.table import print_table
from timesearch.judge.client import JudgeClient, RuleJudge, make_judge
from timesearch.judge.on_ray import is_kept_apart, judge_on_cluster
from timesearch.judge.server import judge_server
from timesearch.report.build import write_results_report
from timesearch.settings import Cluster, Judge, Settings
from timesearch.tracking import stage_run


@contextmanager
def held_judge(settings: Judge, cluster: Cluster | None = None) -> Iterator[MakeJudge]:
    """Yield what makes the judge; its server is started when the judge is first asked for, and stopped at the end.

    Args:
        settings: of the judge.
        cluster: where the server may get GPUs of its own.
    """
    with ExitStack() as held:

        def make() -> JudgeClient | RuleJudge:
            if cluster is not None and is_kept_apart(cluster, settings):
                nodes = held.enter_context(joined(cluster.address))
                gpus = cluster.judge_gpus
                require(nodes, cluster.address, "the judge (cluster.judge_gpus)", gpus=gpus, together=gpus)
                return make_judge(held.enter_context(judge_on_cluster(cluster, settings, say=console.print)))
            held.enter_context(judge_server(settings, say=console.print))
            return make_judge(settings)

        yield make


def run(settings: Settings) -> BatchResult:
    """Stage `evaluate`: score the predictions of the settings' methods, write results and the report, print the table.

    Raises:
        RequestError: there are no predictions.
        TemporaryError: another process works in `results`.
    """
    results = settings.paths.results
    files = prediction_files(settings)
    others = {path.stem for path in (results / "predictions").glob("*.jsonl")} - files.keys() - {"failures"}
    if others:
        console.print(f"not scored, as infer.baselines does not name them: predictions of {', '.join(sorted(others))}")
    with (
        exclusive(results),
        stage_run(settings, "evaluate") as record,
        held_judge(settings.judge, settings.cluster) as judge,
    ):
        methods = evaluate_files(files, settings.evaluate, settings.paths.videos, judge, settings.seed)
        failures = results / "evaluation" / "failures.jsonl"
        outcome = write_evaluation(methods, results, settings.evaluate, settings.seed, failures=failures)
        for method in methods:
            record.log_metrics(tracked_metrics(method))
            record.log_params(tracked_fingerprint(method))
        report = write_results_report(settings)
        for path in (report, results / "metrics.json", results / "table.md", results / "evaluation", results / "plots"):
            record.log_artifact(path, path.name if path.is_dir() else None)
    print_table(methods)
    return outcome
