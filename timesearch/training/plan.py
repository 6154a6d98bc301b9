"""`timesearch train --plan`: what runs where and what it takes, worked out from settings alone, without a GPU; a Ray
cluster that answers is asked what it has.

Memory is counted by its large parts. Weights, gradients and optimiser follow ZeRO (arXiv 1910.02054, Section 3: 2, 2
and 12 bytes a parameter with mixed-precision Adam); activations are what transformer layers with fused attention and
gated feed-forward keep for the backward pass (after arXiv 2205.05198, Section 4). It is an estimate for deciding what
to start, checked against counted parameters, not against measured GPUs.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from timesearch.base.cluster import Node
from timesearch.base.errors import RequestError
from timesearch.search.budget import completion_tokens, preview_frames, prompt_tokens, search_tokens, searched_frames
from timesearch.settings import Settings, Train
from timesearch.training.launch import launch_command, refuse_unfit
from timesearch.training.placement import GIB, Placed, place, traffic, training_processes
from timesearch.training.slurm import takes_a_job

VLLM_SHARE = 0.3
"""Share of a GPU's memory that TRL gives a colocated vLLM."""
SLACK = 0.1
"""Share of a GPU's memory left to the allocator and to communication buffers."""
CHUNK = 256
"""Tokens whose logits exist at the same time (TRL's fused language-model head)."""


def _qwen25(
    hidden: int, inner: int, layers: int, heads: int, kv: int, vision: int, tied: bool = False
) -> dict[str, Any]:
    text: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": kv, "tie_word_embeddings": tied}
    text |= {"vocab_size": 151_936 if tied else 152_064}
    tower = {"depth": 32, "hidden_size": 1280, "intermediate_size": vision, "num_heads": 16, "out_hidden_size": hidden}
    return {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": tower, "tie_word_embeddings": tied}


def _qwen3(
    hidden: int, inner: int, layers: int, heads: int, vision: tuple[int, int, int], tied: bool
) -> dict[str, Any]:
    text: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    text |= {
        "head_dim": 128,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 151_936,
        "tie_word_embeddings": tied,
    }
    tower: dict[str, Any] = dict(zip(("depth", "hidden_size", "intermediate_size"), vision, strict=True))
    tower |= {"num_heads": 16, "out_hidden_size": hidden, "num_position_embeddings": 2304}
    tower |= {"deepstack_visual_indexes": [5, 11, 17], "patch_size": 16}
    return {"model_type": "qwen3_vl", "text_config": text, "vision_config": tower, "tie_word_embeddings": tied}


KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B": _qwen25(2048, 11_008, 36, 16, 2, 3420, tied=True),
    "Qwen2.5-VL-7B": _qwen25(3584, 18_944, 28, 28, 4, 3420),
    "Qwen2.5-VL-32B": _qwen25(5120, 27_648, 64, 40, 8, 3456),
    "Qwen2.5-VL-72B": _qwen25(8192, 29_568, 80, 64, 8, 3456),
    "Qwen3-VL-2B": _qwen3(2048, 6144, 28, 16, (24, 1024, 4096), tied=True),
    "Qwen3-VL-4B": _qwen3(2560, 9728, 36, 32, (24, 1024, 4096), tied=True),
    "Qwen3-VL-8B": _qwen3(4096, 12_288, 36, 32, (27, 1152, 4304), tied=False),
    "Qwen3-VL-32B": _qwen3(5120, 25_600, 64, 64, (27, 1152, 4304), tied=False),
}
"""Sizes of published checkpoints, so that a run can be planned before they are downloaded."""


@dataclass(frozen=True)
class ModelSize:
    """Counts of a checkpoint that memory depends on.

    `largest` is the largest piece of parameters that sharding gathers at once; `text_kept` and `vision_kept` are bytes
    a token and a patch that the forward pass keeps, in bf16.
    """

    parameters: int
    trained: int
    adapted: bool
    """what is trained are LoRA adapters"""
    largest: int
    vocabulary: int
    text_kept: float
    vision_kept: float
    cache_bytes: int
    """bytes of key-value cache a token"""
    pixel_bytes: int
    """bytes of the float32 pixels that a vision token stands for"""


