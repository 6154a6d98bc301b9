"""The command line on bad input: one sentence, the exit code of the contract, nothing half-written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scratch_project import ROOT

from timesearch.base.machine import PAPER_GPUS, Gpu, Machine, project_folder
from timesearch.profiles import load_profile

STAGES = ["download", "models", "frames", "features", "subtitles", "coldstart", "train", "infer", "evaluate"]


def timesearch(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "timesearch", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
    )


def one_sentence(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("timesearch: ")]
    assert len(said) == 1, done.stderr
    for part in parts:
        assert part in said[0]


def test_help_names_every_command_and_loads_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom timesearch.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'mlflow', 'vllm', 'ray', 'pandas', 'matplotlib', 'prefect', "
        "'dvc', 'trl', 'av', 'scipy', 'httpx', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in [*STAGES, "demo", "report", "ask", "judge", "profile", "doctor"]:
        assert re.search(rf"\b{command}\b", done.stdout), command


def test_doctor_tells_what_is_here(tmp_path: Path) -> None:
    done = timesearch("doctor", cwd=tmp_path)
    for word in ("cores", "memory", "disk free", "GPUs", "ffmpeg", "vLLM", "profile that fits"):
        assert word in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("gpus", "memory", "profile", "said"),
    [
        (0, 0, "pocket", None),
        (4, 24, "pocket", None),
        (1, 85, "single-gpu", None),
        (8, 85, "single-gpu", "2 machines like this one"),
        (16, 85, "paper-7b", None),
    ],
)
def test_the_profile_that_fits(gpus: int, memory: float, profile: str, said: str | None) -> None:
    machine = Machine(cores=8, memory=64, disk_free=100, gpus=[Gpu("card", memory)] * gpus)
    assert machine.profile == profile
    assert said is None if machine.together is None else said in machine.together


def test_deployments_run_in_the_checkout() -> None:
    assert project_folder() == {"directory": str(ROOT)}


def test_the_paper_profile_asks_for_the_gpus_that_doctor_counts() -> None:
    train = load_profile("paper-7b", ROOT / "profiles").train
    assert train.nodes * train.gpus_per_node == PAPER_GPUS


def test_a_profile_becomes_params_yaml(tmp_path: Path) -> None:
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    done = timesearch("profile", "paper-7b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "profile: paper-7b" in (tmp_path / "params.yaml").read_text()
    before = (tmp_path / "params.yaml").read_text()
    one_sentence(timesearch("profile", "nope", cwd=tmp_path), 2, "unknown profile 'nope'", "pocket")
    assert (tmp_path / "params.yaml").read_text() == before
    listed = timesearch("profile", cwd=tmp_path).stdout.split()
    assert listed == ["hops", "paper-7b", "pocket", "senses", "single-gpu", "timesearch-r"]


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ("train: {speed: 3}", "unknown parameter 'train.speed'"),
        ("frames: {fps: -1}", "parameter 'frames.fps'"),
        ("train: [", "is not YAML"),
    ],
)
def test_wrong_parameters_are_named(tmp_path: Path, params: str, says: str) -> None:
    (tmp_path / "params.yaml").write_text(params)
    one_sentence(timesearch("evaluate", cwd=tmp_path), 2, "params.yaml", says)
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_a_missing_parameter_file_is_said(tmp_path: Path) -> None:
    one_sentence(timesearch("download", cwd=tmp_path), 2, "params.yaml does not exist")


def test_a_broken_line_is_named_with_file_and_line_and_the_rest_is_done(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("profile: pocket\n")
    for folder in ("data", "cache/videos"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "cache/videos/a.mp4").touch()
    row = json.dumps({"id": "1", "video": "a.mp4", "question": "?"})
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(f'{row}\n{{"id": "2", \n')
    for keep_going, code in (([], 1), (["--keep-going"], 0)):
        done = timesearch("download", *keep_going, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert "0 made, 1 up to date, 2 failed" in done.stdout
        assert "not_json: data/train.jsonl, line 2: not JSON" in done.stderr
    listed = (tmp_path / "cache/videos/failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["message"].partition(",")[0] for line in listed] == ["data/train.jsonl", "data/test.jsonl"]
    (tmp_path / "data/train.jsonl").write_text('{"id": "2", \n')
    one_sentence(timesearch("download", cwd=tmp_path), 2, "data/train.jsonl has no row that can be used")


def test_a_missing_video_is_listed_and_exits_1(tmp_path: Path) -> None:
    done = timesearch("frames", "nowhere.mp4", "--out", "frames", cwd=tmp_path)
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert "nowhere.mp4" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.frames"))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    """/dev/full refuses each write as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    program = (
        "import errno\nfrom timesearch.cli import app\nfrom timesearch.cli.app import main\n"
        "@app.app.command()\ndef fill() -> None:\n"
        "    with open('/dev/full', 'w') as handle: handle.write('x' * 100_000)\n"
        "main(['fill'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    one_sentence(done, 2, "No space left on device", "nothing half-written")


def test_errors_keep_secrets(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("judge: {kind: rule}\n")
    done = timesearch("judge", "check", "https://user:planted@h/f.jsonl?token=planted", cwd=tmp_path, HF_TOKEN="h" * 12)
    one_sentence(done, 2, "does not exist")
    assert "planted" not in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = timesearch("--debug", "download", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
