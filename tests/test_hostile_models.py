"""Folders of models that would run code, hang or lead elsewhere: each is refused in one sentence, nothing is run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from synthetic import make_encoder

from timesearch.base.errors import RequestError
from timesearch.models import run as run_models
from timesearch.pocket.policy import make_policy, make_processor, make_tokenizer, save_policy
from timesearch.retrieval.encoder import load_encoder
from timesearch.search.checkpoint import check_fit, load_model, load_processor
from timesearch.search.templates import BoundedEnvironment
from timesearch.settings import SearchSettings, Settings

SEARCH = SearchSettings(total_video_tokens=16, max_frames=4, min_tokens=4, max_tokens=4, patch=32, max_turns=4)
PLANTED = "import pathlib\npathlib.Path({marker!r}).touch()\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small policy and a small encoder, in the folders `policy` and `encoder`."""
    folder = tmp_path_factory.mktemp("good")
    tokenizer = make_tokenizer()
    save_policy(make_policy(tokenizer), make_processor(tokenizer), folder / "policy")
    make_encoder(folder / "encoder")
    for path in (folder / "policy").glob("tokenizer*.json"):
        shutil.copy(path, folder / "encoder")
    return folder


def put(name: str, *keys: str, value: Any) -> Callable[[Path], None]:
    """What sets a value, under keys one in another, in a folder's JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        held = json.loads(path.read_text()) if path.exists() else {}
        inner = held
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = value
        path.write_text(json.dumps(held))

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def pickled(folder: Path) -> None:
    import torch

    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def adapter(**config: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        base = folder.with_name("base")
        folder.rename(base)
        folder.mkdir()
        values = {"base_model_name_or_path": str(base), "peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(values | config))

    return change


CODE = {"AutoConfig": "planted.Planted", "AutoProcessor": "planted.Planted", "AutoTokenizer": ["planted.A", None]}
POLICIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "configuration": (put("config.json", "auto_map", value=CODE), "config.json asks to run code"),
    "inner configuration": (put("config.json", "text_config", "auto_map", value=CODE), "config.json asks to run"),
    "tokenizer": (put("tokenizer_config.json", "auto_map", value=CODE), "tokenizer_config.json asks to run"),
    "processor": (put("processor_config.json", "auto_map", value=CODE), "processor_config.json asks to run"),
    "image processor": (put("preprocessor_config.json", "auto_map", value=CODE), "preprocessor_config.json asks"),
    "videos": (put("video_preprocessor_config.json", "auto_map", value=CODE), "video_preprocessor_config.json asks"),
    "generation": (put("generation_config.json", "custom_generate", value="a/b"), "generation_config.json asks"),
    "generate": (write("custom_generate/generate.py", "import planted"), "custom_generate is code"),
    "trust": (put("tokenizer_config.json", "trust_remote_code", value=True), "tokenizer_config.json asks"),
    "kernel": (put("config.json", "attn_implementation", value="evil/kernel:run"), "config.json asks to run code"),
    "deep": (write("config.json", "[" * 100_000), "config.json cannot be read .nested too deeply"),
    "no object": (write("config.json", "[]"), "is no checkpoint of a policy"),
    "long": (write("generation_config.json", b" " * (17 * 2**20)), "longer than 16 MiB"),
    "digits": (write("config.json", '{"model_type": ' + "9" * 5000 + "}"), "is no checkpoint of a policy"),
    "pipe": (lambda folder: os.mkfifo(folder / "preprocessor_config.json"), "is no file"),
    "endless": (lambda folder: (folder / "chat_template.json").symlink_to("/dev/zero"), "is no file"),
    "to itself": (lambda folder: (folder / "x.json").symlink_to(folder / "x.json"), "is no file"),
    "layers": (put("config.json", "text_config", "num_hidden_layers", value=10**9), "which no model has"),
    "pickled weights": (pickled, "is no checkpoint of a policy"),
    "adapter without base": (adapter(base_model_name_or_path=[1]), "names no base model"),
    "adapter's own kind": (adapter(peft_type="PROMPT_TUNING"), "only LORA is known"),
    "adapter in a pickle": (adapter(), "adapter_model.safetensors is missing"),
    "template": (write("chat_template.jinja", "{{ tools }}{{ 'a' * 10**9 }}"), "chat template of .* too large"),
    "template's loops": (
        write(
            "chat_template.jinja",
            "{{ tools }}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        ),
        "does more work",
    ),
    "template's recursion": (
        write("chat_template.jinja", "{% macro f() %}{{ f() }}{% endmacro %}{{ tools }}{{ f() }}"),
        "recursion",
    ),
}
ENCODERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "trust": (
        put("open_clip_config.json", "model_cfg", "text_cfg", "tokenizer_kwargs", value={"trust_remote_code": True}),
        "open_clip_config.json asks to run code .trust_remote_code",
    ),
    "tokenizer": (put("tokenizer_config.json", "auto_map", value=CODE), "tokenizer_config.json asks to run code"),
    "configuration": (put("config.json", "auto_map", value=CODE), "config.json asks to run code"),
    "text tower": (
        put("open_clip_config.json", "model_cfg", "text_cfg", "hf_model_name", value="evil/repository"),
        "loads another model, 'evil/repository'",
    ),
    "vision tower": (
        put("open_clip_config.json", "model_cfg", "vision_cfg", "timm_model_name", value="hf-hub:evil/repository"),
        "loads another model, 'hf-hub:evil",
    ),
    "no towers": (put("open_clip_config.json", "model_cfg", value=[]), "describes no model"),
    "deep": (write("open_clip_config.json", '{"model_cfg":' * 9999), "nested too deeply"),
    "weights": (write("open_clip_model.safetensors", (2**63).to_bytes(8, "little")), "cannot be loaded"),
    "layers": (put("open_clip_config.json", "model_cfg", "text_cfg", "layers", value=10**9), "which no model has"),
}


def hostile(source: Path, target: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a folder with the change, a planted module beside it; and the path of the module's marker."""
    shutil.copytree(source, target)
    (target / "planted.py").write_text(PLANTED.format(marker=str(target.with_name("marker"))))
    change(target)
    return target.with_name("marker")


