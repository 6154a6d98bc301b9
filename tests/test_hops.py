"""The hop world: every hop is necessary, the preview tells nothing, and what each method can know is computed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from timesearch.base.errors import RequestError
from timesearch.base.files import write_jsonl
from timesearch.data.messages import final_answer, parse_turn, text_of, times_of
from timesearch.data.rows import read_samples
from timesearch.evaluation.scoring import evaluate_files
from timesearch.evaluation.table import markdown_table
from timesearch.models import POCKET_ENCODERS
from timesearch.models import run as bring_models
from timesearch.pocket.ceiling import knowable
from timesearch.pocket.dataset import write_samples
from timesearch.pocket.encoder import CURRICULA
from timesearch.pocket.filesystem import encode, parse_url
from timesearch.pocket.hop_lessons import HopEpisodes, HopLookup, HopReading, HopWindows, questions_of
from timesearch.pocket.hop_traces import (
    HOP_CLEAN,
    HOP_COLD_START,
    RELATIONS,
    HopNotes,
    told_of,
    write_hop_reanswer,
    write_hop_trace,
)
from timesearch.pocket.hops import HOP_SHAPES, LONG, TEXTS, WINDOW, HopScene, Question, make_hop_scene, window_after
from timesearch.pocket.lessons import Corpus
from timesearch.pocket.policy import hop_parts, make_hop_tokenizer, tools_block
from timesearch.pocket.pretrain import cached_corpus
from timesearch.pocket.reading import Notes, Read, read_event, search_by_reading
from timesearch.pocket.traces import trace_turn
from timesearch.pocket.wordings import ARGUMENTS, NAMES, draw_wording
from timesearch.pocket.world import COLOURS, preview_instants
from timesearch.profiles import load_profile
from timesearch.retrieval.encoder import load_encoder
from timesearch.rewards import format_reward
from timesearch.search.budget import preview_plan
from timesearch.search.tools import schema_of, seek_video_frames
from timesearch.settings import Evaluate, Frames, SearchSettings
from timesearch.training.supervised import UNKNOWN
from timesearch.video.frames import FrameCache, make_frame_cache

FRAMES = Frames(factor=32, min_pixels=4096, max_pixels=4096)
SEARCH = SearchSettings(total_video_tokens=16, min_tokens=4, max_tokens=4, max_frames=4, patch=32)
POCKET = Path(__file__).parents[1] / "pretrained" / "pocket"
CHANCE = 1 / len(COLOURS)


def cached(scene: HopScene, folder: Path) -> FrameCache:
    """Its frames, through the real codec."""
    video = folder / "video.mp4"
    video.write_bytes(encode(scene))
    (folder / "video.frames").unlink(missing_ok=True)
    make_frame_cache(video, folder / "video.frames", FRAMES)
    return FrameCache.open(folder / "video.frames")


def notes_of(frames: FrameCache, seconds: list[float]) -> Notes:
    """What the frames at some times show, by their pixels."""
    notes = Notes()
    notes.add((frames.timestamps[index], frames[index]) for index in map(frames.nearest, seconds))
    return notes


def middles(scene: HopScene) -> list[float]:
    return [(event.start + event.end) / 2 for event in scene.events]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[HopScene, FrameCache]]:
    scenes = [make_hop_scene("test", seed) for seed in range(4)]
    return [(scene, cached(scene, tmp_path_factory.mktemp("hops"))) for scene in scenes]


class PixelEncoder:
    """An encoder that reads pixels: a picture is its shape, a query the shape that it names, or any."""

    name, pretrained, preprocessing, digest = "pixels", "", "", "pixels"

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        named = [[float(shape in text.strip("?").split()) for shape in HOP_SHAPES] for text in texts]
        return _unit(np.array([[*(row if any(row) else [1.0] * len(row)), 0.0] for row in named]))

    def prepare(self, images: Sequence[Any]) -> np.ndarray:
        read = [read_event(image) for image in images]
        places = [HOP_SHAPES.index(each.shape) if each else len(HOP_SHAPES) for each in read]
        return np.eye(len(HOP_SHAPES) + 1)[places]

    def encode_prepared(self, batch: np.ndarray) -> np.ndarray:
        return _unit(batch)


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Four videos, downloaded, cached and embedded as any others are, and the questions about them."""
    settings = load_profile("pocket")
    settings.search.max_turns = 6
    return cached_corpus(settings, PixelEncoder(), tmp_path_factory.mktemp("corpus"), "hops", "test", 4)


