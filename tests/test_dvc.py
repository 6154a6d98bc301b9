"""The pipeline as DVC sees it, in a real repository."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from scratch_project import ROOT, environment, make_project, ran, run

import flows.pipeline
from flows.pipeline import Stage, pipeline
from tasks.judge import asks_judge
from tasks.reproduce import STAGES, StageFailedError, reproduce, stale_stages, turn
from tasks.stages import TASKS, download
from tasks.workspace import is_protected, overridden, workspace
from timesearch.base.errors import RequestError
from timesearch.judge.client import Verdicts
from timesearch.models import encoder_origin, policy_origin
from timesearch.profiles import load_profile, profile_names, render
from timesearch.settings import Judge, Models, Section, Settings, load_settings
from timesearch.video.download import TRY_AGAIN


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


def test_stages_depend_on_what_shapes_their_results_and_on_no_pace() -> None:
    """A stage names a section whole, or all of it that is not marked as pace."""
    for stage, told in pipeline_file()["stages"].items():
        named: dict[str, set[str]] = {}
        for parameter in told.get("params", []):
            section, _, name = parameter.partition(".")
            named.setdefault(section, set()).add(name)
        for section, names in named.items():
            if names == {""} or (stage, section) == ("evaluate", "infer"):
                continue
            assert names == set(type(getattr(Settings(), section)).shaping_names()), (stage, section)


def test_models_are_made_anew_when_what_shapes_them_changes() -> None:
    """Each setting of the section `models` is told by the mark of the encoder (a pocket or a published one) or of the
    policy."""
    published, pocket = Models(encoder="a", pretrained="b", policy="c/d"), Models(encoder="pocket", policy="c/d")
    missed = set(Models.shaping_names())
    for models in (published, pocket):
        for name in Models.shaping_names():
            value = getattr(models, name)
            other = models.model_copy(update={name: value + 1 if isinstance(value, int) else f"{value}-other"})
            if (encoder_origin(models, 0), policy_origin(models)) != (encoder_origin(other, 0), policy_origin(other)):
                missed.discard(name)
    assert not missed
    assert encoder_origin(pocket, 0) != encoder_origin(pocket, 1)


def test_params_yaml_is_the_profile_of_the_demo_written_out() -> None:
    text = (ROOT / "params.yaml").read_text()
    if load_settings(ROOT / "params.yaml").profile != "hops":
        pytest.skip("another profile is in use here")
    assert text == render(load_profile("hops", ROOT / "profiles")), "run: uv run timesearch profile hops"


def test_a_profile_written_out_means_the_same(tmp_path: Path) -> None:
    for name in profile_names(ROOT / "profiles"):
        settings = load_profile(name, ROOT / "profiles")
        (tmp_path / "params.yaml").write_text(render(settings))
        assert load_settings(tmp_path / "params.yaml") == settings


@pytest.mark.takes(15)
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


@pytest.mark.takes(8)
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


@pytest.mark.parametrize("left", [b"", b'{"write": {"cache', b"\xff"])
def test_a_record_that_a_kill_cut_off_blocks_no_run(here: Path, left: bytes) -> None:
    before = stale_stages(here)
    (here / ".dvc" / "tmp" / "rwlock").write_bytes(left)
    assert run(here, "dvc", "status", check=False).returncode, "DVC minds no longer: then nothing needs to be removed"
    assert stale_stages(here) == before


def test_a_whole_record_stays(tmp_path: Path) -> None:
    record = tmp_path / ".dvc" / "tmp" / "rwlock"
    record.parent.mkdir(parents=True)
    record.write_text('{"read": {}, "write": {"a": {"pid": 1, "cmd": "dvc repro"}}}')
    before = record.read_bytes()
    with turn(tmp_path, print):
        assert record.read_bytes() == before


def test_the_last_try_of_a_download_leaves_out_what_stays_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.runtime import task_run

    tried: list[bool] = []
    monkeypatch.setattr("tasks.stages._stage", lambda name, tree, fresh, env: tried.append(TRY_AGAIN in env))
    for count in (1, download.retries, download.retries + 1):
        monkeypatch.setitem(task_run.FIELDS, "run_count", lambda count=count: count)
        download.fn(tmp_path, False, {})
    assert tried == [True, True, False]


@pytest.mark.takes(8)
def test_a_workspace_has_the_outputs_and_goes_when_done(here: Path) -> None:
    params = (here / "params.yaml").read_text()
    said: list[str] = []
    with workspace(here, {"train.learning_rate": 5e-5}, None, said.append, pytest.fail) as tree:
        assert tree.parent == here / ".workspaces"
        assert load_settings(tree / "params.yaml").train.learning_rate == 5e-5
        assert (tree / "cache" / "frames" / "a.frames").is_file()
        assert stale_stages(tree)[0] == "train"
        (tree / "runs" / "mine").write_text("x")
    assert not tree.exists()
    kept = here / ".workspaces" / "done" / tree.name
    assert f"kept in {kept}" in said[-1]
    assert load_settings(kept / "params.yaml").train.learning_rate == 5e-5
    assert (here / "params.yaml").read_text() == params
    assert not (here / "runs" / "mine").exists()


@pytest.mark.takes(15)
def test_a_workspace_has_what_is_uncommitted_but_code(here: Path) -> None:
    """A profile in use, data that were added, and settings of this machine go into it; edited code is named."""
    params = (here / "params.yaml").read_text()
    code, question = here / "timesearch" / "base" / "errors.py", here / "data" / "train.jsonl"
    before = code.read_text(), question.read_text()
    (here / "params.yaml").write_text(params.replace("learning_rate: 0.0002", "learning_rate: 0.0007"))
    question.write_text('{"id": "2", "video": "a.mp4", "question": "new?"}\n')
    run(here, "dvc", "add", "-q", "data")
    code.write_text(before[0] + "# edited\n")
    (here / "timesearch" / "new.py").write_text("")
    run(here, "dvc", "remote", "add", "--local", "mine", "../mine")
    warned: list[str] = []
    try:
        with workspace(here, {"train.steps": 3}, None, print, warned.append) as tree:
            train = load_settings(tree / "params.yaml").train
            assert (train.learning_rate, train.steps) == (0.0007, 3)
            assert "new?" in (tree / "data" / "train.jsonl").read_text()
            assert {"frames", "features"} < set(stale_stages(tree))
            assert not (tree / "timesearch" / "new.py").exists()
            configured = run(tree, "dvc", "config", "--local", "--list").stdout
            remote = configured.split("remote.mine.url=")[1].split()[0]
            assert (tree / ".dvc" / remote).resolve() == here.parent / "mine"
            triple = ("q", "a", "b")
            Verdicts(tree / "cache" / "judge.sqlite").put("key", 1.0)
        assert Verdicts(here / "cache" / "judge.sqlite").get({"key": triple}) == {triple: 1.0}
        (warning,) = warned
        assert "without the edits in timesearch/base/errors.py, timesearch/new.py: commit" in warning
    finally:
        code.write_text(before[0])
        (here / "timesearch" / "new.py").unlink()
        (here / "params.yaml").write_text(params)
        question.write_text(before[1])
        run(here, "dvc", "add", "-q", "data")
        (here / ".dvc" / "config.local").unlink()


def test_the_judge_is_asked_for_open_ended_samples_only(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    row = {"id": "1", "video": "a.mp4", "question": "?", "answer": "A"}
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps({**row, "type": "multiple_choice"}) + "\n")
    (tmp_path / "data" / "test.jsonl").write_text(json.dumps({**row, "type": "open_ended"}) + "\n")
    settings = Settings()
    assert [stage for stage in STAGES if asks_judge(stage, settings, tmp_path)] == ["evaluate"]
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps({**row, "type": "open_ended"}) + "\n")
    assert [stage for stage in STAGES if asks_judge(stage, settings, tmp_path)] == ["train", "evaluate"]
    settings.coldstart.traces = "teacher"
    assert [stage for stage in STAGES if asks_judge(stage, settings, tmp_path)] == ["coldstart", "train", "evaluate"]
    settings.judge.kind = "rule"
    assert not any(asks_judge(stage, settings, tmp_path) for stage in STAGES)


def test_the_judge_is_up_from_the_first_stale_stage_that_asks_it_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    @contextmanager
    def judge(settings: Judge) -> Iterator[None]:
        happened.append("judge up")
        yield
        happened.append("judge down")

    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text('{"id": "1", "video": "a.mp4", "question": "?"}\n')
    monkeypatch.setattr(flows.pipeline, "judge", judge)
    monkeypatch.setattr(flows.pipeline, "get_run_logger", logging.getLogger)
    monkeypatch.setattr(flows.pipeline, "_bring", lambda stage, *_: bool(happened.append(stage)))

    def bring(stages: list[str], stale: set[str]) -> list[str]:
        happened.clear()
        monkeypatch.setattr(flows.pipeline, "stale_stages", lambda tree, asked, line: stale.intersection(asked))
        flows.pipeline._bring_all(stages, ["coldstart"], tmp_path, Settings(), {})
        return list(happened)

    stages = ["coldstart", "train", "infer", "evaluate"]
    assert bring(stages, {"train"}) == ["coldstart", "judge up", "train", "infer", "evaluate", "judge down"]
    assert bring(stages, {"evaluate"}) == ["coldstart", "train", "infer", "judge up", "evaluate", "judge down"]
    assert bring(stages, set()) == stages
    assert bring(stages[:3], {"train"}) == ["coldstart", "judge up", "train", "judge down", "infer"]


def test_a_workspace_is_kept_when_the_run_fails(here: Path) -> None:
    said: list[str] = []
    with pytest.raises(KeyError), workspace(here, {}, "HEAD", said.append, pytest.fail) as tree:
        raise KeyError
    assert tree.is_dir()
    assert f"kept for a look: {tree}" in said[-1]
    run(here, "git", "worktree", "remove", "--force", str(tree))


@pytest.mark.parametrize(
    ("overrides", "revision", "says"),
    [
        ({"train.speed": 1}, None, "unknown parameter 'train.speed'"),
        ({"train.steps": "many"}, None, "parameter 'train.steps'"),
        ({"train": None}, None, "unknown parameter 'train'"),
        ({"train.steps": 7, "judge.command": ["touch", "made"]}, None, "a run may not change judge.command, for"),
        ({"judge.command": ["touch", "made"]}, "HEAD", "a run may not change judge.command, for"),
        ({"overridable": ["judge.command"], "judge.command": []}, None, "may not change overridable, judge.command"),
        ({}, "no-such-branch", "'no-such-branch' is no revision"),
        ({}, "--help", "'--help' is no revision"),
    ],
)
def test_a_wrong_workspace_is_refused_and_leaves_nothing(
    here: Path, overrides: dict[str, Any], revision: str | None, says: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(says)), workspace(here, overrides, revision, print, print):
        pass
    assert {path.name for path in (here / ".workspaces").glob("*")} <= {"done"}


def test_a_run_may_change_values_and_what_the_checkout_allows_and_no_command_path_address_or_model(here: Path) -> None:
    names = {f"{section}.{name}" for section, values in Settings() if isinstance(values, Section) for name, _ in values}
    protected = {name for name in {*Settings.model_fields, *names} if is_protected(name)}
    assert protected == {
        "overridable", *(f"paths.{name}" for name in Settings().paths.model_dump()),
        "models.encoder", "models.pretrained", "models.policy", "features.url", "cluster.address", "cluster.slurm",
        "subtitles.speech", "search.prompts", "search.tools", "coldstart.traces",
        "coldstart.teacher_url",
        "coldstart.teacher_model", "train.vllm_url", "judge.url", "judge.model", "judge.command", "judge.cache",
        "judge.log", "infer.urls", "infer.model", "infer.command", "infer.log", "infer.tools", "tracking.uri",
        "tracking.experiment",
    }  # fmt: skip
    for name in ("", ".", "judge", "judge.", "judge..command", "train.steps.x", "Judge.command"):
        assert not is_protected(name)  # and no parameter
    assert is_protected("judge.command.0")
    assert not is_protected("train.rewards.completeness")
    params = here / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("overridable: []", "overridable: [search.prompts]"))
    try:
        with workspace(here, {"search.prompts": "default"}, None, print, print) as tree:
            assert load_settings(tree / "params.yaml").search.prompts == "default"
        with (
            pytest.raises(RequestError, match=r"may not change infer\.log, for"),
            workspace(here, {"infer.log": "x", "search.prompts": "default"}, None, print, print),
        ):
            pass
    finally:
        params.write_text(before)


def test_overrides_set_what_they_name_and_nothing_else() -> None:
    values = Settings().model_dump(mode="json")
    changed = overridden(values, {"train.steps": 7, "seed": 3})
    assert (changed["train"].pop("steps"), changed.pop("seed")) == (7, 3)
    values["train"].pop("steps")
    values.pop("seed")
    assert json.dumps(changed, sort_keys=True) == json.dumps(values, sort_keys=True)
