"""Commands: evaluate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from timesearch.cli.app import ParamsOption, app, say
from timesearch.errors import RequestError


@app.command()
def evaluate(
    predictions: Annotated[
        list[Path] | None, typer.Option("--predictions", help="Prediction file; repeat to compare several.")
    ] = None,
    videos: Annotated[Path | None, typer.Option("--videos", help="Folder of the source videos.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results.")] = None,
    threshold: Annotated[
        list[float] | None, typer.Option("--threshold", help="Seconds; repeat for several, the first leads.")
    ] = None,
    visual: Annotated[bool | None, typer.Option("--visual/--no-visual", help="Compare frames by SSIM.")] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Exit with 0 although some rows were bad.")] = False,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Score predictions: search, answers, intervals, comparisons.

    Without --predictions: those of the project, by params.yaml.
    """
    from timesearch.evaluation import evaluate as stage
    from timesearch.settings import Settings, load_settings

    if not predictions:
        outcome = stage.run(load_settings(params))
        raise typer.Exit(outcome.exit_code(keep_going))
    if out is None:
        raise RequestError("--out is missing: name a folder for the results")
    settings = load_settings(params) if params.is_file() else Settings()
    if not params.is_file():
        settings.judge.kind = "rule"
    options = settings.evaluate.model_copy()
    if threshold:
        options.thresholds = threshold
    if visual is not None:
        options.visual = visual
    files = _by_name(predictions)
    methods = stage.evaluate_files(files, options, videos, lambda: stage.make_judge(settings.judge), settings.seed)
    outcome = stage.write_evaluation(methods, out, options, settings.seed, single=len(files) == 1)
    stage.print_table(methods)
    _say_outcome(outcome.failures, out)
    raise typer.Exit(outcome.exit_code(keep_going))


def _by_name(predictions: list[Path]) -> dict[str, Path]:
    files = {path.stem: path for path in predictions}
    if len(files) < len(predictions):
        raise RequestError("two prediction files have the same name: rename one, methods are told apart by it")
    return files


def _say_outcome(failures: list, out: Path) -> None:
    say(f"metrics: {out / 'metrics.json'}")
