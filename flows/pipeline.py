"""The whole pipeline: from sample files to a trained policy and its scores.

timesearch demo                                        here and now
prefect deployment run 'pipeline/pocket' --watch       on a worker
"""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from rich.console import Console

from tasks import live
from tasks.artifacts import show_plan, show_results
from tasks.judge import asks_judge, judge
from tasks.outage import AWAY, is_back
from tasks.record import record_data, record_results
from tasks.reproduce import STAGES, reproduce, stale_stages
from tasks.stages import TASKS
from tasks.workspace import workspace
from timesearch.base.errors import TimeSearchError
from timesearch.base.redaction import redact
from timesearch.data.rows import read_models
from timesearch.data.samples import Sample
from timesearch.settings import Settings, load_settings
from timesearch.tracking import PARENT_RUN, lock_tags, parent_run, tracking_uri

CHECKOUT = Path(__file__).resolve().parents[1]

Stage = Literal["download", "models", "frames", "features", "subtitles", "coldstart", "train", "infer", "evaluate"]
Value = bool | int | float | str | list[Any] | None
Overrides = dict[str, Value]


def run_name() -> str:
    """What a flow run is called: its flow, and what it changes."""
    changes = (flow_run.parameters.get("overrides") or {}).items()
    parts = [flow_run.flow_name, flow_run.parameters.get("revision"), *(f"{name}={value}" for name, value in changes)]
    return redact(" ".join(filter(None, parts)))


@flow(name="pipeline", flow_run_name=run_name)
def pipeline(
    overrides: Overrides | None = None, revision: str | None = None, stages: list[Stage] | None = None
) -> dict[str, Any]:
    """Bring every stage up to date, from download to evaluation.

    Args:
        overrides: Parameters to change for this run, by dotted name, such as {"train.learning_rate": 1e-5}. The run
            then works in a workspace of its own and leaves the checkout as it is.
        revision: Commit, branch or tag to run, in a workspace of its own. Empty: the checkout as it is.
        stages: Stages to bring up to date; the others are taken as they are. Empty: all.
    """
    return run_stages(stages or STAGES, overrides, revision)


def run_stages(
    stages: Sequence[str], overrides: Overrides | None = None, revision: str | None = None
) -> dict[str, Any]:
    """Reproduce stages in pipeline order, inside a flow run.

    Returns:
        `ran`: the stages that were not up to date; `table`: the table of results, as Markdown.

    Raises:
        RequestError: a wrong override or revision, or wrong parameters.
        StageFailedError: a stage failed for good.
    """
    stages = [stage for stage in STAGES if stage in stages]
    with ExitStack() as held:
        logger = get_run_logger()
        tree = held.enter_context(workspace(CHECKOUT, overrides or {}, revision, logger.info, logger.warning))
        settings = _anchored(load_settings(tree / "params.yaml"), tree)
        stale = stale_stages(tree, stages, logger.info)
        show_plan(stale, stages)
        live.TABLE.plan(stages)
        fresh = stages[: stages.index(stale[0])] if stale else stages
        env = {"MLFLOW_TRACKING_URI": tracking_uri(settings)}
        if stale:
            record = held.enter_context(parent_run(settings, flow_run.name, tree))
            record_data(record, settings, tree, logger.warning)
            env[PARENT_RUN] = record.id or ""
        ran = _bring_all(stages, fresh, tree, settings, env)
        if stale:
            record.set_tags(lock_tags(tree))
            record.log_artifact(tree / "dvc.lock")
            if "evaluate" in stages:
                record_results(record, settings, tree, logger.warning)
        return {"ran": ran, "table": show_results(tree, settings.paths.results)}


def _bring_all(
    stages: Sequence[str], fresh: Collection[str], tree: Path, settings: Settings, env: Mapping[str, str]
) -> list[str]:
    """Bring stages up to date in order; returns those that ran.

    The judge is up from the first of them that asks it and is stale when its turn comes, to the last one.
    """
    asking = [stage for stage in stages if stage not in fresh and asks_judge(stage, settings, tree)]
    ran = []
    judged = False
    with ExitStack() as held:
        for stage in stages:
            if stage in asking and not judged and stale_stages(tree, [stage], get_run_logger().info):
                held.enter_context(judge(settings.judge))
                judged = True
            if _bring(stage, tree, stage in fresh, env):
                ran.append(stage)
            if stage in asking[-1:]:
                held.close()
    return ran


