"""The base policy's pretraining: stopped, it goes on; done, it says how it was made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from players import MeanColour

from timesearch.base.errors import RequestError
from timesearch.base.files import write_json
from timesearch.pocket import pretrain as pretraining
from timesearch.pocket.lessons import Lookup
from timesearch.pocket.recipes import RECIPES, Phase
from timesearch.profiles import load_profile
from timesearch.training.supervised import Plan


@pytest.mark.takes(15)
def test_a_rebuild_that_was_stopped_goes_on_and_leaves_the_old_policy_until_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(1, 2, 1e-3)
    phases = [Phase("see", Lookup(10**6, 0), plan), Phase("search", Lookup(10**6, 1), plan)]
    short = replace(RECIPES["pocket"], videos=1, align_steps=1, phases=lambda corpus, seed: phases)
    monkeypatch.setitem(RECIPES, "pocket", short)
    monkeypatch.setattr(pretraining, "_PLAYED", 2)
    settings = load_profile("pocket")
    settings.paths.models, settings.train.processes = tmp_path / "models", 1
    folder, tune, tuned = tmp_path / "base", pretraining.fine_tune, []

    def stopped_at_the_second(*arguments: object) -> object:
        tuned.append(1)
        if len(tuned) == 2:
            raise KeyboardInterrupt
        return tune(*arguments)

    monkeypatch.setattr(pretraining, "fine_tune", stopped_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        pretraining.pretrain(settings, MeanColour(), folder)
    assert not folder.exists()
    pretraining.pretrain(settings, MeanColour(), folder)
    made = json.loads((folder / "recipe.json").read_text())
    assert [phase["phase"] for phase in made["phases"]] == ["align", "see", "search"]
    assert made.keys() == {"recipe", "seed", "phases", "made"}
    assert (folder / "model.safetensors").is_file()
    assert (len(tuned), (settings.paths.models / ".rebuild").exists()) == (3, False)
    said = capsys.readouterr().err
    assert all(said.count(f"{title}: 1 steps, loss") == 1 for title in ("align", "see", "search"))


def test_an_edited_recipe_keeps_the_phases_before_the_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, titles = load_profile("pocket"), ("see", "search", "base")

    def begun(changed: str | None, seed: int = 0) -> list[str]:
        plans = {title: Plan(2 if title == changed else 1, 2, 1e-3) for title in titles}
        phases = [Phase(title, Lookup(10**6, 0), plan) for title, plan in plans.items()]
        recipe = replace(RECIPES["pocket"], phases=lambda corpus, seed: phases)
        digests = pretraining._digests(settings, recipe, MeanColour(), seed)
        done = pretraining._begun(tmp_path / "work", digests, seed)
        kept = [phase["phase"] for phase in done["phases"]]
        done["phases"] = [{"phase": title, "digest": digests[title]} for title in ("align", *titles)]
        write_json(tmp_path / "work" / "recipe.json", done)
        for title in titles:
            (tmp_path / "work" / title).mkdir(exist_ok=True)
        return kept

    assert begun(None) == []
    assert begun(None) == ["align", "see", "search", "base"]
    assert begun("search") == ["align", "see"]
    assert begun("base") == ["align", "see"]
    assert begun("base", seed=1) == []


def test_a_rebuild_for_an_encoder_without_recipe_is_refused_in_a_sentence(tmp_path: Path) -> None:
    settings = load_profile("paper-7b")
    with pytest.raises(RequestError, match="for which no base policy is pretrained: a rebuild takes one of pocket"):
        pretraining.pretrain(settings, MeanColour(), tmp_path / "base")