def asked(split: str, count: int) -> list[Question]:
    return [question for seed in range(count) for question in make_hop_scene(split, seed).questions]


def test_a_scene_follows_from_its_name_alone():
    assert make_hop_scene("train", 3) == make_hop_scene("train", 3) == parse_url("pocket://hops/train/3.mp4")
    assert make_hop_scene("train", 3) != make_hop_scene("test", 3)
    with pytest.raises(RequestError):
        parse_url("pocket://hops/other/3.mp4")


def test_the_filesystem_serves_it():
    assert "hops/test" in fsspec.filesystem("pocket").ls("pocket://hops", detail=False)
    with fsspec.open("pocket://hops/test/0.mp4") as remote:
        assert remote.read() == encode(make_hop_scene("test", 0))


def test_a_window_from_any_frame_of_an_event_holds_the_next_one_alone():
    for seed in range(200):
        scene = make_hop_scene("train", seed)
        assert sorted(event.shape for event in scene.events) == sorted(HOP_SHAPES)
        assert all(event.mark != event.shape for event in scene.events)
        for event in scene.events[:-1]:
            follower = scene.following(event)
            assert follower is not None
            further = scene.following(follower)
            for seconds in np.arange(np.ceil(FRAMES.fps * event.start), FRAMES.fps * event.end) / FRAMES.fps:
                assert event.end < follower.start <= int(seconds) + WINDOW - 1
                assert further is None or further.start > int(seconds) + WINDOW


def test_questions_are_of_one_to_three_hops_and_no_shape_begins_two():
    for seed in range(100):
        questions = make_hop_scene("train", seed).questions
        assert sorted((question.hops, question.family) for question in questions) == [
            *((1, "direct"), (2, "after"), (2, "pointer"), (3, "after"), (3, "pointer"))
        ]
        assert len({question.events[0].shape for question in questions}) == 5
        assert all(len(set(question.events)) == question.hops for question in questions)
        for question in questions:
            words = question.text.strip("?").split()[3:]
            named = [word for word in words if word in HOP_SHAPES]
            assert named == [question.events[0].shape]


def test_every_frame_reads_as_what_it_shows(videos):
    wrong = total = 0
    for scene, frames in videos:
        for index, seconds in enumerate(frames.timestamps):
            event = scene.visible(seconds)
            total += 1
            wrong += read_event(frames[index]) != (event and Read(event.shape, event.colour, event.mark))
    assert wrong <= total / 200


def test_the_frames_of_all_hops_answer_and_those_of_fewer_do_not(videos):
    for scene, frames in videos:
        for question in scene.questions:
            seconds = [(event.start + event.end) / 2 for event in question.events]
            first = question.events[0].shape
            assert notes_of(frames, seconds).answer(first, question.links) == question.answer
            assert notes_of(frames, middles(scene)).answer(first, question.links) == question.answer
            for missing in range(question.hops):
                fewer = seconds[:missing] + seconds[missing + 1 :]
                assert notes_of(frames, fewer).answer(first, question.links) is None


@pytest.mark.takes(8)
def test_another_video_without_a_hop_or_with_another_mark_gives_another_answer(tmp_path: Path):
    """The proof of necessity, in pixels: all other events may be seen, and the answer is gone, or is another one."""
    scene = make_hop_scene("test", 4)
    for question in scene.questions:
        first = question.events[0].shape
        for position, event in enumerate(question.events):
            changed = scene.without(event)
            assert notes_of(cached(changed, tmp_path), middles(changed)).answer(first, question.links) is None
            if question.links[position : position + 1] == ("points",):
                ends = {mark: scene.with_mark(event, mark).follow(first, question.links) for mark in HOP_SHAPES}
                mark, chain = next((m, c) for m, c in ends.items() if c and c[-1].colour != question.answer)
                changed = scene.with_mark(event, mark)
                answer = notes_of(cached(changed, tmp_path), middles(changed)).answer(first, question.links)
                assert answer == chain[-1].colour != question.answer


