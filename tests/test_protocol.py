"""Protocols: another agent's words and rules, byte for byte, and a clone of its repository read without running it.

What is expected is computed here, in plain lines, from the rules as they were found by running the reference's code.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_clone as clone
from players import Puppet, script
from policy_server import Handler, Server
from scripted import OracleEncoder, write_caches

from timesearch.base.errors import RequestError
from timesearch.cli import main
from timesearch.data.messages import Message, blocks_of
from timesearch.data.samples import Prediction, Sample
from timesearch.dialects.first_tag import cut, parse_turn
from timesearch.inference.policies import Served, open_policy
from timesearch.pocket.policy import make_policy, make_processor, make_tokenizer, save_policy
from timesearch.profiles import load_profile
from timesearch.search.checkpoint import load_processor, template_options
from timesearch.search.engine_openai import OpenAIPolicy
from timesearch.search.engine_transformers import Request, TransformersPolicy
from timesearch.search.episode import run_episode
from timesearch.search.policy import ContextOverflowError, Reply, with_video_preview
from timesearch.search.protocol import Rules, SearchProtocol, Template
from timesearch.search.rendering import UNKNOWN, rendered_of
from timesearch.search.search import Search
from timesearch.settings import SearchSettings
from timesearch.training.data import require_trainable

SIZE = (448, 252)
"""Of cached frames, in pixels: 16 x 9 vision tokens."""
LONG, SHORT = 1100.0, 61.0


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("protocol")
    with pytest.raises(SystemExit) as ended:
        main(["protocol", "import", str(clone.make_clone(root / "clone")), "--out", str(root / "out")])
    assert not ended.value.code
    return root / "out"


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of three videos with 2 frames a second."""
    root = tmp_path_factory.mktemp("films")
    for name, seconds, size in (("long", LONG, SIZE), ("short", SHORT, SIZE), ("small", SHORT, (84, 56))):
        write_caches(root, f"{name}.mp4", np.arange(0, seconds, 0.5), size)
    return root / "cache"


@pytest.fixture(scope="module")
def search(imported: Path, films: Path) -> Search:
    """A search by the imported protocol and the profile's budgets."""
    settings = load_profile("timesearch-r").search
    settings.prompts = str(imported)
    return Search(settings, OracleEncoder(), films / "frames", films / "features")


def sample(video: str = "long", **fields: Any) -> Sample:
    seconds = {"long": LONG}.get(video, SHORT)
    return Sample(id="1", video=f"{video}.mp4", question="Where is the star?", duration=seconds, **fields)


def play(search: Search, *turns: str, of: Sample | None = None) -> tuple[Prediction, list[list[Message]]]:
    puppet = Puppet(script(*turns))
    prediction = asyncio.run(run_episode(search, puppet, of or sample()))
    assert prediction.error is None
    return prediction, puppet.seen


def call(name: str = "seek_video_frames", **arguments: Any) -> str:
    return f"<think>Look.</think><tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


ANSWER = "<think>Seen.</think><answer>A</answer>"


def smart(size: tuple[int, int], least: float, most: float) -> tuple[int, int]:
    """Qwen's rule, once more."""
    sides = [round(side / 28) * 28 for side in size]
    if sides[0] * sides[1] > most * 784:
        sides = [math.floor(side / math.sqrt(size[0] * size[1] / (most * 784)) / 28) * 28 for side in size]
    elif sides[0] * sides[1] < least * 784:
        sides = [math.ceil(side * math.sqrt(least * 784 / (size[0] * size[1])) / 28) * 28 for side in size]
    return sides[0], sides[1]


def texts_and_frames(content: Any) -> list[Any]:
    """Texts as they are, images as (index, time, size)."""
    return [
        block["text"] if block["type"] == "text" else (block["frame"], block["seconds"], block["image"].size)
        for block in content
    ]


