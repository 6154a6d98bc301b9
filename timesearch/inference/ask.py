"""One question about one video: frames, features, search and answer in one go, with caches kept for the next one."""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from timesearch.base.errors import ItemError, RequestError
from timesearch.base.extras import require_modules
from timesearch.base.files import atomic_path, json_digest
from timesearch.base.stopping import NEVER, Stop
from timesearch.base.untrusted import mend_text
from timesearch.data.messages import format_seconds
from timesearch.data.samples import LETTERS, Prediction, Sample, validate
from timesearch.inference.policies import Served, open_policy
from timesearch.inference.statement import Statement, state
from timesearch.search.episode import Watch, run_episode
from timesearch.search.policy import Policy
from timesearch.search.search import Search
from timesearch.settings import Settings
from timesearch.video.frames import FrameCache, cache_path, make_frame_cache, transform_of, why_stale
from timesearch.video.probe import Fingerprint
from timesearch.video.subtitles import Subtitles, find_subtitles, index_path, is_stale, make_index, speech_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from timesearch.retrieval.encoder import Encoder

Say = Callable[[str], None]
_RETRY_FOR = 15.0
"""Seconds that a person waits for an absent server."""
QUESTION_CHARS = 4000
OPTION_CHARS = 1000
_SHEET_CHARS = 32
"""Of the words above a picture: what fits its width."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f]")
"""Control characters, apart from those that break lines and indent."""


def default_cache() -> Path:
    """The user's cache folder: `XDG_CACHE_HOME` or ``~/.cache``, and in it ``timesearch``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timesearch"


def choose_checkpoint(settings: Settings, named: str | None = None) -> str:
    """The policy that answers: the one that was named, else the best that the project has made.

    Raises:
        RequestError: there is none.
    """
    if named:
        return named
    for made in (settings.paths.train, settings.paths.coldstart, settings.paths.models / "policy"):
        if (made / "config.json").is_file():
            return str(made)
    raise RequestError("there is no policy yet: run `timesearch demo`, or name one by --model or --url")


@contextmanager
def answering_policy(settings: Settings, model: str | None, url: str | None) -> Iterator[Policy]:
    """Yield the engine for questions: a server at `url`, else a checkpoint in this process.

    Raises:
        RequestError: there is no policy, or its checkpoint does not fit the settings.
    """
    if url:
        with open_policy(settings, at=Served([url], model or settings.infer.model or "", _RETRY_FOR)) as policy:
            yield policy
        return
    from timesearch.search.checkpoint import check_fit

    checkpoint = choose_checkpoint(settings, model)
    require_modules("a policy in this process", "torch", "transformers", instead="name a server of one by --url")
    check_fit(checkpoint, settings.search)
    with open_policy(settings, Path(checkpoint), start_server=False) as policy:
        yield policy


def check_question(question: str, options: Sequence[str] = ()) -> None:
    """Refuse what no model should be asked.

    Raises:
        RequestError: the question or an option is empty, too long or no text, or there are too many options.
    """
    if not question.strip():
        raise RequestError("the question is empty: write what you want to know about the video")
    if len(options) > len(LETTERS):
        raise RequestError(f"there are {len(options)} options, and letters for {len(LETTERS)}: leave some out")
    for what, text, most in (
        ("the question", question, QUESTION_CHARS),
        *((f"option {LETTERS[number]}", option, OPTION_CHARS) for number, option in enumerate(options)),
    ):
        if not text.strip():
            raise RequestError(f"{what} is empty: write it, or leave it out")
        if len(text) > most:
            raise RequestError(f"{what} is {len(text)} characters long: ask in at most {most}")
        if "\ufffd" in mend_text(text):
            raise RequestError(f"{what} holds a character that is cut in two or in another encoding: write it in UTF-8")
        if _CONTROL.search(text):
            raise RequestError(f"{what} holds control characters: leave them out")


@dataclass(frozen=True)
class Answer:
    """The episode that answers a question, and what its answer rests on."""

    prediction: Prediction
    statement: Statement