def test_the_preview_shows_no_event(videos):
    for _scene, frames in videos:
        indices, _ = preview_plan(len(frames), frames.size, SEARCH)
        assert len(indices) == 4
        assert all(read_event(frames[index]) is None for index in indices)
    for seed in range(200):
        scene = make_hop_scene("heldout", seed)
        indices, _ = preview_plan(int(scene.duration * FRAMES.fps), (64, 64), SEARCH)
        assert not any(scene.visible(index / FRAMES.fps + late) for index in indices for late in (-0.5, 0, 0.5))


def test_a_best_guess_is_chance_without_frames_and_sure_with_all_hops():
    fewer = []
    for question in asked("heldout", 40):
        hops = [event.start for event in question.events]
        assert question.best_guess([]) == pytest.approx(CHANCE)
        assert question.best_guess(hops) == pytest.approx(1)
        assert question.best_guess(hops[:-1]) == pytest.approx(CHANCE)
        for missing in range(question.hops - 1):
            fewer.append(question.best_guess(hops[:missing] + hops[missing + 1 :]))
    assert np.mean(fewer) < 1.5 * CHANCE


def test_a_best_guess_is_right_as_often_as_it_says():
    """Whoever guesses by a rule of his own from 5 events, the first hop among them, is right no more often."""
    rng = np.random.default_rng(0)
    said, right = [], []
    for question in asked("heldout", 400):
        shown = [question.events[0], *rng.choice(np.array(question.scene.events, dtype=object), size=4)]
        notes = {event.shape: event for event in shown}
        at = question.events[0]
        for link in question.links:
            follower = question.scene.following(at) if link == "after" else question.scene.pointed(at)
            at = notes.get(follower.shape, at) if follower else at
        said.append(question.best_guess([event.start for event in shown]))
        right.append(at.colour == question.answer)
    assert np.mean(right) <= np.mean(said) + 0.03


def test_without_search_at_most_35_of_100_can_be_known_of_two_and_three_hops():
    rng = np.random.default_rng(0)
    uniform, found = [], []
    for question in asked("heldout", 200):
        if question.hops > 1:
            duration, others = question.scene.duration, [e for e in question.scene.events if e != question.events[0]]
            uniform.append(question.best_guess([(i + 0.5) / 6 * duration for i in range(6)]))
            shown = [question.events[0], *rng.choice(np.array(others, dtype=object), size=4, replace=False)]
            found.append(question.best_guess([event.start for event in shown]))
    assert np.mean(uniform) < 0.25
    assert np.mean(found) < 0.35


def test_text_alone_tells_nothing():
    questions = asked("heldout", 300)
    fitted = {shape: [q.answer for q in questions[::2] if q.events[0].shape == shape] for shape in HOP_SHAPES}
    guesses = [max(fitted[q.events[0].shape], key=fitted[q.events[0].shape].count) == q.answer for q in questions[1::2]]
    assert np.mean(guesses) <= CHANCE + 0.05


def test_samples_tell_the_hops_and_when_each_is_seen(tmp_path: Path):
    write_samples(tmp_path / "test.jsonl", "hops", "test", 3)
    samples = read_samples(tmp_path / "test.jsonl")
    assert len(samples) == len({sample.id for sample in samples}) == 15
    for sample in samples:
        scene = parse_url(str(sample.source))
        assert len(sample.gt_seconds) == len(sample.gt_spans) == sample.meta["hops"]
        first, last = scene.visible(sample.gt_seconds[0]), scene.visible(sample.gt_seconds[-1])
        assert first is not None
        assert first.shape == sample.meta["shape"]
        assert last is not None
        assert last.colour == sample.answer


def test_a_search_that_reads_what_it_finds_answers_every_question(corpus: Corpus):
    for sample, question in questions_of(corpus.samples):
        row = {"video": sample.video, "question": sample.question}
        found = search_by_reading(corpus.search, row, question.events[0].shape, question.links)
        assert found == sample.answer
        assert question.hops <= corpus.search.calls + 1 <= corpus.settings.max_turns
        if question.hops > 1:
            assert question.best_guess([each.seconds for each in corpus.search.evidence]) == pytest.approx(1)


