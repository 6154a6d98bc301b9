"""The stage `infer` and its two engines, with a small server of the protocol and with a real vLLM."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from players import Puppet, answer_turn, build_library, new_search, play_all, script, search_turn
from policy_server import Handler, Server
from reference_clone import make_clone
from scripted import OracleEncoder

from timesearch.base.errors import ItemError, RequestError, TemporaryError
from timesearch.base.extras import python_with_vllm
from timesearch.base.machine import inspect_machine
from timesearch.base.replies import Completion
from timesearch.cli import main
from timesearch.data.messages import Message
from timesearch.data.rows import read_samples
from timesearch.data.samples import Prediction, Sample
from timesearch.inference.infer import run
from timesearch.inference.methods import chosen_frames
from timesearch.inference.playing import Job
from timesearch.judge import JudgeClient
from timesearch.judge.agreement import LABELLED, read_labelled
from timesearch.judge.server import judge_server
from timesearch.search.engine_openai import VIDEO_OPTIONS, OpenAIPolicy, serialise
from timesearch.search.engine_transformers import Request, TransformersPolicy
from timesearch.search.episode import run_episode, system_message
from timesearch.search.policy import EngineError, Reply, with_video_preview
from timesearch.search.protocol import SearchProtocol
from timesearch.search.reference import import_protocol
from timesearch.settings import Judge, Settings

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Caches, questions, and one untrained policy that serves as cold start and as trained policy."""
    from timesearch.pocket.policy import make_policy, make_processor, make_tokenizer, save_policy

    settings = build_library(tmp_path_factory.mktemp("inference"), videos=4, questions=2)
    tokenizer = make_tokenizer()
    processor = make_processor(tokenizer)
    # vLLM takes the statistics of images for videos too; in released Qwen3-VL they are the same.
    processor.video_processor.image_mean = processor.image_processor.image_mean
    processor.video_processor.image_std = processor.image_processor.image_std
    for folder in (settings.paths.coldstart, settings.paths.train):
        save_policy(make_policy(tokenizer), processor, folder)
        # What no engine is to follow, for training does not.
        own = json.loads((folder / "generation_config.json").read_text())
        own |= {"repetition_penalty": 5.0, "do_sample": True, "top_k": 1, "top_p": 0.1, "temperature": 0.1}
        (folder / "generation_config.json").write_text(json.dumps(own))
    settings.search.max_new_tokens = 12
    settings.tracking.traced_episodes = 0
    return settings