def model_size(config: dict[str, Any], lora_rank: int, checkpointing: bool, freeze_vision: bool = False) -> ModelSize:
    """Count a model by building it without weights.

    Args:
        config: contents of a `config.json`.
        lora_rank: rank of adapters on all linear layers; 0 for none.
        checkpointing: whether layers keep their inputs only.
        freeze_vision: whether the vision tower stays as it is, and keeps nothing for a backward pass.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    parsed = AutoConfig.for_model(config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(parsed)
    text, vision = parsed.get_text_config(), parsed.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    query, key_value = head * text.num_attention_heads, head * text.num_key_value_heads
    linear = [
        module.in_features + module.out_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not name.endswith("lm_head")
        and not (freeze_vision and ".visual." in name)
    ]
    frozen = sum(parameter.numel() for parameter in model.model.visual.parameters()) if freeze_vision else 0
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelSize(
        parameters=parameters,
        trained=lora_rank * sum(linear) if lora_rank else parameters - frozen,
        adapted=lora_rank > 0,
        largest=max(parameter.numel() for parameter in model.parameters()),
        vocabulary=text.vocab_size,
        text_kept=_kept(
            text.num_hidden_layers, text.hidden_size, text.intermediate_size, query, key_value, checkpointing
        ),
        vision_kept=0.0
        if freeze_vision
        else _kept(
            vision.depth,
            vision.hidden_size,
            vision.intermediate_size,
            vision.hidden_size,
            vision.hidden_size,
            checkpointing,
        ),
        cache_bytes=2 * 2 * key_value * text.num_hidden_layers,
        pixel_bytes=4 * 3 * vision.temporal_patch_size * (vision.patch_size * vision.spatial_merge_size) ** 2,
    )


def _kept(layers: int, hidden: int, inner: int, query: int, key_value: int, checkpointing: bool) -> float:
    layer = 2 * (5 * hidden + 2 * query + 2 * key_value + 4 * inner)
    return 2 * hidden * layers + layer if checkpointing else layer * layers


@dataclass(frozen=True)
class Plan:
    """A run in numbers; `problems` are reasons why it cannot work, `warnings` why it may not work well."""

    model: str
    size: ModelSize
    gpus: int
    memory: dict[str, float]
    """GiB on each GPU, by part"""
    coldstart: dict[str, float]
    """the same of the cold start's one GPU"""
    replay: float
    """GiB of each node's main memory for replayed groups"""
    capacity: float
    stages: list[Placed]
    step: dict[str, int]
    commands: list[str]
    problems: list[str]
    warnings: list[str]

    @property
    def fits(self) -> bool:
        """Whether the run can be started."""
        return not self.problems

    def text(self) -> str:
        """The plan for a person."""
        lines = [f"model             {self.model}: {self.size.parameters / 1e9:.2f} billion parameters"]
        if self.size.trained < self.size.parameters:
            kind = " of LoRA adapters" if self.size.adapted else ""
            lines.append(f"trained           {self.size.trained / 1e6:.0f} million parameters{kind}")
        lines += ["", "stages", *(line for stage in self.stages for line in stage.lines())]
        for title, memory in (
            (f"cold start: memory of its one GPU of {self.capacity:.0f} GiB, at most", self.coldstart),
            (f"training: memory of each of {self.gpus} GPUs of {self.capacity:.0f} GiB, at most", self.memory),
        ):
            lines += ["", title, *(f"  {part:<24}{gib:8.1f} GiB" for part, gib in memory.items())]
            lines += [f"  {'together':<24}{sum(memory.values()):8.1f} GiB"]
        if self.replay:
            lines += ["", f"replayed groups take up to {self.replay:.1f} GiB of each node's main memory"]
        lines += ["", "one step, at most"]
        lines += [f"  {part:<24}{count:12,}" for part, count in self.step.items()]
        lines += ["", "start"]
        lines += [f"  {command}" for command in self.commands]
        lines += [f"\nwarning: {text}" for text in self.warnings]
        lines += [f"\ncannot work: {text}" for text in self.problems]
        return "\n".join(lines)


