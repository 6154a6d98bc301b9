"""Checkpoints of policies: loaded, and examined for whether they can play search episodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from timesearch.errors import RequestError

VISION_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")

SMALL = 100_000_000
"""Parameters below which one CPU thread is faster than several."""


def vision_token_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens that stand for images and videos, which a policy must never write."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary[token] for token in VISION_TOKENS if token in vocabulary)


def base_of(checkpoint: Path | str) -> str:
    """The base model of a LoRA adapter's folder; any other checkpoint is its own base."""
    config = Path(checkpoint) / "adapter_config.json"
    if not config.is_file():
        return str(checkpoint)
    return str(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])


def load_processor(checkpoint: Path | str) -> Any:
    """The processor of a checkpoint, with a chat template that knows tools.

    Qwen2.5-VL's own template does not: it is replaced by that of Qwen3-VL, whose markup Qwen2.5 was trained on too.

    Raises:
        RequestError: the folder is missing, or no checkpoint of a vision-language model.
    """
    from transformers import AutoProcessor

    folder = Path(checkpoint)
    if not folder.is_dir() and (folder.is_absolute() or str(checkpoint).count("/") != 1):
        raise RequestError(f"{checkpoint} does not exist: name a checkpoint folder, or make it by the stage before")
    has_own = (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file()
    source = str(checkpoint) if has_own or not folder.is_dir() else base_of(checkpoint)
    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise RequestError(f"{checkpoint} is no checkpoint of a policy: {str(error).splitlines()[0]}") from error
    if not hasattr(processor, "image_processor"):
        raise RequestError(f"{checkpoint} has no image processor: a policy must be a vision-language model")
    if "tools" not in (processor.chat_template or ""):
        from trl.chat_template_utils import qwen3_vl_chat_template

        processor.chat_template = qwen3_vl_chat_template
    return processor


def load_model(checkpoint: Path | str) -> Any:
    """The model of a checkpoint on the best device: bfloat16 on a GPU, float32 on a CPU.

    A folder with a LoRA adapter is loaded as its base model with the adapter merged in. On a CPU a small model runs
    on one thread: sharing its little work out costs more than doing it, many times more on a busy machine.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    on_gpu = torch.cuda.is_available()
    base = base_of(checkpoint)
    model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16 if on_gpu else torch.float32)
    if base != str(checkpoint):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(checkpoint)).merge_and_unload()
    if not on_gpu and model.num_parameters() < SMALL:
        torch.set_num_threads(1)
    return model.to("cuda" if on_gpu else "cpu").eval()
