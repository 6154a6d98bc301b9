"""Profiles: whole alternatives of `params.yaml`, each a short file of what differs from the paper's values."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from timesearch.base.errors import RequestError
from timesearch.settings import Settings, load_settings

_WIDTH = 118


def profile_names(folder: Path | str = "profiles") -> list[str]:
    """Names of the profiles in `folder`, sorted."""
    return sorted(path.stem for path in Path(folder).glob("*.yaml"))


def load_profile(name: str, folder: Path | str = "profiles") -> Settings:
    """The settings that a profile makes.

    Raises:
        RequestError: there is no such profile, or it is wrong.
    """
    names = profile_names(folder)
    if name not in names:
        raise RequestError(
            f"unknown profile {name!r}: choose one of {', '.join(names) or 'none, for there is no profiles/ here'}"
        )
    return load_settings(Path(folder) / f"{name}.yaml")


def render(settings: Settings) -> str:
    """`params.yaml` in full, each value explained: DVC compares what is written there, so defaults are too."""
    lines = [
        f"# Parameters of every stage: the profile {settings.profile!r} with all values written out.",
        "# `timesearch profile NAME` replaces this file by another profile; edit it as you like.",
    ]
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            lines += ["", *_comment(_first_paragraph(type(value).__doc__), ""), f"{name}:"]
            for inner, inner_field in type(value).model_fields.items():
                lines += _entry(inner, getattr(value, inner), inner_field, "  ")
        else:
            lines += _entry(name, value, field, "")
    return "\n".join(lines) + "\n"


def _entry(name: str, value: Any, field: FieldInfo, indent: str) -> list[str]:
    plain = str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump({name: plain}, default_flow_style=True, allow_unicode=True, width=10_000).strip()
    return [*_comment(field.description, indent), f"{indent}{text[1:-1]}"]


def _comment(text: str | None, indent: str) -> list[str]:
    if not text:
        return []
    return [f"{indent}# {line}" for line in textwrap.wrap(text, _WIDTH - len(indent) - 2)]


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split())
