"""A training over two machines by Slurm, in a project whose Python does what a test says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from timesearch.profiles import load_profile
from timesearch.settings import Settings
from timesearch.training import launch, slurm

ROOT = Path(__file__).parents[1]


def paper_training(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, look_every: float) -> Settings:
    """The paper's; from here on a new folder is the current one, and `script`, of a shell, is this Python.

    Args:
        folder: gets both.
        monkeypatch: takes it back.
        script: what Python does on each machine.
        look_every: seconds between two looks at a job.
    """
    settings = load_profile("paper-7b", ROOT / "profiles")
    settings.cluster.kind = "slurm"
    settings.cluster.slurm = ["--partition=gpu"]
    monkeypatch.setattr(slurm, "_LOOK_EVERY", look_every)
    monkeypatch.setattr(launch, "load_training_samples", lambda settings: ([], []))
    project = folder / "a project's"
    project.mkdir()
    monkeypatch.chdir(project)
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return settings
