"""The pocket encoder: a SigLIP model of 1.5 million parameters, trained on generated frames and their captions.

Training is SigLIP's (arXiv 2303.15343): every picture of a batch against every caption of it, each pair a yes-or-no
question under a sigmoid. A generated caption may fit several pictures of a batch ("a star" fits a red and a blue one),
so a pair is positive wherever the caption is true of the picture, not on the diagonal alone.

There is one for each kind of world. It learns the world's questions as captions too, of the shape that they name: what
one-shot retrieval does not find, it does not miss for want of reading. No caption speaks of marks, so that a frame
answers to its shape, and to no shape that it points to.

The result is a folder in open_clip's local-dir layout with a tokenizer of its own: from there on it is loaded by the
same calls as any published SigLIP model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from timesearch.base.files import write_json
from timesearch.base.threads import use_fitting_threads
from timesearch.pocket.hops import HOP_SHAPES, TEXTS, make_hop_scene
from timesearch.pocket.policy import FRAME
from timesearch.pocket.senses import TEXTS as SENSES_TEXTS
from timesearch.pocket.senses import make_senses_scene
from timesearch.pocket.world import COLOURS, SHAPES, Scene, generator, make_scene, question

if TYPE_CHECKING:
    from open_clip.tokenizer import HFTokenizer
    from transformers import PreTrainedTokenizerFast

Label = tuple[str | None, str | None]
"""Shape and colour; None where there is none, or where a caption does not say."""
ANY = "shape"
"""The shape of a caption that says no more than that there is one."""

MODEL: dict[str, Any] = {
    "embed_dim": 64,
    "init_logit_bias": -6,
    "custom_text": True,
    "vision_cfg": {"image_size": FRAME, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
    "text_cfg": {
        "context_length": 20,
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
"""Its pictures go through a small ResNet: on sixteen shapes it is after 150 steps where a transformer of this size is
after 600 (loss 10.5), and a search among 200 videos finds the one video with a shape, where that one finds two in five.
"""
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}


@dataclass(frozen=True)
class Curriculum:
    """What an encoder learns from."""

    scene: Callable[[int], Scene]
    """from a number"""
    shapes: tuple[str, ...]
    pictures: int
    """rendered frames"""
    rate: float
    """the highest learning rate"""
    questions: tuple[str, ...]
    """with ``{shape}`` in them: captions of that shape"""


SHAPES_CURRICULUM = Curriculum(
    partial(make_scene, "guess-proof", "pretrain"), SHAPES, 4096, 1e-3, (question("{shape}"),)
)
HOPS_CURRICULUM = Curriculum(partial(make_hop_scene, "pretrain"), HOP_SHAPES, 8192, 2e-3, tuple(TEXTS.values()))
SENSES_CURRICULUM = Curriculum(
    partial(make_senses_scene, "pretrain"), SHAPES, 4096, 2e-3, (SENSES_TEXTS["small"], SENSES_TEXTS["brief"])
)
CURRICULA = {"pocket": SHAPES_CURRICULUM, "pocket-hops": HOPS_CURRICULUM, "pocket-senses": SENSES_CURRICULUM}
"""By the encoder's name in `models.encoder`."""


def train_encoder(
    folder: Path | str,
    steps: int,
    seed: int = 0,
    advance: Callable[[float], None] | None = None,
    curriculum: Curriculum = SHAPES_CURRICULUM,
) -> Path:
    """Train an encoder and write it to `folder`.

    Args:
        folder: becomes an open_clip local-dir folder.
        steps: optimiser steps of 128 pictures.
        seed: of pictures, captions and weights.
        advance: called after each step with its loss.
        curriculum: what it learns from.
    """
    import torch
    from open_clip import CustomTextCLIP
    from open_clip.tokenizer import HFTokenizer
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _make_tokenizer(curriculum).save_pretrained(folder)
    tokenizer = HFTokenizer(str(folder), context_length=MODEL["text_cfg"]["context_length"], clean="canonicalize")
    torch.manual_seed(seed)
    towers = {key: value for key, value in MODEL.items() if key != "custom_text"}
    model = CustomTextCLIP(**towers, init_logit_scale=math.log(10))
    use_fitting_threads(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=curriculum.rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=curriculum.rate, total_steps=steps, pct_start=0.1)
    for pixels, texts, truth in _batches(steps, 128, seed, tokenizer, curriculum):
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
    words = " ".join(word for word in (colour, shape or ANY) if word)
    return str(rng.choice(["", "a ", "the ", "one ", "I see a ", "find the ", "colour of the "])) + words


