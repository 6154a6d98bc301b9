"""Scores of open-ended answers.

The paper's judge is Qwen2.5-72B-Instruct behind vLLM, asked for one bit (arXiv 2511.05489, Section 4.1). Here it
answers through structured output, a choice of ``0`` and ``1``; a server that refuses this field is asked without it.
Every verdict is kept on disk under all that it depends on, so that a run repeated is a run with the same scores.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from timesearch.base.errors import RequestError, TemporaryError
from timesearch.base.files import json_digest, project_folder
from timesearch.base.http import BadReplyError, RefusedError, check_address, printable, request, tries
from timesearch.base.redaction import redact
from timesearch.base.replies import Completion
from timesearch.base.servers import authorisation
from timesearch.rewards import rule_judge
from timesearch.settings import Judge

if TYPE_CHECKING:
    import httpx

Triple = tuple[str, str, str]
"""(question, reference answer, candidate answer)"""

_PROMPT = Path(__file__).with_name("prompt.txt")
_MARK = re.compile(r"\{(question|reference|candidate)\}")
_MAX_TOKENS = 8
_PATIENCE = 10
"""Answers without a verdict that are borne for one verdict, and in a row; more, and the judge is taken for none."""

logger = logging.getLogger(__name__)


class JudgeError(TemporaryError):
    """The judge is away for longer than `retry_for`."""


class JudgeRefusedError(RequestError):
    """The judge refuses a request or gives no verdict, and would again.

    It ends a command only if it is the judge's fault: if no verdict at all comes (`JudgeClient.score_many`).
    """


class RuleJudge:
    """Right means the same words: case, punctuation, articles and spaces do not count. Needs no server."""

    identity: ClassVar[dict[str, Any]] = {"kind": "rule"}
    """What its verdicts depend on."""

    def known(self, triples: Sequence[Triple]) -> list[float | None]:
        """Scores that cost nothing: all."""
        return [self.score(*triple) for triple in triples]

    def score(self, question: str, reference: str, candidate: str) -> float:
        """1.0 or 0.0 for one candidate."""
        return rule_judge(reference, candidate)

    async def score_many(self, triples: Sequence[Triple]) -> list[float | None]:
        """Scores in the order of `triples`, none of them None."""
        return self.known(triples)


class JudgeClient:
    """A language model behind the OpenAI protocol as the judge.

    Failures that pass (`timesearch.base.http.may_pass`) are retried with growing, jittered pauses for
    `settings.retry_for` seconds: a judge that is restarted costs time, not scores.

    Raises:
        RequestError: `settings.url` is no address.
    """

    def __init__(self, settings: Judge) -> None:
        check_address(settings.url)
        self._settings = settings
        self._structured = True
        self._patience = 0
        self._prompt = _PROMPT.read_text(encoding="utf-8")
        self._verdicts = Verdicts(project_folder() / settings.cache)

    @property
    def identity(self) -> dict[str, Any]:
        """What its verdicts depend on."""
        settings = self._settings
        return {
            "kind": "server",
            "model": settings.model,
            "prompt": json_digest(self._prompt)[:12],
            "longest answer": settings.max_candidate_chars,
        }

    def known(self, triples: Sequence[Triple]) -> list[float | None]:
        """Scores that cost nothing: verdicts on the disk, and those of answers that are not asked about."""
        asked = {triple for triple in triples if self._is_asked(triple)}
        verdicts = self._verdicts.get({self._key(triple): triple for triple in asked})
        return [verdicts.get(triple) if triple in asked else 0.0 for triple in triples]

    def effort(self, triples: Sequence[Triple]) -> dict[str, int]:
        """Of verdicts on `triples`: requests that they took, and how often one was sent again.

        Counts are kept with the verdicts, so that a run repeated says what the first one said.
        """
        keys = {self._key(triple) for triple in triples if self._is_asked(triple)}
        return {"requests": len(keys), "retried": self._verdicts.retried(keys)}

    def score(self, question: str, reference: str, candidate: str) -> float | None:
        """Score one candidate as `score_many` does; not to be called inside a running event loop."""
        return asyncio.run(self.score_many([(question, reference, candidate)]))[0]

    async def score_many(self, triples: Sequence[Triple]) -> list[float | None]:
        """Score candidates, `settings.concurrency` at a time, each distinct one once.

        An empty candidate, or one of `settings.max_candidate_chars` or more, scores 0 unasked, as in the paper's code.

        Returns:
            1.0 or 0.0 for each, in the order of `triples`; None where the judge refused the question, or answered with
            something else than a verdict, while it gave verdicts on others.

        Raises:
            JudgeError: the judge stays away.
            JudgeRefusedError: it has given no verdict yet, or none on too many (`_PATIENCE`).
        """
        import httpx

        asked = {triple for triple in triples if self._is_asked(triple)}
        verdicts = self._verdicts.get({self._key(triple): triple for triple in asked})
        missing = [triple for triple in asked if triple not in verdicts]
        if missing:
            slots = asyncio.Semaphore(self._settings.concurrency)
            async with httpx.AsyncClient(timeout=self._settings.timeout, headers=authorisation()) as client:

                async def one(triple: Triple) -> None:
                    async with slots:
                        verdict, retries = await self._ask(client, triple)
                    verdicts[triple] = verdict
                    self._verdicts.put(self._key(triple), verdict, retries)

                ended = await asyncio.gather(*map(one, missing), return_exceptions=True)
            refused = [error for error in ended if isinstance(error, JudgeRefusedError)]
            # Verdicts from the disk count too: a run repeated must end as it did.
            self._patience = min(_PATIENCE, self._patience + _PATIENCE * len(verdicts) - len(refused))
            errors = [error for error in ended if error is not None and not isinstance(error, JudgeRefusedError)]
            if self._patience < 0:
                errors += refused
            if errors:
                raise min(errors, key=lambda error: isinstance(error, TemporaryError))
            if refused:
                logger.warning("no verdict on %d of %d answers: %s", len(refused), len(missing), refused[0])
        return [verdicts.get(triple, None if triple in asked else 0.0) for triple in triples]

    def _is_asked(self, triple: Triple) -> bool:
        return 0 < len(triple[2].strip()) < self._settings.max_candidate_chars

    def _key(self, triple: Triple) -> str:
        return json_digest([*triple, self._settings.model, self._prompt])

    async def _ask(self, client: httpx.AsyncClient, triple: Triple) -> tuple[float, int]:
        """The verdict on an answer, and the tries after the first that it took."""
        from tenacity import RetryError

        values = dict(zip(("question", "reference", "candidate"), triple, strict=True))
        prompt = _MARK.sub(lambda mark: values[mark[1]], self._prompt)
        where = f"the judge at {redact(self._settings.url)}"
        try:
            completion, retries = await self._complete(client, prompt)
        except RetryError as error:
            cause = error.last_attempt.exception()
            raise JudgeError(
                f"no judge at {redact(self._settings.url)} for {self._settings.retry_for:g} s "
                f"({redact(str(cause) or repr(cause))}): see its log, or set judge.kind to rule"
            ) from cause
        except RefusedError as error:
            raise JudgeRefusedError(f"{where} refused ({error.status}): {error}") from error
        except BadReplyError as error:
            raise JudgeRefusedError(
                f"{where} gave {error}: judge.url must name a server of the OpenAI protocol"
            ) from error
        verdict = _verdict(completion)
        if verdict is None:
            raise JudgeRefusedError(f"{where} answered {_no_verdict(completion)}")
        return verdict, retries

    async def _complete(self, client: httpx.AsyncClient, prompt: str) -> tuple[Completion, int]:
        from tenacity import AsyncRetrying

        body = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.0,
            "max_tokens": _MAX_TOKENS,
        }
        structured = self._structured
        content = json.dumps(body | ({"structured_outputs": {"choice": ["0", "1"]}} if structured else {})).encode()
        url = f"{self._settings.url.rstrip('/')}/chat/completions"
        try:
            async for attempt in AsyncRetrying(**tries(seconds=self._settings.retry_for)):
                with attempt:
                    completion = await request(
                        client, "POST", url, Completion, content=content, timeout=self._settings.timeout
                    )
        except RefusedError as error:
            if not structured or error.status not in (400, 422) or b"structured_outputs" not in error.body:
                raise
            self._structured = False
            return await self._complete(client, prompt)
        return completion, attempt.retry_state.attempt_number - 1


def _verdict(completion: Completion) -> float | None:
    """The one bit, after a thought, in quotes or in bold; a reasoning parser may have taken it for the thought."""
    message = completion.message
    said = message.said() if message.said().strip() else message.thought()
    word = said.rpartition("</think>")[2].strip("\"'`*. \n\r\t")
    return float(word) if word in ("0", "1") else None


def _no_verdict(completion: Completion) -> str:
    """The end of a sentence: what was said instead of a verdict, and what to do."""
    message = completion.message
    shown = f"{printable(message.said() or message.thought())[:60]!r} instead of 0 or 1"
    if "<think>" in message.said() or (message.thought() and not message.said().strip()):
        return f"{shown}: it thinks aloud, so serve it without thinking, or judge by another model (judge.model)"
    return f"{shown}: use a server with structured outputs, such as vLLM, or set judge.kind to rule"


class Verdicts:
    """Verdicts on disk, and how often each was asked for: an SQLite file, safe for many processes at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(self._path, timeout=30)) as connection, connection:
                connection.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, score REAL NOT NULL)")
                connection.execute("CREATE TABLE IF NOT EXISTS retried (key TEXT PRIMARY KEY, times INTEGER NOT NULL)")
                yield connection
        except sqlite3.Error as error:
            raise RequestError(
                f"{self._path} does not keep verdicts ({error}): move it away, or name another file in judge.cache"
            ) from error

    def get(self, keys: dict[str, Triple]) -> dict[Triple, float]:
        """Known scores of the triples that `keys` maps to."""
        if not keys:
            return {}
        with self._open() as connection:
            rows = [
                (triple, connection.execute("SELECT score FROM verdicts WHERE key = ?", (key,)).fetchone())
                for key, triple in keys.items()
            ]
        return {triple: row[0] for triple, row in rows if row}

    def put(self, key: str, score: float, retries: int = 0) -> None:
        """Keep a score, and the tries after the first that it took."""
        with self._open() as connection:
            connection.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (key, score))
            if retries:
                connection.execute("INSERT OR REPLACE INTO retried VALUES (?, ?)", (key, retries))

    def retried(self, keys: Collection[str]) -> int:
        """How often requests for these verdicts were sent again."""
        if not keys:
            return 0
        with self._open() as connection:
            return sum(times for key, times in connection.execute("SELECT key, times FROM retried") if key in keys)


def make_judge(settings: Judge) -> JudgeClient | RuleJudge:
    """The judge that the settings ask for; a `server` must be up by then (`judge_server`) or come up meanwhile."""
    return RuleJudge() if settings.kind == "rule" else JudgeClient(settings)