@pytest.fixture
def settings(project: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    copy = project.model_copy(deep=True)
    copy.paths.results = tmp_path / "results"
    monkeypatch.setattr("timesearch.retrieval.encoder.load_encoder", lambda *_, **__: OracleEncoder())
    return copy


@pytest.fixture
def puppet(monkeypatch: pytest.MonkeyPatch) -> Puppet:
    """A scripted policy in place of every checkpoint."""
    policy = Puppet(script(search_turn(num_frames=1), answer_turn()))
    monkeypatch.setattr(TransformersPolicy, "load", classmethod(lambda *_: policy))
    return policy


def rows_of(settings: Settings, method: str) -> list[Prediction]:
    path = settings.paths.results / "predictions" / f"{method}.jsonl"
    return [Prediction.model_validate_json(line) for line in path.read_text().splitlines()]


def test_the_stage_writes_each_method_in_the_order_of_the_samples(settings: Settings, puppet: Puppet) -> None:
    settings.infer.baselines = ["uniform", "one_shot", "one_shot_topk", "oracle", "coldstart"]
    result = run(settings)
    methods = [*settings.infer.baselines, "grpo_csv"]
    ids = [sample.id for sample in read_samples(settings.paths.test_samples)]
    assert sorted(result.done) == sorted(f"{method}/{identity}" for method in methods for identity in ids)
    for method in methods:
        rows = rows_of(settings, method)
        assert [row.id for row in rows] == ids
        assert all(row.outcome == "answered" and row.rewards.keys() >= {"format", "accuracy"} for row in rows)
        frames = {"uniform": 8, "one_shot": 8, "one_shot_topk": 8}.get(method, 1)
        assert all(len(row.searched_seconds) == frames for row in rows)
    found = [row.searched_seconds for row in rows_of(settings, "one_shot_topk")]
    assert found != [row.searched_seconds for row in rows_of(settings, "uniform")]
    for row in rows_of(settings, "oracle"):
        assert row.gt_spans[0][0] <= row.searched_seconds[0] <= row.gt_spans[0][1]
    folder = settings.paths.results / "predictions"
    assert sorted(path.suffix for path in folder.iterdir()) == [".json"] * 6 + [".jsonl"] * 6


def test_the_oracle_sees_all_frames_of_the_ground_truth_or_says_that_there_is_none(settings: Settings) -> None:
    sample = read_samples(settings.paths.test_samples)[0]
    search = new_search(settings)
    search.open(sample.model_dump())
    times = search.video.frames.timestamps
    several = sample.model_copy(update={"gt_seconds": [7.2, 3.1, 7.3, float("nan"), -5.0]})
    shown = [times[index] for index in chosen_frames(search, "oracle", several, 1)]  # type: ignore[index]
    assert shown == [3.0, 7.0]
    with pytest.raises(ItemError, match="no ground-truth time"):
        chosen_frames(search, "oracle", sample.model_copy(update={"gt_spans": []}), 1)


def test_an_interrupted_run_goes_on_and_a_finished_one_rests(settings: Settings, puppet: Puppet) -> None:
    settings.infer.concurrency = 2
    speak, calls = puppet.speak, []

    def stop_after_three(messages: Sequence[Message]) -> str:
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return speak(messages)

    puppet.speak = stop_after_three
    with pytest.raises(KeyboardInterrupt):
        run(settings, ["grpo_csv"])
    folder = settings.paths.results / "predictions"
    kept = [json.loads(line)["id"] for line in (folder / "grpo_csv.jsonl.partial").read_text().splitlines()]
    assert kept
    with (folder / "grpo_csv.jsonl.partial").open("a") as handle:
        handle.write('{"id": "cut off by a ki')
    puppet.speak = speak
    result = run(settings, ["grpo_csv"])
    assert sorted(result.skipped) == sorted(f"grpo_csv/{identity}" for identity in kept)
    assert len(result.done) == 8 - len(kept)
    assert len(rows_of(settings, "grpo_csv")) == 8
    assert run(settings, ["grpo_csv"]).done == []
    settings.search.max_turns = 2
    assert len(run(settings, ["grpo_csv"]).done) == 8


def test_rows_that_are_no_samples_are_listed_and_the_rest_is_played(
    settings: Settings, puppet: Puppet, tmp_path: Path
) -> None:
    lines = settings.paths.test_samples.read_text().splitlines()
    row = json.loads(lines[0])
    odd = [
        {**row, "id": "27", "options": ["x"] * 27},
        {**row, "id": "NaN", "duration": float("nan")},
        {**row, "id": "overflow", "gt_frame_index": [10**30]},
        {**row, "id": "nul", "video": "\0"},
        {**row, "id": "long\n\x1b[31m", "video": "v" * 300},
        row,
    ]
    settings.paths.test_samples = tmp_path / "test.jsonl"
    settings.paths.test_samples.write_text("\n".join([*lines, '{"id": ', "[]", *map(json.dumps, odd)]))
    result = run(settings, ["grpo_csv"])
    assert len(result.done) == len(lines) + 1
    found = {failure.item: failure.reason for failure in result.failures}
    assert found == {
        f"line {len(lines) + 1}": "not_json",
        f"line {len(lines) + 2}": "not_json",
        "27": "invalid_row",
        "overflow": "invalid_row",
        "nul": "invalid_row",
        row["id"]: "duplicate_id",
        "grpo_csv/long\n\x1b[31m": "unsafe_path",
    }
    listed = (settings.paths.results / "predictions/failures.jsonl").read_text().splitlines()
    assert {each["item"]: each["reason"] for each in map(json.loads, listed)} == found
    assert run(settings, ["grpo_csv"]).exit_code() == 1


def test_a_failed_episode_is_recorded_and_tried_again(settings: Settings, puppet: Puppet) -> None:
    speak = puppet.speak

    def fail_once(messages: Sequence[Message]) -> str:
        if not fail_once.__dict__.setdefault("failed", False):
            fail_once.__dict__["failed"] = True
            raise EngineError("gone")
        return speak(messages)

    puppet.speak = fail_once
    result = run(settings, ["grpo_csv"])
    assert len(result.done) == 7
    assert result.exit_code() == 1
    (failure,) = map(json.loads, (settings.paths.results / "predictions" / "failures.jsonl").read_text().splitlines())
    assert failure["reason"] == "engine"
    (row,) = [row for row in rows_of(settings, "grpo_csv") if row.error]
    assert row.outcome == "failed"
    result = run(settings, ["grpo_csv"])
    assert result.done == [failure["item"]]
    assert not (settings.paths.results / "predictions" / "failures.jsonl").exists()


def test_what_the_engine_owes_is_played_by_the_same_command(
    settings: Settings, puppet: Puppet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine that was away makes the stage fail for now; an episode that it refuses does not."""
    settings.infer.baselines = []
    params, speak = tmp_path / "params.yaml", puppet.speak
    params.write_text(settings.model_dump_json())
    first = iter([EngineError("away"), EngineError("no", "refused"), EngineError("away")])

    def fail(messages: Sequence[Message]) -> str:
        if error := next(first, None):
            raise error
        return speak(messages)

    puppet.speak = fail
    said = []
    for code in (75, 0, 0):
        with pytest.raises(SystemExit) as ended:
            main(["infer", "--keep-going", "--params", str(params)])
        assert int(ended.value.code or 0) == code
        said.append(capsys.readouterr())
        assert len(rows_of(settings, "grpo_csv")) == 8
    assert "2 episodes got no answer from the policy's engine" in said[0].err
    assert [line.split(", in")[0] for one in said for line in one.out.splitlines()] == [
        "episodes: 5 played, 0 there already, 3 failed",
        "episodes: 3 played, 5 there already, 0 failed",
        "episodes: 0 played, 8 there already, 0 failed",
    ]


def test_other_questions_replace_no_predictions(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(settings.model_dump_json())
    with pytest.raises(SystemExit) as ended:
        main(["infer", "--samples", str(settings.paths.test_samples), "--params", str(params)])
    assert ended.value.code == 2
    assert "name another folder by --out" in capsys.readouterr().err
    assert not settings.paths.results.exists()


def test_queries_are_embedded_where_the_frames_were(
    settings: Settings, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("timesearch.retrieval.encoder.load_encoder", lambda url: asked.append(url) or OracleEncoder())
    settings.features.url = "http://embeddings/v1"
    run(settings, ["grpo_csv"])
    assert asked == ["http://embeddings/v1"]


def test_one_served_model_does_not_play_for_two_checkpoints(settings: Settings) -> None:
    settings.infer.engine, settings.infer.urls, settings.infer.model = "openai", ["http://127.0.0.1:1/v1"], "tiny"
    with pytest.raises(RequestError, match=r"infer\.model is tiny, one model, but uniform, one_shot, coldstart, grpo"):
        run(settings)
    settings.infer.baselines, settings.infer.retry_for = ["uniform"], 0.1
    with pytest.raises(TemporaryError, match="no policy server"):
        run(settings)


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_plays(settings: Settings) -> None:
    from timesearch.inference.ask import answering_policy

    settings.search.patch = 28
    with pytest.raises(RequestError, match=r"does not fit these parameters: patch \(.* set search\.patch to 32"):
        run(settings)
    with pytest.raises(RequestError, match=r"runs/coldstart does not fit .* set search\.patch to 32"):
        answering_policy(settings, str(settings.paths.coldstart), None).__enter__()


def test_a_wrong_request_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="unknown method 'best'"):
        run(settings, ["best"])
    settings.paths.coldstart = tmp_path / "none"
    with pytest.raises(RequestError, match="run the stage 'coldstart' first"):
        run(settings, ["coldstart"])


def test_episodes_in_flight_are_bounded_and_videos_come_together(settings: Settings) -> None:
    policy = Puppet(script(search_turn(), answer_turn()))
    samples = read_samples(settings.paths.test_samples)
    settings.infer.concurrency = 3
    order: list[str] = []
    jobs = [Job(sample) for sample in sorted(samples, key=lambda sample: sample.id[::-1])]
    asyncio.run(play_all(jobs, policy, settings, lambda job, _: order.append(job.sample.video)))
    assert policy.most_running == 3
    assert order == sorted(order) or len(set(order[:3])) <= 2


# In process


@pytest.fixture(scope="module")
def in_process(project: Settings) -> TransformersPolicy:
    return TransformersPolicy.load(project.paths.train, batch_size=4)


def conversation(settings: Settings, sample: Sample, encoded: bool = False) -> tuple[list[Message], list[dict]]:
    """A conversation with a search in it, and its tools."""
    search = new_search(settings, encoded)
    search.open(sample.model_dump())
    blocks = search.preview()
    tools = search.schemas
    return [
        system_message(SearchProtocol.load(settings.search.prompts), tools, "template"),
        {"role": "user", "content": blocks},
        {"role": "assistant", "content": search_turn("star", " odd\n  thought ")},
        {"role": "tool", "name": "seek_video_frames", "content": search.call("seek_video_frames", {"query": "star"})},
    ], tools


def reference_turn(*calls: str) -> str:
    return "<think>Look.</think>" + "".join(f"<tool_call>{call}</tool_call>" for call in calls)


def seek(name: str = "seek_video_frames", **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


REFERENCE_TURNS = {
    "a first search": [reference_turn(seek(num_frames=1))],
    "a window": [reference_turn(seek(query="star", start_time=2.3, end_time=5.3, num_frames=2))],
    "a null query": [reference_turn(seek(query=None, num_frames=2))],
    "an extra argument": [reference_turn(seek(query="star", mood="calm", num_frames=1))],
    "an unknown tool": [reference_turn(seek("look_elsewhere", query="star"))],
    "an unreadable call": [reference_turn('{"name": ')],
    "a silent turn": ["<think>Look.</think>"],
    "two calls": [reference_turn(seek(query="star", num_frames=1), seek(query="ring", num_frames=1))],
    "a tenth search": [reference_turn(seek(query="star", num_frames=1))] * 10,
}
"""What a policy may write by the released agent's protocol, turn by turn, before it answers."""


def played(settings: Settings, sample: Sample, turns: Sequence[str], encoded: bool = False) -> list[list[Message]]:
    """What is asked after the first turn of an episode by the protocol of the settings, the re-answer too."""
    puppet = Puppet(script(*turns, answer_turn(), answer_turn()), encoded=encoded)
    asyncio.run(run_episode(new_search(settings, encoded), puppet, sample))
    return puppet.seen[1:]


def test_a_batch_answers_as_each_alone_and_as_trl_would_render_it(
    settings: Settings, in_process: TransformersPolicy
) -> None:
    samples = read_samples(settings.paths.test_samples)[:3]
    requests = []
    for number, sample in enumerate(samples):
        messages, tools = conversation(settings, sample)
        requests.append(Request(messages[: 2 if number == 1 else 4], tools, 12))
    together = in_process.generate(requests)
    alone = [in_process.generate([request])[0] for request in requests]
    assert together == alone
    processor = in_process._processor
    for request in requests:
        by_trl = processor.apply_chat_template(
            conversation=[list(request.messages)],
            tools=list(request.tools),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"][0]
        assert in_process.encode([request])["input_ids"][0].tolist() == list(by_trl)
        assert (
            search_turn("star", " odd\n  thought ") in processor.tokenizer.decode(by_trl) or len(request.messages) == 2
        )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_checkpoints_own_sampling_is_not_followed(
    settings: Settings, in_process: TransformersPolicy, temperature: float
) -> None:
    from transformers import GenerationConfig

    messages, tools = conversation(settings, read_samples(settings.paths.test_samples)[0])
    model = in_process._model
    own = model.generation_config
    assert own.repetition_penalty == 5.0
    replies = []
    for generation in (own, GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)):
        model.generation_config = generation
        try:
            policy = TransformersPolicy(model, in_process._processor, "tiny", temperature=temperature)
            replies += policy.generate([Request(messages, tools, 12)])
        finally:
            model.generation_config = own
    assert replies[0] == replies[1]


def test_sampling_is_the_seeds_alone(settings: Settings, in_process: TransformersPolicy) -> None:
    import torch

    request = Request(*conversation(settings, read_samples(settings.paths.test_samples)[0]), 12)
    said = []
    for seed in (0, 0, 1):
        policy = TransformersPolicy(in_process._model, in_process._processor, "tiny", temperature=1.0, seed=seed)
        said.append([policy.generate([request])[0]])
        torch.rand(len(said))  # as a model does that is built between two turns
        said[-1] += policy.generate([request])
    assert said[0] == said[1]
    assert said[0] != said[2]
    assert said[0][0] != said[0][1]


def test_vision_tokens_are_never_written(settings: Settings, in_process: TransformersPolicy) -> None:
    messages, tools = conversation(settings, read_samples(settings.paths.test_samples)[0])
    model, tokenizer = in_process._model, in_process._processor.tokenizer
    original = model.forward

    @functools.wraps(original)
    def forward(*arguments: Any, **keywords: Any) -> Any:
        output = original(*arguments, **keywords)
        output.logits[..., tokenizer.convert_tokens_to_ids("<|image_pad|>")] = 1e4
        return output

    model.forward = forward
    try:
        (reply,) = in_process.generate([Request(messages, tools, 8)])
    finally:
        model.forward = original
    assert "<|" not in reply.text
    assert reply.generated_tokens == 8


def test_too_long_a_conversation_fails_alone(settings: Settings, in_process: TransformersPolicy) -> None:
    messages, tools = conversation(settings, read_samples(settings.paths.test_samples)[0])
    long = [*messages, {"role": "user", "content": "word " * 5000}]
    replies = in_process.generate([Request(messages, tools, 4), Request(long, tools, 4)])
    assert replies[0].text is not None
    assert type(replies[1]).__name__ == "ContextOverflowError"


def test_an_adapter_is_put_onto_its_base(settings: Settings, in_process: TransformersPolicy, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from timesearch.search.checkpoint import examine, load_model

    base = load_model(settings.paths.train)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(settings.paths.train)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = TransformersPolicy.load(tmp_path / "adapter")
    messages, tools = conversation(settings, read_samples(settings.paths.test_samples)[0])
    inputs = loaded.encode([Request(messages, tools, 4)])
    with torch.inference_mode():
        merged, expected = loaded._model(**inputs).logits, adapted(**inputs).logits
        plain = in_process._model(**inputs).logits
    assert torch.allclose(merged, expected, atol=1e-4)
    assert not torch.allclose(merged, plain, atol=1e-3)
    assert all(finding.ok for finding in examine(tmp_path / "adapter", settings.search))


def as_video(messages: Sequence[Message]) -> list[Message]:
    return [with_video_preview(message, position) for position, message in enumerate(messages)]


def test_a_preview_can_be_one_video_block(settings: Settings, in_process: TransformersPolicy) -> None:
    messages, tools = conversation(settings, read_samples(settings.paths.test_samples)[0])
    times = [block["seconds"] for block in messages[1]["content"] if block["type"] == "image"]
    assert len(times) == 4
    shown = as_video(messages)
    assert [block["type"] for block in shown[1]["content"]] == ["video", "text"]
    assert shown[2:] == messages[2:]
    request = Request(shown, tools, 8)
    inputs = in_process.encode([request])
    read = in_process._processor.tokenizer.decode(inputs["input_ids"][0])
    # Qwen3-VL reads two frames as one, at the mean of their times; the frames keep their size of 2 x 2 tokens.
    pairs = [(times[0] + times[1]) / 2, (times[2] + times[3]) / 2]
    assert [read.count(f"<{seconds:.1f} seconds>") for seconds in pairs] == [1, 1]
    assert read.count("<|video_pad|>") == 2 * 4
    assert read.count("<|image_pad|>") == 4 * sum(b["type"] == "image" for b in messages[3]["content"])
    mixed = [request, Request(messages, tools, 8)]
    assert in_process.generate(mixed) == [in_process.generate([one])[0] for one in mixed]

    async def through_the_session() -> Any:
        policy = TransformersPolicy(in_process._model, in_process._processor, "tiny", video_preview=True)
        async with policy.session("", tools, 8) as session:
            reply = await session.reply(messages)
        await policy.close()
        return reply

    assert asyncio.run(through_the_session()) == in_process.generate([request])[0]


def test_qwen25_gets_the_distance_of_a_videos_frames(settings: Settings, in_process: TransformersPolicy) -> None:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    messages, tools = conversation(settings, read_samples(settings.paths.test_samples)[0])
    times = [block["seconds"] for block in messages[1]["content"] if block["type"] == "image"]
    own = in_process._processor
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=16),
        own.tokenizer,
        Qwen2VLVideoProcessor(patch_size=16),
        chat_template=own.chat_template,
    )
    policy = TransformersPolicy(in_process._model, processor, "qwen2.5")
    inputs = policy.encode([Request(as_video(messages), tools, 8)])
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([2 * (times[1] - times[0])])
    messages[1] = {**messages[1], "content": [{**block, "fps": 0.625} for block in messages[1]["content"]]}
    inputs = policy.encode([Request(as_video(messages), tools, 8)])
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([2 / 0.625])


def test_what_of_a_checkpoint_does_not_fit_is_said(settings: Settings, tmp_path: Path) -> None:
    from timesearch.search.checkpoint import examine

    search = settings.search.model_copy(update={"patch": 28, "total_video_tokens": 10**6})
    findings = {finding.what: finding for finding in examine(settings.paths.train, search)}
    assert [what for what, finding in findings.items() if not finding.ok] == ["patch", "context"]
    assert "set search.patch to 32" in findings["patch"].text
    with pytest.raises(RequestError, match="no checkpoint"):
        examine(tmp_path, search)
    with pytest.raises(RequestError, match="does not exist"):
        examine(tmp_path / "none", search)


# Over HTTP


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}")
        try:
            if httpx.get(url, timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"nothing answers at {url}")


