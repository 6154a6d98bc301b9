"""The command `ask`: search and answer about real footage, and refusals in one sentence."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import reference_clone
from PIL import Image
from players import MeanColour, Puppet, answer_turn, script, search_turn
from synthetic import make_video

import timesearch.cli.inference as commands
from timesearch.cli import main
from timesearch.data.messages import Message, text_of
from timesearch.inference.ask import Asker, contact_sheet, default_cache
from timesearch.search.policy import EngineError
from timesearch.search.reference import import_protocol
from timesearch.settings import Settings


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run `ask` with a scripted policy; gives exit code, standard output and standard error."""
    settings = Settings.model_validate(
        {"frames": {"factor": 32, "min_pixels": 4096, "max_pixels": 4096}, "search": {"patch": 32, "max_turns": 4}}
    )
    policy = Puppet(
        script(search_turn("red car", "Where is\x1b[31m it?\n", end_time=20, num_frames=3), answer_turn("red"))
    )
    asker = Asker(settings, policy, MeanColour(), tmp_path / "cache")
    monkeypatch.setattr(commands, "_open_asker", lambda *_: nullcontext((asker, policy)))

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["ask", *arguments])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def test_the_search_is_shown_and_the_second_question_reads_nothing_again(
    footage: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    video, sheet = str(footage / "car-detection.mp4"), tmp_path / "sheet.png"
    code, out, _ = run(video, "What colour is the car?", "--save", str(sheet))
    assert code == 0
    lines = [line.split(maxsplit=1)[0] for line in out.splitlines()]
    assert lines == ["question", "preview", "turn", "call", "found", "turn", "answer", "seen", "looked", "saved"]
    assert "seek_video_frames: red car, end_time 20" in out
    assert "from what was found alone: the same answer" in out
    assert "\x1b[31m" not in out
    with Image.open(sheet) as picture:
        assert picture.format == "PNG"
        assert picture.width == 3 * 240

    def refuse(*_: object) -> None:
        raise AssertionError("the caches were made again")

    monkeypatch.setattr("timesearch.inference.ask.make_frame_cache", refuse)
    monkeypatch.setattr("timesearch.retrieval.features.make_feature_cache", refuse)
    code, out, _ = run(video, "And the second?", "And the third?", "--json")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["question"] for row in rows] == ["And the second?", "And the third?"]
    assert rows[0]["predicted_answer"] == "red"
    assert rows[0]["video"] == video
    assert all(time <= 20 for time in rows[0]["searched_seconds"])


