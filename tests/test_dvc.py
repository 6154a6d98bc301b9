"""The pipeline as DVC sees it, in a real repository."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from scratch_project import ROOT, environment, make_project, ran, run

from flows.pipeline import Stage, pipeline
from tasks.reproduce import STAGES, StageFailedError, reproduce, stale_stages
from tasks.stages import TASKS
from tasks.workspace import overridden, workspace
from timesearch.errors import RequestError
from timesearch.profiles import load_profile, profile_names, render
from timesearch.settings import Settings, load_settings


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose pipeline has been run once."""
    project = make_project(tmp_path_factory.mktemp("dvc"))
    assert "Updating lock file" in run(project, "dvc", "repro").stdout
    assert ran(project) == list(STAGES)
    return project


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands that the code under test starts find the scratch project's own environment."""
    for name, value in environment(project).items():
        monkeypatch.setenv(name, value)
    return project


def pipeline_file() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "dvc.yaml").read_text()))


def test_stages_bear_one_name_everywhere() -> None:
    stages = tuple(pipeline_file()["stages"])
    assert stages == STAGES == tuple(TASKS) == Stage.__args__
    assert {stage["cmd"].split()[1] for stage in pipeline_file()["stages"].values()} == set(STAGES)
    assert pipeline.name == "pipeline"


def test_every_parameter_that_a_stage_depends_on_exists_and_is_written_out() -> None:
    for name in profile_names(ROOT / "profiles"):
        written = yaml.safe_load(render(load_profile(name, ROOT / "profiles")))
        for stage in pipeline_file()["stages"].values():
            for parameter in stage.get("params", []):
                at: Any = written
                for part in parameter.split("."):
                    assert part in at, f"{parameter} of dvc.yaml is no parameter"
                    at = at[part]


def test_params_yaml_is_the_pocket_profile_written_out() -> None:
    text = (ROOT / "params.yaml").read_text()
    if load_settings(ROOT / "params.yaml").profile != "pocket":
        pytest.skip("another profile is in use here")
    assert text == render(load_profile("pocket", ROOT / "profiles")), "run: uv run timesearch profile pocket"


def test_a_profile_written_out_means_the_same(tmp_path: Path) -> None:
    for name in profile_names(ROOT / "profiles"):
        settings = load_profile(name, ROOT / "profiles")
        (tmp_path / "params.yaml").write_text(render(settings))
        assert load_settings(tmp_path / "params.yaml") == settings


def test_only_what_a_parameter_touches_runs_again(here: Path) -> None:
    assert "up to date" in run(here, "dvc", "status").stdout
    assert "qa_accuracy" in run(here, "dvc", "metrics", "show").stdout
    assert "reward" in run(here, "dvc", "plots", "show", "--json").stdout

    params = here / "params.yaml"
    before = params.read_text()
    params.write_text(re.sub(r"(?m)^(evaluate:\n(?:.*\n)*?  bootstrap: )\d+", r"\g<1>7", before))
    assert "evaluate.bootstrap" in run(here, "dvc", "params", "diff").stdout
    assert stale_stages(here) == ["evaluate"]
    lines: list[str] = []
    seen: list[float] = []
    assert reproduce("evaluate", here, line=lines.append, progress=seen.append)
    assert ran(here) == [*STAGES, "evaluate"]
    assert "evaluate: 5/5, from https://***@example.org/a?token=***" in lines
    assert seen[-1] == 100.0
    assert not reproduce("evaluate", here, line=lines.append)
    params.write_text(before)


def test_failures_are_told_apart_by_what_another_try_can_change(here: Path) -> None:
    (here / "runs" / "train" / "m").unlink()
    try:
        for status, passes in ((2, False), (75, True), (137, True), (130, False)):
            (here / "fail.txt").write_text(f"train {status} 99\n")
            with pytest.raises(StageFailedError, match=f"'train' failed with exit status {status}") as caught:
                reproduce("train", here, line=lambda line: None)
            assert caught.value.status == status
            assert caught.value.passes is passes
            assert "planted failure" in str(caught.value)
    finally:
        (here / "fail.txt").unlink()
    assert reproduce("train", here, line=lambda line: None)


def test_a_workspace_has_the_outputs_and_goes_when_done(here: Path) -> None:
    params = (here / "params.yaml").read_text()
    said: list[str] = []
    with workspace(here, {"train.learning_rate": 5e-5}, None, said.append) as tree:
        assert tree.parent == here / ".workspaces"
        assert load_settings(tree / "params.yaml").train.learning_rate == 5e-5
        assert (tree / "cache" / "frames" / "a.frames").is_file()
        assert stale_stages(tree)[0] == "train"
        (tree / "runs" / "mine").write_text("x")
    assert not tree.exists()
    assert (here / "params.yaml").read_text() == params
    assert not (here / "runs" / "mine").exists()


def test_a_workspace_is_kept_when_the_run_fails(here: Path) -> None:
    said: list[str] = []
    with pytest.raises(KeyError), workspace(here, {}, "HEAD", said.append) as tree:
        raise KeyError
    assert tree.is_dir()
    assert f"kept for a look: {tree}" in said[-1]
    run(here, "git", "worktree", "remove", "--force", str(tree))


@pytest.mark.parametrize(
    ("overrides", "revision", "says"),
    [
        ({"train.speed": 1}, None, "unknown parameter 'train.speed'"),
        ({"train.steps": "many"}, None, "parameter 'train.steps'"),
        ({}, "no-such-branch", "'no-such-branch' is no revision"),
        ({}, "--help", "'--help' is no revision"),
    ],
)
def test_a_wrong_workspace_is_refused_and_leaves_nothing(
    here: Path, overrides: dict[str, Any], revision: str | None, says: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(says)), workspace(here, overrides, revision, print):
        pass
    assert not (here / ".workspaces").exists() or list((here / ".workspaces").iterdir()) == []


def test_overrides_set_what_they_name_and_nothing_else() -> None:
    values = Settings().model_dump(mode="json")
    changed = overridden(values, {"train.steps": 7, "seed": 3})
    assert (changed["train"].pop("steps"), changed.pop("seed")) == (7, 3)
    values["train"].pop("steps")
    values.pop("seed")
    assert json.dumps(changed, sort_keys=True) == json.dumps(values, sort_keys=True)
