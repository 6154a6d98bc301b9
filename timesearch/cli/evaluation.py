"""Commands: evaluate, compare, export, report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from timesearch.base.errors import RequestError
from timesearch.cli.app import ParamsOption, app, say, visible

if TYPE_CHECKING:
    from timesearch.base.batch import BatchResult
    from timesearch.settings import Settings

PredictionsOption = Annotated[
    list[Path] | None, typer.Option("--predictions", help="Prediction file; repeat to compare several.")
]


@app.command()
def evaluate(
    predictions: PredictionsOption = None,
    videos: Annotated[Path | None, typer.Option("--videos", help="Folder of the source videos.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results.")] = None,
    threshold: Annotated[
        list[float] | None, typer.Option("--threshold", min=0.0, help="Seconds; repeat for several, the first leads.")
    ] = None,
    visual: Annotated[bool | None, typer.Option("--visual/--no-visual", help="Compare frames by SSIM.")] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Exit with 0 although some rows were bad.")] = False,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Score predictions: searches, answers, intervals, comparisons. Without --predictions, the project's own."""
    from timesearch.base.exclusive import exclusive
    from timesearch.evaluation import evaluate as stage
    from timesearch.evaluation.results import files_by_name, write_evaluation
    from timesearch.evaluation.scoring import evaluate_files
    from timesearch.evaluation.table import print_table
    from timesearch.settings import load_settings

    if not predictions:
        settings = load_settings(params)
        results = settings.paths.results
        outcome = stage.run(settings)
        _conclude(outcome, results, results / "evaluation" / "failures.jsonl", f"report: {results / 'report.html'}")
        raise typer.Exit(outcome.exit_code(keep_going))
    if out is None:
        raise RequestError("--out is missing: name a folder for the results")
    if videos is not None and not videos.is_dir():
        raise RequestError(f"--videos {videos} is no folder: name the folder of the source videos, or leave it out")
    settings = _settings(params)
    options = settings.evaluate
    options.thresholds = threshold or options.thresholds
    options.visual = options.visual if visual is None else visual
    files = files_by_name(predictions)
    with exclusive(out), stage.held_judge(settings.judge) as judge:
        methods = evaluate_files(files, options, videos, judge, settings.seed)
        outcome = write_evaluation(methods, out, options, settings.seed, flat=len(files) == 1)
    print_table(methods)
    note = "visual metrics need --videos" if options.visual and videos is None else ""
    _conclude(outcome, out, out / "failures.jsonl", note)
    raise typer.Exit(outcome.exit_code(keep_going))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Predictions, metrics, or a folder of results.")],
    b: Annotated[Path, typer.Argument(help="The same, of what it is compared with.")],
    common: Annotated[
        bool, typer.Option("--common", help="Compare the questions that both answered, where they had others too.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file for all of it.")] = None,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Say what differs in how two results were made, and then which is better on the same questions."""
    from timesearch.base.files import write_json
    from timesearch.evaluation.compare import compare_sides, describe, load_sides, pairs_of
    from timesearch.evaluation.evaluate import held_judge

    settings = _settings(params)
    options = settings.evaluate.model_copy(update={"visual": False})
    with held_judge(settings.judge) as judge:
        sides = [load_sides(path, options, judge, settings.seed) for path in (a, b)]
    found = [compare_sides(one, other, options, settings.seed) for one, other in pairs_of(*sides)]
    for number, each in enumerate(found):
        say("\n" * (number > 0) + "\n".join(map(visible, describe(each, common))))
    if out is not None:
        write_json(out, [each.as_json() for each in found])
    if not common and any(each.questions for each in found):
        raise RequestError("their questions differ, so the numbers are not compared: --common compares those of both")
    if not all(each.episodes for each in found):
        raise RequestError("they have no question in common")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Prediction file; for the hub, folder of a checkpoint.")],
    target: Annotated[Path | None, typer.Argument(help="The same as --out.")] = None,
    to: Annotated[str, typer.Option("--to", help="timesearch-r, lmms-eval, or hub.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="The JSON lines file; for the hub, a new folder.")] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="Of the policy, as the hub lists them.")
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", help="OWNER/NAME on the hub that the folder goes to, with HF_TOKEN.")
    ] = None,
    videos: Annotated[Path | None, typer.Option("--videos", help="Folder of the source videos.")] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Exit with 0 although some rows were bad.")] = False,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Write predictions in the form that others' evaluation scripts read, or a policy as a folder of the hub."""
    from timesearch.base.batch import BatchResult
    from timesearch.base.files import write_jsonl
    from timesearch.evaluation.export import FORMS, exported

    out = target or out
    if out is None:
        raise RequestError("--out is missing: name what is to be written")
    if to == "hub":
        _export_to_hub(source, out, licence, push, params)
        return
    if to not in FORMS:
        raise RequestError(f"--to {visible(to)} is no form that is known: choose from {', '.join(FORMS)}, hub")
    if licence or push:
        raise RequestError(f"--licence and --push go with --to hub, and not with {to}")
    outcome = BatchResult()
    rows = exported(source, to, videos or _settings(params).paths.videos, outcome.failures.append)
    write_jsonl(out, _counted(rows, outcome))
    say(f"{out}: {len(outcome.done)} rows in the form of {to}")
    for failure in outcome.failures:
        typer.echo(f"  {failure.reason}: {visible(failure.message)}", err=True)
    raise typer.Exit(outcome.exit_code(keep_going))