def test_clean_traces_name_each_hop_and_answer_rightly(corpus: Corpus):
    rng = np.random.default_rng(0)
    for sample, question in questions_of(corpus.samples):
        row = {"video": sample.video, "question": sample.question}
        trace = write_hop_trace(corpus.search, row, question, HOP_CLEAN, rng)
        turns = [text_of(message) for message in trace if message["role"] == "assistant"]
        assert final_answer(trace) == sample.answer
        assert format_reward(trace) == 1
        followed = turns[-1].partition("So ")[2].split("<")[0].split()
        for event, after, link in zip(question.events, question.events[1:], question.links, strict=False):
            assert f"{event.shape}{'>' if link == 'points' else '+'}{after.shape}" in followed
        if "after" in question.links:
            calls = [call.arguments for turn in turns for call in parse_turn(turn).calls]
            (window,) = [call for call in calls if call["query"] == "shape"]
            (found,) = set(re.findall(rf"{question.events[-2].shape}@(\d+)\.\ds", " ".join(turns)))
            assert (window["start_time"], window["end_time"]) == window_after(int(found))


def test_notes_tell_what_was_seen_and_nothing_else():
    for seed in range(200):
        scene = make_hop_scene("train", seed)
        rng = np.random.default_rng(seed)
        seconds = [int(each) / 2 for each in rng.integers(int(2 * scene.duration), size=12)]
        notes = HopNotes(scene)
        told = [notes.see([{"type": "image", "seconds": each} for each in some]) for some in (seconds[:6], seconds[6:])]
        shown = {event for event in map(scene.visible, seconds) if event}
        assert sum(each.count("@") for each in told) == len(shown)
        assert {key[:-1] for key in notes.values} == {event.shape for event in shown}
        for event in scene.events:
            values = [notes.values.get(f"{event.shape}{relation}") for relation in ">=@+"]
            if event in shown:
                after = scene.following(event)
                assert values[:2] == [event.mark, event.colour]
                assert scene.visible(float(str(values[2]).removesuffix("s"))) == event
                assert values[3] == (after.shape if after in shown else None)
        for question in scene.every_question:
            told, found = notes.follow(question, question.hops)
            assert isinstance(found, str) == (set(question.events) <= shown)
            if isinstance(found, str):
                assert found == question.answer
                assert told.split()[-1] == f"{question.events[-1].shape}={found}"
            else:
                assert told[-1] == "?" or "@" in told.split()[-1]


def test_faulty_traces_fail_as_often_as_their_habits_say(corpus: Corpus):
    episodes = HopEpisodes(corpus, 160, HOP_COLD_START, 0.0, 0)
    by_id = {sample.id: sample for sample in corpus.samples}
    right: dict[int, list[bool]] = {}
    for number in range(len(episodes)):
        example = episodes[number]
        sample = by_id[example.name.split(",")[0]]
        assert format_reward(example.messages[1:]) == 1
        right.setdefault(sample.meta["hops"], []).append(final_answer(example.messages) == sample.answer)
    assert np.mean(right[1]) > 0.7
    for hops, share in ((2, 0.4 + 0.1 * 0.5 + 0.55 / 6), (3, 0.25 + 0.15 * 0.5 + 0.675 / 6)):
        assert np.mean(right[hops]) == pytest.approx(share, abs=0.25)


def test_a_reanswer_knows_where_every_hop_is_shown_and_nowhere_else(corpus: Corpus):
    rng = np.random.default_rng(0)
    answers = []
    for sample, question in questions_of(corpus.samples):
        row = {"video": sample.video, "question": sample.question}
        for known in (True, False):
            pair = write_hop_reanswer(corpus.search, row, question, known, rng)
            if pair is not None:
                sure = question.best_guess(times_of(pair[0]["content"])) > 0.99
                assert sure == known
                assert final_answer(pair) == (sample.answer if known else UNKNOWN)
                answers.append(known)
    assert answers.count(True) >= 15
    assert answers.count(False) >= 15