def _bring(stage: str, tree: Path, fresh: bool, env: Mapping[str, str]) -> bool:
    """Bring a stage up to date by its task; returns whether it ran.

    Where Prefect stays away the work is done without it, and without the limits that runs share (one training at once).
    """
    logger = get_run_logger()
    for _ in range(2):
        try:
            state: Any = TASKS[stage](tree, fresh, env)  # as a task's own return value, Prefect hands it back
            return bool(state.result())
        except AWAY as error:
            logger.warning("Prefect does not answer (%s): %s waits for it", redact(str(error)), stage)
        if not is_back():
            break
    logger.warning("Prefect stays away: %s goes on without it", stage)
    return not fresh and reproduce(stage, tree, line=logger.info, env=env)


def _anchored(settings: Settings, tree: Path) -> Settings:
    """Settings whose record is the checkout's MLflow store, and whose judge's log is in the tree."""
    prefix = "sqlite:///"
    uri = settings.tracking.uri
    if uri.startswith(prefix) and not uri.startswith(prefix + "/"):
        uri = f"{prefix}{CHECKOUT / uri.removeprefix(prefix)}"
    tracking = settings.tracking.model_copy(update={"uri": uri})
    return settings.model_copy(
        update={
            "tracking": tracking,
            "judge": settings.judge.model_copy(update={"log": tree / settings.judge.log}),
        }
    )


_WELCOME = (
    "The whole pipeline at pocket size: videos are made and fetched, frames and features cached, a policy is "
    "cold-started and trained by GRPO-CSV, and searches on held-out videos are scored. The first time takes about a "
    "quarter of an hour on two cores, and once all is up to date half a minute. All of it stays in this folder, but "
    "for checksums of files in ~/.cache/timesearch. Ctrl-C stops it, and the same command goes on.\n"
)


def main() -> None:
    """Run the pipeline here, and close with its table."""
    terminal = Console(stderr=True)
    terminal.print(_WELCOME, highlight=False)
    try:
        _start_server()
        with live.shown(terminal) if terminal.is_terminal else nullcontext():
            done = pipeline()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    except TimeSearchError as error:
        print(f"\ntimesearch: {redact(str(error))}", file=sys.stderr)
        raise SystemExit(1) from None
    made = ", ".join(done["ran"]) or "nothing, all was up to date"
    print()
    if done["table"]:
        from timesearch.evaluation.results import written_scores
        from timesearch.evaluation.table import print_table

        print_table(written_scores(load_settings("params.yaml").paths.results))
    print(f"\nmade: {made}\n\nNext:")
    uv = "uv" if shutil.which("uv") else ".uv/bin/uv"
    for what, command in (
        ("every episode, in a browser", "results/report.html"),
        *_example(uv),
        ("Prefect's and MLflow's pages of this run", "make ui"),
        ("another value, compared", f"{uv} run dvc exp run -S evaluate.bootstrap=200 && {uv} run dvc exp show"),
    ):
        print(f"  {what:42}{command}")


def _example(uv: str) -> list[tuple[str, str]]:
    """How the trained policy is asked what the first test sample asks; nothing where its video is not there."""
    paths = load_settings("params.yaml").paths
    sample = next(read_models(paths.test_samples, Sample, lambda _: None), None)
    if sample is None or not (video := paths.videos / sample.video).is_file():
        return []
    return [("ask the trained policy", shlex.join([uv, "run", "timesearch", "ask", str(video), sample.question]))]


def _start_server() -> None:
    """Start Prefect's temporary server, unless one is configured, deaf to Ctrl-C: it is to hear how the run ended."""
    from prefect.server.api.server import SubprocessASGIServer

    if PREFECT_API_URL.value():
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        SubprocessASGIServer().start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


if __name__ == "__main__":
    main()
