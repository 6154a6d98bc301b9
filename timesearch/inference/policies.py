"""The one way to get an engine: `open_policy`, for inference, questions, traces and curation alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from timesearch.base.progress import console
from timesearch.search.policy import Policy
from timesearch.search.protocol import SearchProtocol
from timesearch.settings import Settings

CACHING = ("--enable-prefix-caching", "--enable-prompt-tokens-details")
"""Options of a checkpoint's vLLM, where the settings name no command."""


@dataclass(frozen=True)
class Served:
    """A model on servers that are up already."""

    urls: Sequence[str]
    """base URLs with ``/v1``"""
    model: str
    """name under which the servers list it; empty for the only one that they serve"""
    retry_for: float
    """seconds that an absent server is waited for"""


def served(settings: Settings, checkpoint: Path) -> Served | None:
    """The servers that `infer.urls` names, with `infer.model` or the checkpoint's path as the model's name."""
    infer = settings.infer
    if infer.engine == "transformers" or not infer.urls:
        return None
    return Served(infer.urls, infer.model or str(checkpoint), infer.retry_for)


def require_fit(settings: Settings, checkpoint: Path) -> None:
    """Refuse a checkpoint that cannot play by these settings, before anything is loaded or started.

    Raises:
        RequestError: what does not fit, and what to set.
    """
    from timesearch.search.checkpoint import check_fit

    # A model of another name is the server's own; a folder without a configuration its engine refuses.
    if settings.infer.model is None and any(checkpoint.glob("*config.json")):
        check_fit(checkpoint, settings.search)


@contextmanager
def open_policy(
    settings: Settings,
    checkpoint: Path | None = None,
    at: Served | None = None,
    *,
    temperature: float | None = None,
    video_preview: bool | None = None,
    start_server: bool = True,
) -> Iterator[Policy]:
    """Yield the engine that plays: servers that are up, a checkpoint in this process, or one in a server of its own.

    Args:
        settings: `infer` says how.
        checkpoint: folder of the model; None where it is on servers that are up.
        at: those servers; None loads `checkpoint`, by `infer.engine` in this process or in a server that is started for
            it and stopped at the end.
        temperature: in place of `infer.temperature`.
        video_preview: whether the preview is one video block, in place of `infer.preview`.
        start_server: whether a server may be started; if not, the checkpoint is loaded in this process.

    Raises:
        RequestError: an address is not a URL, the checkpoint cannot be loaded, or its server cannot be started.
    """
    infer = settings.infer
    temperature = infer.temperature if temperature is None else temperature
    rules = SearchProtocol.load(settings.search.prompts).rules
    video_preview = (rules.preview or infer.preview) == "video" if video_preview is None else video_preview
    in_process = infer.engine == "transformers" or not start_server
    if at is None and in_process:
        from timesearch.search.engine_transformers import TransformersPolicy

        assert checkpoint is not None, "a policy is a checkpoint or on a server"
        yield TransformersPolicy.load(
            checkpoint, infer.concurrency, temperature, settings.seed, video_preview, rules.template
        )
        return
    from timesearch.search.engine_openai import VIDEO_OPTIONS, OpenAIPolicy

    def client(server: Served) -> OpenAIPolicy:
        return OpenAIPolicy(
            server.urls,
            server.model,
            temperature=temperature,
            timeout=infer.timeout,
            retry_for=server.retry_for,
            seed=settings.seed,
            video_preview=video_preview,
            template=rules.template,
        )

    if at is not None:
        yield client(at)
        return
    from timesearch.base.servers import model_server, vllm_command

    command = infer.command
    if not command:
        from timesearch.search.checkpoint import template_options

        assert checkpoint is not None, "a policy is a checkpoint or on a server"
        template = template_options(checkpoint, rules.template, infer.log.parent)
        command = vllm_command(*CACHING, *template, *(VIDEO_OPTIONS if video_preview else ()))
    with model_server(
        "policy",
        f"http://127.0.0.1:{infer.port}/v1",
        str(checkpoint),
        command,
        setting="infer.port",
        log=infer.log,
        timeout=infer.start_timeout,
        say=console.print,
    ) as url:
        yield client(Served([url], str(checkpoint), infer.retry_for))
