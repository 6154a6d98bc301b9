"""Model servers that speak the OpenAI protocol, held for as long as they are needed: the judge and the policy.

A server that already answers at the address is used and left running. Otherwise, if the address is this machine's, one
is started, waited for with the time left shown, started again if it dies, and always stopped with its whole process
group. Of several processes that need a server at one address, one starts it: the others would find its memory taken. A
server on another machine is only waited for. Requests carry the key in `OPENAI_API_KEY`, if there is one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from timesearch.base.errors import RequestError, TemporaryError
from timesearch.base.extras import MissingExtraError, path_for, python_with_vllm
from timesearch.base.http import BadReplyError, RefusedError, check_address, printable, request_now, status_may_pass
from timesearch.base.processes import start_guarded, stop
from timesearch.base.redaction import redact
from timesearch.base.replies import ModelList

logger = logging.getLogger(__name__)

_RESTARTS = 3
_TAIL_LINES = 20
_SAY_EVERY = 15.0
_LOOK_EVERY = 1.0
_ANSWER_WITHIN = 5.0
_MISSES = 3
_NO_VLLM_MARKS = ("no module named 'vllm'", "cannot start vllm")
_MEMORY_MARKS = ("out of memory", "outofmemory", "cannot allocate memory", "no available memory", "less than desired")


class ServerError(TemporaryError):
    """A model server did not come up."""


def vllm_command(*options: str) -> list[str]:
    """The command of a server where the settings name none: vLLM, of the environment that has it."""
    module = ("-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--host", "{host}", "--port", "{port}")
    return [python_with_vllm(), *module, *options]


def authorisation() -> dict[str, str]:
    """The header with the key of a server that wants one.

    Raises:
        RequestError: the key has characters that no header can have.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise RequestError("OPENAI_API_KEY holds characters that no key has: set it again")
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextmanager
def model_server(
    role: str,
    url: str,
    model: str,
    command: Sequence[str],
    *,
    setting: str,
    log: Path | str,
    start: bool = True,
    timeout: float = 1800.0,
    say: Callable[[str], None] = logger.info,
) -> Iterator[str]:
    """Hold a server of `model` at `url` while the block runs.

    Args:
        role: what the server is in messages, such as ``judge``.
        url: base URL with ``/v1``, for example ``http://127.0.0.1:8765/v1``.
        model: name that ``/v1/models`` must list.
        command: starts the server; ``{model}``, ``{host}`` and ``{port}`` in its parts are filled in.
        setting: parameter that gives the address, such as ``judge.url``.
        log: file that the server's output goes to.
        start: False expects a running server; True starts one if the address is this machine's.
        timeout: seconds until the server must answer.
        say: told what happens, one line at a time.

    Yields:
        The base URL.

    Raises:
        RequestError: `url` is no address, the port is taken by something else, another model is served, or the key is
            refused.
        ServerError: the server does not come up; the text ends with the last lines of its log.
    """
    check_address(url)
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or (443 if parts.scheme == "https" else 80)
    here = _is_here(host)
    section, shown = setting.partition(".")[0], redact(url)
    try:
        served = _models(url)
    except _OtherProgramError as error:
        raise RequestError(
            f"port {port} on {host} is taken by a program that is not a model server (it {error}): "
            f"stop it, or set another address in {setting}"
        ) from error
    if served is not None:
        _check_model(setting, url, model, served)
    elif not start:
        raise ServerError(f"no {role} answers at {shown}: start it, or set {section}.start to true")
    elif here and _port_taken(host, port):
        raise RequestError(
            f"port {port} on {host} is taken by a program that is not a model server: "
            f"stop it, or set another port in {setting}"
        )
    values = {"{model}": model, "{host}": host, "{port}": str(port)}
    lock = Path(tempfile.gettempdir()) / f"timesearch-{os.getuid()}-{host}-{port}.lock"
    server = _Server(role, url, [_fill(part, values) for part in command], Path(log), lock, say)
    try:
        if served is None:
            if here:
                served = server.wait(timeout, f"{section}.start_timeout")
            else:
                served = _wait_elsewhere(role, url, timeout, f"{section}.start_timeout", say)
            _check_model(setting, url, model, served)
            say(f"{role}: {model} is ready at {shown}")
        else:
            say(f"{role}: using the server of {model} that is already at {shown}")
        if start and here:
            server.keep_up()
        yield url
    finally:
        server.stop()


