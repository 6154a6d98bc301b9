"""What is said: subtitle files in all forms and states, their index, and the tool that searches it."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from players import MeanColour, Puppet, answer_turn, build_library, play_all, script
from scripted import OracleEncoder

from timesearch.base.errors import ItemError, RequestError
from timesearch.base.files import json_digest
from timesearch.data.messages import exchanges, text_of
from timesearch.data.rows import read_samples
from timesearch.inference.ask import Asker
from timesearch.inference.fingerprint import fingerprint_of
from timesearch.inference.journal import Journal
from timesearch.inference.playing import Job
from timesearch.profiles import load_profile
from timesearch.search.episode import run_episode
from timesearch.search.search import Search
from timesearch.settings import Settings
from timesearch.video.subtitles import (
    LINE_CHARS,
    Line,
    Source,
    Subtitles,
    Transcript,
    find_subtitles,
    index_path,
    index_subtitles,
    read_subtitles,
    run,
    write_index,
)

SRT = """1
00:00:01,000 --> 00:00:02,500
<i>Good morning</i>, everyone.

2
00:00:03,000 --> 00:00:04,000
The red car is parked outside.
"""
ASS = """[Script Info]
ScriptType: v4.00+

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Dialogue: 0,0:00:01.00,0:00:02.50,Default,,0,0,0,,{\\i1}Good morning{\\i0}, everyone.
Comment: 0,0:00:01.00,0:00:02.50,Default,,0,0,0,,nobody says this
Dialogue: 0,0:00:03.00,0:00:04.00,Default,,0,0,0,,The red car is parked\\Noutside.
"""
SPOKEN = (Line(1.0, 2.5, "Good morning, everyone."), Line(3.0, 4.0, "The red car is parked outside."))


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


FORMS = {
    "a.srt": SRT,
    "a.vtt": "WEBVTT\n\n00:01.000 --> 00:02.500 align:start\n<c>Good</c> morning, everyone.\n\n"
    "00:03.000 --> 00:04.000\nThe red car is parked outside.\n",
    "a.ass": ASS,
    "LongVideoBench.json": json.dumps(
        [
            {"start": "00:00:01.000", "end": "00:00:02.500", "line": "Good morning, everyone."},
            {"timestamp": [3.0, 4.0], "text": "The red car is parked outside."},
        ]
    ),
    "whisper.json": json.dumps({"segments": [{"start": a.start, "end": a.end, "text": f" {a.text}"} for a in SPOKEN]}),
    "utf16.srt": SRT.encode("utf-16"),
    "utf8-mark.srt": SRT.encode("utf-8-sig"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_lines(name: str, tmp_path: Path) -> None:
    assert read_subtitles(written(tmp_path / name, FORMS[name])) == Transcript(SPOKEN)


def srt(*cues: tuple[str, str, str]) -> str:
    return "".join(f"{number}\n{start} --> {end}\n{text}\n\n" for number, (start, end, text) in enumerate(cues, 1))


ODD = {
    "latin-1": (srt(("00:00:01,000", "00:00:02,000", "Café")).encode("latin-1"), "Windows-1252", ["Café"]),
    "UTF-16 without a mark": (SRT.encode("utf-16-le"), "without a byte-order mark", [a.text for a in SPOKEN]),
    "UTF-16 the other way round": (SRT.encode("utf-16-be"), "without a byte-order mark", [a.text for a in SPOKEN]),
    "Chinese in UTF-16 without a mark": (
        srt(("00:00:01,000", "00:00:02,000", "红色的汽车停在外面")).encode("utf-16-le"),
        "without a byte-order mark",
        ["红色的汽车停在外面"],
    ),
    "reversed": (
        srt(("00:00:05,000", "00:00:02,000", "back"), ("00:00:06,000", "00:00:07,000", "fine")),
        "1 of its lines end before they start",
        ["fine"],
    ),
    "overlapping": (
        srt(("00:00:01,000", "00:00:09,000", "one"), ("00:00:02,000", "00:00:03,000", "two")),
        "",
        ["one", "two"],
    ),
    "out of order": (
        srt(("00:00:08,000", "00:00:09,000", "late"), ("00:00:02,000", "00:00:03,000", "early")),
        "",
        ["early", "late"],
    ),
    "a line of 1 MB": (
        srt(("00:00:01,000", "00:00:02,000", "word " * 200_000), ("00:00:03,000", "00:00:04,000", "fine")),
        "longer than 500 characters",
        [("word " * 200)[:LINE_CHARS], "fine"],
    ),
    "markup": (
        srt(
            (
                "00:00:01,000",
                "00:00:02,000",
                '<font color="#fff"><b>Hi</b></font> {\\an8}there<script>run()</script>',
            )
        ),
        "",
        ["Hi thererun()"],
    ),
    "rolling captions": (
        srt(
            ("00:00:01,000", "00:00:02,000", "so this"),
            ("00:00:02,000", "00:00:03,000", "so this\nis a cat"),
            ("00:00:03,000", "00:00:04,000", "is a cat\nand a dog"),
        ),
        "",
        ["so this", "is a cat", "and a dog"],
    ),
    "of another video": (
        srt(("00:00:01,000", "00:00:02,000", "here"), ("01:00:00,000", "01:00:01,000", "there")),
        "may be another video's",
        ["here", "there"],
    ),
    "half a character": (json.dumps([{"start": 1, "end": 2, "line": "a\ud83d"}]).encode(), "", ["a\ufffd"]),
    "times of no kind": (
        json.dumps([{"start": start, "end": 2, "line": "x"} for start in (None, "soon", True, -1, 1e12, [], {})])[:-1]
        + ', {"start": 1, "end": null, "line": "fine"}]',
        "7 of its lines have no time",
        ["fine"],
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_odd_is_named_and_the_rest_is_read(kind: str, tmp_path: Path) -> None:
    data, problem, lines = ODD[kind]
    name = "a.json" if kind in ("half a character", "times of no kind") else "a.srt"
    transcript = read_subtitles(written(tmp_path / name, data), duration=100.0)
    assert [line.text for line in transcript.lines] == [" ".join(line.split()) for line in lines]
    assert problem in "; ".join(transcript.problems)
    assert bool(transcript.problems) == bool(problem)


BAD = {
    "empty.srt": b"",
    "blank.srt": b"\n\n \n",
    "binary.srt": bytes(range(256)) * 40,
    "picture.vtt": b"\x89PNG\r\n\x1a\n" + b"\0" * 500,
    "frames.srt": b"{0}{25}A rate of frames would be needed.\n",
    "only-reversed.srt": srt(("00:00:05,000", "00:00:02,000", "back")).encode(),
    "number.json": b"3",
    "deep.json": b"[" * 10_000,
    "words.json": b'["a", "b"]',
    "huge.srt": b"x" * (17 * 2**20),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_without_lines_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(ItemError, match="mend the file, or take it away") as caught:
        read_subtitles(written(tmp_path / name, BAD[name]))
    assert caught.value.reason == "bad_subtitles"
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_bytes_are_lines_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for name, head in (("a.srt", SRT.encode()), ("a.vtt", b"WEBVTT\n\n"), ("a.ass", b"[Events]\n"), ("a.json", b"[")):
        for text in (data, head + data):
            try:
                lines = read_subtitles(written(folder / name, text)).lines
            except ItemError:
                continue
            assert all(0 <= line.start <= line.end and line.text.strip() for line in lines)


def indexed(folder: Path, *lines: Line) -> Subtitles:
    write_index(Transcript(lines), folder / "a.subtitles", "digest")
    return Subtitles(folder / "a.subtitles")


def test_the_index_finds_words_within_a_window(tmp_path: Path) -> None:
    words = indexed(
        tmp_path,
        Line(1, 3, "A car stops."),
        Line(10, 12, "Two red cars stop and a red car goes."),
        Line(20, 22, "Nothing is said of vehicles."),
        Line(30, 32, "Un café, s'il vous plaît"),
        Line(40, 42, "赤い車が止まる"),
    )

    def found(query: str, start: float = 0, end: float = 99, count: int = 8) -> list[float]:
        return [line.start for line in words.search(query, start, end, count)]

    assert found("cars") == [1, 10]
    assert found("red car", count=1) == [10]
    assert found("car", start=2) == [1, 10]  # the first is still being said
    assert found("car", start=4) == [10]
    assert found("car", end=9) == [1]
    assert found("CAFE plait") == [30]
    assert found("車") == [40]
    assert found("zebra") == []
    assert words.end == 42


@pytest.mark.parametrize(
    "query", ['"', "car OR", "NEAR(", "a AND NOT", "*", "words:car", "; DROP TABLE lines", "%", "\0"]
)
def test_nothing_in_a_query_is_a_command(query: str, tmp_path: Path) -> None:
    words = indexed(tmp_path, Line(1, 2, "a car"))
    assert len(words.search(query, 0, 9, 5)) <= 1
    assert len(words.search("car", 0, 9, 5)) == 1


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    indexed(tmp_path, Line(1, 2, "a car"))
    path = tmp_path / "a.subtitles"
    for data in (path.read_bytes()[:3000], b"", b"no database" * 100):
        path.write_bytes(data)
        with pytest.raises(ItemError, match="run `timesearch subtitles` again") as caught:
            Subtitles(path)
        assert caught.value.reason == "damaged_subtitles"


def test_files_beside_and_streams_inside_are_indexed_once(tmp_path: Path, footage: Path) -> None:
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    videos = tmp_path / "videos"
    videos.mkdir()
    clip = footage / "car-detection.mp4"
    beside, silent = shutil.copy(clip, videos / "beside.mp4"), shutil.copy(clip, videos / "silent.mp4")
    subtitle = written(videos / "beside.en.srt", SRT)
    inside = videos / "inside.mkv"
    mux = ("-map", "0:v", "-map", "1:s", "-c", "copy", "-c:s", "srt")
    subprocess.run([ffmpeg, "-loglevel", "error", "-i", clip, "-i", subtitle, *mux, inside], check=True)
    named = {path.name: path for path in (beside, silent, inside)}
    named["cut.mp4"] = shutil.copy(clip, videos / "cut.mp4")
    named["bad.mp4"] = shutil.copy(clip, videos / "bad.mp4")
    written(videos / "bad.srt", b"\0")
    sources = {"cut.mp4": Source(subtitle, offset=2.0)}
    said: list[str] = []
    out = tmp_path / "out"

    result = index_subtitles(named, out, sources, said.append)
    assert sorted(result.done) == ["beside.mp4", "cut.mp4", "inside.mkv"]
    assert [(failure.item, failure.reason) for failure in result.failures] == [("bad.mp4", "bad_subtitles")]
    assert not index_path(out, "silent.mp4").exists()
    for name in ("beside.mp4", "inside.mkv"):
        assert Subtitles(index_path(out, name)).search("good car", 0, 99, 9) == list(SPOKEN)
    cut = Subtitles(index_path(out, "cut.mp4")).search("good car", 0, 99, 9)
    assert cut == [Line(0.0, 0.5, SPOKEN[0].text), Line(1.0, 2.0, SPOKEN[1].text)]

    assert index_subtitles(named, out, sources).done == []
    written(subtitle, SRT.replace("red", "blue"))
    assert sorted(index_subtitles(named, out, sources).done) == ["beside.mp4", "cut.mp4"]
    assert [line.start for line in Subtitles(index_path(out, "beside.mp4")).search("blue", 0, 99, 9)] == [3.0]
    assert find_subtitles(silent) is None


def test_a_policy_finds_words_and_answers_from_them(tmp_path: Path) -> None:
    """The lines are evidence: the re-answer is asked from them, in order of time with frames."""
    library = build_library(tmp_path, videos=2)
    library.search.tools, library.search.max_turns = ["seek_video_frames", "search_subtitles"], 8
    first, second = read_samples(library.paths.test_samples)
    folder = tmp_path / "subtitles"
    write_index(Transcript(SPOKEN), index_path(folder, first.video), "digest")
    search = Search(library.search, OracleEncoder(), library.paths.frames, library.paths.features, subtitles=folder)

    def call(**arguments: object) -> str:
        body = json.dumps({"name": "search_subtitles", "arguments": arguments})
        return f"<think>Listen.</think>\n<tool_call>\n{body}\n</tool_call>"

    turns = [call(query="cars"), call(query="zebra"), call(query="", num_lines=0), answer_turn("red")]
    puppet = Puppet(script(*turns))
    played = asyncio.run(run_episode(search, puppet, first))
    found, nothing, wrong = exchanges(played.prediction)
    assert [(each.text, each.seconds) for each in found.evidence] == [("3.0s The red car is parked outside.", 3.0)]
    assert nothing.evidence == ()
    assert "query must be a few words" in wrong.said
    assert played.reanswer == "red"
    assert "The red car is parked outside." in text_of(puppet.seen[-1][0])

    puppet = Puppet(script(call(query="cars"), answer_turn("red")))
    (silent,) = exchanges(asyncio.run(run_episode(search, puppet, second)).prediction)
    assert "this video has no subtitles" in silent.said


def test_the_stage_finds_the_words_of_published_rows(tmp_path: Path, footage: Path) -> None:
    """Video-MME's beside in a folder of their own, LongVideoBench's by the name and the beginning that a row tells;
    a file that is named and missing, or bad, is named, and the rest is done."""
    settings = Settings()
    paths = settings.paths
    paths.videos, paths.subtitles = tmp_path / "videos", tmp_path / "out"
    paths.train_samples, paths.test_samples = tmp_path / "none.jsonl", tmp_path / "test.jsonl"
    (paths.videos / "subtitle").mkdir(parents=True)
    (paths.videos / "subtitles").mkdir()
    for name in ("mme", "lvb", "gone", "bad", "silent"):
        shutil.copy(footage / "car-detection.mp4", paths.videos / f"{name}.mp4")
    written(paths.videos / "subtitle" / "mme.srt", SRT)
    written(paths.videos / "subtitles" / "lvb_en.json", FORMS["LongVideoBench.json"])
    written(paths.videos / "bad.srt", b"")
    told = {
        "lvb": {"subtitle_path": "lvb_en.json", "starting_timestamp_for_subtitles": 2.0},
        "gone": {"subtitle_path": "gone_en.json"},
    }
    rows = [
        {"id": name, "video": f"{name}.mp4", "question": "?", "meta": told.get(name, {})}
        for name in ("mme", "lvb", "gone", "bad", "silent")
    ]
    written(paths.train_samples, "")
    written(paths.test_samples, "".join(json.dumps(row) + "\n" for row in rows))
    result = run(settings)
    assert sorted(result.done) == ["lvb.mp4", "mme.mp4"]
    assert sorted(failure.item for failure in result.failures) == ["bad.mp4", "gone.mp4"]
    assert {failure.reason for failure in result.failures} == {"bad_subtitles"}
    starts = [line.start for line in Subtitles(index_path(paths.subtitles, "lvb.mp4")).search("red car", 0, 99, 9)]
    assert starts == [1.0]
    settings.infer.tools = ["seek_video_frames"]
    assert settings.for_inference().search.tools == ["seek_video_frames"]
    search = settings.search.model_copy(update={"tools": ["seek_video_frames", "search_subtitles"]})
    marks = [fingerprint_of(settings, tmp_path, "base", None, each) for each in (settings.search, search)]
    assert [mark.subtitles for mark in marks] == [False, True]


def test_predictions_are_played_again_where_words_changed_and_nowhere_else(tmp_path: Path) -> None:
    """A row of before, without a word of subtitles in it, stands as long as they are not searched."""
    library = build_library(tmp_path, videos=2)
    samples = read_samples(library.paths.test_samples)
    folder, made = tmp_path / "predictions", library.paths.subtitles
    library.paths.subtitles = made = tmp_path / "subtitles"
    made.mkdir()
    folder.mkdir()

    def replayed(*tools: str) -> list[str]:
        library.search.tools = ["seek_video_frames", *tools]
        mark = fingerprint_of(library, tmp_path / "none", "grpo_csv", None, library.search)
        with Journal(folder, "grpo_csv", samples, mark, made) as journal:
            jobs = [Job(sample) for sample in samples if sample.id not in journal.done]
            puppet = Puppet(script(answer_turn("red")))
            asyncio.run(play_all(jobs, puppet, library, lambda _, row: journal.add(row)))
            journal.finish()
        return [job.sample.id for job in jobs]

    def say(text: str) -> None:
        write_index(Transcript((Line(1, 2, text),)), index_path(made, samples[0].video), text)

    assert replayed() == ["0-0", "1-0"]
    mark = folder / "grpo_csv.json"
    before = json.loads(mark.read_text())
    del before["made_of"]["subtitles"]
    assert json_digest(before["made_of"]) == before["fingerprint"]
    mark.write_text(json.dumps(before))
    say("hello")
    assert replayed() == []
    assert replayed("search_subtitles") == ["0-0", "1-0"]
    assert replayed("search_subtitles") == []
    say("good bye")
    assert replayed("search_subtitles") == ["0-0"]
    index_path(made, samples[0].video).unlink()
    assert replayed("search_subtitles") == ["0-0"]
    shutil.rmtree(made)
    with pytest.raises(RequestError, match="run the stage 'subtitles' first"):
        replayed("search_subtitles")


def test_a_subtitle_file_that_comes_later_is_noticed(tmp_path: Path, footage: Path) -> None:
    settings = load_profile("pocket")
    asker = Asker(settings, Puppet(script(answer_turn())), MeanColour(), tmp_path / "cache")
    clip = Path(shutil.copy(footage / "car-detection.mp4", tmp_path / "talk.mp4"))
    name = asker.prepare(clip)
    index = index_path(tmp_path / "cache" / "subtitles", name)

    def ready() -> tuple[bool, bool]:
        return asker.is_known_ready(clip, name), asker.is_ready(clip)

    assert ready() == (True, True)
    written(tmp_path / "talk.info.json", "{}")
    assert ready() == (True, True)
    written(tmp_path / "talk.srt", SRT)
    assert ready() == (False, False)
    asker.prepare(clip)
    assert index.is_file()
    assert ready() == (True, True)
    written(tmp_path / "talk.srt", SRT.replace("red", "blue"))
    assert ready() == (False, False)
    asker.prepare(clip)
    assert Subtitles(index).search("blue", 0, 9, 1)
    (tmp_path / "talk.srt").unlink()
    assert ready() == (False, False)
    asker.prepare(clip)
    assert not index.exists()
    assert ready() == (True, True)


def test_the_command_indexes_files(tmp_path: Path, footage: Path) -> None:
    clip = shutil.copy(footage / "car-detection.mp4", tmp_path / "talk.mp4")
    written(tmp_path / "talk.srt", SRT)
    command = [sys.executable, "-m", "timesearch", "subtitles", str(clip), "--out", "indexes"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "subtitle indexes: 1 made, 0 up to date, 0 failed, in indexes" in done.stdout


def test_the_stage_leaves_its_folder_where_no_video_has_words(tmp_path: Path, footage: Path) -> None:
    """DVC wants the output of every stage; the demo's videos have no subtitles."""
    (tmp_path / "cache" / "videos").mkdir(parents=True)
    shutil.copy(footage / "car-detection.mp4", tmp_path / "cache" / "videos" / "a.mp4")
    row = '{"id": "1", "video": "a.mp4", "question": "?", "answer": "a"}\n'
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        written(tmp_path / "data" / f"{split}.jsonl", row)
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    for _ in range(2):
        command = [sys.executable, "-m", "timesearch", "subtitles", "--keep-going"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert list((tmp_path / "cache" / "subtitles").iterdir()) == []
