"""Commands: infer, ask, serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from timesearch.cli.app import ParamsOption, app, say


@app.command()
def infer(
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="Only this method; may be given several times.")
    ] = None,
    samples: Annotated[Path | None, typer.Option("--samples", help="Questions other than the test split.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder under which predictions/ is written.")] = None,
    params: ParamsOption = Path("params.yaml"),
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Exit with 0 although some episodes failed.")
    ] = False,
) -> None:
    """Play search episodes on the test questions, and the baselines beside them."""
    from timesearch.inference.infer import run
    from timesearch.settings import load_settings

    settings = load_settings(params)
    if samples is not None:
        settings.paths.test_samples = samples
    if out is not None:
        settings.paths.results = out
    result = run(settings, methods)
    results = settings.paths.results
    say(
        f"episodes: {len(result.done)} played, {len(result.skipped)} there already, {len(result.failures)} failed, "
        f"in {results / 'predictions'}"
    )
    for failure in result.failures[:20]:
        typer.echo(f"  {failure.item}: {failure.reason}: {failure.message}", err=True)
    if result.failures:
        typer.echo(f"  all failures: {results / 'predictions' / 'failures.jsonl'}; the same command tries them again", err=True)
    raise typer.Exit(result.exit_code(keep_going))
