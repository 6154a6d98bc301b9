"""Commands of the judge: serve it, and check how far it agrees with people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from timesearch.base.errors import RequestError
from timesearch.cli.app import ParamsOption, app, say

judge_app = typer.Typer(no_args_is_help=True, help="The judge of open-ended answers: serve it, check it.")
app.add_typer(judge_app, name="judge", rich_help_panel="Servers")


@judge_app.command()
def serve(params: ParamsOption = Path("params.yaml")) -> None:
    """Start the judge's server and hold it until Ctrl-C; one that already runs at its address is used."""
    import signal
    import threading

    from timesearch.judge.server import judge_server
    from timesearch.settings import load_settings

    settings = load_settings(params).judge
    if settings.kind == "rule":
        raise RequestError(f"judge.kind is 'rule' in {params}, which needs no server: set it to 'server'")
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: done.set())
    with judge_server(settings.model_copy(update={"start": True}), say=say) as url:
        say(f"{settings.model} judges at {url}; Ctrl-C stops it")
        done.wait()


@judge_app.command()
def check(
    labelled: Annotated[Path | None, typer.Argument(metavar="FILE", help="Labelled answers; default: ours.")] = None,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Measure how far the judge agrees with human labels (JSON lines: question, reference, candidate, label)."""
    from timesearch.judge.agreement import LABELLED, measure, read_labelled
    from timesearch.judge.client import make_judge
    from timesearch.judge.server import judge_server
    from timesearch.settings import load_settings

    settings = load_settings(params).judge
    rows = read_labelled(labelled or LABELLED)
    with judge_server(settings, say=say):
        result = measure(make_judge(settings), rows)
    for row, verdict in result.disputed:
        say(f"judge {verdict}, person {row.label}: {row.candidate!r} for {row.reference!r} ({row.question})")
    name = "the rule" if settings.kind == "rule" else settings.model
    say(f"{name}: {result.rows} answers, accuracy {result.accuracy:.3f}, kappa {result.kappa:.3f}")
