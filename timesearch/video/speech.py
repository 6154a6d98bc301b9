"""What is said in a video without subtitles, written down by faster-whisper (the extra `asr`).

A transcript is a file of Whisper's JSON, one a video, written when it is whole: a run that was stopped goes on with the
next video. Sound is decoded in pieces, so that memory does not grow with a video's length; a piece ends where it is
quietest, between two words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from timesearch.base.digests import remembered
from timesearch.base.errors import ItemError, RequestError
from timesearch.base.extras import require_modules
from timesearch.base.files import json_digest, write_json
from timesearch.base.stopping import NEVER, Stop
from timesearch.base.untrusted import UntrustedError, mend_text, parse_json
from timesearch.video.probe import open_video

RATE = 16_000
"""Samples a second that Whisper hears."""
_PIECE = 600
"""Seconds of sound that are held and heard at a time."""
_TAIL = 20
"""Seconds at the end of a piece, in which the quietest place ends it."""
_QUIET = RATE // 5
"""Samples over which quietness is measured."""


class Speech:
    """A model that writes down what is said.

    Args:
        model: name of a faster-whisper model (``small``, ``large-v3``), its name on the hub, or a local folder.

    Raises:
        RequestError: the folder holds no such model.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        weights = Path(model) / "model.bin"
        if Path(model).is_dir() and not weights.is_file():
            raise RequestError(f"{model} holds no faster-whisper model (model.bin): name another folder, or a model")
        self.digest = remembered(weights) if weights.is_file() else model

    @cached_property
    def _whisper(self) -> Any:
        """The model, loaded when it is first needed."""
        require_modules("writing down speech", "faster_whisper", instead="bring subtitle files")
        from faster_whisper import WhisperModel

        from timesearch.base.hub import fetch_error, unreached

        failures: tuple[type[BaseException], ...] = (*unreached(), ValueError, RuntimeError, OSError)
        try:
            return WhisperModel(self._model)
        except failures as error:
            raise fetch_error(f"the speech model {self._model!r} cannot be loaded", error) from error

    def has_heard(self, video: Path, target: Path) -> bool:
        """Whether `target` is what this model heard in a video as it is now, be it nothing."""
        return _segments_in(target, self._made_of(video)) is not None

    def _made_of(self, video: Path) -> str:
        return json_digest([remembered(video), self.digest])

    def write_down(
        self,
        video: Path,
        target: Path,
        begins: float,
        say: Callable[[str], None] = lambda _: None,
        stop: Stop = NEVER,
    ) -> Path | None:
        """Write what is said in a video to `target`, unless it stands there already; None where nothing is said.

        Args:
            video: the file.
            target: Whisper's JSON, with times from the video's first frame.
            begins: time of the first frame on the container's clock (s).
            say: told how far a long video has come.
            stop: gives it up between two sentences.

        Raises:
            ItemError: the video's sound cannot be decoded.
            RequestError: the model cannot be had, as where there are no weights; TemporaryError where the hub is away.
            StoppedError: it was given up.
        """
        made_of = self._made_of(video)
        segments = _segments_in(target, made_of)
        if segments is None:
            segments = []
            for start, sound in _pieces(video):
                if start > 0:
                    say(f"{video.name}: heard {start / 60:.0f} minutes")
                heard, _ = self._whisper.transcribe(sound, vad_filter=True)
                for each in heard:  # as it is heard
                    stop.check()
                    first, last = (round(start + time - begins, 2) for time in (each.start, each.end))
                    if last > 0:
                        segments.append({"start": max(0.0, first), "end": last, "text": mend_text(each.text).strip()})
            write_json(target, {"made_of": made_of, "segments": segments})
        return target if segments else None


def _segments_in(transcript: Path, made_of: str) -> list[Any] | None:
    """The segments of a transcript of the same sound by the same model; None where there is none."""
    with suppress(OSError, UntrustedError):
        value = parse_json(transcript.read_bytes())
        if isinstance(value, dict) and value.get("made_of") == made_of and isinstance(value.get("segments"), list):
            return list(value["segments"])
    return None


def _pieces(video: Path) -> Iterator[tuple[float, np.ndarray]]:
    """The sound of a video, piece by piece: when each begins on the container's clock (s), and samples in [-1, 1].

    Nothing where it has no sound.

    Raises:
        ItemError: `undecodable_sound`, or the video cannot be opened.
    """
    import av

    with open_video(video) as container:
        if not container.streams.audio:
            return
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        held: list[np.ndarray] = []
        start: float | None = None
        try:
            for frame in container.decode(stream):
                if start is None:
                    start = float(frame.time or 0.0)
                held += [part.to_ndarray().reshape(-1) for part in resampler.resample(frame)]
                if sum(map(len, held)) >= _PIECE * RATE:
                    sound = np.concatenate(held)
                    cut = _quietest(sound)
                    yield start, sound[:cut]
                    held, start = [sound[cut:]], start + cut / RATE
        except av.FFmpegError as error:
            if start is None:
                raise ItemError(
                    f"the sound of {video} cannot be decoded ({error.strerror}): fetch it again",
                    reason="undecodable_sound",
                ) from error
        if start is not None and held:  # where the sound breaks off, what came before is heard
            yield start, np.concatenate(held)


def _quietest(sound: np.ndarray) -> int:
    """The middle of the quietest place near the end of a piece, in samples."""
    tail = sound[-_TAIL * RATE :]
    loud = np.square(tail[: len(tail) // _QUIET * _QUIET]).reshape(-1, _QUIET).mean(axis=1)
    return len(sound) - len(tail) + int(loud.argmin()) * _QUIET + _QUIET // 2
