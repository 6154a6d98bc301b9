"""A library of videos: indexed, kept up with its folders, searched, and asked about."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from players import MeanColour, Puppet, answer_turn, script, search_turn
from synthetic import ffmpeg

import timesearch.cli.inference as asking
import timesearch.cli.opening as opening
from timesearch.base.errors import ItemError, RequestError
from timesearch.base.stopping import Stop, StoppedError
from timesearch.cli import main
from timesearch.data.messages import Message, blocks_of
from timesearch.inference.ask import Asker
from timesearch.library.catalogue import Catalogue, EncoderRecord, Entry, SegmentRecord, key_of
from timesearch.library.index import Indexed, index_folders
from timesearch.library.library import PER_VIDEO, Library
from timesearch.library.rows import exact, plan, scan, slack
from timesearch.library.words import search_words
from timesearch.retrieval.encoder import Encoder
from timesearch.retrieval.noise import match_level, noise_level
from timesearch.settings import Settings

COLOURS = ("red", "green", "blue")
SETTINGS = Settings.model_validate(
    {
        "frames": {"factor": 32, "min_pixels": 4096, "max_pixels": 4096, "workers": 2},
        "search": {"patch": 32, "max_turns": 4},
    }
)


def make_coloured(path: Path, *parts: tuple[str, float]) -> Path:
    """A video of stretches of one colour each, given with their lengths (s)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = [
        word
        for colour, seconds in parts
        for word in ("-f", "lavfi", "-i", f"color={colour}:size=64x64:rate=4:duration={seconds}")
    ]
    joined = "".join(f"[{number}:v]" for number in range(len(parts))) + f"concat=n={len(parts)}"
    ffmpeg(*inputs, "-filter_complex", joined, "-c:v", "libx264", "-pix_fmt", "yuv420p", f"file:{path}")
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders with a file of the same name each, grey but for a stretch of a colour, and two more."""
    root = tmp_path_factory.mktemp("films")
    make_coloured(root / "one" / "film.mp4", ("gray", 6), ("red", 3), ("gray", 6))
    make_coloured(root / "two" / "film.mp4", ("gray", 4), ("lime", 2), ("gray", 4), ("lime", 2), ("gray", 8))
    make_coloured(root / "two" / "grey.mkv", ("gray", 12))
    make_coloured(root / "ünï <b>&amp;.mp4", ("gray", 5), ("blue", 2), ("gray", 5))
    (root / "one" / "film.srt").write_text("1\n00:00:06,500 --> 00:00:08,000\nA red wall, said the guide.\n")
    return root


class Greys(MeanColour):
    """`MeanColour` that takes what is of no colour for what it was not asked for, as real encoders do."""

    name, digest = "greys", "greys-of-tests"

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        said = [[word in text for word in COLOURS] for text in texts]
        rows = np.array([[*words, not any(words)] for words in said], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def encode_prepared(self, batch: np.ndarray) -> np.ndarray:
        stands_out = batch - batch.min(axis=1, keepdims=True)
        rows = np.concatenate([stands_out, np.full((len(batch), 1), 40.0)], axis=1)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class OtherGreys(Greys):
    name, digest = "other-greys", "others-of-tests"


RECORD = EncoderRecord(name="greys", pretrained="", digest="greys-of-tests", source="greys")


def index(library: Path, *folders: Path, encoder: Encoder | None = None, say: Callable[[str], None] = print) -> Indexed:
    return index_folders(library, folders, SETTINGS, encoder or Greys(), RECORD, say)


@pytest.fixture(scope="module")
def made(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("made") / "library"
    assert index(library, videos).batch.failures == []
    return library


@pytest.fixture
def library(made: Path, tmp_path: Path) -> Path:
    """A copy of the library that a test may break."""
    return Path(shutil.copytree(made, tmp_path / "library"))


def find(library: Path, query: str, **limits: object) -> list[tuple[str, float, float]]:
    opened = Library(library)
    found = opened.search(Greys().encode_text([query])[0], videos=opened.videos(**limits))
    return [(moment.video.name, moment.start, moment.end) for moment in found.moments]


def test_a_query_finds_the_video_and_the_stretch(made: Path, videos: Path) -> None:
    label = videos.name
    assert find(made, "a red wall") == [(f"{label}/one/film.mp4", 6.0, 8.5)]
    assert find(made, "something blue") == [(f"{label}/ünï <b>&amp;.mp4", 5.0, 6.5)]
    assert find(made, "green") == [(f"{label}/two/film.mp4", 4.0, 5.5), (f"{label}/two/film.mp4", 10.0, 11.5)]


def test_a_query_that_nothing_answers_gets_nothing(made: Path, videos: Path) -> None:
    opened = Library(made)
    found = opened.search(Greys().encode_text(["a red wall"])[0], videos=opened.videos(str(videos / "two")))
    assert found.moments == []
    assert found.videos == 2
    assert found.best <= found.level


class WithOdds(Greys):
    """Knows colours, whatever stands around them; any other text lies anywhere."""

    even_odds = 0.5

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        known = super().encode_text(texts)
        anywhere = [np.random.default_rng(list(text.encode())).standard_normal(4) for text in texts]
        rows = [row if row[3] < 1 else other for row, other in zip(known, anywhere, strict=True)]
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


def test_an_encoders_own_level_counts_for_what_it_understands() -> None:
    assert match_level(WithOdds(), "a red wall") == match_level(WithOdds(), "blue") == 0.5
    assert match_level(WithOdds(), "a giraffe") is None
    assert match_level(Greys(), "a red wall") is None
    measured = np.array([[0.6, 0.7, 0.8], [0.1, 0.1, 0.1]])
    assert noise_level(measured, mean=0.0) > 0.9
    assert noise_level(measured, mean=0.0, match=0.5) == 0.5
    assert noise_level(measured, mean=0.0, match=2.0) == pytest.approx(0.7 + 3 * 1.4826 * 0.1)


def test_a_part_of_a_library_is_a_folder_a_video_or_a_name(made: Path, videos: Path) -> None:
    opened = Library(made)
    label = videos.name
    two, every = ["film.mp4", "grey.mkv"], ["film.mp4", "film.mp4", "grey.mkv", "ünï <b>&amp;.mp4"]
    for where, names in (
        (str(videos / "two"), two),
        (f"{label}/two", two),
        (f"{label}/two/film.mp4", ["film.mp4"]),
        (str(videos / "one" / "film.mp4"), ["film.mp4"]),
        (str(videos.parent), every),
    ):
        assert sorted(Path(video.name).name for video in opened.videos(where)) == names
    for outside in ("/etc", "nothing", "a\0b", "~nobody/x", "x" * 9000):
        with pytest.raises(RequestError, match="no folder or video of this library"):
            opened.videos(outside)
    with pytest.raises(RequestError, match="2 videos are called"):
        opened.video("film.mp4")
    assert opened.video("grey.mkv").name == f"{label}/two/grey.mkv"


def test_one_video_does_not_fill_the_list(tmp_path: Path) -> None:
    often = [part for _ in range(6) for part in (("red", 1.0), ("gray", 4.0))]
    make_coloured(tmp_path / "films" / "often.mp4", ("gray", 10), *often)
    make_coloured(tmp_path / "films" / "once.mp4", ("gray", 30), ("#e03030", 1), ("gray", 3))
    index(tmp_path / "library", tmp_path / "films")
    listed = [Path(name).name for name, *_ in find(tmp_path / "library", "red")]
    assert listed[:PER_VIDEO] == ["often.mp4"] * PER_VIDEO
    assert listed[PER_VIDEO] == "once.mp4"
    assert len(listed) == 7


def test_a_second_run_makes_nothing_and_follows_what_changed(library: Path, videos: Path, tmp_path: Path) -> None:
    films = Path(shutil.copytree(videos, tmp_path / "films"))
    own = tmp_path / "own"
    first = index(own, films)
    assert (len(first.batch.done), first.videos) == (4, 4)
    again = index(own)
    assert (len(again.batch.done), len(again.batch.skipped), again.vanished) == (0, 4, [])

    (films / "two" / "grey.mkv").unlink()
    make_coloured(films / "one" / "film.mp4", ("gray", 3), ("blue", 2), ("gray", 3))
    make_coloured(films / "one" / "new.mp4", ("gray", 3), ("red", 2), ("gray", 3))
    assert Library(own).state_of(Library(own).video("films/one/film.mp4")) == "changed"
    changed = index(own)
    assert sorted(changed.batch.done) == ["films/one/film.mp4", "films/one/new.mp4"]
    assert changed.batch.again == {"of another video": 1}
    assert changed.vanished == ["films/two/grey.mkv"]
    assert [name for name, *_ in find(own, "red")] == ["films/one/new.mp4"]
    assert len([name for name, *_ in find(own, "blue")]) == 2
    keys = {video.key for video in Library(own).videos()}
    assert (
        {path.stem for path in own.rglob("*.frames")}
        == keys
        == {path.stem for path in (own / "features").rglob("*.safetensors")}
    )
    assert len(list((own / "segments").iterdir())) == len(Catalogue.read(own).segments)

    shutil.move(films, tmp_path / "away")  # as where a drive is not there
    said: list[str] = []
    gone = index(own, say=said.append)
    assert (gone.videos, [failure.reason for failure in gone.batch.failures]) == (0, ["missing_folder"])
    shutil.move(tmp_path / "away", films)
    back = index(own)
    assert (len(back.batch.done), back.videos) == (0, 4)


def test_what_is_no_video_is_named_and_the_rest_is_indexed(videos: Path, tmp_path: Path) -> None:
    films = Path(shutil.copytree(videos, tmp_path / "films"))
    (films / "notes.mp4").write_text("no video")
    (films / "empty.mp4").touch()
    (films / "loop.mp4").symlink_to(films / "loop.mp4")
    (films / "round").symlink_to(films)
    (films / "same.mp4").symlink_to(films / "one" / "film.mp4")
    secret = make_coloured(tmp_path / "secret.mp4", ("red", 3))
    (films / "out.mp4").symlink_to(secret)
    (films / "nothing.mp4").symlink_to(films / "absent.mp4")
    (films / "folder.mp4").mkdir()
    (films / "readme.txt").write_text("not named like a video")
    done = index(tmp_path / "library", films)
    reasons = {Path(failure.item).name: failure.reason for failure in done.batch.failures}
    assert reasons == {
        "notes.mp4": "not_a_video", "empty.mp4": "empty_file", "loop.mp4": "symlink_loop", "out.mp4": "outside",
        "nothing.mp4": "missing_file",
    }  # fmt: skip
    assert done.videos == 4
    listed = [json.loads(line) for line in (tmp_path / "library" / "failures.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in listed} == set(reasons.values())
    assert "secret" not in (tmp_path / "library" / "library.json").read_text()


def test_a_folder_without_videos_and_an_unknown_library_are_refused(tmp_path: Path, made: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").touch()
    for folders, said in (
        ([tmp_path / "none"], "there is no video in"), ([tmp_path / "absent"], "is no folder of videos"),
        ([tmp_path / "none" / "a.txt"], "is no folder of videos"), ([], "knows no folder of videos yet"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=said):
            index(tmp_path / "library", *folders)
    assert not (tmp_path / "library").exists()
    with pytest.raises(RequestError, match="is no library: make one by"):
        Library(tmp_path / "none")
    with pytest.raises(RequestError, match=r"was made by the encoder greys .* and this one is other-greys"):
        index(made, encoder=OtherGreys())


@pytest.mark.parametrize("what", ["flip", "cut", "lost", "catalogue", "catalogue of lists", "features", "frames"])
def test_damage_is_found_and_made_good(library: Path, videos: Path, what: str) -> None:
    before = find(library, "red")
    (segment,) = (library / "segments").iterdir()
    features, frames = next((library / "features").rglob("*.safetensors")), next(library.rglob("*.frames"))
    whole = (library / "library.json").read_text()
    if what in ("flip", "features", "frames"):
        target = {"flip": segment, "features": features, "frames": frames}[what]
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 1
        target.write_bytes(data)
    elif what == "cut":
        os.truncate(segment, segment.stat().st_size // 2)
    elif what == "lost":
        segment.unlink()
    else:
        (library / "library.json").write_text(
            whole[:200] if what == "catalogue" else whole.replace('"videos":[{', '"videos":[[],{')
        )
    if what in ("flip", "cut", "lost"):
        with pytest.raises(ItemError, match=r"is damaged .*`timesearch index` remakes it"):
            Library(library)
    elif what.startswith("catalogue"):
        with pytest.raises(RequestError, match="is damaged"):
            Library(library)
    said: list[str] = []
    done = index(library, videos, say=said.append)
    assert len(done.batch.done) == (1 if what in ("features", "frames") else 0)
    assert bool(said) == (what not in ("features", "frames"))
    assert find(library, "red") == before
    assert json.loads((library / "library.json").read_text())["videos"] == json.loads(whole)["videos"]


@pytest.mark.takes(25)
def test_a_run_that_is_killed_at_any_of_twenty_moments_goes_on(tmp_path: Path) -> None:
    make_coloured(tmp_path / "films" / "red.mp4", ("gray", 3), ("red", 2))
    make_coloured(tmp_path / "films" / "blue.mp4", ("gray", 2), ("blue", 1), ("gray", 1))
    (tmp_path / "films" / "red.srt").write_text("1\n00:00:03,500 --> 00:00:04,000\nA red wall.\n")
    program = [sys.executable, Path(__file__).with_name("killed_index.py"), tmp_path, tmp_path / "films", "20"]
    run = subprocess.run(program, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    made = json.loads(run.stdout.splitlines()[-1])
    assert (made["rows"], made["words"], made["strangers"], made["partial"]) == (18, [1], 0, 0)
    assert made["touches"] > 20


def spoken(library: Path, query: str, **limits: object) -> list[tuple[str, float, float, str]]:
    opened = Library(library)
    heard = opened.find(Greys(), query, videos=opened.videos(**limits)).heard
    assert heard.damaged == []
    return [(Path(said.video.name).name, said.start, said.end, said.text) for said in heard.moments]


def write_lines(path: Path, *lines: tuple[float, str]) -> None:
    """Subtitles of lines that are said for a second each."""
    path.write_text(json.dumps([{"start": start, "end": start + 1, "line": text} for start, text in lines]))


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("talks")
    films = root / "films"
    for name in ("a.mp4", "b.mp4", "mute.mp4"):
        make_coloured(films / name, ("gray", 40))
    write_lines(
        films / "a.json",
        (1, "Welcome to all of you."), (5, "The budget of this year is"), (6.5, "three million."), (20, "And the sea?"),
        (30, "\u4f1a\u8bae\u5728\u5317\u4eac\u4e3e\u884c"), (35, "<b>red</b> herrings; DROP TABLE lines"),
    )  # fmt: skip
    write_lines(films / "b.json", *((2 + 4 * n, f"This year, budgets: number {n}.") for n in range(8)))
    assert index(root / "library", films).batch.failures == []
    return root / "library"


def test_what_is_said_is_found_beside_what_is_shown(talks: Path) -> None:
    assert spoken(talks, "What does she say of the budget of three million?") == [
        ("a.mp4", 5, 7.5, "The budget of this year is three million.")
    ]
    assert [name for name, *_ in spoken(talks, "budget")] == ["a.mp4", *["b.mp4"] * 8]
    assert [name for name, *_ in spoken(talks, "budget", where="films/b.mp4")] == ["b.mp4"] * 8
    assert spoken(talks, "\u5317\u4eac") == [("a.mp4", 30, 31, "\u4f1a\u8bae\u5728\u5317\u4eac\u4e3e\u884c")]
    for nothing in (
        "a giraffe",
        "the giraffe in the sea of elephants",
        "mute",
        "'; DROP TABLE lines --" * 3,
        '"*',
        "NOT",
    ):
        assert [said for said in spoken(talks, nothing) if "DROP" not in said[-1]] == [], nothing
    found = Library(talks).find(Greys(), "three million")
    assert (found.moments, len(found.heard.moments)) == ([], 1)
    assert found.why_nothing().startswith("no frame in 3 videos shows this")


def test_damaged_words_are_named_and_the_rest_is_searched(talks: Path, tmp_path: Path) -> None:
    library = Path(shutil.copytree(talks, tmp_path / "library"))
    opened = Library(library)
    damaged = opened.video("films/b.mp4")
    (library / "subtitles" / f"{damaged.key}.subtitles").write_bytes(b"no index" * 100)
    heard = opened.find(Greys(), "budget").heard
    assert ([video.name for video in heard.damaged], len(heard.moments)) == (["films/b.mp4"], 1)
    stop = Stop()
    stop.ask()
    with pytest.raises(StoppedError):
        opened.find(Greys(), "budget", stop=stop)


@settings(max_examples=60, deadline=None)
@given(query=st.text(max_size=60) | st.sampled_from(['"', "NEAR(a b)", "text:x", "a*", "^red", "\0", "(" * 50]))
def test_any_query_is_but_words(talks: Path, query: str) -> None:
    opened = Library(talks)
    heard = search_words(opened.videos(), opened.words, query, 5, PER_VIDEO)
    assert len(heard.moments) <= 5
    assert all(said.share >= 0.6 for said in heard.moments)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 40), max_size=8), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_rows_are_each_video_once_whatever_comes_and_goes(runs: list[list[int]], rng: random.Random) -> None:
    segments: list[SegmentRecord] = []
    videos: dict[str, Entry] = {}
    for number, added in enumerate(runs):
        for key in rng.sample(sorted(videos), min(len(videos), rng.randrange(3))):
            del videos[key]
        for position, rows in enumerate(added):
            key = key_of(Path(f"/{number}/{position}"))
            videos[key] = Entry(
                key=key, root="r", path="p", size=1, modified_ns=1, end=1.0, rows=rows, features="0" * 64
            )
        segments, parcels = plan(segments, list(videos.values()))
        for each, parcel in enumerate(parcels):
            name = f"{number:08x}{each:08x}"
            first = 0
            for video in parcel:
                videos[video.key] = video.model_copy(update={"segment": name, "first": first})
                first += video.rows
            segments.append(SegmentRecord(name=name, rows=first, sha256="0" * 64))
        held = {
            segment.name: [video for video in videos.values() if video.segment == segment.name] for segment in segments
        }
        assert sum(map(len, held.values())) == len(videos)
        for segment in segments:
            taken = [place for video in held[segment.name] for place in range(video.first, video.first + video.rows)]
            assert len(set(taken)) == len(taken) >= segment.rows / 2
            assert max(taken) < segment.rows
        sizes = sorted(sum(video.rows for video in each) for each in held.values())
        assert len(sizes) <= 2 + np.log2(1 + sum(sizes))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.sampled_from([3, 64, 1152]))
def test_the_scan_is_within_its_slack_of_the_cosines(seed: int, count: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, width)) * rng.choice([1e-3, 1, 30], size=(count, width))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    query = rows[rng.integers(count)].astype(np.float32) + 0.1 * rng.standard_normal(width).astype(np.float32)
    query /= np.linalg.norm(query)
    right = rows.astype(np.float64) @ query.astype(np.float64)
    first = int(rng.integers(count))
    assert np.abs(scan(rows, query) - right).max() <= slack(query)
    assert np.array_equal(scan(rows, query, [(first, count), (0, first)]), np.roll(scan(rows, query), -first))
    np.testing.assert_allclose(exact(rows, np.arange(count), query), right, atol=2e-6)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path):
    """Run a command; the encoder is the one of these tests, the policy says what a test lets it say."""
    monkeypatch.setattr(opening, "encoder_for", lambda *_: (Greys(), RECORD))
    policy = Puppet(script(search_turn("red", num_frames=2), answer_turn("red")))
    monkeypatch.setattr("timesearch.inference.ask.answering_policy", lambda *_: nullcontext(policy))
    params = tmp_path / "params.yaml"
    params.write_text(json.dumps({"frames": SETTINGS.frames.model_dump(), "search": SETTINGS.search.model_dump()}))

    def call(command: str, *arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([command, *map(str, arguments), "--params", str(params)])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    call.policy = policy  # type: ignore[attr-defined]
    return call


def test_index_and_search_by_command(run, videos: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    (tmp_path / "films").mkdir()
    for path in (videos / "one").iterdir():
        shutil.copy(path, tmp_path / "films")
    (tmp_path / "films" / "notes.mp4").write_text("no video")
    (tmp_path / "films" / "a.txt").write_text("text")
    code, out, err = run("index", tmp_path / "films", "--library", library)
    assert code == 1
    assert "1 made, 0 up to date, 0 gone, 1 failed; 1 videos with 30 frames" in out
    assert "not_a_video" in err
    assert "1 .txt" in err
    assert run("index", "--library", library, "--keep-going")[0] == 0
    code, out, _ = run("search", "red", "--library", library, "--sheet", tmp_path / "sheet.png")
    assert code == 0
    assert "0:06.0-0:08.5    films/film.mp4" in out
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = run("search", "red", "--library", library, "--json")
    found = json.loads(out)
    assert (found["moments"][0]["start"], found["moments"][0]["state"], found["videos"]) == (6.0, "as indexed", 1)
    assert [(said["start"], said["text"]) for said in found["said"]] == [(6.5, "A red wall, said the guide.")]
    assert "said   0:06.5-0:08.0    films/film.mp4  A red wall" in run("search", "wall", "--library", library)[1]
    code, out, _ = run("search", "blue", "--library", library)
    assert (code, len(out.splitlines())) == (0, 1)
    assert out.startswith("nothing in 1 videos answers this")
    assert "there is no such video" in run("search", "red", "--library", library, "--since", "2999-01-01")[1]
    for bad, says in (
        (["", "--json"], "empty"),
        (["red", "--since", "soon"], "no date"),
        (["red", "--in", "/etc"], "no folder or video"),
    ):
        code, out, err = run("search", *bad, "--library", library)
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert says in err


def test_a_library_is_asked_first_which_video_then_when(run, made: Path, videos: Path) -> None:
    code, out, _ = run("ask", "--library", made, "What is the red wall?", "--json")
    assert code == 0
    row = json.loads(out)
    assert (row["video"], row["predicted_answer"]) == (f"{videos.name}/one/film.mp4", "red")
    evidence = row["evidence"]
    assert evidence["agrees"] is True
    assert all(6 <= each["seconds"] <= 9 for each in evidence["support"])
    assert 0 < evidence["looked_at"] <= 1
    assert evidence["in_vain"] == []
    code, out, _ = run("ask", "--library", made, "What is the red wall?")
    labels = [line.split(maxsplit=1)[0] for line in out.splitlines()]
    assert labels[:3] == ["question", "video", "preview"]
    assert labels[-1] == "video"
    assert run("ask", "--library", made, "What?", "--in", "/etc")[0] == 2
    assert run("ask", "What?", "--in", "x")[0] == 2
    assert run("ask")[0] == 2


def test_an_answer_that_nothing_supports_is_none(run, made: Path, videos: Path) -> None:
    run.policy.speak = script(search_turn("yellow"), answer_turn("I don't know"))
    code, out, _ = run("ask", "--library", made, "What is the sea like?", "--json")
    row = json.loads(out)
    assert (code, row["video"], row["predicted_answer"]) == (0, None, None)
    assert row["evidence"]["in_vain"] == ["What is the sea like?"]
    assert len(row["evidence"]["others"]) == 3


def test_what_the_policy_looks_for_in_vain_is_searched_in_the_library(run, made: Path, videos: Path) -> None:
    """The question names nothing that the encoder knows; the policy knows what it wants to see."""

    def speak(messages: Sequence[Message]) -> str:
        reanswers = messages[0]["role"] == "user"
        if not reanswers and messages[-1]["role"] == "user":
            return search_turn("blue", num_frames=1)
        frames = [block["image"] for block in blocks_of(messages[-1]) if block["type"] == "image"]
        means = [np.asarray(frame, np.float32).mean(axis=(0, 1)) for frame in frames]
        return answer_turn("blue" if any(blue - red > 50 for red, _, blue in means) else "I don't know")

    run.policy.speak = speak
    code, out, _ = run("ask", "--library", made, "What is the sea like?", "--json")
    row = json.loads(out)
    assert (code, row["video"], row["predicted_answer"]) == (0, f"{videos.name}/ünï <b>&amp;.mp4", "blue")
    assert len(row["evidence"]["others"]) == 1


def test_asking_uses_the_caches_of_the_library(made: Path) -> None:
    asker = Asker(SETTINGS, Puppet(script("")), Greys(), made)
    video = Library(made).videos()[0]
    assert (asker.frames / f"{video.key}.frames").is_file()
    assert asking.open_library  # what the command opens
