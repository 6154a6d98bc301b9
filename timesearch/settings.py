"""What a run is made of: the typed form of `params.yaml`, one section a stage.

Defaults are the paper's (arXiv 2511.05489, Section 4 and its released configuration) unless a comment says otherwise;
profiles state what differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from timesearch.base.errors import RequestError
from timesearch.base.untrusted import mend_text
from timesearch.rewards import REWARDS, weighed

_MAX_BYTES = 64 * 2**10
"""Of a parameter file: ten times all parameters with their explanations. PyYAML takes a second for 200 KiB."""
_MAX_OPENED = 500
"""Brackets that a parameter file may open. PyYAML takes quadratic time for those that stay open."""
_MAX_MERGED = 1000
"""Names of a section with those that merge keys (``<<``) bring: merges of merges multiply."""

T = TypeVar("T")


class Section(BaseModel):
    """A group of settings in which an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @classmethod
    def shaping_names(cls) -> list[str]:
        """Names of the settings that shape a result; those marked by `Pace` change how fast or where it is made."""
        return [name for name, field in cls.model_fields.items() if PACE not in field.metadata]

    def shaping(self) -> dict[str, Any]:
        """The settings that shape a result, as JSON values. What was made is stale when one of them changes."""
        return self.model_dump(mode="json", include=set(self.shaping_names()))


PACE = "pace"
"""Mark of a setting that does not shape a result. What makes a stage stale (`dvc.yaml`, predictions, an unfinished
training) follows from these marks alone."""
Pace = Annotated[T, PACE]


class Paths(Section):
    """Where stages read and write, relative to the folder that commands run in."""

    train_samples: Path = Path("data/train.jsonl")
    test_samples: Path = Path("data/test.jsonl")
    videos: Path = Path("cache/videos")
    frames: Path = Path("cache/frames")
    features: Path = Path("cache/features")
    subtitles: Path = Path("cache/subtitles")
    models: Path = Path("models")
    coldstart: Path = Path("runs/coldstart")
    train: Path = Path("runs/train")
    results: Path = Path("results")


class Download(Section):
    """Stage `download`: sources to `cache/videos`."""

    workers: Pace[int] = Field(4, ge=1, description="videos fetched at the same time")
    retries: Pace[int] = Field(4, ge=0, description="further tries for each video, with backoff")


class Models(Section):
    """Stage `models`: the encoder and the base policy are brought to `models/encoder` and `models/policy`."""

    encoder: str = Field(
        "ViT-SO400M-14-SigLIP-384", description="open_clip model name, local folder, 'pocket', or 'pocket-hops'"
    )
    pretrained: str = Field("webli", description="open_clip pretrained tag or weights file")
    policy: str = Field("Qwen/Qwen2.5-VL-7B-Instruct", description="model folder or hub name")
    encoder_steps: int = Field(330, ge=1, description="training steps of the pocket encoder")


class Frames(Section):
    """Stage `frames`: videos to frame caches."""

    fps: float = Field(2.0, gt=0, description="frames a second of video")
    factor: int = Field(28, ge=1, description="width and height are multiples of this many pixels")
    min_pixels: int = Field(4 * 28 * 28, ge=1)
    max_pixels: int = Field(256 * 28 * 28, ge=1, description="256 tokens of 28 x 28 pixels a frame")
    qscale: int = Field(
        2,
        ge=2,
        le=31,
        description="quantiser scale of the JPEGs (ffmpeg -q:v); at 2, the finest, SSIM of RGB is 0.98",
    )
    workers: Pace[int] = Field(2, ge=1, description="videos at the same time, over all machines")


class Features(Section):
    """Stage `features`: frame caches to feature caches."""

    batch_size: Pace[int] = Field(64, ge=1)
    workers: Pace[int] = Field(1, ge=1, description="videos at the same time, over all machines")
    url: str | None = Field(None, description="an OpenAI-compatible embeddings endpoint instead of the local encoder")


class Subtitles(Section):
    """Stage `subtitles`: what is said in the videos to indexes of words."""

    speech: str | None = Field(
        None,
        description="faster-whisper model (extra asr), by name or folder, that writes down what is said in videos "
        "without subtitles; null: none",
    )


