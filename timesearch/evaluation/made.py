"""What a method's numbers are made of, as evaluation finds it: how it was played, what was seen, how it was scored.

`metrics["fingerprint"]` holds

- ``digest`` and ``made_of``: the fingerprint of the rows, and its ingredients by name where they stand beside the
  predictions (`timesearch.inference.fingerprint`); None of rows that carry none, as older files and those of others;
- ``seen``: what happened: engines with their versions and what they render, requests that were sent again, failed or
  came back empty, frames without a time before them, errors of episodes by type, videos that were missing;
- ``scored``: parser, thresholds, judge and its agreement with people, and the version of this program;
- ``judged``: answers that a judge's server was asked about, and requests that were sent again; None without such;
- ``questions``: how many, and a digest over them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timesearch.base.files import sequence_digest
from timesearch.data.messages import blocks_of, evidence_in
from timesearch.data.samples import Prediction, Sample
from timesearch.inference.fingerprint import SHORT, read_ingredients

if TYPE_CHECKING:
    from timesearch.settings import Evaluate

_NAMED = 200
"""Missing videos that are named."""


def question_digest(sample: Sample) -> str:
    """Digest of what is asked and what is right: rows of equal digests are answers to one question."""
    asked = "\0".join([sample.type, sample.question, *sample.options, sample.answer])
    return hashlib.blake2b(asked.encode(errors="surrogatepass"), digest_size=6).hexdigest()


def shown_in(prediction: Prediction) -> tuple[Any, ...]:
    """What an episode was shown: preview frames, the sizes of preview and searched frames, whether times were told
    (``yes``, ``for some`` frames, ``no``; empty where there are no frames)."""
    frames = told = 0
    for message in prediction.prediction:
        if message["role"] == "assistant":
            continue
        frames += sum(block.get("type") in ("image", "image_url") for block in blocks_of(message))
        told += sum(each.text is None for each, _ in evidence_in(message))
    seen = prediction.seen
    sizes = (tuple(map(tuple, seen.preview_sizes)), tuple(map(tuple, seen.searched_sizes))) if seen else ((), ())
    times = "" if not frames else "yes" if told >= frames else "for some" if told else "no"
    return (len(prediction.preview_seconds), *sizes, times)


class Tally:
    """Counts over the rows of a prediction file."""

    def __init__(self) -> None:
        self._digests: Counter[str] = Counter()
        self._engines: dict[str, None] = {}
        self._templates: dict[str, None] = {}
        self._encoders: dict[str, None] = {}
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._missing: dict[str, None] = {}
        self._counted = 0

    def add(self, prediction: Prediction) -> None:
        """Take a row in."""
        self._digests[prediction.fingerprint[:SHORT]] += 1
        if prediction.error:
            self._errors[prediction.error.type[:80]] += 1
            if prediction.error.type.startswith("missing_"):
                self._missing[prediction.video[:200]] = None
        if (seen := prediction.seen) is None:
            return
        self._counted += 1
        self._engines[seen.engine[:200]] = None
        self._templates[seen.template[:200]] = None
        self._encoders[seen.encoder[:200]] = None
        self._counts.update(requests=seen.requests, retried=seen.retried, failed=seen.failed, empty=seen.empty)

    def account(
        self,
        predictions: Path,
        questions: Iterable[tuple[str, str]],
        settings: Evaluate,
        judge: dict[str, Any] | None,
        judged: dict[str, int] | None = None,
    ) -> dict[str, Any]:
        """All of `metrics["fingerprint"]`.

        Args:
            predictions: the file.
            questions: id and `question_digest` of each row, in the order of the ids.
            settings: how it was scored.
            judge: who judged open-ended answers; None where there were none.
            judged: requests to the judge, and those that were sent again.
        """
        count, questions_digest = sequence_digest(questions)
        digests = [digest for digest in self._digests if digest]
        beside = read_ingredients(predictions) if digests else None
        fits = beside is not None and digests == [beside[0][:SHORT]]
        seen: dict[str, Any] | None = None
        if self._counted:
            names = ("requests", "retried", "failed", "empty")
            counts = {name: self._counts[name] for name in names}
            sets = {"engines": self._engines, "templates": self._templates, "encoders": self._encoders}
            seen = {**{name: sorted(found) for name, found in sets.items()}, **counts}
        return {
            "digest": "+".join(sorted(digests)[:8]) or None,
            "rows_without": self._digests[""],
            "made_of": beside[1] if beside is not None and fits else None,
            "seen": seen,
            "errors": dict(sorted(self._errors.items())),
            "missing_videos": sorted(self._missing)[:_NAMED],
            "scored": {
                "answers read": settings.qa,
                "thresholds in seconds": settings.thresholds,
                "judge": judge,
                "timesearch": version("timesearch"),
            },
            "judged": judged,
            "questions": {"count": count, "digest": questions_digest[:SHORT]},
        }