@pytest.fixture
def serve() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the small policy server on a port; all are stopped at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(port: int, pause: str = "0") -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, str(TESTS / "policy_server.py"), str(port), pause])
        started.append(process)
        wait_for(f"http://127.0.0.1:{port}/v1/models", process, 60)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_an_engine_that_is_killed_and_comes_back_loses_no_episode(
    settings: Settings, serve: Callable[..., subprocess.Popen[bytes]]
) -> None:
    samples = [
        sample.model_copy(update={"id": f"{sample.id}-{copy}"})
        for sample in read_samples(settings.paths.test_samples)
        for copy in range(4)
    ]
    port = free_port()
    engine = serve(port, "0.2")
    ended: list[tuple[str, str | None]] = []

    async def episodes() -> None:
        policy = OpenAIPolicy([f"http://127.0.0.1:{port}/v1"], "tiny", retry_for=60)
        jobs = [Job(sample) for sample in samples]
        record = lambda job, prediction: ended.append((job.sample.id, prediction.outcome))  # noqa: E731
        playing = asyncio.create_task(play_all(jobs, policy, settings, record))
        while len(ended) < 3:
            await asyncio.sleep(0.01)
        engine.send_signal(signal.SIGKILL)
        engine.wait()
        assert len(ended) < 32
        await asyncio.sleep(0.5)
        await asyncio.to_thread(serve, port, "0.01")
        await playing

    settings.infer.concurrency = 8
    asyncio.run(episodes())
    assert sorted(identity for identity, _ in ended) == sorted(sample.id for sample in samples)
    assert {outcome for _, outcome in ended} == {"answered"}