class SearchSettings(Section):
    """The search, its tools and its budgets, shared by training and inference (paper, Section 3.1)."""

    tools: list[str] = Field(
        default_factory=lambda: ["seek_video_frames"], description="tools that the policy is offered, in this order"
    )
    method: Literal["dpp", "topk", "uniform", "aks", "gated_logdet"] = "dpp"
    max_turns: int = Field(8, ge=1, description="assistant turns an episode, the answer included")
    max_frames_per_turn: int = Field(8, ge=1, description="frames that one tool call returns at most")
    total_video_tokens: int = Field(10_240, ge=1, description="vision tokens of the whole preview")
    max_frames: int = Field(768, ge=1, description="frames of the preview at most")
    min_tokens: int = Field(12, ge=1, description="vision tokens a preview frame at least")
    max_tokens: int = Field(256, ge=1, description="vision tokens a frame at most, searched ones too")
    patch: int = Field(28, ge=1, description="pixels along the side of one vision token: 28 Qwen2.5-VL, 32 Qwen3-VL")
    max_new_tokens: int = Field(256, ge=1, description="tokens that the policy writes a turn at most")
    prompts: str = Field("default", description="name of a protocol of the package, or a folder of texts and rules")
    dialect: str = Field(
        "qwen",
        description="how the policy writes its turns and is told of its tools as text, where its protocol does not say",
    )
    protocol: Literal["template", "text"] = Field(
        "template",
        description="tools rendered by the chat template, or as text in the system prompt (inference alone), where the "
        "protocol does not say",
    )


class ColdStart(Section):
    """Stage `coldstart`: supervised fine-tuning on search episodes (paper, Section 4.1), by one process on one GPU."""

    traces: str = Field(
        "pocket", description="'pocket', 'teacher', 'policy' (the base policy's own episodes), or a file of episodes"
    )
    teacher_url: Pace[str | None] = Field(None, description="base URL of the teacher's server, with /v1")
    teacher_model: str | None = Field(None, description="name under which the server lists the teacher")
    teacher_temperature: float = Field(0.7, ge=0, description="of the teacher, or of the base policy")
    steps: int = Field(1000, ge=1)
    batch_size: int = Field(32, ge=1, description="examples an optimiser step")
    micro_batch: Pace[int] = Field(4, ge=1, description="examples of one forward and backward pass")
    learning_rate: float = Field(1e-6, gt=0)
    reanswer_share: float = Field(0.25, ge=0, le=1, description="share of re-answer examples in the mix")
    lora_rank: int = Field(0, ge=0, description="0 trains all weights")
    freeze_vision: bool = Field(False, description="leave the vision tower as it is")
    gradient_checkpointing: Pace[bool] = False
    bf16: bool = True
    save_steps: Pace[int] = Field(
        50, ge=1, description="steps between the checkpoints that an interrupted run resumes from"
    )


class Train(Section):
    """Stage `train`: GRPO with completeness self-verification (paper, Section 3.2)."""

    steps: int = Field(1000, ge=1)
    learning_rate: float = Field(1e-6, gt=0)
    schedule: Literal["constant", "linear"] = Field("constant", description="of the learning rate; linear ends at 0")
    beta: float = Field(0.005, ge=0, description="weight of the KL penalty")
    num_generations: int = Field(8, ge=2, description="episodes a question")
    prompts_per_step: int = Field(8, ge=1, description="questions an optimiser step, over all processes")
    temperature: float = Field(1.0, gt=0)
    loss_type: str = "grpo"
    scale_rewards: Literal["group", "batch", "none"] = "none"
    rewards: dict[str, float] = Field(
        default_factory=lambda: {part.name: part.weight for part in REWARDS},
        description="weight of each part of the reward; completeness 0 gives plain GRPO: no re-answer is generated. "
        "calls is a bonus for each tool call, or below 0 a cost",
    )
    zero_advantage: Literal["keep", "replay", "resample"] = "replay"
    format_tokens: Literal["all", "marks"] = Field(
        "all", description="tokens that the format's share of an advantage falls on: all, or the marks of turns alone"
    )
    random_preview: bool = Field(
        False, description="show each question with 1 to as many preview frames as the search has, by chance"
    )
    mask_truncated: bool = Field(False, description="episodes cut by the length limit carry no loss")
    max_completion_length: int = Field(8192, ge=16, description="tokens of an episode after its prompt")
    lora_rank: int = Field(0, ge=0, description="0 trains all weights")
    freeze_vision: bool = Field(False, description="leave the vision tower as it is")
    gradient_checkpointing: Pace[bool] = False
    bf16: bool = True
    generation: Literal["transformers", "vllm_colocate", "vllm_server"] = "vllm_colocate"
    vllm_url: Pace[str | None] = None
    launcher: Literal["single", "ddp", "zero2", "zero3", "fsdp"] = Field(
        "single", description="one process, or what configs/ holds a file of for `accelerate launch`"
    )
    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(1, ge=0)
    micro_batch: Pace[int] = Field(1, ge=1, description="episodes of one forward and backward pass, a process")
    gpu_memory: Pace[float] = Field(80.0, gt=0, description="GiB of one GPU, for `train --plan`")
    processes: int = Field(1, ge=1, description="training processes on a machine without GPUs")
    save_steps: Pace[int] = Field(50, ge=1)
    log_episodes_every: Pace[int] = Field(20, ge=1)

    @field_validator("rewards")
    @classmethod
    def _known_rewards(cls, weights: dict[str, float]) -> dict[str, float]:
        """A weight that is not named is the paper's."""
        known = {part.name: part.weight for part in REWARDS}
        unknown = sorted(weights.keys() - known.keys())
        if unknown:
            raise ValueError(f"there is no reward {unknown[0]!r}, only {', '.join(known)}")
        return known | weights

    @property
    def verifies(self) -> bool:
        """Whether re-answers are generated: GRPO-CSV rather than GRPO."""
        return any(part.reanswers for part in weighed(self.rewards))