@pytest.mark.takes(10)
def test_an_encoder_of_each_world_is_trained_by_the_stage_that_brings_models(tmp_path: Path):
    assert tuple(CURRICULA) == POCKET_ENCODERS
    settings = load_profile("pocket")
    settings.paths.models, settings.models.encoder_steps = tmp_path / "models", 1
    settings.models.encoder, settings.models.policy = "pocket-hops", str(POCKET)
    bring_models(settings)
    encoder = load_encoder(str(tmp_path / "models" / "encoder"))
    asked = encoder.encode_text(["star", "What colour is the shape right after the one that the star points to?"])
    assert asked.shape == (2, 64)


def test_the_tokenizer_reads_tools_questions_and_items_by_their_words():
    tokenizer = make_hop_tokenizer()
    described = tokenizer.tokenize(tools_block())
    said = schema_of(seek_video_frames)["function"]
    described_as = [said["description"], *(each["description"] for each in said["parameters"]["properties"].values())]
    for text in described_as:
        assert " ".join(tokenizer.tokenize(text)) in " ".join(described)
    assert {"seek_video_frames", "start_time", "query"} <= set(described)
    assert not any("seek" in token and token != "seek_video_frames" for token in described)
    for shape in HOP_SHAPES:
        for text in TEXTS.values():
            words = text.format(shape=shape)
            assert len(tokenizer.tokenize(words)) == len(words.split())
        for relation in RELATIONS:
            assert tokenizer.tokenize(f" {shape}{relation}moon,") == [f"\u0120{shape}{relation}", "moon", ","]
            assert hop_parts(f"\u0120{shape}{relation}") == (f"shape {shape}", f"relation {relation}")
        assert tokenizer.tokenize(f" {shape}=green.") == [f"\u0120{shape}=", "green", "."]
        assert tokenizer.tokenize(f'{{"query": "{shape}"}}}}\n')[-2] == shape
        assert hop_parts(shape) == ()
    assert tokenizer.tokenize("62.5s, 61") == ["62.5s", ",", "\u0120", "61"]
    assert tokenizer.tokenize("3562.5s, 105 100.0s") == [
        "35",
        "62.5s",
        ",",
        "\u0120",
        "1",
        "05",
        "\u0120",
        "1",
        "00.0s",
    ]
    assert hop_parts("62.5s") == ("0 hundreds", "6 tens", "2 units", "5 tenths")
    assert hop_parts("05") == ("some hundreds", "0 tens", "5 units", "number") != hop_parts("5")
    assert hop_parts("61") == ("0 hundreds", "6 tens", "1 units", "number")
    assert [hop_parts(word) for word in (".5s", "1234", "s", "?", "\u0120to?", "\u0120")] == [()] * 6
    odd = 'Zoom <b>here</b>, {"a_b": [1.25, "é"]}\n\t'
    assert tokenizer.decode(tokenizer.encode(odd)) == odd


def test_lookups_tell_what_their_frames_show(corpus: Corpus):
    lessons = HopLookup(corpus, 10**6, 0)
    known: list[bool] = []
    for number in range(40):
        shown, *rest = lessons[number].messages
        notes = HopNotes(make_hop_scene("test", int(lessons[number].name.split("-")[2])))
        notes.see(shown["content"])
        *hops, times, windows = (text_of(message) for message in (shown, *rest))
        assert len(hops) == 24
        for asking, told in zip(hops[::2], hops[1::2], strict=True):
            shape, relation = asking.partition("From ")[2][:-1], asking[-1]
            assert told == f"So {told_of(notes.values, shape, relation)}"
            event = notes.scene.event_of(shape)
            assert not (relation == "+" and event in notes.seen and notes.misleads(event))
            known.append(not told.endswith("?"))
        pairs = [tuple(map(int, pair.split(", "))) for pair in windows.removesuffix(".").split(". ")]
        assert pairs == [window_after(float(time.rstrip("s"))) for time in times.split()]
    assert 0.5 < np.mean(known) < 0.9


def test_exercises_of_windows_say_them_as_calls_do():
    told = [str(message["content"]) for number in range(5) for message in HopWindows(10, 0)[number].messages]
    for time, window in zip(told[::2], told[1::2], strict=True):
        start, stop = window_after(float(time.removesuffix("s")))
        call = {"query": "shape", "start_time": start, "end_time": stop}
        assert f"{window}}}" in text_of(trace_turn("", call))


