"""Rows that training can use, and the names of those that it cannot.

A sample without an answer, of an unknown type, or whose video has no cache is left out and listed; no other sample
takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from timesearch.base.batch import Failure
from timesearch.base.errors import ItemError, RequestError
from timesearch.base.files import inside
from timesearch.data.rows import read_models
from timesearch.data.samples import Sample
from timesearch.rewards import answer_letter
from timesearch.search.budget import preview_frames
from timesearch.search.checkpoint import check_fit
from timesearch.search.environment import PREVIEW_FRAMES
from timesearch.search.protocol import Rules, SearchProtocol
from timesearch.settings import SearchSettings, Settings

_INFERENCE_ALONE = ("dialect", "tools", "template", "preview", "last_turn", "last_call", "context", "reanswer_reply")
"""Rules that TRL's loop, its chat template or its images leave no choice about."""


def require_trainable(policy: Path, search: SearchSettings) -> None:
    """Refuse what would otherwise show as a policy that learns nothing.

    Raises:
        RequestError: the policy does not fit the parameters of search, or tools are to be shown as text, or a rule of
            the protocol is one of inference alone.
    """
    protocol, own = SearchProtocol.load(search.prompts), Rules()
    for name in _INFERENCE_ALONE:
        if getattr(protocol.rules, name) != getattr(own, name):
            raise RequestError(
                f"the rule {name} of the protocol {search.prompts} is one of inference alone: train by a protocol "
                f"without it (search.prompts)"
            )
    if protocol.tools or "reanswer_system" in protocol.texts:
        what = "tools.json" if protocol.tools else "reanswer_system.txt"
        raise RequestError(f"the protocol {search.prompts} has {what}, which training does not show: train without it")
    if search.protocol != "template":
        raise RequestError(
            f"search.protocol is {search.protocol!r}: in training the chat template shows the tools; set it to "
            "'template' (inference takes both)"
        )
    check_fit(policy, search)


def usable_samples(path: Path | str, frames: Path | str, features: Path | str) -> tuple[list[Sample], list[Failure]]:
    """Read a sample file row by row.

    Args:
        path: as in `read_samples`.
        frames: folder of frame caches.
        features: folder of feature caches.

    Returns:
        The samples fit for training, and a failure for each that is not, with a reason of `timesearch.data.samples` or
        `no_answer`, `bad_answer`, `unsafe_path` or `missing_cache`. A multiple-choice answer given as an option's text
        or in lower case becomes its letter, which rewards compare.

    Raises:
        RequestError: the file is missing or in no form that is read.
    """
    samples: list[Sample] = []
    rejected: list[Failure] = []
    for sample in read_models(path, Sample, rejected.append):
        try:
            samples.append(_usable(sample, path, Path(frames), Path(features)))
        except ItemError as error:
            rejected.append(Failure(sample.id, error.reason, str(error)))
    return samples, rejected


def _usable(sample: Sample, file: Path | str, frames: Path, features: Path) -> Sample:
    if not sample.answer.strip():
        raise ItemError(f"{file}: sample {sample.id!r} has no answer to train on", reason="no_answer")
    if sample.type == "multiple_choice":
        letter = answer_letter(sample.answer, sample.options)
        if letter is None:
            raise ItemError(
                f"{file}: the answer {sample.answer[:80]!r} of sample {sample.id!r} is no letter and no text of its "
                f"{len(sample.options)} options",
                reason="bad_answer",
            )
        if letter != sample.answer:
            sample = sample.model_copy(update={"answer": letter})
    for root, suffix, stage in ((frames, ".frames", "frames"), (features, ".safetensors", "features")):
        cache = inside(root, sample.video + suffix)
        if not cache.is_file():
            raise ItemError(
                f"{file}: sample {sample.id!r} needs {cache}, which the stage {stage!r} did not make",
                reason="missing_cache",
            )
    return sample


def training_rows(samples: Sequence[Sample], settings: Settings, system: str) -> list[dict[str, Any]]:
    """The rows that TRL hands to `SearchEnvironment.reset`, which fills the empty user message.

    With `train.random_preview` each tells how many frames its preview has. It is drawn once a question: all episodes of
    a group begin alike.
    """
    rows = [
        {
            "prompt": [{"role": "system", "content": system}, {"role": "user", "content": ""}],
            **sample.model_dump(include={"id", "video", "question", "options", "answer", "type"}),
        }
        for sample in samples
    ]
    if not settings.train.random_preview:
        return rows
    drawn = np.random.default_rng(settings.seed).integers(1, preview_frames(settings.search) + 1, size=len(rows))
    return [{**row, PREVIEW_FRAMES: int(count)} for row, count in zip(rows, drawn, strict=True)]


def load_training_samples(settings: Settings) -> tuple[list[Sample], list[Failure]]:
    """`usable_samples` of the train split.

    Raises:
        RequestError: none is left; the text counts the reasons.
    """
    paths = settings.paths
    samples, rejected = usable_samples(paths.train_samples, paths.frames, paths.features)
    if not samples:
        first = f" The first: {rejected[0].message}" if rejected else ""
        raise RequestError(f"{paths.train_samples} has no sample fit for training ({len(rejected)} left out).{first}")
    return samples, rejected
