"""Stage `models`: the encoder and the base policy, brought as whole folders to `models/encoder` and `models/policy`.

Later stages read these folders and nothing else, so that a run does not depend on a hub after this stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from timesearch.base.errors import RequestError
from timesearch.base.exclusive import exclusive
from timesearch.base.files import file_digest, write_json
from timesearch.base.hub import fetch_error, unreached
from timesearch.base.model_folders import PARTS, read_config, require_data_only
from timesearch.base.progress import progress_bar
from timesearch.settings import Models, Settings

POCKET_ENCODERS = ("pocket", "pocket-hops", "pocket-senses")
"""Values of `models.encoder` that stand for an encoder which is trained on the spot, for a kind of pocket world."""
_MARK = "source.json"
"""Says what a folder was made from; the same again is not made again."""


def run(settings: Settings, rebuild: bool = False) -> list[Path]:
    """Make both folders, and give back those that were made now.

    Args:
        settings: `models`, and for a rebuild `frames`, `features` and `search`.
        rebuild: first pretrain the pocket policy anew into the folder `models.policy`, which takes about half an hour.

    Raises:
        RequestError: a model or folder does not exist, or the hub refuses it.
        TemporaryError: the hub does not answer, or another process works in the folder.
    """
    with exclusive(settings.paths.models):
        return _bring(settings, rebuild)


def _bring(settings: Settings, rebuild: bool) -> list[Path]:
    models, root = settings.models, settings.paths.models
    made = []
    seed = settings.seed
    if _make(root / "encoder", encoder_origin(models, seed), lambda folder: _encoder(folder, models, seed)):
        made.append(root / "encoder")
    if rebuild:
        from timesearch.pocket.pretrain import pretrain
        from timesearch.retrieval.encoder import load_encoder

        with exclusive(Path(models.policy)):
            made.append(pretrain(settings, load_encoder(str(root / "encoder")), Path(models.policy), seed))
    if _make(root / "policy", policy_origin(models), lambda folder: _policy(folder, models.policy)):
        made.append(root / "policy")
    return made


def encoder_origin(models: Models, seed: int) -> dict[str, object]:
    """What the encoder is made from; it is made anew when this changes."""
    if models.encoder in POCKET_ENCODERS:
        return {"encoder": models.encoder, "steps": models.encoder_steps, "seed": seed}
    if Path(models.encoder).is_dir():
        return {"encoder": models.encoder, **_digests(Path(models.encoder))}
    return {"encoder": models.encoder, "pretrained": models.pretrained}


def policy_origin(models: Models) -> dict[str, object]:
    """What the base policy is made from."""
    source = Path(models.policy)
    return {"policy": models.policy, **(_digests(source) if source.is_dir() else {})}


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _make(target: Path, origin: dict[str, object], make: Callable[[Path], None]) -> bool:
    """Make `target` unless it was made from the same `origin`; a folder appears whole or not at all."""
    mark = target / _MARK
    if mark.is_file() and read_config(mark) == origin:
        return False
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        make(partial)
        write_json(partial / _MARK, origin)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _encoder(folder: Path, models: Models, seed: int) -> None:
    if models.encoder in POCKET_ENCODERS:
        from timesearch.pocket.encoder import CURRICULA, train_encoder

        with progress_bar("encoder", models.encoder_steps) as bar:
            report = lambda loss: bar.advance(note=f"loss {loss:.2f}")  # noqa: E731
            train_encoder(folder, models.encoder_steps, seed, report, CURRICULA[models.encoder])
    elif Path(models.encoder).is_dir():
        _copy(Path(models.encoder), folder)
    else:
        _published_encoder(folder, models.encoder, models.pretrained)


def _copy(source: Path, folder: Path) -> None:
    """Copy the files of a model, links followed; code and pickles that lie beside them stay behind."""
    require_data_only(source)
    for path in {path for part in PARTS for path in source.glob(part) if path.is_file()}:
        shutil.copyfile(path, folder / path.name)


def _published_encoder(folder: Path, name: str, pretrained: str) -> None:
    """Write an open_clip model with its tokenizer in the local-dir layout."""
    import open_clip
    from open_clip.push_to_hf_hub import save_for_hf

    from timesearch.retrieval.encoder import require_own_towers

    config = None if ":" in name else open_clip.get_model_config(name)  # a colon leads to the hub, or to a folder
    if config is None:
        raise RequestError(f"open_clip knows no model {name!r}: see open_clip.list_models(), or name a local folder")
    require_own_towers(name, config)
    if not Path(pretrained).is_file() and pretrained not in open_clip.list_pretrained_tags_by_model(name):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise RequestError(f"open_clip has no weights {pretrained!r} of {name}: choose one of {tags}, or name a file")
    try:
        model, _, _ = open_clip.create_model_and_transforms(name, pretrained=pretrained)
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError) as error:
        raise fetch_error(f"{name} ({pretrained}) cannot be loaded", error) from error
    save_for_hf(model, tokenizer, config, str(folder), safe_serialization=True)


def _policy(folder: Path, source: str) -> None:
    from timesearch.search.checkpoint import keep_small_frames

    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise RequestError(f"{source} holds no checkpoint (config.json is missing)")
        _copy(Path(source), folder)
        keep_small_frames(folder)
        return
    if source.count("/") != 1:
        raise RequestError(
            f"{source} does not exist: get it by `dvc pull`, or make it by `timesearch models --rebuild`"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    failures: tuple[type[BaseException], ...] = (*unreached(), HFValidationError, OSError)
    try:
        snapshot_download(source, local_dir=folder, allow_patterns=list(PARTS))
    except failures as error:
        raise fetch_error(f"{source} cannot be fetched from the model hub", error) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    require_data_only(folder)
    keep_small_frames(folder)
