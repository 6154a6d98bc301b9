"""The folder of a training run: what an interrupted run left in it, and what belongs to another run."""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path
from zipfile import is_zipfile

from timesearch.base.exclusive import contents
from timesearch.base.files import file_digest, write_json
from timesearch.base.progress import console
from timesearch.search.protocol import SearchProtocol
from timesearch.settings import Settings


def prepare_run_folder(folder: Path, settings: Settings, stage: str, policy: Path) -> None:
    """Keep what an interrupted run of the same settings left, and make room where another run was.

    An unfinished run of other settings is moved aside, to `<folder>.unfinished-<number>`.

    Args:
        folder: of the run; `checkpoints/` in it is what a run goes on from.
        settings: what shapes the result of the section `stage`, the search and the seed tell one run from another.
        stage: name of the stage.
        policy: folder of the policy that the run starts from.
    """
    identity = {
        "settings": {
            "seed": settings.seed,
            **{name: getattr(settings, name).shaping() for name in ("search", stage)},
        },
        "protocol": SearchProtocol.load(settings.search.prompts).digest,
        "policy": weights_of(policy),
        "samples": file_digest(settings.paths.train_samples),
    }
    mark = folder / "run.json"
    unfinished = (folder / "checkpoints").is_dir()
    if unfinished and mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == identity:
        return
    if unfinished:
        names = (folder.with_name(f"{folder.name}.unfinished-{number}") for number in count(1))
        aside = next(name for name in names if not name.exists())
        aside.mkdir()
        # One by one, as the folder itself is held; what makes it an unfinished run goes last, in case of a kill.
        for path in sorted(contents(folder), key=lambda path: path.name == "checkpoints"):
            path.rename(aside / path.name)
        console.print(
            f"{folder} held an unfinished run of other settings, prompts, samples or another policy (its run.json "
            f"lists them): it is now {aside}; delete that if nothing needs it",
            markup=False,
            highlight=False,
        )
    for path in contents(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    write_json(mark, identity)


def weights_of(policy: Path) -> dict[str, str]:
    """Digests of a checkpoint's weights, by file."""
    return {path.name: file_digest(path) for path in sorted(policy.glob("*.safetensors"))}


def latest_checkpoint(checkpoints: Path, processes: int = 1) -> str | None:
    """The newest checkpoint that is whole: the trainer's state is written last, random states by every process.

    A file that a kill cut off is there and ends too soon, which its form shows.

    Args:
        checkpoints: folder that holds `checkpoint-<step>` folders, or is not there.
        processes: training processes, over all nodes.
    """
    random_states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    for checkpoint in reversed(found):
        if _is_whole(checkpoint / "trainer_state.json") and all(
            is_zipfile(checkpoint / name) for name in random_states
        ):
            return str(checkpoint)
    return None


def _is_whole(path: Path) -> bool:
    """Whether a file holds JSON up to its end."""
    try:
        json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return True
