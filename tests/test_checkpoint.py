"""Checkpoints as they are published: small frames stay small, and what does not fit is refused before work begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from timesearch.base.errors import RequestError
from timesearch.pocket.policy import make_policy, make_processor, make_tokenizer, save_policy
from timesearch.search.checkpoint import check_fit, examine, keep_small_frames, load_model, load_processor
from timesearch.settings import SearchSettings

SEARCH = SearchSettings(total_video_tokens=16, max_frames=4, min_tokens=4, max_tokens=4, patch=32, max_turns=4)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL whose processor enlarges images of less than 64 tokens, as the published ones do."""
    folder = tmp_path_factory.mktemp("published")
    tokenizer = make_tokenizer()
    processor = make_processor(tokenizer)
    processor.image_processor.size["shortest_edge"] = 65_536
    processor.image_processor.size["longest_edge"] = 16_777_216
    save_policy(make_policy(tokenizer), processor, folder)
    return folder


def test_small_frames_stay_small_and_stay_so_in_what_is_saved(published: Path, tmp_path: Path) -> None:
    frame = Image.new("RGB", (128, 96))
    processor = load_processor(published)
    grid = processor.image_processor(images=[frame], return_tensors="pt")["image_grid_thw"]
    assert grid.tolist() == [[1, 6, 8]], "12 tokens of 2 x 2 patches"
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]["size"]
    assert saved == {"shortest_edge": 1024, "longest_edge": 16_777_216}


def test_a_servers_copy_is_put_right_once(published: Path, tmp_path: Path) -> None:
    for name in ("processor_config.json", "config.json"):
        (tmp_path / name).write_bytes((published / name).read_bytes())
    old = {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12_845_056}  # as Qwen2.5-VL's
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    keep_small_frames(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    assert config["image_processor"]["size"]["shortest_edge"] == 1024
    assert config["processor_class"] == "Qwen3VLProcessor"
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == {**old, "min_pixels": 784}
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    keep_small_frames(tmp_path)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before


def test_what_does_not_fit_is_refused(published: Path) -> None:
    check_fit(published, SEARCH)
    assert all(finding.ok for finding in examine(published, SEARCH))
    with pytest.raises(RequestError, match=r"patch \(.* set search.patch to 32"):
        check_fit(published, SEARCH.model_copy(update={"patch": 28}))
    with pytest.raises(RequestError, match=r"context \(4096 tokens, .* lower search.total_video_tokens"):
        check_fit(published, SEARCH.model_copy(update={"total_video_tokens": 5000}))


def test_weights_are_loaded_in_the_type_that_is_asked_for(published: Path) -> None:
    assert load_model(published).dtype == torch.float32
    assert load_model(published, torch.bfloat16).dtype == torch.bfloat16
