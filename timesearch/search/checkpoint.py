"""Checkpoints of policies: loaded, and examined for whether they can play search episodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from timesearch.base.errors import RequestError, first_line
from timesearch.base.files import atomic_path, write_json
from timesearch.base.model_folders import LOADING, read_config, require_data_only
from timesearch.base.threads import use_fitting_threads
from timesearch.search.budget import completion_tokens, prompt_tokens
from timesearch.search.protocol import SearchProtocol, Template
from timesearch.settings import SearchSettings

if TYPE_CHECKING:
    import torch

VISION_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")


def vision_token_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens that stand for images and videos, which a policy must never write."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary[token] for token in VISION_TOKENS if token in vocabulary)


def base_of(checkpoint: Path | str) -> str:
    """The base model of a LoRA adapter's folder; any other checkpoint is its own base.

    Raises:
        RequestError: a folder, the checkpoint's or its base's, that `require_data_only` refuses, or no base.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return str(checkpoint)
    require_data_only(folder)
    path = folder / "adapter_config.json"
    if not path.is_file():
        return str(checkpoint)
    base = read_config(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or "\0" in base:
        raise RequestError(f"{path} names no base model: put its folder or hub name into base_model_name_or_path")
    if Path(base).is_dir():
        require_data_only(Path(base))
    return base


def load_processor(checkpoint: Path | str, template: Template = "tools") -> Any:
    """The processor of a checkpoint, with the chat template that a protocol asks for.

    By ``tools`` it is one that shows tools. Qwen2.5-VL's own does not: it is replaced by that of Qwen3-VL, whose markup
    Qwen2.5 was trained on too; `template_options` says the same to a server. By ``own`` it is the checkpoint's.

    What it renders is bounded from then on, as `timesearch.search.templates` says.

    Raises:
        RequestError: the folder is missing, no checkpoint of a vision-language model, or runs code of its own; or its
            chat template cannot render a conversation.
    """
    from transformers import AutoProcessor

    from timesearch.search.templates import bound_templates

    folder = Path(checkpoint)
    if not folder.is_dir() and (folder.is_absolute() or str(checkpoint).count("/") != 1):
        raise RequestError(f"{checkpoint} does not exist: name a checkpoint folder, or make it by the stage before")
    has_own = (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file()
    base = base_of(checkpoint)
    bound_templates()
    try:
        processor = AutoProcessor.from_pretrained(str(checkpoint) if has_own else base, trust_remote_code=False)
    except Exception as error:  # what the libraries raise about a folder that others made is anything
        raise _unfit(checkpoint, error) from error
    if not hasattr(processor, "image_processor"):
        raise RequestError(f"{checkpoint} has no image processor: a policy must be a vision-language model")
    if template == "tools" and _lacks_tools(processor):
        from trl.chat_template_utils import qwen3_vl_chat_template

        processor.chat_template = qwen3_vl_chat_template
    vision = processor.image_processor
    if 0 < _side(vision) ** 2 < vision.size.get("shortest_edge", 0):
        vision.size["shortest_edge"] = _side(vision) ** 2  # as `keep_small_frames`
    return processor


def _lacks_tools(processor: Any) -> bool:
    return "tools" not in str(processor.chat_template or "")


def template_options(checkpoint: Path | str, template: Template, folder: Path) -> list[str]:
    """Options of a vLLM that serves a checkpoint, so that it renders what `load_processor` does.

    Args:
        checkpoint: as there.
        template: as there.
        folder: where the template is written, if the server needs one.

    Raises:
        RequestError: as there.
    """
    if template == "own" or not _lacks_tools(load_processor(checkpoint, "own")):
        return []
    path = folder / "chat_template.jinja"
    with atomic_path(path) as partial:
        partial.write_text(load_processor(checkpoint).chat_template, encoding="utf-8")
    return ["--chat-template", str(path)]


def _unfit(checkpoint: Path | str, error: Exception) -> RequestError:
    reason = first_line(error)[:300]
    return RequestError(f"{checkpoint} is no checkpoint of a policy: {reason}")


def _side(vision: Any) -> int:
    """Pixels along the side of a vision token; 0 where an image processor does not cut into patches."""
    return int(getattr(vision, "patch_size", 0) * getattr(vision, "merge_size", 1))


def keep_small_frames(folder: Path) -> None:
    """Let servers of the checkpoint in `folder` take small frames as they are, as `load_processor` does.

    Published processors enlarge images below a number of pixels (Qwen3-VL: 64 tokens), which breaks the budget of the
    preview. Files that enlarge nothing stay as they are.
    """
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        config = read_config(path) if path.is_file() else {}
        vision = config.get("image_processor", config)
        least = (vision.get("patch_size", 0) * vision.get("merge_size", 0)) ** 2
        sizes = [(vision, "min_pixels"), (vision.get("size") or {}, "shortest_edge")]
        enlarging = [(holder, name) for holder, name in sizes if least and (holder.get(name) or 0) > least]
        for holder, name in enlarging:
            holder[name] = least
        if enlarging:
            write_json(path, config)


def multiply_patches(model: Any) -> Any:
    """Let a model's patch embedding multiply matrices: a convolution whose stride is its kernel is nothing else.

    The numbers stay the same to rounding; on a CPU the pass is 3 times, its gradient 5 times faster (torch 2.13).
    """
    import torch

    def forward(self: torch.nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]

    for module in model.modules():
        if isinstance(module, torch.nn.Conv3d) and module.stride == module.kernel_size:
            module.forward = MethodType(forward, module)
    return model


def load_model(checkpoint: Path | str, dtype: torch.dtype | None = None) -> Any:
    """The model of a checkpoint on the best device.

    A folder with a LoRA adapter is loaded as its base model with the adapter merged in. Weights are read from
    safetensors alone.

    Args:
        checkpoint: a folder or a hub name.
        dtype: of the weights; None takes bfloat16 on a GPU, float32 on a CPU.

    Raises:
        RequestError: it is no checkpoint of a vision-language model, or runs code of its own.
    """
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    base = base_of(checkpoint)
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, **LOADING)
        if base != str(checkpoint):
            model = _with_adapter(model, Path(checkpoint))
    except (RequestError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _unfit(checkpoint, error) from error
    model = model.to("cuda" if on_gpu else "cpu").eval()
    use_fitting_threads(model)
    return multiply_patches(model)


_ADAPTER = frozenset(
    {"r", "lora_alpha", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "use_rslora", "use_dora"}
    | {"modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "lora_bias"}
    | {"target_parameters", "task_type"}
)
"""Keys of an adapter's configuration that say which of its weights go where. The others are of its training, and some
name modules to import or files to load."""


def _with_adapter(model: Any, folder: Path) -> Any:
    """`model` with the LoRA adapter in `folder` merged in."""
    from peft import LoraConfig, PeftModel

    config = read_config(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise RequestError(f"{folder} holds an adapter of type {config.get('peft_type')!r}: only LORA is known")
    if not (folder / "adapter_model.safetensors").is_file():
        raise RequestError(
            f"{folder / 'adapter_model.safetensors'} is missing: weights are read from safetensors alone"
        )
    known = {key: value for key, value in config.items() if key in _ADAPTER}
    for pattern in _patterns(known):
        if (
            len(pattern) > 2000
            or sum(map(pattern.count, "*+{")) > 3
            or any(mark in pattern for mark in (")*", ")+", "){"))
        ):
            raise RequestError(f"{folder} names modules by a pattern that may take for ever: list their names instead")
    return PeftModel.from_pretrained(model, str(folder), config=LoraConfig(**known)).merge_and_unload()


def _patterns(config: dict[str, Any]) -> Iterator[str]:
    """The regular expressions in an adapter's configuration."""
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        yield from (value for value in [config.get(key)] if isinstance(value, str))
    for key in ("rank_pattern", "alpha_pattern"):
        yield from config.get(key) or {}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at in a checkpoint: what, whether it fits, and in words what was found."""

    what: str
    ok: bool
    text: str


def examine(checkpoint: Path | str, settings: SearchSettings) -> list[Finding]:
    """Say whether a checkpoint can play search episodes under these settings, without loading its weights.

    Args:
        checkpoint: a folder (a LoRA adapter's too) or a hub name.
        settings: protocol and budgets.

    Raises:
        RequestError: it is no checkpoint of a vision-language model.
    """
    from transformers import AutoConfig

    rules = SearchProtocol.load(settings.prompts).rules
    processor = load_processor(checkpoint, rules.template)
    try:
        config = AutoConfig.from_pretrained(base_of(checkpoint), trust_remote_code=False)
    except RequestError:
        raise
    except Exception as error:
        raise _unfit(checkpoint, error) from error
    return [
        *_template(checkpoint, processor, (rules.tools or settings.protocol) == "template"),
        *_vision(processor, config, settings),
        *_context(config, settings),
    ]


def check_fit(checkpoint: Path | str, settings: SearchSettings) -> None:
    """Refuse a checkpoint of which `examine` finds something unfit.

    Raises:
        RequestError: it is not a vision-language model, or does not fit; with what was found.
    """
    wrong = [f"{finding.what} ({finding.text})" for finding in examine(checkpoint, settings) if not finding.ok]
    if wrong:
        raise RequestError(f"{checkpoint} does not fit these parameters: {'; '.join(wrong)}")


def _template(checkpoint: Path | str, processor: Any, offered: bool) -> Iterator[Finding]:
    said = "<think> a  b </think>\n<tool_call>\n{}\n</tool_call>"
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "U"}]},
        {"role": "assistant", "content": said},
        {"role": "tool", "content": [{"type": "text", "text": "1.0s"}, {"type": "image"}]},
    ]
    tool = {"type": "function", "function": {"name": "probe_tool", "description": "", "parameters": {}}}
    try:
        text = processor.apply_chat_template(messages, tools=[tool] if offered else None, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and fails as programs do
        reason = first_line(error)[:300]
        raise RequestError(f"the chat template of {checkpoint} renders no conversation: {reason}") from error
    image = getattr(processor, "image_token", "<|image_pad|>")
    if offered:
        yield Finding("tools", "probe_tool" in text, "the chat template describes tools")
    yield Finding("turns", said in text, "the chat template keeps assistant turns verbatim, thoughts included")
    yield Finding("tool images", text.count(image) == 2, "the chat template shows images of the user and of tools")
    pieces = processor.tokenizer.tokenize("<tool_call>")
    yield Finding("markup", True, f"<tool_call> is {len(pieces)} token{'s' if len(pieces) > 1 else ''}")
    end = processor.tokenizer.eos_token
    yield Finding("end of turn", bool(end) and text.count(str(end)) >= 4, f"turns end with {end}")


def _vision(processor: Any, config: Any, settings: SearchSettings) -> Iterator[Finding]:
    ids = set(vision_token_ids(processor.tokenizer))
    image = getattr(config, "image_token_id", None)
    yield Finding("vision tokens", image in ids, f"{len(ids)} vision tokens are kept out of what the policy writes")
    vision = processor.image_processor
    side = _side(vision)
    fits = side == settings.patch
    advice = "" if fits else f": set search.patch to {side} (it is {settings.patch}), and frames.factor likewise"
    yield Finding("patch", fits, f"a vision token covers {side} x {side} pixels{advice}")
    if fits:
        small = vision.get_number_of_image_patches(side, side) // vision.merge_size**2
        yield Finding("small frames", small == 1, f"a frame of {side} x {side} pixels is shown as {small} token(s)")


def _context(config: Any, settings: SearchSettings) -> Iterator[Finding]:
    context = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    if context is None:
        yield Finding("context", True, "the length of the context is not known")
        return
    prompt = prompt_tokens(settings)
    longest = prompt + completion_tokens(settings)
    room = "enough for" if context >= longest else "not enough for"
    advice = "" if context >= prompt else f": lower search.total_video_tokens, for the prompt alone takes {prompt}"
    yield Finding("context", context >= prompt, f"{context} tokens, {room} the longest episode ({longest}){advice}")
