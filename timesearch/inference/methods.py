"""Which methods are compared, and the checkpoint that plays each of them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from timesearch.base.errors import RequestError
from timesearch.retrieval.selection import Method
from timesearch.settings import Settings


def trained_method(settings: Settings) -> str:
    """The name under which the trained policy's predictions are filed."""
    return "grpo_csv" if settings.train.verifies else "grpo"


def checkpoint_of(method: str, settings: Settings) -> Path:
    """The checkpoint that plays a method.

    Raises:
        RequestError: the method is unknown, or its checkpoint is missing.
    """
    known = {
        "base": (settings.paths.models / "policy", "models"),
        "coldstart": (settings.paths.coldstart, "coldstart"),
        **dict.fromkeys(
            ("uniform", "one_shot", *(f"one_shot_{each}" for each in get_args(Method)), "grpo_csv", "grpo"),
            (settings.paths.train, "train"),
        ),
    }
    if method not in known:
        raise RequestError(f"unknown method {method!r} in infer.baselines: choose from {', '.join(known)}")
    path, stage = known[method]
    if not path.is_dir() and settings.infer.model is None:
        raise RequestError(f"{path} is missing, which {method!r} needs: run the stage {stage!r} first")
    return path