def frames_of(indices: Sequence[int], size: tuple[int, int]) -> list[Any]:
    shown: list[Any] = []
    for index in indices:
        shown += [f"{index / 2:.1f}s", (index, index / 2, size)]
    return shown


def told(indices: Sequence[int]) -> str:
    return f"Shown at {','.join(f'{index / 2:.1f}s' for index in indices)}.\nGo on or end.\n"


# What is asked


@pytest.mark.parametrize(("video", "total", "most"), [("long", 2200, 768), ("short", 122, 122)], ids=["1100 s", "61 s"])
@pytest.mark.parametrize("kind", ["multiple_choice", "open_ended"])
def test_the_prompt_is_the_references(search: Search, video: str, total: int, most: int, kind: str) -> None:
    asked = "Where is the star?\nA. left\nB. right" if kind == "multiple_choice" else "Where is the star?"
    row = sample(video, type=kind, options=["left", "right"] if "A." in asked else [])
    row.question = asked
    _, seen = play(search, ANSWER, of=row)
    system, user = seen[0]
    assert system == {"role": "system", "content": clone.WHOLE_SYSTEM}
    *shown, text = blocks_of(user)
    length = {"long": "1100.0", "short": "61.0"}[video]
    if kind == "multiple_choice":
        expected = f"Look about, then pick a letter.\nAsked: {asked}\nLength {length} sec.\n"
    else:
        expected = f"Look about, then speak.\nAsked: {asked}\nLength {length} sec, {{braces}}.\n"
    assert text == {"type": "text", "text": expected}
    indices = [int(index) for index in np.round(np.linspace(0, total - 1, most))]
    size = smart(SIZE, 12, min(256, 24000 / most * 2))
    images = [block for block in shown if block["type"] == "image"]
    assert [(block["frame"], block["seconds"], block["image"].size) for block in images] == [
        (index, index / 2, size) for index in indices
    ]
    assert {block["fps"] for block in images} == {most / total * 2.0}


def test_a_question_without_its_options_gets_them(search: Search) -> None:
    _, seen = play(search, ANSWER, of=sample(type="multiple_choice", options=["left", "right"]))
    assert "Asked: Where is the star?\nA. left\nB. right\n" in blocks_of(seen[0][1])[-1]["text"]


def test_a_row_without_duration_counts_its_frames(search: Search) -> None:
    row = sample("short")
    row.duration = None
    _, seen = play(search, ANSWER, of=row)
    assert "Length 61.0 sec" in blocks_of(seen[0][1])[-1]["text"]


# What comes back


def searched(video: str = "long") -> np.ndarray:
    """Indices of the frames of the long video that are searched."""
    total = 2200 if video == "long" else 122
    return np.round(np.linspace(0, total - 1, min(total, 2048))).astype(int)


@pytest.mark.parametrize(
    ("arguments", "window", "count"),
    [
        ({"query": None, "start_time": 10.3, "end_time": 20.3}, range(20, 42), 8),
        ({"query": "", "start_time": 10.3, "end_time": 20.3, "num_frames": 3}, range(20, 42), 3),
        ({"start_time": 10, "end_time": 20, "num_frames": "4", "mood": "calm"}, range(20, 41), 4),
        ({"start_time": "10.3s", "end_time": "20.3"}, range(0, 42), 8),
        ({"start_time": 50, "end_time": "later"}, range(100, 122), 8),
        ({"num_frames": "many"}, range(122), 8),
        ({"num_frames": 0}, range(122), 1),
        ({"num_frames": 99}, range(122), 8),
        ({"start_time": -5, "end_time": 1.2}, range(0, 4), 8),
        ({"start_time": None, "end_time": None, "num_frames": None}, range(122), 8),
    ],
)
def test_a_call_without_query_shows_its_window_evenly(
    search: Search, arguments: dict[str, Any], window: range, count: int
) -> None:
    _, seen = play(search, call(**arguments), ANSWER, of=sample("short"))
    places = range(len(window))
    if len(window) > count:
        places = [int(place) for place in np.round(np.linspace(0, len(window) - 1, count))]
    indices = [window[place] for place in places]
    message = seen[1][-1]
    assert message["role"] == "tool"
    assert texts_and_frames(message["content"]) == [*frames_of(indices, smart(SIZE, 128, 256)), told(indices)]


