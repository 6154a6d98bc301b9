"""What MLflow's run of a whole pipeline holds, so that two of them are compared in the list of runs.

The runs of the stages, nested in it, hold the rest: curves, episodes, every method's numbers by group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from timesearch.base.errors import TimeSearchError
from timesearch.base.model_folders import PARTS
from timesearch.base.untrusted import UntrustedError, parse_json
from timesearch.evaluation.results import trackable
from timesearch.inference.fingerprint import checkpoint_digest
from timesearch.inference.methods import trained_method
from timesearch.report.card import FIGURES, data_files, figures_of, model_card
from timesearch.settings import Settings
from timesearch.tracking import Run

_VIEW = "figures"
"""Key of the view of MLflow's list of runs that shows the figures."""
_POLICY = "policy"
"""Folder of the artifacts that a version of the registered model is made of."""


def record_data(record: Run, settings: Settings, tree: Path, warn: Callable[[str], None]) -> None:
    """Record the files of samples with their digests."""
    try:
        for each in data_files(settings, tree):
            record.log_data(each.path, each.rows, each.sha256, each.context)
    except TimeSearchError as error:
        warn(f"MLflow does not get the samples of this run: {error}")


def record_results(record: Run, settings: Settings, tree: Path, warn: Callable[[str], None]) -> None:
    """Record the headline of each method, what the trained policy's numbers are made of, the table, and the policy.

    The figures of the trained policy have their plain names, those of others ``uniform/qa_accuracy``.
    """
    results, trained = tree / settings.paths.results, trained_method(settings)
    try:
        summary = parse_json((results / "metrics.json").read_bytes())
        table = (results / "table.md").read_text(encoding="utf-8")
        figures = figures_of(settings, tree / settings.paths.train, tree)
    except (OSError, UntrustedError, TimeSearchError) as error:
        warn(f"MLflow does not get the results of this run: {error}")
        return
    for method, numbers in summary.items():
        whose = "" if method == trained else f"{trackable(method)}/"
        known = {name: numbers[name] for _, name, _ in FIGURES if numbers.get(name) is not None}
        # In four digits, for which MLflow's columns have room.
        record.log_metrics({f"{whose}{name}": float(f"{value:.4g}") for name, value in known.items()})
    made = (figures or {}).get("fingerprint") or {}
    if made.get("digest"):
        ingredients = {trackable(name): value for name, value in (made.get("made_of") or {}).items()}
        record.log_params({"fingerprint": made["digest"]})
        record.log_params(ingredients, "fingerprint")
    record.set_tags({"mlflow.note.content": table})
    record.share_view(_VIEW, [f"metrics.{name}" for _, name, _ in FIGURES] + ["params.fingerprint"])
    for path in (results / "table.md", results / "report.html"):
        record.log_artifact(path)
    try:
        _register(record, settings, tree, summary.get(trained) or {})
    except TimeSearchError as error:
        warn(f"MLflow does not get the policy of this run: {error}")


def _register(record: Run, settings: Settings, tree: Path, numbers: Mapping[str, Any]) -> None:
    """Register the trained policy: its card and its small files, and the weights as DVC knows them."""
    policy = tree / settings.paths.train
    weights = checkpoint_digest(policy)
    if not weights:
        return
    name = f"{trackable(settings.tracking.experiment)}-policy"
    card = str(model_card(settings, policy, name, root=tree))
    record.log_text(card, f"{_POLICY}/README.md")
    for path in sorted(path for part in PARTS for path in policy.glob(part) if path.suffix != ".safetensors"):
        record.log_artifact(path, _POLICY)
    known = _output(tree, settings.paths.train)
    tags = {"checkpoint": weights, "profile": settings.profile}
    if known:
        record.log_text(yaml.safe_dump({"outs": [known]}, sort_keys=False), f"{_POLICY}/weights.dvc")
        tags["dvc"] = str(known["md5"])
    tags |= {name: f"{numbers[name]:.4g}" for _, name, _ in FIGURES if numbers.get(name) is not None}
    record.register(name, _POLICY, card.partition("\n---\n")[2].strip(), tags)


def _output(tree: Path, path: Path) -> dict[str, Any] | None:
    """A stage's output as `dvc.lock` names it, in the form of a .dvc file for a folder of the same name."""
    lock = tree / "dvc.lock"
    stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {}) if lock.is_file() else {}
    found = [out for stage in stages.values() for out in stage.get("outs", ()) if out["path"] == path.as_posix()]
    return {**found[0], "path": path.name} if found else None
