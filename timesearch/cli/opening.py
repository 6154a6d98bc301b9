"""What the commands about questions and libraries open: settings, encoders, libraries. Heavy imports stay inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from timesearch.library.catalogue import EncoderRecord
    from timesearch.library.library import Library
    from timesearch.retrieval.encoder import Encoder
    from timesearch.settings import Settings

LibraryOption = Annotated[
    Path | None, typer.Option("--library", help="Folder of a library, as `timesearch index` makes it.")
]
WithinOption = Annotated[
    str | None, typer.Option("--in", help="Only this folder or video: a path, or a name as the library lists it.")
]
EncoderUrlOption = Annotated[
    str | None, typer.Option("--encoder-url", help="Embeddings server of the encoder, with /v1 (features.url).")
]

SpeechOption = Annotated[
    str | None,
    typer.Option("--speech", help="faster-whisper model that writes down speech where there are no subtitles."),
]


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on a line."""
    from timesearch.base.untrusted import mend_text

    typer.echo(mend_text(json.dumps(value, ensure_ascii=False)))


def default_library() -> Path:
    """The user's library, where none is named."""
    from timesearch.inference.ask import default_cache

    return default_cache() / "library"


def settings_for_asking(
    params: Path,
    protocol: str | None = None,
    tools: list[str] | None = None,
    encoder_url: str | None = None,
    speech: str | None = None,
) -> Settings:
    """The parameter file or, without one, the paper's settings, with the budgets and tools of inference.

    Raises:
        RequestError: one of `tools` is none, or none of them finds what `speech` hears.
    """
    from timesearch.base.errors import RequestError
    from timesearch.search.tools import offered
    from timesearch.settings import Settings, load_settings

    settings = load_settings(params) if params.is_file() else Settings()
    settings.infer.tools = tools or settings.infer.tools
    settings.features.url = encoder_url or settings.features.url
    settings = settings.for_inference()
    offered(settings.search.tools)
    settings.search.prompts = protocol or settings.search.prompts
    settings.subtitles.speech = speech or settings.subtitles.speech
    if speech and "search_subtitles" not in settings.search.tools:
        raise RequestError(
            "--speech writes words down for the tool search_subtitles, which is not offered: add --tool "
            "seek_video_frames --tool search_subtitles"
        )
    return settings


def check_encoder(settings: Settings) -> None:
    """Refuse settings whose encoder is to be made and is not there yet, before anything is loaded.

    Raises:
        RequestError: it is missing.
    """
    from timesearch.base.errors import RequestError
    from timesearch.models import POCKET_ENCODERS

    trained = settings.paths.models / "encoder"
    made = settings.features.url or trained.is_dir()
    if not made and settings.models.encoder in POCKET_ENCODERS:
        raise RequestError(f"{trained} is missing, the encoder of these parameters: run `timesearch models` first")


def encoder_of(settings: Settings) -> tuple[Encoder, EncoderRecord]:
    """The encoder of the settings, and where it comes from."""
    from timesearch.library.catalogue import EncoderRecord
    from timesearch.retrieval.encoder import load_encoder

    check_encoder(settings)
    trained, models = settings.paths.models / "encoder", settings.models
    if settings.features.url or trained.is_dir():
        source, tag = settings.features.url or str(trained), None
    else:
        source, tag = models.encoder, models.pretrained
    encoder = load_encoder(source, tag)
    return encoder, EncoderRecord.of(encoder, source, tag)


def encoder_for(folder: Path, settings: Settings) -> tuple[Encoder, EncoderRecord]:
    """The encoder of a library, from where it came when the library was made; that of the settings for a new one.

    Raises:
        RequestError: what is there now is another encoder.
    """
    from timesearch.library.catalogue import Catalogue, DamagedError, MissingError
    from timesearch.retrieval.encoder import load_encoder

    try:
        record = Catalogue.read(folder).encoder
    except (MissingError, DamagedError):
        return encoder_of(settings)
    served = record.source.startswith(("http://", "https://"))
    gone = Path(record.source).is_absolute() and not Path(record.source).is_dir()
    if gone or (served and settings.features.url):
        encoder, found = encoder_of(settings)  # it may have been moved
    else:
        encoder, found = load_encoder(record.source, record.tag), record
    record.require(encoder, folder)
    return encoder, found


def library_with_encoder(folder: Path, settings: Settings) -> tuple[Library, Encoder]:
    """A library and the encoder that made it.

    Raises:
        RequestError: there is no library, its index is damaged, or its encoder is not there.
    """
    from timesearch.inference.ask import as_request
    from timesearch.library.library import Library

    with as_request():
        library = Library(folder)
    encoder, _ = encoder_for(folder, settings)
    return library, encoder