def test_a_first_search_shows_frames_with_their_times(search: Search) -> None:
    _, seen = play(search, call(query="star", mood="calm"), ANSWER, of=sample("short"))
    *shown, text = texts_and_frames(seen[1][-1]["content"])
    indices = [index for index, *_ in shown[1::2]]
    assert len(indices) == 8
    assert [*shown, text] == [*frames_of(indices, smart(SIZE, 128, 256)), told(indices)]
    _, seen = play(search, call(query="star", start_time=10.3, end_time=20.3), ANSWER, of=sample("short"))
    inside = [frame[0] for frame in texts_and_frames(seen[1][-1]["content"])[1:-1:2]]
    assert len(inside) == 8
    assert set(inside) <= set(range(20, 42))


def test_of_a_long_video_2048_frames_are_searched_and_their_times_follow_from_their_places(search: Search) -> None:
    kept, rate = searched(), 2048 / 2200 * 2.0
    first, last = math.floor(10.3 * rate), math.ceil(20.3 * rate)
    _, seen = play(search, call(start_time=10.3, end_time=20.3, num_frames=4), ANSWER)
    places = [first + int(place) for place in np.round(np.linspace(0, last - first, 4))]
    size = smart(SIZE, 128, 256)
    *shown, text = texts_and_frames(seen[1][-1]["content"])
    assert shown == [
        part for place in places for part in (f"{place / rate:.1f}s", (int(kept[place]), place / rate, size))
    ]
    assert text == f"Shown at {','.join(f'{place / rate:.1f}s' for place in places)}.\nGo on or end.\n"


def test_small_frames_are_enlarged(search: Search) -> None:
    _, seen = play(search, call(num_frames=1), ANSWER, of=sample("small"))
    size = texts_and_frames(seen[1][-1]["content"])[1][2]
    assert size == smart((84, 56), 128, 256)
    assert size[0] * size[1] >= 128 * 784


@pytest.mark.parametrize(
    "turn",
    [
        call("zoom", query="star"),
        call(query="star", start_time=20, end_time=10),
        call(query="star", start_time=500, end_time=600),
        call(query="star", end_time="inf"),
        call(query="star", start_time="nan"),
        '<tool_call>{"name": "seek_video_frames", "arguments": [1]}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
    ],
    ids=["unknown tool", "reversed window", "empty window", "no end", "no start", "arguments that are none", "no name"],
)
def test_a_call_that_fails_gets_the_text_of_invalid_calls(search: Search, turn: str) -> None:
    prediction, seen = play(search, turn, ANSWER, of=sample("short"))
    assert seen[1][-1]["role"] == "tool"
    assert texts_and_frames(seen[1][-1]["content"]) == [clone.INVALID]
    assert prediction.predicted_answer == "A"


@pytest.mark.parametrize(
    "turn",
    ["<tool_call>[1, 2]</tool_call>", "I see nothing.", '<tool_call>{"name": "seek', "<answer>A"],
    ids=["unreadable", "silent", "open call", "open answer"],
)
def test_what_cannot_be_read_ends_the_episode(search: Search, turn: str) -> None:
    prediction, seen = play(search, turn, ANSWER, of=sample("short"))
    assert (prediction.outcome, prediction.turns) == ("unanswered", 1)
    assert [messages[0]["content"] for messages in seen] == [clone.WHOLE_SYSTEM, clone.TRACE_SYSTEM]