def find_config(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Name and `config.json` of the policy: a folder on disk, or a published model by name.

    Raises:
        RequestError: it is neither.
    """
    policy = settings.models.policy
    name = policy.rstrip("/").rsplit("/", 1)[-1]
    known = next((config for model, config in KNOWN_MODELS.items() if name.startswith(model)), None)
    for folder in (Path(policy), settings.paths.models / "policy"):
        if (folder / "config.json").is_file() and (known is None or folder == Path(policy)):
            return str(folder), json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if known is not None:
        return policy, known
    raise RequestError(
        f"models.policy {policy!r} is no folder with a config.json, and none of the known models: "
        + ", ".join(KNOWN_MODELS)
    )


def make_plan(settings: Settings, params: str = "params.yaml", nodes: Sequence[Node] = ()) -> Plan:
    """Work out what a run takes.

    Args:
        settings: the run.
        params: file of the settings, as commands name it.
        nodes: machines of the Ray cluster that it is to run on; none where nothing is known of them.
    """
    known = [node.gpu_memory for node in nodes if node.gpu_memory]
    if known:
        own = settings.train.model_copy(update={"gpu_memory": min(known)})
        settings = settings.model_copy(update={"train": own})
    train, search = settings.train, settings.search
    name, config = find_config(settings)
    size = model_size(config, train.lora_rank, train.gradient_checkpointing, train.freeze_vision)
    gpus = max(1, train.nodes * train.gpus_per_node) if train.launcher != "single" else 1
    searched = searched_frames(search)
    preview, prompt, wanted = preview_frames(search), prompt_tokens(search), completion_tokens(search)
    completion = min(train.max_completion_length, wanted)
    reanswer = search_tokens(search) if train.verifies else 0
    vision = search.total_video_tokens + searched * search.max_tokens
    episodes = train.prompts_per_step * train.num_generations
    rollouts = math.ceil(episodes / gpus)
    problems, warnings = _unfit(settings, gpus), []
    if episodes % (gpus * train.micro_batch):
        problems.append(
            f"prompts_per_step x num_generations = {episodes} episodes do not divide into {gpus} processes with "
            f"micro-batches of {train.micro_batch}"
        )
    if wanted > train.max_completion_length:
        warnings.append(
            f"an episode that uses every turn and frame takes {wanted:,} tokens and is cut at max_completion_length "
            f"{train.max_completion_length:,}"
        )
    if settings.coldstart.traces == "teacher" and not settings.coldstart.teacher_url:
        warnings.append("coldstart.traces is 'teacher': coldstart.teacher_url and coldstart.teacher_model are not set")
    memory = _memory(train, size, gpus, _Load(prompt + completion, vision, CHUNK, rollouts))
    coldstart = _coldstart_memory(settings, config, prompt + wanted, vision)
    usable = train.gpu_memory * (1 - SLACK)
    for what, parts, advice in (
        ("the cold start", coldstart, _coldstart_advice(settings)),
        ("training", memory, _advice(settings)),
    ):
        if (needed := sum(parts.values())) > usable:
            problems.append(
                f"{needed:.1f} GiB are needed by {what}, and {usable:.1f} of {train.gpu_memory:.0f} GiB are usable on "
                f"each GPU: {advice}"
            )
    if train.generation == "vllm_colocate" and memory["vLLM"] * GIB < 2 * size.parameters + size.cache_bytes * prompt:
        problems.append(
            f"vLLM gets {memory['vLLM']:.1f} GiB, less than the weights ({2 * size.parameters / GIB:.1f} GiB) and one "
            "episode: "
            + ("take larger GPUs" if gpus > 1 else "set train.generation to vllm_server, on GPUs of its own")
            + ", or take a smaller model"
        )
    replay = rollouts * vision * size.pixel_bytes * gpus / train.nodes / GIB
    if train.zero_advantage != "replay":
        replay = 0.0
    if nodes and replay > (least := min(node.memory for node in nodes)):
        problems.append(
            f"replayed groups take up to {replay:.1f} GiB of main memory, and a machine of the cluster has {least:.1f}"
            ": set train.zero_advantage to keep"
        )
    stages, unplaced = place(
        settings,
        nodes,
        parameters=size.parameters,
        cache_bytes=size.cache_bytes,
        training=sum(memory.values()),
        coldstart=sum(coldstart.values()),
        moved=traffic(
            train,
            size.parameters,
            size.trained,
            training_processes(train),
            math.ceil(episodes / (training_processes(train) * train.micro_batch)),
        ),
    )
    problems += unplaced
    return Plan(
        model=name,
        size=size,
        gpus=gpus,
        memory=memory,
        coldstart=coldstart,
        replay=replay,
        capacity=train.gpu_memory,
        stages=stages,
        step={
            "episodes": episodes,
            "tokens of episodes": episodes * (prompt + completion),
            "tokens of re-answers": episodes * reanswer,
            "images": episodes * (preview + searched * (2 if reanswer else 1)),
            "tokens of one episode": prompt + completion,
        },
        commands=_commands(settings, params),
        problems=problems,
        warnings=warnings,
    )


def _unfit(settings: Settings, gpus: int) -> list[str]:
    """Settings that do not go together, a sentence each."""
    train, judge = settings.train, settings.judge
    problems = []
    try:
        refuse_unfit(train, gpus)
    except RequestError as error:
        problems.append(str(error))
    host = urlsplit(judge.url).hostname or ""
    if judge.kind == "server" and (host == "localhost" or host.startswith("127.") or host == "::1"):
        if train.nodes > 1 and train.launcher != "single":
            problems.append(
                f"judge.url {judge.url} is another machine on each of {train.nodes} nodes: name the judge's host in it"
            )
        elif judge.start and not judge.command:
            problems.append(
                f"judge.start starts {judge.model} on the GPUs that train: run it on another machine, with judge.url "
                "naming that and judge.start false, or keep it to other GPUs by judge.command"
            )
    return problems


@dataclass(frozen=True)
class _Load:
    """What a GPU works on: an episode's tokens, those of them that stand for images, tokens whose logits exist at the
    same time, and episodes whose images it holds."""

    tokens: int
    vision: int
    logits: int
    held: int


def _coldstart_memory(settings: Settings, config: dict[str, Any], tokens: int, vision: int) -> dict[str, float]:
    """GiB of the cold start's GPU by part: a training by one process that generates nothing."""
    cold, search = settings.coldstart, settings.search
    one = {"launcher": "single", "beta": 0.0, "generation": "vllm_server"}
    own = {name: getattr(cold, name) for name in ("lora_rank", "bf16", "micro_batch")}
    size = model_size(config, cold.lora_rank, cold.gradient_checkpointing, cold.freeze_vision)
    logits = cold.micro_batch * search.max_turns * search.max_new_tokens
    return _memory(
        settings.train.model_copy(update={**one, **own}), size, 1, _Load(tokens, vision, logits, cold.micro_batch)
    )


def _memory(train: Train, size: ModelSize, gpus: int, load: _Load) -> dict[str, float]:
    """GiB on each GPU by part."""
    full = train.lora_rank == 0
    sharded = train.launcher in ("zero3", "fsdp")
    weights = gradients = optimiser = 1
    if train.launcher in ("zero2", "zero3", "fsdp"):
        gradients = optimiser = gpus
    if sharded:
        weights = gpus
    # Without DeepSpeed what is trained is kept in float32 and computed in bf16: the weights are their own master copy.
    master = full and train.launcher in ("single", "ddp", "fsdp")
    wide = 4 if master or not train.bf16 else 2
    parts = {
        "weights": wide * size.parameters / weights,
        "weights in bf16": 2 * size.parameters if master and train.bf16 and not sharded else 0.0,
        "gradients": wide * size.trained / gradients,
        "optimiser": (8 if master else 12) * size.trained / optimiser,
        "reference model": wide * size.parameters / weights if train.beta and full else 0.0,
        "gathered layers": 2 * 2 * size.largest if sharded else 0.0,
        "activations": train.micro_batch * (load.tokens * size.text_kept + 4 * load.vision * size.vision_kept),
        "logits": 3 * 4 * load.logits * size.vocabulary,
        "images": load.held * load.vision * size.pixel_bytes,
    }
    if train.generation == "vllm_colocate":
        parts["vLLM"] = VLLM_SHARE * train.gpu_memory * GIB
    elif train.generation == "transformers":
        parts["key-value cache"] = load.held * load.tokens * size.cache_bytes
    return {part: amount / GIB for part, amount in parts.items() if amount}


def _advice(settings: Settings) -> str:
    train = settings.train
    if not train.gradient_checkpointing:
        return "set train.gradient_checkpointing"
    if train.micro_batch > 1:
        return "set train.micro_batch to 1"
    if train.lora_rank:
        return "lower search.total_video_tokens or train.max_completion_length, or take a smaller model"
    if train.launcher in ("zero3", "fsdp"):
        return "use more GPUs, or lower search.total_video_tokens or train.max_completion_length"
    if train.nodes * train.gpus_per_node > 1:
        together = " and train.generation to vllm_colocate" if train.generation != "vllm_colocate" else ""
        return f"set train.launcher to zero3{together}"
    return "set train.lora_rank, or use more GPUs with train.launcher zero3"


def _coldstart_advice(settings: Settings) -> str:
    cold = settings.coldstart
    if not cold.gradient_checkpointing:
        return "set coldstart.gradient_checkpointing"
    if cold.micro_batch > 1:
        return "set coldstart.micro_batch to 1"
    if not cold.lora_rank:
        return "set coldstart.lora_rank, for it is one process on one GPU"
    return "lower search.total_video_tokens, or take a smaller model"


def _commands(settings: Settings, params: str) -> list[str]:
    train = settings.train
    if train.launcher == "single" or settings.cluster.kind == "ray" or takes_a_job(settings):
        return [f"timesearch train --params {shlex.quote(params)}"]
    commands = []
    for rank in range(train.nodes):
        command = launch_command(train, rank, "$MAIN_ADDRESS" if train.nodes > 1 else None, params)
        commands.append(f"node {rank}: " + " ".join(["accelerate", "launch", *command[3:]]))
    return commands
