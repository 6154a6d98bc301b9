"""The pocket encoder: a SigLIP model of 0.4 million parameters, trained on generated frames and their captions.

Training is SigLIP's (arXiv 2303.15343): every picture of a batch against every caption of it, each pair a yes-or-no
question under a sigmoid. A generated caption may fit several pictures of a batch ("a star" fits a red and a blue one),
so a pair is positive wherever the caption is true of the picture, not on the diagonal alone.

The result is a folder in open_clip's local-dir layout with a tokenizer of its own: from there on it is loaded by the
same calls as any published SigLIP model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from timesearch.base.files import write_json
from timesearch.base.threads import use_fitting_threads
from timesearch.pocket.policy import FRAME
from timesearch.pocket.world import COLOURS, SHAPES, generator, make_scene

if TYPE_CHECKING:
    from open_clip.tokenizer import HFTokenizer
    from transformers import PreTrainedTokenizerFast

Label = tuple[str | None, str | None]
"""Shape and colour; None where there is none, or where a caption does not say."""

MODEL: dict[str, Any] = {
    "embed_dim": 64,
    "init_logit_bias": -6,
    "custom_text": True,
    "vision_cfg": {
        "image_size": FRAME,
        "patch_size": 16,
        "width": 96,
        "head_width": 32,
        "layers": 3,
        "mlp_ratio": 4.0,
        "pool_type": "avg",
    },
    "text_cfg": {
        "context_length": 12,
        "vocab_size": 512,
        "hf_tokenizer_name": "pocket",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 64,
        "heads": 2,
        "layers": 2,
        "no_causal_mask": True,
        "pool_type": "last",
        "proj_bias": True,
    },
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}


def train_encoder(
    folder: Path | str, steps: int, seed: int = 0, advance: Callable[[float], None] | None = None
) -> Path:
    """Train an encoder and write it to `folder`.

    Args:
        folder: becomes an open_clip local-dir folder.
        steps: optimiser steps of 128 pictures.
        seed: of pictures, captions and weights.
        advance: called after each step with its loss.
    """
    import torch
    from open_clip import CustomTextCLIP
    from open_clip.tokenizer import HFTokenizer
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _make_tokenizer().save_pretrained(folder)
    tokenizer = HFTokenizer(str(folder), context_length=MODEL["text_cfg"]["context_length"], clean="canonicalize")
    torch.manual_seed(seed)
    towers = {key: value for key, value in MODEL.items() if key != "custom_text"}
    model = CustomTextCLIP(**towers, init_logit_scale=math.log(10))
    use_fitting_threads(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1)
    for pixels, texts, truth in _batches(steps, 128, seed, tokenizer):
        image, text = model.encode_image(pixels, normalize=True), model.encode_text(texts, normalize=True)
        logits = image @ text.T * model.logit_scale.exp() + model.logit_bias
        loss = -torch.nn.functional.logsigmoid((2 * truth - 1) * logits).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if advance:
            advance(float(loss.detach()))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    write_json(folder / "open_clip_config.json", {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS})
    return folder


def caption(label: Label, rng: np.random.Generator) -> str:
    """One of the ways to say what a label holds."""
    shape, colour = label
    if shape is None and colour is None:
        return str(rng.choice(["nothing", "an empty scene", "the background", "no shape"]))
    words = " ".join(word for word in (colour, shape or "shape") if word)
    return str(rng.choice(["", "a ", "the ", "one ", "I see a ", "find the ", "colour of the "])) + words


def fits(picture: Label, said: Label) -> bool:
    """Whether what is said is true of a picture."""
    if said == (None, None):
        return picture == (None, None)
    return said[0] in (None, picture[0]) and said[1] in (None, picture[1])


def _pictures(count: int, seed: int) -> tuple[np.ndarray, list[Label]]:
    """Frames (count, FRAME, FRAME, 3) uint8 of generated scenes, three in four with a shape, and their labels."""
    pictures: list[np.ndarray] = []
    labels: list[Label] = []
    rng = generator("encoder", seed)
    video = 0
    while len(labels) < count:
        scene = make_scene("guess-proof", "pretrain", 1_000_000 + 10_000 * seed + video)
        video += 1
        times = [float(rng.uniform(event.start, event.end - 0.01)) for event in scene.events]
        for seconds in (*times, *rng.uniform(0, scene.duration, size=2)):
            event = scene.visible(seconds)
            labels.append((event.shape, event.colour) if event else (None, None))
            small = scene.frame(seconds).resize((FRAME, FRAME), Image.Resampling.BICUBIC)
            pictures.append(np.asarray(small))
    return np.stack(pictures[:count]), labels[:count]


def _batches(steps: int, size: int, seed: int, tokenizer: HFTokenizer) -> Iterator[tuple[Any, Any, Any]]:
    """Pixels (size, 3, H, W), captions (size, length) and truth (size, size) of each pair, step by step."""
    import torch

    pictures, labels = _pictures(4096, seed)
    rng = generator("captions", seed)
    mean, std = PREPROCESS["mean"][0], PREPROCESS["std"][0]
    for _ in range(steps):
        picked = rng.choice(len(labels), size=size, replace=False)
        seen = [labels[i] for i in picked]
        said: list[Label] = []
        for shape, colour in seen:
            keep = rng.choice(3, p=[0.55, 0.3, 0.15])
            said.append((None if keep == 2 else shape, None if keep == 0 else colour))
        truth = torch.tensor([[float(fits(picture, words)) for words in said] for picture in seen])
        pixels = torch.from_numpy(pictures[picked]).permute(0, 3, 1, 2).float() / 255
        yield (pixels - mean) / std, tokenizer([caption(words, rng) for words in said]), truth


def _make_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = generator("encoder tokenizer")
    labels: list[Label] = [(shape, colour) for shape in (*SHAPES, None) for colour in (*COLOURS, None)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["text_cfg"]["vocab_size"],
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([caption(label, rng) for label in labels * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="right")
