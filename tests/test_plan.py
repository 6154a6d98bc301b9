"""`train --plan` and the launcher: sizes as published, memory as in the ZeRO paper, commands that can be copied."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

from timesearch.base.cluster import Node
from timesearch.base.errors import RequestError, TimeSearchError
from timesearch.profiles import load_profile
from timesearch.settings import Settings
from timesearch.training import launch
from timesearch.training.placement import GIB, traffic
from timesearch.training.plan import KNOWN_MODELS, make_plan, model_size
from timesearch.training.slurm import batch_script

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen2.5-VL-7B", 8.292), ("Qwen2.5-VL-3B", 3.755), ("Qwen3-VL-8B", 8.767), ("Qwen3-VL-4B", 4.438)],
)
def test_parameters_are_those_of_the_published_checkpoints(name: str, billions: float) -> None:
    size = model_size(KNOWN_MODELS[name], lora_rank=0, checkpointing=True)
    assert size.parameters / 1e9 == pytest.approx(billions, abs=6e-4)


def test_the_paper_profile_fits_on_its_sixteen_gpus() -> None:
    plan = make_plan(load_profile("paper-7b"), "profiles/paper-7b.yaml")
    assert plan.fits
    assert plan.gpus == 16
    parameters = plan.size.parameters
    assert plan.memory["weights"] == pytest.approx(2 * parameters / 16 / GIB)
    assert plan.memory["gradients"] == pytest.approx(2 * parameters / 16 / GIB)
    assert plan.memory["optimiser"] == pytest.approx(12 * parameters / 16 / GIB)
    assert len(plan.commands) == 2
    for rank, command in enumerate(plan.commands):
        assert command.startswith(f"node {rank}: accelerate launch --config_file configs/zero3.yaml --num_machines 2 ")
        assert f"--machine_rank {rank} " in command
        assert "--num_processes 16 " in command
        assert "--main_process_ip $MAIN_ADDRESS" in command
        assert command.endswith("-m timesearch train --params profiles/paper-7b.yaml")
    text = plan.text()
    for words in ("8.29 billion", "key-value" if "key-value cache" in plan.memory else "vLLM", "episodes", "images"):
        assert words in text


def test_the_profiles_hold_the_released_values() -> None:
    """Of its training script, and of its inference."""
    paper, released = load_profile("paper-7b"), load_profile("timesearch-r")
    frames = {"max_frames": 768, "min_tokens": 12, "max_tokens": 256, "max_frames_per_turn": 8, "patch": 28}
    training = {"max_turns": 8, "max_new_tokens": 256, "total_video_tokens": 10_240, "method": "dpp", **frames}
    playing = {"max_turns": 10, "max_new_tokens": 512, "total_video_tokens": 24_000, **frames}
    assert paper.search.model_dump(include=training) == training
    for settings in (paper, released):
        assert settings.for_inference().search.model_dump(include=playing) == playing
        assert settings.infer.temperature == 0.0
    learning = {
        **{
            "learning_rate": 1e-6,
            "schedule": "linear",
            "beta": 0.005,
            "temperature": 1.0,
            "max_completion_length": 16_000,
        },
        **{"num_generations": 8, "prompts_per_step": 4, "micro_batch": 1, "scale_rewards": "none", "bf16": True},
        **{"zero_advantage": "replay", "mask_truncated": False, "gradient_checkpointing": True, "lora_rank": 0},
        "rewards": {"format": 1.0, "accuracy": 0.5, "completeness": 0.5},
    }
    assert paper.train.model_dump(include=learning) == learning
    assert (paper.frames.fps, paper.models.encoder) == (2.0, "ViT-SO400M-14-SigLIP-384")
    assert (paper.judge.model, paper.judge.max_candidate_chars) == ("Qwen/Qwen2.5-72B-Instruct", 100)
    assert (paper.models.policy, released.models.policy) == ("Qwen/Qwen2.5-VL-7B-Instruct", "Time-Search/TimeSearch-R")


def test_what_cannot_fit_is_refused_with_advice() -> None:
    settings = load_profile("paper-7b")
    settings.train.nodes, settings.train.gpus_per_node, settings.train.launcher = 1, 1, "single"
    plan = make_plan(settings)
    assert not plan.fits
    assert any("GiB are needed" in problem and "lora_rank" in problem for problem in plan.problems)
    settings.train.prompts_per_step, settings.train.micro_batch = 3, 5
    assert any("do not divide" in problem for problem in make_plan(settings).problems)


@pytest.mark.parametrize("gpus", [1, 8, 16, 64])
def test_plans_are_as_they_were_looked_at(gpus: int) -> None:
    """`python tests/test_plan.py` writes them anew."""
    assert planned(gpus) == (ROOT / f"tests/plans/{gpus}.txt").read_text(encoding="utf-8")


def planned(gpus: int) -> str:
    """The plan of a run on so many GPUs; of one over several machines with its batch script for Slurm."""
    settings = load_profile("single-gpu" if gpus == 1 else "paper-7b", ROOT / "profiles")
    settings.judge.url = "http://judge:8765/v1"
    if gpus == 8:
        settings.cluster.kind = "ray"
        settings.cluster.engines = 8
    if gpus > 8:
        settings.cluster.kind = "slurm"
        settings.cluster.slurm = ["--partition=gpu", "--time=2-00:00:00"]
    settings.train.nodes = max(1, gpus // 8)
    settings.train.prompts_per_step = max(settings.train.prompts_per_step, gpus // 8)
    plan = make_plan(settings)
    assert plan.fits, plan.problems
    text = plan.text() + "\n"
    return text + "\n" + batch_script(settings, Path("/shared/timesearch"), "python") if gpus > 8 else text


def machine(gpus: int, memory: float = 80.0, name: str = "a") -> Node:
    return Node(name, name, cpus=64, gpus=gpus, memory=1000.0, gpu_memory=memory if gpus else None)


def test_a_cluster_that_answers_is_planned_for_as_it_is() -> None:
    settings = load_profile("paper-7b")
    settings.cluster.kind, settings.judge.url = "ray", "http://judge:8765/v1"
    assert make_plan(settings, nodes=[machine(8), machine(8)]).fits
    (few,) = make_plan(settings, nodes=[machine(8)]).problems
    assert few == (
        "train (train.nodes x train.gpus_per_node) takes 16 GPUs, and the Ray cluster at auto has 8 on 1 machine: take "
        "fewer, or add machines"
    )
    small = make_plan(settings, nodes=[machine(8, 40.0), machine(8, 80.0)])
    assert small.capacity == 40.0
    assert any("needed by training, and 36.0 of 40 GiB are usable" in problem for problem in small.problems)
    settings.judge.start, settings.judge.command, settings.cluster.judge_gpus = True, ["judge"], 8
    together = make_plan(settings, nodes=[machine(8), machine(8)]).problems
    assert any("train with its judge (16 + 8) takes 24 GPUs" in problem for problem in together)
    assert make_plan(settings, nodes=[machine(8), machine(8), machine(8)]).fits
    settings.cluster.engine_gpus = 9
    split = make_plan(settings, nodes=[machine(8), machine(8), machine(8)]).problems
    assert any("takes 9 GPUs of one machine, and no machine" in problem for problem in split)


def test_what_a_step_moves_follows_zero() -> None:
    """ZeRO, Section 7: data parallel 2 parameters, stages 1 and 2 the same, stage 3 three of them."""
    train = load_profile("paper-7b").train.model_copy(update={"beta": 0.0, "generation": "transformers"})
    for launcher, times in (("zero2", 2), ("zero3", 3), ("fsdp", 3)):
        moved = traffic(train.model_copy(update={"launcher": launcher}), 1000, 1000, gpus=4, passes=1)
        assert sum(moved.values()) == pytest.approx(times * 2 * 1000 * 3 / 4)
    wide = train.model_copy(update={"launcher": "ddp", "bf16": False})
    assert traffic(wide, 1000, 1000, gpus=4, passes=3) == {"gradients": pytest.approx(2 * 4 * 1000 * 3 / 4)}
    assert traffic(wide, 1000, 1000, gpus=1, passes=1) == {}


def test_the_single_gpu_profile_fits_with_adapters() -> None:
    plan = make_plan(load_profile("single-gpu"))
    assert plan.fits
    assert 0 < plan.size.trained < plan.size.parameters / 10
    assert plan.commands == ["timesearch train --params params.yaml"]


def test_a_frozen_vision_tower_keeps_its_weights_and_nothing_more() -> None:
    settings = load_profile("paper-7b")
    settings.train.lora_rank = 0
    whole = make_plan(settings)
    settings.train.freeze_vision = True
    frozen = make_plan(settings)
    vision = whole.size.trained - frozen.size.trained
    assert 0.05 < vision / whole.size.parameters < 0.15  # 0.68 billion of Qwen2.5-VL-7B's 8.3
    assert frozen.memory["weights"] == whole.memory["weights"]
    for part in ("gradients", "optimiser", "activations"):
        assert frozen.memory[part] < whole.memory[part]
    assert f"trained           {frozen.size.trained / 1e6:.0f} million parameters\n" in frozen.text()


@pytest.mark.parametrize("name", ["paper-7b", "single-gpu", "pocket"])
def test_the_cold_start_of_each_profile_fits_on_one_gpu(name: str) -> None:
    plan = make_plan(load_profile(name))
    assert plan.fits, plan.problems
    assert "cold start: memory of its one GPU" in plan.text()


def test_a_cold_start_that_does_not_fit_is_refused_with_advice() -> None:
    """Full weights: float32 weights, gradients and two moments, and the weights that a pass computes with."""
    settings = load_profile("paper-7b")
    settings.coldstart.lora_rank = 0
    plan = make_plan(settings)
    states = ("weights", "weights in bf16", "gradients", "optimiser")
    assert sum(plan.coldstart[part] for part in states) == pytest.approx(18 * plan.size.parameters / GIB)
    assert any("by the cold start" in problem and "coldstart.lora_rank" in problem for problem in plan.problems)


def test_a_reference_model_is_as_wide_as_the_policy() -> None:
    settings = load_profile("paper-7b")
    parameters = make_plan(settings).size.parameters
    widths = {}
    for launcher in ("zero2", "zero3", "ddp", "fsdp"):
        settings.train.launcher = launcher  # type: ignore[assignment]
        share = 16 if launcher in ("zero3", "fsdp") else 1
        widths[launcher] = make_plan(settings).memory["reference model"] * GIB * share / parameters
    assert widths == pytest.approx({"zero2": 2, "zero3": 2, "ddp": 4, "fsdp": 4})


def test_what_training_refuses_is_a_problem_of_the_plan_and_never_its_advice() -> None:
    settings = load_profile("paper-7b")
    settings.train.lora_rank = 64
    assert any("train.lora_rank is 64" in problem for problem in make_plan(settings).problems)
    for launcher, generation, rank in itertools.product(
        ("single", "ddp", "zero2", "zero3", "fsdp"), ("transformers", "vllm_colocate", "vllm_server"), (0, 64)
    ):
        changed = {"launcher": launcher, "generation": generation, "lora_rank": rank, "gpu_memory": 1.0}
        own = settings.model_copy(update={"train": settings.train.model_copy(update=changed)})
        for problem in make_plan(own).problems:
            assert "needed by training" not in problem or launcher == "single" or "lora_rank" not in problem
            assert "zero3" not in problem.partition("usable on each GPU: ")[2] or rank == 0
            assert "vllm_server, on GPUs of its own" not in problem or launcher == "single"


def test_a_judge_on_the_gpus_that_train_is_a_problem() -> None:
    settings = load_profile("paper-7b")
    settings.judge.url = "http://127.0.0.1:8765/v1"
    assert any("another machine on each of 2 nodes" in problem for problem in make_plan(settings).problems)
    settings.train.nodes, settings.judge.start = 1, True
    assert any("on the GPUs that train" in problem for problem in make_plan(settings).problems)
    settings.judge.command = ["env", "CUDA_VISIBLE_DEVICES=7", "vllm", "serve", "{model}", "--port", "{port}"]
    assert not any("judge" in problem for problem in make_plan(settings).problems)


def test_replayed_groups_take_main_memory() -> None:
    settings = load_profile("single-gpu")
    pixels = 4 * 3 * 2 * 28 * 28
    tokens = 6144 + 7 * 8 * 256
    assert make_plan(settings).replay == pytest.approx(8 * tokens * pixels / GIB)
    settings.train.zero_advantage = "keep"
    assert make_plan(settings).replay == 0


def test_an_unknown_model_is_named() -> None:
    settings = Settings()
    settings.models.policy = "somebody/Large-VL"
    settings.paths.models = Path("nowhere")
    with pytest.raises(RequestError, match="somebody/Large-VL"):
        make_plan(settings)


def test_kept_activations_are_about_what_autograd_keeps() -> None:
    import torch

    from timesearch.pocket.policy import make_policy, make_tokenizer

    model = make_policy(make_tokenizer())
    size = model_size(model.config.to_dict(), lora_rank=0, checkpointing=False)
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = 512
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=False)
    bf16 = sum(kept.values()) / 2
    assert output.last_hidden_state.requires_grad
    assert tokens * size.text_kept == pytest.approx(bf16, rel=0.5)


def test_several_nodes_need_an_address() -> None:
    with pytest.raises(RequestError, match="--main-address"):
        launch.launch_command(load_profile("paper-7b").train, 0, None, "params.yaml")


def test_each_launcher_has_its_file() -> None:
    import yaml

    for name, kind in {"ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp": "FSDP"}.items():
        settings = load_profile("paper-7b").train.model_copy(update={"launcher": name, "nodes": 1})
        command = launch.launch_command(settings, 0, None, "params.yaml")
        config = yaml.safe_load(Path(command[command.index("--config_file") + 1]).read_text())
        assert config["distributed_type"] == kind


def test_accelerate_reads_the_files() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for path in sorted((ROOT / "configs").glob("*.yaml")):
        assert load_config_from_file(str(path)).distributed_type.name in ("MULTI_GPU", "DEEPSPEED", "FSDP")


def test_a_process_that_fails_stops_the_others_and_says_so(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("train: {steps: none}\n")
    with pytest.raises(TimeSearchError, match=r"training process \d of 2 ended with exit code 2"):
        launch.run_processes(2, ["-m", "timesearch", "train", "--params", str(params)], tmp_path)


def test_hidden_modules_come_back() -> None:
    with launch.hidden("statistics_of_nothing", "pytest"):
        assert importlib.util.find_spec("statistics_of_nothing") is None
        assert importlib.util.find_spec("pytest") is not None
    assert "statistics_of_nothing" not in sys.modules


if __name__ == "__main__":
    for count in (1, 8, 16, 64):
        (ROOT / f"tests/plans/{count}.txt").write_text(planned(count), encoding="utf-8")
