"""Scores of open-ended answers.

The paper's judge is Qwen2.5-72B-Instruct behind vLLM, asked for one bit (arXiv 2511.05489, Section 4.1). Here it
answers through structured output, a choice of ``0`` and ``1``, so that no answer has to be parsed; every verdict is
kept on disk under all that it depends on, so that a run repeated is a run with the same scores.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from timesearch.errors import TemporaryError
from timesearch.files import json_digest
from timesearch.redaction import redact
from timesearch.rewards import rule_judge
from timesearch.servers import authorisation
from timesearch.settings import Judge

if TYPE_CHECKING:
    import httpx

Triple = tuple[str, str, str]
"""(question, reference answer, candidate answer)"""

_PROMPT = Path(__file__).with_name("prompt.txt")
_MARK = re.compile(r"\{(question|reference|candidate)\}")
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


class JudgeError(TemporaryError):
    """The judge cannot be asked: it is away for longer than `retry_for`, or refuses the request."""


class RuleJudge:
    """Right means the same words: case, punctuation, articles and spaces do not count. Needs no server."""

    def score(self, question: str, reference: str, candidate: str) -> float:
        """1.0 or 0.0 for one candidate."""
        return rule_judge(reference, candidate)

    async def score_many(self, triples: Sequence[Triple]) -> list[float]:
        """Scores in the order of `triples`."""
        return [self.score(*triple) for triple in triples]


class JudgeClient:
    """A language model behind the OpenAI protocol as the judge.

    Failures that pass (refused connections, time-outs, 429 and 5xx) are retried with growing, jittered pauses for
    `settings.retry_for` seconds: a judge that is restarted costs time, not scores.
    """

    def __init__(self, settings: Judge) -> None:
        self._settings = settings
        self._prompt = _PROMPT.read_text(encoding="utf-8")
        self._verdicts = Verdicts(settings.cache)

    def score(self, question: str, reference: str, candidate: str) -> float:
        """Score one candidate; not to be called inside a running event loop.

        Raises:
            JudgeError: the judge stays away, or refuses the request.
        """
        return asyncio.run(self.score_many([(question, reference, candidate)]))[0]

    async def score_many(self, triples: Sequence[Triple]) -> list[float]:
        """Score candidates, `settings.concurrency` at a time, each distinct one once.

        An empty candidate, or one longer than `settings.max_candidate_chars`, scores 0 unasked.

        Returns:
            1.0 or 0.0 for each, in the order of `triples`.

        Raises:
            JudgeError: the judge stays away, or refuses the request.
        """
        import httpx

        asked = {triple for triple in triples if 0 < len(triple[2].strip()) <= self._settings.max_candidate_chars}
        verdicts = self._verdicts.get({self._key(triple): triple for triple in asked})
        missing = [triple for triple in asked if triple not in verdicts]
        if missing:
            slots = asyncio.Semaphore(self._settings.concurrency)
            async with httpx.AsyncClient(timeout=self._settings.timeout, headers=authorisation()) as client:

                async def one(triple: Triple) -> None:
                    async with slots:
                        verdict = await self._ask(client, triple)
                    verdicts[triple] = verdict
                    self._verdicts.put(self._key(triple), verdict)

                ended = await asyncio.gather(*map(one, missing), return_exceptions=True)
            for error in ended:
                if error is not None:
                    raise error
        return [verdicts.get(triple, 0.0) for triple in triples]

    def _key(self, triple: Triple) -> str:
        return json_digest([*triple, self._settings.model, self._prompt])

    async def _ask(self, client: httpx.AsyncClient, triple: Triple) -> float:
        import httpx
        from tenacity import AsyncRetrying, RetryError, retry_if_exception, stop_after_delay, wait_random_exponential

        def passes(error: BaseException) -> bool:
            if isinstance(error, httpx.HTTPStatusError):
                return error.response.status_code in _RETRIED
            return isinstance(error, httpx.TransportError)

        values = dict(zip(("question", "reference", "candidate"), triple, strict=True))
        prompt = _MARK.sub(lambda mark: values[mark[1]], self._prompt)
        body = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.0,
            "max_tokens": 8,
            "structured_outputs": {"choice": ["0", "1"]},
        }
        url = f"{self._settings.url.rstrip('/')}/chat/completions"
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception(passes),
                stop=stop_after_delay(self._settings.retry_for),
                wait=wait_random_exponential(multiplier=0.5, max=10),
            ):
                with attempt:
                    response = await client.post(url, json=body)
                    response.raise_for_status()
        except RetryError as error:
            cause = error.last_attempt.exception()
            raise JudgeError(
                f"no judge at {redact(url)} for {self._settings.retry_for:g} s ({redact(str(cause) or repr(cause))}): "
                "see its log, or set judge.kind to rule"
            ) from cause
        except httpx.HTTPStatusError as error:
            said = redact(error.response.text[:300].replace("\n", " "))
            raise JudgeError(f"the judge at {redact(url)} refused ({error.response.status_code}): {said}") from error
        answer = str(response.json()["choices"][0]["message"]["content"]).strip()
        if answer not in ("0", "1"):
            raise JudgeError(
                f"the judge at {redact(url)} answered {answer[:40]!r} instead of 0 or 1: "
                "use a server with structured outputs, such as vLLM"
            )
        return float(answer)


class Verdicts:
    """Verdicts on disk: one SQLite table, safe for many processes at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path, timeout=30)
        connection.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, score REAL NOT NULL)")
        return connection

    def get(self, keys: dict[str, Triple]) -> dict[Triple, float]:
        """Known scores of the triples that `keys` maps to."""
        if not keys:
            return {}
        with closing(self._open()) as connection:
            rows = [
                (triple, connection.execute("SELECT score FROM verdicts WHERE key = ?", (key,)).fetchone())
                for key, triple in keys.items()
            ]
        return {triple: row[0] for triple, row in rows if row}

    def put(self, key: str, score: float) -> None:
        """Keep a score."""
        with closing(self._open()) as connection, connection:
            connection.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (key, score))


def make_judge(settings: Judge) -> JudgeClient | RuleJudge:
    """The judge that the settings ask for; a `server` must be up by then (`judge_server`) or come up meanwhile."""
    return RuleJudge() if settings.kind == "rule" else JudgeClient(settings)
