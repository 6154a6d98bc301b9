"""The folder of a training run: what an interrupted run left in it, and what belongs to another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from timesearch.files import file_digest, write_json
from timesearch.settings import Settings


def prepare_run_folder(folder: Path, settings: Settings, stage: str, policy: Path) -> None:
    """Keep what an interrupted run of the same settings left, and clear away what another run did.

    Args:
        folder: of the run; `checkpoints/` in it is what a run goes on from.
        settings: the section `stage`, the search and the seed tell one run from another.
        stage: name of the stage.
        policy: folder of the policy that the run starts from.
    """
    identity = {
        "settings": settings.model_dump(mode="json", include={"seed", "search", stage}),
        "policy": {path.name: file_digest(path) for path in sorted(policy.glob("*.safetensors"))},
        "samples": file_digest(settings.paths.train_samples),
    }
    mark = folder / "run.json"
    known = mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == identity
    if not (known and (folder / "checkpoints").is_dir()):
        shutil.rmtree(folder, ignore_errors=True)
        write_json(mark, identity)
