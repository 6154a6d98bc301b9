"""Folders of models that others made: data to be read, of which nothing is run.

`require_data_only` looks through a folder before open_clip, transformers or vLLM see it. Symbolic links are followed
(the cache of the model hub is made of them): what they lead to is judged like any other file.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timesearch.base.errors import RequestError
from timesearch.base.untrusted import UntrustedError, parse_json

PARTS = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
"""The files of a published model that are needed; no code is among them."""
LOADING = {"trust_remote_code": False, "use_safetensors": True}
"""How every model of transformers is loaded: its own code is never run, and nothing is unpickled."""

_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json", "model.safetensors.index.json"})
"""Files whose keys are words or names of weights, and mean nothing else."""
_CODE = frozenset({"auto_map", "custom_generate", "custom_pipelines"})
"""Keys that name code which transformers would load."""
_KERNELS = frozenset({"attn_implementation", "_attn_implementation", "experts_implementation"})
"""Keys that name an implementation: with a slash or a colon in it, one from the model hub."""
_DEPTHS = frozenset({"num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "layers"})
_MOST_LAYERS = 1000


def require_data_only(folder: Path) -> None:
    """Refuse a model's folder that would run code of its own, or on which a reader would hang.

    Raises:
        RequestError: naming the file and what is wrong with it.
    """
    if (folder / "custom_generate").exists():
        raise RequestError(f"{folder / 'custom_generate'} is code, and no model's own code is run: take another model")
    for path in sorted(folder.iterdir()):
        kind = path.stat().st_mode if path.exists() else stat.S_IFLNK  # of a link to nothing
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise RequestError(f"{path} is no file: remove it, or take another model")
        if path.suffix == ".json" and stat.S_ISREG(kind) and path.name not in _VOCABULARIES:
            for key, value in _entries(_read(path)):
                _judge(path, key, value)


def read_config(path: Path) -> dict[str, Any]:
    """A configuration that came with a model.

    Raises:
        RequestError: it is no JSON object, or not within bounds.
    """
    config = _read(path)
    if not isinstance(config, dict):
        raise RequestError(f"{path} is no JSON object: take the model's files again, or another model")
    return config


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return parse_json(file.read(_MOST_BYTES + 1), _MOST_BYTES)
    except UntrustedError as error:
        raise RequestError(f"{path} cannot be read ({error}): take the model's files again, or another model") from None


_MOST_BYTES = 16 * 2**20


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _entries(inner)


def _judge(path: Path, key: str, value: Any) -> None:
    foreign = isinstance(value, str) and any(mark in value for mark in "/:")
    if (key in _CODE and value) or (key == "trust_remote_code" and value) or (key in _KERNELS and foreign):
        raise RequestError(
            f"{path} asks to run code ({key}), and no model's own code is run: take a model that needs none"
        )
    if key in _DEPTHS and isinstance(value, int) and value > _MOST_LAYERS:
        raise RequestError(f"{path} says {key} {value}, which no model has: take another model")