def _export_to_hub(policy: Path, out: Path, licence: str | None, repository: str | None, params: Path) -> None:
    from timesearch.report import hub
    from timesearch.settings import load_settings

    if repository is not None:
        hub.require_token()
    files = hub.write_hub_folder(load_settings(params), policy, out, licence)
    say(f"{out}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB; its card is README.md")
    if repository is not None:
        say(f"pushed: {hub.push(out, repository)}")


def _counted(rows: Iterable[dict[str, Any]], outcome: BatchResult) -> Iterator[dict[str, Any]]:
    for row in rows:
        outcome.done.append("")
        yield row


@app.command()
def report(
    predictions: PredictionsOption = None,
    results: Annotated[Path | None, typer.Option("--results", help="Folder that `evaluate` wrote.")] = None,
    frames: Annotated[Path | None, typer.Option("--frames", help="Folder of frame caches, for pictures.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The HTML file.")] = None,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Write one HTML file with the table, the plots and every episode. Without --predictions, the project's own."""
    from timesearch.base.exclusive import exclusive
    from timesearch.evaluation.results import files_by_name
    from timesearch.report import build
    from timesearch.settings import load_settings

    if not predictions:
        settings = load_settings(params)
        if results is not None:
            settings.paths.results = results
        if frames is not None:
            settings.paths.frames = frames
        with exclusive(settings.paths.results):
            target = build.write_results_report(settings, out)
    elif results is None:
        raise RequestError("--results is missing: name the folder that `timesearch evaluate --out` wrote")
    else:
        target = out or results / "report.html"
        with exclusive(results):
            build.write_report(files_by_name(predictions), results / "evaluation", target, frames)
    say(f"report: {target} ({target.stat().st_size / 1e6:.1f} MB); open it in a browser")


def _settings(params: Path) -> Settings:
    """The settings of a project, or outside of one the defaults with the rule as the judge."""
    from timesearch.settings import Settings, load_settings

    return load_settings(params) if params.is_file() else Settings.model_validate({"judge": {"kind": "rule"}})


def _conclude(outcome: BatchResult, results: Path, failures: Path, note: str) -> None:
    say(f"metrics: {results / 'metrics.json'}; {len(outcome.done)} episodes" + (f"; {note}" if note else ""))
    if outcome.failures:
        reasons = Counter(failure.reason for failure in outcome.failures)
        named = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        typer.echo(f"  rows with a problem: {named}; each in {failures}", err=True)
