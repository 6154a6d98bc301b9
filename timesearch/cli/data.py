"""Commands: download, frames, features, subtitles."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from timesearch.cli.app import ParamsOption, app, say, visible
from timesearch.cli.opening import SpeechOption

if TYPE_CHECKING:
    from timesearch.base.batch import BatchResult
    from timesearch.settings import Settings

KeepGoing = Annotated[bool, typer.Option("--keep-going", help="Exit with 0 although some items failed.")]


def _items(text: str) -> Any:
    """An argument for files of which the unreadable ones are set aside, and do not stop the command."""
    return typer.Argument(help=text, readable=False)


def _close(result: BatchResult, made: str, out: Path, keep_going: bool, later: bool = False) -> None:
    """Say what was made (and why again), and what failed, and leave with the contract's exit code.

    `later`: the same command is worth another try, whatever `keep_going` says.
    """
    again = ", ".join(f"{count} {stale}" for stale, count in sorted(result.again.items()))
    say(
        f"{made}: {len(result.done)} made{again and f' (in place of {again})'}, {len(result.skipped)} up to date, "
        f"{len(result.failures)} failed, in {out}"
    )
    for failure in result.failures[:20]:
        typer.echo(f"  {failure.reason}: {visible(failure.message)}", err=True)
    if result.failures:
        typer.echo(f"  all failures: {out / 'failures.jsonl'}", err=True)
    raise typer.Exit(75 if later else result.exit_code(keep_going))


def _recorded(settings: Settings, stage: str, out: Path, work: Callable[[], BatchResult]) -> BatchResult:
    """Do a stage's work, which writes into `out`, inside its MLflow run."""
    from timesearch.base.exclusive import exclusive
    from timesearch.tracking import stage_run

    with exclusive(out), stage_run(settings, stage) as record:
        result = work()
        counts = {"made": len(result.done), "up_to_date": len(result.skipped), "failed": len(result.failures)}
        record.log_metrics({name: float(count) for name, count in counts.items()})
    out.mkdir(parents=True, exist_ok=True)  # where nothing was made too: DVC looks for the output of each stage
    return result


@app.command()
def download(params: ParamsOption = Path("params.yaml"), keep_going: KeepGoing = False) -> None:
    """Fetch the videos of all samples."""
    from timesearch.settings import load_settings
    from timesearch.video.download import TRY_AGAIN, UNREACHABLE, run

    settings = load_settings(params)
    result = _recorded(settings, "download", settings.paths.videos, lambda: run(settings))
    away = any(failure.reason == UNREACHABLE for failure in result.failures)
    _close(result, "videos", settings.paths.videos, keep_going, later=away and TRY_AGAIN in os.environ)


@app.command()
def frames(
    videos: Annotated[list[Path] | None, _items("Video files or folders; none: all samples'.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the frame caches.")] = None,
    fps: Annotated[float | None, typer.Option("--fps", min=0.001, help="Frames a second.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Videos at the same time.")] = None,
    params: ParamsOption = Path("params.yaml"),
    keep_going: KeepGoing = False,
) -> None:
    """Turn videos into frame caches: one decoding pass each, at a steady rate of frames."""
    from timesearch.video.frames import cache_frames, run
    from timesearch.video.probe import SUFFIXES

    settings = _settings(params, own_files=bool(videos))
    given = {"fps": fps, "workers": workers}
    settings.frames = settings.frames.model_copy(update={key: value for key, value in given.items() if value})
    if out is not None:
        settings.paths.frames = out
    if videos:
        named = _named(videos, SUFFIXES)
        for folder in filter(os.path.isdir, videos):
            say_left_out(folder, SUFFIXES)
        result = cache_frames(named, settings.paths.frames, settings.frames)
    else:
        result = _recorded(settings, "frames", settings.paths.frames, lambda: run(settings))
    _close(result, "frame caches", settings.paths.frames, keep_going)


