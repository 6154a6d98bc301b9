"""The base policy's pretraining: stopped, it goes on; done, it says how it was made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from players import MeanColour

from timesearch.pocket import pretrain as recipe
from timesearch.pocket.lessons import Lookup
from timesearch.profiles import load_profile
from timesearch.training.supervised import Plan


@pytest.mark.takes(15)
def test_a_rebuild_that_was_stopped_goes_on_and_leaves_the_old_policy_until_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(1, 2, 1e-3)
    monkeypatch.setattr(recipe, "VIDEOS", 1)
    monkeypatch.setattr(recipe, "ALIGN_STEPS", 1)
    phases = [("see", Lookup(10, 0), plan), ("search", Lookup(10, 1), plan)]
    monkeypatch.setattr(recipe, "_phases", lambda corpus, seed: phases)
    settings = load_profile("pocket")
    settings.paths.models = tmp_path / "models"
    folder, tune, tuned = tmp_path / "base", recipe.fine_tune, []

    def stopped_at_the_second(*arguments: object) -> object:
        tuned.append(1)
        if len(tuned) == 2:
            raise KeyboardInterrupt
        return tune(*arguments)

    monkeypatch.setattr(recipe, "fine_tune", stopped_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        recipe.pretrain(settings, MeanColour(), folder)
    assert not folder.exists()
    recipe.pretrain(settings, MeanColour(), folder)
    made = json.loads((folder / "recipe.json").read_text())
    assert [phase["phase"] for phase in made["phases"]] == ["align", "see", "search"]
    assert made.keys() == {"recipe", "seed", "phases", "made"}
    assert (folder / "model.safetensors").is_file()
    assert (len(tuned), (settings.paths.models / ".rebuild").exists()) == (3, False)
    said = capsys.readouterr().err
    assert all(said.count(f"{title}: 1 steps, loss") == 1 for title in ("align", "see", "search"))