class Asker:
    """Answers questions about video files, whose caches it makes and keeps.

    Args:
        settings: of frames, features and search, and of the model that hears what is said where there are no subtitles.
        policy: searches and answers.
        encoder: embeds frames and queries.
        cache: folder of the caches; a video is known by its path, size and time of change.

    Attributes:
        encoder: as given.
        frames: folder of the frame caches.
    """

    def __init__(self, settings: Settings, policy: Policy, encoder: Encoder, cache: Path) -> None:
        self._settings, self._policy, self.encoder = settings, policy, encoder
        self.frames = cache / "frames"
        self._features = cache / "features" / encoder.digest[:16]
        self._subtitles = cache / "subtitles"
        self._speech = speech_of(settings.subtitles.speech)
        self._sources: dict[str, Path] = {}
        self._ready: dict[str, tuple[Fingerprint | None, ...]] = {}

    def at(self, cache: Path) -> Asker:
        """The same with other caches, such as those of a library."""
        return Asker(self._settings, self._policy, self.encoder, cache)

    def features_of(self, name: str) -> Path:
        """Where the feature cache of a video is, once it has been prepared."""
        return self._features / f"{name}.safetensors"

    def name_of(self, video: Path) -> str:
        """The name under which the caches know a video as it is now.

        Raises:
            ItemError: there is no such file.
        """
        try:
            stat = video.stat()
        except (OSError, ValueError) as error:
            raise ItemError(f"{video} cannot be read ({error})", reason="missing") from error
        made_of = [str(video.absolute()), stat.st_size, stat.st_mtime_ns, transform_of(self._settings.frames)]
        name = json_digest(made_of)[:24]
        self._sources[name] = video
        return name

    def is_known_ready(self, video: Path, name: str) -> bool:
        """Whether this process has found a video's caches to be whole, and they, and the subtitle file beside it, are
        as they were then: at once.
        """
        with suppress(OSError):
            return self._ready.get(name) == self._state(video, name)
        return False

    def is_ready(self, video: Path) -> bool:
        """Whether a video's caches are whole; what was not seen before is read for that.

        Raises:
            ItemError: there is no such file.
        """
        from timesearch.retrieval.features import why_stale as why_features_stale

        name = self.name_of(video)
        frames, features = self._paths(name)
        try:
            state = self._state(video, name)
            ready = (
                why_stale(frames, video, self._settings.frames) is None
                and why_features_stale(features, FrameCache.open(frames), self.encoder) is None
                and not is_stale(video, index_path(self._subtitles, name), self._speech)
            )
        except (OSError, ItemError):
            return False
        if ready:
            self._ready[name] = state
        return ready

    def prepare(self, video: Path, say: Say = lambda _: None, stop: Stop = NEVER) -> str:
        """Cache a video's frames and features where that has not been done.

        Args:
            video: the file.
            say: told what takes time.
            stop: gives it up.

        Returns:
            The name under which the caches know the video.

        Raises:
            ItemError: the file is no video that can be used.
            RequestError: the caches cannot be written, or the model that hears cannot be had.
            StoppedError: it was given up.
        """
        from timesearch.retrieval.features import make_feature_cache
        from timesearch.retrieval.features import why_stale as why_features_stale

        name = self.name_of(video)
        frames, features = self._paths(name)
        stop.check()
        try:
            if why_stale(frames, video, self._settings.frames) is not None:
                say(f"reading {video.name}")
                make_frame_cache(video, frames, self._settings.frames, stop=stop)
            if why_features_stale(features, FrameCache.open(frames), self.encoder) is not None:
                say(f"looking at {len(FrameCache.open(frames))} frames")
                make_feature_cache(frames, features, self.encoder, self._settings.features.batch_size, stop)
            self._index_words(video, name, say, stop)
            self._ready[name] = self._state(video, name)
        except OSError as error:
            where = error.filename or self.frames.parent
            raise RequestError(
                f"the caches of {video.name} cannot be made ({error.strerror}, {where}): make room, or choose another "
                "folder by --cache"
            ) from error
        return name

    def forget(self, video: Path) -> None:
        """Remove the caches of a video as it is now, where there are any.

        Raises:
            ItemError: there is no such file.
        """
        name = self.name_of(video)
        for path in (*self._paths(name), index_path(self._subtitles, name)):
            path.unlink(missing_ok=True)
        self._ready.pop(name, None)
        self._sources.pop(name, None)

    def words_of(self, name: str) -> Subtitles | None:
        """What is said in a prepared video, by the name of its caches; None where that is not known.

        Raises:
            ItemError: `damaged_subtitles`.
        """
        path = index_path(self._subtitles, name)
        return Subtitles(path) if path.is_file() else None

    def _index_words(self, video: Path, name: str, say: Say, stop: Stop) -> None:
        """Make the words of a video searchable; it can be asked about its pictures where its subtitles are bad."""
        try:
            make_index(video, index_path(self._subtitles, name), None, say, self._speech, stop)
        except ItemError as error:
            say(str(error))

    def _paths(self, name: str) -> tuple[Path, Path]:
        return cache_path(self.frames, name), self.features_of(name)

    def _state(self, video: Path, name: str) -> tuple[Fingerprint | None, ...]:
        beside, index = find_subtitles(video), index_path(self._subtitles, name)
        said = (path if path is not None and path.is_file() else None for path in (beside, index))
        return tuple(Fingerprint.of(path) if path is not None else None for path in (*self._paths(name), *said))

    async def ask(
        self, name: str, question: str, options: Sequence[str] = (), watch: Watch | None = None, shown_as: str = ""
    ) -> Answer:
        """Search a prepared video for the answer.

        Args:
            name: of its caches.
            question: what to find out.
            options: choices, where the answer is one of several.
            watch: is told of each step as it happens.
            shown_as: what the video is called in the statement; its name in the caches where that is left out.

        Raises:
            RequestError: as `check_question`.
        """
        check_question(question, options)
        search = Search(
            self._settings.search,
            self.encoder,
            self.frames,
            self._features,
            encoded=self._policy.encoded,
            subtitles=self._subtitles,
            source_of=self._sources.get,
        )
        kind = "multiple_choice" if options else "open_ended"
        row = {"id": name, "video": name, "question": question, "options": list(options), "type": kind}
        sample = validate(Sample, row, "the question")
        prediction = await run_episode(search, self._policy, sample, watch)
        return Answer(prediction, await asyncio.to_thread(state, prediction, search, shown_as or name))


