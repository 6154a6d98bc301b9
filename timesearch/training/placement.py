"""Which stage runs where, what memory it takes there, and what moves over the network: the part of a plan that looks at
all stages, by settings alone or by the machines of a cluster that answers.

Traffic of a training follows ZeRO (arXiv 1910.02054, Section 7): an all-reduce moves twice the bytes of the gradients
through each GPU, gathering or scattering sharded parts once. A ring over several machines moves as much over the wire
of each machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from timesearch.base.cluster import Node, require
from timesearch.base.errors import RequestError
from timesearch.inference.on_ray import refuse_engines
from timesearch.judge.on_ray import is_kept_apart
from timesearch.search.budget import completion_tokens, prompt_tokens, search_tokens
from timesearch.settings import Settings, Train

GIB = 2**30
VLLM_OWN = 0.9
"""Share of a GPU's memory that a vLLM of its own takes (its default)."""
_ENCODERS = {"ViT-SO400M-14-SigLIP-384": (0.877e9, 1152)}
"""Parameters, and numbers in a feature, of published encoders."""
_WIRE = 100e9 / 8
"""Bytes a second of 100 Gbit/s."""


@dataclass(frozen=True)
class Placed:
    """One stage: where it runs, what it takes there, what it moves; sentences without a stop."""

    stage: str
    where: str
    memory: str
    network: str

    def lines(self) -> list[str]:
        """For a person."""
        return [
            f"  {self.stage:<10}  {self.where}",
            *(f"  {'':<10}  {name:<8}  {said}" for name, said in (("memory", self.memory), ("network", self.network))),
        ]


def traffic(train: Train, parameters: int, trained: int, gpus: int, passes: int) -> dict[str, float]:
    """Bytes that a step moves to each GPU, by kind.

    Args:
        train: launcher, generation and precision.
        parameters: of the model.
        trained: of them; those of the adapters where there are any.
        gpus: processes.
        passes: forward and backward passes a step, of each process.
    """
    if gpus == 1:
        return {}
    ring = (gpus - 1) / gpus
    half = 2 if train.bf16 else 4
    weights = ring * half * parameters
    if train.launcher == "zero2":
        moved = {"gradients": ring * half * trained * passes, "updated weights": weights}
    elif train.launcher in ("zero3", "fsdp"):
        gathered = 2 + (1 if train.beta else 0)
        moved = {"gathered weights": gathered * passes * weights, "gradients": ring * half * trained * passes}
        if train.generation == "vllm_colocate":
            moved["weights for vLLM"] = weights
    else:
        moved = {"gradients": 2 * ring * 4 * trained}
    return moved


def training_processes(train: Train) -> int:
    """Processes that a training is made of."""
    return train.processes if train.launcher == "single" else max(1, train.nodes * train.gpus_per_node)


def training_gpus(train: Train) -> int:
    """GPUs that a training has to have; a single process takes one where there is any."""
    return 0 if train.launcher == "single" else max(1, train.nodes * train.gpus_per_node)


def refuse_small(settings: Settings, nodes: Sequence[Node], stage: str) -> None:
    """Refuse a Ray cluster that is too small for a stage.

    Raises:
        RequestError: naming what is needed and what is there.
    """
    cluster, train = settings.cluster, settings.train
    if stage == "train":
        judge = cluster.judge_gpus if settings.judge.kind == "server" and settings.judge.start else 0
        gpus = training_gpus(train)
        if judge:
            require(nodes, cluster.address, "the judge", gpus=judge, together=judge)
            what = f"train with its judge ({gpus} + {judge})"
        else:
            what = "train (train.nodes x train.gpus_per_node)" if gpus else "train (train.processes)"
        require(nodes, cluster.address, what, gpus=gpus + judge, cpus=training_processes(train))
    elif stage == "infer":
        refuse_engines(settings, nodes)
    else:
        require(nodes, cluster.address, stage, cpus=1)


