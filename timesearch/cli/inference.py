"""Commands: infer, ask, serve."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from timesearch.cli.app import ParamsOption, app, say, visible
from timesearch.cli.opening import (
    EncoderUrlOption,
    LibraryOption,
    SpeechOption,
    WithinOption,
    check_encoder,
    encoder_of,
    library_with_encoder,
    print_json,
    settings_for_asking,
)
from timesearch.data.messages import describe_call, exchanges, times_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from timesearch.inference.ask import Answer, Asker
    from timesearch.inference.statement import Statement
    from timesearch.library.catalogue import Entry
    from timesearch.library.library import Library
    from timesearch.retrieval.encoder import Encoder
    from timesearch.search.episode import Step, Watch
    from timesearch.search.policy import Policy
    from timesearch.video.frames import FrameCache

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Checkpoint folder of the policy, or its name at --url.")
]
UrlOption = Annotated[str | None, typer.Option("--url", help="OpenAI-compatible server of the policy, with /v1.")]
ProtocolOption = Annotated[
    str | None, typer.Option("--protocol", help="Prompts and rules: a name, or a folder (search.prompts).")
]
ToolsOption = Annotated[
    list[str] | None,
    typer.Option("--tool", help="Offer this tool (infer.tools); may be given several times. None: those of training."),
]
CacheOption = Annotated[Path | None, typer.Option("--cache", help="Folder of the caches; ~/.cache/timesearch.")]
KeyOption = Annotated[
    Path | None,
    typer.Option("--key-file", help="File with the key that all requests must bear; else TIMESEARCH_API_KEY, if set."),
]


@app.command()
def infer(
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="Only this method; may be given several times.")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="Questions other than the test split; needs --out.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder under which predictions/ is written.")] = None,
    tools: ToolsOption = None,
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
    for option, given in (("--samples", samples), ("--tool", tools)):
        if given and out is None:
            predictions = settings.paths.results / "predictions"
            raise RequestError(f"{option} without --out would replace {predictions}: name another folder by --out")
    settings.paths.test_samples = samples or settings.paths.test_samples
    settings.infer.tools = tools or settings.infer.tools
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
    video: Annotated[Path | None, typer.Argument(help="Video file; with --library it is the first question.")] = None,
    questions: Annotated[
        list[str] | None, typer.Argument(metavar="QUESTION...", help="Questions; none: they are asked for.")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="A choice, where the answer is one of several.")
    ] = None,
    model: ModelOption = None,
    url: UrlOption = None,
    encoder_url: EncoderUrlOption = None,
    save: Annotated[Path | None, typer.Option("--save", help="PNG for the frames that were found.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a question, and nothing else.")
    ] = False,
    library: LibraryOption = None,
    within: WithinOption = None,
    cache: CacheOption = None,
    protocol: ProtocolOption = None,
    tools: ToolsOption = None,
    speech: SpeechOption = None,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Answer questions about a video, or a library of them, and show the search as it happens."""
    from timesearch.base.errors import ItemError, RequestError
    from timesearch.inference.ask import as_request, check_question
    from timesearch.video.probe import probe

    if library is not None and video is not None:
        questions = [str(video), *(questions or [])]
    elif video is None and library is None:
        raise RequestError("there is nothing to ask about: name a video file, or a library by --library")
    elif within is not None and library is None:
        raise RequestError("--in names a part of a library: name the library, too, by --library")
    if speech is not None and library is not None:
        raise RequestError("what is said in a library is written down by `timesearch index --speech MODEL`")
    for question in questions or ():
        check_question(question, options or [])
    if library is None and video is not None:
        with as_request():
            probe(video)
    console = Console(stderr=as_json, highlight=False)
    held = ExitStack()
    live: _OneVideo | _ManyVideos
    with console.status("loading the policy") as status:
        if library is not None:
            live = _ManyVideos(console, *held.enter_context(open_library(params, library, model, url, protocol, tools)))
            live.limit(within)
        elif video is not None:
            asker, policy = held.enter_context(
                _open_asker(params, model, url, encoder_url, cache, protocol, tools, speech)
            )
            with as_request():
                name = asker.prepare(video, lambda text: status.update(Text(text)))
            live = _OneVideo(console, asker, policy, video, name)

    async def answer() -> None:
        await live.policy.connect()
        asked, failed = 0, []
        try:
            for question in questions or _typed(console, options or []):
                asked += 1
                live.line("question", question, "bold")
                try:
                    await live.ask(question, options or [], as_json, save)
                except ItemError as error:
                    failed.append(error)
                    live.line("failed", str(error), "red")
        finally:
            await live.policy.close()
        if failed:
            counted = f"{len(failed)} of {asked} questions got no answer, the last because "
            raise ItemError(f"{counted if asked > 1 else ''}{failed[-1]}", failed[-1].reason)

    with held:
        asyncio.run(answer())