@app.command()
def features(
    frames: Annotated[list[Path] | None, _items("Frame caches or folders; none: all samples'.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the feature caches.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="open_clip name, local folder, or URL of an embeddings server.")
    ] = None,
    pretrained: Annotated[str | None, typer.Option("--pretrained", help="open_clip tag of the weights.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Videos at the same time.")] = None,
    params: ParamsOption = Path("params.yaml"),
    keep_going: KeepGoing = False,
) -> None:
    """Embed the frames of frame caches."""
    from timesearch.retrieval.encoder import load_encoder
    from timesearch.retrieval.features import cache_features, default_encoder, run

    settings = _settings(params, own_files=bool(frames))
    if workers:
        settings.features = settings.features.model_copy(update={"workers": workers})
    if out is not None:
        settings.paths.features = out
    encoder = load_encoder(model, pretrained) if model else default_encoder(settings)
    if frames:
        caches = _named(frames, {".frames"}, strip=".frames")
        result = cache_features(caches, settings.paths.features, encoder, settings.features)
    else:
        result = _recorded(settings, "features", settings.paths.features, lambda: run(settings, encoder))
    _close(result, "feature caches", settings.paths.features, keep_going)


@app.command()
def subtitles(
    videos: Annotated[list[Path] | None, _items("Video files or folders; none: all samples'.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the indexes.")] = None,
    speech: SpeechOption = None,
    params: ParamsOption = Path("params.yaml"),
    keep_going: KeepGoing = False,
) -> None:
    """Index what is said in videos: subtitle files beside them, streams inside, or (--speech) what a model hears."""
    from timesearch.video.probe import SUFFIXES
    from timesearch.video.subtitles import index_subtitles, run, speech_of

    def note(text: str) -> None:
        typer.echo(f"  {visible(text)}", err=True)

    settings = _settings(params, own_files=bool(videos))
    if out is not None:
        settings.paths.subtitles = out
    if speech is not None:
        settings.subtitles.speech = speech
    folder = settings.paths.subtitles
    if videos:
        listener = speech_of(settings.subtitles.speech)
        result = index_subtitles(_named(videos, SUFFIXES), folder, say=note, speech=listener)
    else:
        result = _recorded(settings, "subtitles", folder, lambda: run(settings, note))
    _close(result, "subtitle indexes", folder, keep_going)


def _settings(params: Path, own_files: bool) -> Settings:
    """The parameter file, or plain defaults for a user's own files where there is none."""
    from timesearch.settings import Settings, load_settings

    return Settings() if own_files and not params.is_file() else load_settings(params)


def _named(paths: list[Path], suffixes: Collection[str], strip: str = "") -> dict[str, Path]:
    """Files by the name of their cache: a file's own name, or for a folder the paths of the files of a kind below it.

    Raises:
        RequestError: two files would get one name.
    """
    from timesearch.base.errors import RequestError

    named: dict[str, Path] = {}
    for path in paths:
        pairs = [(path.name, path)]
        if os.path.isdir(path):  # noqa: PTH112, Path.is_dir raises where it may not look
            pairs = [(file.relative_to(path).as_posix(), file) for file in _below(path, suffixes)]
        for full_name, file in pairs:
            name = full_name.removesuffix(strip)
            if name in named and named[name].absolute() != file.absolute():
                raise RequestError(f"{named[name]} and {file} would both become {name!r}: do them into two folders")
            named[name] = file
    return named


def _below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Files of a kind below a folder, and the folders that may not be looked into, so that they are listed too."""
    closed: list[OSError] = []
    named = [
        Path(place, name)
        for place, folders, files in os.walk(folder, onerror=closed.append)
        for name in (*folders, *files)
        if Path(name).suffix.lower() in suffixes and name[0] != "."
    ]
    return sorted({*named, *(Path(error.filename) for error in closed)})


def say_left_out(folder: Path, suffixes: Collection[str]) -> None:
    """Name what a folder holds besides, so that nothing is passed over in silence; hidden files are meant to be."""
    others: Counter[str] = Counter()
    for place, folders, files in os.walk(folder):
        endings = [Path(name).suffix.lower() for name in files if name[0] != "."]
        others.update(ending or "without ending" for ending in endings if ending not in suffixes)
        others.update("link to a folder" for name in folders if os.path.islink(Path(place, name)))  # noqa: PTH114
    if others:
        kinds = [f"{count} {visible(kind)}" for kind, count in others.most_common(8)]
        more = ", ..." if len(others) > len(kinds) else ""
        typer.echo(
            f"  left out of {visible(str(folder))}, as not named like a video: {', '.join(kinds)}{more}", err=True
        )
        typer.echo("  to have such a file read, name it itself", err=True)
