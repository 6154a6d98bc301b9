"""A small project to train in: pocket videos as frame caches, features that know the shapes, a scripted policy.

Run as a program it trains in a process of its own: ``python tests/scripted.py FOLDER params.json [turns.json]``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from timesearch.base.files import file_digest, inside
from timesearch.pocket.world import SHAPES, make_scene, question
from timesearch.settings import Frames, Settings

CALL = (
    "<think>I need to see the {shape}.</think>\n"
    '<tool_call>\n{{"name": "seek_video_frames", "arguments": {{"query": "{shape}"}}}}\n</tool_call>'
)
ANSWER = "<think>The {shape} is {colour}.</think>\n<answer>{colour}</answer>"


class OracleEncoder:
    """Text to a unit vector with one axis for each shape and one for everything else."""

    name, pretrained, preprocessing = "oracle", "", ""

    def encode_text(self, texts: list[str]) -> np.ndarray:
        axes = [next((i for i, shape in enumerate(SHAPES) if shape in text), len(SHAPES)) for text in texts]
        return np.eye(len(SHAPES) + 1, dtype=np.float32)[axes]


def build_project(root: Path, videos: int, world: str = "guess-proof") -> Settings:
    """Caches, train samples and an untrained policy under `root`; returns settings for two short steps."""
    from timesearch.pocket.policy import make_policy, make_processor, make_tokenizer, save_policy

    rows = []
    for seed in range(videos):
        scene, video = make_scene(world, "train", seed), f"{world}/{seed}.mp4"
        _write_caches(root, video, scene)
        needle = scene.needles[0]
        rows.append(
            {
                "id": str(seed),
                "video": video,
                "question": question(needle.shape),
                "answer": needle.colour,
                "type": "open_ended",
            }
        )
    samples = root / "data" / "train.jsonl"
    samples.parent.mkdir(parents=True, exist_ok=True)
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer()
    save_policy(make_policy(tokenizer), make_processor(tokenizer), root / "runs" / "coldstart")
    return make_settings()


def make_settings(**train: Any) -> Settings:
    """Two steps of two questions with four episodes each, in paths relative to the project."""
    return Settings.model_validate(
        {
            "search": {
                "prompts": "pocket",
                "total_video_tokens": 16,
                "min_tokens": 4,
                "max_tokens": 4,
                "patch": 32,
                "max_turns": 3,
                "max_frames_per_turn": 2,
                "max_new_tokens": 48,
            },
            "train": {
                "steps": 2,
                "learning_rate": 1e-3,
                "beta": 0.0,
                "num_generations": 4,
                "prompts_per_step": 2,
                "micro_batch": 4,
                "bf16": False,
                "generation": "transformers",
                "max_completion_length": 600,
                "zero_advantage": "keep",
                **train,
            },
            "judge": {"kind": "rule"},
        }
    )


def _write_caches(root: Path, video: str, scene: Any) -> None:
    times = np.arange(0.0, scene.duration, 1.0)
    pictures = [scene.frame(seconds).resize((64, 64)) for seconds in times]
    shown = [scene.visible(seconds) for seconds in times]
    axes = [SHAPES.index(event.shape) if event else len(SHAPES) for event in shown]
    _write(root, video, times, pictures, axes)


def write_caches(root: Path, video: str, times: np.ndarray, size: tuple[int, int]) -> None:
    """Caches of a video of grey frames at a steady rate, each shape in turn."""
    from PIL import Image

    grey = Image.new("RGB", size, "grey")
    _write(root, video, times, [grey] * len(times), [index % len(SHAPES) for index in range(len(times))])


def _write(root: Path, video: str, times: np.ndarray, pictures: list[Any], axes: list[int]) -> None:
    from safetensors.numpy import save_file

    from timesearch.retrieval.features import _digest
    from timesearch.video.frames import VERSION, FrameCache, frame_name, transform_of

    frames = inside(root / "cache" / "frames", f"{video}.frames")
    frames.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    rate = 1.0 / float(times[1] - times[0])
    with zipfile.ZipFile(frames, "w") as archive:
        for index, picture in enumerate(pictures):
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=90)
            archive.writestr(frame_name(index), buffer.getvalue())
            digest.update(buffer.getvalue())
        meta = {
            "version": VERSION,
            "source": {"name": Path(video).name, "size": 0, "sha256": "0" * 64},
            "fps": rate,
            "width": pictures[0].width,
            "height": pictures[0].height,
            "transform": transform_of(Frames(fps=rate)),
            "frames_sha256": digest.hexdigest(),
            "timestamps": times.tolist(),
        }
        archive.writestr("meta.json", json.dumps(meta))
    rows = np.eye(len(SHAPES) + 1)[axes] + 0.02 * np.random.default_rng(0).standard_normal(
        (len(times), len(SHAPES) + 1)
    )
    features = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    header = {"model": "oracle", "pretrained": "", "preprocessing": ""}
    header["features_sha256"] = _digest(features, times)
    header["frames"] = FrameCache.open(frames).digest
    target = inside(root / "cache" / "features", f"{video}.safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({"features": features, "timestamps": times}, target, metadata=header)


class Script:
    """A logits processor that makes the policy write given turns; sampling then has nothing left to choose.

    Args:
        tokenizer: the policy's.
        turns: texts by turn; each a list of variants, taken by the row of the batch; the last serves all later turns.
        reanswer: text of the re-answer.
    """

    def __init__(self, tokenizer: Any, turns: list[list[str]], reanswer: str = ANSWER) -> None:
        self._tokenizer, self._turns, self._reanswer = tokenizer, turns, reanswer
        self._start: int | None = None
        self._texts: list[list[int]] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        if self._start is None:
            self._start = input_ids.shape[1]
            self._texts = [self._text(row, self._tokenizer.decode(ids)) for row, ids in enumerate(input_ids)]
        position = input_ids.shape[1] - self._start
        forced = torch.full_like(scores, -1e9)
        for row, text in enumerate(self._texts):
            forced[row, text[position] if position < len(text) else self._tokenizer.pad_token_id] = 0.0
        return forced

    def _text(self, row: int, prompt: str) -> list[int]:
        shape = next(shape for shape in SHAPES if f"the {shape}?" in prompt)
        if "# Tools" in prompt:
            turn = min(prompt.count("<|im_start|>assistant") - 1, len(self._turns) - 1)
            template = self._turns[turn][row % len(self._turns[turn])]
        else:
            template = self._reanswer
        text = template.format(shape=shape, colour="red") + "<|im_end|>"
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def script_trainer(turns: list[list[str]], reanswer: str = ANSWER) -> None:
    """Make every `GRPOCSVTrainer` of this process play `turns`."""
    from timesearch.training.grpo_csv import GRPOCSVTrainer

    original = GRPOCSVTrainer.__init__

    def init(self: Any, *arguments: Any, **keywords: Any) -> None:
        original(self, *arguments, **keywords)
        generate = self.model.generate

        def scripted(*inputs: Any, **options: Any) -> Any:
            return generate(*inputs, logits_processor=[Script(self._tokenizer, turns, reanswer)], **options)

        self.model.generate = scripted

    GRPOCSVTrainer.__init__ = init  # type: ignore[method-assign]


def use_oracle() -> None:
    """Let the stage load the oracle in place of an encoder."""
    import timesearch.retrieval.encoder as encoder

    encoder.load_encoder = lambda *_, **__: OracleEncoder()  # type: ignore[assignment, return-value]


def weights_digest(folder: Path) -> str:
    """Digest of a checkpoint's weights."""
    return file_digest(folder / "model.safetensors")


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    use_oracle()
    if len(sys.argv) > 3:
        script_trainer(json.loads(Path(sys.argv[3]).read_text()))
    from timesearch.training.train import run

    run(Settings.model_validate_json(Path(sys.argv[2]).read_text()))