class Judge(Section):
    """Who decides whether an open-ended answer is right."""

    kind: Literal["rule", "server"] = "server"
    url: Pace[str] = "http://127.0.0.1:8765/v1"
    model: str = "Qwen/Qwen2.5-72B-Instruct"
    command: Pace[list[str]] = Field(
        default_factory=list, description="starts the server ({model}, {host}, {port} filled in); empty: vLLM"
    )
    start: Pace[bool] = Field(True, description="start the server if none answers at `url`")
    start_timeout: Pace[float] = Field(1800.0, gt=0, description="seconds")
    concurrency: Pace[int] = Field(32, ge=1, description="questions in flight")
    timeout: Pace[float] = Field(60.0, gt=0, description="seconds a question")
    retry_for: Pace[float] = Field(600.0, ge=0, description="seconds that an absent judge is waited for")
    cache: Pace[Path] = Field(Path("cache/judge.sqlite"), description="where verdicts are kept")
    log: Pace[Path] = Field(Path("runs/judge.log"), description="where the output of a started server goes")
    max_candidate_chars: int = Field(
        100, ge=1, description="an answer of so many characters or more is scored 0, as the paper's code does"
    )


Budget = Literal[
    "max_turns",
    "max_frames_per_turn",
    "total_video_tokens",
    "max_frames",
    "min_tokens",
    "max_tokens",
    "max_new_tokens",
]


class Infer(Section):
    """Stage `infer`: episodes on the test samples."""

    engine: Literal["transformers", "openai"] = "openai"
    urls: Pace[list[str]] = Field(
        default_factory=list, description="servers with /v1 that are up already; empty: one is started a checkpoint"
    )
    model: str | None = Field(None, description="name under which `urls` serve the policy; null: its path")
    command: Pace[list[str]] = Field(
        default_factory=list, description="starts a server ({model}, {host}, {port} filled in); empty: vLLM"
    )
    port: Pace[int] = Field(8770, ge=1, le=65535, description="of the started server, on 127.0.0.1")
    start_timeout: Pace[float] = Field(1800.0, gt=0, description="seconds")
    log: Pace[Path] = Field(Path("runs/policy.log"), description="where the output of a started server goes")
    temperature: float = Field(0.0, ge=0)
    preview: Literal["images", "video"] = Field(
        "images",
        description="'video' for models trained on one (Qwen3-VL; Qwen2.5-VL by engine transformers), where the "
        "protocol does not say",
    )
    concurrency: Pace[int] = Field(32, ge=1, description="episodes in flight")
    timeout: Pace[float] = Field(600.0, gt=0, description="seconds a call")
    retry_for: Pace[float] = Field(600.0, ge=0, description="seconds that an absent server is waited for")
    baselines: list[str] = Field(
        default_factory=lambda: ["uniform", "one_shot", "coldstart"],
        description="methods beside the trained policy: uniform, one_shot, one_shot_<selection>, oracle, base, "
        "coldstart",
    )
    uniform_frames: int = Field(8, ge=1, description="frames of the baselines without search")
    budgets: dict[Budget, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="budgets of the search that differ from those of training, by their names in `search`: max_turns, "
        "max_new_tokens, total_video_tokens, ...",
    )
    tools: list[str] | None = Field(
        None, description="tools that are offered here; null: those of training, in `search`"
    )


class Evaluate(Section):
    """Stage `evaluate`: T* metrics and answers."""

    thresholds: list[float] = Field(default_factory=lambda: [5.0], description="seconds; the first is the headline")
    qa: Literal["strict", "published"] = Field(
        "strict",
        description="how a letter is read, the other way beside it: strictly, an unreadable one being wrong; or as "
        "published, an unreadable one counting as the chance of a guess",
    )
    visual: bool = True
    bootstrap: int = Field(1000, ge=0, description="resamples of each 95% interval; 0 gives none")
    groups: list[str] = Field(
        default_factory=lambda: ["duration_group", "question_category", "duration", "domain", "task", "question_type"],
        description="fields of `meta` whose values metrics are also given by (names of the published benchmarks)",
    )