def test_of_two_calls_the_first_counts_and_history_ends_with_it(search: Search) -> None:
    first = call(num_frames=1)
    second = first.partition("</think>")[2].replace("1", "2")
    prediction, seen = play(search, f"Hm. {first}{second}", ANSWER, of=sample("short"))
    assert seen[1][-2] == {"role": "assistant", "content": first}
    assert len(prediction.searched_seconds) == 1


@pytest.mark.parametrize(
    ("text", "kept", "acts"),
    [
        ("<think>a</think><think>b</think><answer>x</answer>!", "<think>b</think><answer>x</answer>", "x"),
        ("<think>a <answer>x</answer> b</think><answer>y</answer>", "<think>a <answer>x</answer>", "x"),
        ("<answer>x</answer><tool_call>{}</tool_call>?", "<answer>x</answer><tool_call>{}</tool_call>", "x"),
        ("</answer><answer>x</answer>", "</answer>", None),
        ("no tags", "no tags", None),
    ],
)
def test_the_first_tag_acts_also_inside_a_thought(text: str, kept: str, acts: str | None) -> None:
    assert cut(text) == kept
    assert parse_turn(text).answer == acts


def test_the_tenth_turn_may_search_and_nothing_is_asked_after_it(search: Search) -> None:
    turns = [call(num_frames=1, start_time=number) for number in range(10)]
    prediction, seen = play(search, *turns, of=sample("short"))
    assert (prediction.turns, prediction.tool_calls, prediction.outcome) == (10, 10, "unanswered")
    assert len([messages for messages in seen if messages[1]["role"] == "user" and len(messages) > 2]) == 9
    said = [message["content"][-1]["text"] for message in prediction.prediction if message["role"] == "tool"]
    assert said == [told([2 * number]) for number in range(10)]


def test_the_reanswer_shows_frames_as_calls_found_them_after_a_system_text_of_its_own(search: Search) -> None:
    later, earlier = call(start_time=30, end_time=30, num_frames=1), call(start_time=10, end_time=10, num_frames=1)
    prediction, seen = play(search, later, earlier, later, ANSWER, of=sample("short"))
    system, user = seen[-1]
    assert system == {"role": "system", "content": clone.TRACE_SYSTEM}
    size = smart(SIZE, 128, 256)
    assert texts_and_frames(user["content"]) == [*frames_of([60, 20, 60], size), "Asked: Where is the star?"]
    assert prediction.reanswer == later  # what the script says to a first turn, unread


def test_the_reanswer_keeps_what_was_said_to_calls_that_failed(search: Search) -> None:
    found = call(start_time=10, end_time=10, num_frames=1)
    _, seen = play(search, call("zoom"), found, call(query="star", start_time=500), ANSWER, of=sample("short"))
    size = smart(SIZE, 128, 256)
    assert texts_and_frames(seen[-1][1]["content"]) == [
        *(clone.INVALID, *frames_of([20], size), clone.INVALID),
        "Asked: Where is the star?",
    ]


@pytest.mark.parametrize("turns", [(ANSWER,), (call("zoom"), ANSWER), ("I see nothing.",)])
def test_an_episode_that_found_nothing_is_asked_again_from_one_frame(search: Search, turns: tuple[str, ...]) -> None:
    """The frame is that which the call finds that the reference makes for such an episode."""
    prediction, seen = play(search, *turns, of=sample("short"))
    search.open(sample("short").model_dump())
    (block, shown, _) = search.call("seek_video_frames", {"query": "any", "end_time": 3600, "num_frames": 1})
    failed = [clone.INVALID] * (len(turns) - 1)
    size = smart(SIZE, 128, 256)
    assert shown["image"].size == size
    assert texts_and_frames(seen[-1][1]["content"]) == [
        *(*failed, block["text"], (shown["frame"], shown["seconds"], size)),
        "Asked: Where is the star?",
    ]
    assert prediction.reanswer == turns[0]
    assert (prediction.searched_seconds, prediction.tool_calls) == ([], len(failed))


