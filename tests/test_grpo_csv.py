"""GRPO-CSV on a tiny policy with scripted turns: what is learned from, what is scored, what stops a run."""

from __future__ import annotations

import inspect
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from scripted import ANSWER, CALL, OracleEncoder, Script, build_project, make_settings

from timesearch.base.errors import RequestError
from timesearch.base.extras import python_with_vllm
from timesearch.base.machine import inspect_machine
from timesearch.data.messages import blocks_of
from timesearch.search import protocol
from timesearch.training.launch import load_trainer

if TYPE_CHECKING:
    from timesearch.training import grpo_csv, rollouts
    from timesearch.training import train as train_stage
    from timesearch.training.replay import ReplayBuffer, idle_groups, put, refill, take
    from timesearch.training.watch import CollapseWarning

BLUE = ANSWER.replace("{colour}", "blue")
MARKS = {f"<{slash}{name}>" for name in ("think", "tool_call", "answer") for slash in ("", "/")}
MIXED = [[CALL, ANSWER], [ANSWER, BLUE]]
"""Half of the episodes search; answers differ, so that groups have advantages."""


class Recorder:
    """Takes the place of an MLflow run."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}
        self.episodes: list[Any] = []

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.metrics[step] = values

    def log_artifact(self, path: Path, folder: str) -> None:
        assert path.is_file()

    def log_episode(self, prediction: Any, frames: Path, name: str) -> None:
        self.episodes.append(prediction)


@pytest.fixture(scope="module", autouse=True)
def _trainer() -> None:
    """Import what is tested for these tests alone: with TRL it takes many seconds, and every worker reads this file."""
    stage = load_trainer("transformers")
    from timesearch.training import grpo_csv, replay, rollouts, watch

    names = ("ReplayBuffer", "idle_groups", "put", "refill", "take")
    globals().update({name: getattr(replay, name) for name in names})
    globals().update(train_stage=stage, grpo_csv=grpo_csv, rollouts=rollouts, CollapseWarning=watch.CollapseWarning)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    build_project(root, videos=6)
    return root


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()

    @contextmanager
    def stage_run(*_: Any, **__: Any) -> Iterator[Recorder]:
        yield recorder

    monkeypatch.setattr("timesearch.tracking.stage_run", stage_run)
    return recorder


@pytest.fixture
def project(pristine: Path, tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, caches and a policy, in which a test may train."""
    for name in ("data", "cache", "runs"):
        shutil.copytree(pristine / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    forget_accelerator(monkeypatch)
    monkeypatch.setattr("timesearch.retrieval.encoder.load_encoder", lambda *_, **__: OracleEncoder())
    return tmp_path


def forget_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate keeps a process's precision and ranks in globals and in the environment."""
    from accelerate.state import AcceleratorState, PartialState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


@pytest.fixture
def play(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`play(turns, **train)` runs the stage with a scripted policy; the trainer comes back, with its `batches`."""

    def run(turns: list[list[str]] | None, reanswer: str = ANSWER, **train: Any) -> Any:
        made = script(monkeypatch, turns, reanswer)
        train_stage.run(make_settings(**train))
        return made[0]

    return run


def script(monkeypatch: pytest.MonkeyPatch, turns: list[list[str]] | None, reanswer: str = ANSWER) -> list[Any]:
    made: list[Any] = []
    trainer = train_stage.GRPOCSVTrainer
    init, loss, of_trl = trainer.__init__, trainer._compute_loss, rollouts.GRPOTrainer._compute_loss

    def scripted_init(self: Any, *arguments: Any, **keywords: Any) -> None:
        init(self, *arguments, **keywords)
        generate = self.model.generate
        if turns:
            self.model.generate = lambda *inputs, **options: generate(
                *inputs, logits_processor=[Script(self._tokenizer, turns, reanswer)], **options
            )
        self.batches = []
        made.append(self)

    def kept_loss(self: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self.batches.append(inputs)
        return loss(self, model, inputs)

    def kept_credit(self: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self.credited = inputs["advantages"]
        return of_trl(self, model, inputs)

    monkeypatch.setattr(trainer, "__init__", scripted_init)
    monkeypatch.setattr(trainer, "_compute_loss", kept_loss)
    monkeypatch.setattr(rollouts.GRPOTrainer, "_compute_loss", kept_credit)
    return made


def metrics(folder: Path = Path("runs/train")) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path = Path("runs/train")) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def in_child(target: Callable[[], Any], **environment: str) -> multiprocessing.Process:
    """Start `target` in a fork of this process, which saves the imports."""

    def body() -> None:
        os.environ.update(environment)
        target()

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process  # type: ignore[return-value]


# What a run leaves


def test_a_search_by_any_tool_is_one() -> None:
    scores = {"reanswer_accuracy": 0.0, "format": 1.0}
    call = {"role": "assistant", "content": "<think>t</think>"}
    told = {"role": "tool", "content": [{"type": "text", "text": "A red wall.", "seconds": 5.0}]}
    wrong = {"role": "tool", "content": "this video has no subtitles"}
    episodes = [
        rollouts.Episode({}, messages, truncated=False, scores=scores)
        for messages in ([call], [call, told], [call, wrong], [call, told, call, told])
    ]
    measured = grpo_csv.episode_metrics(episodes)
    assert (measured["search_rate"], measured["tool_calls"], measured["frames"]) == (0.75, 1.0, 0.0)


def test_a_run_scores_episodes_and_writes_what_people_and_later_stages_read(
    play: Callable[..., Any], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    single_turn = rollouts.GRPOTrainer._generate_single_turn

    def watched(self: Any, ids: Any, images: Any, *arguments: Any, **keywords: Any) -> Any:
        shown.append(images)
        return single_turn(self, ids, images, *arguments, **keywords)

    monkeypatch.setattr(rollouts.GRPOTrainer, "_generate_single_turn", watched)
    trainer = play(MIXED, steps=1, micro_batch=8, log_episodes_every=1)
    # The last turn is the re-answer: vLLM takes None for a rollout without images, and no empty list.
    assert [images is None for images in shown[-1]] == [not episode.searched for episode in trainer.episodes]
    assert all(images is None or images for turn in shown for images in turn)

    (row,) = metrics()
    assert row["step"] == 1
    assert row["format"] == row["answer_rate"] == 1.0
    assert row["search_rate"] == row["tool_calls"] == 0.5
    assert row["frames"] == pytest.approx(1.0)
    assert row["truncated"] == row["ill_formed"] == 0.0
    assert row["reward"] == pytest.approx(1.0 + 0.5 * row["accuracy"] + 0.5 * row["completeness"])
    shares = [row[f"time_{name}"] for name in ("generate", "reanswer", "decode", "loss", "other")]
    assert sum(shares) == pytest.approx(1.0)
    assert recorder.metrics[1]["reward"] == row["reward"]
    for episode in trainer.episodes:
        assert (episode.reanswer is not None) == bool(episode.searched)
        assert episode.scores["completeness"] == float(
            bool(episode.searched) and episode.scores["accuracy"] == 1 and episode.row["answer"] == "red"
        )
    files = {path.name for path in Path("runs/train").iterdir()}
    assert {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json"} <= files
    assert not files & {"training_args.bin", "checkpoints"}
    first = json.loads(Path("runs/train/episodes/step-00001.jsonl").read_text().splitlines()[0])
    assert [message["role"] for message in first["prediction"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert {episode.id for episode in recorder.episodes} == {episode.row["id"] for episode in trainer.episodes}


def test_assistant_turns_are_kept_as_they_were_written(play: Callable[..., Any]) -> None:
    trainer = play([[CALL], [ANSWER]], steps=1, micro_batch=8)
    for episode in trainer.episodes:
        shape = episode.row["question"].removeprefix("What colour is the ").removesuffix("?")
        said = [message["content"] for message in episode.messages if message["role"] == "assistant"]
        assert said == [CALL.format(shape=shape), ANSWER.format(shape=shape, colour="red")]


def test_plain_grpo_asks_for_no_reanswer(play: Callable[..., Any]) -> None:
    trainer = play(MIXED, steps=1, rewards={"completeness": 0.0})
    assert all(episode.reanswer is None for episode in trainer.episodes)
    (row,) = metrics()
    assert "completeness" not in row
    assert row["time_reanswer"] == 0.0
    assert row["reward"] == pytest.approx(1.0 + 0.5 * row["accuracy"])


@pytest.mark.parametrize("weight", [0.25, -0.25])
def test_a_call_can_earn_or_cost(play: Callable[..., Any], weight: float) -> None:
    play(MIXED, steps=1, rewards={"completeness": 0.0, "calls": weight})
    (row,) = metrics()
    assert row["calls"] == row["tool_calls"] == 0.5
    assert row["reward"] == pytest.approx(1.0 + 0.5 * row["accuracy"] + weight * row["calls"])


def test_what_the_form_earned_can_be_credited_to_its_marks(play: Callable[..., Any]) -> None:
    formless = ANSWER.replace("<think>", "").replace("</think>", "")
    trainer = play([[ANSWER, formless]], steps=1, format_tokens="marks", micro_batch=8)
    (batch,) = trainer.batches
    seen = set()
    for ids, own, advantage, by_token in zip(
        batch["completion_ids"], batch["tool_mask"], batch["advantages"], trainer.credited, strict=True
    ):
        share = 0.5 if "<think>" in trainer._tokenizer.decode(ids) else -0.5
        for token, mine, value in zip(ids.tolist(), own.tolist(), by_token.tolist(), strict=True):
            if mine:
                mark = trainer._tokenizer.decode(token) in MARKS
                assert value == pytest.approx(float(advantage if mark else advantage - share))
                seen.add((share, mark))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("tokens", "marked"),
    [
        (["<think>", "a", "</think>"], [1, 0, 1]),
        (["<", "think", ">a", "</th", "ink", ">\n<", "tool", "_call>"], [1, 1, 1, 1, 1, 1, 1, 1]),
        (["x<", "answer>", "red", "</", "answer", ">", "y", ""], [1, 1, 0, 1, 1, 1, 0, 0]),
        (["<think", "a>", "< think>", "<answer"], [0, 0, 0, 0]),
        ([], []),
    ],
)
def test_marks_of_turns_are_found_in_one_token_or_several(tokens: list[str], marked: list[int]) -> None:
    assert grpo_csv.of_marks(tokens) == [bool(each) for each in marked]


def test_a_preview_of_chance_is_one_for_all_episodes_of_a_question(play: Callable[..., Any]) -> None:
    trainer = play(MIXED, steps=1, random_preview=True, prompts_per_step=6, micro_batch=24)
    shown: dict[str, set[int]] = {}
    for episode in trainer.episodes:
        pictures = sum(block["type"] == "image" for block in blocks_of(episode.messages[1]))
        shown.setdefault(episode.row["id"], set()).add(pictures)
    assert all(len(counts) == 1 for counts in shown.values())
    assert len(shown) == 6
    assert {1, 2, 3, 4} >= set.union(*shown.values()) > {4}


def test_adapters_kl_checkpointing_and_bf16_give_a_whole_checkpoint(play: Callable[..., Any]) -> None:
    play(MIXED, steps=1, lora_rank=4, beta=0.01, gradient_checkpointing=True, bf16=True)
    assert metrics()[0]["kl"] == pytest.approx(0.0, abs=1e-3)
    assert weights().keys() == weights(Path("runs/coldstart")).keys()
    assert (
        largest_difference(weights(), {k: v.to(torch.bfloat16) for k, v in weights(Path("runs/coldstart")).items()}) > 0
    )


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_frozen_vision_tower_stays_as_it_is(play: Callable[..., Any], lora_rank: int) -> None:
    play(MIXED, steps=1, freeze_vision=True, lora_rank=lora_rank)
    trained, before = weights(), weights(Path("runs/coldstart"))
    changed = {name for name in before if not torch.equal(trained[name], before[name])}
    assert changed
    assert not any(".visual." in name for name in changed)


def test_a_policy_that_writes_noise_trains_on(play: Callable[..., Any]) -> None:
    play(None, steps=2)
    rows = metrics()
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[-1]["ill_formed"] == 1.0


def test_samples_that_cannot_be_used_are_listed_and_left_out(project: Path, play: Callable[..., Any]) -> None:
    samples = project / "data/train.jsonl"
    good = [json.loads(line) for line in samples.read_text().splitlines()]
    bad = [
        {**good[0], "id": "silent", "answer": " "},
        {**good[0], "id": "odd", "type": "essay"},
        {**good[0], "id": "lost", "video": "lost.mp4"},
        {**good[0], "id": "outside", "video": "../../etc/passwd"},
        good[1],
    ]
    samples.write_text("".join(json.dumps(row) + "\n" for row in [*good, *bad]))
    trainer = play(MIXED, steps=1)
    listed = [json.loads(line) for line in Path("runs/train/failures.jsonl").read_text().splitlines()]
    assert {row["item"]: row["reason"] for row in listed} == {
        "silent": "no_answer",
        "odd": "unknown_type",
        "lost": "missing_cache",
        "outside": "unsafe_path",
        "1": "duplicate_id",
    }
    assert len(trainer.train_dataset) == len(good)


def test_no_usable_sample_and_an_indivisible_batch_are_refused(project: Path) -> None:
    with pytest.raises(RequestError, match="does not divide"):
        train_stage.run(make_settings(micro_batch=3))
    (project / "data/train.jsonl").write_text('{"id": "a", "video": "a.mp4", "question": "?"}\n')
    with pytest.raises(RequestError, match="no sample fit for training"):
        train_stage.run(make_settings())


def test_fewer_samples_than_a_step_takes_are_refused(project: Path) -> None:
    with pytest.raises(RequestError, match=r"a step takes 7 questions .* has 6 fit for training"):
        train_stage.run(make_settings(prompts_per_step=7))


@pytest.mark.parametrize(
    ("processes", "train", "says"),
    [
        (1, {"lora_rank": 8, "launcher": "zero2"}, "lora_rank"),
        (8, {"lora_rank": 8, "launcher": "zero3", "generation": "vllm_colocate"}, "lora_rank"),
        (8, {"lora_rank": 8, "launcher": "fsdp", "generation": "vllm_colocate"}, "lora_rank"),
        (2, {"generation": "vllm_server"}, "vllm_server over 2 processes"),
        (1, {"format_tokens": "marks", "scale_rewards": "group"}, "train.format_tokens is marks"),
        (8, {"launcher": "zero3"}, "transformers with train.launcher zero3"),
        (8, {"launcher": "fsdp"}, "transformers with train.launcher fsdp"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, processes: int, train: dict[str, Any], says: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    settings = make_settings(micro_batch=1, **train)
    with pytest.raises(RequestError, match=says):
        train_stage.grpo_config(settings, "runs/coldstart")


def test_queries_go_to_the_encoder_of_the_features(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: str) -> None:
        raise InterruptedError(source)

    monkeypatch.setattr("timesearch.retrieval.encoder.load_encoder", load)
    settings = make_settings()
    with pytest.raises(InterruptedError, match="models/encoder"):
        train_stage.run(settings)
    settings.features.url = "http://embeddings/v1"
    with pytest.raises(InterruptedError, match="http://embeddings/v1"):
        train_stage.run(settings)


# What is learned from


def test_only_written_tokens_carry_loss(play: Callable[..., Any]) -> None:
    trainer = play([[CALL], [ANSWER]], steps=1, micro_batch=8)
    (batch,) = trainer.batches
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    image = trainer._image_pad_token_id
    assert not (batch["completion_ids"][mask] == image).any()
    assert (batch["completion_ids"][~mask] == image).sum() == 8 * 2 * 4
    for ids, own in zip(batch["completion_ids"], mask, strict=True):
        text = trainer._tokenizer.decode(ids[own])
        assert text.count("<|im_end|>") == 2
        assert text.startswith("<think>I need")
        assert "<tool_response>" not in text


@pytest.fixture
def learned(play: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    """A trainer whose weights have not moved, and its batch."""
    trainer = play(MIXED, steps=1, micro_batch=8, learning_rate=1e-12)
    return trainer, trainer.batches[0]


def logps_of(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return trainer._logps_of(batch)


def test_batched_log_probabilities_equal_unpadded_ones(learned: tuple[Any, dict[str, Any]]) -> None:
    trainer, batch = learned
    batched = logps_of(trainer, batch)
    for row in range(8):
        alone = take(batch, [row])
        prompt, completion = alone["prompt_mask"][0].bool(), alone["completion_mask"][0].bool()
        inputs = torch.cat([alone["prompt_ids"][0][prompt], alone["completion_ids"][0][completion]])[None]
        kinds = torch.cat([prompt, completion])
        with torch.no_grad():
            output = trainer.model(
                input_ids=inputs,
                pixel_values=alone["pixel_values"][0],
                image_grid_thw=alone["image_grid_thw"][0],
                mm_token_type_ids=alone["mm_token_type_ids"][:, kinds],
            )
        count = int(completion.sum())
        scores = (output.logits[0, -count - 1 : -1] / trainer.temperature).log_softmax(-1)
        expected = scores.gather(1, inputs[0, -count:, None])[:, 0]
        assert torch.allclose(batched[row][:count], expected, atol=2e-5)


def test_searched_frames_change_what_follows(learned: tuple[Any, dict[str, Any]]) -> None:
    trainer, batch = learned
    row = next(index for index in range(8) if (batch["tool_mask"][index] == 0).any())
    alone = take(batch, [row])
    before = logps_of(trainer, {**batch, **_joined(alone)})
    patches = alone["image_grid_thw"][0][-1].prod()
    blind = alone["pixel_values"][0].clone()
    blind[-patches:] = 0.0
    after = logps_of(trainer, {**batch, **_joined({**alone, "pixel_values": [blind]})})
    image = (alone["completion_ids"][0] == trainer._image_pad_token_id).nonzero().max()
    assert torch.equal(before[0, : image - 3], after[0, : image - 3])
    assert (before[0, image + 1 :] - after[0, image + 1 :]).abs().max() > 1e-5


def _joined(alone: dict[str, Any]) -> dict[str, Any]:
    from trl.trainer.utils import unsplit_pixel_values_by_grid

    return unsplit_pixel_values_by_grid(alone)


def test_the_loss_equals_a_few_lines(learned: tuple[Any, dict[str, Any]]) -> None:
    trainer, batch = learned
    assert batch["advantages"].abs().sum() > 0
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, batch)
    mask = batch["completion_mask"] * batch["tool_mask"]
    # On policy the ratio is 1, so that the value is the mean advantage of each episode's tokens.
    expected = -(batch["advantages"][:, None] * mask).sum(1).div(mask.sum(1)).mean()
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    # The gradient is that of the advantage-weighted log-probabilities.
    trainer.model.zero_grad()
    loss.backward()
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if "q_proj" in n)
    gradient = parameter.grad.clone()
    trainer.model.zero_grad()
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    logps, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        mask.size(1),
        **{key: batch[key] for key in names},
    )
    (-(batch["advantages"][:, None] * logps * mask).sum(1) / mask.sum(1)).mean().backward()
    assert torch.allclose(gradient, parameter.grad, atol=1e-7), name


@pytest.mark.takes(8)
def test_the_same_seed_gives_the_same_weights(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_csv, "score_episode", _score_by_length)
    found = []
    for seed in (0, 0, 1):
        settings = make_settings()
        settings.seed = seed
        train_stage.run(settings)
        found.append(weights())
    assert largest_difference(found[0], found[1]) == 0.0
    assert largest_difference(found[0], found[2]) > 1e-4


def _score_by_length(messages: list[Any], *_: Any, **__: Any) -> dict[str, float]:
    """Rewards that differ among the episodes of a policy that writes noise."""
    return {"format": len(messages[-1]["content"]) % 7 / 7, "accuracy": 0.0, "completeness": 0.0}


# What happens to a run


@pytest.mark.takes(15)
def test_a_killed_run_goes_on_to_the_weights_of_an_unbroken_one(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_csv, "score_episode", _score_by_length)
    settings = make_settings(steps=6, save_steps=2)  # an epoch has three steps
    child = in_child(lambda: train_stage.run(settings))
    checkpoint = project / "runs/train/checkpoints/checkpoint-4"
    deadline = time.monotonic() + 300
    while not (checkpoint / "trainer_state.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (project / "runs/train/model.safetensors").exists()

    settings.train.log_episodes_every = 1  # its pace only: the run goes on
    train_stage.run(settings)
    assert json.loads(Path("runs/train/episodes/step-00006.jsonl").read_text().splitlines()[0])
    assert not Path("runs/train/episodes/step-00001.jsonl").exists()
    resumed, rows = weights(), metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    train_stage.run(
        settings.model_copy(update={"paths": settings.paths.model_copy(update={"train": Path("runs/whole")})})
    )
    assert largest_difference(resumed, weights(Path("runs/whole"))) <= 1e-6


@pytest.mark.takes(8)
def test_two_processes_train_as_one_does(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [[CALL, ANSWER], [ANSWER, BLUE]])

    def train(name: str, **train: Any) -> Callable[[], None]:
        settings = make_settings(learning_rate=1e-4, **train)
        settings.paths.train = Path("runs") / name
        return lambda: train_stage.run(settings)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["ACCELERATE_USE_CPU"] = "true"
    children = [
        in_child(train("two", micro_batch=4), **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)
    ]
    for child in children:
        child.join(300)
        assert child.exitcode == 0
    train("one", micro_batch=8)()
    before = weights(Path("runs/coldstart"))
    assert largest_difference(weights(Path("runs/one")), before) > 5e-5
    # A tenth of one step's update (the learning rate): sums in another order differ in their last bits, and Adam
    # magnifies that where a gradient is near zero.
    assert largest_difference(weights(Path("runs/two")), weights(Path("runs/one"))) < 1e-5
    for name in ("reward", "search_rate", "completeness"):
        assert metrics(Path("runs/two"))[0][name] == pytest.approx(metrics(Path("runs/one"))[0][name])


def test_an_image_that_is_lost_stops_the_run_and_names_the_sample(
    play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        train_stage.GRPOCSVTrainer, "_get_tool_suffix_ids", lambda self, messages: self._tokenizer("lost")["input_ids"]
    )
    with pytest.raises(rollouts.ImageMismatchError, match=r"sample '\d': \d+ image tokens stand for \d+ images"):
        play(MIXED, steps=1)


def test_a_policy_cannot_write_image_tokens_and_a_written_one_stops_the_run(play: Callable[..., Any]) -> None:
    with pytest.raises(rollouts.ImageMismatchError, match=r"sample '\d'"):
        play([["<think>look <|image_pad|></think><answer>red</answer>"]], steps=1)


def test_generation_suppresses_all_vision_tokens(project: Path) -> None:
    settings = make_settings()
    kwargs = train_stage.grpo_config(settings, "runs/coldstart").generation_kwargs
    tokenizer = train_stage.load_processor("runs/coldstart").tokenizer
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    assert set(kwargs["suppress_tokens"]) == set(tokenizer.convert_tokens_to_ids(list(names)))


def test_an_answer_without_a_verdict_scores_0_and_is_counted(
    play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def puzzled(self: Any, triples: Sequence[Any]) -> list[float | None]:
        return [None if candidate == "red" else 1.0 for _, _, candidate in triples]

    monkeypatch.setattr("timesearch.judge.client.RuleJudge.score_many", puzzled)
    play([[ANSWER, BLUE]], steps=1, micro_batch=8)
    (row,) = metrics()
    assert row["unjudged"] == row["accuracy"] == 0.5


def test_a_cut_episode_is_counted_and_masked_if_asked(play: Callable[..., Any]) -> None:
    long = "<think>" + " red" * 60 + "</think>\n<answer>red</answer>"
    trainer = play([[ANSWER, long]], steps=1, micro_batch=8, mask_truncated=True)
    (row,) = metrics()
    assert row["truncated"] == row["ill_formed"] == 0.5
    (batch,) = trainer.batches
    learned = (batch["completion_mask"] * batch["tool_mask"]).sum(1)
    assert sorted((learned == 0).tolist()) == [False] * 4 + [True] * 4
    assert batch["num_items_in_batch"] == learned.sum()
    # It stays in sight: positions of a batch are counted by the images in it.
    assert (batch["completion_mask"].sum(1) > 0).all()


def test_a_fault_of_this_machine_stops_the_run(play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr("timesearch.search.tools.select_frames", broken)
    with pytest.raises(OSError, match="disk gone"):
        play([[CALL], [ANSWER]], steps=1)


ODD_TURNS = (
    '<think>t</think>\n<tool_call>\n{"name": "\\ud83d", "arguments": {"\\ud83d": "\\ud83d"}}\n</tool_call>',
    '<think>t</think>\n<tool_call>\n{"name": "seek_video_frames", "arguments": {"query": "\\ud83d"}}\n</tool_call>',
    '<tool_call>\n{"name": "seek_video_frames", "arguments": {"num_frames": ' + "9" * 30 + "}}\n</tool_call>",
    '<tool_call>\n{"name": "seek_video_frames", "arguments": [1]}\n</tool_call>',
    '<tool_call>\n{"name": "seek_video_frames", "arguments": "[[["}\n</tool_call>',
    "<tool_call>\n" + "[" * 40,
    "<think><think></think><answer></answer><answer>",
    "seconds " * 40,
)


def test_a_step_with_what_a_policy_may_write_finishes(play: Callable[..., Any]) -> None:
    odd = [turn.replace("{", "{{").replace("}", "}}") for turn in ODD_TURNS]
    trainer = play([odd, [odd[0], ANSWER]], reanswer=odd[-1], steps=1, micro_batch=8)
    (row,) = metrics()
    assert len(trainer.episodes) == 8
    assert math.isfinite(row["reward"])
    for written in ("[" * 100_000, '{"a":' * 5_000, '"' + "9" * 5_000):
        with pytest.raises((ValueError, TypeError)):  # for which TRL takes the turn as plain text
            rollouts._parsed_response(lambda text: {"tool_calls": json.loads(text)}, 8, written)
    parsed = rollouts._parsed_response(
        lambda: {"content": "\ud83d", "tool_calls": [{"function": {"name": "\ud83d"}}]}, 8
    )
    json.dumps(parsed, ensure_ascii=False).encode()


def test_a_wrong_call_is_answered_as_in_inference(play: Callable[..., Any]) -> None:
    odd = CALL.replace('"query"', '"what"')
    trainer = play([[odd], [ANSWER]], steps=1)
    replies = [m["content"] for m in trainer.episodes[0].messages if m["role"] == "tool"]
    assert "Wrong call" in replies[0][0]["text"]


@pytest.mark.parametrize("bound", [1, 8])
def test_a_turn_has_as_many_calls_as_its_protocol_allows(
    bound: int, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(steps=1)
    own = project / "prompts"
    shutil.copytree(Path(protocol.__file__).parent / "prompt_sets/pocket", own)
    (own / "protocol.yaml").write_text(f"calls_per_turn: {bound}\n")
    settings.search.prompts = str(own)
    made = script(monkeypatch, [[CALL + CALL], [ANSWER]])
    train_stage.run(settings)
    roles = [message["role"] for message in made[0].episodes[0].messages]
    assert roles.count("tool") == min(bound, 2)


def test_tool_messages_become_the_tokens_that_trl_makes_of_them(learned: tuple[Any, dict[str, Any]]) -> None:
    trainer, _ = learned
    episode = next(episode for episode in trainer.episodes if episode.searched)
    shown = next(message for message in episode.messages if message["role"] == "tool")
    plain = {"role": "tool", "name": shown["name"], "content": [{"type": "text", "text": "Wrong call."}]}
    for messages in ([shown], [shown, plain], [plain]):
        assert trainer._get_tool_suffix_ids(messages) == super(type(trainer), trainer)._get_tool_suffix_ids(messages)


def test_prompts_become_the_tokens_that_trl_makes_of_them(learned: tuple[Any, dict[str, Any]]) -> None:
    trainer, _ = learned
    prompts = [episode.messages[:2] for episode in trainer.episodes]
    assert len({episode.row["id"] for episode in trainer.episodes}) < len(prompts)
    ids, images, fields = trainer._tokenize_prompts(prompts)
    expected_ids, expected_images, expected = super(type(trainer), trainer)._tokenize_prompts(prompts)
    assert ids == expected_ids
    assert images == expected_images
    assert fields.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(fields[name], value) if isinstance(value, torch.Tensor) else fields[name] == value


@pytest.mark.takes(80)
@pytest.mark.skipif(inspect_machine().vllm is None, reason="needs vLLM: make vllm")
def test_a_colocated_vllm_gets_the_weights_of_each_step(tmp_path: Path) -> None:
    """On vLLM's CPU build: two steps of sampled episodes and re-answers, with the engine's weights compared."""
    program = Path(__file__).with_name("colocated.py")
    command = [python_with_vllm(), str(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert said, done.stderr[-3000:]
    result = json.loads(said[0].removeprefix("RESULT "))
    assert {seen["step"] for seen in result["seen"]} == {0, 1}
    assert all(seen["apart"] == 0.0 for seen in result["seen"])
    assert len({seen["sum"] for seen in result["seen"]}) == 2
    assert [row["step"] for row in result["rows"]] == [1, 2]
    assert [row["search_rate"] for row in result["rows"]] == [1 / 8, 1 / 8]
    # The engine computes in bf16 and a policy of random weights is sharp, so that this is far from 0 here.
    assert all(math.isfinite(row["sampling_logp_difference"]) for row in result["rows"])


# Groups that teach nothing


@pytest.mark.parametrize("mode", ["replay", "resample"])
def test_idle_groups_are_replaced(mode: str, play: Callable[..., Any]) -> None:
    turns = [[ANSWER, ANSWER, ANSWER, ANSWER, CALL, ANSWER, BLUE, ANSWER], [ANSWER]]
    trainer = play(turns, steps=3, micro_batch=8, zero_advantage=mode)
    assert any(row["replaced"] > 0 for row in metrics())
    for batch in trainer.batches[1:]:
        assert batch["completion_ids"].shape == batch["tool_mask"].shape
        assert sum(batch["num_images"]) == len(batch["image_grid_thw"])


def toy_batch(advantages: list[float], prompt: int, completion: int, first: int) -> dict[str, Any]:
    rows = len(advantages)
    ids = torch.arange(first, first + rows)[:, None]
    return {
        "prompt_ids": ids.expand(rows, prompt).clone(),
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
        "completion_ids": ids.expand(rows, completion).clone(),
        "completion_mask": torch.ones(rows, completion, dtype=torch.long),
        "tool_mask": torch.ones(rows, completion, dtype=torch.long),
        "mm_token_type_ids": torch.ones(rows, prompt + completion, dtype=torch.long),
        "old_per_token_logps": -torch.ones(rows, completion),
        "advantages": torch.tensor(advantages),
        "num_items_in_batch": torch.tensor(rows * completion),
        "num_images": [1] * rows,
        "image_grid_thw": torch.tensor([[1, 2, 2]] * rows),
        "pixel_values": ids.repeat_interleave(4, 0).float(),
    }


def test_replay_swaps_whole_rows_and_pads_both_sides() -> None:
    buffer = ReplayBuffer(capacity=2)
    _, replaced = buffer.exchange(toy_batch([1.0, -1.0, 0.0, 0.0], 5, 3, 10), size=2, pad_token=0)
    assert replaced == 0
    second, replaced = buffer.exchange(toy_batch([0.0, 0.0, 2.0, -2.0], 4, 6, 50), size=2, pad_token=0)
    assert replaced == 1
    assert idle_groups(second["advantages"], 2) == []
    assert second["advantages"].tolist() == [1.0, -1.0, 2.0, -2.0]
    assert second["prompt_ids"].tolist()[0] == [10] * 5
    assert second["prompt_ids"].tolist()[2] == [0, 52, 52, 52, 52]
    assert second["completion_ids"].tolist()[1] == [11] * 3 + [0] * 3
    assert second["completion_mask"].sum(1).tolist() == [3, 3, 6, 6]
    assert second["tool_mask"].shape == second["old_per_token_logps"].shape == (4, 6)
    assert second["mm_token_type_ids"].tolist()[0] == [1] * 8 + [0] * 3
    assert second["mm_token_type_ids"].tolist()[3] == [0] + [1] * 10
    assert second["pixel_values"][:, 0].tolist() == [10] * 4 + [11] * 4 + [52] * 4 + [53] * 4


def test_replay_keeps_its_own_rows_alone() -> None:
    batch = toy_batch([1.0, -1.0, 0.0, 0.0], 5, 3, 10)
    kept = take(batch, [0, 1])
    tensors = [part for value in kept.values() for part in (value if isinstance(value, list) else [value])]
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    kept["old_per_token_logps"] = kept["old_per_token_logps"].double()
    mixed = put(batch, [2, 3], kept, 0)
    assert {key: value.dtype for key, value in mixed.items() if isinstance(value, torch.Tensor)} == {
        key: value.dtype for key, value in batch.items() if isinstance(value, torch.Tensor)
    }


def test_what_was_kept_goes_where_the_batch_is() -> None:
    """On PyTorch's device without data, which stands for a GPU."""
    kept = take(toy_batch([1.0, -1.0], 5, 3, 10), [0, 1])
    batch = {
        key: value.to("meta") if isinstance(value, torch.Tensor) and key != "image_grid_thw" else value
        for key, value in toy_batch([0.0, 0.0, 2.0, -2.0], 4, 6, 50).items()
    }
    mixed = put(batch, [0, 1], kept, 0)
    assert mixed["completion_ids"].shape == (4, 6)
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            assert mixed[key].device == value.device


def test_refill_takes_useful_groups_only() -> None:
    batch = toy_batch([0.0, 0.0, 0.0, 0.0], 4, 3, 10)
    spare = toy_batch([0.0, 0.0, 1.0, -1.0], 4, 3, 50)
    batch, replaced = refill(batch, spare, size=2, pad_token=0)
    assert replaced == 1
    assert batch["completion_ids"][:, 0].tolist() == [52, 53, 12, 13]
    untouched = toy_batch([1.0, -1.0], 4, 3, 10)
    assert put(untouched, [0], take(untouched, [0]), 0)["prompt_ids"].equal(untouched["prompt_ids"])


# What is said


def test_collapse_is_said_once() -> None:
    watch = CollapseWarning(window=3)
    said = []
    for step in range(12):
        said += list(watch.check({"search_rate": 1.0 - 0.09 * step, "format": 1.0}))
    assert len(said) == 1
    assert "searching collapses" in said[0]
    assert list(CollapseWarning().check({"search_rate": 1.0, "format": 1.0})) == []


def test_the_private_names_of_trl_that_are_used_still_mean_what_they_did() -> None:
    from trl import GRPOTrainer
    from trl.trainer import grpo_trainer

    def parameters(name: str) -> list[str]:
        return list(inspect.signature(getattr(GRPOTrainer, name)).parameters)[1:]

    assert parameters("_generate") == ["prompts"]
    assert parameters("_generate_single_turn")[:4] == ["prompt_ids", "images", "multimodal_fields", "num_generations"]
    assert parameters("_generate_and_score_completions") == ["inputs"]
    assert parameters("_get_tool_suffix_ids") == ["tool_messages"]
    assert parameters("_tokenize_prompts") == ["prompts"]
    assert parameters("_get_train_sampler") == ["dataset"]
    assert parameters("_prepare_inputs") == ["generation_batch"]
    assert parameters("_compute_loss") == ["model", "inputs"]
    assert parameters("_get_per_token_logps_and_entropies")[:4] == [
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
    ]
    source = inspect.getsource(GRPOTrainer)
    assert "zip(prompts, self._batch_environments, strict=True)" in source
    assert "return prompt_ids, images, multimodal_fields" in source
    assert "name in sync_tool_dict" in source
    assert "sync_tool_dict[name](**function" in source
    assert (
        "return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images"
        in source
    )
    for name in ("_sync_tool_dicts", "_image_pad_token_id", "_tokenizer", "eos_token_ids", "environments", "_metrics"):
        assert f"self.{name} = " in source
    assert {"split_pixel_values_by_grid", "unsplit_pixel_values_by_grid"} <= vars(grpo_trainer).keys()
