"""Commands: infer, ask, serve."""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from timesearch.cli.app import ParamsOption, app, say, visible
from timesearch.data.messages import describe_call, exchanges, times_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from timesearch.data.samples import Prediction
    from timesearch.inference.ask import Asker
    from timesearch.search.episode import Step
    from timesearch.search.policy import Policy

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Checkpoint folder of the policy, or its name at --url.")
]
UrlOption = Annotated[str | None, typer.Option("--url", help="OpenAI-compatible server of the policy, with /v1.")]
ProtocolOption = Annotated[
    str | None, typer.Option("--protocol", help="Prompts and rules: a name, or a folder (search.prompts).")
]
CacheOption = Annotated[Path | None, typer.Option("--cache", help="Folder of the caches; ~/.cache/timesearch.")]


@app.command()
def infer(
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="Only this method; may be given several times.")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="Questions other than the test split; needs --out.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder under which predictions/ is written.")] = None,
    params: ParamsOption = Path("params.yaml"),
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Exit with 0 although some episodes failed of their own accord.")
    ] = False,
) -> None:
    """Play search episodes on the test questions, and the baselines beside them."""
    from timesearch.base.errors import RequestError, TemporaryError
    from timesearch.inference.infer import run
    from timesearch.search.policy import EngineError
    from timesearch.settings import load_settings

    settings = load_settings(params)
    if samples is not None:
        if out is None:
            predictions = settings.paths.results / "predictions"
            raise RequestError(f"--samples without --out would replace {predictions}: name another folder by --out")
        settings.paths.test_samples = samples
    if out is not None:
        settings.paths.results = out
    result = run(settings, methods)
    results = settings.paths.results
    say(
        f"episodes: {len(result.done)} played, {len(result.skipped)} there already, {len(result.failures)} failed, "
        f"in {results / 'predictions'}"
    )
    for failure in result.failures[:20]:
        typer.echo(f"  {visible(failure.item)}: {failure.reason}: {visible(failure.message)}", err=True)
    if result.failures:
        typer.echo(
            f"  all failures: {results / 'predictions' / 'failures.jsonl'}; the same command tries them again", err=True
        )
    away = sum(failure.reason == EngineError.reason for failure in result.failures)
    if away:
        raise TemporaryError(
            f"{away} episodes got no answer from the policy's engine: the same command plays them again"
        )
    raise typer.Exit(result.exit_code(keep_going))


@app.command()
def ask(
    video: Annotated[Path, typer.Argument(help="Video file.")],
    questions: Annotated[
        list[str] | None, typer.Argument(metavar="QUESTION...", help="Questions; none: they are asked for.")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="A choice, where the answer is one of several.")
    ] = None,
    model: ModelOption = None,
    url: UrlOption = None,
    save: Annotated[Path | None, typer.Option("--save", help="PNG for the frames that were found.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a question, and nothing else.")
    ] = False,
    cache: CacheOption = None,
    protocol: ProtocolOption = None,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Answer questions about a video, and show the search as it happens."""
    from timesearch.base.errors import ItemError, TemporaryError
    from timesearch.base.untrusted import mend_text
    from timesearch.inference.ask import as_request, check_question, contact_sheet
    from timesearch.search.policy import EngineError
    from timesearch.video.frames import FrameCache, cache_path
    from timesearch.video.probe import probe

    for question in questions or ():
        check_question(question, options or [])
    with as_request():
        probe(video)
    console = Console(stderr=as_json, highlight=False)
    held = ExitStack()
    with console.status("loading the policy") as status:
        asker, policy = held.enter_context(_open_asker(params, model, url, cache, protocol))
        with as_request():
            name = asker.prepare(video, lambda text: status.update(Text(text)))
    watch = _Live(console, asker.frames, name)

    async def answer() -> None:
        await policy.connect()
        asked, failed = 0, []
        try:
            for question in questions or _typed(console, options or []):
                asked += 1
                watch.line("question", question, "bold")
                prediction = await asker.ask(name, question, options or [], watch)
                if as_json:
                    row = {**prediction.model_dump(mode="json"), "video": str(video)}
                    typer.echo(mend_text(json.dumps(row, ensure_ascii=False)))
                if prediction.error is not None:
                    if prediction.error.type == EngineError.reason:
                        raise TemporaryError(prediction.error.message)
                    failed.append(prediction.error)
                    watch.line("failed", prediction.error.message, "red")
                    continue
                watch.conclude(prediction)
                if save is not None and prediction.searched_seconds:
                    contact_sheet(FrameCache.open(cache_path(asker.frames, name)), prediction.searched_seconds, save)
                    watch.line("saved", str(save))
                elif save is not None:
                    watch.line("saved", "nothing, for no frame was found")
        finally:
            await policy.close()
        if failed:
            counted = f"{len(failed)} of {asked} questions got no answer, the last because "
            raise ItemError(f"{counted if asked > 1 else ''}{failed[-1].message}", failed[-1].type)

    with held:
        asyncio.run(answer())


@contextmanager
def _open_asker(
    params: Path, model: str | None, url: str | None, cache: Path | None, protocol: str | None
) -> Iterator[tuple[Asker, Policy]]:
    """Yield the parts that `ask` and `serve` share, by the parameter file or, without one, by the paper's settings."""
    from timesearch.base.errors import RequestError
    from timesearch.inference.ask import Asker, answering_policy, default_cache
    from timesearch.models import POCKET_ENCODERS
    from timesearch.retrieval.encoder import load_encoder
    from timesearch.retrieval.features import default_encoder
    from timesearch.settings import Settings, load_settings

    settings = (load_settings(params) if params.is_file() else Settings()).for_inference()
    settings.search.prompts = protocol or settings.search.prompts
    trained = settings.paths.models / "encoder"
    made = settings.features.url or trained.is_dir()
    if not made and settings.models.encoder in POCKET_ENCODERS:
        raise RequestError(f"{trained} is missing, the encoder of these parameters: run `timesearch models` first")
    with answering_policy(settings, model, url) as policy:
        models = settings.models
        encoder = default_encoder(settings) if made else load_encoder(models.encoder, models.pretrained)
        yield Asker(settings, policy, encoder, cache or default_cache()), policy