ODD: tuple[Any, ...] = (
    *(None, True, "", " ", "star", "x" * 5000, "10.3", "nan", "-inf", "1e999", "9" * 5000, [], {}, [[[]]], "\ud800"),
    *(-1, -1e308, 0, 0.5, 8, 60.5, 61, 1e308, 10**30),
)


def test_any_arguments_show_frames_or_get_the_text_of_invalid_calls(search: Search) -> None:
    chosen = random.Random(0)
    names = ("query", "start_time", "end_time", "num_frames", "mood")
    for _ in range(150):
        turn = call(**{name: chosen.choice(ODD) for name in names if chosen.random() < 0.8})
        prediction, seen = play(search, turn, ANSWER, of=sample("short"))
        assert prediction.predicted_answer == "A"
        *shown, text = texts_and_frames(seen[1][-1]["content"])
        indices = [frame[0] for frame in shown[1::2]]
        assert text == (told(indices) if indices else clone.INVALID)
        assert len(indices) <= 8


def test_released_budgets_reach_the_engine(search: Search, films: Path, imported: Path) -> None:
    """Of a turn 512 tokens at most, decoded greedily, whatever the checkpoint's own configuration says."""
    bodies = []

    class Recording(Handler):
        owner = "vllm"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path.endswith("/completions"):
                bodies.append(body)
            self._send(200, {"choices": [{"message": {"content": ANSWER}}]})

    server = Server(("127.0.0.1", 0), Recording)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = load_profile("timesearch-r").for_inference()
    settings.search.prompts, settings.infer.engine = str(imported), "openai"
    at = Served([f"http://127.0.0.1:{server.server_port}/v1"], "tiny", 10.0)
    encoded = Search(settings.search, search.encoder, films / "frames", films / "features", encoded=True)

    async def episode() -> Prediction:
        with open_policy(settings, at=at) as policy:
            await policy.connect()
            prediction = await run_episode(encoded, policy, sample("short"))
            await policy.close()
        return prediction

    try:
        assert asyncio.run(episode()).outcome == "answered"
    finally:
        server.shutdown()
        server.server_close()
    sampling = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert len(bodies) == 2
    for body in bodies:
        assert {name: body[name] for name in ("max_tokens", *sampling)} == {"max_tokens": 512, **sampling}


class Short(Puppet):
    """A policy whose context holds `fits` messages."""

    def __init__(self, fits: int, *turns: str) -> None:
        super().__init__(script(*turns), context=64)
        self.fits = fits

    async def reply(self, messages: Sequence[Message]) -> Reply:
        if len(messages) > self.fits:
            raise ContextOverflowError("too long")
        return await super().reply(messages)


def test_where_the_context_is_full_the_episode_fails_and_keeps_what_it_has(search: Search, films: Path) -> None:
    """By the released agent's rule; by this project's own the newest frames give way, and it is asked to answer."""
    turns = [call(num_frames=8, start_time=10), call(num_frames=8), ANSWER]
    failed = asyncio.run(run_episode(search, Short(5, *turns), sample("short")))
    assert failed.error is not None
    assert (failed.error.type, failed.outcome, failed.limit) == ("context", "failed", None)
    assert [len(message["content"]) for message in failed.prediction if message["role"] == "tool"] == [17, 17]
    own = Search(SearchSettings(max_turns=10), search.encoder, films / "frames", films / "features")
    turns = [call(query="star", start_time=10), ANSWER]
    kept = asyncio.run(run_episode(own, Short(4, *turns), sample("short")))
    assert (kept.error, kept.outcome, kept.limit) == (None, "answered", "context")
    assert kept.searched_seconds == []


# The engines

OWN_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""A chat template that shows no tools, as Qwen2.5-VL's own."""


