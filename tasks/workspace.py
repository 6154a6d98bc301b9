"""A working tree of its own for a run with overridden parameters or of another revision.

A git worktree under `.workspaces/` that shares DVC's cache and the judge's verdicts with the checkout: what the
checkout has made is linked in, what the overrides make stale is made there, and neither the checkout nor another run
sees it. Parameters, stages and data are the checkout's, committed or not; the code is the committed one.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from tasks.reproduce import dvc
from timesearch.base.errors import RequestError, TimeSearchError
from timesearch.base.files import write_text
from timesearch.base.redaction import redact
from timesearch.settings import Section, Settings, load_settings

FOLDER = ".workspaces"

_LINKS = ["reflink", "hardlink", "symlink", "copy"]
_DATA = ("*.dvc", "pretrained/*.dvc")
_STATE = ("params.yaml", "dvc.yaml", "dvc.lock", *_DATA)
"""What says what a run is made of, besides its code."""
_CODE = ("timesearch", "configs")
"""What a stage's command runs from its tree; flows and tasks are always the checkout's."""
_PARAMETER = re.compile(r"[a-z_]++(\.[a-z_]++)*+")
_WORDS = frozenset(
    {"profile", "train.loss_type", "train.rewards", "search.dialect", "infer.baselines", "evaluate.groups"}
)
"""Parameters of text that are words of this project or of TRL, and lead nowhere."""


@contextmanager
def workspace(
    checkout: Path,
    overrides: Mapping[str, Any],
    revision: str | None,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> Iterator[Path]:
    """Yield the tree to work in: the checkout itself, or where there is something to override, a workspace.

    When the block ends well the workspace is removed, and its `dvc.lock` and `params.yaml`, by which DVC finds what was
    made, stay under `.workspaces/done/`; when it fails the workspace is kept, and named.

    Args:
        checkout: the project's folder.
        overrides: values by dotted parameter name, such as ``{"train.learning_rate": 1e-5}``.
        revision: anything that git can resolve; None is the checkout's HEAD, with the parameters, stages and data that
            the checkout has now.
        say: told what happens.
        warn: told of uncommitted code, which the workspace does not have.

    Raises:
        RequestError: an unknown parameter, one that a run may not change, a wrong value, or an unknown revision;
            nothing is left behind.
    """
    if not overrides and revision is None:
        yield checkout
        return
    _refuse_protected(overrides, load_settings(checkout / "params.yaml").overridable)
    tree = checkout / FOLDER / uuid.uuid4().hex[:12]
    try:
        _open(checkout, tree, revision, overrides)
    except BaseException:
        _remove(checkout, tree)
        raise
    say(redact(f"working in {tree} on {revision or 'HEAD'} with {json.dumps(dict(overrides), sort_keys=True)}"))
    if revision is None and (edited := _edited_code(checkout)):
        warn(f"the workspace works on the committed code, without the edits in {', '.join(edited)}: commit them first")
    try:
        yield tree
    except BaseException:
        say(f"kept for a look: {tree} (remove it: git worktree remove --force {tree})")
        raise
    kept = _keep(checkout, tree)
    _remove(checkout, tree)
    say(f"kept in {kept}: dvc.lock and params.yaml, with which `dvc checkout` brings back what this run made")


def is_protected(name: str) -> bool:
    """Whether a parameter is text of any content: a command, path, address or model, which may start a program, write
    a file, or send data and keys away. Numbers, switches and choices do nothing of that kind."""
    section: type[BaseModel] = Settings
    parts = name.split(".")
    for depth, part in enumerate(parts, 1):
        field = section.model_fields.get(part)
        if field is None:
            return False  # there is none of this name
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            return ".".join(parts[:depth]) not in _WORDS and _takes_text(field.annotation)  # what lies in it, too
        section = field.annotation
    return False


def _takes_text(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return False
    inner = get_args(annotation)
    if inner:
        return any(_takes_text(part) for part in inner)
    return annotation is Any or (isinstance(annotation, type) and issubclass(annotation, str | bytes | Path))


def _refuse_protected(overrides: Mapping[str, Any], overridable: Sequence[str]) -> None:
    refused = [name for name in overrides if name not in overridable and is_protected(name)]
    if refused:
        raise RequestError(
            f"a run may not change {', '.join(refused)}, for a command, path, address or model is more than a value: "
            "change params.yaml itself, or list there under 'overridable' what runs may change"
        )


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
        if not _PARAMETER.fullmatch(name) or not isinstance(at, dict) or last not in at or isinstance(at[last], dict):
            raise RequestError(f"unknown parameter {name!r}: names are those of params.yaml, such as train.steps")
        at[last] = value
    return known


def _open(checkout: Path, tree: Path, revision: str | None, overrides: Mapping[str, Any]) -> None:
    tree.parent.mkdir(exist_ok=True)
    _run(checkout, "git", "worktree", "add", "--quiet", "--detach", str(tree), _resolve(checkout, revision))
    for path in _matching(checkout, _STATE if revision is None else ("dvc.lock",)):
        target = tree / path.relative_to(checkout)
        if revision is None or not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    _configure(checkout, tree)
    params = tree / "params.yaml"
    if overrides:
        values = overridden(yaml.safe_load(params.read_text(encoding="utf-8")) or {}, overrides)
        write_text(params, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    _share_verdicts(checkout, tree, load_settings(params).judge.cache)
    if pointers := _matching(tree, _DATA):
        _run(tree, *dvc(), "pull", *(str(path.relative_to(tree)) for path in pointers))
    _run(tree, *dvc(), "checkout", "--allow-missing")


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]


def _configure(checkout: Path, tree: Path) -> None:
    """Give the workspace's DVC what is configured in the checkout alone (credentials of remotes), and its cache."""
    from dvc.config import Config

    local = Config(str(checkout / ".dvc"), validate=False).read("local")
    with Config(str(tree / ".dvc"), validate=False).edit("local") as values:
        values.update(local)
        values["cache"] = {**values["cache"], "dir": _run(checkout, *dvc(), "cache", "dir"), "type": _LINKS}


def _share_verdicts(checkout: Path, tree: Path, cache: Path) -> None:
    """Let the stages in the workspace ask and fill the checkout's cache of verdicts, so that none is paid for twice."""
    if cache.is_absolute():
        return
    for folder in (checkout, tree):
        (folder / cache).parent.mkdir(parents=True, exist_ok=True)
    (tree / cache).symlink_to(checkout / cache)


def _edited_code(checkout: Path) -> list[str]:
    """Files of code that differ from the checkout's commit, or are not in it."""
    command = ("git", "status", "--porcelain", "--untracked-files=all", "--", *_CODE)
    return [line.split(maxsplit=1)[1] for line in _run(checkout, *command).splitlines()]


def _keep(checkout: Path, tree: Path) -> Path:
    kept = checkout / FOLDER / "done" / tree.name
    kept.mkdir(parents=True)
    for path in _matching(tree, ("dvc.lock", "params.yaml")):
        shutil.copy(path, kept / path.name)
    return kept


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