def _typed(console: Console, options: list[str]) -> Iterator[str]:
    """Questions from the terminal, until an empty line or the end of input; what cannot be asked is said, and passed.

    Raises:
        RequestError: what comes is no UTF-8 text.
    """
    from timesearch.base.errors import RequestError
    from timesearch.inference.ask import check_question

    while True:
        try:
            question = console.input("question  ").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise RequestError("the questions are not UTF-8 text: write them so") from error
        if not question:
            return
        try:
            check_question(question, options)
        except RequestError as error:
            console.print(Text(str(error), "red"))
            continue
        yield question


class _Live:
    """Prints an episode's steps as they happen. What a model or a user wrote is shown as plain words."""

    def __init__(self, console: Console, frames: Path, name: str) -> None:
        self._console, self._frames, self._name = console, frames, name

    def __call__(self, step: Step) -> None:
        times = times_of(step.blocks)
        if step.kind == "preview":
            self.line("preview", f"{len(times)} frames, {_times([times[0], times[-1]])}", "dim")
        elif step.kind == "turn" and step.turn is not None:
            self.line(f"turn {step.number}", step.turn.thought or step.text, "cyan")
            for call in step.turn.calls:
                self.line("call", describe_call(call), "yellow")
        elif step.kind == "found":
            (exchange,) = exchanges([{"role": "tool", "content": list(step.blocks)}])
            words = [each.text for each in exchange.evidence if each.text is not None]
            told = [*([_times(times)] if times else []), *words] or [exchange.said]
            self.line("found", "; ".join(told), "green")

    def conclude(self, prediction: Prediction) -> None:
        """The answer, and the times that support it."""
        why = {"turns": "none: the turns were used up", "context": "none: the context was full", None: "none"}
        self.line("answer", prediction.predicted_answer or why[prediction.limit], "bold")
        if not prediction.searched_seconds:
            self.line("seen at", "no frame was found: this is a guess from the preview", "dim")
            return
        again = prediction.reanswer
        verdict = "the same answer" if again and again == prediction.predicted_answer else f"{again or 'no answer'}"
        self.line("seen at", f"{_times(prediction.searched_seconds)}; from these frames alone: {verdict}", "bold")

    def line(self, label: str, text: str, style: str = "") -> None:
        """One line, cut at the terminal's width; control characters become spaces."""
        plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
        self._console.print(Text(f"{label:<10}") + Text(plain, style), no_wrap=True, overflow="ellipsis")


def _times(seconds: list[float]) -> str:
    return ", ".join(f"{time:.1f}s" for time in seconds)


@app.command()
def serve(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders of videos to offer.")] = None,
    model: ModelOption = None,
    url: UrlOption = None,
    host: Annotated[
        str,
        typer.Option("--host", help="Address or name to listen on; 0.0.0.0 lets in the network, without a password."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on.")] = 8780,
    cache: CacheOption = None,
    protocol: ProtocolOption = None,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Ask about videos in the browser: a small page on this machine."""
    import uvicorn

    from timesearch.inference.ask import as_request, default_cache
    from timesearch.serve.api import address, listen, make_app
    from timesearch.serve.videos import check_folder

    for folder in folders or ():
        with as_request():
            check_folder(folder)
    listener = listen(host, port)
    with _open_asker(params, model, url, cache, protocol) as (asker, policy):
        page = make_app(asker, policy, folders or [], (cache or default_cache()) / "uploads", host)
        server = uvicorn.Server(uvicorn.Config(page, log_level="warning", http="h11", ws="none"))

        async def answer() -> None:
            await policy.connect()
            say(f"timesearch answers at {address(host, listener.getsockname()[1])} (stop with Ctrl-C)")
            await server.serve([listener])

        with suppress(KeyboardInterrupt):
            asyncio.run(answer())