def test_an_engine_that_stays_away_becomes_a_recorded_error(settings: Settings) -> None:
    policy = OpenAIPolicy([f"http://127.0.0.1:{free_port()}/v1"], "tiny", retry_for=0.2)
    sample = read_samples(settings.paths.test_samples)[0]

    async def episode() -> Prediction:
        try:
            return await run_episode(new_search(settings, encoded=True), policy, sample)
        finally:
            await policy.close()

    prediction = asyncio.run(episode())
    assert prediction.error is not None
    assert prediction.error.type == "engine"
    assert "see its log" in prediction.error.message


def test_a_server_with_a_short_context_ends_the_search(
    settings: Settings, serve: Callable[..., subprocess.Popen[bytes]]
) -> None:
    port = free_port()
    serve(port, "refuse")
    policy = OpenAIPolicy([f"http://127.0.0.1:{port}/v1"], "tiny")
    sample = read_samples(settings.paths.test_samples)[0]

    async def episode() -> Prediction:
        try:
            return await run_episode(new_search(settings, encoded=True), policy, sample)
        finally:
            await policy.close()

    prediction = asyncio.run(episode())
    assert (prediction.outcome, prediction.limit) == ("answered", "context")


@pytest.mark.parametrize(
    ("status", "body", "error", "says"),
    [
        (200, b"<html>", RequestError, "is no model server"),
        (200, b"{}", RequestError, "is no model server"),
        (401, b"{}", RequestError, "refused (401)"),
        (503, b"{}", TemporaryError, "no policy server"),
        (200, b'{"data": [{"id": "other"}]}', RequestError, "serves other"),
    ],
)
def test_what_is_no_server_of_the_policy_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, error: type[Exception], says: str
) -> None:
    answer = httpx.MockTransport(lambda _: httpx.Response(status, content=body))
    policy = OpenAIPolicy(["http://policy/v1"], "tiny", retry_for=0.1)
    monkeypatch.setattr(policy, "_http", lambda: httpx.AsyncClient(transport=answer))
    with pytest.raises(error, match=re.escape(says)):
        asyncio.run(policy.connect())


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(RequestError, match="localhost:8000/v1 is no address"):
        OpenAIPolicy(["localhost:8000/v1"], "tiny")


