"""Commands that look at this machine and set the project up: doctor, profile, demo."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from timesearch.base.errors import RequestError
from timesearch.cli.app import app, say


@app.command(rich_help_panel="Machine")
def doctor(
    model: Annotated[
        str | None, typer.Option("--model", help="Also say whether this checkpoint fits the parameters.")
    ] = None,
) -> None:
    """Tell what this machine has, and which profile fits it."""
    from timesearch.base.machine import inspect_machine

    machine = inspect_machine()
    gpus = ", ".join(f"{gpu.name} ({gpu.memory:.0f} GB)" for gpu in machine.gpus)
    for name, value in (
        ("cores", str(machine.cores)),
        ("memory", f"{machine.memory:.0f} GB"),
        ("disk free", f"{machine.disk_free:.0f} GB"),
        ("GPUs", gpus or "none: pocket runs on the CPU"),
        ("ffmpeg", machine.ffmpeg or "missing"),
        ("vLLM", machine.vllm or "not installed (make vllm)"),
    ):
        say(f"{name:>10}  {value}")
    if model is not None:
        _check_model(model)
    if machine.problems:
        raise RequestError("; ".join(machine.problems))
    say(f"The profile that fits is {machine.profile}: timesearch profile {machine.profile}")
    if machine.together:
        say(machine.together)


def _check_model(checkpoint: str) -> None:
    from timesearch.search.checkpoint import examine
    from timesearch.settings import Settings, load_settings

    params = Path("params.yaml")
    findings = examine(checkpoint, (load_settings(params) if params.is_file() else Settings()).search)
    for finding in findings:
        say(f"{finding.what:>13}  {'fits' if finding.ok else 'DOES NOT FIT'}: {finding.text}")
    wrong = [finding.what for finding in findings if not finding.ok]
    if wrong:
        raise RequestError(f"{checkpoint} does not fit these parameters: {', '.join(wrong)}")


@app.command(rich_help_panel="Machine")
def profile(
    name: Annotated[str | None, typer.Argument(help="Profile to take; none lists them.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Parameter file to write.")] = Path("params.yaml"),
) -> None:
    """Make profiles/NAME.yaml the current params.yaml, all values written out."""
    from timesearch.base.files import write_text
    from timesearch.profiles import load_profile, profile_names, render

    if name is None:
        say("\n".join(profile_names()) or "no profiles/ here: run in the project folder")
        return
    write_text(out, render(load_profile(name)))
    say(f"{out} is now the profile {name}; make demo, or dvc repro, runs what that changes")


@app.command(rich_help_panel="Machine")
def demo() -> None:
    """Run the whole pipeline as a Prefect flow, with a Prefect home inside the project."""
    if not Path("flows/pipeline.py").is_file() or not Path("params.yaml").is_file():
        raise RequestError("no flows/pipeline.py and params.yaml here: run in the project folder")
    home = Path(".prefect").absolute()
    home.mkdir(exist_ok=True)
    ours = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_MEMO_STORE_PATH": str(home / "memo_store.toml"),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "600",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    os.execve(sys.executable, [sys.executable, "-m", "flows.pipeline"], {**environment, **ours})