class Tracking(Section):
    """MLflow."""

    uri: str = Field("sqlite:///mlflow.db", description="relative SQLite paths are under the project folder")
    experiment: str = "timesearch"
    traced_episodes: int = Field(12, ge=0, description="episodes of each inference that become MLflow traces")


class Cluster(Section):
    """Where the stages `frames`, `features`, `coldstart`, `train` and `infer` run: here, over the machines of a Ray
    cluster, or, where a training takes several machines, as a job of Slurm.
    """

    kind: Pace[Literal["none", "ray", "slurm"]] = Field(
        "none", description="none: on this machine (and on those where you start `timesearch train` yourself)"
    )
    address: Pace[str] = Field(
        "auto",
        description="of Ray: host:port; 'auto' for the cluster that this machine is of; 'local' starts one here for "
        "each stage",
    )
    restarts: Pace[int] = Field(
        3, ge=0, description="times that a training goes on from its last checkpoint after a machine died under it"
    )
    judge_gpus: Pace[int] = Field(
        0, ge=0, description="GPUs of one machine that Ray keeps for a judge that is started (judge.start)"
    )
    engines: Pace[int] = Field(1, ge=1, description="engines of `infer` on Ray")
    engine_gpus: Pace[int] = Field(
        1, ge=0, description="GPUs of one machine that Ray keeps for each of them, where the cluster has any"
    )
    slurm: Pace[list[str]] = Field(
        default_factory=list, description="options of sbatch, such as --partition=gpu and --time=2-00:00:00"
    )

    @property
    def ray_address(self) -> str | None:
        """Address of the Ray cluster; None where there is none."""
        return self.address if self.kind == "ray" else None


class Settings(Section):
    """All of `params.yaml`."""

    profile: str = "pocket"
    seed: int = Field(0, ge=0, lt=2**32)
    overridable: list[str] = Field(
        default_factory=list,
        description="commands, paths, addresses and models that an override of a flow run may change too, such as "
        "search.prompts; the others it may not",
    )
    paths: Paths = Field(default_factory=Paths)
    download: Download = Field(default_factory=Download)
    models: Models = Field(default_factory=Models)
    frames: Frames = Field(default_factory=Frames)
    features: Features = Field(default_factory=Features)
    subtitles: Subtitles = Field(default_factory=Subtitles)
    search: SearchSettings = Field(default_factory=SearchSettings)
    coldstart: ColdStart = Field(default_factory=ColdStart)
    train: Train = Field(default_factory=Train)
    judge: Judge = Field(default_factory=Judge)
    infer: Infer = Field(default_factory=Infer)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    tracking: Tracking = Field(default_factory=Tracking)
    cluster: Cluster = Field(default_factory=Cluster)

    def for_inference(self) -> Settings:
        """These settings with the budgets and tools of inference in `search`."""
        changed: dict[str, Any] = {str(name): value for name, value in self.infer.budgets.items()}
        if self.infer.tools is not None:
            changed["tools"] = self.infer.tools
        return self.model_copy(update={"search": self.search.model_copy(update=changed)})


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one, without what it multiplies and what no file name and no UTF-8 text can hold."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MAX_MERGED:
            raise yaml.constructor.ConstructorError(None, None, f"more than {_MAX_MERGED} names", node.start_mark)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and ("\0" in value or mend_text(value) != value):
            raise yaml.constructor.ConstructorError(None, None, "NUL or half a character", node.start_mark)
        return value


def _parse_yaml(data: bytes) -> Any:
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES // 2**10} KiB")
    text = data.decode("utf-8")
    if text.count("[") + text.count("{") > _MAX_OPENED:
        raise RecursionError
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that may be hostile.

    Raises:
        RequestError: the file is too large, is not YAML, or holds no mapping.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    try:
        values = _parse_yaml(data)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RequestError(f"{path} is not YAML{line}: {(error.problem or error.context or '')[:100]}") from error
    except RecursionError as error:
        raise RequestError(f"{path} is not YAML: nested too deeply") from error
    except Exception as error:  # PyYAML stumbles over some values in ways that it does not name (AttributeError, ...)
        raise RequestError(f"{path} is not YAML in UTF-8: {str(error).partition(chr(10))[0][:100]}") from error
    if not isinstance(values, dict | None):
        raise RequestError(f"{path} holds no names with values")
    return values or {}


def load_settings(path: Path | str = "params.yaml") -> Settings:
    """Read and check a parameter file.

    Raises:
        RequestError: the file is missing, is not YAML, is too large, or has an unknown name or a wrong value (named).
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path} does not exist: run in the project folder, or name a parameter file by --params")
    values = read_yaml(path)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])[:100]
        if first["type"] == "extra_forbidden":
            raise RequestError(f"{path}: unknown parameter {name!r}") from error
        raise RequestError(f"{path}: parameter {name!r}: {first['msg']}") from error
