"""What a number is made of: fingerprints of predictions, and the comparison that names what differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from timesearch.inference.fingerprint import fingerprint_of
from timesearch.settings import Settings


def test_each_ingredient_changes_the_digest_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    told = {"search": {"prompts": "default"}}
    base = fingerprint_of(Settings.model_validate(told), tmp_path, "grpo_csv", None, Settings().search)
    changes = {
        "temperature of sampling": {"infer": {"temperature": 0.7}},
        "seed of sampling": {"seed": 3},
        "form of the preview": {"infer": {"preview": "video"}},
        "frames.qscale": {"frames": {"qscale": 5}},
        "engine": {"infer": {"engine": "transformers"}},
        "search.max_tokens": {"search": {"max_tokens": 64}},
        "prompt user": {"search": {"prompts": "pocket"}},
    }
    for words, change in changes.items():
        settings = Settings.model_validate(told | change)
        other = fingerprint_of(settings, tmp_path, "grpo_csv", None, settings.search)
        ours, theirs = base.ingredients(), other.ingredients()
        named = [name for name in ours if ours[name] != theirs[name]]
        assert any(name.startswith(words) for name in named), (words, named)
        assert base.digest != other.digest
    (tmp_path / "config.json").write_text("{ }")
    reread = fingerprint_of(Settings.model_validate(told), tmp_path, "grpo_csv", None, Settings().search)
    assert reread.checkpoint != base.checkpoint


@pytest.mark.parametrize("section", ["search", "frames", "features"])
def test_no_setting_that_shapes_predictions_is_left_out(tmp_path: Path, section: str) -> None:
    settings = Settings()
    made = fingerprint_of(settings, tmp_path, "grpo_csv", None, settings.search)
    held = {*made.search, *made.frames, *made.encoder, "prompts", "tools"}
    assert set(getattr(settings, section).shaping_names()) <= held