class _Server:
    """A server at an address: who runs it, its log, and the thread that sees to it that one goes on answering."""

    def __init__(
        self, role: str, url: str, command: list[str], log: Path, lock: Path, say: Callable[[str], None]
    ) -> None:
        self._role, self._url, self._command, self._log, self._say = role, url, command, log, say
        self._lock = lock
        self._log_start = 0
        self._stopping = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._keeper: threading.Thread | None = None

    def start(self) -> bool:
        """Start a server; False where another process has started one for this address, which still loads."""
        with self._lock.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self._say(f"{self._role}: starting {redact(' '.join(self._command))}, log in {self._log}")
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as output:
                self._log_start = output.tell()
                environment = {**os.environ, "PATH": path_for(self._command[0])}
                self._process = start_guarded(self._command, stdout=output, env=environment, pass_fds=(lock.fileno(),))
        return True

    def wait(self, timeout: float, setting: str) -> list[str]:
        """Start a server, or wait for the one that another process starts; returns the names of its models.

        Args:
            timeout: seconds until it must answer.
            setting: parameter that gives the timeout.

        Raises:
            MissingExtraError: it is vLLM, which is not here.
            ServerError: it ends, or does not answer in time.
        """
        began = time.monotonic()
        next_word = began + _SAY_EVERY
        while (served := self._listed()) is None:
            now = time.monotonic()
            if self._process is None:
                self.start()
            elif self._process.poll() is not None:
                if any(mark in self._text().lower() for mark in _NO_VLLM_MARKS):
                    command = f"{setting.partition('.')[0]}.command"
                    raise MissingExtraError(f"the {self._role}", "vllm", "vllm", f"name another server in {command}")
                raise ServerError(
                    f"the {self._role} stopped with exit status {self._process.returncode} before it answered"
                    f"{self._hint()}",
                    f"the end of {self._log}:\n{self.tail()}",
                )
            if now - began > timeout:
                raise ServerError(
                    f"the {self._role} did not answer within {timeout:g} s: give {setting} more",
                    f"the end of {self._log}:\n{self.tail()}",
                )
            if now > next_word:
                self._say(f"{self._role}: loading, {timeout - (now - began):.0f} s left to answer")
                next_word = now + _SAY_EVERY
            time.sleep(0.5)
        return served

    def keep_up(self) -> None:
        """Start a server whenever none runs at the address any more, ours or the one that was found there."""
        self._keeper = threading.Thread(target=self._keep_up, name=f"{self._role}-keeper", daemon=True)
        self._keeper.start()

    def _keep_up(self) -> None:
        missed = restarts = 0
        while restarts < _RESTARTS:
            while missed < _MISSES:
                if self._stopping.wait(_LOOK_EVERY):
                    return
                running = self._process is not None and self._process.poll() is None
                missed = 0 if running or self._answers() else missed + 1
            missed = 0
            if self.start():
                self._say(f"{self._role}: nothing answered at {redact(self._url)} any more, so it was started again")
                restarts += 1
            if self._stopping.is_set():
                return

    def _listed(self) -> list[str] | None:
        """What the server lists; one that still loads may answer with anything."""
        try:
            return _models(self._url)
        except _OtherProgramError:
            return None

    def _answers(self) -> bool:
        try:
            return _models(self._url) is not None
        except RequestError:
            return True

    def stop(self) -> None:
        self._stopping.set()
        if self._keeper:
            self._keeper.join()
        if self._process:
            stop(self._process)
            self._say(f"{self._role}: stopped")

    def tail(self) -> str:
        """The last lines of the log."""
        return redact("\n".join(self._text().splitlines()[-_TAIL_LINES:]))

    def _hint(self) -> str:
        text = self._text().lower()
        if any(mark in text for mark in _MEMORY_MARKS):
            return ": too little memory for it: take a smaller model, or more or larger GPUs"
        return ""

    def _text(self) -> str:
        """What the server started last has written."""
        text = self._log.read_bytes() if self._log.is_file() else b""
        return text[self._log_start :].decode("utf-8", errors="replace")


def _wait_elsewhere(role: str, url: str, timeout: float, setting: str, say: Callable[[str], None]) -> list[str]:
    """Wait for a server of another machine; returns the names of its models."""
    began = time.monotonic()
    next_word = began
    while (served := _models(url)) is None:
        now = time.monotonic()
        if now - began > timeout:
            raise ServerError(
                f"no {role} answered at {redact(url)} within {timeout:g} s: start it there "
                f"(one is started only at this machine's own addresses), or give {setting} more"
            )
        if now >= next_word:
            left = timeout - (now - began)
            say(f"{role}: none answers at {redact(url)}, which is another machine: waiting for it, {left:.0f} s left")
            next_word = now + _SAY_EVERY
        time.sleep(0.5)
    return served


def _fill(part: str, values: dict[str, str]) -> str:
    for mark, value in values.items():
        part = part.replace(mark, value)
    return part


class _OtherProgramError(RequestError):
    """What answers is no model server; the text ends a sentence that begins with "it"."""


def _models(url: str) -> list[str] | None:
    """Names that ``/v1/models`` lists; None if nothing answers there, or a server that is not in health.

    Raises:
        RequestError: the server wants another key, or is no model server.
    """
    import httpx

    base = url.rstrip("/")
    with httpx.Client(headers=authorisation(), timeout=_ANSWER_WITHIN) as client, suppress(httpx.TransportError):
        with (
            suppress(httpx.RemoteProtocolError),
            client.stream("GET", f"{base.removesuffix('/v1')}/health") as health,
        ):
            if status_may_pass(health.status_code):
                return None
        try:
            listed = request_now(client, "GET", f"{base}/models", ModelList, timeout=_ANSWER_WITHIN)
        except RefusedError as error:
            if error.status in (401, 403):
                raise RequestError(
                    f"the server at {redact(url)} refuses ({error.status}): set OPENAI_API_KEY to a key that it takes"
                ) from error
            if status_may_pass(error.status):
                return None
            raise _OtherProgramError(f"answers with {error.status}: {error}") from error
        except BadReplyError as error:
            raise _OtherProgramError(f"gave {error}") from error
        return [entry.id for entry in listed.data]
    return None


def _check_model(setting: str, url: str, model: str, served: list[str]) -> None:
    if model not in served:
        raise RequestError(
            f"the server at {redact(url)} serves {printable(', '.join(served)) or 'nothing'}, not {model}: "
            f"stop it, or set another address in {setting}"
        )


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _port_taken(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False


def _is_here(host: str) -> bool:
    """Whether a host name or address is this machine's: only such an address can be bound."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
    return False