@pytest.mark.parametrize("kind", POLICIES)
def test_a_policys_folder_is_refused(good: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    change, sentence = POLICIES[kind]
    marker = hostile(good / "policy", tmp_path / "policy", change)

    def use() -> None:
        check_fit(tmp_path / "policy", SEARCH)
        load_model(tmp_path / "policy")

    with pytest.raises(RequestError, match=sentence) as caught:
        use()
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoders_folder_is_refused(good: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    change, sentence = ENCODERS[kind]
    marker = hostile(good / "encoder", tmp_path / "encoder", change)
    with pytest.raises(RequestError, match=sentence) as caught:
        load_encoder(str(tmp_path / "encoder")).encode_text(["a"])
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_keys_that_open_clip_does_not_know_and_planted_files_mean_nothing(good: Path, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        put("open_clip_config.json", "model_cfg", "text_cfg", "tokenizer_kwargs", value={"bpe_path": "x"})(folder)
        put("open_clip_config.json", "model_cfg", "vision_cfg", "planted", value="x")(folder)
        weights = folder / "open_clip_model.safetensors"
        weights.rename(tmp_path / "elsewhere")
        weights.symlink_to(tmp_path / "elsewhere")  # as the hub's cache has it

    hostile(good / "encoder", tmp_path / "encoder", change)
    changed, unchanged = (load_encoder(str(folder / "encoder")) for folder in (tmp_path, good))
    assert (changed.encode_text(["a"]) == unchanged.encode_text(["a"])).all()


def test_models_takes_the_data_of_a_folder_alone(good: Path, tmp_path: Path) -> None:
    hostile(good / "policy", tmp_path / "policy", lambda folder: (folder / "training_args.bin").touch())
    hostile(good / "encoder", tmp_path / "encoder", lambda _: None)
    named = {"policy": str(tmp_path / "policy"), "encoder": str(tmp_path / "encoder")}
    settings = Settings.model_validate({"models": named, "paths": {"models": tmp_path / "models"}})
    run_models(settings)
    made = {path.name for path in (tmp_path / "models").glob("*/*")}
    assert {"model.safetensors", "open_clip_model.safetensors"} <= made
    assert not {"planted.py", "training_args.bin"} & made
    put("tokenizer_config.json", "auto_map", value=CODE)(tmp_path / "policy")
    with pytest.raises(RequestError, match="asks to run code"):
        run_models(settings)


SHOWN = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (8, 8))}, {"type": "text", "text": "U"}]},
]
GROWING = "{% set ns = namespace(s='xx', t=(1,)) %}{% for i in range(60) %}%s{% endfor %}{{ ns.s }}{{ ns.t }}"
TEMPLATES = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}" + "A" * 30_000 + "{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "{% set a = 'x' * 1000000 %}{% for i in range(99999) %}{% if a == 'x' * 1000000 %}{% endif %}{% endfor %}",
    "{% set a = 'x' * 1000000 %}{% for i in range(99999) %}{% set b = a[::-1] %}{% endfor %}",
    "{% for i in range(99999) %}{% set b = range(99999)|list|sort %}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "{% macro m() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call m() %}{% for i in range(99999) %}{% endfor %}{% endcall %}",
    *("{{ 'a' * 10**9 }}", "{{ 10**9 * 'a' }}", "{{ [1] * 10**9 }}", "{{ 10 ** 10 ** 10 }}", "{{ 'a'|center(10**9) }}"),
    *("{{ 'a'.ljust(10**9) }}", "{{ '5'.zfill(10**9) }}", "{{ 'a\\t'.expandtabs(10**9) }}", "{{ '%999999999d' % 5 }}"),
    *("{{ '{:999999999}'.format(5) }}", "{{ '%999999999d'|format(5) }}", "{{ lipsum(n=10**9) }}"),
    *("{{ 'a'|indent(10**9, true) }}", "{{ [1]|tojson(indent=10**9) }}", "{{ [1]|batch(10**9, 'x')|list }}"),
    *(
        "{{ [1]|slice(10**9)|list }}",
        "{{ range(99999)|join('a' * 1000000) }}",
        "{{ ('a' * 9999).join(['b'] * 99999) }}",
    ),
    *("{{ 'aaa'.translate({97: 'x' * 1000000}) }}", "{{ ('a' * 1000000)|replace('a', 'b' * 1000000) }}"),
    GROWING.replace("%s", "{% set ns.s = ns.s ~ ns.s %}"),
    GROWING.replace("%s", "{% set ns.s = ns.s + ns.s %}"),
    GROWING.replace("%s", "{% set ns.s = [ns.s, ns.s]|join %}"),
    GROWING.replace("%s", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
    GROWING.replace("%s", "{% set ns.s = ns.s.replace('x', 'xxxxxxxx') %}"),
    GROWING.replace("%s", "{% set ns.t = [ns.t, ns.t] %}"),
    GROWING.replace("%s", "{% set ns.t = (ns.t, ns.t) %}"),
    GROWING.replace("%s", "{% set ns.t = dict(a=ns.t, b=ns.t) %}"),
    GROWING.replace("%s", "{% set ns.t = namespace(a=ns.t, b=ns.t) %}"),
    *("{{ messages[1].content[0].image.save(marker) }}", "{{ messages[1].content[0]['image']['save'](marker) }}"),
    *("{{ (messages[1].content[0].image|attr('save'))(marker) }}", "{{ ''.__class__.__mro__ }}", "{% include 'x' %}"),
    *("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "x" * 70_000),
]


@pytest.mark.parametrize("number", range(len(TEMPLATES)))
def test_no_template_lasts_grows_or_reaches_out(number: int, tmp_path: Path) -> None:
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    with pytest.raises(Exception) as caught:  # noqa: PT011
        environment.from_string(TEMPLATES[number]).render(messages=SHOWN, marker=str(tmp_path / "m.png"))
    assert not isinstance(caught.value, MemoryError)
    assert not list(tmp_path.iterdir())


def test_published_templates_render_as_they_did() -> None:
    """Every template that TRL ships, on a conversation with tools, in transformers' environment and in the bounded."""
    from transformers.utils import chat_template_utils
    from trl import chat_template_utils as published

    call = {"type": "function", "function": {"name": "search", "arguments": {"query": "a cat"}}}
    messages = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": "What is <it>?\n" * 500},
        {"role": "assistant", "content": "<think>so</think>I look.", "tool_calls": [call]},
        {"role": "tool", "name": "search", "content": "1.0s"},
        {"role": "assistant", "content": "A cat."},
    ] * 20
    tool = {"type": "function", "function": {"name": "search", "description": "Finds.", "parameters": {}}}
    folder = Path(published.__file__).parent / "chat_templates"
    outcomes = []
    for environment in (ImmutableSandboxedEnvironment, BoundedEnvironment):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", environment)
            chat_template_utils._compile_jinja_template.cache_clear()
            outcomes.append({path.name: rendered(path.read_text(), messages, tool) for path in folder.glob("*.jinja")})
    chat_template_utils._compile_jinja_template.cache_clear()
    assert len(outcomes[0]) > 30
    assert sum(len(text) > 5_000 for text in outcomes[0].values()) > len(outcomes[0]) / 2
    assert outcomes[0] == outcomes[1]


def rendered(template: str, messages: list[dict[str, Any]], tool: dict[str, Any]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        return render_jinja_template([messages], tools=[tool], chat_template=template, add_generation_prompt=True)[0][0]
    except RequestError:
        raise
    except Exception as error:
        return type(error).__name__


def test_the_bound_holds_for_whoever_renders(good: Path) -> None:
    """The private name of transformers that `bound_templates` replaces is the one that renders."""
    processor = load_processor(good / "policy")
    turn = [{"role": "user", "content": "a"}]
    for renderer in (processor, processor.tokenizer):
        with pytest.raises(RequestError, match="more work"):
            renderer.apply_chat_template(turn, chat_template=TEMPLATES[1], tokenize=False)
