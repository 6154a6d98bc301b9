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

from pydantic import BaseModel, ConfigDict, Field

from timesearch.base.digests import remembered
from timesearch.base.files import json_digest
from timesearch.base.untrusted import UntrustedError, parse_json
from timesearch.search.protocol import Rules, SearchProtocol
from timesearch.search.tools import offered, signature_of
from timesearch.settings import Frames, SearchSettings, Settings
from timesearch.video.frames import VERSION as FRAMES_FORMAT

SHORT = 12
"""Characters of a digest where it is shown, and in rows."""


class Fingerprint(BaseModel):
    """The ingredients of predictions; rows of equal digests may stand in one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    engine: str
    model: str = Field(description="name under which it is served")
    checkpoint: str = Field(description="weights and configuration of the checkpoint")
    temperature: float = Field(description="of sampling; 0 is greedy")
    seed: int = Field(description="of sampling")
    preview: str = Field(description="form in which the preview is shown")
    given_frames: int | None = Field(description="frames that are given at once, without search")
    subtitles: bool = Field(False, description="whether they can be searched")
    prompts: dict[str, str] = Field(description="digest of each text")
    rules: dict[str, Any]
    tools: dict[str, str] = Field(description="digest of each signature and description")
    search: dict[str, Any]
    frames: dict[str, Any]
    encoder: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 over the ingredients, in hex; subtitles that cannot be searched are none of them."""
        return json_digest(self.model_dump(mode="json", exclude=None if self.subtitles else {"subtitles"}))

    def ingredients(self) -> dict[str, Any]:
        """Each ingredient by its name, such as ``search.max_tokens``."""
        return _flat(self.model_dump(mode="json"))


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
    infer, protocol = settings.infer, SearchProtocol.load(search.prompts)
    own = {tool.__name__: _short(f"{signature_of(tool)}\n{inspect.getdoc(tool)}") for tool in offered(search.tools)}
    described = {bound.tool: _short(f"{bound.line}\n{bound.arguments}") for bound in protocol.tools}
    return Fingerprint(
        method=method,
        engine=infer.engine,
        model=infer.model or "",
        checkpoint=checkpoint_digest(checkpoint),
        temperature=infer.temperature,
        seed=settings.seed,
        preview=infer.preview,
        given_frames=frames,
        subtitles=frames is None and "search_subtitles" in search.tools,
        prompts={part: _short(text) for part, text in protocol.texts.items()},
        rules=protocol.rules.model_dump(mode="json"),
        tools=own | described,
        search={name: value for name, value in search.shaping().items() if name not in ("prompts", "tools")},
        frames=settings.frames.shaping() | {"format": FRAMES_FORMAT},
        encoder=settings.models.model_dump(include={"encoder", "pretrained", "encoder_steps"})
        | settings.features.shaping(),
    )


def read_ingredients(predictions: Path) -> tuple[str, dict[str, Any]] | None:
    """Digest and ingredients that stand beside a file of predictions; None where there are none that can be read."""
    with suppress(OSError, UntrustedError):
        mark = parse_json(beside(predictions).read_bytes())
        if (
            isinstance(mark, dict)
            and isinstance(mark.get("fingerprint"), str)
            and isinstance(mark.get("made_of"), dict)
        ):
            return mark["fingerprint"], _flat(mark["made_of"])
    return None


def beside(predictions: Path) -> Path:
    """The file that holds the fingerprint of a file of predictions."""
    return predictions.with_suffix(".json")


def words_for(ingredient: str) -> str:
    """An ingredient's name with what it is in words, where that is more than the name says."""
    section, _, name = ingredient.partition(".")
    sections: dict[str, type[BaseModel]] = {"search": SearchSettings, "frames": Frames, "rules": Rules}
    owner = sections.get(section) if name else Fingerprint
    field = owner.model_fields.get(name or section) if owner is not None else None
    return f"{ingredient} ({field.description})" if field is not None and field.description else ingredient


def _flat(made_of: dict[str, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in made_of.items():
        inner = {f"{name}.{part}": each for part, each in value.items()} if isinstance(value, dict) else {name: value}
        named |= inner
    return named


def checkpoint_digest(checkpoint: Path) -> str:
    """The ingredient ``checkpoint``: a digest over the files that what a checkpoint says depends on.

    Returns:
        Hex; empty for a name that is no folder.
    """
    digests = {
        str(path.relative_to(checkpoint)): remembered(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.suffix in (".safetensors", ".json", ".jinja") and ".partial" not in path.parts
    }
    return json_digest(digests)[:SHORT] if digests else ""


def _short(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:SHORT]
