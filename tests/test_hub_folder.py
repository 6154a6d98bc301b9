"""A trained policy as a folder of the model hub: what is in it, what its card says, and its way there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from evaluated import evaluate, trained_project
from hub_server import serving
from huggingface_hub import ModelCard

from timesearch.base.errors import RequestError
from timesearch.base.files import file_digest, write_json
from timesearch.inference.fingerprint import SHORT
from timesearch.report.hub import write_hub_folder
from timesearch.search.protocol import SearchProtocol
from timesearch.settings import load_settings

ROOT = Path(__file__).parents[1]
TOKEN = "hf_planted_secret"
FIGURES = ("temporal_precision", "temporal_f1", "qa_accuracy", "frames_mean")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a policy in runs/train whose episodes were evaluated."""
    monkeypatch.chdir(tmp_path)
    trained_project(tmp_path)
    return tmp_path


def export(project: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "timesearch", "export", "--to", "hub", "runs/train", *options]
    named = {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(project / "hf"), "PYTHONPATH": str(ROOT), **env}
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(command, cwd=project, env={**ours, **named}, capture_output=True, text=True, timeout=300)


@pytest.mark.takes(15)
def test_a_folder_is_written_and_pushed_and_the_token_is_nowhere(project: Path) -> None:
    with serving() as hub:
        done = export(project, "out", "--push", "team/policy", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.stderr
        assert hub.url + "/team/policy/commit/abc" in done.stdout
        assert [each.get("visibility") or each["private"] for each in hub.repositories] in (["private"], [True])
        assert hub.tokens >= {TOKEN}
        out = project / "out"
        written = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert hub.files == written
        hub.status = 403
        refused = export(project, "other", "--push", "team/policy", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        hub.status = 503
        away = export(project, "third", "--push", "team/policy", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert (refused.returncode, away.returncode) == (2, 75)
    for said in (done, refused, away):
        assert TOKEN not in said.stdout + said.stderr
        assert "Traceback" not in said.stderr
    assert not any(TOKEN.encode() in content for content in written.values())
    assert set(written) >= {"README.md", "params.yaml", "model.safetensors", "config.json", "protocol/system.txt"}
    assert not {"run.json", "metrics.jsonl"} & set(written)
    assert file_digest(out / "model.safetensors") == file_digest(project / "runs" / "train" / "model.safetensors")

    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.library_name, card.data.model_name) == ("apache-2.0", "transformers", "out")
    metrics = json.loads((project / "results" / "evaluation" / "grpo_csv.json").read_text())
    told = {result.metric_type: result for result in card.data.eval_results}
    for name in FIGURES:
        assert told[name].metric_value == pytest.approx(metrics[name], abs=1e-6)
        assert told[name].metric_args == {"interval_95": metrics["intervals"][name]}
    low, high = metrics["intervals"]["qa_accuracy"]
    assert f"| QA accuracy | {metrics['qa_accuracy'] * 100:.1f} | {low * 100:.1f} to {high * 100:.1f} |" in card.text
    assert file_digest(project / "data" / "train.jsonl") in card.text
    assert f"Fingerprint `{metrics['fingerprint']['digest'][:SHORT]}`" in card.text
    assert "| checkpoint" in card.text
    assert str(project) not in card.text

    played = load_settings(out / "params.yaml")
    assert played.search.max_turns == load_settings(project / "params.yaml").search.max_turns
    assert SearchProtocol.load(str(out / "protocol")).digest == SearchProtocol.load("pocket").digest


def test_what_is_not_whole_is_refused_in_a_sentence(project: Path, tmp_path: Path) -> None:
    settings = load_settings("params.yaml")
    policy, out = Path("runs/train"), Path("out")
    (project / "full").mkdir()
    (project / "full" / "mine.txt").write_text("mine")
    with pytest.raises(RequestError, match="full is there already"):
        write_hub_folder(settings, policy, Path("full"))
    with pytest.raises(RequestError, match="holds no checkpoint"):
        write_hub_folder(settings, Path("data"), out)
    settings.models.policy = "Qwen/Qwen2.5-VL-3B-Instruct"
    with pytest.raises(RequestError, match=r"--licence is missing.*Qwen2.5-VL-3B"):
        write_hub_folder(settings, policy, out)
    write_hub_folder(settings, policy, out, "other")
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.base_model) == ("other", "Qwen/Qwen2.5-VL-3B-Instruct")
    evaluate(project, "another")
    with pytest.raises(RequestError, match="of other weights than runs/train"):
        write_hub_folder(settings, policy, Path("new"), "other")
    shutil.rmtree(project / "results")
    write_hub_folder(settings, policy, Path("new"), "other")
    assert "it has not been evaluated" in ModelCard.load("new/README.md").text
    config = json.loads((policy / "config.json").read_text())
    write_json(policy / "config.json", {**config, "auto_map": {"AutoModel": "evil.Model"}})
    with pytest.raises(RequestError, match="asks to run code"):
        write_hub_folder(settings, policy, Path("third"), "other")
    (policy / "model.safetensors").unlink()
    with pytest.raises(RequestError, match="no weights"):
        write_hub_folder(settings, policy, Path("third"), "other")
    assert not Path("third").exists()
    assert yaml.safe_load(Path("new/params.yaml").read_text())["search"]["prompts"] == "pocket"


def test_without_a_token_nothing_is_written(project: Path) -> None:
    done = export(project, "out", "--push", "team/policy", HF_ENDPOINT="http://127.0.0.1:9")
    assert (done.returncode, Path("out").exists()) == (2, False)
    assert "set HF_TOKEN" in done.stderr