def test_a_protocol_is_chosen_for_a_question_and_budgets_are_those_of_inference(
    footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_protocol(reference_clone.make_clone(tmp_path / "clone"), tmp_path / "protocol")
    policy = Puppet(script('<tool_call>{"name": "seek_video_frames", "arguments": {}}</tool_call>'))
    monkeypatch.setattr("timesearch.inference.ask.answering_policy", lambda *_: nullcontext(policy))
    monkeypatch.setattr("timesearch.retrieval.encoder.load_encoder", lambda *_: MeanColour())
    params = tmp_path / "params.yaml"
    params.write_text(f"paths: {{models: {tmp_path / 'none'}}}\ninfer: {{budgets: {{max_turns: 3}}}}\n")
    choices = ("--protocol", str(tmp_path / "protocol"), "--params", str(params), "--cache", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as ended:
        main(["ask", str(footage / "car-detection.mp4"), "What is it?", *choices])
    assert not ended.value.code
    assert [message["role"] for message in policy.seen[0]] == ["system", "user"]
    assert policy.seen[0][0]["content"] == reference_clone.WHOLE_SYSTEM
    assert len([messages for messages in policy.seen if messages[0]["content"] == reference_clone.WHOLE_SYSTEM]) == 3


def test_damaged_caches_are_made_again(tmp_path: Path, run) -> None:
    video = str(make_video(tmp_path / "video.mp4", seconds=5))
    assert run(video, "What?")[0] == 0
    (frames,), (features,) = (tmp_path / "cache").rglob("frames/*"), (tmp_path / "cache").rglob("*.safetensors")
    for cache in (frames, features):
        whole = cache.read_bytes()
        cache.write_bytes(whole[:-300])
        assert run(video, "What?")[0] == 0
        assert cache.read_bytes() == whole


def test_a_guess_is_an_answer_without_a_contact_sheet(footage: Path, tmp_path: Path, run) -> None:
    _, policy = commands._open_asker().enter_result
    policy.speak = script(answer_turn("red"))
    sheet = tmp_path / "sheet.png"
    code, out, _ = run(str(footage / "car-detection.mp4"), "What colour is the car?", "--save", str(sheet))
    assert code == 0
    assert "this is a guess from the preview" in out
    assert "saved     nothing" in out
    assert not sheet.exists()


def test_what_ends_a_question_is_said_in_one_sentence(tmp_path: Path, run) -> None:
    video = str(make_video(tmp_path / "video.mp4", seconds=5))
    _, policy = commands._open_asker().enter_result
    for error, code, says in (
        (EngineError("the server went away"), 75, "the server went away"),
        (EngineError("the server refused", "refused"), 1, "the server refused"),
        (KeyboardInterrupt(), 130, "stopped; what is done is kept"),
    ):

        def fail(_: object, error: BaseException = error) -> str:
            raise error

        policy.speak = fail
        ended, _, err = run(video, "What?")
        assert (ended, len(err.strip().splitlines())) == (code, 1)
        assert says in err


def test_one_question_that_fails_does_not_stop_the_next(tmp_path: Path, run) -> None:
    video = str(make_video(tmp_path / "video.mp4", seconds=5))
    _, policy = commands._open_asker().enter_result
    speak = policy.speak

    def fail_once(messages: Sequence[Message]) -> str:
        if any("zebra" in text_of(message) for message in messages):
            raise EngineError("the server refused", "refused")
        return speak(messages)

    policy.speak = fail_once
    code, out, err = run(video, "A zebra?", "The second?")
    assert (code, "answer    red" in out, "failed    the server refused" in out) == (1, True, True)
    assert err == "timesearch: 1 of 2 questions got no answer, the last because the server refused\n"
    code, out, _ = run(video, "A zebra?", "The second?", "--json")
    assert [json.loads(line)["outcome"] for line in out.splitlines()] == ["failed", "answered"]


def test_typed_questions_that_cannot_be_asked_are_said_and_passed(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = str(make_video(tmp_path / "video.mp4", seconds=5))
    monkeypatch.setattr("sys.stdin", io.StringIO("a\0b\n" + "x" * 5000 + "\nWhat?\n\n"))
    code, out, _ = run(video)
    assert (code, out.count("answer    red")) == (0, 1)
    assert "the question holds control characters" in out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?\n"), encoding="utf-8"))
    assert run(video)[::2] == (2, "timesearch: the questions are not UTF-8 text: write them so\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["notes.mp4", "What?"],
        ["absent.mp4", "What?"],
        [".", "What?"],
        ["loop.mp4", "What?"],
        ["pipe.mp4", "What?"],
        ["a" * 300 + ".mp4", "What?"],
        ["a/" * 3000 + "b.mp4", "What?"],
        ["caf\udce9.mp4", "What?"],
        ["video.mp4", ""],
        ["video.mp4", "What?", " \n "],
        ["video.mp4", "caf\udce9?"],
        ["video.mp4", "half \ud83d?"],
        ["video.mp4", "a\0b"],
        ["video.mp4", "\x1b[31mred"],
        ["video.mp4", "x" * 2**20],
        ["video.mp4", "What?", *["--option=a"] * 27],
        ["video.mp4", "What?", "--option=a", "--option="],
        ["video.mp4", "What?", "--option=caf\udce9"],
        ["video.mp4", "What?", "--option=" + "x" * 2**17],
        ["video.mp4", "What?", "--save=."],
        ["video.mp4", "What?", "--save=" + "a" * 300 + ".png"],
        ["video.mp4", "What?", "--save=video.mp4/sheet.png"],
    ],
    ids=lambda arguments: ascii(arguments)[:60],
)
def test_what_cannot_be_asked_is_refused_in_one_sentence(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_video(Path("video.mp4"), seconds=1)
    Path("notes.mp4").write_text("These are notes, not a video.\n" * 50)
    Path("loop.mp4").symlink_to("loop.mp4")
    os.mkfifo("pipe.mp4")
    code, out, err = run(*arguments)
    assert code == 2
    assert out == "" or any("--save" in argument for argument in arguments)
    assert len(err.strip().splitlines()) == 1
    assert len(err) < 6500  # a path may be as long as that


SAID = search_turn("bottle", tool="search_subtitles")
SEEN = search_turn("a bottle", start_time=10, end_time=16, num_frames=2)


@pytest.mark.parametrize(
    ("turns", "rests"),
    [
        ([SAID], ["said at   12.0s; from"]),
        ([SEEN], ["seen at   10.0s, 13.5s; from"]),
        ([SAID, SEEN], ["seen at   10.0s, 13.5s", "said at   12.0s; from"]),
    ],
)
def test_what_is_said_beside_a_real_clip_supports_the_answer(
    turns: list[str], rests: list[str], footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    video = Path(shutil.copy(footage / "bottle-detection.mp4", tmp_path))
    video.with_suffix(".srt").write_text("1\n00:00:12,000 --> 00:00:14,500\nHere comes the <i>green</i> bottle.\n")
    frames = {"factor": 32, "min_pixels": 4096, "max_pixels": 4096}
    search = {"patch": 32, "tools": ["seek_video_frames", "search_subtitles"]}
    settings = Settings.model_validate({"frames": frames, "search": search})
    policy = Puppet(script(*turns, answer_turn("green")))
    asker = Asker(settings, policy, MeanColour(), tmp_path / "cache")
    monkeypatch.setattr(commands, "_open_asker", lambda *_: nullcontext((asker, policy)))
    with pytest.raises(SystemExit) as ended:
        main(["ask", str(video), "What colour is the bottle?"])
    out = capsys.readouterr().out
    assert ended.value.code in (0, None)
    assert [line.partition(" what")[0] for line in out.splitlines() if line[:7] in ("seen at", "said at")] == rests
    assert ("12.0s Here comes the green bottle." in out) == (SAID in turns)


def test_no_contact_sheet_without_frames(tmp_path: Path) -> None:
    from timesearch.base.errors import RequestError

    with pytest.raises(RequestError, match="no frame was found"):
        contact_sheet(None, [], tmp_path / "sheet.png")  # type: ignore[arg-type]


def test_caches_go_to_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "timesearch"


def test_speech_is_refused_where_its_words_could_not_be_found(tmp_path: Path, footage: Path, capsys) -> None:
    video = str(footage / "car-detection.mp4")
    for arguments, says in (
        ([video, "What?"], "--speech writes words down for the tool search_subtitles, which is not offered"),
        (["--library", str(tmp_path), "What?"], "`timesearch index --speech MODEL`"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["ask", *arguments, "--speech", "tiny", "--params", str(tmp_path / "none.yaml")])
        assert (ended.value.code, says in capsys.readouterr().err) == (2, True)
