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


def latest_checkpoint(checkpoints: Path, processes: int = 1) -> str | None:
    """The newest checkpoint that is whole: the trainer's state is written last, random states by every process.

    Args:
        checkpoints: folder that holds `checkpoint-<step>` folders, or is not there.
        processes: training processes, over all nodes.
    """
    random_states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    for checkpoint in reversed(found):
        if all((checkpoint / name).is_file() for name in ("trainer_state.json", *random_states)):
            return str(checkpoint)
    return None
