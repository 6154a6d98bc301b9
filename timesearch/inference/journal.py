"""Predictions on disk: each is written as soon as it is there, and an interrupted run goes on from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from timesearch.base.files import write_json, write_jsonl
from timesearch.data.samples import Prediction, Sample
from timesearch.inference.fingerprint import SHORT, Fingerprint, beside
from timesearch.video.subtitles import index_path, made_of


class Journal:
    """The predictions of one method: rows are appended as they come, and put into order at the end.

    Args:
        folder: of predictions.
        method: its name.
        samples: the questions.
        fingerprint: what predictions are made of, but for the words of each video.
        subtitles: folder of the indexes that hold those.
    """

    def __init__(
        self, folder: Path, method: str, samples: Sequence[Sample], fingerprint: Fingerprint, subtitles: Path
    ) -> None:
        self.done: set[str] = set()
        self._final = folder / f"{method}.jsonl"
        self._partial = folder / f"{method}.jsonl.partial"
        self._mark = beside(self._final)
        self._samples = {sample.id: sample for sample in samples}
        self._subtitles = subtitles
        self.fingerprint = fingerprint
        self._handle: IO[str] | None = None

    def __enter__(self) -> Journal:
        mark = {"fingerprint": self.fingerprint.digest, "made_of": self.fingerprint.model_dump(mode="json")}
        rows: dict[str, dict[str, Any]] = {}
        if self._mark.is_file() and self.fingerprint.digest == _digest_in(self._mark):
            rows = {row["id"]: row for path in (self._final, self._partial) for row in _rows(path) if self._fits(row)}
        write_jsonl(self._partial, rows.values())
        write_json(self._mark, mark)
        self.done = set(rows)
        self._handle = self._partial.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._handle is not None
        self._handle.close()

    def _fits(self, row: dict[str, Any]) -> bool:
        """Whether a row is the prediction of a sample as it is now, by the subtitles of now, and no failure."""
        sample = self._samples.get(row["id"])
        fields = {name: row[name] for name in Sample.model_fields if name in row}
        if sample is None or row["error"] is not None or Sample.model_validate(fields) != sample:
            return False
        if not self.fingerprint.subtitles:
            return True
        return (row["seen"] or {}).get("subtitles", "") == made_of(index_path(self._subtitles, sample.video))

    def add(self, prediction: Prediction) -> None:
        """Write one row with its fingerprint, so that it outlives this process."""
        assert self._handle is not None
        prediction.fingerprint = self.fingerprint.digest[:SHORT]
        self._handle.write(prediction.model_dump_json() + "\n")
        self._handle.flush()

    def finish(self) -> list[Prediction]:
        """Put the rows into the order of the samples."""
        rows = {row["id"]: row for row in _rows(self._partial)}
        ordered = [rows[identity] for identity in self._samples if identity in rows]
        write_jsonl(self._final, ordered)
        self._partial.unlink()
        return [Prediction.model_validate(row) for row in ordered]


def _digest_in(mark: Path) -> str | None:
    """The digest in a mark; ingredients that came later, and count for nothing where they are not used, may lack."""
    return json.loads(mark.read_text(encoding="utf-8")).get("fingerprint")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file of predictions; a last line that a kill cut off is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as handle:
        for line in handle:
            if line.endswith("\n"):
                yield json.loads(line)
