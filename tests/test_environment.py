"""The search environment: TRL's contract, budgets, windows and wrong calls."""

from __future__ import annotations

import asyncio
import inspect
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from players import Puppet, answer_turn, build_library, play_all, script, search_turn
from scripted import OracleEncoder, make_settings

from timesearch import FrameCache
from timesearch.base.errors import CacheMismatchError, ItemError
from timesearch.data.messages import text_of
from timesearch.data.rows import read_samples
from timesearch.data.samples import Prediction
from timesearch.inference.methods import episode_of
from timesearch.inference.playing import Job
from timesearch.pocket.world import make_scene, question
from timesearch.search.budget import fit_size, preview_plan
from timesearch.search.environment import SearchEnvironment, environment_factory
from timesearch.search.search import Search
from timesearch.settings import SearchSettings

WORLD = "guess-proof"
VIDEO = f"{WORLD}/0.mp4"


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("environment")
    build_library(root, videos=2)
    return root / "cache"


def open_environment(caches: Path, encoded: bool = False, **changes: object) -> SearchEnvironment:
    search = make_settings().search.model_copy(update=changes)
    make_search = partial(Search, search, OracleEncoder(), caches / "frames", caches / "features", encoded)
    environment = environment_factory(make_search, search.tools)()
    environment.reset(video=VIDEO, question="What colour is the star?")
    return environment


def seconds_of(blocks: list[dict]) -> list[float]:
    return [block["seconds"] for block in blocks if block["type"] == "image"]


def test_trl_finds_one_tool_with_its_documentation(caches: Path) -> None:
    from transformers.utils.chat_template_utils import get_json_schema

    environment = open_environment(caches)
    members = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    public = [name for name in members if not name.startswith("_") and name not in ("reset", "get_reward")]
    assert public == ["seek_video_frames"] == list(environment.search.tools)
    function = get_json_schema(environment.seek_video_frames)["function"]
    assert "match a description" in function["description"]
    assert function["parameters"]["required"] == ["query"]
    for name, kind in (
        ("query", "string"),
        ("start_time", "number"),
        ("end_time", "number"),
        ("num_frames", "integer"),
    ):
        parameter = function["parameters"]["properties"][name]
        assert parameter["type"] == kind
        assert parameter["description"]


def test_trl_appends_the_preview_to_the_user_message(caches: Path) -> None:
    environment = open_environment(caches)
    blocks = environment.reset(video=VIDEO, question="Which?", options=["red", "blue"], id="1", answer="A", split="")
    assert [block["type"] for block in blocks] == ["text", "image"] * 4 + ["text"]
    assert blocks[0]["text"] == f"{blocks[1]['seconds']:.1f}s"
    assert blocks[-1]["text"].endswith("Which?\nA. red\nB. blue")


def test_the_search_finds_the_needle_and_its_frames_are_kept(caches: Path) -> None:
    environment = open_environment(caches)
    needle = make_scene(WORLD, "train", 0).needles[0]
    blocks = environment.seek_video_frames(needle.shape, num_frames=1)
    (found,) = seconds_of(blocks)
    assert needle.start <= found < needle.end
    assert [each.seconds for each in environment.search.evidence] == [found]
    content = environment.search.reanswer()
    assert content is not None
    assert seconds_of(content) == [found]
    assert "What colour is the star?" in content[-1]["text"]


def test_one_object_plays_one_episode_after_another(caches: Path) -> None:
    environment = open_environment(caches)
    environment.seek_video_frames("star")
    environment.reset(video=f"{WORLD}/1.mp4", question=question(make_scene(WORLD, "train", 1).needles[0].shape))
    assert environment.search.evidence == []
    assert environment.search.reanswer() is None


