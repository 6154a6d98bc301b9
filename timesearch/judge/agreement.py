"""How far a judge agrees with people: accuracy, and Cohen's kappa, which takes agreement by chance away.

`labelled.jsonl` beside this file was written for it: answers that are right in other words, incomplete, hedged,
negated, evasive, or that try to instruct the judge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from timesearch.base.errors import RequestError
from timesearch.data.rows import read_rows
from timesearch.judge.client import JudgeClient, RuleJudge, Triple

LABELLED = Path(__file__).with_name("labelled.jsonl")


class Labelled(BaseModel):
    """A candidate answer, and what a person says of it."""

    model_config = ConfigDict(extra="forbid")

    question: str
    reference: str
    candidate: str
    label: int = Field(ge=0, le=1, description="1 right, 0 wrong")


@dataclass(frozen=True)
class Agreement:
    """Agreement over `rows` candidates, without those on which the judge gave no verdict.

    `disputed` are those on which judge and person differ, with the judge's say.
    """

    rows: int
    accuracy: float
    kappa: float
    disputed: list[tuple[Labelled, int]]


def read_labelled(path: Path | str) -> list[Labelled]:
    """Read labelled answers, JSON lines.

    Raises:
        RequestError: a missing file, or a line that is not a labelled answer (named).
    """
    rows = []
    for number, row in read_rows(path):
        try:
            rows.append(Labelled.model_validate(row))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise RequestError(f"{path}, line {number}: field {field!r}: {first['msg']}") from error
    if not rows:
        raise RequestError(f"{path} holds no labelled answers")
    return rows


def cohen_kappa(first: Sequence[int], second: Sequence[int]) -> float:
    """Cohen's kappa of two lists of labels 0 and 1; 1.0 where both never vary and agree.

    J. Cohen, A coefficient of agreement for nominal scales, 1960.
    """
    total = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / total
    ones_first, ones_second = sum(first) / total, sum(second) / total
    chance = ones_first * ones_second + (1 - ones_first) * (1 - ones_second)
    return 1.0 if chance == 1.0 else (observed - chance) / (1 - chance)


def measure(judge: JudgeClient | RuleJudge, rows: Sequence[Labelled]) -> Agreement:
    """Let a judge score labelled answers."""
    return _agreement(rows, asyncio.run(judge.score_many(_triples(rows))))


def who_judged(judge: JudgeClient | RuleJudge) -> dict[str, Any]:
    """A judge by what its verdicts depend on, and its agreement with our labelled answers where that is known.

    It is known of the rule, and of a model that has given its verdicts on them (`timesearch judge check`).
    """
    identity = dict(getattr(judge, "identity", {"kind": type(judge).__name__}))
    rows = read_labelled(LABELLED)
    if isinstance(judge, RuleJudge | JudgeClient):
        scores = judge.known(_triples(rows))
        if all(score is not None for score in scores):
            agreement = _agreement(rows, scores)
            identity |= {"agreement": round(agreement.accuracy, 4), "kappa": round(agreement.kappa, 4)}
    return identity


def _triples(rows: Sequence[Labelled]) -> list[Triple]:
    return [(row.question, row.reference, row.candidate) for row in rows]


def _agreement(rows: Sequence[Labelled], scores: Sequence[float | None]) -> Agreement:
    judged = [(row, int(score > 0.5)) for row, score in zip(rows, scores, strict=True) if score is not None]
    disputed = [(row, verdict) for row, verdict in judged if row.label != verdict]
    kappa = cohen_kappa([row.label for row, _ in judged], [verdict for _, verdict in judged])
    return Agreement(len(judged), 1 - len(disputed) / len(judged), kappa, disputed)