def fits(picture: Label, said: Label) -> bool:
    """Whether what is said is true of a picture."""
    if said == (None, None):
        return picture == (None, None)
    if said == (ANY, None):
        return picture != (None, None)
    return said[0] in (None, picture[0]) and said[1] in (None, picture[1])


def _pictures(curriculum: Curriculum, count: int, seed: int) -> tuple[np.ndarray, list[Label]]:
    """Frames (N, FRAME, FRAME, 3) uint8 of generated scenes, most with a shape, and their labels."""
    pictures: list[np.ndarray] = []
    labels: list[Label] = []
    rng = generator("encoder", seed)
    video = 0
    while len(labels) < count:
        scene = curriculum.scene(1_000_000 + 10_000 * seed + video)
        video += 1
        times = [float(rng.uniform(event.start, event.end - 0.01)) for event in scene.events]
        for seconds in (*times, *rng.uniform(0, scene.duration, size=len(times) // 3)):
            event = scene.visible(seconds)
            labels.append((event.shape, event.colour) if event else (None, None))
            small = scene.frame(seconds).resize((FRAME, FRAME), Image.Resampling.BICUBIC)
            pictures.append(np.asarray(small))
    return np.stack(pictures[:count]), labels[:count]


def _batches(
    steps: int, size: int, seed: int, tokenizer: HFTokenizer, curriculum: Curriculum
) -> Iterator[tuple[Any, Any, Any]]:
    """Pixels (size, 3, H, W), captions (size, length) and truth (size, size) of each pair, step by step."""
    import torch

    pictures, labels = _pictures(curriculum, min(curriculum.pictures, steps * size), seed)
    rng = generator("captions", seed)
    mean, std = PREPROCESS["mean"][0], PREPROCESS["std"][0]
    for _ in range(steps):
        picked = rng.choice(len(labels), size=size, replace=False)
        said: list[Label] = []
        for shape, colour in (labels[i] for i in picked):
            keep = rng.choice(3, p=[0.55, 0.3, 0.15])
            said.append((None if keep == 2 else shape, None if keep == 0 else colour))
        said, texts = _captions(said, curriculum, rng)
        truth = torch.tensor([[float(fits(labels[i], words)) for words in said] for i in picked])
        pixels = torch.from_numpy(pictures[picked]).permute(0, 3, 1, 2).float() / 255
        yield (pixels - mean) / std, tokenizer(texts), truth


def _captions(said: list[Label], curriculum: Curriculum, rng: np.random.Generator) -> tuple[list[Label], list[str]]:
    """What is said and how: captions of which a fifth are questions about their shape, and some tell of any shape."""
    labels: list[Label] = []
    texts: list[str] = []
    for shape, colour in said:
        draw = rng.random()
        asks = shape is not None and draw < 0.2
        label = (shape, None) if asks else (ANY, None) if shape is not None and draw < 0.26 else (shape, colour)
        labels.append(label)
        texts.append(str(rng.choice(curriculum.questions)).format(shape=shape) if asks else caption(label, rng))
    return labels, texts


def _make_tokenizer(curriculum: Curriculum) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = generator("encoder tokenizer")
    labels: list[Label] = [(shape, colour) for shape in (*curriculum.shapes, None) for colour in (*COLOURS, None)]
    texts = [caption(label, rng) for label in labels * 20]
    texts += [text.format(shape=shape) for text in curriculum.questions for shape in curriculum.shapes] * 4
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
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="right")