def test_the_window_is_kept(caches: Path) -> None:
    environment = open_environment(caches, max_turns=9)
    assert all(10 <= found <= 20 for found in seconds_of(environment.seek_video_frames("star", 10, 20)))
    assert seconds_of(environment.seek_video_frames("star", "12s", "12.0", "3")) == [12.0]
    last = float(environment.search.video.frames.timestamps[-1])
    assert seconds_of(environment.seek_video_frames("star", last, -1)) == [last]
    assert len(seconds_of(environment.seek_video_frames("star", -5, 1e9, 10**6))) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"query": ""}, "query"),
        ({"query": 3}, "query"),
        ({"query": "star " * 200}, "query"),
        ({"query": "star", "start_time": 30, "end_time": 20}, "start_time 30 lies after end_time 20"),
        ({"query": "star", "start_time": 1e6, "end_time": 2e6}, "the video ends at"),
        ({"query": "star", "start_time": float("inf")}, "start_time must be a finite number"),
        ({"query": "star", "end_time": "noon"}, "end_time must be a number"),
        ({"query": "star", "num_frames": 0}, "num_frames"),
        ({"query": "star", "num_frames": True}, "num_frames"),
        ({"query": "star", "num_frames": None}, "num_frames"),
    ],
)
def test_a_wrong_call_is_told_what_to_correct(caches: Path, arguments: dict, told: str) -> None:
    environment = open_environment(caches)
    (block,) = environment.seek_video_frames(**arguments)
    assert told in block["text"]
    assert environment.search.evidence == []


def test_unknown_tools_and_arguments_are_told_what_to_correct(caches: Path) -> None:
    environment = open_environment(caches)
    for name in ("_open", "reset", "zoom<|im_end|>", ""):
        (block,) = environment.search.call(name, {"query": "star"})
        assert "only seek_video_frames" in block["text"]
        assert "<|" not in block["text"]
    (block,) = environment.search.call("seek_video_frames", {"query": "star", "frames": 3})
    assert "'frames'" in block["text"]
    (block,) = environment.search.call("seek_video_frames", {})
    assert "'query'" in block["text"]


def test_the_last_call_is_followed_by_the_request_to_answer(caches: Path) -> None:
    environment = open_environment(caches, max_turns=3)
    texts = [text_of({"role": "tool", "content": environment.seek_video_frames("star")}) for _ in range(3)]
    overflow = environment.search.protocol.texts["overflow"]
    assert [overflow in text for text in texts] == [False, True, True]
    assert texts[2] == overflow


def test_no_more_frames_are_shown_than_there_is_room_for(caches: Path) -> None:
    environment = open_environment(caches, max_turns=9)
    environment.search.room = 1
    assert len(seconds_of(environment.seek_video_frames("star"))) == 1
    environment.search.room = 0
    assert environment.seek_video_frames("star") == environment.search.say("overflow")


def test_searched_frames_keep_to_max_tokens(caches: Path) -> None:
    """A frame of 64 x 64 pixels is four tokens; two of them allowed, search and re-answer show it smaller."""
    environment = open_environment(caches, max_tokens=2, min_tokens=1)
    blocks = environment.seek_video_frames("star", num_frames=1)
    again = environment.search.reanswer()
    assert again is not None
    sizes = {block["image"].size for block in [*blocks, *again] if block["type"] == "image"}
    assert sizes == {fit_size((64, 64), 2, 32)}
    assert sizes != {(64, 64)}


def test_engines_behind_http_get_the_cached_bytes(caches: Path) -> None:
    environment = open_environment(caches, encoded=True)
    blocks = environment.seek_video_frames("star", num_frames=1)
    cache = environment.search.video.frames
    assert blocks[1]["jpeg"] == cache.jpeg(blocks[1]["frame"])
    assert "image" not in blocks[1]


def test_control_tokens_in_a_question_are_words(caches: Path) -> None:
    environment = open_environment(caches)
    blocks = environment.reset(video=VIDEO, question="<|im_end|><|image_pad|> star?", options=["<|vision_start|>"])
    assert "<|" not in blocks[-1]["text"]


def test_missing_caches_and_paths_that_climb_are_refused(caches: Path) -> None:
    environment = open_environment(caches)
    for video, reason in (("no.mp4", "missing_cache"), ("../secret.mp4", "unsafe_path")):
        with pytest.raises(ItemError) as caught:
            environment.reset(video=video, question="?")
        assert caught.value.reason == reason


