"""A policy as a folder of the Hugging Face hub, and its way there.

The folder holds the checkpoint with its processor, ``protocol/`` (words and rules), ``params.yaml`` (what shaped it),
and its card as ``README.md``. Nothing else of the project goes along: no data, no paths, no addresses.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import yaml

from timesearch.base.errors import RequestError
from timesearch.base.exclusive import exclusive
from timesearch.base.files import atomic_path, write_text
from timesearch.base.hub import fetch_error, unreached
from timesearch.base.model_folders import PARTS, require_data_only
from timesearch.report.card import model_card, training_settings
from timesearch.search.protocol import protocol_folder
from timesearch.settings import Settings

_OURS = ("run.json", "source.json", "recipe.json")
"""Records of this project beside a checkpoint, with names and paths of its own."""
_OWN_POLICIES = tuple(Path("pretrained") / name for name in ("pocket", "hops", "senses"))
_OWN_LICENCE = "apache-2.0"


def write_hub_folder(settings: Settings, policy: Path, out: Path, licence: str | None = None) -> list[Path]:
    """Write a policy with all that is needed to use it and to judge it.

    Args:
        settings: with which it was trained.
        policy: folder of the checkpoint, such as ``runs/train``.
        out: a folder that is not there yet, or is empty.
        licence: an identifier as the hub lists them; None takes that of the base policies here, where it was one.

    Returns:
        The files.

    Raises:
        RequestError: no checkpoint, one that asks to run code, figures of other weights, no licence, or a folder that
            holds something.
    """
    if not (policy / "config.json").is_file() and not (policy / "adapter_config.json").is_file():
        raise RequestError(f"{policy} holds no checkpoint (config.json is missing): name a folder such as runs/train")
    if not any(policy.glob("*.safetensors")):
        raise RequestError(f"{policy} holds no weights (*.safetensors): is the training at its end?")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} is there already: name a new folder")
    require_data_only(policy)
    card = model_card(settings, policy, out.name, licence or _licence_of(settings))
    with exclusive(out):
        for path in sorted({path for part in PARTS for path in policy.glob(part)} - {policy / name for name in _OURS}):
            with atomic_path(out / path.name) as partial:
                shutil.copyfile(path, partial)
        texts = protocol_folder(settings.search.prompts)
        for path in sorted(path for path in texts.iterdir() if path.suffix in (".txt", ".json", ".yaml")):
            write_text(out / "protocol" / path.name, path.read_text(encoding="utf-8"))
        write_text(out / "params.yaml", yaml.safe_dump(training_settings(settings), sort_keys=False))
        write_text(out / "README.md", str(card))
    return sorted(path for path in out.rglob("*") if path.is_file())


def _licence_of(settings: Settings) -> str:
    if Path(settings.models.policy) in _OWN_POLICIES:
        return _OWN_LICENCE
    raise RequestError(
        f"--licence is missing: name the one under which what was made of {settings.models.policy} may be passed on, "
        "such as apache-2.0, or other"
    )


def require_token() -> None:
    """Refuse to begin where no token of the hub is known.

    Raises:
        RequestError: there is none.
    """
    from huggingface_hub import get_token

    if not get_token():
        raise RequestError("there is no token for the hub: set HF_TOKEN, or log in by `hf auth login`")


def push(folder: Path, repository: str) -> str:
    """Upload a folder to the hub, as one commit; a repository that is not there yet is made, private.

    Args:
        folder: what `write_hub_folder` wrote.
        repository: its name, OWNER/NAME.

    Returns:
        The address of the commit.

    Raises:
        RequestError: no such name, or the hub refuses.
        TemporaryError: the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    failures: tuple[type[BaseException], ...] = (*unreached(), HFValidationError)
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Policy with its card")
    except failures as error:
        raise fetch_error(f"{folder} is written, but cannot be pushed to {repository}", error) from error
    return str(done.commit_url)
