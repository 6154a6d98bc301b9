"""Commands: models, coldstart, train, curate."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from timesearch.cli.app import ParamsOption, app, say

if TYPE_CHECKING:
    from timesearch.base.cluster import Node
    from timesearch.settings import Settings


@app.command()
def models(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Pretrain the pocket policy anew, from nothing.")] = False,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Bring the encoder and the base policy."""
    from timesearch.base.exclusive import exclusive
    from timesearch.models import run
    from timesearch.settings import load_settings
    from timesearch.tracking import stage_run

    settings = load_settings(params)
    with exclusive(settings.paths.models), stage_run(settings, "models"):
        made = run(settings, rebuild)
    which = " and ".join(str(folder) for folder in made) or "nothing, all is up to date"
    say(f"models: made {which}; next: timesearch frames")


@app.command()
def coldstart(params: ParamsOption = Path("params.yaml")) -> None:
    """Fine-tune the base policy on search episodes, so that it can search before it is rewarded."""
    from timesearch.settings import load_settings
    from timesearch.training.coldstart import run

    folder = run(load_settings(params))
    say(f"cold-started: {folder} (losses in {folder / 'metrics.jsonl'}); next: timesearch train")


@app.command()
def train(
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what it would take: memory, tokens, commands.")
    ] = False,
    profile: Annotated[str | None, typer.Option("--profile", help="A profile in place of params.yaml.")] = None,
    node_rank: Annotated[int, typer.Option("--node-rank", help="Number of this node, from 0.")] = 0,
    main_address: Annotated[str | None, typer.Option("--main-address", help="Host name of node 0.")] = None,
    main_port: Annotated[
        int, typer.Option("--main-port", min=1, max=65535, help="Port of node 0 at which processes meet.")
    ] = 29500,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Train the cold-started policy by GRPO with completeness self-verification."""
    from timesearch.profiles import load_profile
    from timesearch.settings import load_settings

    settings = load_profile(profile) if profile else load_settings(params)
    named = f"profiles/{profile}.yaml" if profile else str(params)
    if plan:
        from timesearch.training.plan import make_plan
        from timesearch.training.slurm import takes_a_job, write_script

        report = make_plan(settings, named, _machines(settings))
        typer.echo(report.text())
        if report.fits and takes_a_job(settings):
            typer.echo(f"\nwritten: {write_script(settings)}")
        raise typer.Exit(0 if report.fits else 2)
    from timesearch.training.launch import run

    _go_on_with_vllm(settings)
    folder = run(settings, node_rank, main_address, main_port)
    if "RANK" not in os.environ:  # the process that started the ranks says it
        say(f"trained: {folder} (curves in {folder / 'metrics.jsonl'}); next: timesearch infer")


def _go_on_with_vllm(settings: Settings) -> None:
    """Where episodes are written by vLLM, and another environment has it, become the same command there."""
    from timesearch.base.extras import path_for, python_with_vllm

    python = python_with_vllm()
    if settings.train.generation != "transformers" and python != sys.executable:
        os.environ["PATH"] = path_for(python)
        os.execv(python, [python, "-m", "timesearch", *sys.argv[1:]])


def _machines(settings: Settings) -> list[Node]:
    """The machines of the Ray cluster that the settings name; none of one that is yet to be started."""
    from timesearch.base.cluster import joined

    address = settings.cluster.ray_address
    if address in (None, "local"):
        return []
    with joined(address) as nodes:
        return nodes


@app.command()
def curate(
    out: Annotated[Path, typer.Option("--out", help="Folder for the kept samples and the verdicts.")] = Path(
        "curation"
    ),
    policy: Annotated[Path | None, typer.Option("--policy", help="Checkpoint that plays; else the cold start.")] = None,
    easy_frames: Annotated[int, typer.Option("--easy-frames", min=1, help="Uniform frames of filter 1.")] = 4,
    hard_frames: Annotated[int, typer.Option("--hard-frames", min=1, help="Preview frames of filter 2.")] = 64,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Drop training samples that need no search, and those that search cannot solve."""
    from timesearch.judge.server import judge_server
    from timesearch.settings import load_settings
    from timesearch.training.curate import run

    settings = load_settings(params)
    with judge_server(settings.judge):
        curation = run(settings, policy or settings.paths.coldstart, out, easy_frames, hard_frames)
    typer.echo(curation.table())
    say(
        f"kept samples: {curation.samples}; set paths.train_samples to it, or copy it to {settings.paths.train_samples}"
    )