@pytest.mark.parametrize("owner", ["vllm", "somebody"])
def test_only_a_vllm_is_sent_what_is_not_of_the_protocol(settings: Settings, owner: str) -> None:
    server = Server(("127.0.0.1", 0), type("Owned", (Handler,), {"owner": owner}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    policy = OpenAIPolicy([f"http://127.0.0.1:{server.server_port}/v1"], "tiny")
    ended: list[Prediction] = []
    jobs = [Job(read_samples(settings.paths.test_samples)[0])]
    try:
        asyncio.run(play_all(jobs, policy, settings, lambda _, prediction: ended.append(prediction)))
    finally:
        server.shutdown()
    assert [(row.outcome, row.error) for row in ended] == [("answered", None)]


def test_conversations_go_to_the_least_busy_server_that_knows_the_video() -> None:
    async def choose() -> list[str]:
        policy = OpenAIPolicy(["http://a/v1", "http://b/v1"], "tiny")
        chosen, open_sessions = [], []
        for video in ("x", "x", "y", "y", *["x"] * 8):
            session = policy.session(video, [], 8)
            chosen.append((await session.__aenter__())._url)
            open_sessions.append(session)
        for session in open_sessions:
            await session.__aexit__(None, None, None)
        assert set(policy._load.values()) == {0}
        return chosen

    chosen = asyncio.run(choose())
    assert chosen[:4] == ["http://a/v1", "http://a/v1", "http://b/v1", "http://b/v1"]
    assert set(chosen[4:]) == {"http://a/v1", "http://b/v1"}


class Counting(OpenAIPolicy):
    """Counts the answers of each port, and by conversation the ports that answered it."""

    def __init__(self, ports: Sequence[int]) -> None:
        super().__init__([f"http://127.0.0.1:{port}/v1" for port in ports], "tiny", retry_for=60)
        self.answers: Counter[int] = Counter()

    def _http(self) -> httpx.AsyncClient:
        client = super()._http()
        client.event_hooks = {"response": [self._count]}
        return client

    async def _count(self, response: httpx.Response) -> None:
        self.answers[response.request.url.port] += response.request.method == "POST"


def test_the_quicker_of_two_servers_gets_more(
    settings: Settings, serve: Callable[..., subprocess.Popen[bytes]]
) -> None:
    slow, quick = free_port(), free_port()
    serve(slow, "0.5")
    serve(quick, "0.02")
    policy = Counting([slow, quick])
    samples = read_samples(settings.paths.test_samples) * 4
    jobs = [Job(sample.model_copy(update={"id": str(n)})) for n, sample in enumerate(samples)]
    settings.infer.concurrency = 8
    ended: list[Prediction] = []
    asyncio.run(play_all(jobs, policy, settings, lambda _, prediction: ended.append(prediction)))
    assert [row.outcome for row in ended] == ["answered"] * 32
    assert sum(policy.answers.values()) == 32 * 3
    assert policy.answers[slow] > 0
    assert policy.answers[quick] > 2 * policy.answers[slow]


def test_conversations_of_a_server_that_dies_go_on_at_the_other(
    settings: Settings, serve: Callable[..., subprocess.Popen[bytes]]
) -> None:
    doomed, other = free_port(), free_port()
    engine = serve(doomed, "0.2")
    serve(other, "0.02")
    policy = Counting([doomed, other])
    samples = read_samples(settings.paths.test_samples) * 2
    jobs = [Job(sample.model_copy(update={"id": str(n)})) for n, sample in enumerate(samples)]
    settings.infer.concurrency = 8
    ended: list[tuple[str, str]] = []

    def record(job: Job, prediction: Prediction) -> None:
        if engine.poll() is None:
            engine.kill()
        ended.append((job.sample.id, prediction.outcome))

    asyncio.run(play_all(jobs, policy, settings, record))
    assert sorted(ended) == sorted((job.sample.id, "answered") for job in jobs)
    assert policy.answers[other] > policy.answers[doomed]


def test_what_a_server_parsed_is_put_back_into_the_text() -> None:
    call = {"function": {"name": "seek_video_frames", "arguments": '{"query": "star"}'}}
    message = {"content": None, "reasoning_content": "Look.", "tool_calls": [call]}
    completion = Completion.model_validate({"choices": [{"message": message}]})
    assert completion.text() == search_turn("star")


def test_a_message_is_sent_byte_for_byte_again(settings: Settings) -> None:
    sample = read_samples(settings.paths.test_samples)[0]
    first, _ = conversation(settings, sample, encoded=True)
    second, _ = conversation(settings, sample, encoded=True)
    assert [serialise(message) for message in first] == [serialise(message) for message in second]
    assert b"data:image/jpeg;base64,/9j/" in serialise(first[1])


async def ask(policy: OpenAIPolicy, messages: list[Message], tools: list[dict]) -> Any:
    """One reply of at most 12 tokens."""
    try:
        await policy.connect()
        async with policy.session("any.mp4", tools, 12) as session:
            return await session.reply(messages)
    finally:
        await policy.close()


@pytest.mark.takes(20)
def test_transformers_serve_reads_and_writes_the_same(
    settings: Settings, in_process: TransformersPolicy, tmp_path: Path
) -> None:
    sample = read_samples(settings.paths.test_samples)[0]
    decoded, tools = conversation(settings, sample)
    encoded, _ = conversation(settings, sample, encoded=True)
    (expected,) = in_process.generate([Request(decoded, tools, 12)])
    (tmp_path / "hub").mkdir()
    port, checkpoint = free_port(), str(settings.paths.train)
    process = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", "serve", checkpoint, "--port", str(port)],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )

    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, 300)
        policy = OpenAIPolicy([f"http://127.0.0.1:{port}/v1"], checkpoint, retry_for=5)
        reply = asyncio.run(ask(policy, encoded, tools))
    finally:
        process.kill()
        process.wait()
    assert reply.prompt_tokens == expected.prompt_tokens
    assert reply.text.strip() == expected.text.strip()


# With a real vLLM


@pytest.fixture(scope="module")
def vllm_judge(project: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    """A vLLM of the CPU backend that serves the untrained policy, held as a judge is: started again if it dies."""
    if inspect_machine().vllm is None:
        pytest.skip("needs vLLM: make vllm")
    folder = tmp_path_factory.mktemp("vllm")
    command = [
        *(python_with_vllm(), str(TESTS / "vllm_server.py"), "--model", str(project.paths.train)),
        *("--served-model-name", "{model}", "--host", "{host}", "--port", "{port}"),
        *("--max-model-len", "1024", "--dtype", "float32", "--enforce-eager", "--block-size", "32"),
        *("--max-num-seqs", "8", "--limit-mm-per-prompt", '{"image": 64, "video": 1}'),
        *("--enable-prompt-tokens-details", "--skip-mm-profiling"),
        *VIDEO_OPTIONS,
    ]
    judge = Judge(
        kind="server",
        url=f"http://127.0.0.1:{free_port()}/v1",
        model="tiny",
        command=command,
        start_timeout=550.0,
        retry_for=550.0,
        cache=folder / "judge.sqlite",
        log=folder / "judge.log",
    )
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",
        }.items():
            environment.setenv(name, value)
        with judge_server(judge):
            yield judge
            last = serving_at(judge)
    assert not psutil.wait_procs([last], 30)[1]


@pytest.fixture
def vllm(vllm_judge: Judge) -> str:
    """Base URL of the vLLM."""
    return vllm_judge.url


def serving_at(judge: Judge) -> psutil.Process:
    """The process that listens at the judge's port."""
    port = int(judge.url.split(":")[2].split("/")[0])
    listening = psutil.net_connections("tcp")
    return psutil.Process(next(c.pid for c in listening if c.pid and (c.status, c.laddr.port) == ("LISTEN", port)))


@pytest.mark.takes(65)
@pytest.mark.timeout(1800)
def test_a_real_vllm_judges_and_is_replaced_when_it_is_killed(vllm_judge: Judge) -> None:
    """The tests below go on with the one that replaced it."""
    triples = [(row.question, row.reference, row.candidate) for row in read_labelled(LABELLED)]
    client = JudgeClient(vllm_judge)
    first = asyncio.run(client.score_many(triples[:10]))
    killed = serving_at(vllm_judge)
    os.killpg(os.getpgid(killed.pid), signal.SIGKILL)
    second = asyncio.run(client.score_many(triples[:20]))
    assert set(second) <= {0.0, 1.0}
    assert second[:10] == first
    assert serving_at(vllm_judge) != killed
    assert not psutil.wait_procs([killed], 30)[1]


@pytest.mark.timeout(1800)
def test_both_engines_read_the_same_tokens_and_write_the_same_text(
    settings: Settings, in_process: TransformersPolicy, vllm: str
) -> None:
    sample = read_samples(settings.paths.test_samples)[0]
    decoded, tools = conversation(settings, sample)
    encoded, _ = conversation(settings, sample, encoded=True)
    (expected,) = in_process.generate([Request(decoded, tools, 12)])
    ids = in_process.encode([Request(decoded, tools, 12)])["input_ids"][0].tolist()
    pad = in_process._processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    policy = OpenAIPolicy([vllm], "tiny")
    reply = asyncio.run(ask(policy, encoded, tools))
    assert policy.context == 1024
    assert policy.template == in_process.template
    assert reply.prompt_tokens == len(ids)
    assert reply.text == expected.text
    in_words = [system_message(SearchProtocol.load(settings.search.prompts), tools, "text"), *encoded[1:]]
    assert asyncio.run(ask(policy, in_words, [])).cached_tokens >= len(ids) - 32
    body = b'{"model": "tiny", "messages": [' + b", ".join(map(serialise, in_words)) + b"]}"
    headers = {"Content-Type": "application/json"}
    tokens = httpx.post(f"{vllm.removesuffix('/v1')}/tokenize", content=body, headers=headers, timeout=60)
    read = tokens.json()["tokens"]
    assert without_repeats(read, pad) == without_repeats(ids, pad)


def read_by_both(
    in_process: TransformersPolicy, url: str, decoded: list[Message], encoded: list[Message], tools: list[dict]
) -> Reply:
    """Both engines make the same tokens of a conversation, its preview shown as a video; what the server says to it."""
    request = Request(as_video(decoded), tools, 12)
    ids = in_process.encode([request])["input_ids"][0].tolist()
    read: list[int] = []

    async def listen(response: httpx.Response) -> None:
        await response.aread()
        read.extend(response.json().get("prompt_token_ids") or [])

    class Listening(OpenAIPolicy):
        def _http(self) -> httpx.AsyncClient:
            client = super()._http()
            client.event_hooks = {"response": [listen]}
            return client

        async def _complete(self, url: str, body: bytes) -> tuple[Completion, int]:
            return await super()._complete(url, body[:-1] + b', "return_token_ids": true}')

    reply = asyncio.run(ask(Listening([url], "tiny", video_preview=True), encoded, tools))
    assert read == ids
    return reply


def test_both_engines_read_the_same_video(settings: Settings, in_process: TransformersPolicy, vllm: str) -> None:
    sample = read_samples(settings.paths.test_samples)[0]
    decoded, tools = conversation(settings, sample)
    reply = read_by_both(in_process, vllm, decoded, conversation(settings, sample, True)[0], tools)
    (expected,) = in_process.generate([Request(as_video(decoded), tools, 12)])
    assert reply.text.rstrip("\ufffd") == expected.text.rstrip("\ufffd")


@pytest.mark.parametrize("turns", REFERENCE_TURNS.values(), ids=REFERENCE_TURNS)
def test_both_engines_read_what_another_protocol_says(
    settings: Settings, in_process: TransformersPolicy, vllm: str, tmp_path: Path, turns: list[str]
) -> None:
    import_protocol(make_clone(tmp_path / "clone"), tmp_path / "protocol")
    settings.search.prompts = str(tmp_path / "protocol")
    choice = {"type": "multiple_choice", "options": ["red", "blue"], "answer": "A"}
    asked = read_samples(settings.paths.test_samples)[0]
    for sample in (asked, asked.model_copy(update=choice)):
        decoded, encoded = (played(settings, sample, turns, packed) for packed in (False, True))
        assert len(decoded) == len(encoded) >= 1
        for some, others in ((decoded[0], encoded[0]), (decoded[-1], encoded[-1])):
            read_by_both(in_process, vllm, some, others, [])


def without_repeats(ids: Sequence[int], pad: int) -> list[int]:
    """Ids with each run of image tokens as one."""
    return [token for position, token in enumerate(ids) if token != pad or ids[position - 1] != pad]


def test_the_past_of_an_episode_comes_from_the_prefix_cache(settings: Settings, vllm: str) -> None:
    """Each turn pays for what is new in it: turns are forced by a policy in front of the real engine."""
    sample = read_samples(settings.paths.test_samples)[1]
    turns = script(search_turn("star"), search_turn("ring"), answer_turn())
    settings.search.max_turns = 4

    async def episode() -> Prediction:
        policy = OpenAIPolicy([vllm], "tiny")
        await policy.connect()
        try:
            return await run_episode(new_search(settings, encoded=True), Forced(policy, turns), sample, reanswer=False)
        finally:
            await policy.close()

    prediction = asyncio.run(episode())
    assert prediction.outcome == "answered"
    usage = prediction.usage
    assert usage.cached > usage.prefilled
    prompt = usage.prefilled + usage.cached
    assert prompt > 2 * usage.prefilled


class Forced:
    """A real engine whose text is replaced by scripted turns."""

    def __init__(self, policy: OpenAIPolicy, turns: Callable[[Sequence[Message]], str]) -> None:
        self._policy, self._turns = policy, turns
        self.encoded, self.name = True, policy.name

    @property
    def context(self) -> int | None:
        return self._policy.context

    @asynccontextmanager
    async def session(self, *arguments: Any) -> AsyncIterator[Any]:
        async with self._policy.session(*arguments) as session:
            self._inner = session
            yield self

    async def reply(self, messages: Sequence[Message]) -> Any:
        return replace(await self._inner.reply(messages), text=self._turns(messages))
