"""The world of senses: each question needs its tool, proven by a policy that reads pixels and words alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.senses import Oracle, accuracy, prepare
from timesearch.data.messages import final_answer, parse_turn, text_of
from timesearch.pocket.filesystem import parse_url
from timesearch.pocket.lessons import Corpus
from timesearch.pocket.senses import FLASH, PLATE_BOX, TOOL_OF, SensesScene, make_senses_scene, read_mark
from timesearch.pocket.senses_lessons import SensesEpisodes, SensesLookup, question_of
from timesearch.pocket.senses_traces import SENSES_CLEAN, SensesHabits, write_senses_reanswer
from timesearch.pocket.world import COLOURS, generator, preview_instants
from timesearch.profiles import load_profile
from timesearch.rewards import format_reward
from timesearch.training.supervised import UNKNOWN, Example
from timesearch.video.frames import FrameCache

VIDEOS = 7


def scenes(count: int) -> list[SensesScene]:
    return [make_senses_scene("heldout", seed) for seed in range(count)]


def test_a_scene_follows_from_its_name_and_shows_nothing_at_the_preview() -> None:
    for scene in scenes(60):
        assert parse_url(scene.url) == scene
        assert sorted(event.colour for event in scene.events) == sorted(COLOURS)
        assert len({scene.spoken.shape, scene.small.shape, scene.before.shape}) == 3
        assert not any(map(scene.visible, preview_instants(scene.duration)))
        begins = scene.flash.start
        assert int(begins * 2) == int((begins + FLASH) * 2), "an instant of the cache would show it"
        assert begins * 2 % 1 > 0.05
        assert scene.before.end < begins < scene.before.end + 2
        assert not any(event.start < begins + FLASH and begins < event.end for event in scene.events)
        said = " ".join(words for _, _, words in scene.lines)
        assert [event.shape for event in scene.events if event.shape in said.split()] == [scene.spoken.shape]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, caches and subtitle indexes of some scenes, by the real codec."""
    folder = tmp_path_factory.mktemp("senses")
    prepare(scenes(VIDEOS), folder)
    return folder


@pytest.mark.takes(60)
def test_each_question_needs_its_tool_and_no_other(root: Path) -> None:
    """Through the real codec, caches, subtitle stream and tools."""
    made = scenes(VIDEOS)
    assert min(accuracy(made, root).values()) >= 0.95
    for sense, tool in TOOL_OF.items():
        shares = accuracy(made, root, without=tool)
        others = [share for other, share in shares.items() if other != sense]
        assert shares[sense] <= 0.35, tool
        assert min(others) >= 0.95, tool
    for scene in made:
        frames = FrameCache.open(root / "frames" / f"{scene.samples[0].video}.frames")
        assert not any(abs(scene.flash.start + FLASH / 2 - time) < FLASH / 2 for time in frames.timestamps)
    left, top, *_ = (round(side * 320) for side in PLATE_BOX)
    whole = made[0].frame(made[0].small.start).crop((left, top, 320, 320))
    assert read_mark(whole) == made[0].small.mark


@pytest.fixture
def corpus(root: Path) -> Corpus:
    """The questions about the scenes, and a search with all tools."""
    settings = load_profile("senses").search
    samples = [sample for scene in scenes(VIDEOS) for sample in scene.samples]
    folders = (root / name for name in ("frames", "features", "subtitles", "videos"))
    return Corpus(samples, settings, Oracle(), *folders)


def act(example: Example) -> tuple[list[str], str | None]:
    """The tools that an episode calls, in order, and its answer."""
    said = [parse_turn(text_of(message)) for message in example.messages if message["role"] == "assistant"]
    return [turn.calls[0].name for turn in said if turn.calls], final_answer(example.messages)


def test_traces_take_the_tool_that_the_question_needs_and_answer_from_what_it_shows(corpus: Corpus) -> None:
    by_id = {sample.id: sample for sample in corpus.samples}
    first = ["seek_video_frames"]
    ways = {
        "said": ["search_subtitles", "seek_video_frames"],
        "small": [*first, "look_closer"],
        "brief": [*first, "watch"],
    }
    seen = set()
    lessons = SensesEpisodes(corpus, 60, 1, SENSES_CLEAN)
    for example in (lessons[number] for number in range(60)):
        sample = by_id[example.name.partition(",")[0]]
        calls, answer = act(example)
        assert format_reward(example.messages) == 1.0
        if answer == sample.answer and len(calls) > 1:
            assert calls == ways[str(sample.meta["sense"])]
            seen.add(sample.id)
    assert len(seen) > 0.9 * len(corpus.samples)


def test_a_tool_that_is_not_offered_is_not_called_and_the_answer_is_a_guess(corpus: Corpus) -> None:
    lessons = SensesEpisodes(corpus, 60, 2, SENSES_CLEAN, withheld=1.0)
    guesses = 0
    for example in (lessons[number] for number in range(60)):
        offered = {tool["function"]["name"] for tool in example.tools or []}
        calls, answer = act(example)
        assert len(offered) == 3
        assert set(calls) <= offered
        assert answer is not None
        guesses += not calls
    assert guesses > 5


def test_a_wrong_tool_shows_nothing_and_then_the_right_one_or_a_guess(corpus: Corpus) -> None:
    habits = SensesHabits(good=0.0, other=1.0, guess=0.0, give_up=0.5)
    by_id = {sample.id: sample for sample in corpus.samples}
    right = []
    lessons = SensesEpisodes(corpus, 60, 3, habits)
    for example in (lessons[number] for number in range(60)):
        sample = by_id[example.name.partition(",")[0]]
        calls, answer = act(example)
        special = [call for call in calls if call != "seek_video_frames"]
        assert special[:1] != [sample.meta["tool"]]
        right.append(answer == sample.answer and sample.meta["tool"] in special)
    assert 0.3 < sum(right) / len(right) < 0.8


def test_re_answers_know_what_the_evidence_holds(corpus: Corpus) -> None:
    rng = generator("re-answers")
    told = {True: 0, False: 0}
    for sample in corpus.samples:
        question = question_of(sample)
        for known in told:
            pair = write_senses_reanswer(corpus.search, sample.model_dump(), question, known, rng)
            if pair is not None:
                assert final_answer(pair[1:]) == (sample.answer if known else UNKNOWN)
                told[known] += 1
    assert min(told.values()) > 0.7 * len(corpus.samples)


def test_exercises_ask_for_what_their_pictures_tell(corpus: Corpus) -> None:
    lessons = SensesLookup(corpus, 40, 4)
    keys = set()
    for example in (lessons[number] for number in range(40)):
        questions, answers = example.messages[:-2:2], example.messages[1:-2:2]
        for asked, told in zip(questions, answers, strict=True):
            key = text_of(asked).rpartition("From ")[2]
            assert text_of(told).startswith((f"So {key}", f"So {key[:-1]}?"))
            keys.add(key if key in ("plate=", "flash=") else "=")
    assert keys == {"plate=", "flash=", "="}