@contextmanager
def _open_asker(
    params: Path,
    model: str | None,
    url: str | None,
    encoder_url: str | None,
    cache: Path | None,
    protocol: str | None,
    tools: list[str] | None,
    speech: str | None,
) -> Iterator[tuple[Asker, Policy]]:
    """Yield the parts that `ask` and `serve` share, by the parameter file or, without one, by the paper's settings."""
    from timesearch.inference.ask import Asker, answering_policy, default_cache

    settings = settings_for_asking(params, protocol, tools, encoder_url, speech)
    check_encoder(settings)
    with answering_policy(settings, model, url) as policy:
        encoder, _ = encoder_of(settings)
        yield Asker(settings, policy, encoder, cache or default_cache()), policy


@contextmanager
def open_library(
    params: Path,
    folder: Path,
    model: str | None,
    url: str | None,
    protocol: str | None,
    tools: list[str] | None = None,
    speech: str | None = None,
) -> Iterator[tuple[Library, Asker, Encoder, Policy]]:
    """Yield a library with its own encoder, and who answers questions about it."""
    from timesearch.inference.ask import Asker, answering_policy

    settings = settings_for_asking(params, protocol, tools, speech=speech)
    library, encoder = library_with_encoder(folder, settings)
    with answering_policy(settings, model, url) as policy:
        yield library, Asker(settings, policy, encoder, library.folder), encoder, policy


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

    def __init__(self, console: Console) -> None:
        self._console = console

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

    def conclude(self, answer: Answer) -> None:
        """The answer, and what it rests on."""
        from timesearch.inference.statement import share

        prediction, evidence = answer.prediction, answer.statement
        why = {"turns": "none: the turns were used up", "context": "none: the context was full", None: "none"}
        self.line("answer", prediction.predicted_answer or why[prediction.limit], "bold")
        if not evidence.support:
            self.line("seen at", "nothing was found: this is a guess from the preview", "dim")
        else:
            verdict = "the same answer" if evidence.agrees else f"{evidence.alone or 'no answer'}"
            places = {f"{how} at": _times(times) for how, times in evidence.places.items()}
            *before, (label, last) = (places or {"found in": "what is said"}).items()
            for each in (*before, (label, f"{last}; from what was found alone: {verdict}")):
                self.line(*each, "bold")
        unseen = (
            "" if evidence.unseen is None else f"; nothing from {evidence.unseen[0]:.1f}s to {evidence.unseen[1]:.1f}s"
        )
        self.line("looked at", f"{share(evidence.looked_at)} of the video{unseen}", "dim")
        self._others(evidence)

    def _others(self, evidence: Statement) -> None:
        if evidence.in_vain:
            self.line("in vain", "; ".join(evidence.in_vain), "dim")
        if evidence.others:
            self.line("also asked", "; ".join(evidence.others), "dim")

    def line(self, label: str, text: str, style: str = "") -> None:
        """One line, cut at the terminal's width; control characters become spaces."""
        plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
        self._console.print(Text(f"{label:<10}") + Text(plain, style), no_wrap=True, overflow="ellipsis")

    def show(self, answer: Answer, video: str, as_json: bool) -> None:
        """The end of a question.

        Raises:
            TemporaryError: the engine is away.
            ItemError: the episode failed for another reason.
        """
        from timesearch.base.errors import ItemError, TemporaryError
        from timesearch.search.policy import EngineError

        prediction = answer.prediction
        if as_json:
            print_json(
                {**prediction.model_dump(mode="json"), "video": video, "evidence": answer.statement.model_dump()}
            )
        if prediction.error is not None:
            kind = TemporaryError if prediction.error.type == EngineError.reason else ItemError
            raise kind(prediction.error.message)
        self.conclude(answer)

    def save(self, frames: FrameCache, seconds: Sequence[float], save: Path | None) -> None:
        """Save the frames that were found, if a file is named for them."""
        from timesearch.inference.ask import contact_sheet

        if save is not None and seconds:
            contact_sheet(frames, seconds, save)
            self.line("saved", str(save))
        elif save is not None:
            self.line("saved", "nothing, for no frame was found")


