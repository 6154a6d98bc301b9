"""What predictions are made of: the ingredients of a number by name, each of which `timesearch compare` can tell.

The ingredients are known before an episode is played, and their digest is written into each row; the file
``<method>.json`` beside the predictions holds them in full. What happened while they were played (the engine and its
version, the sizes in which frames were shown, requests that were sent again or failed) is in the rows themselves
(`timesearch.data.samples.Seen`), so that a file that is copied elsewhere keeps it.
"""

from __future__ import annotations

import hashlib
import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from timesearch.base.digests import remembered
from timesearch.base.files import json_digest
from timesearch.base.untrusted import UntrustedError, parse_json
from timesearch.search.prompts import Prompts
from timesearch.search.tools import offered, signature_of
from timesearch.settings import SearchSettings, Settings
from timesearch.video.frames import VERSION as FRAMES_FORMAT

SHORT = 12
"""Characters of a digest where it is shown, and in rows."""


class Fingerprint(BaseModel):
    """The ingredients of predictions; rows of equal digests may stand in one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(description="method")
    engine: str = Field(description="engine")
    model: str = Field(description="name of the served model")
    checkpoint: str = Field(description="weights and configuration of the checkpoint")
    temperature: float = Field(description="temperature of sampling")
    seed: int = Field(description="seed of sampling")
    preview: str = Field(description="form of the preview")
    given_frames: int | None = Field(description="frames that are given at once, without search")
    subtitles: bool = Field(False, description="subtitles")
    prompts: dict[str, str] = Field(description="prompt")
    tools: dict[str, str] = Field(description="tool")
    search: dict[str, Any] = Field(description="search")
    frames: dict[str, Any] = Field(description="frame caches")
    encoder: dict[str, Any] = Field(description="encoder")

    @property
    def digest(self) -> str:
        """SHA-256 over the ingredients, in hex."""
        return json_digest(self.model_dump(mode="json"))

    def ingredients(self) -> dict[str, Any]:
        """Each ingredient under the words for it, such as ``search.max_tokens (vision tokens a frame at most)``."""
        named: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value, words = getattr(self, name), field.description or name
            if not isinstance(value, dict):
                named[words] = value
                continue
            for part, inner in value.items():
                named[f"{words} {part}" if name in ("prompts", "tools") else _words(name, part)] = inner
        return named


def fingerprint_of(
    settings: Settings, checkpoint: Path, method: str, frames: int | None, search: SearchSettings
) -> Fingerprint:
    """The ingredients of a method's predictions.

    Args:
        settings: how it is played, apart from the search.
        checkpoint: what plays.
        method: its name.
        frames: frames of a method without search; None for one that searches.
        search: budgets, prompts and tools.

    Raises:
        RequestError: an unknown prompt set or tool.
    """
    infer = settings.infer
    return Fingerprint(
        method=method,
        engine=infer.engine,
        model=infer.model or "",
        checkpoint=_weights(checkpoint),
        temperature=infer.temperature,
        seed=settings.seed,
        preview=infer.preview,
        given_frames=frames,
        prompts={part: _short(text) for part, text in Prompts.load(search.prompts).texts.items()},
        tools={
            tool.__name__: _short(f"{signature_of(tool)}\n{inspect.getdoc(tool)}") for tool in offered(search.tools)
        },
        search={name: value for name, value in search.shaping().items() if name not in ("prompts", "tools")},
        frames=settings.frames.shaping() | {"format": FRAMES_FORMAT},
        encoder=settings.models.model_dump(include={"encoder", "pretrained", "encoder_steps"})
        | settings.features.shaping(),
    )


def read_fingerprint(predictions: Path) -> Fingerprint | None:
    """The ingredients that stand beside a file of predictions; None where there are none that can be read."""
    with suppress(OSError, UntrustedError, ValidationError, AttributeError):
        return Fingerprint.model_validate(parse_json(beside(predictions).read_bytes()).get("made_of"))
    return None


def beside(predictions: Path) -> Path:
    """The file that holds the fingerprint of a file of predictions."""
    return predictions.with_suffix(".json")


def _words(section: str, name: str) -> str:
    """A setting by its name, and what it says where the settings explain it."""
    owner = {"search": Settings().search, "frames": Settings().frames}.get(section)
    field = type(owner).model_fields.get(name) if owner is not None else None
    said = f" ({field.description})" if field is not None and field.description else ""
    return f"{section}.{name}{said}"


def _weights(checkpoint: Path) -> str:
    """Digest over the files of a checkpoint that what it says depends on; empty for a name that is no folder."""
    digests = {
        str(path.relative_to(checkpoint)): remembered(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.suffix in (".safetensors", ".json", ".jinja") and ".partial" not in path.parts
    }
    return json_digest(digests)[:SHORT] if digests else ""


def _short(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:SHORT]
