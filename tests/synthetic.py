"""Small videos, made by ffmpeg, and a small encoder: what the tests of the caches feed on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import imageio_ffmpeg


def ffmpeg(*arguments: object) -> None:
    """Run ffmpeg, and show what it says if it fails."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-y", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def make_video(
    path: Path, *options: object, seconds: float = 3, size: str = "192x108", rate: str = "25", graph: str = ""
) -> Path:
    """A test pattern with a running clock; `options` are ffmpeg's output options, `graph` further filters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = f"testsrc2=size={size}:rate={rate}:duration={seconds}" + (f",{graph}" if graph else "")
    encoder = () if "-c:v" in options else ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
    ffmpeg("-f", "lavfi", "-i", source, *encoder, *options, f"file:{path}")
    return path


def make_encoder(folder: Path, seed: int = 0) -> Path:
    """An untrained CLIP of 32 dimensions in open_clip's folder layout."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    model = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    save_file(open_clip.CLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    shaping = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": shaping}))
    return folder