@pytest.fixture(scope="module")
def own_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with that template."""
    tokenizer = make_tokenizer()
    processor = make_processor(tokenizer)
    processor.chat_template = OWN_TEMPLATE
    folder = tmp_path_factory.mktemp("own") / "policy"
    save_policy(make_policy(tokenizer), processor, folder)
    return folder


def test_a_checkpoint_has_one_chat_template_in_process_and_in_its_server(
    search: Search, own_policy: Path, tmp_path: Path
) -> None:
    own = load_processor(own_policy, "own")
    assert own.chat_template == OWN_TEMPLATE
    assert template_options(own_policy, "own", tmp_path) == []
    option, path = template_options(own_policy, "tools", tmp_path)
    assert option == "--chat-template"
    assert Path(path).read_text() == load_processor(own_policy).chat_template != OWN_TEMPLATE

    _, seen = play(search, call(num_frames=1), ANSWER, of=sample("short"))
    shown = [with_video_preview(message, position) for position, message in enumerate(seen[1])]
    policy = TransformersPolicy(make_policy(own.tokenizer), own, "own")
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    assert policy.render(Request(shown, [], 8)) == (
        f"<|im_start|>system\n{clone.WHOLE_SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{video}Look about, then speak.\nAsked: Where is the star?\nLength 61.0 sec, {{braces}}.\n"
        f"<|im_end|>\n<|im_start|>assistant\n{call(num_frames=1)}<|im_end|>\n"
        f"<|im_start|>tool\n0.0s{image}{told([0])}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("owner", ["vllm", "sglang", "vllm that does not say", "somebody"])
@pytest.mark.parametrize("template", ["own", "tools"])
def test_a_server_that_renders_otherwise_is_warned_of(
    own_policy: Path, template: Template, owner: str, caplog: pytest.LogCaptureFixture
) -> None:
    processor = load_processor(own_policy, "own")
    asked = []

    class Rendering(Handler):
        """A server that renders by the checkpoint's own template."""

        model = str(own_policy)

        def do_POST(self) -> None:
            asked.append(self.path)
            messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
            text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            silent = owner.endswith("say")
            self._send(404, {}) if silent else self._send(
                200, {"count": 1, "tokens": processor.tokenizer(text)["input_ids"]}
            )

    Rendering.owner = owner.split()[0]
    server = Server(("127.0.0.1", 0), Rendering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    policy = OpenAIPolicy([f"http://127.0.0.1:{server.server_port}/v1"], "", template=template)

    async def connect() -> None:
        await policy.connect()
        await policy.close()

    try:
        asyncio.run(connect())
    finally:
        server.shutdown()
        server.server_close()
    told = owner in ("vllm", "sglang")
    assert asked == ["/tokenize"] * (owner != "somebody")
    assert policy.template == (rendered_of(own_policy, "own") if told else UNKNOWN)
    warned = [record.getMessage() for record in caplog.records if "another chat template" in record.getMessage()]
    assert len(warned) == (told and template == "tools")


# The folder


def test_the_folder_is_what_the_clone_says(imported: Path) -> None:
    files = {path.name: path.read_bytes() for path in imported.iterdir()}
    assert files["user.txt"].decode() == clone.OPEN.replace("{{", "{").replace("}}", "}")
    assert files["user.multiple_choice.txt"].decode() == clone.CHOICE
    assert files["correction.txt"].decode() == clone.INVALID
    assert json.loads(files["tools.json"]) == [{"line": clone.LINE, "tool": "seek_video_frames"}]
    assert SearchProtocol.load(str(imported)).rules.searched_frames == 2048


@pytest.mark.parametrize("name", ["protocol.yaml", "tools.json", "user.txt", "user.multiple_choice.txt"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "nowhere"])
def test_what_is_no_file_does_not_count_as_absent(imported: Path, tmp_path: Path, name: str, kind: str) -> None:
    for path in imported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    bad = tmp_path / name
    bad.unlink()
    {"folder": bad.mkdir, "pipe": lambda: os.mkfifo(bad), "nowhere": lambda: bad.symlink_to("gone")}[kind]()
    with pytest.raises(RequestError, match=f"{name} is no file"):
        SearchProtocol.load(str(tmp_path))


def test_a_digest_tells_protocols_apart(imported: Path) -> None:
    protocols = [SearchProtocol.load(name) for name in ("default", "pocket", str(imported))]
    assert len({protocol.digest for protocol in protocols}) == 3
    assert all(protocol.rules == Rules() for protocol in protocols[:2])


def test_training_refuses_what_it_cannot_play(imported: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="rule dialect of the protocol"):
        require_trainable(tmp_path, SearchSettings(prompts=str(imported)))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("protocol.yaml", b"silnt: ends", "silnt"),
        ("protocol.yaml", b"searched_frames: 0", "searched_frames"),
        ("protocol.yaml", b"[1]", "no names"),
        ("protocol.yaml", b"a: b: c", "not YAML"),
        ("tools.json", b"{", "cannot be read"),
        ("tools.json", b"[" * 100_000, "cannot be read"),
        ("tools.json", b'[{"line": "{}", "tool": "seek_video_frames"}]', "no JSON schema"),
        ("tools.json", json.dumps([{"line": clone.LINE, "tool": "zoom"}]).encode(), "zoom"),
        (
            "tools.json",
            json.dumps([{"line": clone.LINE, "tool": "seek_video_frames", "arguments": {"q": "what"}}]).encode(),
            "what",
        ),
        ("user.txt", b"\xff", "UTF-8"),
        ("system.txt", b"x" * 2**21, "larger"),
        ("next.txt", None, "next.txt"),
    ],
)
def test_a_broken_folder_is_refused_by_name(
    imported: Path, tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    for path in imported.iterdir():
        if path.name != name or content is not None:
            (tmp_path / path.name).write_bytes(content if path.name == name and content else path.read_bytes())
    with pytest.raises(RequestError, match=said):
        Search(SearchSettings(prompts=str(tmp_path)), OracleEncoder(), tmp_path, tmp_path)


HOSTILE = {
    "missing": None,
    "huge": b"# " + b"x" * 2**21,
    "binary": bytes(range(256)),
    "deep brackets": b"X = " + b"(" * 100_000,
    "deep signs": b"X = " + b"-" * 100_000 + b"1",
    "deep names": b"X = a" + b".b" * 100_000,
    "long sum": b"INVALID = ''" + b" + ''" * 3_000,
    "no Python": b"def def def",
    "circle": b"INVALID_A = INVALID_B\nINVALID_B = INVALID_A\n",
    "computed": b"INVALID_CALL = open('/etc/passwd').read()\n",
    "two": b"INVALID_A = 'a'\nINVALID_B = 'b'\n",
    "filled in": b"INVALID_CALL = 'a {problem}'\n",
    "empty": b"",
}


@pytest.mark.parametrize("kind", [*HOSTILE, "link out", "folder", "loop"])
def test_a_hostile_clone_is_refused_by_name(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = clone.make_clone(tmp_path / "clone")
    bad = root / "time_r1/environment/video_env.py"
    text = bad.read_text()
    bad.unlink()
    if kind == "link out":
        (tmp_path / "elsewhere.py").write_text(text)
        bad.symlink_to(tmp_path / "elsewhere.py")
    elif kind == "folder":
        bad.mkdir()
    elif kind == "loop":
        bad.symlink_to(bad)
    elif (content := HOSTILE[kind]) is not None:
        bad.write_bytes(content)
    (root / "time_r1/prompt/tool_response.py").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["protocol", "import", str(root), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert ["tool_response.py" in said[0], "video_env.py" in said[1], len(said)] == [True, True, 2]
    assert not list((tmp_path / "out").glob("*"))


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = clone.make_clone(tmp_path / "clone")
    with pytest.raises(SystemExit) as ended:
        main(["protocol", "import", str(root), "--out", str(root)])
    assert ended.value.code == 2
    assert "is not empty" in capsys.readouterr().err
