"""What a Python user meets first: the names of the package, and the README's example."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from players import build_library, video_of
from scripted import OracleEncoder

import timesearch

README = Path(__file__).parents[1] / "README.md"


def test_every_public_name_is_there() -> None:
    for name in timesearch.__all__:
        assert getattr(timesearch, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = timesearch.nothing
    assert (Path(timesearch.__file__).parent / "py.typed").is_file()


def test_importing_the_package_loads_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys, json, timesearch; print(json.dumps([n for n in ('torch', 'mlflow', 'numpy') if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_the_readmes_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = build_library(tmp_path, videos=1)
    for folder, suffix in (("frames", ".frames"), ("features", ".safetensors")):
        target = tmp_path / "cache" / folder / f"hops/test/1007.mp4{suffix}"
        target.parent.mkdir(parents=True)
        shutil.copy(tmp_path / "cache" / folder / f"{video_of(0)}{suffix}", target)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("timesearch.retrieval.encoder.load_encoder", lambda folder: OracleEncoder())
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(code, {})  # noqa: S102  the README is ours
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(re.fullmatch(r"hops/test/1007\.mp4 \d+\.\d \d+", line) for line in lines)