def place(
    settings: Settings,
    nodes: Sequence[Node],
    *,
    parameters: int,
    cache_bytes: int,
    training: float,
    coldstart: float,
    moved: dict[str, float],
) -> tuple[list[Placed], list[str]]:
    """Where each stage runs, and the reasons why one cannot.

    Args:
        settings: a run.
        nodes: machines of a Ray cluster that answers, else none.
        parameters: of the policy.
        cache_bytes: of its key-value cache, a token.
        training: GiB that training takes on each GPU.
        coldstart: GiB that the cold start takes on its GPU.
        moved: bytes that a step of training moves to each GPU, by kind.
    """
    cluster, train, infer = settings.cluster, settings.train, settings.infer
    on_ray = cluster.kind == "ray"
    here = f"the Ray cluster at {cluster.address}" if on_ray else "this machine"
    problems = []
    if nodes:
        for stage in ("frames", "train", "infer"):
            try:
                refuse_small(settings, nodes, stage)
            except RequestError as error:
                problems.append(str(error))
    encoder, width = _ENCODERS.get(settings.models.encoder, (0.0, 0))
    load = f"{4 * encoder / GIB:.1f} GiB of weights and a batch of {settings.features.batch_size} frames"
    stages = [
        Placed(
            "frames",
            f"{here}, {settings.frames.workers} videos at once, one CPU each",
            "a frame at a time, whatever the length of the video",
            "videos from the shared storage, frame caches to it" if on_ray else "none",
        ),
        Placed(
            "features",
            f"{here}, {settings.features.workers} videos at once, a GPU each where there is one",
            f"{load} on each GPU" if encoder else "the encoder's weights and a batch of frames",
            (f"frame caches from the shared storage, {2 * width} bytes a frame to it" if width else "caches, both ways")
            if on_ray
            else "none",
        ),
        Placed(
            "coldstart",
            f"{here}, one process on one GPU",
            f"{coldstart:.1f} GiB",
            "caches and checkpoints, by the shared storage" if on_ray else "none",
        ),
        Placed("train", _training_place(settings), f"{training:.1f} GiB on each GPU", _training_traffic(train, moved)),
    ]
    if is_kept_apart(cluster, settings.judge):
        stages.append(
            Placed(
                "judge",
                f"{here}, {cluster.judge_gpus} GPUs of one machine, of its own, beside train and evaluate",
                f"{VLLM_OWN:.0%} of each, if it is a vLLM",
                "questions and answers, as text",
            )
        )
    own = settings.for_inference().search
    tokens = prompt_tokens(own) + completion_tokens(own)
    weights = 2 * parameters / GIB
    if infer.engine == "transformers":
        cache = infer.concurrency * tokens * cache_bytes / GIB
        memory = f"{weights:.1f} GiB of weights, up to {cache:.1f} of key-value cache, together on each engine's GPU"
    else:
        memory = f"{VLLM_OWN:.0%} of each GPU; {weights:.1f} GiB of it are weights"
        room = VLLM_OWN * train.gpu_memory * max(1, cluster.engine_gpus if on_ray else 1)
        if not infer.urls and weights > room:
            problems.append(
                f"infer: the weights take {weights:.1f} GiB and an engine has {room:.1f}: "
                + (
                    "raise cluster.engine_gpus"
                    if on_ray
                    else "start larger engines yourself, and name them in infer.urls"
                )
            )
    if infer.urls and infer.engine == "openai":
        engines = f"episodes on this machine, engines at {len(infer.urls)} addresses of infer.urls"
        memory = "their own"
    elif on_ray:
        engines = f"episodes on this machine, {cluster.engines} engines on {here}, {cluster.engine_gpus} GPUs each"
    else:
        engines = "this machine"
    pictures = (own.total_video_tokens + search_tokens(own)) * own.patch**2 / 1e6
    stages.append(
        Placed(
            "infer",
            engines,
            memory,
            f"pictures of up to {pictures:.1f} megapixels an episode" if on_ray or infer.urls else "none",
        )
    )
    return stages, problems


def _training_place(settings: Settings) -> str:
    train, cluster = settings.train, settings.cluster
    count = training_processes(train)
    if train.launcher == "single":
        what = "one process" if count == 1 else f"{count} processes of one CPU each"
    else:
        what = f"{count} GPUs of {train.nodes} machine{'s' if train.nodes > 1 else ''}, by {train.launcher}"
    if cluster.kind == "ray":
        return f"the Ray cluster at {cluster.address}, {what}"
    if train.nodes > 1 and train.launcher != "single":
        return f"a job of Slurm, {what}" if cluster.kind == "slurm" else f"{what}, started by the lines below"
    return f"this machine, {what}"


def _training_traffic(train: Train, moved: dict[str, float]) -> str:
    if not moved:
        return "none"
    total = sum(moved.values())
    parts = ", ".join(f"{kind} {amount / 1e9:.3g}" for kind, amount in moved.items())
    several = train.launcher != "single" and train.nodes > 1
    wire = f", as much to each machine: {total / _WIRE:.2g} s at 100 Gbit/s" if several else ", inside the machine"
    return f"{total / 1e9:.3g} GB a step to each GPU ({parts}){wire}"