@contextmanager
def as_request() -> Iterator[None]:
    """A request about one video fails with that video: its error becomes the request's."""
    try:
        yield
    except ItemError as error:
        raise RequestError(str(error)) from error


def contact_sheet(frames: FrameCache, seconds: Sequence[float], target: Path, width: int = 240) -> None:
    """Write a PNG with the frames at `seconds`, as `picture_sheet`.

    Raises:
        RequestError: there are no frames, or the file cannot be written.
    """
    picture_sheet([(format_seconds(time), frames[frames.nearest(time)]) for time in seconds], target, width)


def picture_sheet(pictures: Sequence[tuple[str, Image]], target: Path, width: int = 240) -> None:
    """Write a PNG with some pictures, each under its words, four a row and `width` pixels wide.

    Raises:
        RequestError: there are no pictures, or the file cannot be written.
    """
    if not pictures:
        raise RequestError("no frame was found, so there is no contact sheet to save")
    from PIL import Image, ImageDraw

    height = max(round(width * picture.height / picture.width) for _, picture in pictures)
    band, columns = 20, min(4, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + band)), "white")
    draw = ImageDraw.Draw(sheet)
    for position, (words, picture) in enumerate(pictures):
        left, top = position % columns * width, position // columns * (height + band)
        shown = picture.resize((width, round(width * picture.height / picture.width)))
        sheet.paste(shown, (left, top + band))
        draw.text((left + 6, top + 3), mend_text(words)[-_SHEET_CHARS:], fill="black", font_size=14)
    try:
        with atomic_path(target) as partial:
            sheet.save(partial, "PNG")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"{target} cannot be written ({why}): name another file") from error