class _OneVideo(_Live):
    """Questions about one file, whose caches are called `name`."""

    def __init__(self, console: Console, asker: Asker, policy: Policy, video: Path, name: str) -> None:
        super().__init__(console)
        self.policy = policy
        self._asker, self._video, self._name = asker, video, name

    async def ask(self, question: str, options: list[str], as_json: bool, save: Path | None) -> None:
        """Ask, and show what comes of it."""
        from timesearch.video.frames import FrameCache, cache_path

        answer = await self._asker.ask(self._name, question, options, self, shown_as=str(self._video))
        self.show(answer, str(self._video), as_json)
        self.save(FrameCache.open(cache_path(self._asker.frames, self._name)), answer.prediction.searched_seconds, save)


class _ManyVideos(_Live):
    """Questions about a library."""

    def __init__(self, console: Console, library: Library, asker: Asker, encoder: Encoder, policy: Policy) -> None:
        super().__init__(console)
        self.policy = policy
        self._library, self._asker, self._encoder = library, asker, encoder
        self._videos: list[Entry] | None = None

    def limit(self, within: str | None) -> None:
        """Ask a part of the library alone."""
        self._videos = None if within is None else self._library.videos(within)

    async def ask(self, question: str, options: list[str], as_json: bool, save: Path | None) -> None:
        """Ask, and show what comes of it."""
        from timesearch.library.answer import ask_library

        given = await ask_library(
            self._library, self._asker, self._encoder, question, options, self._videos, self._begin
        )
        if given.video is None or given.answer is None:
            if as_json:
                nothing = {"question": question, "video": None, "predicted_answer": None}
                print_json({**nothing, "evidence": given.statement.model_dump()})
            self.line("answer", f"none: nothing in {given.found.videos} videos answers this", "bold")
            self._others(given.statement)
            return
        self.show(given.answer, given.video.name, as_json)
        self.line("video", given.video.name, "bold")
        self.save(self._library.frame_cache(given.video), given.answer.prediction.searched_seconds, save)

    def _begin(self, video: Entry) -> Watch:
        self.line("video", video.name, "magenta")
        return self


def _times(seconds: list[float]) -> str:
    return ", ".join(f"{time:.1f}s" for time in seconds)


@app.command()
def serve(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders of videos to offer.")] = None,
    model: ModelOption = None,
    url: UrlOption = None,
    encoder_url: EncoderUrlOption = None,
    host: Annotated[
        str,
        typer.Option("--host", help="Address or name to listen on; 0.0.0.0 lets in the network: set a key, too."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on.")] = 8780,
    key_file: KeyOption = None,
    library: LibraryOption = None,
    cache: CacheOption = None,
    protocol: ProtocolOption = None,
    tools: ToolsOption = None,
    speech: SpeechOption = None,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Play, search and ask videos in the browser, or by OpenAI's API (at /v1): a server on this machine."""
    import uvicorn

    from timesearch.inference.ask import as_request, default_cache
    from timesearch.serve.api import address, listen, make_app
    from timesearch.serve.keys import read_key
    from timesearch.serve.videos import check_folder

    key = read_key(key_file)
    for folder in folders or ():
        with as_request():
            check_folder(folder)
    listener = listen(host, port)
    place = cache or default_cache()
    with ExitStack() as held:
        offered: Library | None = None
        if library is None:
            opening = _open_asker(params, model, url, encoder_url, cache, protocol, tools, speech)
            asker, policy = held.enter_context(opening)
        else:
            of_library = open_library(params, library, model, url, protocol, tools, speech)
            offered, librarian, _, policy = held.enter_context(of_library)
            asker = librarian.at(place)
        page = make_app(asker, policy, folders or [], place / "uploads", host, key, library=offered)
        server = uvicorn.Server(uvicorn.Config(page, log_level="warning", http="h11", ws="none"))

        async def answer() -> None:
            await policy.connect()
            say(f"timesearch answers at {address(host, listener.getsockname()[1])} (stop with Ctrl-C)")
            await server.serve([listener])

        with suppress(KeyboardInterrupt):
            asyncio.run(answer())
