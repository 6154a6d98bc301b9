"""A working tree of its own for a run with overridden parameters or of another revision.

A git worktree under `.workspaces/` that shares DVC's cache with the checkout: what the checkout has made is linked in,
what the overrides make stale is made there, and neither the checkout nor another run sees it. What git does not know
of (uncommitted edits) is not in it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tasks.reproduce import dvc
from timesearch.errors import RequestError, TimeSearchError
from timesearch.files import write_text
from timesearch.redaction import redact
from timesearch.settings import Settings, load_settings

FOLDER = ".workspaces"

_LINKS = '"reflink,hardlink,symlink,copy"'
_PARAMETER = re.compile(r"[a-z_]+(\.[a-z_]+)*")


@contextmanager
def workspace(
    checkout: Path, overrides: Mapping[str, Any], revision: str | None, say: Callable[[str], None]
) -> Iterator[Path]:
    """Yield the tree to work in: the checkout itself, or where there is something to override, a workspace.

    A workspace is removed when the block ends well, and kept, and named, when it fails.

    Args:
        checkout: the project's folder.
        overrides: values by dotted parameter name, such as ``{"train.learning_rate": 1e-5}``.
        revision: anything that git can resolve; None is the checkout's HEAD.
        say: told what happens.

    Raises:
        RequestError: an unknown parameter, a wrong value, or an unknown revision; nothing is left behind.
    """
    if not overrides and revision is None:
        yield checkout
        return
    tree = checkout / FOLDER / uuid.uuid4().hex[:12]
    try:
        _open(checkout, tree, revision, overrides)
    except BaseException:
        _remove(checkout, tree)
        raise
    say(redact(f"working in {tree} on {revision or 'HEAD'} with {json.dumps(dict(overrides), sort_keys=True)}"))
    try:
        yield tree
    except BaseException:
        say(f"kept for a look: {tree} (remove it: git worktree remove --force {tree})")
        raise
    _remove(checkout, tree)


def overridden(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with dotted names set.

    Raises:
        RequestError: a name that is not a parameter, or a value of the wrong kind.
    """
    known = Settings.model_validate(values).model_dump(mode="json")
    for name, value in overrides.items():
        at: Any = known
        *sections, last = name.split(".")
        for section in sections:
            at = at.get(section) if isinstance(at, dict) else None
        if not _PARAMETER.fullmatch(name) or not isinstance(at, dict) or last not in at:
            raise RequestError(f"unknown parameter {name!r}: names are those of params.yaml, such as train.steps")
        at[last] = value
    return known


def _open(checkout: Path, tree: Path, revision: str | None, overrides: Mapping[str, Any]) -> None:
    tree.parent.mkdir(exist_ok=True)
    _run(checkout, "git", "worktree", "add", "--quiet", "--detach", str(tree), _resolve(checkout, revision))
    lock = checkout / "dvc.lock"
    if lock.exists() and (revision is None or not (tree / "dvc.lock").exists()):
        shutil.copy(lock, tree / "dvc.lock")
    cache = _run(checkout, *dvc(), "cache", "dir")
    write_text(tree / ".dvc" / "config.local", f"[cache]\n    dir = {cache}\n    type = {_LINKS}\n")
    params = tree / "params.yaml"
    if overrides:
        values = overridden(yaml.safe_load(params.read_text(encoding="utf-8")) or {}, overrides)
        write_text(params, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    load_settings(params)
    pointers = [path for path in (*tree.glob("*.dvc"), *tree.glob("pretrained/*.dvc")) if path.is_file()]
    if pointers:
        _run(tree, *dvc(), "pull", *(str(path.relative_to(tree)) for path in pointers))
    _run(tree, *dvc(), "checkout", "--allow-missing")


def _remove(checkout: Path, tree: Path) -> None:
    subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=checkout, capture_output=True, check=False)
    shutil.rmtree(tree, ignore_errors=True)
    subprocess.run(["git", "worktree", "prune"], cwd=checkout, capture_output=True, check=False)


def _resolve(checkout: Path, revision: str | None) -> str:
    name = revision or "HEAD"
    command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"]
    found = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RequestError(f"{name!r} is no revision of {checkout}: name a commit, branch or tag")
    return found.stdout.strip()


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-5:]
        raise TimeSearchError(f"{' '.join(command[:4])} failed in {folder}: {redact(' '.join(said))}")
    return done.stdout.strip()