def test_caches_that_do_not_belong_together_are_refused(caches: Path, tmp_path: Path) -> None:
    stranger = OracleEncoder()
    stranger.name = "another"
    search = Search(make_settings().search, stranger, caches / "frames", caches / "features")
    with pytest.raises(CacheMismatchError, match=r"holds features of oracle .*, but the encoder is another"):
        search.open({"video": VIDEO, "question": "?"})

    shutil.copytree(caches, tmp_path / "cache")
    frames, features = tmp_path / "cache/frames", tmp_path / "cache/features"
    search = Search(make_settings().search, OracleEncoder(), frames, features)
    search.open({"video": VIDEO, "question": "?"})
    own, other = (FrameCache.open(frames / f"{WORLD}/{number}.mp4.frames").digest[:12] for number in (0, 1))
    table = features / f"{VIDEO}.safetensors"
    whole = table.read_bytes()
    table.write_bytes((features / f"{WORLD}/1.mp4.safetensors").read_bytes())
    with pytest.raises(CacheMismatchError, match=f"features of the frame cache {other}, but .* is {own}"):
        search.open({"video": VIDEO, "question": "?"})

    table.write_bytes(whole[:-200] + bytes([whole[-200] ^ 1]) + whole[-199:])
    with pytest.raises(ItemError, match="do not fit their digest") as caught:
        search.open({"video": VIDEO, "question": "?"})
    assert caught.value.reason == "damaged_cache"
    search.open({"video": f"{WORLD}/1.mp4", "question": "?"})


def test_an_episode_whose_caches_do_not_belong_together_is_set_aside(tmp_path: Path) -> None:
    settings = build_library(tmp_path, videos=2)
    features = settings.paths.features / WORLD
    shutil.copy(features / "1.mp4.safetensors", features / "0.mp4.safetensors")
    samples = read_samples(settings.paths.test_samples)
    jobs = [Job(one, episode_of(method, 8), method) for method in ("uniform", "grpo_csv") for one in samples]
    ended: list[tuple[str, str, str | None]] = []

    def record(job: Job, row: Prediction) -> None:
        ended.append((job.method, job.sample.video, row.error and row.error.type))

    puppet = Puppet(script(search_turn(), answer_turn()))
    asyncio.run(play_all(jobs, puppet, settings, record))  # type: ignore[arg-type]
    assert sorted(ended, key=str) == [
        ("grpo_csv", f"{WORLD}/0.mp4", "cache_mismatch"),
        ("grpo_csv", f"{WORLD}/1.mp4", None),
        ("uniform", f"{WORLD}/0.mp4", "cache_mismatch"),
        ("uniform", f"{WORLD}/1.mp4", None),
    ]


@given(
    st.integers(1, 5000),
    st.tuples(st.integers(28, 2000), st.integers(28, 2000)),
    st.integers(1, 30_000),
    st.integers(1, 64),
    st.integers(1, 256),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_the_preview_stays_within_its_budgets(
    total: int, size: tuple[int, int], budget: int, least: int, most: int
) -> None:
    search = SearchSettings(total_video_tokens=budget, min_tokens=least, max_tokens=max(least, most), patch=28)
    indices, (width, height) = preview_plan(total, size, search)
    tokens = (width // 28) * (height // 28)
    assert 1 <= len(indices) <= min(total, search.max_frames)
    assert indices == sorted(set(indices))
    assert indices[0] >= 0
    assert indices[-1] < total
    assert width <= size[0] + 27
    assert height <= size[1] + 27
    assert 1 <= tokens <= max(search.max_tokens, 1)
    assert len(indices) * tokens <= max(budget, least)


def test_the_papers_preview_trades_size_for_frames() -> None:
    indices, size = preview_plan(7200, (448, 252), SearchSettings())
    assert len(indices) == 768
    assert size == (112, 84)
    indices, size = preview_plan(40, (448, 252), SearchSettings())
    assert (len(indices), size) == (40, (448, 252))
    assert fit_size((64, 64), 4, 32) == (64, 64)
    pocket = SearchSettings(total_video_tokens=16, patch=32)
    assert preview_plan(119, (64, 64), pocket) == ([14, 44, 74, 104], (64, 64))
    assert np.prod(fit_size((2000, 28), 4, 28)) == 4 * 28 * 28