@pytest.mark.parametrize("world", LONG)
def test_a_long_video_holds_the_two_minutes_somewhere_and_shows_none_of_it_at_the_preview(world: str):
    begins = set()
    for seed in range(12):
        scene = parse_url(f"pocket://{world}/heldout/{seed}.mp4")
        assert isinstance(scene, HopScene)
        assert scene.duration == LONG[world]
        assert not any(map(scene.visible, preview_instants(scene.duration)))
        assert len(scene.events) == len(HOP_SHAPES)
        assert scene.events[-1].end - scene.events[0].start < 140
        assert len(scene.questions) == 5
        assert knowable(scene.url, scene.questions[0].text, [event.start for event in scene.events]) == 1.0
        begins.add(scene.events[0].start // (LONG[world] / 4))
    assert len(begins) > 2


@pytest.mark.parametrize("seed", range(12))
def test_the_window_after_any_frame_of_an_event_holds_the_next_one_and_no_other(seed: int):
    scene = make_hop_scene("test", seed)
    for event in scene.events[:-1]:
        for seconds in np.arange(event.start, event.end, 0.25):
            start, stop = window_after(float(seconds))
            seen = {scene.visible(time) for time in np.arange(start, stop + 0.01, 0.25)} - {None}
            assert seen == {scene.following(event)}


def test_what_follows_in_time_is_told_only_after_its_window_was_searched(corpus: Corpus):
    asked = [(sample, question) for sample, question in questions_of(corpus.samples) if "after" in question.links]
    for sample, question in asked:
        row = {"video": sample.video, "question": sample.question}
        trace = write_hop_trace(corpus.search, row, question, HOP_CLEAN, np.random.default_rng(0))
        before = question.events[question.links.index("after")]
        said = [text_of(message) for message in trace if message["role"] == "assistant"]
        looked = next(place for place, text in enumerate(said) if '"query": "shape"' in text)
        time = said[looked].partition(f"So {before.shape}@")[2] or said[looked].rpartition(f" {before.shape}@")[2]
        seconds = float(time.partition("s")[0])
        assert before.start <= seconds < before.end
        start, stop = window_after(seconds)
        assert f'"start_time": {start}, "end_time": {stop}' in said[looked]
        assert not any(f"{before.shape}+" in text for text in said[: looked + 1])
        assert f"{before.shape}+{question.events[-1].shape}" in said[-1]


def test_readings_ask_what_their_frames_tell_or_do_not(corpus: Corpus):
    lessons = HopReading(corpus, 10**6, 0.25, 0.25, 0)
    unknown: list[bool] = []
    for number in range(60):
        example = lessons[number]
        sample = next(each for each in corpus.samples if example.name.startswith(f"{each.id},"))
        every = {question.text: question for question in make_hop_scene("test", _seed(sample)).every_question}
        seconds = times_of(example.messages[0]["content"])
        assert 1 <= len(seconds) <= 12
        for asking, telling in zip(example.messages[::2], example.messages[1::2], strict=True):
            asked = next(question for text, question in every.items() if text_of(asking).endswith(text))
            sure = asked.best_guess(seconds) > 0.99
            unknown.append(final_answer([telling]) == UNKNOWN)
            assert final_answer([telling]) == (asked.answer if sure else UNKNOWN)
    assert 0.05 < np.mean(unknown) < 0.6


def test_what_follows_in_time_is_recited_frame_by_frame(corpus: Corpus):
    lessons = HopReading(corpus, 10**6, 0.25, 0.3, 0, in_time=True)
    ends = {"+": 0, "?": 0}
    for number in range(40):
        example = lessons[number]
        sample = next(each for each in corpus.samples if example.name.startswith(f"{each.id},"))
        visible = map(make_hop_scene("test", _seed(sample)).visible, times_of(example.messages[0]["content"]))
        shown = [event.shape if event else "nothing" for event in visible]
        for asking, telling in zip(example.messages[::2], example.messages[1::2], strict=True):
            assert "right after" in text_of(asking)
            hops = text_of(telling).partition("So ")[2].partition("</think>")[0]
            *before, last = [word.strip(",") for word in hops.split() if ">" not in word and "=" not in word]
            assert before == shown[: len(before)]
            shape, mark, following = last.partition("+") if "+" in last else (last[:-1], "?", "")
            assert shape not in before
            ends[mark] += 1
            if following:
                later = [each for each in shown[len(before) :] if each not in (shape, "nothing")]
                assert (shown[len(before)], following) == (shape, later[0])
    assert min(ends.values()) > 20


def _seed(sample: Any) -> int:
    return int(Path(sample.video).stem)


def test_a_reworded_tool_is_called_by_the_names_of_its_schema(corpus: Corpus):
    rng = np.random.default_rng(0)
    episodes = HopEpisodes(corpus, 10**6, HOP_CLEAN, 0.0, 0, reworded=True)
    names, described = set(), set()
    for number in range(60):
        example = episodes[number]
        assert example.tools
        schemas = {tool["function"]["name"]: tool["function"] for tool in example.tools}
        called = [call for m in example.messages if m["role"] == "assistant" for call in parse_turn(text_of(m)).calls]
        assert called
        for call in called:
            assert set(call.arguments) <= set(schemas[call.name]["parameters"]["properties"])
            assert set(schemas[call.name]["parameters"]["required"]) <= set(call.arguments)
            names.add(call.name)
            described.add(schemas[call.name]["description"])
        assert all(message["name"] in names for message in example.messages if message["role"] == "tool")
    assert names == set(NAMES)
    assert any(not set(re.findall(r"\w+", each.lower())) & {"frames", "video", "moments"} for each in described)
    assert len(described) > 15
    tokenizer = make_hop_tokenizer()
    for name in (*NAMES, *(name for others in ARGUMENTS.values() for name in others)):
        assert tokenizer.tokenize(f'{{"{name}"')[1] == name
    assert draw_wording(rng, corpus.tools).tools != draw_wording(rng, corpus.tools).tools


def test_a_later_episode_differs_in_its_times_alone(corpus: Corpus):
    moved = set()
    for share in (0.0, 1.0):
        for number in range(12):
            now = HopEpisodes(corpus, 10**6, HOP_CLEAN, share, 1)[number]
            later = HopEpisodes(corpus, 10**6, HOP_CLEAN, share, 1, later=1.0)[number]
            assert [message["role"] for message in now.messages] == [message["role"] for message in later.messages]
            for message, moved_message in zip(now.messages, later.messages, strict=True):
                moved |= _moved(text_of(message), text_of(moved_message))
    assert all(seconds % 100 == 0 for seconds in moved)
    assert 0 < min(moved) < max(moved) <= 3600


def _moved(now: str, later: str) -> set[float]:
    """By how much the times of a text are later; all else is the same."""
    times = re.compile(r'(?<![\d.])\d+\.\d(?=s)|(?<=_time": )\d+')
    assert times.sub("", now) == times.sub("", later)
    moved = {float(b) - float(a) for a, b in zip(times.findall(now), times.findall(later), strict=True)}
    assert len(moved) <= 1
    return moved


def test_evaluation_says_what_can_be_known_from_the_frames_of_an_episode(tmp_path: Path):
    asked = {question.hops: question for question in make_hop_scene("test", 0).questions}
    write_samples(tmp_path / "test.jsonl", "hops", "test", 1)
    samples = {sample.meta["hops"]: sample for sample in read_samples(tmp_path / "test.jsonl")}
    rows = []
    for hops, sample in samples.items():
        found = sample.gt_seconds[: 2 if hops == 3 else hops]
        rows.append({**sample.model_dump(mode="json"), "searched_seconds": found, "predicted_answer": sample.answer})
    write_jsonl(tmp_path / "grpo_csv.jsonl", rows)
    settings = Evaluate(visual=False, bootstrap=0, groups=["hops"])
    (scored,) = evaluate_files({"grpo_csv": tmp_path / "grpo_csv.jsonl"}, settings, None)
    by = {hops: scored.metrics["by"]["hops"][str(hops)]["knowable"] for hops in asked}
    assert (by[1], by[2]) == (pytest.approx(1), pytest.approx(1))
    assert by[3] == pytest.approx(CHANCE)
    head, _, row = markdown_table([scored]).splitlines()
    assert head.endswith("| 1 hop | at most | 2 hops | at most | 3 hops | at most |")
    assert row.endswith("| 100.0 | 100.0 | 100.0 | 100.0 | 100.0 | 16.7 |")
